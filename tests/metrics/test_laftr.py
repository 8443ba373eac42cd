"""The exact distance in function space, and statistics of inputs and gates, on one rank and on two."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ext.functional import RecordActivations, moment_distance
from lightning_ext.metrics import FunctionSpaceDistance, LAFTRStatistics
from lightning_ext.testing import check_metric, run_ddp

DIVERGENCES = ["kl", "mse", "softmax_l2"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(name, new, old):
    """Each example's divergence, summed over positions for "mse", else one for each position."""
    if name == "kl":
        return F.kl_div(new.log_softmax(-1), old.log_softmax(-1), reduction="none", log_target=True).sum(-1).flatten()
    if name == "softmax_l2":
        return ((new.softmax(-1) - old.softmax(-1)) ** 2).sum(-1).flatten() / 2
    return ((new - old) ** 2).flatten(1).sum(1) / 2


class TestFunctionSpaceDistance:
    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_every_way_of_cutting_saving_and_spreading_the_data(self, name):
        batches = [(normal(n, 4, seed=n), normal(n, 4, seed=n + 10)) for n in (5, 3, 8)]

        def reference(seen):
            return by_hand(name, *(torch.cat(column) for column in zip(*seen, strict=True))).mean()

        check_metric(lambda: FunctionSpaceDistance(name), batches, reference, atol=1e-12, rtol=1e-12)

    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_sequences_of_unequal_length(self, name):
        batches = [(normal(2, t, 4, seed=t), normal(2, t, 4, seed=t + 10)) for t in (3, 5)]
        metric = FunctionSpaceDistance(name)
        for batch in batches:
            metric.update(*batch)
        terms = torch.cat([by_hand(name, *batch) for batch in batches])
        torch.testing.assert_close(metric.compute(), terms.mean())

    def test_the_reference_comes_second(self):
        new, old = torch.tensor([[0.0, 0.0]]), torch.tensor([[9.0, 1.0]]).log()
        metric = FunctionSpaceDistance()
        metric.update(new, old)
        expected = 0.9 * torch.log(torch.tensor(1.8)) + 0.1 * torch.log(torch.tensor(0.2))
        torch.testing.assert_close(metric.compute().float(), expected)

    @pytest.mark.parametrize("heads", [slice(1, 3), [1, 2], torch.tensor([1, 2])])
    def test_heads_are_cut_out_before_anything_else(self, heads):
        new, old = normal(6, 4), normal(6, 4, seed=1)
        metric, cut = FunctionSpaceDistance(), FunctionSpaceDistance()
        metric.update(new, old, heads=heads)
        cut.update(new[:, 1:3], old[:, 1:3])
        assert metric.compute() == cut.compute()

    def test_close_networks_keep_their_digits_in_float32(self):
        old = torch.tensor([[0.0, 1.0, 2.0]])
        new = old + torch.tensor([[2.0**-12, 0.0, 0.0]])
        metric = FunctionSpaceDistance().float()
        metric.update(new, old)
        p = old.double().softmax(-1)[0, 0]
        assert metric.compute().item() == pytest.approx((0.5 * p * (1 - p) * 2.0**-24).item(), rel=1e-3)

    def test_results_carry_no_gradient(self):
        value = FunctionSpaceDistance()(normal(3, 2).requires_grad_(), normal(3, 2, seed=1))
        assert not value.requires_grad

    def test_an_empty_batch_changes_nothing(self):
        metric = FunctionSpaceDistance()
        metric.update(normal(3, 2), normal(3, 2, seed=1))
        before = metric.compute()
        metric.update(torch.zeros(0, 2), torch.zeros(0, 2))
        assert metric.compute() == before

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="divergence must be one of 'kl', 'mse', 'softmax_l2'; got 'js'"):
            FunctionSpaceDistance("js")
        metric = FunctionSpaceDistance()
        with pytest.raises(ValueError, match=r"of one shape; got \(2, 3\) and \(2, 4\)"):
            metric.update(torch.zeros(2, 3), torch.zeros(2, 4))
        for place in (0, 1):
            outputs = [torch.zeros(2, 3), torch.zeros(2, 3)]
            outputs[place][1, 1] = torch.nan
            with pytest.raises(ValueError, match="new and old must not hold NaN"):
                metric.update(*outputs)
        with (
            pytest.warns(UserWarning, match="before the ``update``"),
            pytest.raises(RuntimeError, match="has seen no example on any rank"),
        ):
            FunctionSpaceDistance().compute()

    def test_a_course_of_values_is_drawn(self):
        plt = pytest.importorskip("matplotlib.pyplot")
        _, axes = FunctionSpaceDistance().plot([torch.tensor(0.1), torch.tensor(0.3)])
        assert axes.lines[0].get_ydata().tolist() == pytest.approx([0.1, 0.3])
        plt.close("all")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def sites_of(x):
    with RecordActivations() as tape, torch.no_grad():
        network()(x)
    return tape.sites


def batch(n, seed):
    """Inputs whose groups are of unequal sizes, with the gates of a fixed network."""
    x = normal(n, 3, seed=seed) + 2.0
    return x, torch.arange(n) % 7 % 3, sites_of(x)


BATCHES = [batch(n, seed) for seed, n in enumerate((40, 1, 90, 33))]


def statistics(**kwargs):
    return LAFTRStatistics([3], sites_of(torch.zeros(1, 3).double()), **{"num_groups": 3, "rank": 3, **kwargs})


def moments(seen):
    """Moments of each group from all examples at once, straight from their definitions."""
    x, groups = (torch.cat([part[i] for part in seen]) for i in (0, 1))
    masks = [groups == c for c in range(3)]
    gates = [torch.cat([part[2][i].gate for part in seen]) for i in (0, 1)]

    def by_group(values):
        return torch.stack([values[mask].sum(0) / max(1, int(mask.sum())) for mask in masks])

    return {
        "weights": torch.stack([mask.double().mean() for mask in masks]),
        "means": by_group(x),
        **{f"gate.{i}": by_group(gate) for i, gate in enumerate(gates)},
    }


def covariances(seen):
    x, groups = (torch.cat([part[i] for part in seen]) for i in (0, 1))
    return torch.stack([x[groups == c].mT.cov(correction=0) for c in range(3)])


class TestLAFTRStatistics:
    @pytest.mark.parametrize("covariance", ["full", "diag", "lowrank"])
    def test_every_way_of_sharing_the_data_gives_one_answer(self, covariance):
        check_metric(
            lambda: statistics(covariance=covariance), BATCHES, moments, row_split=False, atol=1e-12, rtol=1e-9
        )

    def test_batches_cut_in_two(self):
        plain = [(x, groups) for x, groups, _ in BATCHES]
        check_metric(lambda: LAFTRStatistics([3], num_groups=3), plain, atol=1e-12, rtol=1e-9)

    @pytest.mark.parametrize(("covariance", "jitter"), [("full", 0.25), ("diag", 0.25), ("lowrank", 0.0)])
    def test_the_factors_are_those_of_the_covariances(self, covariance, jitter):
        metric = statistics(covariance=covariance, jitter=jitter)
        for part in BATCHES:
            metric.update(*part)
        expected = covariances(BATCHES) + jitter * torch.eye(3).double()
        if covariance == "diag":
            expected = expected * torch.eye(3).double()
        torch.testing.assert_close(metric.model().covariance(), expected)
        assert metric.compute()["factors"].dtype == torch.float64

    def test_channels(self):
        conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).double()
        x = normal(6, 1, 5, 5)
        with RecordActivations() as tape, torch.no_grad():
            conv(x)
        metric = LAFTRStatistics((1, 5, 5), tape.sites, granularity="channel")
        metric.update(x, sites=tape.sites)
        rate = (conv(x) > 0).double().mean((0, 2, 3))
        torch.testing.assert_close(metric.compute()["gate.0"].flatten(), rate)
        assert metric.compute()["means"].shape == (1, 1, 5, 5)

    def test_two_ranks_of_unequal_shares_agree_on_the_distance(self):
        changed = network(seed=1)
        layers = [
            [(layer.weight.detach(), layer.bias.detach()) for layer in net if isinstance(layer, nn.Linear)]
            for net in (network(), changed)
        ]

        def distance(metric):
            model = metric.model()
            each = moment_distance(*layers, model.means, model.covariance(), model.gate_means())
            return metric.compute(), (model.weights * each).sum()

        def of_rank(rank, shares):
            metric = statistics()
            for part in shares[rank]:
                metric.update(*part)
            return distance(metric)

        whole = statistics()
        for part in BATCHES:
            whole.update(*part)
        expected = distance(whole)
        assert expected[1] > 0.01
        for shares in ([BATCHES[:1], BATCHES[1:]], [BATCHES, []]):
            first, second = run_ddp(of_rank, shares, world_size=2)
            torch.testing.assert_close(first, second, rtol=0, atol=0)
            torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-14)

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="jitter must be at least 0; got -1"):
            statistics(jitter=-1.0)
        with pytest.raises(ValueError, match="covariance must be one of 'full', 'diag', 'lowrank'; got 'dense'"):
            statistics(covariance="dense")
        metric = statistics()
        with pytest.raises(TypeError, match=r"inputs must be floating.*For token ids"):
            metric.update(torch.ones(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long))
        with pytest.raises(ValueError, match="groups must lie between 0 and 2; got 0 to 3"):
            metric.update(torch.ones(2, 3), torch.tensor([0, 3]))
        with pytest.raises(RuntimeError, match="has seen no example on any rank"):
            metric.model()
        with (
            pytest.warns(UserWarning, match="before the ``update``"),
            pytest.raises(RuntimeError, match="has seen no example on any rank"),
        ):
            statistics().compute()
