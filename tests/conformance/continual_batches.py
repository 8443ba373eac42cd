"""Batches for the metrics of function-space distance and continual learning, and what plain sums make of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ext.data import ContinualDataModule, DigitsDataModule

TASKS = 2


def outputs() -> list[tuple[Tensor, Tensor]]:
    """Outputs of two networks on uneven batches."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, generator=generator), torch.randn(n, 3, generator=generator)) for n in (4, 7, 2)]


def distance_reference(batches: Sequence[Any]) -> Tensor:
    """The mean over examples of the Kullback-Leibler divergence, old against new."""
    new, old = (torch.cat(column).double().softmax(1) for column in zip(*batches, strict=True))
    return (old * (old / new).log()).sum(1).mean()


def grouped_inputs() -> list[tuple[Tensor, Tensor]]:
    """Inputs of two groups in uneven batches."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, generator=generator) + n, torch.arange(n) % 3 // 2) for n in (9, 5, 12)]


def groups_reference(batches: Sequence[Any]) -> dict[str, Tensor]:
    """Shares and means of the groups."""
    x, groups = (torch.cat(column) for column in zip(*batches, strict=True))
    members = [x[groups == c].double() for c in (0, 1)]
    return {
        "weights": torch.tensor([len(rows) / len(x) for rows in members]),
        "means": torch.stack([rows.mean(0) for rows in members]),
    }


def tested_tasks() -> list[dict[str, Any]]:
    """Scores on each of two tasks after training on each, in uneven batches."""
    generator = torch.Generator().manual_seed(2)
    places = [(1, 1), (0, 0), (0, 1), (1, 0)]
    return [
        {
            "preds": torch.rand(4 + 3 * k, 3, generator=generator),
            "target": torch.arange(4 + 3 * k) % 3,
            "seen": seen,
            "task": task,
        }
        for k, (seen, task) in enumerate(places)
    ]


def matrix_reference(batches: Sequence[Any]) -> dict[str, Tensor]:
    """Shares of right predictions by entry."""
    matrix = torch.full((TASKS, TASKS), torch.nan, dtype=torch.float64)
    for batch in batches:  # one for each entry
        matrix[batch["seen"], batch["task"]] = (batch["preds"].argmax(1) == batch["target"]).double().mean()
    return {"cl/matrix": matrix}


def _digits() -> tuple[Any, Any]:
    """Grey values in [0, 1], as the module that is trained on them wants."""
    digits = DigitsDataModule(binarize=False)
    digits.setup()
    return digits.train_set.tensors, digits.held_out_set.tensors


def permuted() -> ContinualDataModule:
    return ContinualDataModule.permuted(*_digits(), num_tasks=3, batch_size=16, task=1)


def pairs() -> ContinualDataModule:
    return ContinualDataModule.domain_split(*_digits(), batch_size=8)
