"""What the learning-rate callbacks can be asked for, and what they refuse."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class RateOptions:
    """What :class:`APOLearningRate` was asked for; see there."""

    lam_f: float | Literal["auto"] | None
    lam_w: float
    trust_radius: float
    every_n_steps: int
    warmup_steps: int
    meta_lr: float
    meta_optimizer: Literal["rmsprop", "sgd", "secant"]
    max_log_step: float
    granularity: Literal["global", "group", "layer"]
    lr_bounds: tuple[float, float]
    apply: Literal["before", "after"]
    loss_batch: Literal["same", "next"]
    space: Literal["log", "linear"]


ENOUGH_EXAMPLES = 100
WEIGHT = 0.3  # lambda_F for so many


def small_batch_weight(examples: int | None) -> float:
    """The weight of the change of the outputs below which a step fits a small batch and nothing else; 0 for others.

    Found by experiment between 8 and 64 examples, see the card.
    """
    if examples is None or not 0 < examples < ENOUGH_EXAMPLES:
        return 0.0
    return WEIGHT * (ENOUGH_EXAMPLES / examples) ** 2


class NoLoss(Exception):  # noqa: N818 - not an error: training_step may return None
    """There is no loss on this batch."""


def as_bounds(bounds: Any) -> tuple[float, float]:
    """``(low, high)`` from any pair of numbers."""
    try:
        low, high = bounds
        return float(low), float(high)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_bounds must be (low, high) with 0 < low < high; got {bounds!r}.") from error


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def check(o: RateOptions) -> None:
    _check_weights(o)
    if not (o.meta_lr >= 0 and math.isfinite(o.meta_lr)):
        raise ValueError(f"meta_lr must be at least 0 and finite; got {o.meta_lr}.")
    for name, value in (("max_log_step", o.max_log_step), ("trust_radius", o.trust_radius)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0; got {value}.")
    for name in ("every_n_steps", "warmup_steps"):
        if not isinstance(getattr(o, name), int):
            raise ValueError(f"{name} must be a whole number; got {getattr(o, name)!r}.")
    if o.every_n_steps < 1 or o.warmup_steps < 0:
        name, low = ("every_n_steps", 1) if o.every_n_steps < 1 else ("warmup_steps", 0)
        raise ValueError(f"{name} must be at least {low}; got {getattr(o, name)}.")
    if not 0 < o.lr_bounds[0] < o.lr_bounds[1]:
        raise ValueError(f"lr_bounds must be (low, high) with 0 < low < high; got {o.lr_bounds}.")
    one_of("meta_optimizer", o.meta_optimizer, ("rmsprop", "sgd", "secant"))
    one_of("granularity", o.granularity, ("global", "group", "layer"))
    one_of("apply", o.apply, ("before", "after"))
    one_of("loss_batch", o.loss_batch, ("same", "next"))


def _check_weights(o: RateOptions) -> None:
    if isinstance(o.lam_f, str) and o.lam_f != "auto":
        raise ValueError(f"lam_f must be a number of at least 0 or 'auto'; got {o.lam_f!r}.")
    for name, value in (("lam_f", 1.0 if o.lam_f in ("auto", None) else o.lam_f), ("lam_w", o.lam_w)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number of at least 0; got {value!r}.")
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be at least 0 and finite; got {value}.")
    if o.loss_batch == "next":
        if o.lam_f != 0:
            raise ValueError(f"loss_batch='next' looks at no outputs and needs lam_f=0; got lam_f={o.lam_f}.")
        if o.meta_optimizer == "secant":
            raise ValueError("meta_optimizer='secant' compares both ends of one step and needs loss_batch='same'.")
    elif o.lam_f == 0 and o.lam_w == 0:
        raise ValueError(
            "lam_f and lam_w are both 0: nothing bounds the step, and the learning rate would grow until training "
            "breaks. Set one of them, or use HypergradientLR."
        )
