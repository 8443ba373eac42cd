"""Several tasks in one pass against one task after the other."""

import pytest
import torch

from lightning_ext.functional import InputModel, InputStatistics, gated_distance, pooled_distance, pooled_inputs


def forward(p, x):
    return torch.relu(x @ p["w"]) @ p["v"]


def params(seed):
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 5, generator=g), "v": torch.randn(5, 4, generator=g)}


def model(seed, groups=2, covariance="full"):
    g = torch.Generator().manual_seed(seed)
    sums = InputStatistics.zeros((3,), num_groups=groups, covariance=covariance, rank=2)
    return sums.add(torch.randn(20, 3, generator=g), torch.arange(20) % groups).finalise().to(torch.zeros(()))


@pytest.mark.parametrize("heads", [[None, None], [slice(0, 2), slice(2, 4)], [[0, 1], torch.tensor([1, 2, 3])]])
def test_the_pool_is_the_weighted_sum_of_its_tasks(heads):
    pool, task_of_group = pooled_inputs([model(0), model(1, groups=3)], [0.25, 0.75])
    assert task_of_group.tolist() == [0, 0, 1, 1, 1]
    assert pool.weights.sum().item() == pytest.approx(1.0)
    x, weights, group = pool.sample(60, torch.Generator().manual_seed(0))
    task = task_of_group[group]
    current = {name: value.requires_grad_() for name, value in params(1).items()}
    ours = pooled_distance(forward, params(0), current, x, task, heads, weights=weights)
    theirs = sum(
        gated_distance(forward, params(0), current, x[task == t], heads=heads[t], weights=weights[task == t])
        for t in (0, 1)
    )
    torch.testing.assert_close(ours, theirs)
    both = [torch.autograd.grad(value, current["w"])[0] for value in (ours, theirs)]
    torch.testing.assert_close(*both)
    assert weights[task == 0].sum().item() == pytest.approx(0.25)


def test_the_network_runs_once_for_all_tasks():
    calls = []

    def counted(p, x):
        calls.append(len(x))
        return forward(p, x)

    pool, task_of_group = pooled_inputs([model(seed) for seed in range(5)])
    x, weights, group = pool.sample(40)
    pooled_distance(counted, params(0), params(1), x, task_of_group[group], [None] * 5, weights=weights)
    assert calls == [40, 40]


def test_ranks_of_covariances_may_differ():
    narrow = InputModel(torch.ones(1), torch.zeros(1, 3), torch.ones(1, 3, 1))
    pool, _ = pooled_inputs([narrow, model(0, groups=1)])
    torch.testing.assert_close(pool.covariance()[0], torch.ones(3, 3))
    torch.testing.assert_close(pool.covariance()[1], model(0, groups=1).covariance()[0])


def test_bad_input():
    with pytest.raises(ValueError, match="one model or more"):
        pooled_inputs([])
    with pytest.raises(ValueError, match="one kind of covariance"):
        pooled_inputs([model(0), model(1, covariance="diag")])
