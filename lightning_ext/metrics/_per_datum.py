"""What bounds of mutual information share: means over pairs with standard errors, infinite values, one figure."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ext.functional import merge_moments, moments_variance, update_moments, widest_float
from lightning_ext.metrics._precise import PreciseMetric
from lightning_ext.metrics.mutual_information_plot import plot_bounds

SIDES = ("lower", "upper", "both")

_IMPOSSIBLE = {"lower": math.inf, "upper": -math.inf, "gap": -math.inf, "estimate": math.nan}


class PerDatumMean(PreciseMetric):
    """Means over pairs (x, z) of one quantity or of several, each with its standard error.

    A quantity that is infinite for some pair is infinite, with an infinite standard error. An estimate with infinite
    terms of both signs is NaN, with a warning.
    """

    higher_is_better: bool | None = None

    moments: Tensor
    infinite: Tensor

    def __init__(self, quantities: tuple[str, ...], key_prefix: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quantities = quantities
        self.key_prefix = key_prefix
        self.add_state("moments", self.float_state(len(quantities), 1, 3), dist_reduce_fx=merge_moments)
        count = torch.zeros(len(quantities), 2, dtype=torch.long, device=self.device)  # of minus and plus infinity
        self.add_state("infinite", count, dist_reduce_fx="sum")

    def widened(self, **tensors: Tensor | None) -> list[Tensor]:
        """What ``update`` was given, without gradient, in the widest float of the metric's device."""
        dtype, found = widest_float(self.device), []
        for name, value in tensors.items():
            if value is None:
                told = f" with side={self.side!r}" if hasattr(self, "side") else ""
                raise ValueError(f"{type(self).__name__}.update needs {name}{told}.")
            if not value.numel():
                raise ValueError(
                    f"{name} is empty, of shape {tuple(value.shape)}: update takes K >= 1 samples of B >= 1 pairs. "
                    "Leave out empty batches."
                )
            if bool(value.isnan().any()):
                raise ValueError(f"{name} has {int(value.isnan().sum())} NaN of {value.numel()} numbers.")
            found.append(value.detach().to(device=self.device, dtype=dtype))
        return found

    def add(self, *values: Tensor) -> None:
        """Take in a batch ``(B,)`` of each quantity."""
        together = torch.stack(values)
        self._require_possible(together)
        finite = together.isfinite()
        group = torch.arange(len(values), device=together.device)[:, None].expand_as(together)
        self.moments = update_moments(self.moments, group[finite], together[finite][:, None])
        sides = torch.stack([(together == -torch.inf).sum(1), (together == torch.inf).sum(1)], 1)
        self.infinite = self.infinite + sides

    def compute(self) -> dict[str, Tensor]:
        """The means so far, over all ranks; see the class for the keys."""
        value, stderr = self.means(), self.stderrs()
        self.warn_of(self._problems(value))
        return self.named(value, stderr)

    def means(self) -> Tensor:
        """The mean of each quantity, ``(Q,)``."""
        self.require_pairs()
        below, above = self.infinite.unbind(1)
        mean = torch.where(below > 0, -torch.inf, self.moments[:, 0, 1])
        return torch.where(above > 0, torch.where(below > 0, torch.nan, torch.inf), mean)

    def stderrs(self) -> Tensor:
        """The standard error of each mean, ``(Q,)``."""
        stderr = (moments_variance(self.moments)[:, 0] / self.moments[:, 0, 0]).sqrt()
        return torch.where((self.infinite > 0).any(1), torch.inf, stderr)

    def require_pairs(self) -> None:
        """Refuse to compute anything of nothing."""
        if not bool(self.pairs()):
            raise RuntimeError(f"{type(self).__name__} has seen no pair on any rank; call update before compute.")

    def pairs(self) -> Tensor:
        """How many pairs were seen, int64."""
        return self.moments[0, 0, 0].long() + self.infinite[0].sum()

    def named(self, value: Tensor, stderr: Tensor) -> dict[str, Tensor]:
        """By their keys, with the number of pairs."""
        result = dict(zip(self.quantities, value.unbind(), strict=True))
        if len(self.quantities) == 1:
            result["stderr"] = stderr[0]
        else:
            result |= {f"{name}_stderr": error for name, error in zip(self.quantities, stderr.unbind(), strict=True)}
        return {self.key_prefix + name: tensor for name, tensor in (result | {"count": self.pairs()}).items()}

    def plot(
        self,
        val: Mapping[str, Tensor] | None = None,
        ax: Any = None,
        label: str | None = None,
        truth: float | None = None,
    ) -> tuple[Any, Any]:
        """Draw a row with the bounds and their standard errors.

        Args:
            val: What :meth:`compute` returned. Default: ``compute()``.
            ax: Matplotlib axes to draw in, those of another bound's plot for one more row. Default: a new figure's.
            label: Name of the row. Default: the class's name.
            truth: The mutual information where it is known, in nats, drawn as a line.

        Returns:
            ``(figure, axes)``.

        Raises:
            ModuleNotFoundError: If matplotlib is missing, with the line that installs it.
        """
        value = self.compute() if val is None else val
        plain = {name.removeprefix(self.key_prefix): tensor for name, tensor in value.items()}
        return plot_bounds({label or type(self).__name__: plain}, ax, truth)

    def _require_possible(self, values: Tensor) -> None:
        for name, row in zip(self.quantities, values, strict=True):
            wrong = row.isnan() | (row == _IMPOSSIBLE[name])
            if bool(wrong.any()):
                raise ValueError(
                    f"the {name} value is {row[wrong][0].item()} for {int(wrong.sum())} of {len(row)} pairs: log "
                    "weights, densities and scores must be below infinity."
                )

    def _problems(self, value: Tensor) -> list[str]:
        problems = [
            f"{name!r} is NaN: its terms are infinite with both signs."
            for name, number in zip(self.quantities, value.tolist(), strict=True)
            if number != number
        ]
        if int(self.pairs()) == 1:
            problems.append("standard errors are NaN: they take two pairs.")
        return problems


class SidedMean(PerDatumMean):
    """A bound on either side, or both with their gap, paired by (x, z)."""

    def __init__(self, side: str, key_prefix: str = "", **kwargs: Any) -> None:
        if side not in SIDES:
            raise ValueError(f"side must be one of {', '.join(map(repr, SIDES))}; got {side!r}.")
        super().__init__(("lower", "upper", "gap") if side == "both" else (side,), key_prefix, **kwargs)
        self.side = side

    def has(self, side: str) -> bool:
        """Whether a side is wanted."""
        return self.side in (side, "both")

    def add_sides(self, **sides: Tensor) -> None:
        """Take in a batch of the wanted sides, ``(B,)`` each."""
        if self.side == "both":
            self.add(sides["lower"], sides["upper"], sides["upper"] - sides["lower"])
        else:
            self.add(sides[self.side])


def require_finite(what: str, values: Tensor) -> None:
    """Refuse infinite densities at a pair's own sample."""
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"{what} is not finite for {wrong} of {values.numel()} pairs. Each z must be a sample of p(z|x), such as "
            "the one that x was simulated from, where densities are positive."
        )


def with_first_row(samples: Tensor, first: Tensor, names: tuple[str, str]) -> Tensor:
    """Samples ``(K, B)`` whose row 0 has given way to ``first (B,)``."""
    if samples.ndim != 2 or first.shape != samples.shape[1:]:
        raise ValueError(
            f"{names[0]} must be (K, B) and {names[1]} (B,), of one B; got {tuple(samples.shape)} and "
            f"{tuple(first.shape)}."
        )
    return torch.cat([first[None], samples[1:]])
