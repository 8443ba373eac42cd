r"""What the accuracies of a network that learns tasks in a row say: how much it knows, forgets and transfers.

All are functions of the accuracy matrix :math:`R`, where :math:`R_{t,i}` is the accuracy on task i after training on
tasks 0 to t, of T tasks in all. An entry that was not measured is NaN, and so is what depends on it.
"""

import torch
from torch import Tensor

__all__ = ["average_accuracy", "backward_transfer", "forgetting", "forward_transfer", "learning_accuracy"]


def _matrix(accuracy: Tensor) -> Tensor:
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1] or len(accuracy) == 0:
        raise ValueError(
            f"accuracy must be (T, T), a row for each task trained on and a column for each task tested; got shape "
            f"{tuple(accuracy.shape)}."
        )
    return accuracy if accuracy.is_floating_point() else accuracy.double()


def average_accuracy(accuracy: Tensor) -> Tensor:
    r"""Accuracy over all tasks at the end.

    .. math:: A = \frac1T \sum_{i=0}^{T-1} R_{T-1,i}

    Args:
        accuracy: :math:`R`, ``(T, T)``, NaN where not measured.

    Returns:
        A scalar, of the unit of R.

    Raises:
        ValueError: If R is not square or empty.

    Source: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840, section 2, "ACC").

    >>> average_accuracy(torch.tensor([[0.9, 0.1], [0.7, 0.9]]))
    tensor(0.8000)
    """
    return _matrix(accuracy)[-1].mean()


def learning_accuracy(accuracy: Tensor) -> Tensor:
    r"""Accuracy on each task just after training on it, averaged: what the protection of old tasks costs the new ones.

    .. math:: LA = \frac1T \sum_{i=0}^{T-1} R_{i,i}

    Args:
        accuracy: :math:`R`, ``(T, T)``, NaN where not measured.

    Returns:
        A scalar, of the unit of R.

    Raises:
        ValueError: If R is not square or empty.

    Source: Riemer et al. 2019 (arXiv 1810.11910, section 5.1).

    >>> learning_accuracy(torch.tensor([[0.9, 0.1], [0.7, 0.8]]))
    tensor(0.8500)
    """
    return _matrix(accuracy).diagonal().mean()


def backward_transfer(accuracy: Tensor) -> Tensor:
    r"""How much later training moved the accuracy on earlier tasks; below 0 where it harmed them.

    .. math:: BWT = \frac{1}{T-1} \sum_{i=0}^{T-2} (R_{T-1,i} - R_{i,i})

    Args:
        accuracy: :math:`R`, ``(T, T)``, NaN where not measured.

    Returns:
        A scalar, of the unit of R; NaN for one task.

    Raises:
        ValueError: If R is not square or empty.

    Source: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840, section 2).

    >>> backward_transfer(torch.tensor([[0.9, 0.1], [0.7, 0.8]]))
    tensor(-0.2000)
    """
    accuracy = _matrix(accuracy)
    return (accuracy[-1, :-1] - accuracy.diagonal()[:-1]).mean()


def forgetting(accuracy: Tensor) -> Tensor:
    r"""How far the accuracy on earlier tasks fell below the best it had been.

    .. math:: F = \frac{1}{T-1} \sum_{i=0}^{T-2} \bigl( \max_{k < T-1} R_{k,i} - R_{T-1,i} \bigr)

    It equals minus the backward transfer unless the accuracy on some task rose after training on it, or was higher
    before.

    Args:
        accuracy: :math:`R`, ``(T, T)``, NaN where not measured. The maximum takes what was measured before training on
            task i (k < i), and needs all from then on.

    Returns:
        A scalar, of the unit of R; NaN for one task.

    Raises:
        ValueError: If R is not square or empty.

    Source: Chaudhry et al. 2018 (arXiv 1801.10112, section 4, definition 2).

    >>> forgetting(torch.tensor([[0.5, 0.1, 0.1], [0.9, 0.8, 0.1], [0.6, 0.7, 0.9]]))
    tensor(0.2000)
    """
    accuracy = _matrix(accuracy)
    earlier = accuracy[:-1, :-1]
    if len(earlier) == 0:
        return accuracy.new_tensor(torch.nan)
    before = torch.ones_like(earlier, dtype=torch.bool).triu(1)
    best = torch.where(before & earlier.isnan(), -torch.inf, earlier).amax(0)
    return (best - accuracy[-1, :-1]).mean()


def forward_transfer(accuracy: Tensor, baseline: Tensor) -> Tensor:
    r"""How much the tasks before helped with a task that was not yet trained on.

    .. math:: FWT = \frac{1}{T-1} \sum_{i=1}^{T-1} (R_{i-1,i} - b_i)

    Args:
        accuracy: :math:`R`, ``(T, T)``, NaN where not measured.
        baseline: :math:`b`, ``(T,)``, accuracy on each task of the network before any training; the first does not
            count.

    Returns:
        A scalar, of the unit of R; NaN for one task.

    Raises:
        ValueError: If R is not square or empty, or the baseline is not one number for each task.

    Source: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840, section 2).

    >>> forward_transfer(torch.tensor([[0.9, 0.4], [0.7, 0.8]]), torch.tensor([0.1, 0.1]))
    tensor(0.3000)
    """
    accuracy = _matrix(accuracy)
    if baseline.shape != accuracy.shape[:1]:
        raise ValueError(
            f"baseline must have shape ({len(accuracy)},), an accuracy for each task; got {tuple(baseline.shape)}."
        )
    return (accuracy.diagonal(1) - baseline[1:].to(accuracy)).mean()
