"""Speed of LAFTR's penalty, and what it keeps of past tasks, against those that store examples or Fisher matrices.

    python benchmarks/laftr.py                 # every row: benchmarks/results/laftr.json
    python benchmarks/laftr.py penalty growth  # rows whose function's name contains a word, prints only

The network is a ReLU network 64-64-64-10 (8,970 parameters), the data are the digits with their pixels permuted in each
task, batches have 32 samples. One thread, CPU seconds of this process, pairs of runs in alternation. Pixels are centred
and scaled as a whole: with grey values from 0 to 1 as they are LAFTR keeps less of the old tasks, by 0.1 to 0.2 in
accuracy, and stored samples as much.

- A penalty's time holds the distance and its gradient. Where it draws inputs there are 40 of them.
- Regularised steps run in one plain loop for all; those named "in its Trainer" and "in its own loop" in a framework's.
- DER, DER++ and FROMP are written here from their papers (``_laftr_rivals.py``); Avalanche comes with ``make bench``.
- Accuracy: five tasks, ten epochs each with Adam at 1e-3. Each method takes the best weight of its grid on a seed that
  is not reported, and the figures are means over three other seeds. Memory is what a method keeps after five tasks, the
  network aside: references of the weights, statistics, samples.

Where no goal was set, it is parity.
"""

import argparse
import contextlib
import copy
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytorch_lightning as pl
import torch
from _laftr_learners import EWC, EXACT, FINETUNE, METHODS, MOMENTS, RELU, RIVALS, Method, chosen_weight, reported
from _laftr_peers import MissingPeerError, avalanche_ewc, avalanche_version
from _laftr_problem import (
    BATCH,
    TASKS,
    Learner,
    Pair,
    Penalized,
    adam,
    batches,
    cnn,
    mlp,
    moved,
    tasks,
    trained,
    training_step,
)
from _laftr_rivals import DER, FROMP
from _turns import fitting
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.benchmark import (
    BenchmarkRow,
    PairedRatio,
    absent_row,
    paired_ratio,
    timed_row,
    value_row,
    write_benchmark,
)
from lightning_ext.callbacks import FunctionSpaceRegularizer
from lightning_ext.nn import FunctionSpaceEstimator, function_space_estimator
from lightning_ext.nn._laftr_ahead import MOST_DRAWS

RESULTS = Path(__file__).parent / "results" / "laftr.json"
DRAWN = 40
STORED = 500
TURN = MOST_DRAWS  # calls at a time: a reference that is taken for many draws at once is part of each turn
Rows = list[BenchmarkRow]


def paired(ours: Callable[[], object], peer: Callable[[], object], calls: int, repeats: int = 41) -> PairedRatio:
    """Of so many calls at a time; times are of one call."""

    def several(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                call()

        return run

    found = paired_ratio(several(ours), several(peer), repeats, clock=time.process_time)
    return PairedRatio(found.ours / calls, found.peer / calls, found.ratio, found.low, found.high, found.repeats)


def milliseconds(timing: PairedRatio) -> str:
    return f"{1e3 * timing.ours:.3f} against {1e3 * timing.peer:.3f} ms"


# -- one penalty -------------------------------------------------------------------------------------------------------


def fitted(name: str, network: Callable[[int], nn.Module] = mlp, **options: object) -> FunctionSpaceEstimator:
    """After the first task, from its training data."""
    return function_space_estimator(name, **options).fit(trained(network), batches(tasks()[0].train))


def gradient(distance: Callable[[nn.Module], Tensor], model: nn.Module) -> Callable[[], object]:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(distance(model), parameters)


def plain_exact(network: Callable[[int], nn.Module] = mlp) -> Callable[[nn.Module], Tensor]:
    """The mean divergence from stored outputs, with nothing around it."""
    x = tasks()[0].train[0][:STORED]
    with torch.no_grad():
        before = trained(network)(x).log_softmax(1)
    return lambda model: kl_div(model(x).log_softmax(1), before, reduction="batchmean", log_target=True)


def penalty() -> Rows:
    """The distance and its gradient, an epoch into the second task."""
    model = moved(trained())
    single = {"class_conditional": False}
    ours = {
        "laftr-relu": fitted("laftr-relu", num_samples=DRAWN, **single).distance,
        "laftr-relu by class": fitted("laftr-relu", num_samples=DRAWN).distance,
        "laftr-sample": fitted("laftr-sample", num_samples=DRAWN, **single).distance,
        "laftr-moments": fitted("laftr-moments", **single).distance,
        "laftr-moments by class": fitted("laftr-moments").distance,
    }
    exact, tangent = f"exact on {STORED} samples", f"tangent kernel on {STORED} samples"
    peers = {
        exact: (plain_exact(), "plain torch"),
        f"our {exact}": (fitted("coreset", size=STORED).distance, "CoresetEstimator"),
        tangent: (fitted("ntk", size=STORED).distance, "NTKEstimator"),
    }
    with torch.no_grad():
        truth = float(fitted("full").distance(model))
        sizes = {name: sum(float(distance(model)) for _ in range(20)) / 20 for name, distance in ours.items()}
    rows = []
    for name, distance in ours.items():
        for peer, (theirs, kind) in peers.items():
            drawn = not name.startswith("laftr-moments")
            timing = paired(gradient(distance, model), gradient(theirs, model), calls=TURN, repeats=11)
            why = f"{milliseconds(timing)}; {sizes[name]:.3f} nats on average, the true distance is {truth:.3f}"
            rows.append(
                timed_row(
                    f"one penalty and its gradient: {name} against {peer}", timing, peer_name=kind,
                    peer_version=None, goal=0.5 if drawn and peer != tangent else 1.0, why=why,
                )
            )  # fmt: skip
    return rows


def width() -> Rows:
    """One penalty of 40 draws and its gradient, against the exact one, as the network widens."""
    rows = []
    for units in (64, 128, 256, 512, 1024):
        network = partial(mlp, units=units)
        model = moved(trained(network))
        ours = fitted("laftr-relu", network, num_samples=DRAWN, class_conditional=False)
        timing = paired(
            gradient(ours.distance, model), gradient(plain_exact(network), model),
            calls=TURN, repeats=11 if units < 512 else 5,
        )  # fmt: skip
        rows.append(
            timed_row(
                f"one penalty and its gradient: laftr-relu, 64-{units}-{units}-10, against exact on {STORED} samples",
                timing, peer_name="plain torch", peer_version=None, goal=0.5, why=milliseconds(timing),
            )
        )  # fmt: skip
    return rows


def statistics() -> Rows:
    """One pass over a task's data in batches of 32, against a pass that computes loss and accuracy of the network."""
    loader = DataLoader(TensorDataset(*tasks()[0].train), BATCH)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> tuple[float, float]:
        loss, right, seen = 0.0, 0, 0
        for x, y in loader:
            outputs = model(x)
            loss += float(cross_entropy(outputs, y, reduction="sum"))
            right += int((outputs.argmax(1) == y).sum())
            seen += len(y)
        return loss / seen, right / seen

    rows = []
    for network, kind in ((mlp, "64-64-64-10"), (cnn, "three convolutions")):
        model = trained(network, 2)
        for name in ("laftr-relu", "laftr-sample"):
            estimator = function_space_estimator(name)
            timing = paired(
                lambda e=estimator, m=model: e.fit(m, loader), partial(evaluate, model), calls=1, repeats=21
            )
            rows.append(
                timed_row(
                    f"statistics of a task, {name} by class, {kind}", timing, peer_name="one evaluation epoch",
                    peer_version=None, goal=1.2, why=milliseconds(timing),
                )
            )  # fmt: skip
    return rows


# -- one step ----------------------------------------------------------------------------------------------------------


def endless(data: Pair, learner: Learner, model: nn.Module) -> Callable[[], None]:
    """Steps on batches of a task, round and round."""
    optimizer, position = adam(model), 0
    parts = [part for part in batches(data, BATCH) if len(part[0]) == BATCH]

    def step() -> None:
        nonlocal position
        training_step(learner, model, optimizer, parts[position % len(parts)])
        position += 1

    return step


def after_a_task(learner: Learner) -> Callable[[], None]:
    """A step of the second task, by a learner that knows the first."""
    model = copy.deepcopy(trained()).train()
    for batch in batches(tasks()[0].train, BATCH):
        learner.loss(model, *batch)  # fills buffers
    learner.end_task(model.eval(), tasks()[0].train)
    return endless(tasks()[1].train, learner, model.train())


def learners() -> dict[str, Callable[[], Learner]]:
    """Ours, by name."""
    return {
        "laftr-relu by class": partial(Penalized, "laftr-relu", 10.0, num_samples=DRAWN),
        "laftr-relu": partial(Penalized, "laftr-relu", 10.0, num_samples=DRAWN, class_conditional=False),
        "laftr-moments": partial(Penalized, "laftr-moments", 10.0, class_conditional=False),
    }


def steps() -> Rows:
    """A regularised step in a plain loop, with one past task."""
    rivals = {"DER": partial(DER, 1.0), "DER++": partial(DER, 1.0, 1.0), "FROMP": partial(FROMP, 1.0)}
    rows = []
    for name, ours in learners().items():
        for rival, theirs in rivals.items():
            timing = paired(after_a_task(ours()), after_a_task(theirs()), calls=TURN, repeats=9)
            rows.append(
                timed_row(
                    f"regularised step: {name} against {rival}", timing, peer_name=f"{rival}, written here",
                    peer_version=None, goal=1.0, why=milliseconds(timing),
                )
            )  # fmt: skip
    return rows


def avalanche_steps() -> Rows:
    """With Avalanche's EWC plugin: in the same plain loop, and each in the loop of its framework."""
    package, version = "avalanche-lib", avalanche_version()
    names = {
        "plain": "regularised step: {} against Avalanche's EWC plugin",
        "framework": "regularised step: {} in its Trainer against Avalanche's EWC in its own loop",
    }
    ours = {"laftr-relu by class": ("laftr-relu", {"num_samples": DRAWN}), "ewc": ("ewc", {})}
    try:
        peer = avalanche_ewc(model := mlp(), adam(model), tasks()[:1], tasks()[1], 1.0)
    except MissingPeerError as error:
        return [
            absent_row(text.format(name), peer_name=package, goal=1.0, why=str(error))
            for text in names.values() for name in ours
        ]  # fmt: skip

    rows = []
    for name, (estimator, options) in ours.items():
        mine = after_a_task(Penalized(estimator, 10.0, **options))
        timing = paired(mine, endless(tasks()[1].train, peer, model), calls=TURN, repeats=9)
        row = {"peer_name": package, "peer_version": version, "goal": 1.0}
        rows.append(timed_row(names["plain"].format(name), timing, why=milliseconds(timing), **row))
    for name, (estimator, options) in ours.items():
        peer = avalanche_ewc(model := mlp(), adam(model), tasks()[:1], tasks()[1], 1.0)
        mine, loader = LitDigits(trained()), DataLoader(TensorDataset(*tasks()[1].train), BATCH, shuffle=True)
        with fitting(mine, loader, remembering(estimator, mine, **options)) as run, peer.running() as theirs:
            timing = paired(partial(run, 1), partial(theirs, 1), calls=TURN, repeats=9)
        why = f"{milliseconds(timing)}, the frameworks' loops included"
        rows.append(timed_row(names["framework"].format(name), timing, why=why, **row))
    return rows


# -- in Lightning ------------------------------------------------------------------------------------------------------


class LitDigits(pl.LightningModule):
    """A copy of a network, with its loss and Adam."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self)


def remembering(
    estimator: str, module: LitDigits, past: int = 1, consolidate: str = "all", **options: object
) -> FunctionSpaceRegularizer:
    """The callback after so many tasks; for the cost of a penalty it is no matter that the weights stayed."""
    callback = FunctionSpaceRegularizer(
        estimator, weight=10.0, fit_at="manual", consolidate=consolidate, estimator_options=options
    )
    for task in tasks(8)[:past]:
        callback.end_task(None, module, batches(task.train))
    return callback


def overhead() -> Rows:
    """A training step in a Trainer, with the callback and without."""
    settings = {
        f"{DRAWN} draws, one past task": {"num_samples": DRAWN},
        "200 draws, one past task": {},
        f"{DRAWN} draws, four past tasks, consolidated": {"num_samples": DRAWN, "past": 4, "consolidate": "last"},
        f"{DRAWN} draws, four past tasks": {"num_samples": DRAWN, "past": 4},
    }
    loader = DataLoader(TensorDataset(*tasks()[1].train), BATCH, shuffle=True)
    rows = []
    for name, options in settings.items():
        mine, plain = LitDigits(trained()), LitDigits(trained())
        with contextlib.ExitStack() as stack:
            ours = stack.enter_context(fitting(mine, loader, remembering("laftr", mine, **options)))
            theirs = stack.enter_context(fitting(plain, loader))
            timing = paired(partial(ours, TURN), partial(theirs, TURN), calls=1, repeats=11)
        rows.append(
            timed_row(
                f"{TURN} training steps in a Trainer with FunctionSpaceRegularizer: {name}", timing,
                peer_name="the same fine-tuning without the callback", peer_version=None, goal=1.5,
                why=milliseconds(timing),
            )
        )  # fmt: skip
    return rows


def growth() -> Rows:
    """A penalty and its gradient, and memory, with one to eight past tasks.

    There is a draw at least for each class of each task: with ``"last"`` eight tasks have 80 of them, one has 40.
    """
    rows = []
    for consolidate, goal in (("all", 8.0), ("last", 1.25), ("merge", 1.25)):
        calls, held = {}, {}
        for past in (1, 2, 4, 8):
            module = LitDigits(trained())
            callback = remembering("laftr-relu", module, past, consolidate, num_samples=DRAWN)
            module.net.load_state_dict(moved(trained()).state_dict())
            calls[past], held[past] = gradient(callback.penalty, module), callback.stats_bytes
        found = {past: paired(calls[past], calls[1], calls=TURN, repeats=7) for past in (2, 4, 8)}
        why = ", ".join(f"{past} tasks {timing.ratio:.2f}" for past, timing in found.items())
        exponent = math.log(found[8].ratio) / math.log(8)
        peer = {"peer_name": "one past task", "peer_version": None}
        rows += [
            timed_row(
                f'penalty with eight past tasks, consolidate="{consolidate}"', found[8], goal=goal, **peer,
                why=f"times one task's: {why}; grows as tasks to the power {exponent:.2f}",
            ),
            value_row(
                f'memory with eight past tasks, consolidate="{consolidate}"', held[8], held[1], unit="bytes",
                goal=1.0 if consolidate == "merge" else 8.0, **peer,
                why=", ".join(f"{past}: {size:,}" for past, size in held.items()),
            ),
        ]  # fmt: skip
    return rows


# -- accuracy ----------------------------------------------------------------------------------------------------------


def summary(method: Method) -> str:
    outcome = reported(method)
    return (
        f"{method.name} (weight {chosen_weight(method):g}): accuracy {outcome.accuracy:.3f}, BWT "
        f"{outcome.transfer:.3f}, {outcome.nbytes:,.0f} bytes, {1e3 * outcome.seconds:.2f} ms per step"
    )


def accuracy() -> Rows:
    """Five tasks of permuted digits: average accuracy at the end, beside memory and time."""
    for method in METHODS:
        progress(f"  {summary(method)}")
    above_ewc = [
        value_row(
            f"average accuracy above EWC's: {method.name}", reported(method).accuracy - reported(EWC).accuracy, 0.2,
            unit="accuracy", peer_name="the margin asked for", peer_version=None, goal=1.0, higher_is_better=True,
            why=f"{summary(method)}; {summary(EWC)}",
        )
        for method in (*RELU, MOMENTS)
    ]  # fmt: skip
    beside = [
        value_row(
            f"average accuracy on {TASKS} tasks: {method.name} against {rival.name}",
            reported(method).accuracy, reported(rival).accuracy, unit="accuracy", peer_name=rival.source,
            peer_version=None, goal=0.98 if rival is EXACT else 1.0, higher_is_better=True,
            why=f"{summary(method)}; {summary(rival)}",
        )
        for method in (RELU[0], MOMENTS)
        for rival in (EXACT, FINETUNE, *RIVALS)
    ]  # fmt: skip
    memory = [
        value_row(
            f"memory after {TASKS} tasks: {method.name} against {rival.name}",
            reported(method).nbytes, reported(rival).nbytes, unit="bytes", peer_name=rival.source, peer_version=None,
            goal=1.0,
        )
        for method in (*RELU, MOMENTS)
        for rival in (EWC, RIVALS[1])
    ]  # fmt: skip
    return [*above_ewc, *beside, *memory]


def progress(line: str) -> None:
    print(f"{time.perf_counter() - STARTED:5.0f} s  {line} ...", file=sys.stderr, flush=True)


STARTED = time.perf_counter()
ROWS = (penalty, width, statistics, steps, avalanche_steps, overhead, growth, accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="run only the rows whose function name contains one of these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows: Rows = []
    for function in ROWS:
        if not options.words or any(word in function.__name__ for word in options.words):
            progress(function.__name__)
            rows += function()
    write_benchmark(rows, RESULTS if not options.words else Path(os.devnull))


if __name__ == "__main__":
    main()
