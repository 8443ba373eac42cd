"""Training loops that take turns: each runs in a thread of its own, so many steps at a time."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytorch_lightning as pl
from torch.utils.data import DataLoader

Run = Callable[[int], None]


def trainer(*callbacks: pl.Callback) -> pl.Trainer:
    """One that goes on until it is stopped, and shows nothing."""
    return pl.Trainer(
        accelerator="cpu", devices=1, max_steps=-1, max_epochs=-1, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


class Turns:
    """Lets a loop go a given number of steps at a time, so that two loops can alternate.

    Each timed call then is training steps alone: neither start-up nor warm-up of a framework comes into it.
    """

    def __init__(self) -> None:
        self.steps, self.closed, self.error = 0, False, None
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)

    def pause(self) -> bool:
        """What the loop calls before each step; True asks it to end."""
        if self.steps == 0:
            self._paused.release()
            self._go.acquire()
        self.steps -= 1
        return self.closed

    def _thread(self, loop: Callable[[], object]) -> None:
        try:
            loop()
        except BaseException as error:  # shown to the thread that waits
            self.error = error
            self._paused.release()

    def _wait(self) -> None:
        self._paused.acquire()
        if self.error is not None:
            raise self.error

    @contextlib.contextmanager
    def running(self, loop: Callable[[], object]) -> Iterator[Run]:
        """Start the loop; the value runs so many steps of it."""
        thread = threading.Thread(target=self._thread, args=(loop,), daemon=True)
        thread.start()
        self._wait()
        try:
            yield self.run
        finally:
            self.closed = True
            self._go.release()
            thread.join()

    def run(self, steps: int) -> None:
        self.steps = steps
        self._go.release()
        self._wait()


class _Pauses(pl.Callback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if self.turns.pause():
            trainer.should_stop = True  # after this step


def fitting(
    module: pl.LightningModule, batches: DataLoader, *callbacks: pl.Callback
) -> contextlib.AbstractContextManager[Run]:
    """A Trainer's fit, in turns."""
    turns = Turns()
    return turns.running(lambda: trainer(*callbacks, _Pauses(turns)).fit(module, batches))
