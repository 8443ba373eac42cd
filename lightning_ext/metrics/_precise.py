"""What metrics that add up over a whole data set share: states that keep their precision, and quiet ``forward``."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.prints import rank_zero_warn


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """The widest float that a device can add up in."""
    return torch.float32 if device.type == "mps" else torch.float64


class PreciseMetric(Metric):
    """A metric whose states keep their own precision, whatever the module around them is converted to."""

    is_differentiable: bool = False
    full_state_update: bool = False
    _forwarding: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Update, and return the value of this batch alone, without warnings on what the batch leaves out."""
        self._forwarding = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._forwarding = False

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the data of another metric, or of its states, to this one."""
        super().merge_state(incoming_state)
        self._computed = None  # the base class would go on returning the value from before

    def warn_of(self, problems: Sequence[str]) -> None:
        """One warning, on rank 0, for all problems; none while ``forward`` looks at a single batch."""
        if problems and not self._forwarding:
            rank_zero_warn(f"{type(self).__name__}: " + " ".join(problems), UserWarning)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> "PreciseMetric":
        super()._apply(fn, exclude_state=tuple(self._defaults))
        for name, default in self._defaults.items():
            self._defaults[name] = self._place(default)
            setattr(self, name, self._place(getattr(self, name)))
        return self

    def _place(self, state: Any) -> Tensor:
        dtype = accumulator_dtype(self.device) if state.is_floating_point() else state.dtype
        return torch.as_tensor(state).to(device=self.device, dtype=dtype)

    def float_state(self, *shape: int) -> Tensor:
        """Zeros of the widest float of the metric's device."""
        return torch.zeros(shape, dtype=accumulator_dtype(self.device), device=self.device)


def check_pair(name: str, pair: Sequence[float] | None) -> tuple[float, float] | None:
    """Two finite numbers, or None where the option is off."""
    if pair is None:
        return None
    values = tuple(float(v) for v in pair)
    if len(values) != 2 or not all(map(math.isfinite, values)):
        raise ValueError(f"{name} must be two finite numbers, got {list(pair)}.")
    return values[0], values[1]
