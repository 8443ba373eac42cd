"""Several tasks in one fit: which one is on, and when the next begins."""

from typing import Any

from lightning_ext._lightning import MisconfigurationException, Trainer
from lightning_ext.callbacks._laftr_arguments import check_number


class Rotation:
    """The tasks of a data module take turns, so many epochs each.

    Args:
        epochs: epochs per task, at least 1.
    """

    def __init__(self, epochs: int) -> None:
        check_number("epochs_per_task", epochs, 1)
        self.epochs = epochs

    def data(self, trainer: Trainer) -> Any:
        """The Trainer's data module, which must have tasks, and loaders that are asked for anew every epoch."""
        found: Any = trainer.datamodule  # type: ignore[attr-defined]
        missing = [name for name in ("task", "num_tasks", "set_task") if not hasattr(found, name)]
        if missing:
            raise MisconfigurationException(
                f"epochs_per_task needs a data module with tasks, such as ContinualDataModule; {type(found).__name__} "
                f"has no {missing[0]}."
            )
        if trainer.reload_dataloaders_every_n_epochs != 1:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "epochs_per_task needs Trainer(reload_dataloaders_every_n_epochs=1): the next task has other data."
            )
        return found

    def check(self, trainer: Trainer) -> None:
        """Refuse to go on from a checkpoint that was made between a task's last step and its end."""
        data = self.data(trainer)
        expected = min(trainer.current_epoch // self.epochs, data.num_tasks - 1)
        if data.task != expected:
            raise MisconfigurationException(
                f"epoch {trainer.current_epoch} belongs to task {expected}, and the data module is at {data.task}. Fit "
                "from task 0 on, or from a checkpoint of ModelCheckpoint(save_on_train_epoch_end=True), which is made "
                "after a task has ended."
            )

    def next(self, trainer: Trainer) -> int | None:
        """At the end of an epoch: the task that comes next, or ``None`` where the task goes on or there is no other."""
        data, done = self.data(trainer), trainer.current_epoch + 1
        last = done == trainer.max_epochs or data.task + 1 == data.num_tasks
        return None if done % self.epochs or last else data.task + 1
