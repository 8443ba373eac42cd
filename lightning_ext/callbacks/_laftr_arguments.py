"""Arguments of the wrong kind, named before they do harm."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def check_number(name: str, number: Any, least: int, *, whole: bool = True) -> None:
    """A number of at least ``least``.

    Raises:
        ValueError: it is none, or too small, or not finite, or not whole where it must be.
    """
    value = number.item() if isinstance(number, Tensor) and number.numel() == 1 else number
    kind = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(float(value)) or value < least:
        what = f"a whole number, at least {least}" if whole else f"finite and at least {least}"
        raise ValueError(f"{name} must be {what}; got {number!r}.")


def check_choice(name: str, given: Any, choices: Sequence[Any]) -> None:
    """One of a few.

    Raises:
        ValueError: it is none of them.
    """
    if given not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}; got {given!r}.")


def check_readers(forward: Any, inputs: Any, target: Any) -> None:
    """A function of module and inputs, and functions of a batch or its keys.

    Raises:
        ValueError: one is something else.
    """
    if forward is not None and not callable(forward):
        raise ValueError(f"forward must be a function of the module and its inputs; got {forward!r}.")
    for name, given in (("inputs", inputs), ("target", target)):
        if given is not None and not isinstance(given, str | int) and not callable(given):
            raise ValueError(f"{name} must be a key of a batch or a function of it; got {given!r}.")


def check_heads(heads: Any) -> None:
    """A function of the task, or an entry for each.

    Raises:
        ValueError: it is neither.
    """
    if heads is not None and not callable(heads) and (isinstance(heads, str) or not isinstance(heads, Sequence)):
        raise ValueError(f"heads must be a function of the task or a list with an entry per task; got {heads!r}.")
