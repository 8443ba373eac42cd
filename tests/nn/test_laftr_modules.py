"""Networks that are not a plain chain: parts registered twice, tied, compiled, residual, attentive, in few bits."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ext.functional import gated_distance
from lightning_ext.nn import function_space_estimator as build
from tests.nn.laftr_toys import NAMES, batches, fitted, moved, network, shifted, table

ANY = [name for name in NAMES if name not in ("laftr-moments", "laftr-mean")]  # these know chains and gates only
DRAWN = ("laftr", "laftr-sample")


def registered_twice():
    """One layer called twice, under two names."""
    torch.manual_seed(0)
    same = nn.Linear(4, 4)
    return nn.Sequential(same, nn.ReLU(), same, nn.ReLU(), nn.Linear(4, 3)).double()


class Tied(nn.Module):
    """Two layers with one weight and biases of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


class Residual(nn.Module):
    """Convolutions with running statistics around a skip, with a pool."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.inner, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3)
        self.double()
        self(2 * torch.randn(30, 4, dtype=torch.float64) + 1)  # statistics other than 0 and 1

    def forward(self, x):
        x = self.stem(x.view(-1, 1, 2, 2))
        x = x + self.inner(F.relu(self.norm(x), inplace=True))
        return self.last(F.max_pool2d(x.relu(), 2).flatten(1))


def transformer():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Linear(2, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(),
        nn.Linear(8, 3),
    ).double()  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.last(self.inner(x.unflatten(1, (2, 2)))[0][:, -1].relu())


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [registered_twice, Tied])
def test_a_shared_weight_is_one_parameter_and_stays_in_its_place(name, make):
    net = make()
    estimator, other = fitted(name, net), moved(net)
    kinds = [type(part.weight) for part in other.modules() if isinstance(part, nn.Linear)]
    before, names = flat(other), [key for key, _ in other.named_parameters(remove_duplicate=False)]
    found = estimator.distance(other)
    found.backward()
    assert [type(part.weight) for part in other.modules() if isinstance(part, nn.Linear)] == kinds
    assert set(kinds) == {nn.Parameter}
    assert torch.equal(flat(other), before)
    assert [key for key, _ in other.named_parameters(remove_duplicate=False)] == names
    assert all(p.grad.abs().max() > 0 for p in other.parameters())
    reference = sum(p.nbytes for p in net.parameters())  # once, though it stands in two places
    held = sum(value.nbytes for value in estimator.state_dict()["_extra_state"]["reference"].values())
    assert held == reference
    assert abs(estimator.distance(net).item()) < 1e-15


@pytest.mark.parametrize("make", [registered_twice, Tied])
@pytest.mark.parametrize("name", ["full", "ntk", "laftr"])
def test_a_shared_weight_moves_in_both_of_its_places(name, make):
    net = make()
    other = moved(net)
    options = {"divergence": "mse"} | ({"fixed_draws": True} if name == "laftr" else {})
    estimator = fitted(name, net, **options)
    x = table()[0] if name != "laftr" else estimator.reference_batches(net)[0]
    weights = None if name != "laftr" else estimator.reference_batches(net)[1]
    chains = [(m[0], m[2], m[4]) if make is registered_twice else (m.first, m.second, m.last) for m in (net, other)]
    flattened = [[p.detach() for part in parts for p in (part.weight, part.bias)] for parts in chains]

    def run(p, x):
        h = (x @ p[0].mT + p[1]).relu()
        return (h @ p[2].mT + p[3]).relu() @ p[4].mT + p[5]

    if name == "laftr":
        named = [dict(enumerate(each)) for each in flattened]
        expected = gated_distance(run, *named, x, divergence="mse", weights=weights)
    else:
        old, new = (run(each, x) for each in flattened)
        if name == "ntk":
            step = [b - a for a, b in zip(*flattened, strict=True)]
            new = old + torch.func.jvp(lambda p: run(p, x), (flattened[0],), (step,))[1]
        expected = 0.5 * (new - old).square().sum(1).mean()
    assert estimator.distance(other).item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_module_that_fails_gets_its_own_values_back():
    net = network()
    estimator = fitted("laftr", net)
    other = moved(net)
    other[1].register_forward_hook(lambda *_: 1 / 0)
    before = list(other.parameters())
    with pytest.raises(ZeroDivisionError):
        estimator.distance(other)
    assert all(a is b for a, b in zip(before, other.parameters(), strict=True))
    assert all(part.training for part in other.modules())


@pytest.mark.parametrize("name", ANY)
@pytest.mark.parametrize("make", [Residual, transformer, Recurrent])
def test_small_steps_of_any_architecture(name, make):
    if name == "laftr-sample" and make is not Residual:
        pytest.skip("its units are neither open nor closed")
    net = make()
    net(table()[0])  # what a layer derives from its parameters is there before
    estimator = fitted(name, net, class_conditional=False) if name in DRAWN else fitted(name, net)
    assert abs(estimator.distance(net).item()) < 1e-14
    other = moved(net, 1e-3)
    found = estimator.distance(other)
    found.backward()
    assert found > 0
    moving = [p for p in other.parameters() if p.grad is not None]
    assert sum(p.grad.abs().max() > 0 for p in moving) > len(moving) / 2
    if name in ("full", "coreset", "ntk"):
        x = estimator.state_dict()["_extra_state"]["kept"]["x"]
        p, q = (each.eval()(x).log_softmax(1).detach() for each in (net, other))
        exact = float((p.exp() * (p - q)).sum(1).mean())
        assert found.item() == pytest.approx(exact, rel=0.1 if name == "ntk" else 1e-9)


@pytest.mark.parametrize("make", [Residual, transformer, Recurrent])
def test_with_activations_of_the_reference_small_steps_have_the_exact_distance(make):
    net = make()
    estimator = fitted("laftr", net, class_conditional=False, num_samples=300, fixed_draws=True)
    x = estimator.reference_batches(net)[0]
    other = moved(net, 1e-4)
    p, q = (each.eval()(x).log_softmax(1).detach() for each in (net, other))
    exact = float((p.exp() * (p - q)).sum(1).mean())
    assert estimator.distance(other).item() == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("whole", [True, False])
def test_compiling_before_or_after_changes_nothing(name, whole):
    torch.compiler.reset()  # or it gives up after a few networks
    ran = []

    def backend(graph, _):
        return lambda *args: ran.append(graph) or graph(*args)

    def compiled(module):
        if whole:
            return torch.compile(module, backend=backend)
        module = copy.deepcopy(module)
        module[2] = torch.compile(module[2], backend=backend)
        return module

    net = network()
    other = moved(net)
    expected = fitted(name, net).distance(other).item()
    for before, after in ((compiled(net), other), (net, compiled(other)), (compiled(net), compiled(other))):
        assert fitted(name, before).distance(after).item() == expected
    assert not ran  # compiled code shows no activation
    assert compiled(other)(table()[0]).shape == (90, 3)
    assert ran


@pytest.mark.parametrize("name", NAMES)
def test_fitted_estimators_travel(name):
    net = network()
    estimator, other = fitted(name, net), moved(net)
    estimator.distance(other)
    file = io.BytesIO()
    torch.save(estimator, file)
    file.seek(0)
    twins = [copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator)), torch.load(file, weights_only=False)]
    expected = estimator.distance(other).item()
    assert [twin.distance(other).item() for twin in twins] == [expected] * 3


@pytest.mark.parametrize("name", NAMES)
def test_moving_to_a_device_or_another_type_keeps_every_dtype(name):
    estimator = fitted(name)
    types = [{key: value.dtype for key, value in estimator.state_dict()["_extra_state"][part].items()}
             for part in ("reference", "kept")]  # fmt: skip
    other = moved(network())
    expected = fitted(name).distance(other).item()
    for moved_to in (estimator.to("cpu"), estimator.half(), estimator.to(torch.float32)):
        assert [{key: value.dtype for key, value in moved_to.state_dict()["_extra_state"][part].items()}
                for part in ("reference", "kept")] == types  # fmt: skip
    assert estimator.distance(other).item() == expected
    there = fitted(name).to("meta").state_dict()["_extra_state"]
    held = [*there["reference"].values(), *there["kept"].values()]
    assert {value.device.type for value in held} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_a_network_in_few_bits_is_measured_in_float32(name, dtype):
    net = network().to(dtype)
    other = moved(net)
    estimator = build(name, divergence="mse").fit(net, [(x.to(dtype), labels) for x, labels in batches()])
    found = estimator.distance(other)
    found.backward()
    assert found.dtype == torch.float32
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in other.parameters())
    wide = build(name, divergence="mse").fit(copy.deepcopy(net).double(), [(x, labels) for x, labels in batches()])
    assert found.item() == pytest.approx(wide.distance(copy.deepcopy(other).double()).item(), rel=0.2)
    assert abs(estimator.distance(net).item()) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_buffers_of_another_shape_are_named(name):
    net = network()
    net.register_buffer("mask", torch.ones(3, 3))
    estimator, other = fitted(name, net), shifted(net)
    other.register_buffer("mask", torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"of other shape: \['mask: \(3, 4\), there \(3, 3\)'\]"):
        estimator.distance(other)
    del other.mask
    with pytest.raises(ValueError, match=r"missing: \['mask'\]"):
        estimator.distance(other)
