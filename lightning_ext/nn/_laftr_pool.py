"""The distances of several tasks from one reference, of inputs that are drawn and run together."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ext.functional import InputModel, output_divergence
from lightning_ext.nn._laftr_ahead import Address, DrawnChain, Rows
from lightning_ext.nn._laftr_network import weight_of
from lightning_ext.nn._laftr_sums import joined
from lightning_ext.nn.laftr import FunctionSpaceEstimator, MeanDistance


class PooledLAFTR(MeanDistance):
    """Several tasks with one reference: the inputs of all are drawn and run together."""

    estimators: list[Any]

    def __init__(self, estimators: Sequence[FunctionSpaceEstimator]) -> None:
        super().__init__(estimators)
        self._first = max(self.estimators, key=lambda each: each._facts["outputs"])
        alike: dict[str, list[Any]] = {}
        for each in self.estimators:
            size = tuple(each._kept["statistics.second"].shape[1:])
            alike.setdefault(repr((each._facts, size, each.covariance, each.divergence)), []).append(each)
        self._parts = [
            (
                parts[0],
                len(parts) / len(estimators),
                InputModel.mean_of([p.statistics.finalise(p.jitter) for p in parts]),
            )
            for parts in alike.values()
        ]
        kinds = {repr((part._facts["outputs"], part._facts["heads"], part.divergence)) for part, _, _ in self._parts}
        self._alike, self._ahead = len(kinds) == 1, DrawnChain()

    def distance(self, module: nn.Module) -> Tensor:
        """The mean of the tasks' distances, from as many inputs in all as one task has."""
        first = self._first
        found = None
        if self._alike:
            found = self._ahead.distance(first, module, self._rows, self.address)
        if found is None:
            with first._quiet(module):
                first._require_same(module)
                found = self._run(module)
        self._draws += 1
        return found

    def _drawn(self, module: nn.Module, addresses: Sequence[Address]) -> list[Rows]:
        weight, num = weight_of(module), self._first.num_samples
        self._parts = [(part, share, model.to(weight)) for part, share, model in self._parts]
        rows = []
        for number, (part, share, model) in enumerate(self._parts):
            own = [(0,) if part.fixed_draws else (*stream, number, position) for *stream, position in addresses]
            rows.append(part.drawn(model, math.ceil(num * share), own)[0])
        return rows

    def _rows(self, module: nn.Module, addresses: Sequence[Address]) -> Rows:
        drawn = self._drawn(module, addresses)
        weights = [share * rows.weights for rows, (_, share, _) in zip(drawn, self._parts, strict=True)]
        given = [torch.cat(each, dim=1) for each in zip(*(rows.gates for rows in drawn), strict=True)]
        return Rows(torch.cat([rows.x for rows in drawn], dim=1), torch.cat(weights), given)

    def _run(self, module: nn.Module) -> Tensor:
        first, drawn = self._first, self._drawn(module, [self.address])
        sites = [part.given(module, rows) for rows, (part, _, _) in zip(drawn, self._parts, strict=True)]
        given = None if first.mode == "relu" else joined(sites)
        old, new = first.replay(module, torch.cat([rows.x[0] for rows in drawn]), given)
        sizes = [len(rows.weights) for rows in drawn]
        found = []
        for (part, share, _), rows, z1, z0 in zip(
            self._parts, drawn, torch.split(new, sizes), torch.split(old, sizes), strict=True
        ):
            z1, z0 = (z[..., : part._facts["outputs"]] for z in (z1, z0))  # those that there were
            found.append(share * output_divergence(z1, z0, part.divergence, part.heads, rows.weights))
        return torch.stack(found).sum()
