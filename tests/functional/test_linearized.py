"""Products with Jacobians and Hessians against dense ones, through every backend and kind of layer."""

import warnings

import pytest
import torch
from torch import nn

from lightning_ext.functional import (
    InfluenceObjective,
    LinearizedBatch,
    LinearizedGradient,
    ParameterView,
    PullBack,
)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.inner(x)[0])


class Branching(nn.Module):
    """A path that depends on a value."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.Linear(3, 2)

    def forward(self, x):
        y = self.a(x)
        return y if y.sum() > 0 else self.b(x).tanh() + y


class OnceOnly(torch.autograd.Function):
    """Squares; its backward pass cannot be differentiated, its forward derivative can."""

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


def convolutions():
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)), (4, 3)),
    "convolution": (convolutions, (4, 1, 4, 4)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), (3, 2, 4)),
    "recurrent": (Recurrent, (3, 2, 3)),
    "branching": (Branching, (4, 3)),
}
MODEL = pytest.mark.parametrize(("build", "shape"), MODELS.values(), ids=MODELS)


def linearizable(build, shape):
    torch.manual_seed(0)
    module = build().double().eval()
    view = ParameterView(module)
    batch = (torch.randn(shape, dtype=torch.float64), torch.zeros(shape[0]).long())
    return InfluenceObjective().function(module, view, batch), view


def dense_jacobian(function, view):
    """(*outputs, D) by one backward pass per output."""
    jacobian = torch.autograd.functional.jacobian(
        lambda row: function(view.unflatten(row)), view.flatten(view.values()), vectorize=False
    )
    return jacobian.detach()


@MODEL
@pytest.mark.parametrize("backend", ["auto", "linearize", "double_backward"])
@pytest.mark.parametrize("rows_at_once", [None, 1, 4])
def test_products_are_those_of_the_dense_jacobian(build, shape, backend, rows_at_once):
    if backend == "linearize" and build in (Recurrent, Branching):
        backend = "auto"  # has no forward derivative; takes a path that cannot be traced
    function, view = linearizable(build, shape)
    jacobian = dense_jacobian(function, view)
    batch = LinearizedBatch(function, view.values(), backend, rows_at_once)
    torch.testing.assert_close(batch.outputs, function(view.values()))
    assert not batch.outputs.requires_grad
    for count in (1, 5, 20, 0):
        rows = torch.randn(count, view.numel, dtype=torch.float64)
        tangents = batch.jvp(rows)
        torch.testing.assert_close(tangents, torch.einsum("...d,rd->r...", jacobian, rows), rtol=1e-9, atol=1e-10)
        cotangents = torch.randn(count, *batch.outputs.shape, dtype=torch.float64)
        expected = cotangents.flatten(1) @ jacobian.reshape(-1, view.numel)
        torch.testing.assert_close(batch.vjp(cotangents), expected, rtol=1e-9, atol=1e-10)
        assert not tangents.requires_grad


@MODEL
@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
def test_products_work_where_autograd_is_off(build, shape, around):
    function, view = linearizable(build, shape)
    rows = torch.randn(20, view.numel, dtype=torch.float64)
    reference = LinearizedBatch(function, view.values(), "double_backward")
    expected = reference.vjp(reference.jvp(rows))
    with around():
        batch = LinearizedBatch(function, view.values())
        found = batch.vjp(batch.jvp(rows.clone()))
    assert not found.is_inference()
    torch.testing.assert_close(found, expected)


def count_traces(monkeypatch):
    traces, linearize = [], torch.func.linearize
    monkeypatch.setattr(torch.func, "linearize", lambda *args: traces.append(1) or linearize(*args))
    return traces


def test_auto_traces_convolutions_once_that_pays(monkeypatch):
    traces = count_traces(monkeypatch)
    function, view = linearizable(*MODELS["convolution"])
    batch = LinearizedBatch(function, view.values())
    batch.jvp(torch.zeros(15, view.numel, dtype=torch.float64))
    assert not traces
    for _ in range(3):
        batch.jvp(torch.zeros(1, view.numel, dtype=torch.float64))
    assert len(traces) == 1
    function, view = linearizable(*MODELS["linear"])
    LinearizedBatch(function, view.values()).jvp(torch.zeros(50, view.numel, dtype=torch.float64))
    assert len(traces) == 1


def test_auto_stays_with_double_backward_where_tracing_fails(monkeypatch):
    def refuse(*args):
        raise NotImplementedError("no forward derivative")

    monkeypatch.setattr(torch.func, "linearize", refuse)
    function, view = linearizable(*MODELS["convolution"])
    rows = torch.randn(20, view.numel, dtype=torch.float64)
    expected = LinearizedBatch(function, view.values(), "double_backward").jvp(rows)
    torch.testing.assert_close(LinearizedBatch(function, view.values()).jvp(rows), expected)
    with pytest.raises(NotImplementedError):
        LinearizedBatch(function, view.values(), "linearize").jvp(rows)


def test_what_cannot_be_traced_is_not_traced_when_that_was_asked_for():
    function, view = linearizable(*MODELS["branching"])
    with pytest.raises(RuntimeError):
        LinearizedBatch(function, view.values(), "linearize").jvp(torch.zeros(1, view.numel, dtype=torch.float64))


def test_auto_traces_what_has_no_second_derivative():
    params = {"w": torch.tensor([1.0, 2.0])}
    batch = LinearizedBatch(lambda p: OnceOnly.apply(p["w"]), params)
    assert torch.equal(batch.jvp(torch.eye(2)), torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    cut = LinearizedBatch(lambda p: OnceOnly.apply(p["w"]), params, "double_backward")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            cut.jvp(torch.eye(2))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        LinearizedGradient(lambda p: OnceOnly.apply(2 * p["w"]), params)


def test_rows_go_one_by_one_where_an_operator_cannot_be_batched():
    backwards = []

    class Unbatched(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(ctx, x):
            return 3 * x

        @staticmethod
        def backward(ctx, grad):
            backwards.append(1)
            float(grad.sum())  # a batched tensor has no value
            return 3 * grad

    x = torch.ones(2, requires_grad=True)
    pull = PullBack([Unbatched.apply(x)], [x], at_once=4)
    rows = torch.randn(10, 2)
    for _ in range(2):
        torch.testing.assert_close(pull([rows]), 3 * rows)
    assert len(backwards) == 1 + 10 + 10, "together is tried once"


def test_parameters_and_outputs_without_a_part_in_it_give_zeros():
    params = {"w": torch.ones(2), "unused": torch.ones(3)}
    batch = LinearizedBatch(lambda p: p["w"].prod().reshape(1), params)
    assert torch.equal(batch.jvp(torch.eye(5)), torch.tensor([[1.0], [1.0], [0.0], [0.0], [0.0]]))
    assert torch.equal(batch.vjp(torch.ones(2, 1)), torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]] * 2))
    constant = LinearizedBatch(lambda p: torch.ones(2), params)
    assert torch.equal(constant.jvp(torch.eye(5)), torch.zeros(5, 2))
    assert torch.equal(constant.vjp(torch.ones(3, 2)), torch.zeros(3, 5))
    flat = LinearizedGradient(lambda p: torch.ones(2), params)
    assert torch.equal(flat.product(torch.eye(5)), torch.zeros(5, 5))
    straight = LinearizedGradient(lambda p: p["w"], params)
    assert torch.equal(straight.product(torch.eye(5)), torch.zeros(5, 5))


@MODEL
@pytest.mark.parametrize("rows_at_once", [1, 4])
def test_second_derivatives_are_those_of_the_dense_hessian(build, shape, rows_at_once):
    function, view = linearizable(build, shape)

    def values(params):
        return function(params).square().flatten(1).sum(1)

    hessian = torch.autograd.functional.hessian(
        lambda row: values(view.unflatten(row)).sum(), view.flatten(view.values())
    )
    with torch.inference_mode():
        batch = LinearizedGradient(values, view.values(), rows_at_once)
        rows = torch.randn(6, view.numel, dtype=torch.float64)
        torch.testing.assert_close(batch.product(rows), rows @ hessian, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(batch.outputs, values(view.values()))


def test_the_bytes_grow_with_the_batch_and_leave_the_parameters_out():
    sizes = []
    for count in (10, 20):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 2)).eval()
        view = ParameterView(module)
        batch = (torch.randn(count, 50), torch.zeros(count).long())
        sizes.append(LinearizedBatch(InfluenceObjective().function(module, view, batch), view.values()).nbytes)
    assert sizes[0] == 3 * 10 * (50 + 60) * 4  # inputs of both layers; the second is tanh's output, saved once
    assert sizes[1] == 2 * sizes[0]


def test_linearizing_is_silent():
    function, view = linearizable(*MODELS["convolution"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*get_attr.*")
        LinearizedBatch(function, view.values(), "linearize").jvp(torch.zeros(2, view.numel, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda b, v: LinearizedBatch(b, v, "forward"), "'double_backward'; got 'forward'"),
        (lambda b, v: LinearizedBatch(b, v).jvp(torch.zeros(3)), r"rows .*\(R, 2\); got \(3,\)"),
        (lambda b, v: LinearizedBatch(b, v).jvp(torch.zeros(1, 3)), r"rows .*\(R, 2\)"),
        (lambda b, v: LinearizedBatch(b, v).vjp(torch.zeros(1, 3)), r"cotangents .*\(R, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(lambda p: p["w"] ** 2, {"w": torch.ones(2)})
