"""Speed of the sampler behind the mutual-information bounds, and what a nat of the sandwich costs.

    BDMC=/path/to/BDMC python benchmarks/mutual_information.py  # every row: benchmarks/results/mutual_information.json
    python benchmarks/mutual_information.py gap                 # rows whose function contains a word, prints only

The decoder is 10-64-128-64 with tanh units. One thread, CPU seconds of this process, pairs of runs in alternation.

- BDMC (github.com/lxuechen/BDMC, MIT) is on no package index: ``BDMC`` names the folder that it was cloned to. Its
  forward chains run as they are, without their progress bar, on as many intervals as ours have transitions.
- torch-mist's critics have as many weights as ours; a joint one looks at all B by B pairs.
- The gap is the upper less the lower bound of a VAE of the digits (Gaussian pixels, 100 epochs), on 64 pairs that it
  simulates. One learns the variance of its pixels (64-128-128-10 tanh networks); of the others it is set: with 0.03
  the latents carry few enough nats for importance weighting, with 0.01 not. For importance weighting a gradient counts
  as three evaluations of the decoder.
"""

import argparse
import contextlib
import functools
import io
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.benchmark import BenchmarkRow, absent_row, paired_ratio, timed_row, value_row, write_benchmark
from lightning_ext.data import DigitsDataModule
from lightning_ext.functional import ais_forward, hmc_kernel, linear_schedule
from lightning_ext.modules import BetaVAE, CriticModule, SigmaVAE, measure_mutual_information
from lightning_ext.nn import (
    MLP,
    BernoulliDecoderModel,
    ConcatenatedCritic,
    MLPDecoder,
    MLPEncoder,
    SeparableCritic,
    latent_model_from_vae,
)

RESULTS = Path(__file__).parent / "results" / "mutual_information.json"
LATENTS, LEAPFROG = 10, 10
VARIANCES = (None, 0.03, 0.01)  # of the pixels: learned; about 7 and 15 nats
CHAINS, POINTS, PAIRS = 8, 64, 64
WIDTH, BATCH = 5, 128  # of x and of z, and pairs for critics
GRADIENT_COST = 3  # evaluations of the decoder: one forward, and a backward pass of about two
Rows = list[BenchmarkRow]


def progress(text: str) -> None:
    print(f"{time.process_time():5.0f} s  {text} ...", file=sys.stderr, flush=True)


# -- one transition ----------------------------------------------------------------------------------------------------


def decoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(LATENTS, 64), nn.Tanh(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)
    ).requires_grad_(True)  # fmt: skip


def bdmc_chains(network: nn.Module, x: Tensor, intervals: int) -> Callable[[], object]:
    """Its forward chains on Bernoulli data, without the bar."""
    folder = os.environ.get("BDMC")
    if folder is None:
        raise ModuleNotFoundError("clone github.com/lxuechen/BDMC and name its folder in BDMC=")
    sys.path.insert(0, folder)
    try:
        import ais as peer
    finally:
        sys.path.remove(folder)
    peer.tqdm = lambda pairs: pairs

    class Model:
        latent_dim = LATENTS
        decode = staticmethod(network)

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            schedule = linear_schedule(intervals).float().tolist()
            peer.ais_trajectory(Model, [(x, None)], forward=True, schedule=schedule, n_sample=CHAINS)

    return run


def transition() -> Rows:
    """Forward chains of both on the same network, data and number of transitions and leapfrog steps."""
    transitions, name = 10, f"one transition: L = {LEAPFROG}, {CHAINS} chains of {POINTS} data points"
    network = decoder()
    model = BernoulliDecoderModel(network, LATENTS)
    x, _ = model.simulate(POINTS)
    path, betas = model.path(x), linear_schedule(transitions + 1)
    kernel = hmc_kernel(path, torch.full((transitions + 1,), 0.05), LEAPFROG)
    peer = {"peer_name": "lxuechen/BDMC", "goal": 2 / 3}
    try:
        theirs = bdmc_chains(network, x, transitions)
    except ModuleNotFoundError as error:
        return [absent_row(name, why=str(error), **peer)]
    timing = paired_ratio(
        lambda: ais_forward(path, model.sample_prior(CHAINS * POINTS).view(CHAINS, POINTS, -1), betas, kernel),
        theirs, 41, clock=time.process_time,
    )  # fmt: skip
    each = f"{1e3 * timing.ours / transitions:.1f} against {1e3 * timing.peer / transitions:.1f} ms a transition"
    return [timed_row(name, timing, peer_version=None, why=each, **peer)]


# -- the sandwich ------------------------------------------------------------------------------------------------------


def tanh(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, outputs)
    )  # fmt: skip


@functools.cache
def digits_vae(variance: float | None) -> Any:
    """A VAE of the digits with Gaussian pixels."""
    pl.seed_everything(0, verbose=False)
    if variance is None:
        vae: Any = SigmaVAE(tanh(64, 2 * LATENTS), tanh(LATENTS, 64), input_shape=[64], lr=3e-3)
    else:
        nets = MLPEncoder([64], [128, 64], LATENTS), MLPDecoder(LATENTS, [64, 128], [64])
        vae = BetaVAE(*nets, input_shape=[64], distortion="gaussian", beta=variance, lr=3e-3)
    trainer = pl.Trainer(
        max_epochs=100, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(vae, DigitsDataModule(binarize=False, seed=0))
    return latent_model_from_vae(vae.eval())


@functools.cache
def sandwich(variance: float | None, bound: str, **options: Any) -> tuple[dict[str, float], float]:
    """The values, and CPU seconds."""
    model, start = digits_vae(variance), time.process_time()
    found = measure_mutual_information(model, bounds=[bound], num_points=PAIRS, seed=1, **options)
    return {name: value.item() for name, value in found.values.items()}, time.process_time() - start


def told(values: dict[str, float], bound: str, seconds: float) -> str:
    return f"{values[f'{bound}/lower']:.2f} to {values[f'{bound}/upper']:.2f} nats in {seconds:.0f} s"


def gap() -> Rows:
    """Annealed chains against importance samples, from the prior and from the encoder, for as many gradients."""
    steps = 200
    samples = GRADIENT_COST * 2 * CHAINS * (steps - 1) * LEAPFROG
    rows = []
    for variance in VARIANCES:
        annealed, seconds = sandwich(variance, "ais", num_chains=CHAINS, num_steps=steps, num_leapfrog=LEAPFROG)
        for proposal, start in (("prior", "the prior"), ("model", "the encoder")):
            weighted, spent = sandwich(variance, "iwae", num_samples=samples, proposal=proposal)
            rows.append(
                value_row(
                    f"gap of annealed chains (T = {steps}, K = {CHAINS}) against {samples:,} samples from {start}, "
                    + ("pixel variance learned" if variance is None else f"pixel variance {variance:g}"),
                    annealed["ais/gap"], weighted["iwae/gap"], unit="nats", peer_name="importance weighting (IWAE)",
                    peer_version=None, goal=0.5,
                    why=f"{told(annealed, 'ais', seconds)}, against {told(weighted, 'iwae', spent)}",
                )
            )  # fmt: skip
    return rows


def growth() -> Rows:
    """How the gap falls with the number of temperatures: as 1 / T in theory, with perfect transitions."""
    schedule = (50, 100, 200, 400)
    found = {
        steps: sandwich(VARIANCES[-1], "ais", num_chains=CHAINS, num_steps=steps, num_leapfrog=LEAPFROG)
        for steps in schedule
    }
    gaps = {steps: values["ais/gap"] for steps, (values, _) in found.items()}
    exponent = math.log(gaps[schedule[0]] / gaps[schedule[-1]]) / math.log(schedule[-1] / schedule[0])
    why = ", ".join(f"T = {steps}: {gaps[steps]:.3f} nats, {found[steps][1]:.0f} s" for steps in schedule)
    return [
        value_row(
            "the gap falls as the number of temperatures to the power", exponent, 1.0, unit="exponent",
            peer_name="theory", peer_version=None, goal=0.8, higher_is_better=True, why=why,
        )
    ]  # fmt: skip


# -- critics -----------------------------------------------------------------------------------------------------------


def mist(critic: str) -> Any:
    from torch_mist.estimators import infonce

    torch.manual_seed(0)
    return infonce(x_dim=WIDTH, y_dim=WIDTH, hidden_dims=[64, 64], critic_type=critic)


def critic_module(critic: str) -> CriticModule:
    """As many weights as in torch-mist's."""
    torch.manual_seed(0)
    if critic == "joint":
        return CriticModule(ConcatenatedCritic(WIDTH, WIDTH, [64, 64], "relu"))
    return CriticModule(SeparableCritic(MLP([WIDTH, 64, 64]), MLP([WIDTH, 64, 64])))


def steps(loss: Callable[[Tensor, Tensor], Tensor], parameters: Any, batches: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for x, z in batches:
        optimizer.zero_grad()
        loss(x, z).backward()
        optimizer.step()


def critic_step() -> Rows:
    """InfoNCE with all pairs of a batch, Adam, two hidden layers of 64 units, in a plain loop."""
    batches = [correlated_pairs(BATCH, seed) for seed in range(16)]  # torch-mist remembers the batch before
    rows = []
    for critic in ("separable", "joint"):
        name = f"InfoNCE step, B = {BATCH}, {critic} critic" + (", torch-mist's default" if critic[0] == "s" else "")
        peer = {"peer_name": "torch-mist", "goal": 1 / 3}
        try:
            theirs, ours = mist(critic), critic_module(critic)
        except ModuleNotFoundError as error:
            rows.append(absent_row(name, why=str(error), **peer))
            continue
        timing = paired_ratio(
            functools.partial(steps, ours.loss, list(ours.parameters()), batches),
            functools.partial(steps, theirs.loss, list(theirs.parameters()), batches),
            21, clock=time.process_time,
        )  # fmt: skip
        each = f"{1e3 * timing.ours / len(batches):.2f} against {1e3 * timing.peer / len(batches):.2f} ms a step"
        rows.append(timed_row(name, timing, peer_version=version("torch-mist"), why=each, **peer))
    return rows


def critic_training() -> Rows:
    """The same trained by a Trainer, and by torch-mist's own loop."""
    x, z = correlated_pairs(BATCH * 100, 0)
    name, peer = (
        f"InfoNCE training, 100 steps of B = {BATCH}, separable critic",
        {"peer_name": "torch-mist", "goal": 1.0},
    )
    try:
        from torch_mist.utils.train import train_mi_estimator
    except ModuleNotFoundError as error:
        return [absent_row(name, why=str(error), **peer)]

    def ours() -> None:
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(critic_module("separable"), DataLoader(TensorDataset(x, z), BATCH, shuffle=True))

    def theirs() -> None:
        train_mi_estimator(
            mist("separable"), (x, z), valid_percentage=0, batch_size=BATCH, max_epochs=1, verbose=False,
            optimizer_params={"lr": 1e-3},
        )  # fmt: skip

    timing = paired_ratio(ours, theirs, 9, clock=time.process_time)
    each = f"{timing.ours:.2f} against {timing.peer:.2f} s"
    return [timed_row(name, timing, peer_version=version("torch-mist"), why=each, **peer)]


def correlated_pairs(num: int, seed: int) -> tuple[Tensor, Tensor]:
    x, noise = torch.randn(2, num, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x, 0.9 * x + math.sqrt(1 - 0.81) * noise


ROWS = (transition, gap, growth, critic_step, critic_training)


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
