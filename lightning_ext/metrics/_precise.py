"""What metrics that add up over a whole data set share: states that keep their precision, and quiet ``forward``."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_ext.functional import widest_float


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

    def _place(self, state: Any) -> Any:
        if isinstance(state, list):  # pieces to concatenate keep the precision they came in
            return [self._place_piece(piece) for piece in state]
        dtype = widest_float(self.device) if state.is_floating_point() else state.dtype
        return torch.as_tensor(state).to(device=self.device, dtype=dtype)

    def _place_piece(self, piece: Tensor) -> Tensor:
        widest = widest_float(self.device)
        return piece.to(device=self.device, dtype=widest if piece.dtype == torch.float64 else piece.dtype)

    def float_state(self, *shape: int) -> Tensor:
        """Zeros of the widest float of the metric's device."""
        return torch.zeros(shape, dtype=widest_float(self.device), device=self.device)


class ConcatenatingMetric(PreciseMetric):
    """A metric that keeps all it saw, in flat pieces, and may see nothing on some ranks.

    The reduction over ranks of torchmetrics has no dtype for a rank without pieces and wants all pieces of one shape
    but for the first dimension, which such a rank cannot know; flat pieces of a declared dtype need neither.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._dtypes: dict[str, torch.dtype] = {}

    def add_pieces(self, name: str, dtype: torch.dtype) -> None:
        """Declare a state of flat pieces."""
        self._dtypes[name] = dtype
        self.add_state(name, [], dist_reduce_fx="cat")

    def append(self, **pieces: Tensor) -> None:
        """Add a piece to each of the named states."""
        for name, piece in pieces.items():
            getattr(self, name).append(piece.detach().to(self._dtype_of(name), copy=True).flatten())

    def joined(self, name: str) -> Tensor:
        """All pieces of a state as one vector, empty before the first."""
        pieces = getattr(self, name)
        return dim_zero_cat(pieces) if len(pieces) else self._nothing(name)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        for name in self._dtypes:
            setattr(self, name, [self.joined(name)])
        super()._sync_dist(*args, **kwargs)

    def _nothing(self, name: str) -> Tensor:
        return torch.empty(0, dtype=self._dtype_of(name), device=self.device)

    def _dtype_of(self, name: str) -> torch.dtype:
        dtype = self._dtypes[name]
        return widest_float(self.device) if dtype == torch.float64 else dtype


def check_pair(name: str, pair: Sequence[float] | None) -> tuple[float, float] | None:
    """Two finite numbers, or None where the option is off."""
    if pair is None:
        return None
    values = tuple(float(v) for v in pair)
    if len(values) != 2 or not all(map(math.isfinite, values)):
        raise ValueError(f"{name} must be two finite numbers, got {list(pair)}.")
    return values[0], values[1]
