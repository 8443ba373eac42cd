"""Speed, memory and truth of influence scores against the packages that compute them.

    python benchmarks/influence.py              # every row: benchmarks/results/influence.json
    python benchmarks/influence.py exact growth  # rows whose function's name contains a word, prints only

The question: 100 queries by 1,000 training digits on a trained tanh network 64-128-128-10 (26,122 parameters), damping
0.01. A method's time holds everything from the trained network to the matrix of scores: data loading, fitting,
gradients, solving. One thread, CPU seconds of this process; rows with a spread are pairs of runs in alternation, the
others one run in a process of its own, which also measures peak memory. What a package imports late is imported before.

"Correlation" is Pearson's between a method's scores of the 1,000 samples and the exact damped Gauss-Newton influence
(conjugate gradients to 1e-8 in float64, written here in plain torch.func), averaged over the queries. A peer that needs
more than 60 CPU seconds (240 with five million parameters), or fails, has a row that says so.

The peers come with ``make bench``.
"""

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _influence_peers import (
    ARNOLDI,
    CURVLINOPS,
    DATTRI_CG,
    DATTRI_EKFAC,
    KRONFLUENCE,
    PEERS,
    PYDVL_CG,
    PYDVL_EKFAC,
    PYDVL_NYSTROM,
    TRACIN,
    Method,
    MissingPeerError,
)
from _influence_problem import (
    DAMPING,
    MLP,
    Pair,
    Problem,
    cnn,
    correlation,
    digits_problem,
    exact_scores,
    exponent,
    loader,
    mlp,
    samples,
    small_problem,
)
from torch import Tensor, nn

from lightning_ext.benchmark import (
    BenchmarkRow,
    absent_row,
    paired_ratio,
    timed_row,
    value_row,
    write_benchmark,
)
from lightning_ext.functional import GGNOperator, InfluenceObjective, SampleGradients
from lightning_ext.modules import InfluenceModule

RESULTS = Path(__file__).parent / "results" / "influence.json"
LIMIT = 60  # CPU seconds
BIG = (64, 2048, 2048, 512, 10)
EXACT, THEORY = "the exact answer", "theory"
Rows = list[BenchmarkRow]


def ours(problem: Problem, solver: str) -> Tensor:
    """Times N: the peers leave it out."""
    module = InfluenceModule(problem.model, queries=loader(problem.queries), solver=solver, damping=DAMPING)
    return module.scores(loader(problem.train)) * len(problem.train[0])


def factored_dot(problem: Problem) -> Tensor:
    """Inner products of gradients that are never written out; what there is below the module."""
    objective = InfluenceObjective()
    measurements = SampleGradients(problem.model, objective, quantity="measurement")
    losses = SampleGradients(problem.model, objective)
    queries = [measurements(batch) for batch in loader(problem.queries)]
    columns = [[rows.dot(gradients) for rows in queries] for gradients in map(losses, loader(problem.train))]
    return torch.cat([torch.cat(column) for column in columns], 1)


BLOCK_CG, EKFAC, NYSTROM, IDENTITY = (
    Method(name, None, partial(ours, solver=solver))
    for name, solver in (
        ("block CG", "block_cg"), ("EK-FAC", "ekfac"), ("Nystrom", "nystrom"), ("gradient dot", "identity"),
    )
)  # fmt: skip
FACTORED = Method("gradient dot of factors", None, factored_dot)
METHODS = {method.name: method for method in (BLOCK_CG, EKFAC, NYSTROM, IDENTITY, FACTORED, *PEERS)}


@cache
def reference() -> Tensor:
    return exact_scores(digits_problem())


def paired(mine: Method, peer: Method, *, goal: float, repeats: int) -> Rows:
    """Time and truth of two methods on the same question."""
    name = f"{mine.name} against {peer.name}"
    problem, found = digits_problem(), {}
    try:
        for method in (mine, peer):
            method.scores(small_problem())
            found[method] = correlation(method.scores(problem), reference())
    except MissingPeerError as error:
        return [absent_row(name, peer_name=peer.name, goal=goal, why=str(error))]
    timing = paired_ratio(
        lambda: mine.scores(problem), lambda: peer.scores(problem), repeats, warmup=0, clock=time.process_time
    )
    why = f"correlation with the exact answer {found[mine]:.4f} against {found[peer]:.4f}"
    rows = [timed_row(name, timing, peer_name=peer.name, peer_version=peer.version(), goal=goal, why=why)]
    if mine is not BLOCK_CG:
        return rows
    exact = value_row(
        f"{mine.name}: correlation", found[mine], 1.0, unit="correlation", peer_name=EXACT, peer_version=None,
        goal=0.999, higher_is_better=True,
    )  # fmt: skip
    return [*rows, exact]


def exact() -> Rows:
    """The exact answer to a tolerance in the time of the peer's approximation."""
    return paired(BLOCK_CG, KRONFLUENCE, goal=1.0, repeats=5)


def ekfac() -> Rows:
    """The same approximation."""
    return paired(EKFAC, KRONFLUENCE, goal=0.25, repeats=5)


def gradient_dot() -> Rows:
    """One checkpoint: inner products of gradients."""
    return [row for mine in (IDENTITY, FACTORED) for row in paired(mine, TRACIN, goal=0.1, repeats=21)]


def product_rows(name: str, model: nn.Module, data: Pair) -> Rows:
    """After 17 products, by when ours has linearised; theirs does so in each product. For 16 vectors, only parity."""
    names = {1: f"Gauss-Newton product, {name}", 16: f"Gauss-Newton product, {name}, 16 vectors"}
    try:
        from curvlinops import GGNLinearOperator
    except ImportError as error:
        why = f"{error}; `make bench` installs it"
        return [absent_row(name, peer_name="curvlinops", goal=0.4, why=why) for name in names.values()]
    theirs = GGNLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [data], check_deterministic=False
    )
    operator = GGNOperator(model, InfluenceObjective(), [data])
    rows = []
    for vectors, row_name in names.items():
        block = torch.randn(vectors, operator.size, generator=torch.Generator().manual_seed(0))
        column = block.mT.contiguous()
        difference = (operator(block) - (theirs @ column).mT).norm() / operator(block).norm()
        timing = paired_ratio(
            lambda block=block: operator(block), lambda column=column: theirs @ column,
            repeats=31 if vectors == 1 else 5, warmup=17 if vectors == 1 else 1, clock=time.process_time,
        )  # fmt: skip
        rows.append(
            timed_row(
                row_name, timing, peer_name="curvlinops GGN", peer_version=CURVLINOPS.version(),
                goal=0.4 if vectors == 1 else 1.0,
                why=f"{1000 * timing.ours:.1f} against {1000 * timing.peer:.1f} ms; they differ by {difference:.0e}",
            )
        )  # fmt: skip
    return rows


def products() -> Rows:
    torch.manual_seed(0)
    images, labels = samples(0, 256)
    images = nn.functional.interpolate(images.view(-1, 1, 8, 8), size=(28, 28), mode="bilinear")
    convolution = product_rows("CNN 9,098, N = 256", cnn().eval(), (images, labels))
    return product_rows("MLP 26,122, N = 1,000", digits_problem().model, digits_problem().train) + convolution


# -- one run in a process of its own: seconds, peak memory, scores -----------------------------------------------------


def high_water() -> float:
    """Peak MiB of this process. Not ru_maxrss: a child process starts with the peak of its parent there."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def run_alone(name: str, folder: Path) -> None:
    """What ``--alone`` does: print the figures of one method on the problem in ``folder``."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {limit:g} CPU seconds")

    problem = torch.load(folder / "problem.pt", weights_only=False)
    limit = LIMIT if problem.parameters < 100_000 else 4 * LIMIT
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        METHODS[name].scores(small_problem())
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = high_water(), time.process_time()
        scores = METHODS[name].scores(problem)
        figures = {"seconds": time.process_time() - start, "MiB": high_water() - before}
        torch.save(scores.detach(), folder / "scores.pt")
    except Exception as error:  # whatever stops a peer is what its row says
        figures = {"why": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(figures))


@cache
def alone(name: str, widths: tuple[int, ...] = MLP, queries: int = 100) -> dict:
    """Seconds, peak MiB beyond what imports and the problem take, and correlation; or why there are none."""
    progress(f"  {name}")
    if widths == MLP:
        problem = digits_problem(queries=queries)
    else:  # whether it is trained makes no difference to the cost
        torch.manual_seed(0)
        problem = Problem(mlp(widths).eval(), samples(0, 1000), samples(1000, queries))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(problem, Path(folder) / "problem.pt")
        command = [sys.executable, __file__, "--alone", name, "--folder", folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            return {"why": f"its process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}
        figures = json.loads(done.stdout.splitlines()[-1])
        if widths == MLP and "why" not in figures:
            figures["correlation"] = correlation(torch.load(Path(folder) / "scores.pt"), reference())
    return figures


def alone_row(mine: Method, peer: Method, unit: str, name: str, **question: object) -> BenchmarkRow:
    key = "seconds" if unit == "s" else unit
    figures, theirs = alone(mine.name, **question), alone(peer.name, **question)
    missing = [f"{method.name}: {run['why']}" for method, run in ((mine, figures), (peer, theirs)) if "why" in run]
    if missing:
        why = "; ".join(missing) + ("" if "why" in figures else f"; ours took {figures[key]:.3g} {unit}")
        return absent_row(name, peer_name=peer.name, goal=1.0, why=why, unit=unit)
    why = ""
    if "correlation" in figures:
        why = f"correlation with the exact answer {figures['correlation']:.4f} against {theirs['correlation']:.4f}"
    return value_row(
        name, figures[key], theirs[key], unit=unit, peer_name=peer.name, peer_version=peer.version(), goal=1.0, why=why
    )


PAIRS = (
    (BLOCK_CG, KRONFLUENCE), (EKFAC, KRONFLUENCE), (IDENTITY, TRACIN),
    (EKFAC, CURVLINOPS), (EKFAC, PYDVL_EKFAC), (EKFAC, DATTRI_EKFAC),
    (NYSTROM, PYDVL_NYSTROM), (BLOCK_CG, PYDVL_CG), (BLOCK_CG, DATTRI_CG), (BLOCK_CG, ARNOLDI),
)  # fmt: skip


def other_peers() -> Rows:
    """No goal is set but parity."""
    pairs = [(mine, peer) for mine, peer in PAIRS if peer not in (KRONFLUENCE, TRACIN)]
    return [alone_row(mine, peer, "s", f"{mine.name} against {peer.name}: time") for mine, peer in pairs]


def memory() -> Rows:
    """Peak beyond imports, the network and the data; no goal is set but parity."""
    return [alone_row(mine, peer, "MiB", f"{mine.name} against {peer.name}: peak memory") for mine, peer in PAIRS]


def large() -> Rows:
    """Five million parameters: what EK-FAC takes where no matrix and no block of many rows fits."""
    name = f"EK-FAC, 5,383,690 parameters, 20 queries x 1,000 samples, against {KRONFLUENCE.name}"
    question = {"widths": BIG, "queries": 20}
    return [
        alone_row(EKFAC, KRONFLUENCE, unit, f"{name}: {what}", **question)
        for unit, what in (("s", "time"), ("MiB", "peak memory"))
    ]


# -- how time grows ----------------------------------------------------------------------------------------------------


def seconds(method: Method, problem: Problem) -> float:
    """The lesser of two: what is in the way only adds."""
    times = []
    for _ in range(2):
        start = time.process_time()
        method.scores(problem)
        times.append(time.process_time() - start)
    return min(times)


QUESTIONS: dict[str, tuple[dict[float, Callable[[], Problem]], dict[Method, float]]] = {
    "queries": ({n: partial(digits_problem, queries=n) for n in (100, 200, 400)}, {BLOCK_CG: 1, EKFAC: 1}),
    "training samples": ({n: partial(digits_problem, train=n) for n in (1000, 2000, 4000)}, {BLOCK_CG: 1, EKFAC: 1}),
    "width": ({n: partial(digits_problem, (64, n, n, 10)) for n in (64, 128, 256)}, {BLOCK_CG: 2, EKFAC: 3}),
}  # the exponents of theory: parameters grow with the square of the width, eigenvectors cost its cube


def growth() -> Rows:
    """Least-squares slopes over two doublings, against the exponent of theory for large problems."""
    rows = []
    for what, (problems, exponents) in QUESTIONS.items():
        for method, theory in exponents.items():
            progress(f"  {method.name}, {what}")
            times = [seconds(method, problem()) for problem in problems.values()]
            why = ", ".join(f"{size:,}: {spent:.2f} s" for size, spent in zip(problems, times, strict=True))
            rows.append(
                value_row(
                    f"{method.name}: exponent of time in {what}", exponent(list(problems), times), theory,
                    unit="exponent", peer_name=THEORY, peer_version=None, goal=1.2, why=why,
                )
            )  # fmt: skip
    return rows


def progress(line: str) -> None:
    print(f"{time.perf_counter() - STARTED:5.0f} s  {line} ...", file=sys.stderr, flush=True)


STARTED = time.perf_counter()
ROWS = (exact, ekfac, gradient_dot, products, other_peers, memory, large, growth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="run only the rows whose function name contains one of these")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.alone:
        return run_alone(options.alone, options.folder)
    rows: Rows = []
    for function in ROWS:
        if not options.words or any(word in function.__name__ for word in options.words):
            progress(function.__name__)
            rows += function()
    write_benchmark(rows, RESULTS if not options.words else Path(os.devnull))
    return None


if __name__ == "__main__":
    main()
