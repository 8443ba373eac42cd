"""Does a crashed and resumed training end as if nothing had happened? :func:`assert_resumes`."""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import default_collate

from lightning_ext._lightning import Callback, LightningModule, Trainer, submodule
from lightning_ext._testing.bitwise import first_difference, fit, quiet_trainer, seeded

__all__ = ["StatefulLoader", "assert_resumes"]


class StatefulLoader:
    """A loader that can stop and go on in the middle of an epoch, for bit-equal resumption.

    The order of epoch ``e`` is a permutation drawn from ``seed + e`` alone, so it depends neither on the global random
    state nor on what ran before. Lightning saves and restores any loader that has ``state_dict`` and
    ``load_state_dict``; a plain ``DataLoader`` has neither (see :func:`assert_resumes`).

    Args:
        dataset: a map-style dataset (``len`` and integer indexing).
        batch_size: samples in a batch, at least 1; default 4. A smaller last batch is kept.
        shuffle: permute every epoch anew; default True.
        seed: seed of the permutations; default 0.

    Note:
        For one process: it is not sharded over ranks.

    >>> loader = StatefulLoader(range(6), batch_size=2)
    >>> first, *rest = [batch.tolist() for batch in loader]
    >>> half = iter(loader)
    >>> next(half).tolist() == first
    True
    >>> state = loader.state_dict()
    >>> resumed = StatefulLoader(range(6), batch_size=2)
    >>> resumed.load_state_dict(state)
    >>> [batch.tolist() for batch in resumed] == rest
    True
    """

    def __init__(self, dataset: Any, batch_size: int = 4, *, shuffle: bool = True, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        self.items, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self._epoch, self._position, self._resumed = 0, 0, False

    @property
    def sampler(self) -> "StatefulLoader":
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls it at the start of every epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return -(-len(self.items) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch, or go on with the one that was loaded."""
        if not self._resumed or self._position >= len(self):
            self._position = 0
        self._resumed = False
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        # The order is drawn at the first batch: Lightning makes the iterator before it says which epoch it is.
        order = torch.arange(len(self.items))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed + self._epoch))
        while self._position < len(self):
            start = self._position * self.batch_size
            self._position += 1
            yield default_collate([self.items[int(i)] for i in order[start : start + self.batch_size]])

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Make the next iteration go on where ``state_dict`` was taken."""
        self._epoch, self._position, self._resumed = state_dict["epoch"], state_dict["position"], True


_NOT_RESTORED = (
    " Lightning never restored the training loader: something asked for the loader before the checkpoint was loaded, "
    "for example trainer.estimated_stepping_batches in configure_optimizers. Read it in on_train_start or later."
)


class _CrashError(Exception):
    """The accident that :func:`assert_resumes` stages."""


class _CrashAt(Callback):
    def __init__(self, epoch: int, batch: int, *, mid_epoch: bool) -> None:
        self.epoch, self.batch, self.mid_epoch = epoch, batch, mid_epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) != (self.epoch, self.batch):
            return
        if self.mid_epoch:
            apply_to_collection(trainer.train_dataloader, object, _check_resumable)
        raise _CrashError


def _check_resumable(loader: Any) -> None:
    if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
        raise ValueError(
            f"assert_resumes: {type(loader).__name__} has no state_dict/load_state_dict, so Lightning starts it over "
            "when it resumes in the middle of an epoch and the result cannot be bit-equal. Use StatefulLoader, or "
            'checkpoint="epoch".'
        )


def assert_resumes(
    module_factory: Callable[[], LightningModule],
    data_factory: Callable[[], Any],
    callbacks_factory: Callable[[], list[Callback]] = list,
    *,
    max_epochs: int = 2,
    crash_at: tuple[int, int] = (1, 1),
    checkpoint: Literal["step", "epoch"] = "step",
    compare: Sequence[str] | None = None,
    seed: int = 0,
    **trainer_kwargs: Any,
) -> None:
    """Assert that a training that crashed and was resumed ends like one that never stopped, to the last bit.

    Three trainings with fresh objects: one to the end; one that crashes after the optimiser step of ``crash_at`` and
    before that step is saved; one resumed from the last checkpoint, loaded with ``weights_only=True``. The resumed
    training starts from **another global seed**, because Lightning's checkpoints do not hold the global random state:
    a component that draws from it, ``nn.Dropout`` included, is caught. What must be random carries its own
    ``torch.Generator`` and saves ``get_state()``, or derives its seed from the step.

    Args:
        module_factory: builds the module.
        data_factory: builds a training loader, a ``(train, val)`` tuple or a data module.
        callbacks_factory: builds the callbacks, anew for each training; default none.
        max_epochs: length of the training; default 2.
        crash_at: (epoch, batch), both from 0, at which the crash happens; default (1, 1).
        checkpoint: ``"step"`` saves after every optimiser step, so that training resumes in the middle of an epoch
            unless ``crash_at`` is the first batch; ``"epoch"`` saves at the end of epochs. Default ``"step"``.
        compare: parts of the checkpoint to compare, for example ``("state_dict", "callbacks")``; default all:
            parameters and buffers, optimiser and scheduler states, callback, precision and data module states,
            hyperparameters, ``epoch`` and ``global_step``.
        seed: global seed of the first two trainings; the third has another. Default 0.
        **trainer_kwargs: further Trainer arguments.

    Raises:
        AssertionError: naming the first value that differs.
        ValueError: if no crash happened, none was preceded by a checkpoint, or a training loader that cannot be saved
            is asked to resume in the middle of an epoch.

    Note:
        What Lightning 2.6 does on resumption, and what that asks of a component:

        - In the middle of an epoch a plain ``DataLoader`` starts over: the remaining number of batches is drawn from
          the *beginning* of a new pass, so some samples come twice and some never. A loader with ``state_dict`` and
          ``load_state_dict`` (:class:`StatefulLoader`, torchdata's ``StatefulDataLoader``) is put back in place, but
          only in the middle of an epoch: after an end-of-epoch checkpoint its state is not loaded, so the order must
          follow from ``set_epoch``, which Lightning calls on ``loader.sampler``.
        - That restoration is skipped without a word if the loader has been asked for before: in 2.6.6
          ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` (or in ``setup``) does so. Read it in
          ``on_train_start`` or later.
        - A shuffled ``DataLoader`` without its own generator takes its order from the global random state.
        - ``ModelCheckpoint`` saves inside ``on_train_batch_end``, after all other callbacks and before the module's
          own ``on_train_batch_end``: state that the module changes there is one step late in the checkpoint.
        - A checkpoint made at the last step of an epoch skips that epoch's ``on_train_epoch_end`` hooks on
          resumption. Keep ``crash_at`` off batch 0 with ``checkpoint="step"``.
        - Running means of ``log(on_epoch=True)`` are not saved: the epoch of the crash logs other means.
    """
    expected, _ = _train(module_factory, data_factory, callbacks_factory(), seed, max_epochs, trainer_kwargs)
    with tempfile.TemporaryDirectory() as folder:
        when = {"every_n_train_steps": 1} if checkpoint == "step" else {"save_on_train_epoch_end": True}
        model_checkpoint = submodule("callbacks").ModelCheckpoint
        saver = model_checkpoint(dirpath=folder, filename="{step}", **when)
        mid_epoch = checkpoint == "step" and crash_at[1] > 0
        crashing = [*callbacks_factory(), _CrashAt(*crash_at, mid_epoch=mid_epoch), saver]
        keep = {**trainer_kwargs, "enable_checkpointing": True}
        try:
            _train(module_factory, data_factory, crashing, seed, max_epochs, keep)
        except _CrashError:
            pass
        else:
            raise ValueError(f"assert_resumes: training ended without reaching crash_at={crash_at}.")
        if not saver.best_model_path:
            raise ValueError(f"assert_resumes: nothing was saved before crash_at={crash_at}; crash later.")
        resumed, loader_restored = _train(
            module_factory,
            data_factory,
            [*callbacks_factory(), model_checkpoint(dirpath=folder, filename="{step}", **when)],
            seed + 1,
            max_epochs,
            keep,
            ckpt_path=saver.best_model_path,
            weights_only=True,
        )
    for part in compare or [*expected, *(part for part in resumed if part not in expected)]:
        if found := first_difference(expected.get(part), resumed.get(part), part):
            hint = _NOT_RESTORED if mid_epoch and not loader_restored else ""
            raise AssertionError(
                f"assert_resumes: the resumed training differs from the uninterrupted one in {found}.{hint}"
            )


def _train(
    module_factory: Callable[[], LightningModule],
    data_factory: Callable[[], Any],
    callbacks: list[Callback],
    seed: int,
    max_epochs: int,
    trainer_kwargs: Mapping[str, Any],
    **fit_kwargs: Any,
) -> tuple[dict[str, Any], bool]:
    """Train; return what a checkpoint of the end holds, less the saver's record and the loop counters.

    The second value is False if Lightning still holds a loader state that it should have loaded.
    """
    with seeded(seed), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")  # as it does for a resumed run
        trainer = quiet_trainer(callbacks, {**trainer_kwargs, "max_epochs": max_epochs})
        fit(trainer, module_factory(), data_factory(), **fit_kwargs)
        path = Path(folder, "end.ckpt")
        trainer.save_checkpoint(path)
        end: dict[str, Any] = torch.load(path, weights_only=True)
    end["callbacks"] = {k: v for k, v in end.get("callbacks", {}).items() if not k.startswith("ModelCheckpoint")}
    waiting = getattr(trainer.fit_loop, "_combined_loader_states_to_load", None)
    return {key: value for key, value in end.items() if key != "loops"}, not waiting
