"""The guards around side passes: what they put back, and that they do so when the pass fails."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.aggregation import CatMetric

from lightning_ext._lightning import LightningModule
from lightning_ext._testing.bitwise import first_difference, module_state, rng_state
from lightning_ext.callbacks._quiet import quietly, undisturbed


class Busy(LightningModule):
    """A pass that touches everything."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.collection = MetricCollection({"mean": MeanMetric(), "all": CatMetric()})
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("absent", None)
        self.register_buffer("replaced", torch.zeros(2), persistent=False)

    def forward(self, x):
        out = self.net(x)
        self.seen += 1
        self.replaced = self.replaced + 1
        self.collection.update(out.detach().mean() + random.random() + float(np.random.rand()))  # noqa: NPY002
        self.collection.compute()
        self.log("a", out.mean())
        self.log_dict({"b": out.mean()})
        return out


def everything(module):
    metrics = {name: {k: v for k, v in vars(m).items() if k != "_cache"} for name, m in module.collection.items()}
    kept = {n: {k: v for k, v in m.items() if isinstance(v, (torch.Tensor, list, int, float, str))}
            for n, m in metrics.items()}  # fmt: skip
    return {"rng": rng_state(), "module": module_state(module), "metrics": kept}


def snapshot(module):
    """Deep enough not to change with what it was taken of."""
    return copy.deepcopy(everything(module))


@pytest.mark.parametrize("updates", [0, 2])
def test_a_pass_in_train_mode_leaves_no_trace(updates):
    module, x = Busy(), torch.randn(5, 3)
    module.log = module.log_dict = lambda *args, **kwargs: None
    for _ in range(updates):
        module(x)
    before, buffers = snapshot(module), dict(module.named_buffers())
    with undisturbed(module):
        module(x)
        module.eval()
        assert first_difference(before, everything(module)) is not None
    assert first_difference(before, everything(module)) is None
    assert all(module.get_buffer(name) is buffer for name, buffer in buffers.items()), "the same tensors, not copies"
    once = module(x)
    assert first_difference(before, everything(module)) is not None, "and the pass itself is not one that does nothing"
    assert once.shape == (5, 4)


def test_it_puts_back_after_an_error():
    module = Busy()
    module.log = module.log_dict = log = lambda *args, **kwargs: None
    before = snapshot(module)

    def fails():
        with undisturbed(module):
            module.eval()
            module.train()
            module(torch.randn(5, 3))
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fails()
    assert first_difference(before, everything(module)) is None
    assert module.log is log


def test_modes_of_single_modules_are_put_back():
    module = Busy()
    module.net[1].eval()
    with undisturbed(module):
        module.train()
    assert [m.training for m in module.net] == [True, False, True]


def test_nothing_is_logged_inside_and_the_methods_are_back_outside():
    module, said = Busy(), []
    with quietly(module):
        module.log("a", 1.0)
        module.log_dict({"a": 1.0})
    assert not {"log", "log_dict"} & set(vars(module)), "the class's own methods again"
    module.log = own = lambda *args, **kwargs: said.append(args)
    with quietly(module):
        module.log("a", 1.0)
    assert module.log is own
    assert "log_dict" not in vars(module)
    assert said == []


def test_a_graph_through_an_untouched_buffer_can_still_be_differentiated():
    """The training pass may have saved a buffer for its backward pass; putting a value back must not spoil that."""
    module = Busy()
    weight = torch.ones(2, requires_grad=True)
    value = (weight * module.replaced.add_(3.0)).sum()
    with undisturbed(module):
        pass
    value.backward()
    assert weight.grad.tolist() == [3.0, 3.0]


def test_gradients_of_a_pass_inside_can_be_taken_inside():
    module, x = Busy(), torch.randn(5, 3)
    with undisturbed(module):
        grads = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    assert all(g.isfinite().all() for g in grads)
    assert all(p.grad is None for p in module.parameters())
