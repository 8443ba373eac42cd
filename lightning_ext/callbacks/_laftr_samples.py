"""The batches of a finished task, each sample once, and what the network said about those kept for a check."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_ext._lightning import LightningModule, MisconfigurationException, Trainer
from lightning_ext.callbacks._quiet import beside, undisturbed
from lightning_ext.functional import evaluating


@contextlib.contextmanager
def reading(trainer: Trainer | None, pl_module: LightningModule) -> Iterator[None]:
    """Read data and run the module in eval mode without a trace, with or without a Trainer."""
    if trainer is None:
        with undisturbed(pl_module), evaluating(pl_module):
            yield
    else:
        with beside(trainer, pl_module):
            yield


def one_pass(trainer: Trainer | None, pl_module: LightningModule, loader: Any, *, shared: bool) -> Iterator[Any]:
    """The batches of a loader's data set in its own order, on the module's device.

    With ``shared`` each rank has samples rank, rank + world, ..., so that none is seen twice; else each has all. A
    loader that is no DataLoader over a data set with positions is gone through as it is.
    """
    batches = _ordered(trainer, loader, shared=shared)
    if trainer is not None and trainer.fast_dev_run:  # type: ignore[attr-defined]
        batches = islice(batches, int(trainer.fast_dev_run))  # type: ignore[attr-defined]
    return (_moved(trainer, pl_module, batch) for batch in batches)


def first_batch(trainer: Trainer, pl_module: LightningModule, loader: Any) -> list[Any]:
    """What :func:`one_pass` would begin with, in a list; empty where looking would use a sample up."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return []
    batches = _ordered(None, loader, shared=False, num_workers=0)
    return [_moved(trainer, pl_module, batch) for batch in islice(batches, 1)]


def only_loader(trainer: Trainer, who: str) -> Any:
    """The Trainer's training loader."""
    loader = trainer.train_dataloader
    if isinstance(loader, list | tuple | Mapping) or loader is None:
        found = "none" if loader is None else str(len(loader))
        raise MisconfigurationException(
            f"{who} reads one training loader, and the Trainer has {found}. Use fit_at='manual' and call "
            "end_task(trainer, pl_module, loader) with the loader that stands for the task."
        )
    return loader


def sum_over_ranks(trainer: Trainer | None, tensor: Tensor) -> Tensor:
    """In place."""
    if trainer is None or trainer.world_size == 1:
        return tensor
    total = trainer.strategy.reduce(tensor, reduce_op="sum")
    return tensor.copy_(torch.as_tensor(total))


def _ordered(trainer: Trainer | None, loader: Any, *, shared: bool, num_workers: int | None = None) -> Iterable[Any]:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return iter(loader)  # type: ignore[no-any-return]
    rank, world = (trainer.global_rank, trainer.world_size) if shared and trainer is not None else (0, 1)
    positions = _positions(loader)[rank::world]
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
    return DataLoader(
        loader.dataset,
        batch_size=None if loader.batch_sampler is None else size,  # None: the items are batches
        sampler=positions,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers if num_workers is None else num_workers,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator().manual_seed(0),  # without one a loader draws from the global generator
    )


def _positions(loader: DataLoader[Any]) -> Sequence[int]:
    """All positions, or those to which a ``SubsetRandomSampler`` restricts them."""
    sampler: Any = loader.sampler
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # Lightning's wrapper for ranks
    chosen = getattr(sampler, "indices", None)
    return range(len(loader.dataset)) if chosen is None else sorted(set(map(int, chosen)))  # type: ignore[arg-type]


def _moved(trainer: Trainer | None, pl_module: LightningModule, batch: Any) -> Any:
    if trainer is None:
        batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
    else:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)  # also that of a data module
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    return apply_to_collection(batch, Tensor, lambda t: t.clone() if t.is_inference() else t)
