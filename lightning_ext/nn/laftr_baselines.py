"""Distances from stored examples: all of them, a few, or through the network's tangent kernel."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ext.functional import output_divergence, seeded_generator
from lightning_ext.nn._laftr_network import Reduce, own_rank, plain_name, require_batches
from lightning_ext.nn.laftr import FunctionSpaceEstimator

__all__ = ["CoresetEstimator", "FullDataEstimator", "NTKEstimator"]


class CoresetEstimator(FunctionSpaceEstimator):
    r"""The exact distance on a few stored examples.

    .. math:: \hat D = \frac1M \sum_{m=1}^{M} \rho\bigl(f(x_m; \theta_0), f(x_m; \theta_1)\bigr)

    Args:
        size: M, at least 1; all examples where there are fewer. ``None``: all.
        selection: ``"random"``; or ``"lambda"``, those with the largest trace of the softmax Hessian,
            :math:`\sum_c p_c (1 - p_c)`, an equal number from each class (FROMP's memorable points).
        kwargs: see :class:`FunctionSpaceEstimator`.

    Raises:
        ValueError: For a size or selection out of range.

    Source: Benjamin, Rolnick & Kording 2019 (arXiv:1805.08289); Pan et al. 2020 (arXiv:2004.14070) for ``"lambda"``.

    >>> network = nn.Linear(1, 1, bias=False)
    >>> estimator = FullDataEstimator(divergence="mse").fit(network, [torch.tensor([[1.0], [2.0]])])
    >>> with torch.no_grad():
    ...     _ = network.weight.add_(2.0)
    >>> round(estimator.distance(network).item(), 4)  # (2^2 + 4^2) / 2 / 2
    5.0

    Note:
        ``distance``: a forward and backward pass over the stored examples. Kept: they, their outputs at
        :math:`\theta_0`, and the reference. Over ranks every one stores the same examples, those chosen from all.
    """

    def __init__(self, size: int | None = 40, selection: Literal["random", "lambda"] = "random", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1, or None for all examples; got {size}.")
        if selection not in ("random", "lambda"):
            raise ValueError(f"selection must be 'random' or 'lambda'; got {selection!r}.")
        self.size, self.selection = size, selection

    def _fit(self, module: nn.Module, batches: Iterable[Any], reduce: Reduce | None) -> None:
        generator = seeded_generator(self.seed, own_rank(reduce))
        parts: list[dict[str, Tensor]] = []
        infinite = torch.zeros((), dtype=torch.long)
        for batch in batches:
            x = self.inputs_of(batch)
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"inputs must be a tensor to be stored; got {type(x).__name__}. Say with inputs= what the "
                    "network's input is in a batch, and with forward= how it is called on it."
                )
            outputs = self._forward(module, x)
            infinite = infinite.to(x.device) + sum((~value.isfinite()).sum() for value in (x, outputs))
            parts.append({"x": x, "outputs": outputs} | self._scores(batch, outputs, generator))
            parts = parts if self.size is None else [self._best(_joined(parts))]
        require_batches(bool(parts), module, reduce)
        if (infinite if reduce is None else reduce(infinite)) > 0:
            raise ValueError("inputs and outputs must be finite; there are NaN or infinite ones.")
        kept = _joined(parts)
        if reduce is not None and dist.is_initialized() and dist.get_world_size() > 1:
            kept = self._best({name: _gathered(value) for name, value in kept.items()})
        self._kept = {name: kept[name] for name in ("x", "outputs")}

    def _scores(self, batch: Any, outputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        random = torch.rand(len(outputs), generator=generator, dtype=torch.float64).to(outputs.device)
        if self.selection == "random":
            return {"score": random}
        p = outputs.flatten(1).float().softmax(1) if self.heads is None else outputs[..., self.heads].softmax(-1)
        labels = self.targets_of(batch)
        if labels.is_floating_point() or labels.shape != outputs.shape[:1]:
            raise ValueError(
                f"selection='lambda' takes an equal number from each class: the target must hold {len(outputs)} class "
                f"numbers; got {labels.dtype}, {tuple(labels.shape)}."
            )
        return {"score": (p * (1 - p)).flatten(1).sum(1).double(), "label": labels}

    def _best(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.size is None or len(rows["score"]) <= self.size:
            return rows
        place = rows["score"].new_zeros(len(rows["score"]))
        for label in torch.unique(rows["label"]) if "label" in rows else ():
            members = (rows["label"] == label).nonzero().flatten()
            order = rows["score"][members].argsort(descending=True)
            place[members[order]] = torch.arange(len(members), dtype=place.dtype, device=place.device)
        best = place - rows["score"] / (1 + rows["score"].abs().max())  # a class's first before any class's second
        chosen = best.argsort()[: self.size].sort().values
        return {name: value[chosen] for name, value in rows.items()}

    def _distance(self, module: nn.Module) -> Tensor:
        new = self.run(module, self.parameters_of(module), self._kept["x"])
        return output_divergence(new, self._kept["outputs"], self.divergence, self.heads)

    def absorb(self, other: FunctionSpaceEstimator) -> None:
        """Add an earlier task's examples, with their outputs at that time; ``size`` more for every task."""
        shapes = [(each._facts, [value.shape[1:] for value in each._kept.values()]) for each in (self, other)]
        if not isinstance(other, CoresetEstimator) or shapes[0] != shapes[1]:
            raise ValueError("only stored examples with the same heads, inputs and outputs can be merged.")
        self._kept = {name: torch.cat([other._kept[name].to(value), value]) for name, value in self._kept.items()}


class FullDataEstimator(CoresetEstimator):
    """The exact distance on all of the data: what the others estimate.

    Args:
        kwargs: see :class:`FunctionSpaceEstimator`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(size=None, **kwargs)


class NTKEstimator(CoresetEstimator):
    r"""The distance of the network linearised in its parameters, on stored examples.

    .. math:: f(x; \theta_1) \approx f(x; \theta_0) + J(x; \theta_0)\, (\theta_1 - \theta_0)

    Args:
        size: stored examples, at least 1. Default all.
        selection: as for :class:`CoresetEstimator`.
        kwargs: see :class:`FunctionSpaceEstimator`.

    Note:
        ``distance``: a forward-mode product and its backward pass, about three times the exact distance's cost.
    """

    def __init__(
        self, size: int | None = None, selection: Literal["random", "lambda"] = "random", **kwargs: Any
    ) -> None:
        super().__init__(size, selection, **kwargs)

    def _distance(self, module: nn.Module) -> Tensor:
        reference, current = self.reference_values(module), self.parameters_of(module)
        weights = {plain_name(name) for name, p in module.named_parameters() if p.is_floating_point()}
        start = {name: reference[name] for name in weights & reference.keys()}  # frozen ones may have moved before
        change = {name: current[name] - value for name, value in start.items()}
        rest = {name: value for name, value in reference.items() if name not in start}

        def outputs(values: dict[str, Tensor]) -> Tensor:
            return self.run(module, {**rest, **values}, self._kept["x"])

        with _forward_mode():
            old, moved, *_ = torch.func.jvp(outputs, (start,), (change,))
        return output_divergence(old.detach() + moved, old.detach(), self.divergence, self.heads)


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Attention by kernels that have forward-mode derivatives."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _gathered(value: Tensor) -> Tensor:
    """Rows of all ranks, in the order of ranks."""
    counts = [torch.zeros(1, dtype=torch.long, device=value.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(value)], device=value.device))
    most = max(int(count) for count in counts)
    padded = value.new_zeros(most, *value.shape[1:])
    padded[: len(value)] = value
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])
