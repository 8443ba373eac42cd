"""What the influence callbacks read beside a training: samples in their data set's order, queries, and how."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_ext._lightning import LightningModule, MisconfigurationException, Trainer
from lightning_ext.functional import ParameterView
from lightning_ext.modules._influence_data import Shard, plain


def _mover(trainer: Trainer, pl_module: LightningModule, view: ParameterView, loader: int = 0) -> Callable[[Any], Any]:
    def move(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=loader)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=loader)
        return plain(batch, view.device, view.dtype)

    return move


def training_samples(trainer: Trainer, pl_module: LightningModule, view: ParameterView, given: Any, who: str) -> Shard:
    """This rank's part of the samples: those of ``given``, or of the trainer's only training loader."""
    loader: Any = trainer.train_dataloader if given is None else given
    if isinstance(loader, (list, tuple, Mapping)):
        raise MisconfigurationException(
            f"{who} reads one training loader, and the Trainer has {len(loader)}. Say which: samples=DataLoader(...)."
        )
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or dataset is None or isinstance(dataset, IterableDataset):
        raise MisconfigurationException(
            f"{who} names samples by their positions in a data set; {type(loader).__name__} over "
            f"{type(dataset).__name__} has none. Pass samples=DataLoader(...) over a data set with a length."
        )
    return Shard(loader, _mover(trainer, pl_module, view), trainer.global_rank, trainer.world_size)


def query_batches(trainer: Trainer, pl_module: LightningModule, view: ParameterView, given: Any) -> Iterator[Any]:
    """All ranks' query batches, the same on each: those of ``given``, or of the validation loaders."""
    loaders = _validation_loaders(trainer) if given is None else [given]
    for number, loader in enumerate(loaders):
        move = _mover(trainer, pl_module, view, number)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            yield from Shard(loader, move)  # without the sampler that shuffles it or deals it out to ranks
        else:
            yield from map(move, loader)


def _validation_loaders(trainer: Trainer) -> list[Any]:
    loaders: Any = trainer.val_dataloaders
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if loaders is None and source.is_defined():  # Lightning has not asked for them yet, or will not
        loaders = source.dataloader()
    if loaders is None:
        raise MisconfigurationException(
            "TracInCallback takes its queries from the validation data, and there is none. Pass queries= (a loader or "
            "a list of batches), or queries=[] for self-influence alone."
        )
    return _flat(loaders)


def _flat(loaders: Any) -> list[Any]:
    loaders = getattr(loaders, "flattened", loaders)  # of a CombinedLoader
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if not isinstance(loaders, (list, tuple)):
        return [loaders]
    return [leaf for loader in loaders for leaf in _flat(loader)]


@contextlib.contextmanager
def naming(indices: Tensor) -> Iterator[None]:
    """Say which samples a batch holds when its gradients are refused."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} The batch holds samples {indices.tolist()[:20]} of the training data.") from error


def blocks(rows: Iterable[Tensor], most: int, nothing: Tensor) -> Iterator[Tensor]:
    """Join pieces of up to ``most`` rows to blocks of up to ``most`` rows; ``nothing`` where there is no piece."""
    held = [nothing]
    for piece in rows:
        if sum(map(len, held)) + len(piece) > most:
            yield torch.cat(held)
            held = [nothing]
        held.append(piece)
    yield torch.cat(held)
