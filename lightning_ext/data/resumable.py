"""Loaders that go on where an interrupted run stopped, also in the middle of an epoch."""

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from lightning_ext._lightning import LightningDataModule
from lightning_ext.data._arrays import WholeBatches, takes_lists
from lightning_ext.functional.counter_rng import seeded_generator

__all__ = ["EpochSampler", "ResumableDataModule", "ResumableLoader"]


class EpochSampler(RandomSampler):
    """Random order that depends on (seed, epoch) alone, not on what was drawn before.

    Lightning tells every sampler with ``set_epoch`` the epoch; under DDP it puts a ``DistributedSampler`` in its place.

    Args:
        data_source: the dataset.
        seed: any integer.

    >>> sampler = EpochSampler(range(5), seed=0)
    >>> first = list(sampler)
    >>> list(sampler) == first, sorted(first)
    (True, [0, 1, 2, 3, 4])
    """

    def __init__(self, data_source: Sized, seed: int = 0) -> None:
        super().__init__(data_source)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self), generator=seeded_generator(self.seed, self.epoch))
        yield from order.tolist()


class ResumableLoader(DataLoader[Any]):
    """``DataLoader`` with ``state_dict`` and ``load_state_dict``, which Lightning saves in its checkpoints.

    Resumed in the middle of an epoch it skips the batches that the interrupted run has used; a plain ``DataLoader``
    begins its epoch anew. The order must not depend on the global generator: use :class:`EpochSampler`. Cost: the
    skipped batches are loaded once more.

    Args: those of ``torch.utils.data.DataLoader``.

    >>> loader = ResumableLoader(range(6), batch_size=2)
    >>> first = next(iter(loader))
    >>> resumed = ResumableLoader(range(6), batch_size=2)
    >>> resumed.load_state_dict(loader.state_dict())
    >>> [batch.tolist() for batch in resumed]
    [[2, 3], [4, 5]]
    """

    _position = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing is drawn before the first batch, and Lightning sets the epoch after it made the iterator.
        skip, self._skip, self._position = self._skip, 0, 0
        for batch in super().__iter__():
            self._position += 1
            if self._position > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch were handed out, and how many there are."""
        return {"position": self._position, "batches": len(self)}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Skip as many batches in the next epoch.

        Raises:
            ValueError: the epoch had another number of batches, so their contents were others.
        """
        if state_dict["batches"] != len(self):
            raise ValueError(
                f"cannot resume inside an epoch of {state_dict['batches']} batches with a loader of {len(self)}: "
                "use the batch size, the data and the number of processes of the interrupted run."
            )
        self._skip = state_dict["position"] % max(1, len(self))


def _collate(found: Any) -> Any:
    """A list of samples becomes a batch; anything else is what ``__getitems__`` gave as a whole batch."""
    return default_collate(found) if isinstance(found, list) else found


class ResumableDataModule(LightningDataModule):
    """Base of data modules whose training order depends on (seed, epoch) alone and resumes in the middle of an epoch.

    Args:
        batch_size: samples per batch and rank, at least 1.
        num_workers: workers of the loaders.
        seed: seed of the order; ``None`` takes the seed of the program (``seed_everything``). Checkpoints keep it.

    Raises:
        ValueError: ``batch_size < 1``.
    """

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int | None = None) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.seed = torch.initial_seed() if seed is None else seed
        self._whole: list[WholeBatches] = []

    def loader(self, dataset: Dataset[Any] | None, shuffle: bool = False) -> ResumableLoader:
        """A loader that can stop in the middle of an epoch and, from tensors, indexes a whole batch at once.

        Args:
            dataset: the dataset, or None before ``setup``. A ``TensorDataset`` is read in whole batches, as is one with
                ``__getitems__`` that gives a tuple, a mapping or a tensor; lists of samples are collated.
            shuffle: permute every epoch anew.

        Raises:
            RuntimeError: there is no dataset yet.
        """
        if dataset is None:
            raise RuntimeError("call setup() before asking for a loader; a Trainer does it by itself.")
        sized: Any = dataset
        return ResumableLoader(
            self._in_whole_batches(dataset) if takes_lists(dataset) else dataset,
            batch_size=self.batch_size,
            sampler=EpochSampler(sized, self.seed) if shuffle else None,
            collate_fn=_collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _in_whole_batches(self, dataset: Dataset[Any]) -> WholeBatches:
        """One object for one dataset: whoever keeps results by dataset must know it again in the next loader."""
        known = next((whole for whole in self._whole if whole.rows is dataset), None)
        if known is None:
            known = WholeBatches(dataset)
            self._whole.append(known)
        return known

    def state_dict(self) -> dict[str, Any]:
        """The seed of the order."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the order of the interrupted run."""
        self.seed = state_dict["seed"]
