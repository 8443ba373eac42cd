"""What is given to an influence module, looked at before anything is computed: one message for each slip."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_ext._lightning import MisconfigurationException
from lightning_ext.functional import InfluenceObjective, batch_size, evaluating, select

_DRAWING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)


def as_model(base: Any) -> nn.Module:
    """The trained network."""
    if not isinstance(base, nn.Module):
        raise ValueError(
            f"base must be a torch.nn.Module, the trained model; got {type(base).__name__}. What runs it goes into "
            "InfluenceObjective(forward=function(module, batch))."
        )
    return base


def check_batches(queries: Any, once: bool = False) -> None:
    """Refuse what holds no batches that can be gone through each time they are needed.

    Args:
        queries: loader or list of batches.
        once: whether they are needed one time only.
    """
    if isinstance(queries, Iterator) and not once:
        raise ValueError(
            f"queries are gone through more than once, and a {type(queries).__name__} gives them only once. Pass a "
            "loader, or list(queries)."
        )
    if isinstance(queries, Dataset):
        raise MisconfigurationException(
            f"queries must be batches, and a {type(queries).__name__} gives samples. Pass DataLoader(queries, "
            "batch_size=...)."
        )
    one_batch = isinstance(queries, tuple) and any(isinstance(part, Tensor) for part in queries)
    if isinstance(queries, Tensor | dict) or one_batch:
        raise MisconfigurationException(
            f"queries must be a loader or a list of batches; got a {type(queries).__name__}. If it is one batch, pass "
            "queries=[batch]."
        )


def check_queries(queries: Any) -> None:
    """Refuse batches that are none, or that come in another order each time."""
    check_batches(queries)
    sampler = getattr(getattr(queries, "batch_sampler", None), "sampler", None)
    if isinstance(sampler, _DRAWING):
        raise MisconfigurationException(
            f"The queries' loader draws its samples ({type(sampler).__name__}), which leaves nobody to say whose "
            "row of the scores is whose. Use shuffle=False and no sampler."
        )


def check_dataset(dataset: Any) -> None:
    """Refuse what has no positions and no length."""
    if not (hasattr(dataset, "__getitem__") and isinstance(dataset, Sized)):
        hint = ": pass loader.dataset" if hasattr(dataset, "dataset") else ""
        raise MisconfigurationException(
            f"dataset must be a data set with positions and a length; got {type(dataset).__name__}{hint}."
        )


def check_loader(loader: Any, world: int = 1) -> None:
    """Refuse what does not name the samples of a whole data set.

    Args:
        loader: DataLoader over the training set.
        world: number of processes that may share its samples out.
    """
    dataset = getattr(loader, "dataset", None)
    if dataset is None or not hasattr(loader, "collate_fn"):
        raise MisconfigurationException(
            f"loader must be a DataLoader over a data set with a length; got {_told(loader)}."
        )
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise MisconfigurationException(
            "Influence needs a DataLoader over a data set with a length, whose samples can be named by their "
            f"positions; got {type(loader).__name__} over {type(dataset).__name__}."
        )
    if len(dataset) == 0:
        raise ValueError("The loader's data set is empty.")
    _refuse_choosing(getattr(loader.batch_sampler, "sampler", loader.sampler), len(dataset), world)
    if loader.batch_sampler is None:
        raise MisconfigurationException(
            "With batch_size=None the data set gives whole batches, in which no sample has a position. Pass a "
            "DataLoader that makes the batches."
        )
    if not (hasattr(loader.batch_sampler, "batch_size") or isinstance(loader.batch_sampler, Sized)):
        raise MisconfigurationException(
            f"batch_sampler must have a length or a batch_size; got a {type(loader.batch_sampler).__name__}."
        )


def check_recordable(loader: Any) -> None:
    """Refuse a batch sampler that Lightning cannot wrap to note which samples are in a batch."""
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is not None and not (isinstance(sampler, Sized) and hasattr(sampler, "__dict__")):
        raise MisconfigurationException(
            "batch_sampler must have a length and take attributes, for Lightning to note in it which samples are in a "
            f"batch; got a {type(sampler).__name__}. Pass a torch.utils.data.BatchSampler, or a class of your own with "
            "__iter__ and __len__."
        )


def _told(loader: Any) -> str:
    if isinstance(loader, Dataset):
        return f"a {type(loader).__name__}: pass DataLoader(dataset, batch_size=...)"
    if isinstance(loader, list | tuple):
        return f"a {type(loader).__name__}, whose samples have no positions: put them into a data set, as TensorDataset"
    return f"a {type(loader).__name__}"


def _refuse_choosing(sampler: Any, num_samples: int, world: int) -> None:
    """Samplers that leave samples out, or repeat them, would have another data set scored than was trained on."""
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # what Lightning wraps for ranks
    if isinstance(sampler, DistributedSampler):
        return
    try:
        taken = len(sampler)
    except TypeError:
        raise MisconfigurationException(
            f"Influence is that of a whole data set, and the loader's sampler, a {type(sampler).__name__}, does not "
            f"say how many of its {num_samples} samples it takes. Give it a __len__, or pass a loader over "
            "torch.utils.data.Subset(dataset, positions)."
        ) from None
    drawn = isinstance(sampler, SubsetRandomSampler | WeightedRandomSampler) or getattr(sampler, "replacement", False)
    if drawn or not (taken == num_samples or abs(taken * world - num_samples) < world):
        raise MisconfigurationException(
            f"Influence is that of a whole data set, and the loader's {type(sampler).__name__} takes {taken} of "
            f"its {num_samples} samples. Pass a loader over torch.utils.data.Subset(dataset, positions)."
        )


class TargetCheck:
    """Refuses targets that the loss has no use for, by the samples' positions, before a kernel meets them.

    Args:
        module: the network.
        objective: its loss, outputs and targets.
    """

    def __init__(self, module: nn.Module, objective: InfluenceObjective) -> None:
        self.module, self.objective = module, objective
        self._seen: tuple[Tensor, torch.Size] | None = None  # outputs of one sample, and the shape of its targets

    @torch.no_grad()
    def __call__(self, batch: Any, positions: Tensor | None = None) -> None:
        """Look at a batch; ``positions`` are what its samples are called, default their places in it."""
        outputs = self._of_one(batch) if self._seen is None else self._seen[0]
        targets = self.objective.targets(batch)
        if self._seen is not None and self._seen[1] != targets.shape[1:]:  # sequences of another length
            outputs = self._of_one(batch)
        self._seen = outputs, targets.shape[1:]
        names = range(batch_size(batch)) if positions is None else positions.tolist()
        self.objective.check_targets(outputs, targets, names)

    def _of_one(self, batch: Any) -> Tensor:
        with evaluating(self.module):
            return self.objective.outputs(self.module, select(batch, [0]))
