"""A module's parameters as one vector, and back."""

import pytest
import torch
from torch import nn

from lightning_ext.functional import ParameterView, Substitution


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.body.bias.requires_grad_(False)


def test_frozen_parameters_are_left_out_and_tied_ones_count_once():
    view = ParameterView(Tied())
    assert view.names == ("scale", "embed.weight", "body.weight")
    assert view.numel == 1 + 15 + 9
    assert view.shapes == ((), (5, 3), (3, 3))
    assert view.slices() == {"scale": slice(0, 1), "embed.weight": slice(1, 16), "body.weight": slice(16, 25)}
    assert (view.dtype, view.device) == (torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("include", "names"),
    [("body", ("body.weight",)), (r"^head\.", ("embed.weight",)), ("weight$", ("embed.weight", "body.weight"))],
)
def test_a_pattern_chooses_by_any_of_a_parameters_names(include, names):
    assert ParameterView(Tied(), include).names == names


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
def test_flatten_and_unflatten_are_inverse_for_any_leading_dimensions(leading):
    view = ParameterView(Tied())
    rows = torch.randn(*leading, view.numel)
    parts = view.unflatten(rows)
    assert {name: part.shape for name, part in parts.items()} == {
        name: leading + shape for name, shape in zip(view.names, view.shapes, strict=True)
    }
    assert torch.equal(view.flatten(parts), rows)
    assert torch.equal(view.flatten(dict(reversed(parts.items()))), rows)


def test_unflattened_rows_share_memory_with_the_rows():
    view, rows = ParameterView(Tied()), torch.zeros(2, 25)
    view.unflatten(rows)["body.weight"][1] = 7.0
    assert rows[1, 16:].eq(7).all()
    assert rows.sum() == 63


def test_values_are_detached_and_follow_the_module():
    module = Tied()
    view = ParameterView(module)
    values = view.values()
    assert not any(value.requires_grad for value in values.values())
    with torch.no_grad():
        module.body.weight.fill_(3.0)
    assert values["body.weight"].eq(3.0).all()
    module.body.weight = nn.Parameter(torch.zeros(3, 3))
    assert view.values()["body.weight"].eq(0.0).all()


def test_flatten_works_inside_transforms():
    view = ParameterView(nn.Linear(2, 1).double())
    gradient = torch.func.grad(lambda p: view.flatten(p).square().sum())(view.values())
    assert torch.equal(view.flatten(gradient), 2 * view.flatten(view.values()))
    stacked = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(torch.func.vmap(lambda row: view.flatten(view.unflatten(row)))(stacked), stacked)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ParameterView(Tied(), "absent"), r"include='absent'.*'scale', 'embed.weight'"),
        (lambda: ParameterView(nn.ReLU()), "no parameter of ReLU"),
        (
            lambda: ParameterView(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double())),
            "32 on cpu, torch.float64",
        ),
        (lambda: ParameterView(nn.LazyLinear(3)), "weight has no shape yet"),
        (lambda: ParameterView(nn.Linear(2, 1)).flatten({"weight": torch.zeros(1, 2)}), "names"),
        (
            lambda: ParameterView(nn.Linear(2, 1)).flatten({"weight": torch.zeros(3, 1, 2), "bias": torch.zeros(1)}),
            r"bias must have shape \(3, 1\); got \(1,\)",
        ),
        (lambda: ParameterView(nn.Linear(2, 1)).unflatten(torch.zeros(2, 4)), r"3 numbers .* got \(2, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_module_registered_twice_is_substituted_and_left_as_it_was():
    layer = nn.Linear(2, 2)
    module = nn.Sequential(layer, nn.Tanh(), layer)
    own = dict(module.named_parameters())
    x, values = torch.randn(3, 2), {name: torch.randn_like(value) for name, value in own.items()}
    with Substitution(module)(values):
        found = module(x)
    expected = x
    for step in (torch.tanh, lambda y: y):
        expected = step(expected @ values["0.weight"].mT + values["0.bias"])
    torch.testing.assert_close(found, expected)
    assert all(now is own[name] for name, now in module.named_parameters())
    assert isinstance(layer.weight, nn.Parameter)


def test_a_shared_parameter_is_substituted_everywhere_and_put_back_after_an_error():
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    module = nn.Sequential(first, second)

    def broken():
        with Substitution(module)({"0.weight": torch.zeros(2, 2)}):
            assert not module(torch.ones(1, 2)).any()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert second.weight is first.weight
    assert isinstance(first.weight, nn.Parameter)
    with pytest.raises(KeyError), Substitution(module)({"1.weight": torch.zeros(2, 2)}):
        pass


def test_values_are_the_modules_own_by_the_names_given_here():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    module.register_buffer("offset", torch.zeros(1, dtype=torch.float64))
    module.append(module[1])
    substitution = Substitution(module, lambda name: f"net.{name}")
    named = [*module.named_parameters(), *module.named_buffers()]  # parameters first
    assert list(substitution.values()) == [f"net.{name}" for name, _ in named]
    assert all(substitution.values()[f"net.{name}"] is value for name, value in named)
    with substitution({"net.1.bias": torch.ones(2)}):
        assert substitution.values()["net.1.bias"].tolist() == [1, 1]
    assert substitution.values()["net.1.bias"] is module[1].bias
