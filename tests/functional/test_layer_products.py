"""Products from layers' inputs and output gradients against dense Jacobians, and when operators use them."""

import pytest
import torch
from torch import nn

from lightning_ext.functional import (
    EmpiricalFisherOperator,
    GGNOperator,
    InfluenceObjective,
    LayerFactors,
    LayerProducts,
    ParameterView,
    SampleGradients,
)


class Twice(nn.Module):
    """One layer is called two times."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.last(self.middle(self.middle(self.first(x).tanh()).tanh()))


class Scaled(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = perceptron(), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * self.inner(x)


class Outside(nn.Module):
    """A weight is used outside of its layer."""

    def __init__(self):
        super().__init__()
        self.inner = perceptron()

    def forward(self, x):
        return self.inner(x) + (x @ self.inner[0].weight.T)[:, :2]


def perceptron(outputs=2, bias=True):
    layers = (nn.Linear(6, 16, bias=bias), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs))
    return nn.Sequential(*layers)


def frozen(part):
    module = perceptron()
    getattr(module[0], part).requires_grad_(False)
    return module


def tokens():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Flatten(), nn.Linear(48, 2))


def convolutions(groups=1):
    first = nn.Conv2d(2, 6, 2, padding=1, stride=2, groups=groups)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(6, 8, 2), nn.Flatten(), nn.Linear(32, 2))


LINEAR = {
    "perceptron": (perceptron, (6,)),
    "no bias": (lambda: perceptron(bias=False), (6,)),
    "frozen bias": (lambda: frozen("bias"), (6,)),
    "tokens": (tokens, (3, 6)),
    "convolution": (convolutions, (2, 4, 4)),
    "twice": (Twice, (6,)),
}
OTHER = {
    "norm": (lambda: nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 2)), (6,)),
    "frozen weight": (lambda: frozen("weight"), (6,)),
    "groups": (lambda: convolutions(groups=2), (2, 4, 4)),
    "too many outputs": (lambda: perceptron(30), (6,)),
    "scaled": (Scaled, (6,)),
    "outside": (Outside, (6,)),
}


def build(case, samples=9):
    make, shape = (LINEAR | OTHER)[case]
    torch.manual_seed(0)
    module = make().double().eval()
    return module, (torch.randn(samples, *shape, dtype=torch.float64), torch.arange(samples) % 2)


def dense(module, objective, batch):
    """The sum over samples of J^T H J, from the dense Jacobian."""
    view = ParameterView(module)
    f = objective.function(module, view, batch)
    jacobian = torch.autograd.functional.jacobian(lambda row: f(view.unflatten(row)), view.flatten(view.values()))
    jacobian = jacobian.reshape(len(batch[1]), -1, view.numel)
    y = f(view.values())
    columns = objective.loss.hessian_sqrt(y, batch[1]).movedim(0, 1).flatten(2)
    rows = columns @ jacobian
    return torch.einsum("bsd,bse->de", rows, rows)


@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("working_bytes", [1, 10_000, 2**22])
def test_products_are_those_of_the_dense_matrix(case, working_bytes, monkeypatch):
    monkeypatch.setattr("lightning_ext.functional.layer_products._WORKING_BYTES", working_bytes)
    module, batch = build(case)
    objective = InfluenceObjective()
    gradients = SampleGradients(module, objective)
    products = LayerProducts.of(gradients, batch, objective.loss.hessian_sqrt, outputs=2)
    matrix = dense(module, objective, batch)
    for count in (1, 5, 40, 0):
        rows = torch.randn(count, len(matrix), dtype=torch.float64)
        torch.testing.assert_close(products.product(rows), rows @ matrix, rtol=1e-9, atol=1e-10)
    with torch.inference_mode():
        rows = torch.randn(5, len(matrix), dtype=torch.float64)
        torch.testing.assert_close(products.product(rows), rows @ matrix, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", OTHER)
def test_layers_that_are_not_linear_maps_and_many_outputs_are_left_to_derivatives(case):
    module, batch = build(case)
    objective = InfluenceObjective()
    outputs = module(batch[0]).shape[1]
    assert (
        LayerProducts.of(SampleGradients(module, objective), batch, objective.loss.hessian_sqrt, outputs=outputs)
        is None
    )


def test_more_output_gradients_than_may_be_kept_are_left_to_derivatives(monkeypatch):
    module, batch = build("perceptron")
    objective = InfluenceObjective()
    kept = 9 * (16 + 16 + 2) * 2 * 8
    for limit, expected in ((kept, True), (kept - 1, False)):
        monkeypatch.setattr("lightning_ext.functional.layer_products._MOST_BYTES", limit)
        products = LayerProducts.of(SampleGradients(module, objective), batch, objective.loss.hessian_sqrt, outputs=2)
        assert (products is not None) is expected


def test_the_bytes_are_those_of_inputs_and_gradients():
    a, g = torch.zeros(3, 1, 4), torch.zeros(3, 5, 2)
    assert LayerProducts([LayerFactors(a, g, slice(0, 20), None)]).nbytes == 4 * (12 + 30)


@pytest.fixture
def recordings(monkeypatch):
    """How often an operator turns to its layers, and how often that came to something."""
    found, of = [], LayerProducts.of.__func__

    def counting(cls, *args, **kwargs):
        found.append(of(cls, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(LayerProducts, "of", classmethod(counting))
    return found


@pytest.mark.parametrize("kind", [GGNOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize("case", [*LINEAR, "norm", "too many outputs", "scaled", "outside"])
def test_operators_give_the_same_products_by_layers_and_by_derivatives(kind, case, recordings):
    module, batch = build(case)
    batches = [tuple(part[:4] for part in batch), tuple(part[4:] for part in batch)]
    by_layers = kind(module, InfluenceObjective(), batches)
    by_derivatives = kind(module, InfluenceObjective(), batches, backend="double_backward")
    rows = torch.randn(70, by_layers.size, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(by_layers(rows), by_derivatives(rows), rtol=1e-9, atol=1e-11)
    assert len(recordings) == 2, "once for each batch"
    pays = case in LINEAR or (case == "too many outputs" and kind is EmpiricalFisherOperator)
    assert all((products is not None) is pays for products in recordings)


def test_operators_turn_to_layers_for_blocks_that_pay(recordings):
    module, batch = build("perceptron")
    operator = GGNOperator(module, InfluenceObjective(), [batch])
    for _ in range(10):
        operator(torch.zeros(3, operator.size, dtype=torch.float64))
    assert not recordings
    operator(torch.zeros(4, operator.size, dtype=torch.float64))
    assert len(recordings) == 1


def test_operators_wait_until_the_output_gradients_pay(recordings):
    module, batch = build("too many outputs")  # one backward pass for each of 30
    operator = GGNOperator(module, InfluenceObjective(), [batch])
    for count in (40, 19):
        operator(torch.zeros(count, operator.size, dtype=torch.float64))
        assert not recordings
    operator(torch.zeros(4, operator.size, dtype=torch.float64))
    assert len(recordings) == 1


def test_operators_do_not_turn_to_the_layers_of_weights_that_changed(recordings):
    module, batch = build("perceptron")
    operator = GGNOperator(module, InfluenceObjective(), [batch], cache_bytes=0)
    rows = torch.randn(20, operator.size, dtype=torch.float64)
    expected = operator(rows)
    assert len(recordings) == 1
    with torch.no_grad():
        module[0].weight.mul_(2)
    torch.testing.assert_close(operator(rows), expected, rtol=1e-9, atol=1e-11)
    assert len(recordings) == 1
