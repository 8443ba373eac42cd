"""Influence by torch.func and dense matrices, one sample after the other; and the small networks it is asked of."""

from itertools import pairwise

import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import Trainer, submodule

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip
N, Q = 23, 3

cross_entropy = F.cross_entropy  # of one sample


def half_squared_error(y, t):
    return 0.5 * (y - t).square().sum()


def network(*sizes, seed=0):
    """Tanh between linear layers; not trained: nothing here needs a minimum."""
    torch.manual_seed(seed)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def classes(n=N, inputs=4, k=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, inputs, generator=generator), torch.randint(k, (n,), generator=generator))


def numbers(n=N, inputs=4, k=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, inputs, generator=generator), torch.randn(n, k, generator=generator))


def loader(data, batch_size=5, **kwargs):
    return DataLoader(data, batch_size=batch_size, **kwargs)  # by name: Lightning's wrapper counts positions


def queries(k=3, n=Q, seed=9):
    return [classes(n, k=k, seed=seed)[:]] if k > 1 else [numbers(n, seed=seed)[:]]


class Dense:
    """Everything of one module and data set in float64, from the definitions.

    Args:
        module: the network; its parameters in the order of ``named_parameters``.
        data: ``(x, t)`` of the training set.
        loss: of one sample's outputs and target, ``(K,)`` to a number.
        keep: which parameters count, by name.
    """

    def __init__(self, module, data, loss=cross_entropy, keep=lambda name: True):
        self.module, self.loss = module, loss
        params = {n: p.detach().double() for n, p in module.named_parameters()}
        self.fixed = {n: b.double() if b.is_floating_point() else b for n, b in module.named_buffers()}
        self.fixed |= {n: p for n, p in params.items() if not keep(n)}
        self.params = {n: p for n, p in params.items() if keep(n)}
        self.x, self.t = data[0].double(), data[1].double() if data[1].is_floating_point() else data[1]
        self.size = len(self.x)

    def output(self, params, x):
        return functional_call(self.module, params | self.fixed, (x[None],))[0]

    def flat(self, tree):
        return torch.cat([tree[name].reshape(-1) for name in self.params])

    def gradients(self, x=None, t=None, measure=None):
        """Gradients (B, D) of the loss, or of ``measure``, of every sample."""
        x, t = (self.x, self.t) if x is None else (x.double(), t.double() if t.is_floating_point() else t)
        measure = measure or self.loss
        each = [grad(lambda p, i=i: measure(self.output(p, x[i]), t[i]))(self.params) for i in range(len(x))]
        return torch.stack([self.flat(g) for g in each])

    def jacobian(self, i):
        found = jacrev(lambda p: self.output(p, self.x[i]))(self.params)
        return torch.cat([found[n].reshape(len(found[n]), -1) for n in self.params], dim=1)

    def output_hessian(self, i):
        return hessian(lambda y: self.loss(y, self.t[i]))(self.output(self.params, self.x[i]))

    def ggn(self, samples=None):
        """Sum over ``samples`` (default all) of J^T H J, divided by N."""
        chosen = range(self.size) if samples is None else samples
        parts = [(J := self.jacobian(i)).mT @ self.output_hessian(i) @ J for i in chosen]
        return torch.stack(parts).sum(0) / self.size

    def fisher(self):
        g = self.gradients()
        return g.mT @ g / self.size

    def hessian(self):
        names, shapes = list(self.params), [p.shape for p in self.params.values()]

        def mean(row):
            parts = torch.split(row, [s.numel() for s in shapes])
            params = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
            return sum(self.loss(self.output(params, self.x[i]), self.t[i]) for i in range(self.size)) / self.size

        return hessian(mean)(self.flat(self.params))

    def inverse(self, damping, matrix=None):
        matrix = self.ggn() if matrix is None else matrix
        return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))

    def scores(self, asked, damping, matrix=None, measure=None):
        """(1/N) g_m^T (G + damping I)^-1 g_z, (Q, N)."""
        asked = asked[0]
        return self.gradients(*asked, measure=measure) @ self.inverse(damping, matrix) @ self.gradients().mT / self.size


def predict(influence, data, return_predictions=None, **kwargs):
    return Trainer(**{**QUIET, **kwargs}).predict(influence, data, return_predictions=return_predictions)


def matrix(predictions, samples=N):
    """The score matrix by the ids that came with it; NaN where none came."""
    found = torch.full((len(predictions[0]["scores"]), samples), torch.nan, dtype=predictions[0]["scores"].dtype)
    for entry in predictions:
        assert entry["indices"].shape == entry["scores"].shape[1:]
        found[:, entry["indices"]] = entry["scores"]
    return found


def close(found, wanted, rtol=1e-8):
    """Relative to the largest entry."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error <= rtol, f"apart by {error:.2e} of the largest"


def logger_class():
    """A logger that keeps nothing, to subclass."""
    return submodule("loggers.logger").DummyLogger
