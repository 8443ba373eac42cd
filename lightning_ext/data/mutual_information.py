"""Pairs (x, z) whose mutual information is known, or that a model simulates: fresh ones in every epoch."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from lightning_ext.data.resumable import ResumableDataModule
from lightning_ext.functional import (
    correlated_gaussian_information,
    finite_joint_information,
    linear_gaussian_information,
    seeded_generator,
)

__all__ = [
    "CorrelatedGaussianDataModule",
    "FiniteJointDataModule",
    "LinearGaussianDataModule",
    "PairLoader",
    "SimulatedPairsDataModule",
]

Pair = tuple[Tensor, Tensor]
Transform = Literal["asinh", "cube", "half_cube", "wiggle"]

_BIJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "asinh": torch.asinh,
    "cube": lambda x: x.pow(3),
    "half_cube": lambda x: x * x.abs().sqrt(),
    "wiggle": lambda x: x + 0.4 * x.sin(),
}


class _Simulator(Protocol):
    def simulate(self, num: int, generator: Generator | None = None) -> Pair: ...


class PairLoader:
    """Batches of pairs that are drawn when they are asked for, each addressed by (seed, epoch, batch, rank).

    A resumed run draws what the uninterrupted one would, ranks draw apart, and torch's own generator is left alone. It
    is no ``DataLoader``: there is nothing to load.

    Args:
        draw: ``(num, generator) -> (x, z)``, ``num`` pairs.
        num_pairs: in an epoch, for each rank.
        batch_size: at least 1; the last batch may be smaller.
        seed: any integer.
        fresh: other pairs in every epoch; else the same.

    >>> loader = PairLoader(lambda num, generator: (torch.zeros(num), torch.ones(num)), 5, 2)
    >>> [len(x) for x, z in loader]
    [2, 2, 1]
    """

    batch_sampler = None  # Lightning looks for one beside ``sampler``

    def __init__(
        self, draw: Callable[[int, Generator], Pair], num_pairs: int, batch_size: int, seed: int = 0, fresh: bool = True
    ) -> None:
        self.draw, self.num_pairs, self.batch_size, self.seed, self.fresh = draw, num_pairs, batch_size, seed, fresh
        self.epoch = self._position = self._skip = 0

    @property
    def sampler(self) -> "PairLoader":
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-self.num_pairs // self.batch_size)

    def __iter__(self) -> Iterator[Pair]:
        """Draw an epoch."""
        first, self._skip = self._skip, 0
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        for batch in range(first, len(self)):
            self._position = batch + 1
            size = min(self.batch_size, self.num_pairs - batch * self.batch_size)
            yield self.draw(size, seeded_generator(self.seed, self.epoch if self.fresh else -1, batch, rank))

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch were handed out, and how many there are."""
        return {"position": self._position, "batches": len(self)}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Begin the next epoch so many batches later.

        Raises:
            ValueError: the epoch had another number of batches.
        """
        if state_dict["batches"] != len(self):
            raise ValueError(
                f"cannot resume inside an epoch of {state_dict['batches']} batches with one of {len(self)}: use the "
                "batch size and the number of pairs of the interrupted run."
            )
        self._skip = state_dict["position"] % max(1, len(self))


class SimulatedPairsDataModule(ResumableDataModule):
    """Pairs that a generative model simulates: each z is an exact posterior sample of its x.

    Args:
        model: with ``simulate(num, generator)``, such as a :class:`~lightning_ext.nn.LatentModel`, on the CPU.
        num_train: pairs in a training epoch and rank, fresh ones in each.
        num_val: pairs to validate, test and predict on, for each rank; always the same.
        batch_size: pairs per batch and rank.
        seed: of all draws; ``None`` takes the seed of the program. Checkpoints keep it.

    Raises:
        ValueError: a number is below 1, or the model cannot simulate.
    """

    def __init__(
        self,
        model: _Simulator | None,
        num_train: int = 10_000,
        num_val: int = 1000,
        batch_size: int = 128,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, 0, seed)
        if num_train < 1 or num_val < 1:
            raise ValueError(f"num_train and num_val must be at least 1; got {num_train} and {num_val}.")
        if model is not None and not hasattr(model, "simulate"):
            raise ValueError(f"model must have simulate(num, generator), as a LatentModel; got {type(model).__name__}.")
        self.model, self.num_train, self.num_val = model, num_train, num_val

    @property
    def mutual_information(self) -> float | None:
        """Nats between x and z; None where it is not known."""
        return None

    def draw(self, num: int, generator: Generator) -> Pair:
        """Pairs ``x (num, *event)``, ``z (num, d)``."""
        assert self.model is not None
        with torch.no_grad():
            return self.model.simulate(num, generator)

    def train_dataloader(self) -> PairLoader:
        """Fresh pairs in every epoch."""
        return PairLoader(self.draw, self.num_train, self.batch_size, self.seed)

    def val_dataloader(self) -> PairLoader:
        """The same pairs in every epoch, none of the training's."""
        return PairLoader(self.draw, self.num_val, self.batch_size, self.seed, fresh=False)

    def test_dataloader(self) -> PairLoader:
        """Those of the validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> PairLoader:
        """Those of the validation."""
        return self.val_dataloader()


class CorrelatedGaussianDataModule(SimulatedPairsDataModule):
    r"""Gaussians that are correlated dimension by dimension, the field's first test.

    Args:
        dim: of x and of z, at least 1.
        rho: correlation of each pair of dimensions, between -1 and 1.
        transform: of every coordinate of x and z: ``"asinh"``, ``"cube"``, ``"half_cube"`` (:math:`x |x|^{1/2}`) or
            ``"wiggle"`` (:math:`x + 0.4 \sin x`). They are invertible, so the information stays.
        num_train: see :class:`SimulatedPairsDataModule`, also for the rest.
        num_val: likewise.
        batch_size: likewise.
        seed: likewise.

    Raises:
        ValueError: an argument is out of range.

    Source: the transforms are of the kind that Czyz et al. 2023 (arXiv:2306.11078) test with.
    """

    def __init__(
        self,
        dim: int = 5,
        rho: float = 0.9,
        transform: Transform | None = None,
        num_train: int = 10_000,
        num_val: int = 1000,
        batch_size: int = 128,
        seed: int | None = None,
    ) -> None:
        super().__init__(None, num_train, num_val, batch_size, seed)
        correlated_gaussian_information(dim, rho)  # refuses what is out of range
        if transform is not None and transform not in _BIJECTIONS:
            raise ValueError(
                f"transform must be None or one of {', '.join(map(repr, _BIJECTIONS))}; got {transform!r}."
            )
        self.save_hyperparameters()
        self.dim, self.rho, self.transform = dim, rho, transform

    @property
    def mutual_information(self) -> float:
        """Nats between x and z."""
        return correlated_gaussian_information(self.dim, self.rho)

    def draw(self, num: int, generator: Generator) -> Pair:
        """Pairs, ``(num, dim)`` both."""
        z, noise = torch.randn(2, num, self.dim, generator=generator)
        x = self.rho * z + math.sqrt(1 - self.rho**2) * noise
        bijection = _BIJECTIONS.get(self.transform or "")
        return (x, z) if bijection is None else (bijection(x), bijection(z))


class LinearGaussianDataModule(SimulatedPairsDataModule):
    r"""Pairs of the linear model :math:`x = W z + b + \sigma \epsilon`.

    Args:
        weight: W, ``(D, d)``.
        sigma: positive.
        bias: b, ``(D,)``. Default 0.
        num_train: see :class:`SimulatedPairsDataModule`, also for the rest.
        num_val: likewise.
        batch_size: likewise.
        seed: likewise.

    Raises:
        ValueError: an argument is out of range or of another shape.
    """

    def __init__(
        self,
        weight: Sequence[Sequence[float]] | Tensor,
        sigma: float = 1.0,
        bias: Sequence[float] | Tensor | None = None,
        num_train: int = 10_000,
        num_val: int = 1000,
        batch_size: int = 128,
        seed: int | None = None,
    ) -> None:
        super().__init__(None, num_train, num_val, batch_size, seed)
        self.weight, self.sigma = torch.as_tensor(weight, dtype=torch.float32), sigma
        self._information = linear_gaussian_information(self.weight, sigma).item()
        self.bias = torch.zeros(len(self.weight)) if bias is None else torch.as_tensor(bias, dtype=torch.float32)
        if self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias must be ({len(self.weight)},), as W has rows; got {tuple(self.bias.shape)}.")

    @property
    def mutual_information(self) -> float:
        """Nats between x and z."""
        return self._information

    def draw(self, num: int, generator: Generator) -> Pair:
        """Pairs ``x (num, D)``, ``z (num, d)``."""
        z = torch.randn(num, self.weight.shape[1], generator=generator)
        return z @ self.weight.T + self.bias + self.sigma * torch.randn(num, len(self.bias), generator=generator), z


class FiniteJointDataModule(SimulatedPairsDataModule):
    """Pairs of symbols from a table of probabilities.

    Args:
        joint: ``(X, Z)``, at least 0, summing to 1.
        one_hot: whether symbols come as unit vectors, for critics that take numbers, or as integers ``(num, 1)``.
        num_train: see :class:`SimulatedPairsDataModule`, also for the rest.
        num_val: likewise.
        batch_size: likewise.
        seed: likewise.

    Raises:
        ValueError: it is no table of probabilities.
    """

    def __init__(
        self,
        joint: Sequence[Sequence[float]] | Tensor,
        one_hot: bool = True,
        num_train: int = 10_000,
        num_val: int = 1000,
        batch_size: int = 128,
        seed: int | None = None,
    ) -> None:
        super().__init__(None, num_train, num_val, batch_size, seed)
        self.joint, self.one_hot = torch.as_tensor(joint, dtype=torch.float64), one_hot
        self._information = finite_joint_information(self.joint).item()

    @property
    def mutual_information(self) -> float:
        """Nats between x and z."""
        return self._information

    def draw(self, num: int, generator: Generator) -> Pair:
        """Pairs of symbols."""
        cells = torch.multinomial(self.joint.flatten(), num, replacement=True, generator=generator)
        columns = self.joint.shape[1]
        x, z = cells // columns, cells % columns
        if not self.one_hot:
            return x.unsqueeze(1), z.unsqueeze(1)
        one_hot = torch.nn.functional.one_hot
        return one_hot(x, len(self.joint)).float(), one_hot(z, columns).float()
