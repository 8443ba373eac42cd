"""What the APO benchmark trains: an autoencoder, digits, and every optimizer as one step function."""

import contextlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.data import DigitsDataModule
from lightning_ext.functional import ProximalObjective, squared_error
from lightning_ext.optim import APOPreconditioner

WIDE = (784, 1000, 500, 250, 30)
SMALL = (64, 48, 24, 8)
EVERY = 10  # meta-steps, factors and inverses of all methods
Step = Callable[[Tensor, Tensor], None]


class MissingPeerError(Exception):
    """The peer cannot be imported here; the message says how to have it."""


def reconstruction_loss(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Half the squared error, summed over pixels; ``reduction`` is what ASDL asks of a loss."""
    losses = 0.5 * (output - target).square().sum(1)
    return losses.mean() if reduction == "mean" else losses.sum()


def autoencoder(widths: tuple[int, ...], seed: int = 0) -> nn.Sequential:
    """Tanh units, a linear code, a linear output."""
    torch.manual_seed(seed)
    sides = widths + widths[-2::-1]
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(pairwise(sides), start=1):
        layers.append(nn.Linear(fan_in, fan_out))
        if index not in (len(widths) - 1, len(sides) - 1):
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


class _Batches(TensorDataset):
    """Indexed once per batch instead of once per sample."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


def loader(images: Tensor, batch: int) -> DataLoader:
    return DataLoader(_Batches(images), batch, shuffle=True, drop_last=True, collate_fn=lambda samples: samples)


def small_images() -> Tensor:
    """The 1,400 training digits, 64 grey values in [0, 1]."""
    data = DigitsDataModule(binarize=False)
    data.setup()
    return data.train_set.tensors[0]


def wide_images() -> Tensor:
    """The training digits at 24 x 24 pixels in nine places of a 28 x 28 frame: 12,600 images with real strokes."""
    digits = nn.functional.interpolate(small_images().reshape(-1, 1, 8, 8), size=(24, 24), mode="bilinear")
    frames = [
        nn.functional.pad(digits, (left, 4 - left, top, 4 - top)) for left in (0, 2, 4) for top in (0, 2, 4)
    ]  # fmt: skip
    return torch.cat(frames).reshape(-1, 784)


class LitAutoencoder(pl.LightningModule):
    """An autoencoder whose optimizer is made by a function of its network."""

    def __init__(self, net: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.make = net, make

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        return reconstruction_loss(self.net(x), x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.net)


def cycling(images: Tensor, batch: int, step: Step) -> Callable[[int], None]:
    """A plain loop over fixed batches, so that its time is the optimizer's and the network's; call it with a number."""
    batches = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))].split(batch)
    batches = [part for part in batches if len(part) == batch]
    position = 0

    def run(steps: int) -> None:
        nonlocal position
        for _ in range(steps):
            step(batches[position % len(batches)], batches[(position - 1) % len(batches)])
            position += 1

    return run


@dataclass(frozen=True)
class Preconditioned:
    """A method with curvature, as a step of a plain loop."""

    name: str
    package: str | None
    make: Callable[[nn.Module], Step]

    def version(self) -> str | None:
        return self.package and package_version(self.package)


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def apo(structure: str, precond_dtype: str | None = None, apply: str = "before") -> Callable[[nn.Module], Step]:
    def make(net: nn.Module) -> Step:
        optimizer = APOPreconditioner(
            net, lr=1e-3, structure=structure, every_n_steps=EVERY, precond_dtype=precond_dtype, apply=apply
        )  # fmt: skip

        def step(x: Tensor, previous: Tensor) -> None:
            optimizer.zero_grad()
            loss = reconstruction_loss(net(x), x)
            loss.backward()
            if optimizer.meta_step_due:
                previous = previous[: len(previous) // 4]  # fsd_fraction=0.25 of the callback
                objective = ProximalObjective(
                    lambda: reconstruction_loss(net(x), x), lambda: net(previous), squared_error,
                    loss_at_anchor=loss.detach(),
                )  # fmt: skip
                objective.anchor()
                optimizer.step(look_ahead=objective)
            else:
                optimizer.step()

        return step

    return make


def kfac_pytorch_preconditioner(net: nn.Module, **arguments: object):
    try:
        from kfac.preconditioner import KFACPreconditioner
    except ImportError as error:
        raise MissingPeerError(
            f"{error}; kfac-pytorch is not on the package index: see the top of the script"
        ) from error
    return KFACPreconditioner(
        net, factor_update_steps=EVERY, inv_update_steps=EVERY, compute_method="inverse", **arguments
    )  # fmt: skip


def kfac_pytorch(net: nn.Module, **dtypes: torch.dtype) -> Step:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    preconditioner = kfac_pytorch_preconditioner(net, damping=0.01, lr=1e-4, **dtypes)

    def step(x: Tensor, previous: Tensor) -> None:
        optimizer.zero_grad()
        reconstruction_loss(net(x), x).backward()
        preconditioner.step()
        optimizer.step()

    return step


def asdl_kfac(net: nn.Module) -> Step:
    try:
        import asdl
        from asdl.precondition import natural_gradient
    except ImportError as error:
        raise MissingPeerError(f"{error}; pip install asdfghjkl") from error
    # It marks its phases for a GPU profiler, which torch without CUDA refuses.
    natural_gradient.nvtx = types.SimpleNamespace(range=lambda *_: contextlib.nullcontext())
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    maker = None

    def step(x: Tensor, previous: Tensor) -> None:
        nonlocal maker
        if maker is None:  # it wants the batch size, for sums that it turns into means
            config = asdl.PreconditioningConfig(
                data_size=len(x), damping=0.01, ema_decay=0.9,
                preconditioner_upd_interval=EVERY, curvature_upd_interval=EVERY,
            )  # fmt: skip
            # The empirical Fisher, as kfac-pytorch and SINGD: also its fastest.
            maker = asdl.KfacGradientMaker(net, config, fisher_type=asdl.FISHER_EMP)
        optimizer.zero_grad()
        output = maker.setup_model_call(net, x)
        maker.setup_loss_call(reconstruction_loss, output, x)
        maker.forward_and_backward()
        optimizer.step()

    return step


def singd_optimizer(net: nn.Module, lr: float, **arguments: object) -> torch.optim.Optimizer:
    try:
        from singd.optim.optimizer import SINGD
    except ImportError as error:
        raise MissingPeerError(f"{error}; pip install singd") from error
    return SINGD(net, lr=lr, T=EVERY, **arguments)


def singd_dense(net: nn.Module, **arguments: object) -> Step:
    optimizer = singd_optimizer(net, lr=1e-4, **arguments)

    def step(x: Tensor, previous: Tensor) -> None:
        optimizer.zero_grad()
        reconstruction_loss(net(x), x).backward()
        optimizer.step()

    return step


def prodigy_optimizer(net: nn.Module, lr: float = 1.0) -> torch.optim.Optimizer:
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise MissingPeerError(f"{error}; pip install prodigyopt") from error
    return Prodigy(net.parameters(), lr=lr)


HALF = torch.bfloat16
KRON = Preconditioned("APO-P kron", None, apo("kron"))
KRON_HALF = Preconditioned("APO-P kron bf16", None, apo("kron", "bfloat16"))
KRON_AFTER = Preconditioned("APO-P kron, applied after", None, apo("kron", None, "after"))
KRON_HALF_AFTER = Preconditioned("APO-P kron bf16, applied after", None, apo("kron", "bfloat16", "after"))
EKFAC_AFTER = Preconditioned("APO-P ekfac, applied after", None, apo("ekfac", None, "after"))
EKFAC_HALF_AFTER = Preconditioned("APO-P ekfac bf16, applied after", None, apo("ekfac", "bfloat16", "after"))
EKFAC = Preconditioned("APO-P ekfac", None, apo("ekfac"))
EKFAC_HALF = Preconditioned("APO-P ekfac bf16", None, apo("ekfac", "bfloat16"))
KFAC_PYTORCH = Preconditioned("kfac-pytorch inverse", "kfac_pytorch", kfac_pytorch)
KFAC_PYTORCH_HALF = Preconditioned(  # it inverts in float32 and rounds what it has inverted
    "kfac-pytorch inverse bf16", "kfac_pytorch", partial(kfac_pytorch, factor_dtype=HALF, inv_dtype=HALF)
)
ASDL_KFAC = Preconditioned("ASDL KFAC", "asdfghjkl", asdl_kfac)
SINGD_DENSE = Preconditioned("SINGD dense", "singd", singd_dense)
SINGD_HALF = Preconditioned("SINGD dense bf16", "singd", partial(singd_dense, preconditioner_dtype=(HALF, HALF)))
