"""The claims about LAFTR and how each is checked here: ``lightning-ext reproduce laftr``.

Dhawan, Huang, Bae, Grosse, *Efficient Parametric Approximations of Neural Network Function Space Distance*, ICML 2023,
arXiv 2302.03519. Its abstract says that the parametric estimate beats other parametric ones that take more memory, is
competitive with those that store data, and serves influence estimation and the detection of wrong labels. Its tables
were not at hand, so the column "paper" quotes the abstract or says that there is no figure; nothing is compared with a
number that could not be read.

The criteria were written down before the first run of this file and never moved; those of R1, R2, R4 and R5 come with
the figures of a prototype, R6 had been run by nobody. The weights of the penalties are the prototype's too and are not
searched for here; K-FAC, for which it had none, has the better of two on a seed of its own. Thresholds hold for means
over the seeds.

What the prototype's text leaves open came from pilot runs. The pixels are taken less one mean, over one standard
deviation, because plain fine-tuning, which knows no penalty, then ends where it did in R2; with pixels in [0, 1], R1a
and R1b come out at 0.09 and 0.10, and R2's LAFTR below 0.8. R5's network is trained as in the influence reproduction.

- R1: every estimator against the true distance on the first task's data, while a second task is learned.
- R2: five permuted-digits tasks, in one fit under a Trainer with ``FunctionSpaceRegularizer``.
- R4: wrong labels found by self-influence, from statistics in place of the training data.
- R5: the effect of removing a sample, the proximal Bregman response (PBRF), predicted in the same way.
- R6: ten permuted-digits tasks, with fewer epochs: what sets the methods apart, and memory that does not grow.
- F, only with ``--full --data DIR``: the configurations of the official code on Split and Permuted MNIST and on Split
  CIFAR-10/100. For a GPU; F has not been run in full yet.

Where LAFTR falls short here: R1a, R1b and R5a miss their thresholds, each by less than a standard deviation over the
seeds; of the ten tasks K-FAC, with the better of two weights, comes within 0.05 (R6b), with more memory. A replay
buffer of 40 images takes less memory than moments by class and forgets as little. EWC with R2's weight ends below
fine-tuning on ten tasks; with weights from 1 to 1,000, tried once afterwards on the seed that is not reported, EWC
stays below 0.48 and online EWC below 0.57.

R3 of the specification, digits split among heads, is left out: every method ends above 0.99. The first term of the
PBRF on the training data is replaced by LAFTR's; there the removed sample's loss is linear, as it must be to have a
minimum. The official code has no influence experiment.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_ext._report import write_json
from lightning_ext._resources import load_script, require
from lightning_ext.reproduce import Claim, Outcome


@functools.cache
def _part(name: str) -> Any:
    return load_script(Path(__file__).with_name(f"_laftr_{name}.py"))


PARAMETRIC = "abstract: beats other parametric estimates that take more memory; no figure at hand"
STORED = "abstract: competitive with estimates that store data; no figure at hand"
DETECTS = "abstract: finds mislabelled examples; no figure at hand"
INFLUENCES = "abstract: serves influence function estimation; no figure at hand"
OURS = "not in the paper"


def claims(full: bool, seeds: Sequence[int], output_dir: Path, data_dir: Path | None = None) -> Iterator[Claim]:
    """Everything that is checked; R needs no download."""
    require("matplotlib", "sklearn")
    yield from tracking_claims(seeds)
    yield from five_task_claims(seeds, output_dir)
    yield from detection_claims(seeds)
    yield from removal_claims(seeds)
    yield from ten_task_claims(seeds, output_dir)
    if full:
        yield from _part("full").claims(seeds, data_dir)


# -- R1 -------------------------------------------------------------------------------------------------------------


def tracking_claims(seeds: Sequence[int]) -> Iterator[Claim]:
    """Experiment R1."""
    part = _part("tracking")

    def off(name: str) -> float:
        return statistics.fmean(part.tracked(seed).log_ratio(name) for seed in seeds)

    def below(name: str, most: float) -> Outcome:
        values = [part.tracked(seed).log_ratio(name) for seed in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Outcome(statistics.fmean(values), statistics.fmean(values) < most, spread, seeds)

    def compared(names: Sequence[str], passes: Callable[..., bool], drawn: bool = False) -> Outcome:
        values = [off(name) for name in names]
        told = ", ".join(f"{value:.3f} {name}" for name, value in zip(names, values, strict=True))
        figures = {"tracking": _part("figures").tracking(part, seeds)} if drawn else {}
        return Outcome(told, passes(*values), seeds=seeds, figures=figures)

    def rivals() -> Outcome:
        return compared(("K-FAC", "EWC"), lambda kfac, ewc: 0.15 < kfac < ewc)

    def official(kind: str) -> Outcome:
        ours, theirs = ("laftr-moments", "official formula") if kind == "pooled" else (
            "laftr-moments by class", "official by class")  # fmt: skip
        return compared((ours, theirs), lambda a, b: a < b, drawn=kind == "by class")

    what = "mean |log(estimate / true distance)|"
    yield Claim(
        "R1a digits: LAFTR-D with all covariances, by class, follows the true distance", PARAMETRIC,
        f"{what} below 0.15", lambda: below("laftr-moments by class", 0.15),
    )  # fmt: skip
    yield Claim(
        "R1b the same: LAFTR with the reference's own ReLU gates, by class", PARAMETRIC,
        f"{what} below 0.1", lambda: below("laftr-relu by class", 0.1),
    )  # fmt: skip
    yield Claim("R1c the same: K-FAC and EWC do not", PARAMETRIC, f"{what}: 0.15 < K-FAC < EWC", rivals)
    for letter, kind in (("d", "pooled"), ("e", "by class")):
        yield Claim(
            f"R1{letter} the same: all covariances beat the formula of the official code, {kind}", OURS,
            f"{what} of LAFTR-D below that of the official formula", functools.partial(official, kind),
        )  # fmt: skip


# -- R4 and R5 ------------------------------------------------------------------------------------------------------


def detection_claims(seeds: Sequence[int]) -> Iterator[Claim]:
    """Experiment R4."""
    part = _part("influence")
    shares = (0.1, 0.2)

    def agreement(name: str) -> Outcome:
        values = [part.mislabelled(seed).agreement(name) for seed in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Outcome(statistics.fmean(values), statistics.fmean(values) >= 0.99, spread, seeds)

    def recall(name: str, share: float) -> float:
        return statistics.fmean(part.mislabelled(seed).recall(name, share) for seed in seeds)

    def recalls(names: Sequence[str], margin: float, drawn: bool = False) -> Outcome:
        found = {name: [recall(name, share) for share in shares] for name in (*names, part.EXACT)}
        told = ", ".join(f"{first:.3f}/{second:.3f} {name}" for name, (first, second) in found.items())
        pairs = [(found[name][i], found[part.EXACT][i]) for name in names for i in range(len(shares))]
        figures = {"detection": _part("figures").detection([part.mislabelled(seed) for seed in seeds])} if drawn else {}
        return Outcome(told, all(abs(ours - exact) <= margin for ours, exact in pairs), seeds=seeds, figures=figures)

    ours = ("laftr-relu by class", "laftr-sample by class")
    what = "the same: share of the wrong labels in the top 10 %/20 %"
    for letter, name in zip("ab", ours, strict=True):
        yield Claim(
            f"R4{letter} digits, 10 % wrong labels: self-influence without the data, {name}", DETECTS,
            "Spearman with scores from the exact Gauss-Newton matrix at least 0.99",
            functools.partial(agreement, name),
        )  # fmt: skip
    yield Claim(
        f"R4c {what}", DETECTS, "both within 0.03 of the exact scores' share", lambda: recalls(ours, 0.03, drawn=True)
    )
    yield Claim(
        "R4d the same: the plain training loss finds as many, no influence needed", OURS,
        "within 0.03 of the exact scores' share", lambda: recalls([part.LOSS], 0.03),
    )  # fmt: skip


def removal_claims(seeds: Sequence[int]) -> Iterator[Claim]:
    """Experiment R5."""
    part = _part("influence")
    ours = "PBRF, laftr-relu"

    def spearman(name: str) -> float:
        return statistics.fmean(part.removed(seed).correlation(name) for seed in seeds)

    def good() -> Outcome:
        values = [part.removed(seed).correlation(ours) for seed in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Outcome(statistics.fmean(values), statistics.fmean(values) >= 0.75, spread, seeds)

    def better() -> Outcome:
        told = ", ".join(f"{spearman(name):.3f} {name}" for name in part.PREDICTIONS)
        figures = {"removal": _part("figures").removal([part.removed(seed) for seed in seeds], part.PREDICTIONS)}
        return Outcome(told, spearman(ours) > spearman(part.DIAGONAL), seeds=seeds, figures=figures)

    what = f"Spearman over {part.REMOVALS} removals, mean test loss"
    yield Claim(
        "R5a diabetes: the PBRF on LAFTR's statistics predicts the PBRF on the data", INFLUENCES,
        f"{what}, at least 0.75", good,
    )  # fmt: skip
    yield Claim(
        "R5b the same: better than influence with a diagonal Gauss-Newton matrix", INFLUENCES,
        f"{what}, above that of the diagonal", better,
    )  # fmt: skip


# -- R2 and R6 ------------------------------------------------------------------------------------------------------


def _at_least(
    benchmark: str, seeds: Sequence[int], ours: Sequence[str], than: str, by: float
) -> Outcome:  # fmt: skip
    """Whether all of ours reach the accuracy of another method plus a margin."""
    part = _part("continual")
    accuracy = {name: part.accuracy(benchmark, name, seeds) for name in (*ours, than)}
    told = ", ".join(f"{value:.3f} {name}" for name, value in accuracy.items())
    holds = all(accuracy[name] >= accuracy[than] + by for name in ours)
    return Outcome(told, holds, seeds=seeds)


def five_task_claims(seeds: Sequence[int], output_dir: Path) -> Iterator[Claim]:
    """Experiment R2."""
    part = _part("continual")
    parametric = ("laftr-sample", "laftr-relu", "laftr-moments")
    at_least = functools.partial(_at_least, "five", seeds)

    def best() -> Outcome:
        rest = [name for name in part.names("five") if name != "exact, all data"]
        first = max(rest, key=lambda name: part.accuracy("five", name, seeds))
        found = at_least(["exact, all data"], first, 0.0)
        write_json(output_dir / "laftr_five_tasks.json", part.table("five", seeds))
        return found

    what = "average accuracy after five tasks"
    rows = (
        ("LAFTR without data forgets far less than EWC", PARAMETRIC, parametric, "EWC", 0.20),
        ("and less than the tangent kernel on 40 stored samples", STORED, parametric, "NTK, 40 stored", 0.10),
        ("and as little as the exact distance on 40 stored samples", STORED,
         ("laftr-relu", "laftr-relu by class"), "exact, 40 stored", -0.02),
        ("all covariances forget less than the formula of the official code", OURS,
         ("laftr-moments",), "official formula", 0.05),
    )  # fmt: skip
    for letter, (claim, paper, ours, than, by) in zip("abcd", rows, strict=True):
        bound = f"that of {than}" + (f" {'+' if by > 0 else '-'} {abs(by):.2f}" if by else "")
        yield Claim(
            f"R2{letter} permuted digits: {claim}" if letter == "a" else f"R2{letter} the same: {claim}", paper,
            f"{what} of {', '.join(ours)} at least {bound}", functools.partial(at_least, ours, than, by),
        )  # fmt: skip
    yield Claim(
        "R2e the same: the exact distance on all data forgets least", "the quantity that is estimated",
        f"{what} at least that of every other method", best,
    )  # fmt: skip


def ten_task_claims(seeds: Sequence[int], output_dir: Path) -> Iterator[Claim]:
    """Experiment R6."""
    part = _part("continual")
    ours = ("laftr-relu by class",)
    at_least = functools.partial(_at_least, "ten", seeds)

    def above_both() -> Outcome:
        found = [at_least(ours, "EWC", 0.20), at_least(ours, "K-FAC", 0.05)]
        told = f"{found[0].ours}, {str(found[1].ours).split(', ')[-1]}"
        return Outcome(told, all(one.passed for one in found), seeds=seeds)

    def merged() -> Outcome:
        name = "the same, merge"
        found, once = at_least([name], "online EWC", 0.0), part.one_task_bytes(name)
        kept = part.learned("ten", name, seeds[0]).nbytes
        results = {benchmark: part.table(benchmark, seeds) for benchmark in part.BENCHMARKS}
        write_json(output_dir / "laftr_ten_tasks.json", results["ten"])
        draw = _part("figures")
        figures = {"memory": draw.memory(results), "matrices": draw.matrices(part, seeds[0])}
        told = f"{found.ours}; {kept:,} bytes, {once:,} after one task"
        return Outcome(told, found.passed and kept == once, seeds=seeds, figures=figures)

    what = "average accuracy after ten tasks"
    yield Claim(
        "R6a ten permuted-digits tasks set the methods apart", OURS,
        f"{what}: the exact distance on all data at least fine-tuning + 0.30",
        lambda: at_least(["exact, all data"], "fine-tuning", 0.30),
    )  # fmt: skip
    yield Claim(
        "R6b the same: LAFTR without data beats EWC and K-FAC", PARAMETRIC,
        f"{what} of LAFTR with ReLU gates, by class, at least EWC + 0.20 and K-FAC + 0.05", above_both,
    )  # fmt: skip
    yield Claim(
        "R6c the same: and keeps up with 40 stored samples per task", STORED,
        f"{what} at least that of the exact distance on them - 0.02",
        lambda: at_least(ours, "exact, 40 stored", -0.02),
    )  # fmt: skip
    yield Claim(
        "R6d the same: one reference for all tasks costs little", OURS,
        f'{what} with consolidate="last" at least that with "all" - 0.05',
        lambda: at_least(["the same, last"], ours[0], -0.05),
    )  # fmt: skip
    yield Claim(
        "R6e the same: memory that does not grow still buys more than online EWC's", OURS,
        f'{what} with consolidate="merge" at least that of online EWC; bytes as after one task', merged,
    )  # fmt: skip
