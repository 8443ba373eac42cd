"""What estimators of function-space distance refuse at fit, while the data are there, and what they leave alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ext.nn import LAFTREstimator
from lightning_ext.nn import function_space_estimator as build
from tests.nn.laftr_toys import NAMES, SHIFT, batches, fitted, moved, network

WITH_DATA = [name for name in NAMES if name != "l2"]


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("heads", [slice(40, 80), [70], [0, -70], slice(2, 2)])
def test_heads_that_the_network_does_not_have_are_refused_at_fit(name, heads):
    net = network()
    with pytest.raises(ValueError, match=r"heads must choose at least one of \d+ outputs, and none beyond them"):
        fitted(name, net, heads=heads)
    assert not build(name).fitted


@pytest.mark.parametrize("heads", ["ab", [0.5], [[0], [1]], [], object()])
def test_heads_that_are_no_choice_are_refused(heads):
    with pytest.raises(ValueError, match="heads must be a slice, or a list of the outputs that count"):
        build("laftr").fit(network(), batches(), heads=heads)


class Noisy(nn.Module):
    """Dropout that does not look at its mode."""

    def __init__(self):
        super().__init__()
        self.layers = copy.deepcopy(network())

    def forward(self, x):
        return self.layers(F.dropout(x, 0.2))


@pytest.mark.parametrize("name", WITH_DATA)
def test_networks_that_draw_in_eval_mode_are_refused_and_the_random_state_stays(name):
    net, data = Noisy().double(), batches()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"Noisy draws random numbers in eval mode.*training=self.training"):
        fitted(name, net, data)
    assert torch.equal(before, torch.get_rng_state())


class Counting(nn.Module):
    """Counts its calls, in place and by a new tensor, and keeps its last output."""

    def __init__(self):
        super().__init__()
        self.layers = copy.deepcopy(network())
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("again", torch.zeros(()))
        self.register_buffer("level", torch.ones(()))

    def forward(self, x):
        self.calls += 1
        self.again = self.again + 1
        self.level.mul_(2.0)  # and makes its outputs another every time
        return self.layers(x) * (self.level / self.level.detach())


@pytest.mark.parametrize("name", ["laftr", "laftr-sample", "coreset", "full", "ewc", "kfac"])
def test_buffers_that_a_network_writes_stay_as_they_were(name):
    net = Counting().double()
    held = dict(net.named_buffers())
    estimator = fitted(name, net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.layers[-1].bias.add_(SHIFT.to(other.layers[-1].bias))
    distances = []
    for _ in range(2):
        estimator.reseed(0)
        value = estimator.distance(other)
        value.backward()
        distances.append(value.item())
    assert distances[0] == distances[1] > 0
    assert {key: float(buffer) for key, buffer in net.named_buffers()} == {"calls": 0, "again": 0, "level": 1}
    assert {key: float(buffer) for key, buffer in other.named_buffers()} == {"calls": 0, "again": 0, "level": 1}
    assert all(buffer is held[key] for key, buffer in net.named_buffers())
    assert float(estimator.get_extra_state()["reference"]["calls"]) == 0


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = copy.deepcopy(network())

    def forward(self, x):
        return self.layers(x) + torch.tensor([0.0, -torch.inf, 0.0], dtype=x.dtype)


@pytest.mark.parametrize("mode", ["mean", "moments"])
def test_masked_outputs_do_not_pass_fit_as_nan(mode):
    with pytest.raises((ValueError, NotImplementedError)):
        fitted(f"laftr-{mode}", Masked().double())
    with pytest.raises(ValueError, match=r"distance to itself is nan: are some outputs infinite.*heads"):
        fitted("laftr-mean", Masked().double())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("laftr", {"nope": 1}, r"estimator 'laftr' has no option 'nope'; it knows class_conditional, covariance,"),
        ("ewc", {"covariance": "full"}, r"'ewc' has no option 'covariance'; it knows divergence, fisher, forward,"),
        ("l2", {"size": 3, "rank": 2}, "'l2' has no option 'rank', 'size'"),
        ("laftr", {"num_samples": 1.5}, "num_samples must be an integer of at least 1.*got 1.5"),
        ("laftr", {"jitter": float("nan")}, "jitter at least 0"),
    ],
)
def test_options_that_do_not_exist_or_fit_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize(
    ("written", "read"), [("laftr", "ewc"), ("laftr", "laftr-moments"), ("ewc", "kfac"), ("coreset", "full")]
)
def test_the_state_of_another_kind_is_refused(written, read):
    state = fitted(written).state_dict()
    with pytest.raises(ValueError, match=r"this is the state of \w+.*, and the estimator is \w+"):
        build(read).load_state_dict(state)


def test_states_from_before_kinds_were_kept_still_load():
    estimator = fitted("laftr")
    state = estimator.state_dict()
    del state["_extra_state"]["kind"]
    again = LAFTREstimator()
    again.load_state_dict(state)
    other = moved(network())
    assert again.distance(other) == estimator.distance(other)
