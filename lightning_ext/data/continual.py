"""Tasks that come one after the other, each with its own training and test data."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ext.data._arrays import PermutedImages
from lightning_ext.data.digits import DigitsDataModule
from lightning_ext.data.resumable import ResumableDataModule

__all__ = ["ContinualDataModule"]

Pair = tuple[Tensor, Tensor]
Source = Literal["digits"] | Pair
Heads = slice | list[int] | None


class ContinualDataModule(ResumableDataModule):
    """A row of tasks; its loaders are those of the current one.

    ``set_task(i)`` chooses the task of the next fit. Builders make the usual scenarios from any images and labels, or
    from the 8 x 8 digits bundled with scikit-learn (:class:`DigitsDataModule`, 1,400 training and 397 test images, grey
    values less their mean over their standard deviation): :meth:`permuted`, :meth:`split`, :meth:`domain_split`. On the
    command line a builder is a class path,
    ``--data lightning_ext.data.ContinualDataModule.permuted --data.num_tasks 5 --data.task 2``.

    Args:
        tasks: for each task ``(train, test)`` or ``(train, test, heads)``. The first two are datasets, or tuples of
            tensors of equal length; ``heads`` indexes the outputs that the task uses (slice or list, default all).
        batch_size: samples per batch and rank.
        task: the task to begin with, from 0 to T - 1.
        num_workers: workers of the loaders.
        seed: seed of the training order, see :class:`ResumableDataModule`.

    Attributes:
        train_sets: the tasks' training sets.
        test_sets: the tasks' test sets.

    Raises:
        ValueError: there is no task, one is not of this form or empty, or a number is out of range.

    >>> x, t = torch.rand(8, 4), torch.tensor([0, 1, 2, 3] * 2)
    >>> data = ContinualDataModule.split((x, t), (x, t), classes=2)
    >>> data.set_task(1)
    >>> data.num_tasks, data.heads(1), data.train_sets[1].tensors[1]
    (2, slice(2, 4, None), tensor([2, 3, 2, 3]))

    Note:
        Validation, test and predict loaders all give the current task's test set: choose nothing on validation that you
        then report on test. Checkpoints keep the current task, and a resumed fit goes on with it.
    """

    def __init__(
        self,
        tasks: Sequence[Sequence[Any]],
        batch_size: int = 32,
        task: int = 0,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        if not _whole(batch_size):
            raise ValueError(f"batch_size must be a whole number; got {batch_size!r}.")
        super().__init__(batch_size, num_workers, seed)
        self.save_hyperparameters(ignore=["tasks"])
        if isinstance(tasks, str) or not isinstance(tasks, Sequence) or len(tasks) == 0:
            raise ValueError(f"tasks must hold a pair (train, test) for each task; got {tasks!r}.")
        entries = [_entry(i, entry) for i, entry in enumerate(tasks)]
        self.train_sets = [train for train, _, _ in entries]
        self.test_sets = [test for _, test, _ in entries]
        self._heads = [heads for _, _, heads in entries]
        self.set_task(task)

    @classmethod
    def permuted(
        cls,
        data: Source = "digits",
        test: Pair | None = None,
        num_tasks: int = 5,
        batch_size: int = 32,
        task: int = 0,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> "ContinualDataModule":
        """The same images in every task, with their pixels in another order; all outputs are shared.

        Task 0 keeps the order; that of task i is ``torch.randperm`` with seed i, on the CPU.

        Args:
            data: training images ``(N, ...)`` and labels ``(N,)``, or ``"digits"``.
            test: the same for testing; not with ``"digits"``, which has its own.
            num_tasks: T, at least 1.
            batch_size: as in the class; so are ``task``, ``num_workers`` and ``seed``.
            task: see there.
            num_workers: see there.
            seed: see there.

        Raises:
            ValueError: an argument is out of range, or images and labels do not match.
            ModuleNotFoundError: ``"digits"`` without scikit-learn.

        Source: Goodfellow et al. 2013 (arXiv 1312.6211).

        Note:
            Pixels are permuted as they are read, so T tasks take the memory of one.
        """
        if not _whole(num_tasks) or num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1; got {num_tasks}.")
        pairs = _pairs(data, test)
        tasks: list[list[Dataset[Any]]] = [[TensorDataset(*pair) for pair in pairs]]
        for number in range(1, num_tasks):
            size = pairs[0][0][0].numel()
            order = torch.randperm(size, generator=torch.Generator().manual_seed(number))
            tasks.append([PermutedImages(*pair, order) for pair in pairs])
        return cls(tasks, batch_size, task, num_workers, seed)

    @classmethod
    def split(
        cls,
        data: Source = "digits",
        test: Pair | None = None,
        classes: int | list[list[int]] = 2,
        batch_size: int = 32,
        task: int = 0,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> "ContinualDataModule":
        """Disjoint sets of classes, with the outputs of each as its heads; labels keep their numbers.

        With heads (task-incremental) the loss of task i is that of ``outputs[:, heads]`` against the label's place
        among them, ``labels - heads.start`` for neighbouring classes; without (class-incremental), that of all outputs.

        Args:
            data: training images ``(N, ...)`` and labels ``(N,)``, or ``"digits"``.
            test: the same for testing; not with ``"digits"``, which has its own.
            classes: how many classes a task has, taken in increasing order, or the classes of each task.
            batch_size: as in the class; so are ``task``, ``num_workers`` and ``seed``.
            task: see there.
            num_workers: see there.
            seed: see there.

        Raises:
            ValueError: an argument is out of range, or images and labels do not match.
            ModuleNotFoundError: ``"digits"`` without scikit-learn.

        Source: Zenke et al. 2017 (arXiv 1703.04200, section 5).
        """
        train, held_out = _pairs(data, test)
        groups = _groups(train[1], classes)
        if min(map(min, groups)) < 0:
            raise ValueError(f"labels must be at least 0, since they number the outputs of the network; got {groups}.")
        _check_test_classes(train[1], held_out[1])
        parts = ([_only(pair, group) for pair in (train, held_out)] for group in groups)
        tasks = [(*part, _index(group)) for part, group in zip(parts, groups, strict=True)]
        return cls(tasks, batch_size, task, num_workers, seed)

    @classmethod
    def domain_split(
        cls,
        data: Source = "digits",
        test: Pair | None = None,
        classes: int | list[list[int]] = 2,
        batch_size: int = 32,
        task: int = 0,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> "ContinualDataModule":
        """Disjoint sets of classes that share their outputs: the label is the class's place in its set.

        With ``"digits"`` and pairs the label is the parity, of 0 and 1 in task 0, of 2 and 3 in task 1, and so on.

        Args:
            data: training images ``(N, ...)`` and labels ``(N,)``, or ``"digits"``.
            test: the same for testing; not with ``"digits"``, which has its own.
            classes: how many classes a task has, at least 2, taken in increasing order, or the classes of each task.
            batch_size: as in the class; so are ``task``, ``num_workers`` and ``seed``.
            task: see there.
            num_workers: see there.
            seed: see there.

        Raises:
            ValueError: an argument is out of range, or images and labels do not match.
            ModuleNotFoundError: ``"digits"`` without scikit-learn.

        Source: van de Ven and Tolias 2019 (arXiv 1904.07734, "domain-incremental").
        """
        pairs = _pairs(data, test)
        groups = _groups(pairs[0][1], classes)
        _check_test_classes(pairs[0][1], pairs[1][1])
        if min(map(len, groups)) < 2:
            raise ValueError(f"classes must give each task two classes or more to tell apart; got {groups}.")
        tasks = [[_only(pair, group, renumber=True) for pair in pairs] for group in groups]
        return cls(tasks, batch_size, task, num_workers, seed)

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.train_sets)

    @property
    def task(self) -> int:
        """The current task, from 0 to T - 1."""
        return self._task

    def set_task(self, task: int) -> None:
        """Choose the current task; loaders that were handed out before stay with theirs.

        Raises:
            ValueError: there is no such task.
        """
        self._task = self._known(task)

    def heads(self, task: int) -> Heads:
        """The outputs that a task uses, an index into the last dimension; None for all."""
        return self._heads[self._known(task)]

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training samples of the current task."""
        return self.loader(self.train_sets[self.task], shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Test samples of the current task."""
        return self.dataloader_of(self.task)

    def test_dataloader(self) -> DataLoader[Any]:
        """The same."""
        return self.dataloader_of(self.task)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The same."""
        return self.dataloader_of(self.task)

    def dataloader_of(self, task: int) -> DataLoader[Any]:
        """Test samples of any task.

        Raises:
            ValueError: there is no such task.
        """
        return self.loader(self.test_sets[self._known(task)])

    def seen_dataloaders(self) -> list[DataLoader[Any]]:
        """Test samples of tasks 0 to the current one, a loader for each: ``trainer.test(model, these)``."""
        return [self.dataloader_of(task) for task in range(self.task + 1)]

    def state_dict(self) -> dict[str, Any]:
        """The seed of the order and the current task."""
        return {**super().state_dict(), "task": self.task}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the order and the task of the interrupted run."""
        super().load_state_dict(state_dict)
        self.set_task(state_dict["task"])

    def _known(self, task: int) -> int:
        if not _whole(task) or not 0 <= task < self.num_tasks:
            raise ValueError(f"task must lie between 0 and {self.num_tasks - 1}; got {task}.")
        return int(task)


def _entry(place: int, entry: Sequence[Any]) -> tuple[Dataset[Any], Dataset[Any], Heads]:
    if not isinstance(entry, list | tuple) or len(entry) not in (2, 3):
        raise ValueError(f"task {place} must be (train, test) or (train, test, heads); got {entry!r:.80}.")
    train, test = (_dataset(place, name, part) for name, part in zip(("train", "test"), entry, strict=False))
    heads = entry[2] if len(entry) == 3 else None
    if not (
        heads is None or isinstance(heads, slice) or (isinstance(heads, list) and heads and all(map(_whole, heads)))
    ):
        raise ValueError(f"heads of task {place} must be a slice, a list of outputs, or None for all; got {heads!r}.")
    return train, test, heads


def _whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _dataset(place: int, name: str, part: Any) -> Dataset[Any]:
    if isinstance(part, list | tuple):
        if not all(isinstance(tensor, Tensor) for tensor in part) or len({len(tensor) for tensor in part}) != 1:
            raise ValueError(f"{name} of task {place} must be a dataset, or a tuple of tensors of equal length.")
        part = TensorDataset(*part)
    indexable = hasattr(part, "__getitem__") and hasattr(part, "__len__") and not isinstance(part, Tensor)
    if not indexable or len(part) == 0:
        raise ValueError(
            f"{name} of task {place} must be a dataset with positions and at least one sample; got {part!r:.80}."
        )
    return part  # type: ignore[no-any-return]


def _check_test_classes(train: Tensor, test: Tensor) -> None:
    unknown = sorted(set(test.tolist()) - set(train.tolist()))
    if unknown:
        raise ValueError(f"test has images of {unknown}, classes that no training image has: they belong to no task.")


def _pairs(data: Source, test: Pair | None) -> tuple[Pair, Pair]:
    if isinstance(data, str):
        if data != "digits" or test is not None:
            raise ValueError(
                f"data must be 'digits', which brings its own test set, or (images, labels) with test=(images, "
                f"labels); got {data!r} with test={'None' if test is None else '(images, labels)'}."
            )
        digits = DigitsDataModule(binarize=False)
        digits.setup()
        (images, labels), (held_out, truth) = digits.train_set.tensors, digits.held_out_set.tensors  # type: ignore[union-attr]
        mean, deviation = images.mean(), images.std()
        return ((images - mean) / deviation, labels), ((held_out - mean) / deviation, truth)
    if test is None:
        raise ValueError("test must be (images, labels) where data are: what is not trained on is not known from them.")
    for name, pair in (("data", data), ("test", test)):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
            raise ValueError(f"{name} must be a pair of tensors, (images, labels); got {pair!r:.80}.")
        images, labels = pair
        if len(images) == 0:
            raise ValueError(f"{name} must hold at least one image.")
        if (
            labels.shape != images.shape[:1]
            or labels.is_floating_point()
            or labels.dtype == torch.bool
            or images.shape[1:] != data[0].shape[1:]
        ):
            raise ValueError(
                f"{name} must be images (N, ...) of one shape for training and test, and whole labels (N,); got "
                f"{tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}."
            )
    return data, test


def _groups(labels: Tensor, classes: int | Sequence[Sequence[int]]) -> list[list[int]]:
    known = sorted(set(labels.tolist()))
    if not (_whole(classes) or _lists(classes)):
        raise ValueError(
            f"classes must be a whole number, or a list with the list of classes of each task; got {classes!r}."
        )
    if isinstance(classes, int):
        if classes < 1 or len(known) % classes:
            raise ValueError(
                f"classes must divide the {len(known)} classes of the labels into equal parts; got {classes}."
            )
        return [known[i : i + classes] for i in range(0, len(known), classes)]
    groups = [list(group) for group in classes]
    named = [label for group in groups for label in group]
    if not all(groups) or len(set(named)) < len(named) or not set(named) <= set(known):
        raise ValueError(f"classes must be disjoint lists of the labels {known}, none of them empty; got {groups}.")
    return groups


def _lists(groups: Any) -> bool:
    return isinstance(groups, Sequence) and all(isinstance(group, list | tuple) for group in groups)


def _only(pair: Pair, group: list[int], renumber: bool = False) -> TensorDataset:
    images, labels = pair
    chosen = labels.unsqueeze(1) == torch.tensor(group, device=labels.device)
    rows, places = chosen.nonzero(as_tuple=True)
    return TensorDataset(images[rows], places if renumber else labels[rows])


def _index(group: list[int]) -> slice | list[int]:
    first = group[0]
    return slice(first, first + len(group)) if group == list(range(first, first + len(group))) else group
