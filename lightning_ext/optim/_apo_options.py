"""Checks of the options of an APO preconditioner's parameter groups."""

import math
from typing import Any

_SHARED = ("lam_f", "lam_w", "every_n_steps", "apply")
_AT_LEAST = {
    "lam_f": 0,
    "lam_w": 0,
    "weight_decay": 0,
    "meta_lr": 0,
    "momentum": 0,
    "max_dim": 0,
    "every_n_steps": 1,
}
_WHOLE = ("every_n_steps", "max_dim")
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "structure": ("kron", "ekfac", "diag"),
    "meta_update": ("multiplicative", "adam"),
    "apply": ("before", "after"),
    "precond_dtype": (None, "float16", "bfloat16", "float32", "float64"),
}


def check_group(group: dict[str, Any], first: dict[str, Any]) -> None:
    """Refuse a group with options or parameters that make no sense, or that differs from the first where none may.

    Raises:
        ValueError: With the option, what came and what to do.
    """
    for name, choices in _CHOICES.items():
        if group[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {group[name]!r}.")
    _check_ranges(group)
    for name in _SHARED:
        if group[name] != first[name]:
            raise ValueError(
                f"{name} must be the same in all parameter groups; got {group[name]} and {first[name]}. There is one "
                "objective for all of them."
            )
    for p in group["params"]:
        if p.is_complex():
            raise ValueError(
                f"APOPreconditioner does not support complex parameters; got one of shape {tuple(p.shape)}. Train its "
                "real view (torch.view_as_real)."
            )


def _check_ranges(group: dict[str, Any]) -> None:
    for name, bound in _AT_LEAST.items():
        if not (math.isfinite(group[name]) and group[name] >= bound):
            raise ValueError(f"{name} must be at least {bound}; got {group[name]}.")
    for name in _WHOLE:
        if int(group[name]) != group[name]:
            raise ValueError(f"{name} must be a whole number; got {group[name]}.")
    if not (math.isfinite(group["lr"]) and group["lr"] > 0):
        raise ValueError(f"lr must be above 0; got {group['lr']}.")
    if group["momentum"] >= 1:
        raise ValueError(f"momentum must be below 1; got {group['momentum']}.")
    below = 0.5 if group["structure"] == "kron" else 1
    if group["meta_update"] == "multiplicative" and group["meta_lr"] >= below:
        raise ValueError(
            f"meta_lr must be below {below:g} for structure {group['structure']!r}; got {group['meta_lr']}. A larger "
            "step could make the preconditioner indefinite."
        )
    limit = group["step_limit"]
    if limit is not None and not limit >= 1:
        raise ValueError(f"step_limit must be at least 1, or None for no limit; got {limit}.")
    if group["lam_f"] == group["lam_w"] == 0:
        raise ValueError("lam_f and lam_w are both 0: nothing would hold the step back. Give one of them a value.")
