"""Chains of linear layers and ReLUs: the same distances without running the network."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from lightning_ext.nn import LAFTREstimator, function_space_estimator
from lightning_ext.nn._laftr_ahead import MOST_DRAWS, block_of
from tests.nn.laftr_toys import batches, fitted, moved, network, table

MODES = ("laftr", "laftr-sample")


def run_by_itself(estimator):
    """The same, by running the network."""
    other = copy.deepcopy(estimator)
    other._ahead._refused = True
    return other


def values(estimator, module, count=9):
    """Distances and gradients, one after the other."""
    found = []
    for _ in range(count):
        distance = estimator.distance(module)
        found += [distance.detach(), *torch.autograd.grad(distance, list(module.parameters()))]
    return found


def assert_as_run(estimator, module, **close):
    slow = run_by_itself(estimator)
    slow.reseed(*estimator.address)
    torch.testing.assert_close(values(estimator, module), values(slow, module), **close)


@pytest.mark.parametrize("heads", [None, [0, 2]])
@pytest.mark.parametrize("divergence", ["kl", "mse", "softmax_l2"])
@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_distances_and_gradients_are_those_of_the_network_run(mode, conditional, divergence, heads):
    net = network()
    options = {"divergence": divergence, "class_conditional": conditional, "num_samples": 30}
    assert_as_run(fitted(mode, net, heads=heads, **options), moved(net), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("covariance", ["diag", "lowrank"])
def test_with_other_covariances(covariance):
    net = network()
    assert_as_run(fitted("laftr", net, covariance=covariance, rank=2), moved(net), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_pooled_tasks(mode):
    net = network()
    pooled = LAFTREstimator.pool([fitted(mode, net, data, num_samples=50) for data in (batches(), batches()[:1])])
    assert_as_run(pooled, moved(net), rtol=1e-10, atol=1e-13)


def test_images_dropout_and_functions_of_ones_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.dropout, self.last = nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3, bias=False)

        def forward(self, x):
            return self.last(self.dropout(torch.relu(self.first(x.flatten(1)))))

    x, labels = table()
    net = Own().double()
    estimator = fitted("laftr", net, [(x.view(-1, 2, 2), labels)])
    assert_as_run(estimator, moved(net), rtol=1e-10, atol=1e-13)
    assert not estimator._ahead._refused


def test_the_network_is_looked_at_now_and_then_and_not_run():
    net = network()
    other, estimator, rows = moved(net), fitted("laftr", net), []
    other.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for _ in range(2 * MOST_DRAWS):
        estimator.distance(other)
    assert 0 < len(rows) < 12
    assert max(rows) <= 8


def test_parts_that_play_no_role_may_change():
    class WithMetric(nn.Sequential):
        def forward(self, x):
            for part in list(self)[:5]:
                x = part(x)
            return x

    net = WithMetric(*network(), MeanMetric())
    estimator, other, rows = fitted("laftr", net), moved(net), []
    other.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for step in range(MOST_DRAWS):
        other[5].update(step)
        estimator.distance(other)
    assert 0 < len(rows) < 12


def test_one_output_has_no_divergence_of_softmaxes():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    estimator = fitted("laftr", net, class_conditional=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="at least two classes"):
            estimator.distance(net)


def test_what_fails_once_is_looked_at_again(monkeypatch):
    net = Branching(*network())
    estimator, other = fitted("laftr", net), moved(net)
    values(estimator, other, 5)
    other.act = torch.tanh

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(estimator, "rows", broken)
    with pytest.raises(MemoryError):
        estimator.distance(other)
    monkeypatch.undo()
    del other.act
    assert_as_run(estimator, other, rtol=1e-10, atol=1e-13)


class Shaped(nn.Sequential):
    def forward(self, x):
        return super().forward(x).view(len(x), 1, 3)


class Frozen(nn.Sequential):
    def forward(self, x):
        with torch.no_grad():
            h = self[1](self[0](x))
        return self[4](self[3](self[2](h)))


@pytest.mark.parametrize("kind", [Shaped, Frozen])
def test_networks_that_only_calculate_like_a_chain_are_run(kind):
    net = kind(*network())
    estimator, other = fitted("laftr", net), moved(net)
    slow = run_by_itself(estimator)
    for _ in range(3):
        found = [each.distance(other) for each in (estimator, slow)]
        grads = [torch.autograd.grad(d, list(other.parameters()), allow_unused=True) for d in found]
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-13)
        for ours, theirs in zip(*grads, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    assert estimator._ahead._refused


def test_hooks_on_the_way_back_count():
    net = network()
    estimator, other = fitted("laftr", net), moved(net)
    values(estimator, other, 5)
    other[2].register_full_backward_hook(lambda part, grads, _: (None if grads[0] is None else 0 * grads[0],))
    assert_as_run(estimator, other, rtol=1e-10, atol=1e-13)


def test_parameters_that_the_reference_has_not():
    net = network()
    estimator = fitted("laftr", net)
    longer = nn.Sequential(*moved(net), nn.ReLU(), nn.Linear(3, 3).double())
    expected = run_by_itself(estimator).distance(longer).item()
    assert estimator.distance(longer).item() == pytest.approx(expected, rel=1e-12)


def test_another_architecture_is_refused_each_time():
    estimator = fitted("laftr", network())
    for _ in range(3):
        with pytest.raises(ValueError, match="must have the parameters of the reference"):
            estimator.distance(nn.Sequential(nn.Linear(4, 3)).double())


def test_transforms_within_transforms_leave_nothing_behind():
    net = network()
    estimator, other = fitted("laftr", net, num_samples=20), moved(net)
    estimator.distance(other)
    bias = other[4].bias.detach()

    def at(value):
        return torch.func.functional_call(Measured(estimator, other), {"module.4.bias": value}, ())

    for _ in range(12):
        _, product = torch.func.jvp(torch.func.grad(at), (bias,), (torch.ones_like(bias),))
        assert product.isfinite().all()
    assert_as_run(estimator, other, rtol=1e-10, atol=1e-13)


class Measured(nn.Module):
    def __init__(self, estimator, module):
        super().__init__()
        self.module, self.estimator = module, [estimator]

    def forward(self):
        return self.estimator[0].distance(self.module)


def test_settings_and_the_reference_of_a_pool_count_at_once():
    net = network()
    other, estimator = moved(net), fitted("laftr", net)
    for name, value in (("divergence", "mse"), ("num_samples", 30), ("seed", 3)):
        values(estimator, other, 3)
        setattr(estimator, name, value)
        assert_as_run(estimator, other, rtol=1e-10, atol=1e-13)
    parts = [fitted("laftr", net, num_samples=size) for size in (60, 60)]
    pooled = LAFTREstimator.pool(parts)
    values(pooled, other, 3)
    for part in parts:
        part.share_reference(fitted("l2", moved(net, 0.1)))
    assert_as_run(pooled, other, rtol=1e-10, atol=1e-13)


def test_what_a_failure_leaves_is_not_used(monkeypatch):
    """A chain of another order, whose block could not be made."""

    class Ordered(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.a, self.b, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.order = ["a", "b"]

        def forward(self, x):
            x = self.first(x).relu()
            for name in self.order:
                x = getattr(self, name)(x).relu()
            return self.last(x)

    net = Ordered().double()
    estimator, other = fitted("laftr", net), moved(net)
    values(estimator, other, 5)
    other.order = ["b", "a"]

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(type(estimator._ahead), "_run", broken)
    with pytest.raises(MemoryError):
        estimator.distance(other)
    monkeypatch.undo()
    assert_as_run(estimator, other, rtol=1e-10, atol=1e-13)


def test_half_references_are_not_worked_out_for_every_look():
    net = network()
    estimator, other = fitted("laftr", net, store_dtype="bfloat16"), moved(net)
    runs = []
    run = estimator._ahead._run
    estimator._ahead._run = lambda *args: runs.append(1) or run(*args)
    for step in range(MOST_DRAWS):
        other.step = float(step)
        estimator.distance(other)
    assert len(runs) < 9


CHANGES = []


@CHANGES.append
def part(net):
    net[3] = nn.Tanh()


@CHANGES.append
def hook(net):
    net.register_forward_hook(lambda _, args, out: 2 * out)


@CHANGES.append
def inner_hook(net):
    net[2].register_forward_pre_hook(lambda _, args: (args[0] + 1,))


@CHANGES.append
def attribute(net):
    net.late = True


@CHANGES.append
def setting(net):
    net.settings["late"] = True


@CHANGES.append
def entry(net):
    net.switches[0] = True


@CHANGES.append
def function(net):
    net.act = torch.tanh


@CHANGES.append
def forward(net):
    net.forward = lambda x: 3 * net.act(net[0](x)) @ torch.ones(8, 3).double()


@CHANGES.append
def appended(net):
    net.more.append(nn.Tanh())


@CHANGES.append
def counted_twice(net):
    net.late = 1000 + len(net)
    net.late = 0
    net.late = 2000 + len(net)


@CHANGES.append
def untied(net):
    net[2].weight = nn.Parameter(2 * net[2].weight.detach())


@CHANGES.append
def other_hook(net):
    net.register_forward_hook(lambda _, args, out: out).remove()
    net.register_forward_hook(lambda _, args, out: 3 * out)


@CHANGES.append
def precision(net):
    net.float()


class Branching(nn.Sequential):
    """Does what its attributes say."""

    late, act = False, staticmethod(torch.relu)

    def __init__(self, *parts):
        super().__init__(*parts)
        self.settings, self.switches, self.more = {"late": False}, [False], nn.ModuleList()

    def forward(self, x):
        x = self[3](self[2](self.act(self[0](x))))
        for part in self.more:
            x = part(x)
        return self[4](x.tanh() if self.late or self.settings["late"] or self.switches[0] else x)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_network_counts_at_once(change):
    net = Branching(*network())
    estimator = fitted("laftr", net, num_samples=40)
    other = moved(net)
    values(estimator, other, 5)  # in the middle of a block
    change(other)
    slow = run_by_itself(estimator)
    rounding = 1e-4 if change.__name__ == "precision" else 1e-10
    found = [[each.distance(other).item() for _ in range(3)] for each in (estimator, slow)]
    assert found[0] == pytest.approx(found[1], rel=rounding)


def test_numbers_and_hooks_at_an_address_that_was_used_before():
    class Levelled(nn.Sequential):
        level = 0.5

        def forward(self, x):
            out = super().forward(x)
            return out.tanh() if self.level > 3 else out

    net = Levelled(*network())
    estimator, other = fitted("laftr", net), moved(net)
    other.level = other.level + 1.5
    values(estimator, other, 5)
    other.level = other.level + 1.5
    other.level = other.level + 1.5  # takes the place of the first
    assert_as_run(estimator, other, rtol=1e-10, atol=1e-13)

    estimator, other = fitted("laftr", net), moved(net)
    hook = other.register_forward_hook(lambda _, args, out: out)
    values(estimator, other, 5)
    hook.remove()
    del hook
    other.register_forward_hook(lambda _, args, out: 3 * out)
    assert_as_run(estimator, other, rtol=1e-10, atol=1e-13)


def test_weights_that_are_tied_no_longer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.a, self.b, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.last(self.b(self.a(self.first(x).relu()).relu()).relu())

    net = Tied().double()
    estimator, other = fitted("laftr", net), moved(net)
    values(estimator, other, 5)
    other.b.weight = nn.Parameter(2 * other.a.weight.detach())
    slow = run_by_itself(estimator)
    assert estimator.distance(other).item() == pytest.approx(slow.distance(other).item(), rel=1e-10)


def test_a_network_that_counts_its_calls_is_followed():
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    net = Counting(*network())
    estimator, other = fitted("laftr", net), moved(net)
    for _ in range(3):
        other.steps = torch.rand(()).item()  # as a module would that keeps its last loss
        assert_as_run(estimator, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_is_entered_anywhere_gives_the_same_numbers(mode):
    net = network()
    other, estimator = moved(net), fitted(mode, net, num_samples=20)
    found = {}
    for position in range(200):
        found[position] = estimator.distance(other).item()
    for position in (0, 1, 63, 64, 77, 128, 199, 5):
        estimator.reseed(position)
        assert estimator.distance(other).item() == found[position]
        fresh = fitted(mode, net, num_samples=20)
        fresh.load_state_dict(estimator.state_dict())
        assert fresh.distance(other).item() == estimator.distance(other).item()
    estimator.reseed(-1)
    assert estimator.distance(other).item() not in found.values()
    assert estimator.distance(other).item() == found[0]
    estimator.reseed(7, 3)
    assert estimator.distance(other).item() != found[3]
    estimator.reseed(8, 3)
    assert estimator.distance(other).item() not in (found[3], estimator.distance(other).item())


def test_blocks_cover_every_draw_once():
    for most in (1, 2, 5, 16, 64):
        position = 0
        while position < 400:
            block = block_of(position, most)
            assert block.start == position
            assert len(block) <= most
            assert all(block_of(inside, most) == block for inside in block)
            position = block.stop


def test_another_reference_is_taken_up():
    net = network()
    other, estimator = moved(net), fitted("laftr", net)
    values(estimator, other, 3)
    estimator.share_reference(fitted("l2", moved(net, 0.1)))
    assert_as_run(estimator, other, rtol=1e-10, atol=1e-13)
    estimator.fit(other, batches())
    assert estimator.distance(other).item() == 0.0


def test_copies_and_pickles():
    net = network()
    other, estimator = moved(net), fitted("laftr", net)
    values(estimator, other, 3)
    twins = [copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))]
    expected = estimator.distance(other).item()
    assert [twin.distance(other).item() for twin in twins] == [expected, expected]


def test_no_gradients_autocasting_and_inference_mode_change_no_digit():
    net = network().float()
    estimator = function_space_estimator("laftr", fixed_draws=True).fit(
        net, [tuple(x.float() if x.is_floating_point() else x for x in b) for b in batches()]
    )
    other = moved(net)
    expected = estimator.distance(other)
    with torch.no_grad():
        assert estimator.distance(other).item() == expected.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert estimator.distance(other).item() == expected.item()
    with torch.inference_mode():
        assert estimator.distance(other).item() == expected.item()
    assert estimator.distance(other).requires_grad


def test_second_derivatives_are_those_of_the_network_run():
    net = network()
    other = moved(net)
    estimator = fitted("laftr", net, fixed_draws=True)
    weight = other[2].weight

    def curvature(estimator):
        (first,) = torch.autograd.grad(estimator.distance(other), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    torch.testing.assert_close(curvature(estimator), curvature(run_by_itself(estimator)), rtol=1e-9, atol=1e-12)


def test_masked_logits_and_many_samples_are_run():
    net = network()
    with torch.no_grad():
        net[-1].bias[1] = -torch.inf
    estimator = fitted("laftr", net)
    other = moved(net)
    found = estimator.distance(other)
    assert found.isfinite()
    assert estimator._ahead._refused
    many = fitted("laftr", network(), num_samples=30_000)
    many.distance(moved(network()))
    assert many._ahead._refused


def test_bfloat16_parameters_are_compared_in_float32():
    net = network().bfloat16()
    data = [(x.bfloat16(), labels) for x, labels in batches()]
    estimator, other = fitted("laftr", net, data), moved(net)
    assert estimator.distance(other).dtype == torch.float32
    assert_as_run(estimator, other, rtol=0.1, atol=0.02)
