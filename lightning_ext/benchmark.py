"""Paired timings against a peer, the environment they ran in, and the JSON file that keeps both.

A benchmark script is a list of rows and one call::

    ratio = paired_ratio(our_step, their_step, repeats=30)
    row = timed_row("step", ratio, peer_name="pythae", peer_version="0.1.2", goal=1.0)
    write_benchmark([row], "benchmarks/results/mrvae.json")
"""

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_ext.__about__ import __version__
from lightning_ext._report import text_table, write_json

__all__ = [
    "BenchmarkRow",
    "PairedRatio",
    "absent_row",
    "benchmark_table",
    "environment",
    "paired_ratio",
    "timed_row",
    "value_row",
    "write_benchmark",
]

_PACKAGES = ("torch", "pytorch-lightning", "lightning", "torchmetrics", "numpy", "scikit-learn", "matplotlib")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Describe where a result comes from.

    Returns:
        Date (UTC), versions of Python and of the packages that are installed, operating system, CPU model, number of
        cores this process may use, threads torch uses, and the GPU or ``None``. Plain values only.

    >>> sorted(environment())
    ['cores', 'cpu', 'date', 'gpu', 'os', 'threads', 'versions']
    """
    versions = {"python": platform.python_version(), "lightning_ext": __version__}
    versions |= {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@dataclass(frozen=True)
class PairedRatio:
    """Timings of two functions that took turns.

    Attributes:
        ours: Median seconds of one call of ours.
        peer: Median seconds of one call of the peer.
        ratio: Median over the pairs of ours over peer.
        low: First quartile of the pairs' ratios.
        high: Third quartile of the pairs' ratios.
        repeats: Number of pairs.
    """

    ours: float
    peer: float
    ratio: float
    low: float
    high: float
    repeats: int


def paired_ratio(
    ours: Callable[[], object],
    peer: Callable[[], object],
    repeats: int = 20,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> PairedRatio:
    r"""Time two functions in alternation and compare them pair by pair.

    The ratio is :math:`\operatorname{median}_i (t_i^{\text{ours}} / t_i^{\text{peer}})`. The two calls of a pair follow
    each other, and the order flips from pair to pair, so a machine that grows slower in between slows both alike. On a
    GPU the functions must end with ``torch.cuda.synchronize()``.

    Args:
        ours: Our function, called without arguments.
        peer: The function we compare with.
        repeats: Number of pairs, at least 2.
        warmup: Untimed calls of each before the first pair.
        clock: Seconds; another clock such as ``time.process_time`` counts CPU time.

    Returns:
        Medians in seconds, the median ratio and its interquartile range.

    Raises:
        ValueError: If ``repeats`` is below 2.

    >>> ticks = iter(range(100))
    >>> paired_ratio(lambda: next(ticks), lambda: None, repeats=2, clock=lambda: next(ticks)).ratio
    2.0
    """
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2, for a spread; got {repeats}.")
    for _ in range(warmup):
        ours()
        peer()

    def seconds(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    pairs = []
    for i in range(repeats):
        if i % 2:
            theirs = seconds(peer)
            pairs.append((seconds(ours), theirs))
        else:
            mine = seconds(ours)
            pairs.append((mine, seconds(peer)))
    low, middle, high = statistics.quantiles([mine / theirs for mine, theirs in pairs], n=4, method="inclusive")
    return PairedRatio(
        ours=statistics.median(mine for mine, _ in pairs),
        peer=statistics.median(theirs for _, theirs in pairs),
        ratio=middle,
        low=low,
        high=high,
        repeats=repeats,
    )


@dataclass(frozen=True)
class BenchmarkRow:
    """One line of ``benchmarks/results/<method>.json``.

    Attributes:
        name: What is measured.
        ours: Our figure, in ``unit``.
        peer: The peer's figure, in ``unit``.
        peer_name: The peer, as its package is called.
        peer_version: Its version.
        unit: Such as ``"s"``, ``"MiB"`` or ``"nats"``.
        ratio: Ours over the peer's.
        spread: Interquartile range of the ratio, or ``None`` where it was measured once.
        goal: The bound on ``ratio``, fixed before the run.
        met: Whether the goal is met; ``None`` when it could not be measured.
        why: For ``met=None`` the reason, else a remark or the empty string.
    """

    name: str
    ours: float | None
    peer: float | None
    peer_name: str
    peer_version: str | None
    unit: str
    ratio: float | None
    spread: tuple[float, float] | None
    goal: float
    met: bool | None
    why: str = ""


def timed_row(
    name: str, timing: PairedRatio, *, peer_name: str, peer_version: str | None, goal: float, why: str = ""
) -> BenchmarkRow:
    """Make a row from paired timings; the goal is met when the median ratio is at most ``goal``."""
    return BenchmarkRow(
        name=name,
        ours=timing.ours,
        peer=timing.peer,
        peer_name=peer_name,
        peer_version=peer_version,
        unit="s",
        ratio=timing.ratio,
        spread=(timing.low, timing.high),
        goal=goal,
        met=timing.ratio <= goal,
        why=why,
    )


def value_row(
    name: str,
    ours: float,
    peer: float,
    *,
    unit: str,
    peer_name: str,
    peer_version: str | None,
    goal: float,
    higher_is_better: bool = False,
    why: str = "",
) -> BenchmarkRow:
    """Make a row from two figures, such as peak memory or quality.

    Args:
        name: What is measured.
        ours: Our figure.
        peer: The peer's figure, not zero.
        unit: Unit of both.
        peer_name: The peer.
        peer_version: Its version.
        goal: Bound on ours over peer: an upper one, or a lower one with ``higher_is_better``.
        higher_is_better: Which side of the goal is good.
        why: A remark.

    >>> row = value_row("memory", 105.0, 100.0, unit="MiB", peer_name="plain", peer_version=None, goal=1.05)
    >>> row.ratio, row.met
    (1.05, True)
    """
    ratio = ours / peer
    met = ratio >= goal if higher_is_better else ratio <= goal
    return BenchmarkRow(name, ours, peer, peer_name, peer_version, unit, ratio, None, goal, met, why)


def absent_row(name: str, *, peer_name: str, goal: float, why: str, unit: str = "s") -> BenchmarkRow:
    """Make the row of a comparison that this machine cannot run; ``why`` says what is missing."""
    return BenchmarkRow(name, None, None, peer_name, None, unit, None, None, goal, None, why)


def benchmark_table(rows: Sequence[BenchmarkRow], total: int | None = None) -> str:
    """Return the rows as a text table of ``total`` characters per line (default: the terminal's)."""
    header = ["row", "ours", "peer", "unit", "ratio", "spread", "goal", "met", "peer's name"]
    cells = [
        [
            row.name,
            row.ours,
            row.peer,
            row.unit,
            row.ratio,
            f"{row.spread[0]:.3g} to {row.spread[1]:.3g}" if row.spread else None,
            row.goal,
            row.met if row.met is not None else f"not run: {row.why}",
            f"{row.peer_name} {row.peer_version or ''}".strip(),
        ]
        for row in rows
    ]
    return text_table(header, cells, total)


def write_benchmark(rows: Sequence[BenchmarkRow], path: Path | str) -> None:
    """Write the rows and the environment they ran in, and print them as a table.

    Args:
        rows: At least one row; names must differ.
        path: The JSON file; its folder is made.

    Raises:
        ValueError: If two rows share a name, or there are none.
    """
    names = [row.name for row in rows]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"rows must be non-empty and have names that differ; got {names}.")
    write_json(Path(path), {"environment": environment(), "rows": [asdict(row) for row in rows]})
    print(benchmark_table(rows))
