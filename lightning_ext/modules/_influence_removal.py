"""Which samples each copy of a network is trained without, and where fresh copies start."""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ext._lightning import MisconfigurationException
from lightning_ext.data import IndexedDataset
from lightning_ext.functional import (
    InfluenceObjective,
    ParameterView,
    RemovalTerm,
    removal_gradients,
    removal_losses,
    seeded_draws,
    select_traced,
)
from lightning_ext.modules._influence_data import Shard

Groups = Sequence[int | Sequence[int]]


def as_groups(remove: Groups | Tensor) -> list[list[int]]:
    """One list of positions per copy; an integer is a group of one."""
    entries = remove.tolist() if isinstance(remove, Tensor) else list(remove)
    groups = [_as_group(entry) for entry in entries]
    for g, group in enumerate(groups):
        if len(set(group)) < len(group) or any(i < 0 for i in group):
            raise ValueError(f"remove[{g}] must name samples from 0 on, each at most once; got {group[:20]}.")
    if not groups:
        raise ValueError("remove must name at least one sample or group; got none.")
    return groups


def _as_group(entry: Any) -> list[int]:
    try:
        return [operator.index(entry)]  # numbers of NumPy and tensors of one element too
    except TypeError:
        return [operator.index(i) for i in entry]


def as_masks(keep: Sequence[Sequence[int]] | Tensor) -> Tensor | list[list[int]]:
    """A mask ``(G, N)``, or the kept positions where N is not known yet."""
    if isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.ndim == 2:
        if not bool(keep.any(1).all()):
            raise ValueError(f"keep[{int((~keep.any(1)).nonzero()[0])}] keeps no sample.")
        return keep
    if isinstance(keep, Tensor):
        raise ValueError(f"keep must be a boolean (G, N) mask or lists of positions; got {keep.dtype} {keep.shape}.")
    groups = [[int(i) for i in group] for group in keep]
    if not groups or not all(groups):
        raise ValueError("keep must name at least one sample for each copy.")
    return groups


def sample_weights(keep: Tensor | list[list[int]], num_samples: int) -> Tensor:
    """``(G, N)`` weights whose mean over all samples is 1: a kept sample counts N / (number kept)."""
    if isinstance(keep, list):
        mask = torch.zeros(len(keep), num_samples, dtype=torch.bool)
        for g, group in enumerate(keep):
            if not all(0 <= i < num_samples for i in group):
                raise ValueError(f"keep[{g}] must name samples 0 to {num_samples - 1}; got {group[:20]}.")
            mask[g, group] = True
        keep = mask
    if keep.shape[1] != num_samples:
        raise ValueError(f"keep has {keep.shape[1]} columns, but the training data set has {num_samples} samples.")
    return keep * (num_samples / keep.sum(1, keepdim=True))


def removal_term(
    groups: list[list[int]], shard: Shard, module: nn.Module, view: ParameterView, objective: InfluenceObjective
) -> RemovalTerm | None:
    """Fetch the removed samples once, and say which copy is without which."""
    unique = sorted({i for group in groups for i in group})
    if not unique:
        return None
    batch = shard.get(unique)
    place = {sample: row for row, sample in enumerate(unique)}
    width = max(map(len, groups))
    index = torch.zeros(len(groups), width, dtype=torch.long)
    weights = torch.zeros(len(groups), width, dtype=view.dtype)
    for g, group in enumerate(groups):
        index[g, : len(group)] = torch.tensor([place[i] for i in group], dtype=torch.long)
        weights[g, : len(group)] = 1 / shard.num_samples

    def function(params: Any, chosen: Tensor) -> Tensor:
        return objective.function(module, view, select_traced(batch, chosen))(params)

    targets = objective.targets(batch)
    return RemovalTerm(function, targets, index.to(view.device), weights.to(view.device))


class Removal:
    """What one fit knows of the samples that its copies do without.

    Args:
        groups: positions removed from each copy.
        keep: mask or positions that each copy is trained on, or None for all.
        shard: this rank's part of the training data set.
        module: the trained network.
        view: its parameters.
        objective: its loss, outputs and targets.
        chunk_size: copies at once.

    Attributes:
        term: the removed samples, None if there are none.
        per_sample: ``(G,)``, from a removal term to the mean loss of a removed sample.
        gradient_norm: ``(G,)``, norm of the removed samples' part of the training gradient at the trained network.
    """

    def __init__(
        self,
        groups: list[list[int]],
        keep: Tensor | list[list[int]] | None,
        shard: Shard,
        module: nn.Module,
        view: ParameterView,
        objective: InfluenceObjective,
        chunk_size: int | None,
    ) -> None:
        self.shard, self._loss, self._reference, self._chunk = shard, objective.loss, view.values(), chunk_size
        self.gradient_norm = torch.zeros(len(groups), dtype=view.dtype, device=view.device)
        self._weights: Tensor | None = None
        if keep is not None:
            if not isinstance(shard.dataset, IndexedDataset):
                raise MisconfigurationException(
                    "keep weighs each sample by its position: train on a loader over IndexedDataset(dataset)."
                )
            self._weights = sample_weights(keep, shard.num_samples).to(self.gradient_norm)
        self.term = removal_term(groups, shard, module, view, objective)
        self.per_sample = self.gradient_norm.new_tensor([shard.num_samples / max(1, len(g)) for g in groups])
        if self.term is not None:
            gradients = removal_gradients(self._loss, self._reference, self.term, chunk_size=chunk_size)
            self.gradient_norm = torch.linalg.vector_norm(view.flatten(gradients), dim=1)
            nothing = {k: v.expand(len(groups), *v.shape) * 0 for k, v in self._reference.items()}
            self._losses = self._mean_losses(self.term, nothing)

    def weights_of(self, index: Tensor | int) -> Tensor | None:
        """Weights ``(G, B)`` of a batch's samples, None where all count alike."""
        return None if self._weights is None else self._weights[:, torch.as_tensor(index, device=self._weights.device)]

    def _mean_losses(self, term: RemovalTerm, change: Mapping[str, Tensor]) -> Tensor:
        losses = removal_losses(self._loss, change, self._reference, term, chunk_size=self._chunk)
        return losses * self.per_sample

    def risen(self, change: Mapping[str, Tensor]) -> list[int]:
        """Copies in which the removed samples' loss grew more than tenfold.

        A loss far below the others' may grow so without meaning anything: it is compared with their mean then.
        """
        if self.term is None:
            return []
        limit = 10 * self._losses.clamp(min=self._losses.mean().item())
        risen: list[int] = (self._mean_losses(self.term, change) > limit).nonzero().flatten().tolist()
        return risen


def fresh_parameters(
    module: nn.Module, view: ParameterView, seed: int, initialize: Callable[[nn.Module], Any] | None
) -> dict[str, Tensor]:
    """Initial values of the chosen parameters, drawn from ``seed``; the global generator is left alone."""
    fresh = copy.deepcopy(module)
    with seeded_draws(seed, view.device):
        if initialize is not None:
            initialize(fresh)
        else:
            _reset(fresh, view)
    return {name: fresh.get_parameter(name).detach() for name in view.names}


def _reset(module: nn.Module, view: ParameterView) -> None:
    names = ("reset_parameters", "_reset_parameters")
    for name in view.names:
        owner = module.get_submodule(name.rpartition(".")[0])
        if not any(hasattr(owner, method) for method in names):
            raise ValueError(
                f"a cold start draws fresh parameters with reset_parameters(), which {type(owner).__name__}, the owner "
                f"of {name!r}, does not have. Pass initialize=function(module) that draws them in place."
            )
    for part in module.modules():
        for method in names:
            if hasattr(part, method):
                getattr(part, method)()
                break


def starting_change(
    module: nn.Module, view: ParameterView, seeds: list[int], initialize: Callable[[nn.Module], Any] | None
) -> Tensor:
    """Distances ``(len(seeds), D)`` of fresh parameters from the module's own."""
    reference = view.flatten(view.values())
    drawn = {seed: view.flatten(fresh_parameters(module, view, seed, initialize)) - reference for seed in set(seeds)}
    return torch.stack([drawn[seed] for seed in seeds])
