"""Chains of linear layers and ReLUs are found however they are written; anything else is refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ext.functional import sequential_layers


def found(module, *shape):
    return sequential_layers(module.eval(), dict(module.named_parameters()), torch.zeros(*(shape or (2, 4))))


class Functions(nn.Module):
    """A chain without activation modules, its layers defined in another order than that of the calls."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.first = nn.Linear(4, 5, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 3)])

    def forward(self, x):
        x = torch.flatten(x.float(), 1)
        x = self.first(x).relu()
        x = torch.relu(self.blocks[0](x))
        x = F.relu(F.linear(input=x, weight=self.blocks[1].weight, bias=self.blocks[1].bias), inplace=True)
        return self.last(F.dropout(x, training=self.training)).view(x.size(0), -1)


CHAIN = [("first.weight", None), ("blocks.0.weight", "blocks.0.bias"), ("blocks.1.weight", "blocks.1.bias")]


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (3, 1, 2, 2)])
def test_order_of_the_calls(shape):
    assert found(Functions(), *shape) == [*CHAIN, ("last.weight", "last.bias")]


def test_nested_modules():
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.5))
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), inner, nn.Linear(6, 2))
    assert [weight for weight, _ in found(module, 2, 2, 2)] == ["1.weight", "3.0.weight", "4.weight"]


def test_one_layer_and_a_shared_one():
    assert found(nn.Linear(4, 2)) == [("weight", "bias")]
    layer = nn.Linear(4, 4)
    tied = nn.Sequential(layer, nn.ReLU(), layer)
    assert found(tied) == [("0.weight", "0.bias")] * 2
    every_name = dict(tied.named_parameters(remove_duplicate=False))
    assert sequential_layers(tied, every_name, torch.zeros(2, 4)) == [("0.weight", "0.bias")] * 2


def test_functions_of_parameters():
    def forward(params, x):
        return F.linear(F.linear(x, params["a"]).relu(), params["b"], params["c"])

    params = {"c": torch.zeros(2), "b": torch.zeros(2, 3), "a": torch.zeros(3, 4)}
    assert sequential_layers(forward, params, torch.zeros(1, 4)) == [("a", None), ("b", "c")]


def test_the_module_is_left_as_it_was():
    module = Functions()
    before = [p.clone() for p in module.parameters()]
    found(module)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


class Applied(nn.Module):
    """A linear layer, a function, and another linear layer."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, x):
        return self.two(self.function(self.one(x)))


def clipped(x):
    x[x < 0] = 0.0
    return x


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (nn.Conv2d(1, 1, 2), (2, 1, 3, 3), r"conv2d in the network \(Conv2d\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (2, 4), r"layer_norm in 1 \(LayerNorm\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (2, 4), r"batch_norm in 1 \(BatchNorm1d\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), (2, 4), r"gelu in 1 \(GELU\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (2, 4), "follows another one without a ReLU in 1"),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), (2, 4), "a ReLU follows no linear layer in 0"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (2, 4), "the output is not that of a linear layer"),
        (nn.Linear(4, 4), (2, 3, 4), r"shape \(2, 3, 4\)"),
        (Applied(lambda x: x + x.relu()), (2, 4), "takes another tensor"),
        (Applied(lambda x: x.relu() + 1.0), (2, 4), r"there is add in the network \(Applied\)"),
        (Applied(lambda x: x.relu() * (x > 1)), (2, 4), "mul"),
        (Applied(lambda x: (x.relu(), x)[1]), (2, 4), "takes another tensor"),
        (Applied(lambda x: F.dropout(x.relu())), (2, 4), "dropout is in training mode"),
        (Applied(lambda x: torch.dropout(x.relu(), 0.5, train=True)), (2, 4), "dropout is in training mode"),
        (Applied(clipped), (2, 4), "__setitem__ overwrites values"),
        (Applied(lambda x: x.relu().reshape(-1, 2, 2).reshape(8, 2)[:, :1]), (4, 4), "there is reshape"),
        (Applied(lambda x: x.relu().mT.reshape(4, 4)), (4, 4), "__get__"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), (2, 4), "takes another tensor"),
    ],
)
def test_other_networks_are_refused(module, shape, message):
    with pytest.raises(NotImplementedError, match=message) as caught:
        found(module, *shape)
    assert 'mode="relu"' in str(caught.value)


def test_parameters_that_were_not_named():
    module = nn.Linear(4, 2)
    with pytest.raises(NotImplementedError, match="none of params"):
        sequential_layers(module, {"weight": module.weight}, torch.zeros(1, 4))
