"""Heads that grow from task to task, with estimators that refer to the newest weights: each compares what there was."""

import copy

import pytest
import torch
from torch import nn

from lightning_ext.nn import LAFTREstimator
from lightning_ext.nn import function_space_estimator as build
from tests.nn.laftr_toys import NAMES, batches, fitted, moved, network, shifted


def grown(module, by=2):
    """A copy with further outputs, behind those that there are."""
    other = copy.deepcopy(module)
    old = other[-1]
    torch.manual_seed(3)
    other[-1] = nn.Linear(old.in_features, old.out_features + by).double()
    with torch.no_grad():
        other[-1].weight[: old.out_features], other[-1].bias[: old.out_features] = old.weight, old.bias
    return other


def own(estimator):
    return estimator.state_dict()["_extra_state"]["reference"]


@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("heads", [None, slice(0, 3), [0, 2]])
@pytest.mark.parametrize("name", NAMES)
def test_a_reference_with_more_outputs_serves_an_earlier_task(name, heads, divergence):
    net = network()
    newer, other = grown(moved(net, 0.05)), moved(grown(net))
    estimator = fitted(name, net, heads=heads, divergence=divergence)
    without = fitted(name, net, heads=heads, divergence=divergence)
    narrow = copy.deepcopy(newer)
    narrow[-1] = nn.Linear(6, 3).double()
    with torch.no_grad():
        narrow[-1].weight[:], narrow[-1].bias[:] = newer[-1].weight[:3], newer[-1].bias[:3]
    estimator.share_reference(fitted(name, newer))
    without.share_reference(fitted(name, narrow))
    found = estimator.distance(other)
    assert found.item() == pytest.approx(without.distance(other).item(), rel=1e-12)
    found.backward()
    assert not other[-1].weight.grad[3:].any()
    assert estimator.nbytes == without.nbytes
    restored = build(name, divergence=divergence)
    restored.load_state_dict(estimator.state_dict())
    estimator.reseed(5)
    restored.reseed(5)
    assert restored.distance(other).item() == estimator.distance(other).item()


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_reference_takes_no_memory_of_its_own(name):
    net = network()
    for newer in (fitted(name, moved(net)), fitted(name, grown(net))):
        estimator = fitted(name, net)
        estimator.share_reference(newer)
        addresses = [{key: value.data_ptr() for key, value in own(each).items()} for each in (estimator, newer)]
        assert addresses[0] == addresses[1]
        assert own(estimator)["4.weight"].shape == (3, 6)


@pytest.mark.parametrize("name", NAMES)
def test_a_reference_of_another_architecture_is_refused(name):
    estimator, smaller = fitted(name), network()
    smaller[-1] = nn.Linear(6, 2).double()
    for other, message in ((smaller, r"of other shape: \['4\.weight"), (network()[:2], r"missing: \['2\.weight")):
        with pytest.raises(ValueError, match=message):
            estimator.share_reference(build("l2").fit(other, []))
    assert own(estimator)["4.weight"].shape == (3, 6)


@pytest.mark.parametrize("mode", ["relu", "sample"])
@pytest.mark.parametrize("heads", [(None, None), (slice(0, 3), slice(3, 5))])
@pytest.mark.parametrize("order", [1, -1])
def test_a_pool_of_tasks_with_their_own_heads(mode, heads, order):
    net = network()
    newer, other = grown(moved(net, 0.05)), moved(grown(net))
    options = {"divergence": "mse", "num_samples": 100_000, "class_conditional": False}
    first = fitted("laftr-" + mode, net, heads=heads[0], **options)
    second = fitted("laftr-" + mode, newer, batches(45)[1:], heads=heads[1], **options)
    first.share_reference(second)
    expected = (first.distance(other) + second.distance(other)).item() / 2
    pooled = LAFTREstimator.pool([first, second][::order])
    found = pooled.distance(other)
    assert found.item() == pytest.approx(expected, rel=0.03)
    shift = torch.tensor([1.0, 2.0, -2.0, 3.0, 4.0])
    either = 4.5 + (12.5 if heads[1] else 17.0)  # the second task sees all of its outputs, or the new ones
    assert pooled.distance(shifted(newer, shift)).item() == pytest.approx(either / 2, rel=1e-9)
