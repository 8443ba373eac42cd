"""Random numbers that depend on counters instead of on how many were drawn before.

A stream addressed by ``(seed, epoch, batch, rank)`` needs no state in a checkpoint: a resumed run asks for the same
address and gets the same numbers, and nothing here touches the global generator of the program around it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["fold_in", "seeded_draws", "seeded_generator"]

_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    # The finaliser of splitmix64 (Steele, Lea, Flood 2014): neighbouring counters give unrelated seeds.
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def fold_in(seed: int, *counters: int) -> int:
    """Combine a seed with counters into a new seed, so that different counters give unrelated streams.

    Args:
        seed: any integer.
        *counters: any integers, for instance epoch, batch index and rank. Their order matters.

    Returns:
        An integer in ``[0, 2**63)``, fit for ``torch.Generator.manual_seed``.

    >>> fold_in(0, 1, 2) == fold_in(0, 1, 2), fold_in(0, 1, 2) == fold_in(0, 2, 1)
    (True, False)
    """
    state = _mix((seed + 0x9E3779B97F4A7C15) & _MASK)
    for counter in counters:
        state = _mix((state + 0x9E3779B97F4A7C15 * (2 * (counter & _MASK) + 1)) & _MASK)
    return state >> 1


def seeded_generator(seed: int, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh ``torch.Generator`` on ``device`` at the address ``(seed, *counters)``.

    Args:
        seed: any integer.
        *counters: any integers, see :func:`fold_in`.
        device: where the generator draws; streams of different device types differ.

    Returns:
        The generator. Cost: a few microseconds.
    """
    return torch.Generator(device=device).manual_seed(fold_in(seed, *counters))


@contextmanager
def seeded_draws(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Let what knows no generators, such as ``torch.distributions``, draw from a seed; torch's own state is put back.

    Args:
        seed: an integer in ``[0, 2**63)``.
        device: where it draws, beside the CPU. Other devices are left alone.

    >>> with seeded_draws(3):
    ...     first = torch.randn(2)
    >>> bool((first == torch.randn(2, generator=torch.Generator().manual_seed(3))).all())
    True
    """
    device = torch.device(device)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every CUDA device as well
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif devices:
            torch.manual_seed(seed)
        yield
