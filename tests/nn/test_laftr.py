"""What every estimator of function-space distance keeps to: zero at the reference, side effects, state, odd modules."""

import copy
import io

import pytest
import torch
from torch import nn

from lightning_ext.functional import GGNOperator, InfluenceObjective
from lightning_ext.nn import FullDataEstimator, FunctionSpaceEstimator, L2Estimator, MeanDistance, NTKEstimator
from lightning_ext.nn import function_space_estimator as build
from tests.nn.laftr_toys import NAMES, SHIFT, batches, fitted, images, moved, network, shifted, table

CLOSED = ("laftr-moments", "laftr-mean", "ewc", "online-ewc", "kfac")
DRAWING = ("laftr", "laftr-sample")


def divergences(name):
    return ("kl", "mse") if name in CLOSED else ("kl", "mse", "softmax_l2")


CASES = [(name, divergence) for name in NAMES for divergence in divergences(name)]


@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_at_the_reference_distance_and_gradient_are_zero_and_elsewhere_it_is_positive(name, divergence):
    net = network()
    estimator = fitted(name, net, divergence=divergence)
    value = estimator.distance(net)
    assert value.shape == ()
    assert abs(value.item()) < 1e-15
    value.backward()
    assert max(p.grad.abs().max().item() for p in net.parameters()) < 1e-15
    other = moved(net)
    value = estimator.distance(other)
    value.backward()
    assert value > 1e-4
    assert all(p.grad.abs().max() > 1e-9 for p in other.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_of_the_last_bias_is_half_its_square(name):
    net = network()
    assert fitted(name, net, divergence="mse").distance(shifted(net)).item() == pytest.approx(4.5, rel=1e-12)


@pytest.mark.parametrize("name", ["laftr", "ntk", "full"])
def test_a_change_of_the_last_layer_is_measured_exactly(name):
    net = network()
    other = copy.deepcopy(net)
    other[-1] = moved(net)[-1]
    estimator = fitted(name, net, num_samples=300) if name == "laftr" else fitted(name, net)
    data = [estimator.reference_batches(net)[:2]] if name == "laftr" else [(table()[0], None)]
    estimator.reseed(0)
    x, weights = data[0]
    p, q = net(x).log_softmax(1), other(x).log_softmax(1)
    rho = (p.exp() * (p - q)).sum(1)
    expected = rho.mean() if weights is None else weights @ rho
    assert estimator.distance(other).item() == pytest.approx(expected.item(), rel=1e-12)


def rescaled(module, factors=(0.5, 3.0)):
    """The same function: rows of one layer times a factor, columns of the next over it."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for place, factor in zip((0, 2), factors, strict=True):
            scale = factor * torch.linspace(1, 2, len(other[place].bias), dtype=torch.float64)
            other[place].weight *= scale[:, None]
            other[place].bias *= scale
            other[place + 2].weight /= scale
    return other


@pytest.mark.parametrize("name", NAMES)
def test_rescaled_units_change_weights_and_nothing_else(name):
    net = network()
    other = moved(net)
    plain = fitted(name, net, divergence="mse").distance(other).item()
    scaled = fitted(name, rescaled(net), divergence="mse").distance(rescaled(other)).item()
    if name == "l2":
        assert scaled > 1.5 * plain
    else:
        assert scaled == pytest.approx(plain, rel=1e-11)


@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_small_steps_follow_the_gauss_newton_matrix(divergence):
    net = network()
    x, labels = table()
    loss, targets = ("cross_entropy", labels) if divergence == "kl" else ("half_squared_error", torch.zeros(90, 3))
    ggn = GGNOperator(net.eval(), InfluenceObjective(loss), [(x, targets.double() if divergence == "mse" else labels)])
    other = moved(net, 1e-4)
    step = torch.cat([(b - a).flatten() for a, b in zip(net.parameters(), other.parameters(), strict=True)]).detach()
    expected = 0.5 * step @ ggn(step[None])[0]
    for name in ("full", "ntk"):
        assert fitted(name, net, divergence=divergence).distance(other).item() == pytest.approx(
            expected.item(), rel=2e-3
        )
    forms = [fitted(name, net, divergence=divergence).distance(other).item() for name in ("ewc", "kfac")]
    assert all(form == pytest.approx(expected.item(), rel=0.9) for form in forms)  # approximations of it
    assert all(form != pytest.approx(expected.item(), rel=1e-2) for form in forms)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "laftr-moments"])
def test_the_module_and_random_numbers_are_left_alone(name):
    net = images()
    net[2].eval()
    modes = [part.training for part in net.modules()]
    buffers = {key: value.clone() for key, value in net.state_dict().items()}
    generator = torch.get_rng_state()
    estimator = fitted(name, net)
    other = moved(net)
    other.train()
    held = {key: value.clone() for key, value in other.state_dict().items()}
    found = estimator.distance(other)
    assert [part.training for part in net.modules()] == modes
    assert all(part.training for part in other.modules())
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, buffers[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(value, held[key]) for key, value in other.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    estimator.reseed(0)
    assert estimator.distance(other.eval()).item() == found.item()  # as in evaluation mode


@pytest.mark.parametrize("name", NAMES)
def test_at_least_float32_and_no_autocast(name):
    net = network().float()
    data = [(x.float(), labels) for x, labels in batches()]
    with torch.autocast("cpu", torch.bfloat16):
        estimator = fitted(name, net, data, divergence="mse")
        found = estimator.distance(shifted(net))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(4.5, rel=1e-5)
    half = copy.deepcopy(net).bfloat16()
    estimator = fitted(name, half, [(x.bfloat16(), labels) for x, labels in data], divergence="mse")
    found = estimator.distance(shifted(half))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(4.5, rel=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_tensors_and_goes_on_where_it_was(name):
    net, file = network(), io.BytesIO()
    estimator = fitted(name, net, heads=slice(0, 2))
    estimator.distance(moved(net))
    torch.save(estimator.state_dict(), file)
    file.seek(0)
    restored = build(name)
    assert not restored.fitted
    assert restored.nbytes == 0
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.fitted
    assert restored.nbytes == estimator.nbytes
    assert restored.heads == slice(0, 2)
    other = moved(net)
    found = [[each.distance(other).item() for _ in range(3)] for each in (estimator, restored)]
    assert found[0] == found[1]
    assert len(set(found[0])) == (3 if name in DRAWING else 1)
    copied = copy.deepcopy(estimator)
    assert copied.distance(other).item() == estimator.distance(other).item()
    assert not list(estimator.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_tensors_in_the_state(name):
    estimator = fitted(name)
    state = estimator.state_dict()["_extra_state"]
    assert estimator.nbytes == sum(t.nbytes for part in ("reference", "kept") for t in state[part].values())
    newer = fitted(name, moved(network()))
    reference = sum(p.nbytes for p in network().parameters())
    before = estimator.nbytes
    estimator.share_reference(newer)
    assert estimator.nbytes == before - reference


@pytest.mark.parametrize("name", NAMES)
def test_a_grown_head_is_compared_as_far_as_it_was(name):
    net = network()
    estimator = fitted(name, net, divergence="mse")
    other = shifted(net)
    head = nn.Linear(6, 5).double()
    with torch.no_grad():
        head.weight[:3], head.bias[:3] = other[-1].weight, other[-1].bias
    other[-1] = head
    other.add_module("later", nn.Identity())
    other.register_parameter("spare", nn.Parameter(torch.ones(2).double()))
    found = estimator.distance(other)
    assert found.item() == pytest.approx(4.5, rel=1e-12)
    found.backward()
    torch.testing.assert_close(head.bias.grad, torch.cat([SHIFT, torch.zeros(2)]).double())
    assert not head.weight.grad[3:].any()


@pytest.mark.parametrize("name", NAMES)
def test_other_parameters_are_named(name):
    net = network()
    with pytest.raises(RuntimeError, match=r"has no reference yet: call fit\(module, batches\) first"):
        build(name).distance(net)
    estimator = fitted(name, net)
    smaller = copy.deepcopy(net)
    smaller[-1] = nn.Linear(6, 2).double()
    with pytest.raises(ValueError, match=r"of other shape: \['4\.weight: \(2, 6\), there \(3, 6\)'"):
        estimator.distance(smaller)
    with pytest.raises(ValueError, match=r"missing: \['2\.weight', '2\.bias', '4\.weight', '4\.bias'\]"):
        estimator.distance(copy.deepcopy(net)[:2])


@pytest.mark.parametrize("name", NAMES)
def test_frozen_layers_count_as_far_as_they_moved(name):
    net = network()
    estimator, other = fitted(name, net), moved(net)
    expected = estimator.distance(other).item()
    other[0].requires_grad_(False)
    estimator.reseed(0)
    found = estimator.distance(other)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    found.backward()
    assert other[0].weight.grad is None
    assert other[2].weight.grad.abs().max() > 0


@pytest.mark.parametrize("heads", [[0, 2], slice(0, 3, 2), torch.tensor([0, 2]), torch.tensor([True, False, True])])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "l2"])
def test_only_the_chosen_outputs_count(name, heads):
    net = network()
    estimator = fitted(name, net, divergence="mse", heads=heads)
    assert estimator.distance(shifted(net)).item() == pytest.approx(2.5, rel=1e-12)  # (1 + 4) / 2


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_calls_of_any_form(name):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, image, scale):
            return self.net(image) if scale == 3 else image

    data = [{"image": x, "label": labels} for x, labels in batches()]
    module = Scaled()
    estimator = build(
        name, divergence="mse", forward=lambda m, x: m(x, 3), inputs="image", target=lambda batch: batch["label"]
    ).fit(module, data)
    other = copy.deepcopy(module)
    other.net = shifted(module.net)
    assert estimator.distance(other).item() == pytest.approx(4.5, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "l2"])
def test_bad_batches_are_refused_and_nothing_is_kept_of_them(name):
    estimator = fitted(name)
    with pytest.raises(ValueError, match="a dict has no entry 0: say with inputs= where"):
        estimator.fit(network(), [{"image": table()[0]}])
    assert not estimator.fitted
    assert estimator.nbytes == 0
    with pytest.raises(ValueError, match="batches holds no batch"):
        fitted(name, data=[])
    x, labels = table()
    for bad in (float("nan"), float("inf")):
        x[3, 1] = bad
        with pytest.raises(ValueError, match="finite"):
            fitted(name, data=[(x[:30], labels[:30]), (x[30:], labels[30:])])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="divergence must be one of 'kl', 'mse', 'softmax_l2'; got 'l2'"):
        FullDataEstimator(divergence="l2")
    with pytest.raises(ValueError, match=r"estimator must be one of 'laftr', .*'l2'; got 'si'"):
        build("si")
    for heads in (1, [], [0.5], [[0]]):
        with pytest.raises(ValueError, match="heads must be a slice, or a list of the outputs that count"):
            FullDataEstimator().fit(network(), batches(), heads=heads)
    with pytest.raises(ValueError, match="estimators must hold at least one"):
        MeanDistance([])


def test_tokens_can_be_stored_but_have_no_moments():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    data = [(torch.arange(20).view(10, 2) % 5, torch.arange(10) % 3)]
    for name in NAMES:
        if name.startswith("laftr"):
            with pytest.raises(TypeError, match=r"must be floating.*For token ids, take the embedding's output"):
                fitted(name, net, data)
        else:
            assert fitted(name, net, data, divergence="mse").distance(shifted(net)).item() == pytest.approx(4.5)

    def embedded(module, x):
        return module[1:](x)

    estimator = build("laftr-moments", divergence="mse", forward=embedded, inputs=lambda batch: net[0](batch[0]))
    assert estimator.fit(net, data).distance(shifted(net)).item() == pytest.approx(4.5)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_tasks(name):
    net = network()
    estimators = [fitted(name, net, [part], class_conditional=False) if name.startswith("laftr") else
                  fitted(name, net, [part]) for part in batches(45)]  # fmt: skip
    other = moved(net)
    pooled = type(estimators[0]).pool(estimators)
    assert pooled.fitted
    assert pooled.nbytes == sum(each.nbytes for each in estimators)
    found = pooled.distance(other).item()
    if name not in DRAWING:
        assert found == pytest.approx(sum(each.distance(other).item() for each in estimators) / 2, rel=1e-12)
    assert pooled.distance(net).item() == pytest.approx(0.0, abs=1e-15)


def test_an_estimator_of_ones_own():
    class Largest(FunctionSpaceEstimator):
        def _fit(self, module, batches, reduce):
            self._kept["x"] = torch.cat([self.inputs_of(batch) for batch in batches])

        def _distance(self, module):
            x = self._kept["x"]
            new = self.run(module, self.parameters_of(module), x)
            return (new - self.reference_run(module, x)).abs().max()

    net = network()
    estimator = Largest().fit(net, batches())
    assert estimator.distance(shifted(net)).item() == pytest.approx(2.0)
    half = net.bfloat16()
    assert Largest().fit(half, [batches()[0][0].bfloat16()]).distance(shifted(half)).dtype == torch.float32
    with pytest.raises(NotImplementedError, match="Largest cannot merge two tasks"):
        estimator.absorb(estimator)


def test_repr_says_what_it_is():
    assert repr(L2Estimator()) == "L2Estimator(divergence='kl', fitted=False)"
    assert "fitted=True" in repr(NTKEstimator().fit(network(), batches()))
