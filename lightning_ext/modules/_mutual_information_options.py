"""How chains are annealed, and what a measurement is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from lightning_ext.functional import linear_schedule, sigmoid_schedule

Bound = Literal["iwae", "ais"]


@dataclass(frozen=True)
class AnnealingOptions:
    """How chains run along a path; see :func:`~lightning_ext.modules.measure_implicit_bound`."""

    num_chains: int = 8
    num_steps: int = 200
    num_leapfrog: int = 10
    schedule: Literal["sigmoid", "linear"] = "sigmoid"
    delta: float = 4.0
    target_accept: float = 0.65
    pilot_rounds: int = 6
    chunk_size: int | None = None

    _least: ClassVar[dict[str, int]] = {"num_chains": 1, "num_steps": 1, "num_leapfrog": 1, "pilot_rounds": 1}

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in self._least.items():
            given = getattr(self, name)
            if not isinstance(given, int) or given < least:
                raise ValueError(f"{name} must be an integer of at least {least}; got {given!r}.")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, or None; got {self.chunk_size}.")
        if self.schedule not in ("sigmoid", "linear"):
            raise ValueError(f"schedule must be 'sigmoid' or 'linear'; got {self.schedule!r}.")
        if not self.delta > 0:
            raise ValueError(f"delta must be positive; got {self.delta}.")
        if not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept must be between 0 and 1; got {self.target_accept}.")

    @property
    def betas(self) -> Tensor:
        """The temperatures."""
        if self.schedule == "linear":
            return linear_schedule(self.num_steps)
        return sigmoid_schedule(self.num_steps, self.delta)


@dataclass(frozen=True)
class SandwichOptions(AnnealingOptions):
    """What a measurement is made of; see :func:`~lightning_ext.modules.measure_mutual_information`."""

    num_chains: int = 16
    bounds: Sequence[Bound] = ("iwae", "ais")
    num_points: int = 128
    num_samples: int = 1000
    proposal: Literal["prior", "model"] = "prior"

    _least: ClassVar[dict[str, int]] = AnnealingOptions._least | {"num_points": 2, "num_samples": 1}

    def __post_init__(self) -> None:
        """Check the ranges."""
        unknown = sorted(set(self.bounds) - set(get_args(Bound)))
        if isinstance(self.bounds, str) or unknown or not self.bounds or len(set(self.bounds)) < len(self.bounds):
            raise ValueError(f"bounds must be some of {', '.join(map(repr, get_args(Bound)))}; got {self.bounds!r}.")
        if self.proposal not in ("prior", "model"):
            raise ValueError(f"proposal must be 'prior' or 'model'; got {self.proposal!r}.")
        super().__post_init__()

    @property
    def total(self) -> int:
        """How often progress is reported."""
        chunks = -(-self.num_chains // (self.chunk_size or self.num_chains))
        return 2 * self.num_steps * chunks if "ais" in self.bounds else 0
