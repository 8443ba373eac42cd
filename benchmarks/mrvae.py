"""Speed and memory of MR-VAE against the same networks without gates, and against pythae.

    python benchmarks/mrvae.py            # every row, writes benchmarks/results/mrvae.json
    python benchmarks/mrvae.py digits     # rows whose name contains a word, prints only

One thread, CPU seconds of this process, trainings in alternation: the first steps of each are not counted. On a GPU
machine the same script runs the rows there (``--device cuda``), in wall-clock seconds.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.benchmark import (
    BenchmarkRow,
    absent_row,
    paired_ratio,
    timed_row,
    value_row,
    write_benchmark,
)
from lightning_ext.data import DigitsDataModule
from lightning_ext.modules import BaseVAE, BetaVAE, MultiRateVAE
from lightning_ext.nn import MLPDecoder, MLPEncoder, ResNetDecoder, ResNetEncoder

RESULTS = Path(__file__).parent / "results" / "mrvae.json"
ACCELERATOR = "cpu"
PLAIN = "the same BetaVAE without gates"


class Stopwatch(pl.Callback):
    """Counts the time of training steps only, from the end of the warm-up to the last step, over all fits."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.total, self.started = warmup, 0.0, 0.0

    @staticmethod
    def now() -> float:
        if ACCELERATOR == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == self.warmup:
            self.started = self.now()

    def on_train_end(self, *args: object) -> None:
        self.total += self.now() - self.started


def digits(model: type[BaseVAE], **arguments: object) -> BaseVAE:
    torch.manual_seed(0)
    return model(MLPEncoder([64], [128, 128], 8), MLPDecoder(8, [128, 128], [64]), input_shape=[64], **arguments)


def resnet(model: type[BaseVAE], **arguments: object) -> BaseVAE:
    torch.manual_seed(0)
    return model(ResNetEncoder(32), ResNetDecoder(32), input_shape=[1, 28, 28], **arguments)


def digits_loader() -> DataLoader:
    data = DigitsDataModule()
    data.setup()
    return data.train_dataloader()


def image_loader() -> DataLoader:
    """Digits enlarged to 28 x 28, so that activations are those of real strokes and not of noise."""
    data = DigitsDataModule(shape="image", binarize=False)
    data.setup()
    images = nn.functional.interpolate(data.train_set.tensors[0], size=(28, 28), mode="bilinear")
    return DataLoader(TensorDataset((images > 0.5).float()), batch_size=128, shuffle=True, drop_last=True)


def fit(model: pl.LightningModule, loader: DataLoader, steps: int, *callbacks: pl.Callback) -> None:
    trainer = pl.Trainer(
        accelerator=ACCELERATOR,
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)


def step_time(build: Callable[..., BaseVAE], loader: DataLoader, steps: int, repeats: int, name: str, goal: float):
    watch = Stopwatch(warmup=max(2, steps // 10))
    timing = paired_ratio(
        lambda: fit(build(MultiRateVAE), loader, steps, watch),
        lambda: fit(build(BetaVAE), loader, steps, watch),
        repeats=repeats,
        warmup=1,
        clock=lambda: watch.total,
    )
    return timed_row(name, timing, peer_name=PLAIN, peer_version=None, goal=goal, why=f"{steps} steps, batch 128")


def digits_step() -> BenchmarkRow:
    return step_time(digits, digits_loader(), 200, 15, "digits MLP: training step", 1.15)


def resnet_step() -> BenchmarkRow:
    return step_time(resnet, image_loader(), 12, 9, "MNIST ResNet: training step", 1.05)


def eight_runs() -> BenchmarkRow:
    loader, watch = digits_loader(), Stopwatch(warmup=0)
    betas = torch.logspace(-2, 1, 8).tolist()
    timing = paired_ratio(
        lambda: fit(digits(MultiRateVAE), loader, 110, watch),
        lambda: [fit(digits(BetaVAE, beta=beta), loader, 110, watch) for beta in betas],
        repeats=5,
        warmup=1,
        clock=lambda: watch.total,
    )
    row = timed_row(
        "digits MLP: one MR-VAE run against eight beta-VAE runs of equal epochs", timing,
        peer_name=f"eight of {PLAIN}", peer_version=None, goal=1 / 7.6,
        why=f"{1 / timing.ratio:.2f} times cheaper; the paper's 38,492 s over 5,040 s is 7.6",
    )  # fmt: skip
    return row


def pythae_epoch() -> BenchmarkRow:
    name = "digits MLP: epoch of our plain beta-VAE"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from pythae.data.datasets import BaseDataset
            from pythae.models import BetaVAE as PythaeBetaVAE
            from pythae.models import BetaVAEConfig
            from pythae.models.base.base_utils import ModelOutput
            from pythae.models.nn import BaseDecoder, BaseEncoder
            from pythae.trainers import BaseTrainer, BaseTrainerConfig
    except ImportError as error:
        return absent_row(name, peer_name="pythae", goal=1.0, why=f"{error}; pip install pythae")

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLPEncoder([64], [128, 128], 8)

        def forward(self, x: torch.Tensor) -> ModelOutput:
            mu, logvar = self.net(x)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLPDecoder(8, [128, 128], [64])

        def forward(self, z: torch.Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=torch.sigmoid(self.net(z)))

    epochs, loader = 20, digits_loader()
    images = loader.dataset.tensors[0]
    logging.getLogger("pythae").setLevel(logging.ERROR)

    def peer() -> None:
        torch.manual_seed(0)
        config = BetaVAEConfig(input_dim=(64,), latent_dim=8, reconstruction_loss="bce", beta=1.0)
        training = BaseTrainerConfig(
            output_dir="/tmp/pythae_benchmark", num_epochs=epochs, per_device_train_batch_size=128,
            learning_rate=1e-3, optimizer_cls="Adam", keep_best_on_train=True, steps_saving=None,
            train_dataloader_num_workers=0, no_cuda=ACCELERATOR == "cpu",
        )  # fmt: skip
        with quiet():
            trainer = BaseTrainer(
                model=PythaeBetaVAE(config, Encoder(), Decoder()),
                train_dataset=BaseDataset(images, torch.zeros(len(images))),
                training_config=training,
            )
            start = Stopwatch.now()
            trainer.train()
            clock["seconds"] += Stopwatch.now() - start

    def ours() -> None:
        model = digits(BetaVAE)
        start = Stopwatch.now()
        fit(model, loader, 11 * epochs)
        clock["seconds"] += Stopwatch.now() - start

    clock = {"seconds": 0.0}
    timing = paired_ratio(ours, peer, repeats=7, warmup=1, clock=lambda: clock["seconds"])
    return timed_row(
        name, timing, peer_name="pythae BetaVAE", peer_version=version("pythae"), goal=1.0,
        why=f"{epochs} epochs of 1,400 images, each with its own trainer, from the start of the training to its end",
    )  # fmt: skip


@contextlib.contextmanager
def quiet():
    """Pythae prints and draws bars whatever one asks for."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def peak_memory() -> BenchmarkRow:
    """Peak of the whole process, each variant in a process of its own (GPU: peak of allocated memory)."""

    def peak(model: str) -> float:
        command = [sys.executable, __file__, "--peak", model, "--device", ACCELERATOR]
        return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

    ours, plain = (min(peak(name) for _ in range(3)) for name in ("MultiRateVAE", "BetaVAE"))
    return value_row(
        "MNIST ResNet: peak memory", ours, plain, unit="MiB", peer_name=PLAIN, peer_version=None, goal=1.05,
        why="smallest of three processes each",
    )  # fmt: skip


def print_peak(name: str) -> None:
    fit(resnet({"MultiRateVAE": MultiRateVAE, "BetaVAE": BetaVAE}[name]), image_loader(), 6)
    if ACCELERATOR == "cpu":
        # Not ru_maxrss: a child process starts with the peak of its parent there.
        status = Path("/proc/self/status").read_text()
        print(json.dumps(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024))
    else:
        print(json.dumps(torch.cuda.max_memory_allocated() / 2**20))


def activation_memory() -> BenchmarkRow:
    """What one training step keeps for its backward pass, each storage counted once."""

    def kept(build: BaseVAE) -> float:
        storages: dict[int, int] = {}
        parameters = {p.untyped_storage().data_ptr() for p in build.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = next(iter(image_loader()))[0]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if isinstance(build, MultiRateVAE):
                with build.at(torch.ones(len(x))):
                    loss = build.rate_distortion(x).loss(1.0).mean()
            else:
                loss = build.rate_distortion(x).loss(1.0).mean()
        loss.backward()
        return sum(storages.values()) / 2**20

    return value_row(
        "MNIST ResNet: memory kept for the backward pass", kept(resnet(MultiRateVAE)), kept(resnet(BetaVAE)),
        unit="MiB", peer_name=PLAIN, peer_version=None, goal=1.05,
        why="activations alone, without weights, gradients and optimizer state",
    )  # fmt: skip


ROWS = (digits_step, resnet_step, eight_runs, pythae_epoch, peak_memory, activation_memory)


def main() -> None:
    global ACCELERATOR
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="run only the rows whose function name contains one of these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    ACCELERATOR = options.device
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if options.peak:
        return print_peak(options.peak)
    chosen = [row for row in ROWS if not options.words or any(word in row.__name__ for word in options.words)]
    rows = []
    for function in chosen:
        print(f"{function.__name__} ...", file=sys.stderr, flush=True)
        rows.append(function())
    target = RESULTS if ACCELERATOR == "cpu" else RESULTS.with_stem("mrvae_cuda")
    write_benchmark(rows, target if not options.words else Path(os.devnull))
    return None


if __name__ == "__main__":
    main()
