"""Outputs, targets, losses and measurements of any module and batch, and outputs as a function of parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ext.functional import InfluenceObjective, ParameterView, SoftmaxCrossEntropy, SquaredError, evaluating


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 4)).double()


def batch(size=5):
    torch.manual_seed(1)
    return torch.randn(size, 3).double(), torch.randint(4, (size,))


@pytest.mark.parametrize(
    ("objective", "given"),
    [
        (InfluenceObjective(), batch()),
        (InfluenceObjective(), list(batch())),
        (InfluenceObjective(forward="x", target="y"), dict(zip("xy", batch(), strict=True))),
        (
            InfluenceObjective(forward=lambda module, b: module(b["deep"]["x"]), target=lambda b: b["y"]),
            {"deep": {"x": batch()[0]}, "y": batch()[1]},
        ),
    ],
    ids=["tuple", "list", "keys", "functions"],
)
def test_outputs_and_targets_come_from_batches_of_any_form(objective, given):
    module, (x, y) = network().eval(), batch()
    assert torch.equal(objective.outputs(module, given), module(x))
    assert torch.equal(objective.targets(given), y)
    assert torch.equal(objective.losses(module(x), y), SoftmaxCrossEntropy().value(module(x), y))


def test_measurements():
    y, t = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 0])
    p = y.softmax(-1)[range(5), t]
    expected = {"loss": -p.log(), "logit": y[range(5), t], "margin": (p / (1 - p)).log(), "callable": y[:, 0] * t}
    for name, values in expected.items():
        measurement = (lambda y, t: y[:, 0] * t) if name == "callable" else name
        torch.testing.assert_close(InfluenceObjective(measurement=measurement).measure(y, t), values, msg=name)


@pytest.mark.parametrize("name", ["loss", "logit", "margin"])
def test_measurements_of_sequences_are_means_over_tokens_that_count(name):
    y, t = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[1, -100, 2], [0, 3, 1]])
    objective = InfluenceObjective(measurement=name)
    single = objective.measure(y.reshape(6, 4), t.reshape(6)).reshape(2, 3)
    expected = torch.stack([(single[0, 0] + single[0, 2]) / 2, single[1].mean()])
    torch.testing.assert_close(objective.measure(y, t), expected)
    assert torch.autograd.gradcheck(lambda y: objective.measure(y, t), y.requires_grad_())


def test_evaluating_restores_each_part():
    module = network()
    module[1].eval()
    modes = [part.training for part in module.modules()]

    def fail_inside():
        with evaluating(module) as same:
            assert same is module
            assert not any(part.training for part in module.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [part.training for part in module.modules()] == modes


class Merging(nn.Linear):
    """Does more than take up a mode when it is asked for one."""

    def train(self, mode=True):
        raise AssertionError("train was called")


def test_evaluating_calls_no_train():
    module = nn.Sequential(nn.Dropout(), Merging(2, 2))
    with evaluating(module):
        assert not module[1].training
    assert module[1].training


def test_evaluating_reaches_scripted_parts():
    module = nn.Sequential(torch.jit.script(nn.Dropout(0.5)))
    with evaluating(module):
        assert torch.equal(module(torch.ones(100)), torch.ones(100))
    assert module[0].training


def test_the_function_depends_on_the_chosen_parameters_alone():
    module, given = network().eval(), batch()
    view = ParameterView(module, "^4")
    function = InfluenceObjective().function(module, view, given)
    assert torch.equal(function(view.values()), module(given[0]))
    halved = {name: value / 2 for name, value in view.values().items()}
    torch.testing.assert_close(function(halved), module(given[0]) / 2)
    assert torch.equal(function(view.values()), module(given[0]))


def test_the_function_ties_what_the_module_ties():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    module, given = Tied().eval(), (torch.randn(2, 3), torch.tensor([0, 1]))
    function = InfluenceObjective().function(module, ParameterView(module), given)
    doubled = {"a.weight": 2 * module.a.weight.detach()}
    torch.testing.assert_close(function(doubled), 4 * module(given[0]))


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_function_can_be_differentiated_everywhere(around):
    module, objective = network().eval(), InfluenceObjective()
    view, (x, t) = ParameterView(module), batch()
    reference = torch.autograd.grad(F.cross_entropy(module(x), t), list(module.parameters()))
    with around():
        function = objective.function(module, view, (x.clone(), t.clone()))
        gradient = torch.func.grad(lambda p: objective.losses(function(p), t).mean())(view.values())
        rows = torch.func.vmap(function)({name: torch.stack([v, 2 * v]) for name, v in view.values().items()})
        tangent = torch.func.jvp(function, (view.values(),), (view.values(),))[1]
    assert rows.shape == (2, 5, 4)
    assert tangent.isfinite().all()
    for found, expected in zip(gradient.values(), reference, strict=True):
        torch.testing.assert_close(found, expected)


def test_attention_has_all_derivatives():
    torch.manual_seed(0)
    module = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4)).eval()
    view, given = ParameterView(module), (torch.randn(2, 3, 8), torch.randint(4, (2, 3)))
    function = InfluenceObjective().function(module, view, given)
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        outputs, tangent = torch.func.jvp(function, (view.values(),), (view.values(),))
        _, pull = torch.func.vjp(function, view.values())
    assert torch.backends.mha.get_fastpath_enabled() is fused
    torch.testing.assert_close(outputs, module(given[0]), rtol=1e-5, atol=1e-5)
    pulled = view.flatten(pull(outputs)[0])
    along = (view.flatten(view.values()) * pulled).sum()
    torch.testing.assert_close(along, (outputs * tangent).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("inner", "allowed"), [(nn.GRU(3, 4), False), (nn.Linear(3, 4), True)])
def test_recurrent_layers_do_without_cudnn(inner, allowed):
    seen = []

    def forward(module, batch):
        seen.append(torch.backends.cudnn.enabled)
        outputs = module(batch[0])
        return outputs[0] if isinstance(outputs, tuple) else outputs

    view, before = ParameterView(inner.eval()), torch.backends.cudnn.enabled
    InfluenceObjective(forward=forward).function(inner, view, (torch.zeros(2, 3), torch.zeros(2)))(view.values())
    assert seen == [allowed and before]
    assert torch.backends.cudnn.enabled is before


def test_autocast_does_not_reach_the_function():
    module, given = network().float().eval(), (torch.randn(5, 3), torch.randint(4, (5,)))
    view = ParameterView(module)
    expected = module(given[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert module(given[0]).dtype == torch.bfloat16
        assert torch.equal(InfluenceObjective().function(module, view, given)(view.values()), expected)


@pytest.mark.parametrize("part", [1, 3])
def test_a_live_part_is_named(part):
    module = network().eval()
    view = ParameterView(module)
    function = InfluenceObjective().function(module, view, batch())
    module[part].train()
    kind = type(module[part]).__name__
    with pytest.raises(ValueError, match=rf"{part} \({kind}\) is in training mode.*evaluating"):
        InfluenceObjective().function(module, view, batch())
    with pytest.raises(ValueError, match="training mode"):
        function(view.values())
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\)"):  # rather than the first linear layer
        InfluenceObjective().function(module.train(), view, batch())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: InfluenceObjective(measurement="accuracy"), "'margin'.*'accuracy'"),
        (lambda: InfluenceObjective("mse", measurement="margin"), "softmax classes.*SquaredError"),
        (lambda: InfluenceObjective("hinge"), "hinge"),
        (
            lambda: InfluenceObjective().outputs(nn.Identity(), {"x": torch.zeros(2)}),
            r"forward .* batch\[0\].*'x'",
        ),
        (lambda: InfluenceObjective().targets(torch.zeros(2, 2)), r"target looks for batch\[1\].*a Tensor"),
        (lambda: InfluenceObjective().targets((torch.zeros(2),)), r"batch\[1\].*a tuple"),
        (lambda: InfluenceObjective(target="y").targets({"x": 1}), r"batch\['y'\].*\['x'\]"),
        (lambda: InfluenceObjective(target="y").targets((1, 2)), r"batch\['y'\]"),
        (lambda: InfluenceObjective().targets((torch.zeros(2), ["a", "b"])), "targets must be a tensor; got list"),
        (lambda: InfluenceObjective().outputs(lambda x: {"logits": x}, (1, 2)), "outputs must be a tensor.*got dict"),
        (lambda: InfluenceObjective().outputs(lambda x: x.mean(), (torch.ones(2), 2)), "samples first"),
        (
            lambda: InfluenceObjective(measurement=lambda y, t: y.mean()).measure(torch.zeros(3, 2), None),
            r"one number per sample, \(3,\); got \(\)",
        ),
        (
            lambda: InfluenceObjective(measurement="margin").measure(torch.zeros(3, 2), torch.zeros(3, 2)),
            "class numbers",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_outputs_that_are_not_per_sample_are_refused():
    module = nn.Linear(3, 4).eval()
    view = ParameterView(module)
    objective = InfluenceObjective(forward=lambda module, b: module(b[0]).T)
    function = objective.function(module, view, (torch.zeros(5, 3), torch.zeros(5).long()))
    with pytest.raises(ValueError, match=r"5 samples must give 5 outputs; got \(4, 5\)"):
        function(view.values())


def test_an_objective_says_what_it_is():
    assert InfluenceObjective("mse").loss == SquaredError()
    assert "SquaredError" in repr(InfluenceObjective("mse"))


def test_what_is_taken_for_an_objective():
    given = InfluenceObjective("mse")
    assert InfluenceObjective.of(given) is given
    assert repr(InfluenceObjective.of(None)) == repr(InfluenceObjective())
    with pytest.raises(ValueError, match=r'got \'mse\'.*InfluenceObjective\("mse"\)'):
        InfluenceObjective.of("mse")


@pytest.mark.parametrize(
    ("y", "t", "match"),
    [
        ((1, 3), torch.tensor([0, 3, 1, 5]), r"samples \[11, 13\] are \[3, 5\].*3 classes, 0 to 2"),
        ((1, 5, 3), torch.tensor([[0, 1, 2, 0, 1], [0, 1, -100, 0, -1]]), r"samples \[11\] are \[-1\]"),
        ((1, 3), torch.tensor([0.0, 1.0]), r"\(2,\) of torch.float32: class numbers must be integers"),
        ((5, 3), torch.zeros(2, 5, dtype=torch.long), r"5 positions gives outputs \(5, 3\)"),
        ((1, 3, 5), torch.zeros(2, 5, dtype=torch.long), r"\(B, 3, 5\) have the classes in dimension 1"),
        ((1, 3), torch.tensor([0, 2, -100]), None),
        ((1, 5, 3), torch.zeros(2, 5, 3), None),
        ((1, 3), torch.tensor([[1], [2]]), None),
        ((1, 5, 5), torch.zeros(2, 5, dtype=torch.long), None),
    ],
    ids=str,
)
def test_targets_that_are_no_classes(y, t, match):
    check = InfluenceObjective().check_targets
    if match is None:
        check(torch.zeros(y), t, range(10, 20))
    else:
        with pytest.raises(ValueError, match=match):
            check(torch.zeros(y), t, range(10, 20))
    InfluenceObjective("mse").check_targets(torch.zeros(y), t, range(10, 20))  # numbers can be anything
