"""Speed, memory and quality of APO against the optimizers it competes with.

    python benchmarks/apo.py              # every row: benchmarks/results/apo.json and docs/results/apo_wallclock.png
    python benchmarks/apo.py kron memory  # rows whose function's name contains a word, prints only

Speed: the 2.8-million-parameter autoencoder 784-1000-500-250-30 and its mirror, tanh, half the squared error, on digits
enlarged to 28 x 28 in nine places; one thread, CPU seconds of this process, the two methods in turns of ten steps, so
that every turn holds one meta-step of ours and one renewal of a peer's factors. Warm-up is not counted. Learning rates
are small and equal in effect: a step's cost does not depend on them, and a training that stays finite is timed.

Quality: the autoencoder 64-48-24-8 and its mirror on 8 x 8 digits, every method inside a Trainer for the same CPU time,
the best of three learning rates each, around the best of a wider scan with the same seed (for APO-LR: three starts).
SINGD and kfac-pytorch have a damping of 0.1, at which they stay finite. Figures differ by some per cent between runs.

The rows named bf16 keep the factors of both sides in bfloat16: on a CPU with matrix units (AMX) its products are seven
times faster than float32's, elsewhere they may be slower.

The peers come with ``make bench``, but for kfac-pytorch (gpauloski/kfac-pytorch, version 0.4.2), which is not on the
package index: installed by hand into ``.venv-bench`` its rows run, otherwise they say that it is missing.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _apo_peers import (
    ASDL_KFAC,
    EKFAC,
    EKFAC_AFTER,
    EKFAC_HALF,
    EKFAC_HALF_AFTER,
    EVERY,
    KFAC_PYTORCH,
    KFAC_PYTORCH_HALF,
    KRON,
    KRON_AFTER,
    KRON_HALF,
    KRON_HALF_AFTER,
    SINGD_DENSE,
    SINGD_HALF,
    WIDE,
    LitAutoencoder,
    MissingPeerError,
    Preconditioned,
    autoencoder,
    cycling,
    loader,
    package_version,
    prodigy_optimizer,
    wide_images,
)
from _apo_quality import METHODS, Curve, draw, train
from _turns import fitting

from lightning_ext.benchmark import (
    BenchmarkRow,
    absent_row,
    paired_ratio,
    timed_row,
    value_row,
    write_benchmark,
)
from lightning_ext.callbacks import APOLearningRate

RESULTS = Path(__file__).parent / "results" / "apo.json"
PICTURE = Path(__file__).parents[1] / "docs" / "results" / "apo_wallclock.png"
PLAIN = "the same Adam without the callback"
SECONDS = 4.0
SETTINGS = ((100, 1.0), (1000, 1.0), (1000, 0.25))  # batch, and the part of it on which a look-ahead takes the loss
Rows = list[BenchmarkRow]


def adam(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=1e-4)


def rates(loss_fraction: float = 1.0) -> APOLearningRate:
    """K = 10 from the start: the warm phase, in which every step is followed by a meta-step, is not timed."""
    return APOLearningRate(every_n_steps=EVERY, warmup_steps=0, loss_fraction=loss_fraction)


def rate_turns(
    batch: int, fraction: float, peer: Callable[[torch.nn.Module], torch.optim.Optimizer], name: str, **row: object
):
    name = name.format(batch if fraction == 1 else f"{batch}, loss on a quarter")
    images = wide_images()
    try:
        peer(autoencoder((2, 1)))
    except MissingPeerError as error:
        return absent_row(name, peer_name=row["peer_name"], goal=row["goal"], why=str(error))
    ours, theirs = (LitAutoencoder(autoencoder(WIDE), make) for make in (adam, peer))
    with contextlib.ExitStack() as stack:
        run_ours = stack.enter_context(fitting(ours, loader(images, batch), rates(fraction)))
        run_theirs = stack.enter_context(fitting(theirs, loader(images, batch)))
        timing = paired_ratio(
            lambda: run_ours(EVERY), lambda: run_theirs(EVERY),
            repeats=13 if batch < 1000 else 5, warmup=1, clock=time.process_time,
        )  # fmt: skip
    why = f"{1000 * timing.ours / EVERY:.1f} against {1000 * timing.peer / EVERY:.1f} ms per step, both in a Trainer"
    return timed_row(name, timing, why=why, **row)


def learning_rate_step() -> Rows:
    return [
        rate_turns(
            batch, fraction, adam, "APO-LR K=10 on Adam, batch {}: ten steps",
            peer_name=PLAIN, peer_version=None, goal=1.15,
        )
        for batch, fraction in SETTINGS
    ]  # fmt: skip


def learning_rate_prodigy() -> Rows:
    return [
        rate_turns(
            batch, fraction, prodigy_optimizer, "APO-LR K=10 on Adam, batch {}: ten steps against Prodigy",
            peer_name="prodigyopt", peer_version=package_version("prodigyopt"), goal=1.05,
        )
        for batch, fraction in SETTINGS
    ]  # fmt: skip


def preconditioner_turns(ours: Preconditioned, peer: Preconditioned, batch: int) -> BenchmarkRow:
    name = f"{ours.name} K=10, batch {batch}: ten steps against {peer.name}"
    progress(f"  {name}")
    images = wide_images()
    try:
        run_ours, run_peer = (cycling(images, batch, m.make(autoencoder(WIDE))) for m in (ours, peer))
        run_peer(1)
    except MissingPeerError as error:
        return absent_row(name, peer_name=peer.name, goal=1.0, why=str(error))
    run_peer(EVERY)
    run_ours(1 + EVERY)
    timing = paired_ratio(
        lambda: run_ours(EVERY), lambda: run_peer(EVERY),
        repeats=4, warmup=0, clock=time.process_time,
    )  # fmt: skip
    why = f"{1000 * timing.ours / EVERY:.0f} against {1000 * timing.peer / EVERY:.0f} ms per step, plain loops"
    return timed_row(name, timing, peer_name=peer.name, peer_version=peer.version(), goal=1.0, why=why)


def kron_single() -> Rows:
    """Everything in float32."""
    rows = [preconditioner_turns(KRON, peer, batch) for peer in (KFAC_PYTORCH, ASDL_KFAC) for batch in (1000, 100)]
    return rows + [preconditioner_turns(KRON_AFTER, peer, 1000) for peer in (KFAC_PYTORCH, ASDL_KFAC)]


def kron_half() -> Rows:
    """Factors in bfloat16, which ASDL does not have: Cholesky factors cannot be had in it."""
    peers = (KFAC_PYTORCH_HALF, ASDL_KFAC)
    rows = [preconditioner_turns(KRON_HALF, peer, batch) for peer in peers for batch in (1000, 100)]
    return rows + [preconditioner_turns(KRON_HALF_AFTER, peer, 1000) for peer in peers]


def ekfac() -> Rows:
    """In float32, and with the factors of both in bfloat16."""
    pairs = ((EKFAC, SINGD_DENSE), (EKFAC_HALF, SINGD_HALF))
    rows = [preconditioner_turns(ours, peer, batch) for ours, peer in pairs for batch in (1000, 100)]
    after = ((EKFAC_AFTER, SINGD_DENSE), (EKFAC_HALF_AFTER, SINGD_HALF), (EKFAC_HALF_AFTER, SINGD_DENSE))
    return rows + [preconditioner_turns(ours, peer, 1000) for ours, peer in after]


def high_water() -> float:
    """Peak MiB of this process. Not ru_maxrss: a child process starts with the peak of its parent there."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def extra_memory(run: Callable[[int], None], net: torch.nn.Module, images: torch.Tensor) -> float:
    """Peak MiB of eleven steps, two of them with a meta-step, beyond the peak of plain gradients on the same batch."""
    for _ in range(2):
        (0.5 * (net(images) - images).square().sum(1).mean()).backward()
    net.zero_grad()
    before = high_water()
    run(EVERY + 1)
    return high_water() - before


def trainer_memory(make: Callable, callbacks: Callable[[], list], images: torch.Tensor, batch: int) -> float:
    net = autoencoder(WIDE)

    def run(steps: int) -> None:
        with fitting(LitAutoencoder(net, make), loader(images, batch), *callbacks()) as go:
            go(steps)

    return extra_memory(run, net, images[:batch])


def loop_memory(method: Preconditioned, images: torch.Tensor, batch: int) -> float:
    net = autoencoder(WIDE)
    return extra_memory(lambda steps: cycling(images, batch, method.make(net))(steps), net, images[:batch])


MEMORY = {
    "APO-LR on Adam": partial(trainer_memory, adam, lambda: [rates()]),
    "Adam": partial(trainer_memory, adam, list),
    "prodigyopt": partial(trainer_memory, prodigy_optimizer, list),
    **{
        m.name: partial(loop_memory, m)
        for m in (KRON, KRON_HALF, EKFAC, KFAC_PYTORCH, KFAC_PYTORCH_HALF, ASDL_KFAC, SINGD_DENSE)
    },
}


def memory() -> Rows:
    """Beyond weights, gradients and activations, each method in a process of its own; no goal is set but parity."""

    def peak(method: str) -> float | str:
        command = [sys.executable, __file__, "--peak", method]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    peaks = {method: peak(method) for method in MEMORY}
    pairs = (
        ("APO-LR on Adam", "Adam", None), ("APO-LR on Adam", "prodigyopt", "prodigyopt"),
        (KRON.name, KFAC_PYTORCH.name, KFAC_PYTORCH.package), (KRON.name, ASDL_KFAC.name, ASDL_KFAC.package),
        (KRON_HALF.name, KFAC_PYTORCH_HALF.name, KFAC_PYTORCH_HALF.package),
        (EKFAC.name, SINGD_DENSE.name, SINGD_DENSE.package),
    )  # fmt: skip
    rows = []
    for ours, peer, package in pairs:
        name = f"{ours}, batch 1000: extra memory against {peer}"
        if isinstance(peaks[peer], str):
            rows.append(absent_row(name, peer_name=peer, goal=1.0, why=peaks[peer], unit="MiB"))
            continue
        rows.append(
            value_row(
                name, peaks[ours], peaks[peer], unit="MiB", peer_name=peer,
                peer_version=package and package_version(package), goal=1.0,
                why="peak beyond weights, gradients and activations (11 MiB is one copy of the weights)",
            )
        )  # fmt: skip
    return rows


def print_peak(method: str) -> None:
    try:
        print(json.dumps(MEMORY[method](wide_images(), 1000)))
    except MissingPeerError as error:
        print(json.dumps(str(error)))


def quality() -> Rows:
    """Draws every method; the rows are for the preconditioner and for the learning rate that finds itself."""
    best: dict[str, Curve] = {}
    tried: dict[str, str] = {}
    missing: dict[str, str] = {}
    for method in METHODS:
        progress(f"  {method.name}")
        try:
            curves = [train(method, lr, SECONDS) for lr in method.rates]
        except MissingPeerError as error:
            missing[method.name] = str(error)
            continue
        best[method.name] = min(curves, key=lambda curve: curve.final)
        tried[method.name] = ", ".join(f"{curve.final:.3f} with lr {curve.lr:g}" for curve in curves)
    draw(list(best.values()), PICTURE)
    rows = []
    for ours in ("APO-P kron", "APO-P kron, applied after", "APO-LR on Adam", "APO-LR on Adam, quarter"):
        for peer in (method for method in METHODS if not method.ours):
            name = f"{ours}: loss after {SECONDS:g} CPU seconds against {peer.name}"
            if peer.name in missing:
                rows.append(absent_row(name, peer_name=peer.name, goal=1.0, why=missing[peer.name], unit="loss"))
                continue
            rows.append(
                value_row(
                    name, best[ours].final, best[peer.name].final, unit="loss", peer_name=peer.name,
                    peer_version=package_version(peer.package), goal=1.0,
                    why=f"ours {tried[ours]}; theirs {tried[peer.name]}; one seed",
                )
            )  # fmt: skip
    return rows


def progress(line: str) -> None:
    print(f"{time.perf_counter() - STARTED:5.0f} s  {line} ...", file=sys.stderr, flush=True)


STARTED = time.perf_counter()
ROWS = (
    learning_rate_step, learning_rate_prodigy, kron_single, kron_half, ekfac, memory, quality,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="run only the rows whose function name contains one of these")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if options.peak:
        return print_peak(options.peak)
    rows: Rows = []
    for function in ROWS:
        if not options.words or any(word in function.__name__ for word in options.words):
            progress(function.__name__)
            rows += function()
    write_benchmark(rows, RESULTS if not options.words else Path(os.devnull))
    return None


if __name__ == "__main__":
    main()
