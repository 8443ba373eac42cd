"""KroneckerFactors and EigenCorrection: equal to the functional fit. The registry cuts data and ranks."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_ext.functional import InfluenceObjective, ParameterView, kronecker_curvature
from lightning_ext.metrics import EigenCorrection, KroneckerFactors


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def data(dtype=torch.float32, sizes=(5, 3, 6)):
    torch.manual_seed(1)
    return [(torch.randn(n, 4, dtype=dtype), torch.arange(n) % 3) for n in sizes]


OBJECTIVE = InfluenceObjective()
pytestmark = pytest.mark.filterwarnings("ignore:.*have no Kronecker factors")


def test_parameters_without_factors_are_named():
    with pytest.warns(UserWarning, match=r"2 of 6 parameters \(\d+% of the numbers\) have no.*: 2.weight, 2.bias"):
        metric = KroneckerFactors(network(), OBJECTIVE)
    assert metric.diagonal == ("2.weight", "2.bias")


@pytest.mark.parametrize("include", [None, "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_passes_equal_the_functional_fit(dtype, include):
    module, batches = network(dtype), data(dtype)
    factors = KroneckerFactors(module, OBJECTIVE, include)
    for batch in batches:
        factors.update(module, batch)
    kfac = factors.curvature()
    correction = EigenCorrection(module, OBJECTIVE, kfac, include)
    for batch in batches:
        correction.update(module, batch)
    view = ParameterView(module, include)
    for ours, corrected in ((kfac, False), (correction.curvature(), True)):
        fitted = kronecker_curvature(module, OBJECTIVE, batches, view, corrected=corrected)
        rows = torch.randn(2, view.numel, dtype=dtype)
        assert ours.eigenvalues().dtype == dtype
        torch.testing.assert_close(ours.solve(rows, 0.1), fitted.solve(rows, 0.1))


def test_the_network_is_no_part_of_the_metric():
    module = network()
    metric = KroneckerFactors(module, OBJECTIVE)
    metric.update(module, data()[0])
    assert not list(metric.parameters())
    assert not list(metric.children())
    before = copy.deepcopy(module.state_dict())
    assert b"Tanh" not in pickle.dumps(metric)
    metric.to(torch.bfloat16)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert metric.compute()["0.A"].dtype == torch.float64
    assert module.training


def test_a_twin_follows_the_network_it_is_given():
    module, other = network(), network()
    with torch.no_grad():
        other[0].weight.mul_(3)
    metric = KroneckerFactors(module, OBJECTIVE)
    for trained in (module, other):
        metric.update(trained, data()[0])
    fresh = KroneckerFactors(other, OBJECTIVE)
    fresh.update(other, data()[0])
    alone = KroneckerFactors(module, OBJECTIVE)
    alone.update(module, data()[0])
    both = (fresh.compute()["3.A"] + alone.compute()["3.A"]) / 2
    torch.testing.assert_close(metric.compute()["3.A"], both)


def test_sampled_labels_depend_on_the_seed_and_the_update_alone():
    module, batch = network(), data()[0]

    def sampled(seed, updates=1):
        metric = KroneckerFactors(module, OBJECTIVE, fisher="mc", seed=seed)
        for _ in range(updates):
            metric.update(module, batch)
            torch.rand(3)
        return metric.compute()["3.S"]

    assert torch.equal(sampled(0), sampled(0))
    assert not torch.allclose(sampled(0), sampled(1))
    assert not torch.allclose(sampled(0), sampled(0, updates=2)), "the second update drew the labels of the first"


def test_the_step_value_of_a_forward_takes_no_labels_from_the_sum():
    module, batch = network(), data()[0]
    updated, called = (KroneckerFactors(module, OBJECTIVE, fisher="mc") for _ in range(2))
    for _ in range(3):
        updated.update(module, batch)
        called(module, batch)  # in which torchmetrics counts from 0
    assert torch.equal(called.compute()["3.S"], updated.compute()["3.S"])


def test_each_rank_draws_its_own_labels(monkeypatch):
    module, batch = network(), data()[0]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def sampled(rank):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        metric = KroneckerFactors(module, OBJECTIVE, fisher="mc", sync_on_compute=False)
        metric.update(module, batch)
        return metric.compute()["3.S"]

    assert torch.equal(sampled(0), sampled(0))
    assert not torch.allclose(sampled(0), sampled(1))


def test_under_inference_mode():
    module, batches = network(), data()
    expected = KroneckerFactors(module, OBJECTIVE)
    expected.update(module, batches[0])
    with torch.inference_mode():
        inside = KroneckerFactors(module, OBJECTIVE)
        batch = tuple(part.clone() for part in batches[0])
        assert batch[0].is_inference()
        inside.update(module, batch)
        inside.reset()
        inside.update(module, batch)
        correction = EigenCorrection(module, OBJECTIVE, inside.curvature())
        correction.update(module, batch)
    inside.update(module, batches[0])
    torch.testing.assert_close(inside.compute()["3.S"], expected.compute()["3.S"])
    assert correction.curvature().eigenvalues().sum() > 0


class TestErrors:
    def test_another_network(self):
        metric = KroneckerFactors(network(), OBJECTIVE)
        with pytest.raises(ValueError, match="layers and parameters of the one that the metric was made for"):
            metric.update(nn.Linear(4, 3), data()[0])

    def test_another_curvature(self):
        module = network()
        kfac = kronecker_curvature(module, OBJECTIVE, data(), corrected=False)
        with pytest.raises(ValueError, match=r"curvature has the layers \['0', '3'\], the network \['3'\]"):
            EigenCorrection(module, OBJECTIVE, kfac, include=r"^3\.")

    def test_no_sample(self):
        with (
            pytest.raises(RuntimeError, match="KroneckerFactors has seen no sample"),
            pytest.warns(UserWarning, match="before the ``update``"),
        ):
            KroneckerFactors(network(), OBJECTIVE).compute()
