"""Loss against CPU seconds: every method trains the same autoencoder inside a Trainer, for the same time."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytorch_lightning as pl
import torch
from _apo_peers import (
    EVERY,
    SMALL,
    LitAutoencoder,
    MissingPeerError,
    autoencoder,
    kfac_pytorch_preconditioner,
    loader,
    prodigy_optimizer,
    reconstruction_loss,
    singd_optimizer,
    small_images,
)
from _turns import trainer
from torch import Tensor, nn

from lightning_ext.callbacks import APOLearningRate, APOPreconditioning
from lightning_ext.optim import APOPreconditioner

BATCH = 500
Make = Callable[[nn.Module, float], torch.optim.Optimizer]


class ClosurelessAutoencoder(LitAutoencoder):
    """For optimizers whose ``step`` takes no closure."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: object, optimizer_closure: Callable) -> None:
        optimizer_closure()
        optimizer.optimizer.step()


class Ledger(pl.Callback):
    """Writes down the loss on all images at growing intervals, off the clock, and ends the fit in time."""

    def __init__(self, images: Tensor, seconds: float) -> None:
        self.images, self.seconds = images, seconds
        self.spent, self.next_look, self.times, self.losses, self.steps = 0.0, 0.0, [], [], 0

    def on_train_start(self, trainer: pl.Trainer, module: LitAutoencoder) -> None:
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, module: LitAutoencoder, *args: object) -> None:
        self.steps += 1
        spent = self.spent + time.process_time() - self.started
        if spent < min(self.next_look, self.seconds):
            return
        averaging = getattr(trainer.optimizers[0], "eval", None)  # schedule-free is judged at its averaged weights
        if averaging:
            averaging()
        with torch.no_grad():
            self.losses.append(float(reconstruction_loss(module.net(self.images), self.images)))
        if averaging:
            trainer.optimizers[0].train()
        self.times.append(spent)
        self.next_look = max(0.05, spent * 1.15)
        self.spent = spent
        trainer.should_stop = spent >= self.seconds
        self.started = time.process_time()


class KfacPytorch(pl.Callback):
    """Runs kfac-pytorch between the backward pass and the step, as its documentation asks."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def on_fit_start(self, trainer: pl.Trainer, module: LitAutoencoder) -> None:
        self.preconditioner = kfac_pytorch_preconditioner(module.net, damping=0.1, lr=self.lr, kl_clip=0.01)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: LitAutoencoder, optimizer: object) -> None:
        self.preconditioner.step()


def _adam(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=lr)


def _momentum(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)


def _schedule_free(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise MissingPeerError(f"{error}; pip install schedulefree") from error
    optimizer = AdamWScheduleFree(net.parameters(), lr=lr)
    optimizer.train()
    return optimizer


def _soap(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise MissingPeerError(f"{error}; pip install pytorch_optimizer") from error
    return SOAP(net.parameters(), lr=lr, weight_decay=0.0, precondition_frequency=EVERY)


def _singd(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    return singd_optimizer(net, lr, damping=0.1)  # at its default the factors overflow before the time is up


def _feed(lr: float) -> list[pl.Callback]:
    return [APOPreconditioning(fsd_fraction=0.25)]


def _apo(structure: str, apply: str = "before") -> Make:
    return lambda net, lr: APOPreconditioner(
        net, lr=lr, lam_f=2.0, structure=structure, every_n_steps=EVERY, apply=apply
    )  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A method and the three learning rates it may choose from."""

    name: str
    make: Make
    rates: tuple[float, ...]
    callbacks: Callable[[float], list[pl.Callback]] = lambda lr: []
    module: type[LitAutoencoder] = LitAutoencoder
    package: str | None = None
    ours: bool = field(default=False)


METHODS = (
    Method("APO-P kron", _apo("kron"), (0.01, 0.03, 0.1), _feed, ours=True),
    Method("APO-P kron, applied after", _apo("kron", "after"), (0.01, 0.03, 0.1), _feed, ours=True),
    Method("APO-P ekfac", _apo("ekfac"), (0.01, 0.03, 0.1), _feed, ours=True),
    Method("APO-LR on Adam", _adam, (1e-4, 1e-3, 1e-2), lambda lr: [APOLearningRate()], ours=True),
    Method(
        "APO-LR on Adam, quarter",
        _adam,
        (1e-4, 1e-3, 1e-2),
        lambda lr: [APOLearningRate(loss_fraction=0.25)],
        ours=True,
    ),
    Method("Adam", _adam, (3e-3, 1e-2, 3e-2), package="torch"),
    Method("Prodigy", prodigy_optimizer, (0.05, 0.1, 0.3), package="prodigyopt"),
    Method("schedule-free AdamW", _schedule_free, (0.01, 0.03, 0.05), package="schedulefree"),
    Method("SINGD dense", _singd, (0.01, 0.03, 0.05), module=ClosurelessAutoencoder, package="singd"),
    Method("SOAP", _soap, (1e-2, 3e-2, 1e-1), package="pytorch_optimizer"),
    Method("kfac-pytorch", _momentum, (0.01, 0.03, 0.1), lambda lr: [KfacPytorch(lr)], package="kfac_pytorch"),
)


@dataclass(frozen=True)
class Curve:
    """One training: CPU seconds, loss on all images, and what it was trained with."""

    method: Method
    lr: float
    times: list[float]
    losses: list[float]
    steps: int

    @property
    def final(self) -> float:
        """Loss when the time was up; infinite if the training broke."""
        return self.losses[-1] if math.isfinite(self.losses[-1]) else math.inf


def train(method: Method, lr: float, seconds: float, seed: int = 0) -> Curve:
    images = small_images()
    module = method.module(autoencoder(SMALL, seed), lambda net: method.make(net, lr))
    ledger = Ledger(images, seconds)
    trainer(*method.callbacks(lr), ledger).fit(module, loader(images, BATCH))
    return Curve(method, lr, ledger.times, ledger.losses, ledger.steps)


def draw(curves: list[Curve], path: Path) -> None:
    """The best curve of each method; ours thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10.0, 5.0), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    order = {method.name: index for index, method in enumerate(METHODS)}
    for curve in sorted(curves, key=lambda curve: curve.final):
        ours = curve.method.ours
        axes.plot(
            curve.times, curve.losses, color=colours[order[curve.method.name]], linewidth=2.6 if ours else 1.3,
            linestyle="-" if ours else "--", zorder=3 if ours else 2,
            label=f"{curve.method.name}: {curve.final:.3f} (lr {curve.lr:g}, {curve.steps:,} steps)",
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlim=(0.03, 1.25 * max(curve.times[-1] for curve in curves)), ylim=(0.2, 4.0),
        xlabel="CPU seconds, one thread, inside a Trainer", ylabel="reconstruction loss, all training digits",
        title="Digits autoencoder at equal time; best of three learning rates each",
    )  # fmt: skip
    axes.set_yticks([0.2, 0.3, 0.5, 1.0, 2.0, 4.0], labels=["0.2", "0.3", "0.5", "1", "2", "4"])
    axes.set_xticks([0.03, 0.1, 0.3, 1.0, 3.0], labels=["0.03", "0.1", "0.3", "1", "3"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8, title="loss at the end, best first", title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
