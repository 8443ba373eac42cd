r"""Losses as functions of a network's outputs: gradients, Hessian products and Bregman divergences, per sample."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ext.functional.elementwise_losses import BernoulliCrossEntropy, GaussianNLL, PoissonNLL, SquaredError
from lightning_ext.functional.output_loss_protocol import (
    OutputLoss,
    at_least_32_bit,
    fit_targets,
    log_partition_divergence,
    sum_per_sample,
)

__all__ = [
    "BernoulliCrossEntropy",
    "CallableLoss",
    "GaussianNLL",
    "OutputLoss",
    "PoissonNLL",
    "SoftmaxCrossEntropy",
    "SquaredError",
    "output_loss",
]


_FEW = 64  # outputs of a sample whose Hessian is decomposed to see whether a function is convex


@dataclass(frozen=True)
class SoftmaxCrossEntropy(OutputLoss):
    r"""Cross-entropy of logits with the classes in the last dimension, in nats.

    .. math:: L(y, t) = \frac1T \sum_\tau \bigl[\operatorname{logsumexp}(y_\tau) - y_{\tau, t_\tau}\bigr], \quad
        H_\tau = \tfrac1T (\operatorname{diag} p_\tau - p_\tau p_\tau^\top), \quad
        D(y, y_0) = \frac1T \sum_\tau \mathrm{KL}\bigl(p_{0,\tau} \,\Vert\, p_\tau\bigr)

    with :math:`p = \operatorname{softmax}(y)` and T the sample's positions that count (1 for outputs ``(B, K)``).

    Args:
        ignore_index: a target of this value takes its position out of the mean; a sample without any other counts 0.

    Targets are class numbers shaped like ``y`` without its last dimension, or probabilities shaped like ``y``.

    >>> loss = SoftmaxCrossEntropy()
    >>> loss.value(torch.zeros(1, 2), torch.tensor([1]))  # log 2
    tensor([0.6931])
    >>> loss.hessian_product(torch.zeros(1, 2), None, torch.tensor([[1.0, 0.0]]))
    tensor([[ 0.2500, -0.2500]])
    """

    ignore_index: int = -100

    def _soft(self, y: Tensor, t: Tensor | None) -> bool:
        if y.ndim < 2 or y.shape[-1] < 2:
            raise ValueError(
                "cross-entropy needs outputs (B, ..., K) with K >= 2 classes in the last dimension; got "
                f"{tuple(y.shape)}. For one logit per output use the loss 'bce'."
            )
        return t is not None and t.is_floating_point()

    def labels(self, y: Tensor, t: Tensor) -> Tensor:
        """Return class numbers shaped like ``y`` without its last dimension."""
        return fit_targets(t, y.shape[:-1], "the outputs' shape without the classes")

    def weights(self, y: Tensor, t: Tensor | None) -> Tensor:
        """Return each position's weight in its sample's mean, 0 where it is ignored; ``(B, ...)``."""
        if t is None or self._soft(y, t):
            return y.new_full(y.shape[:-1], 1 / max(1, math.prod(y.shape[1:-1])))
        counted = (self.labels(y, t) != self.ignore_index).to(y.dtype)
        if y.ndim == 2:
            return counted
        return counted / counted.reshape(len(y), -1).sum(1).clamp(min=1).reshape(-1, *[1] * (y.ndim - 2))

    def _curved(self, y: Tensor, t: Tensor | None) -> Tensor:
        """Return each position's weight in the Hessian: probabilities that do not sum to 1 count by their sum."""
        weights = self.weights(y, t)
        if t is None or not self._soft(y, t):
            return weights
        return weights * fit_targets(t, y.shape, "the outputs' shape").sum(-1)

    def _expected(self, y: Tensor, t: Tensor) -> Tensor:
        if self._soft(y, t):
            return fit_targets(t, y.shape, "the outputs' shape").to(y.dtype)
        labels = self.labels(y, t)
        return F.one_hot(labels.masked_fill(labels == self.ignore_index, 0).long(), y.shape[-1]).to(y.dtype)

    def value(self, y: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        y = at_least_32_bit(y)
        log_p, weights = y.log_softmax(-1), self.weights(y, t)
        if self._soft(y, t):
            terms = -(fit_targets(t, y.shape, "the outputs' shape") * log_p).sum(-1)
        else:
            labels = self.labels(y, t)
            chosen = labels.masked_fill(labels == self.ignore_index, 0).long()
            terms = -log_p.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        return sum_per_sample(weights * terms)

    def gradient(self, y: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        wide = at_least_32_bit(y)
        # classes first: a CPU is several times slower along a short last dimension
        p = wide.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1)
        slope = self._curved(wide, t).unsqueeze(-1) * p
        return (slope - self.weights(wide, t).unsqueeze(-1) * self._expected(wide, t)).to(y.dtype)

    def hessian_product(self, y: Tensor, t: Tensor | None, u: Tensor) -> Tensor:  # noqa: D102
        return self.hessian_at(y, t)(u)

    def hessian_at(self, y: Tensor, t: Tensor | None) -> Callable[[Tensor], Tensor]:  # noqa: D102
        self._soft(y, t)
        wide = at_least_32_bit(y)
        p = wide.softmax(-1)
        weighted_p = self._curved(wide, t).unsqueeze(-1) * p

        def product(u: Tensor) -> Tensor:
            return (weighted_p * (u - (p * u).sum(-1, keepdim=True))).to(u.dtype)

        return product

    def hessian_sqrt(self, y: Tensor, t: Tensor | None) -> Tensor:  # noqa: D102
        return torch.cat(list(self.hessian_columns(y, t, max(1, y.shape[-1]))))

    def hessian_columns(self, y: Tensor, t: Tensor | None, at_once: int) -> Iterator[Tensor]:  # noqa: D102
        self._soft(y, t)
        wide = at_least_32_bit(y)
        classes = y.shape[-1]
        p, weights = (x.reshape(len(y), -1, *x.shape[y.ndim - 1 :]) for x in (wide.softmax(-1), self._curved(wide, t)))
        basis = torch.eye(classes, dtype=p.dtype, device=p.device)
        for position in range(p.shape[1]):  # a column belongs to one position
            here, weight = p[:, position], weights[:, position, None]
            for part in torch.split(torch.arange(classes, device=p.device), at_once):
                lengths = (here[:, part] * weight).sqrt().unsqueeze(-1)
                columns = p.new_zeros(len(part), *p.shape)
                columns[:, :, position] = (lengths * (basis[part] - here.unsqueeze(1))).movedim(1, 0)
                yield columns.reshape(len(part), *y.shape).to(y.dtype)

    def sample_gradient(  # noqa: D102
        self, y: Tensor, t: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        self._soft(y, t)
        wide = at_least_32_bit(y)
        p = wide.softmax(-1)
        labels = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(p.shape[:-1])
        difference = p - F.one_hot(labels, p.shape[-1]).to(p.dtype)
        return (self._curved(wide, t).sqrt().unsqueeze(-1) * difference).to(y.dtype)

    def bregman(self, y: Tensor, y_ref: Tensor, t: Tensor | None = None) -> Tensor:  # noqa: D102
        self._soft(y, t)
        y, y_ref = at_least_32_bit(y), at_least_32_bit(y_ref.detach())
        excluded = (y_ref == -torch.inf) & (y == -torch.inf)
        change = (y - y_ref).masked_fill(excluded, 0.0)
        return sum_per_sample(self._curved(y, t) * log_partition_divergence(change, y_ref.log_softmax(-1)))


@dataclass(frozen=True)
class CallableLoss(OutputLoss):
    r"""Any loss that a function computes per sample; its derivatives come from ``torch.func``.

    Args:
        function: ``(y, t) -> (B,)``, where entry b depends on ``y[b]`` and ``t[b]`` alone; no mean over the batch. The
            divergence calls it in float64, where it is the definition: for a change d of the outputs rounding leaves a
            relative error of about 1e-16 / d^2 in its value, and 1e-16 / d in its gradient.
        convex: what is claimed of the function. A Hessian product or root that shows negative curvature raises.

    >>> quartic = CallableLoss(lambda y, t: (y - t).pow(4).sum(1))
    >>> quartic.hessian_product(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2))  # 12 (y - t)^2
    tensor([[12., 12.]])
    """

    function: Callable[[Tensor, Tensor], Tensor]
    convex: bool = True

    def value(self, y: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        values = self.function(y, t)
        if values.shape != y.shape[:1]:
            raise ValueError(
                f"the loss function must return one value per sample, {tuple(y.shape[:1])}; got {tuple(values.shape)}."
                " Leave out its mean over the batch."
            )
        return values

    def _gradient_function(self, t: Tensor | None) -> Callable[[Tensor], Tensor]:
        def total(y: Tensor) -> Tensor:
            return self.value(y, t).sum()  # type: ignore[arg-type]  # a function may do without targets

        return torch.func.grad(total)

    def gradient(self, y: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        gradient: Tensor = self._gradient_function(t)(y)
        return gradient

    def _products(self, y: Tensor, t: Tensor | None, u: Tensor) -> Tensor:
        pull_back = torch.func.vjp(self._gradient_function(t), y)[1]  # the Hessian is symmetric
        (products,) = torch.func.vmap(pull_back)(u.reshape(-1, *y.shape))
        result: Tensor = products.reshape(u.shape)
        return result

    def hessian_product(self, y: Tensor, t: Tensor | None, u: Tensor) -> Tensor:
        r"""Return :math:`H_b u_b`, shaped like ``u``.

        Raises:
            ValueError: If ``u``, or one probe that goes along, shows negative curvature of a function said to be
                convex. Inside ``torch.func.vmap``, where no value can be looked at, it is not checked.
        """
        if not self.convex:
            return self._products(y, t, u)
        probe = torch.arange(1, y.numel() + 1, dtype=u.dtype, device=u.device).cos().reshape(1, *y.shape)
        rows = torch.cat([u.reshape(-1, *y.shape), probe])
        products = self._products(y, t, rows)
        _require_convex(*(x.reshape(len(rows), len(y), -1) for x in (rows, products)))
        kept: Tensor = products[:-1].reshape(u.shape)
        return kept

    def _roots(self, y: Tensor, t: Tensor | None) -> Tensor:
        """Return (B, S, S), the roots of the Hessians in their rows."""
        size = max(1, math.prod(y.shape[1:]))
        basis = torch.eye(size, dtype=y.dtype, device=y.device).reshape(size, 1, *y.shape[1:]).expand(-1, *y.shape)
        hessians = self._products(y, t, basis).reshape(size, len(y), size).movedim(0, 1)
        eigenvalues, eigenvectors = torch.linalg.eigh(hessians.double())
        scale = eigenvalues.abs().amax(1)
        _refuse_negative(eigenvalues.amin(1) < -_rounding(y) * scale)
        roots: Tensor = (eigenvalues.clamp(min=0).sqrt().unsqueeze(1) * eigenvectors).mT.to(y.dtype)
        return roots

    def hessian_sqrt(self, y: Tensor, t: Tensor | None) -> Tensor:
        r"""Return columns ``(S, *y.shape)`` with :math:`H_b = \sum_s c_{sb} c_{sb}^\top`, from an eigendecomposition.

        Raises:
            ValueError: If a Hessian has a negative eigenvalue.
        """
        return self._roots(y, t).movedim(1, 0).reshape(-1, *y.shape)

    def require_convex(self, y: Tensor, t: Tensor | None) -> None:
        """Look at all eigenvalues of the Hessians of up to 64 outputs, and else at one direction."""
        if self.convex and y[0].numel() <= _FEW:
            self._roots(y, t)
        elif self.convex:
            self.hessian_product(y, t, y[None])

    def sample_gradient(  # noqa: D102
        self, y: Tensor, t: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        roots = self._roots(y, t)
        noise = torch.randn(roots.shape[:2], generator=generator, dtype=y.dtype, device=y.device)
        return torch.einsum("bs,bsk->bk", noise, roots).reshape(y.shape)

    def bregman(self, y: Tensor, y_ref: Tensor, t: Tensor | None = None) -> Tensor:  # noqa: D102
        y, y_ref, dtype = y.double(), y_ref.detach().double(), y.dtype  # the definition cancels: in float64
        t = t.double() if t is not None and t.is_floating_point() else t
        slope = self._gradient_function(t)(y_ref)
        values = self.value(y, t) - self.value(y_ref, t)  # type: ignore[arg-type]
        return (values - sum_per_sample(slope * (y - y_ref))).to(dtype)


def _rounding(x: Tensor) -> float:
    return 1e3 * torch.finfo(x.dtype).eps


def _require_convex(rows: Tensor, products: Tensor) -> None:
    """Refuse negative curvature along (R, B, S) rows, the last of which is a probe that tells the Hessians' size."""
    size = products.norm(dim=2) / rows.norm(dim=2).clamp(min=torch.finfo(rows.dtype).tiny)
    curvature = (rows * products).sum(2)
    negative = curvature < -_rounding(rows) * size.amax(0) * rows.square().sum(2)
    try:
        _refuse_negative(negative.any(0))
    except RuntimeError:  # inside vmap: a value without a value
        return


def _refuse_negative(negative: Tensor) -> None:
    if bool(negative.any()):
        raise ValueError(
            f"the loss is not convex in the outputs: negative curvature at sample {int(negative.nonzero()[0])} of the "
            "batch. The Gauss-Newton matrix and the Bregman divergence need a convex loss."
        )


_NAMED: dict[str, Callable[[], OutputLoss]] = {
    "cross_entropy": SoftmaxCrossEntropy,
    "bce": BernoulliCrossEntropy,
    "mse": SquaredError,
    "half_squared_error": lambda: SquaredError(0.5, "sum"),
    "gaussian_nll": GaussianNLL,
    "poisson_nll": PoissonNLL,
}


def _from_module(loss: nn.Module) -> OutputLoss:
    """Translate the losses of torch.nn whose meaning per sample is plain."""
    reduction = getattr(loss, "reduction", None)
    if isinstance(loss, nn.CrossEntropyLoss) and loss.weight is None and not loss.label_smoothing:
        if reduction != "sum":
            return SoftmaxCrossEntropy(loss.ignore_index)
    elif isinstance(loss, nn.BCEWithLogitsLoss) and loss.weight is None and loss.pos_weight is None:
        return BernoulliCrossEntropy("mean" if reduction == "mean" else "sum")
    elif isinstance(loss, nn.MSELoss):
        return SquaredError(1.0, "mean" if reduction == "mean" else "sum")
    raise ValueError(
        f"{loss} has no counterpart here. Known are nn.CrossEntropyLoss without weight, label_smoothing and "
        "reduction='sum', nn.BCEWithLogitsLoss without weights, nn.MSELoss. Anything else: CallableLoss(function), "
        "where function(y, t) returns one value per sample."
    )


def output_loss(loss: str | OutputLoss | nn.Module | Callable[[Tensor, Tensor], Tensor]) -> OutputLoss:
    """Return the loss of that name, or translate a loss of ``torch.nn``, or take a function of outputs and targets.

    Args:
        loss: ``"cross_entropy"``, ``"bce"``, ``"mse"``, ``"half_squared_error"``, ``"gaussian_nll"`` or
            ``"poisson_nll"``; an :class:`OutputLoss`; an ``nn.CrossEntropyLoss``, ``nn.BCEWithLogitsLoss`` or
            ``nn.MSELoss``, whose reduction is taken over a sample's outputs; or a function ``(y, t) -> (B,)``.

    Raises:
        ValueError: For any other name or module.

    >>> output_loss("mse")
    SquaredError(factor=1.0, reduction='mean')
    """
    if isinstance(loss, OutputLoss):
        return loss
    if isinstance(loss, str) and loss in _NAMED:
        return _NAMED[loss]()
    if isinstance(loss, nn.Module):
        return _from_module(loss)
    if callable(loss):
        return CallableLoss(loss)
    raise ValueError(f"loss must be one of {', '.join(map(repr, _NAMED))}, an OutputLoss or a function; got {loss!r}.")
