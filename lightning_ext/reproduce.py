"""The engine of ``lightning-ext reproduce``: a paper's claims, each with a criterion fixed before anything runs.

A reproduction is one file, ``examples/<stem>_reproduce.py``, with one function::

    def claims(full, seeds, output_dir):
        @functools.cache
        def train(seed): ...

        def auc():
            return over_seeds(lambda seed: train(seed).auc, seeds, passes=lambda values: max(values) < 1.05)

        yield Claim(
            "one run matches eight", paper="within 5 %", criterion="AUC ratio < 1.05 on every seed", measure=auc
        )

It may take ``data_dir`` too; the command then has ``--data DIR`` for it. All claims are collected first, so that the
table, criteria included, is on disk before the first of them is measured; after every measurement the file is written
again, and a run that is interrupted loses nothing that was finished.
"""

import inspect
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ext._report import TextTable, format_cell, write_json
from lightning_ext._resources import UserError, choose, examples_dir, load_script, named_files, writable_folder
from lightning_ext.benchmark import environment

__all__ = ["Claim", "Outcome", "over_seeds", "reproduce", "reproductions"]


@dataclass(frozen=True)
class Outcome:
    """What a measurement found.

    Attributes:
        ours: Our figure; over several seeds their mean.
        passed: Whether the claim's criterion holds.
        spread: Standard deviation over the seeds, or a range in words; ``None`` where there is none.
        seeds: The seeds behind ``ours``; empty where nothing is random.
        figures: Matplotlib figures by name, saved as ``<stem>_<name>.png`` beside the table.
    """

    ours: float | str
    passed: bool
    spread: float | str | None = None
    seeds: Sequence[int] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One claim of a paper and how it is checked here.

    Attributes:
        claim: The claim, in one phrase.
        paper: The paper's own figure, with its table or figure number.
        criterion: When our result counts as a reproduction.
        measure: Runs the experiment; called once, timed by the engine.
    """

    claim: str
    paper: str
    criterion: str
    measure: Callable[[], Outcome]


def over_seeds(
    measure: Callable[[int], float], seeds: Sequence[int], passes: Callable[[Sequence[float]], bool]
) -> Outcome:
    """Measure once per seed.

    Args:
        measure: Seed to figure.
        seeds: At least one seed.
        passes: The criterion over all seeds' figures.

    Returns:
        Mean and sample standard deviation (``None`` for one seed) of the figures.

    >>> over_seeds(lambda seed: 2.0 * seed, [0, 1, 2], passes=lambda values: max(values) <= 4)
    Outcome(ours=2.0, passed=True, spread=2.0, seeds=(0, 1, 2), figures={})
    """
    values = [float(measure(seed)) for seed in seeds]
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Outcome(statistics.fmean(values), bool(passes(values)), spread, tuple(seeds))


def reproductions(examples: Path | None = None) -> dict[str, Path]:
    """Return ``{stem: path}`` of the reproductions in ``examples`` (default: the shipped ones)."""
    return named_files(examples or examples_dir(), "_reproduce.py")


def _collect(path: Path, options: dict[str, Any]) -> list[Claim]:
    """Call the file's ``claims`` with the options it knows; a data folder that nobody would read is a mistake."""
    function = load_script(path, "claims").claims
    if "data_dir" not in inspect.signature(function).parameters and options.pop("data_dir") is not None:
        raise UserError(f"--data: {path.name} reads no data folder; leave the option out.")
    claims = list(function(**options))
    if not claims:
        raise UserError(f"{path} lists no claims.")
    return claims


def _row(claim: Claim) -> dict[str, Any]:
    return {
        "claim": claim.claim,
        "paper": claim.paper,
        "criterion": claim.criterion,
        "ours": None,
        "spread": None,
        "seeds": [],
        "passed": None,
        "seconds": None,
    }


def _measure(claim: Claim, stem: str, output: Path) -> dict[str, Any]:
    """Run one claim; an error in it is a failed claim with the error's text, and the others go on."""
    row, start = _row(claim), time.perf_counter()
    try:
        outcome = claim.measure()
    except Exception as error:
        traceback.print_exc()
        row |= {"passed": False, "error": f"{type(error).__name__}: {error}"}
    else:
        names = [f"{stem}_{name}.png" for name in outcome.figures]
        for name, figure in zip(names, outcome.figures.values(), strict=True):
            figure.savefig(output / name, dpi=150, bbox_inches="tight")
        row |= {
            "ours": outcome.ours,
            "spread": outcome.spread,
            "seeds": list(outcome.seeds),
            "passed": bool(outcome.passed),
            "figures": names,
        }
    row["seconds"] = round(time.perf_counter() - start, 3)
    return row


def _table() -> TextTable:
    total = min(shutil.get_terminal_size((110, 24)).columns, 160)
    wide = max(14, (total - 16 - 4 - 7 - 10) // 3)
    return TextTable(["claim", "paper", "criterion", "ours", "pass", "seconds"], [wide, wide, wide, 16, 4, 7], {5})


def _cells(row: Mapping[str, Any]) -> list[object]:
    ours = row.get("error") or format_cell(row["ours"])
    spread = row["spread"]
    if spread is not None:
        spread = f" ({spread})" if isinstance(spread, str) else f" ± {format_cell(spread)}"
    return [
        row["claim"],
        row["paper"],
        row["criterion"],
        f"{ours}{spread or ''}",
        row["passed"],
        f"{row['seconds']:.1f}",
    ]


def reproduce(
    name: str,
    *,
    full: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
    output: Path | str = "runs/reproduce",
    data_dir: Path | str | None = None,
    examples: Path | None = None,
) -> list[dict[str, Any]]:
    """Check every claim of one method and keep the table.

    Args:
        name: Stem of the method.
        full: Run the large experiments too.
        seeds: Seeds handed to the claims, at least one.
        output: Folder of ``<stem>.json`` and the figures.
        data_dir: Folder with data that was downloaded before.
        examples: Folder with the reproductions; default the shipped ones.

    Returns:
        The rows, as they stand in ``<output>/<stem>.json``: ``claim, paper, criterion, ours, spread, seeds, passed,
        seconds``, with ``figures`` or ``error``. A claim that was not reached has ``passed`` ``None``.

    Raises:
        UserError: Unknown name, no such data folder, an output folder that cannot be written; before anything runs.

    Note:
        A claim that fails stays in the table with ``passed`` false, and so does one whose measurement raises.
    """
    path = choose(name, reproductions(examples), "reproduction")
    if not seeds:
        raise UserError("--seeds needs at least one seed.")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UserError(f"--data: there is no folder {data_dir}.")
    folder = writable_folder(Path(output))
    options = {"full": full, "seeds": tuple(seeds), "output_dir": folder}
    claims = _collect(path, {**options, "data_dir": None if data_dir is None else Path(data_dir)})
    rows = [_row(claim) for claim in claims]
    where = environment()

    def save(complete: bool = False) -> None:
        content = {"method": name, "full": full, "complete": complete, "environment": where, "rows": rows}
        write_json(folder / f"{name}.json", content)

    save()
    table = _table()
    print(table.head(), flush=True)
    for i, claim in enumerate(claims):
        rows[i] = _measure(claim, name, folder)
        save(complete=i + 1 == len(claims))
        print(table.row(_cells(rows[i])), flush=True)
    print(_verdict(rows, folder / f"{name}.json"))
    return rows


def _verdict(rows: Iterable[Mapping[str, Any]], path: Path) -> str:
    rows = list(rows)
    held = sum(bool(row["passed"]) for row in rows)
    return f"\n{held} of {len(rows)} claims reproduced in {sum(row['seconds'] for row in rows):.0f} s; table in {path}"
