"""Noise that a resumed run draws again and that differs between ranks, without state in the checkpoint but a seed."""

from typing import Any

import torch
from torch import Tensor

from lightning_ext._lightning import LightningModule
from lightning_ext.functional.counter_rng import seeded_generator

__all__ = ["AddressedNoise"]

_STAGES = {"train": 0, "val": 1, "test": 2}


class AddressedNoise(LightningModule):
    """LightningModule whose noise is addressed by (seed, epoch, stage, batch, rank) instead of drawn in sequence.

    The global generator is neither read nor moved. An evaluation uses the same noise in every epoch, so its values are
    comparable. Ranks agree on one seed when the Trainer sets the module up; checkpoints keep it.
    """

    _seed: int | None = None
    _seed_was_given = False
    _address = (0, 0, 0)
    _draws = 0

    @property
    def seed(self) -> int:
        """Seed of the noise; unless it is set, the seed of the program (``seed_everything``)."""
        if self._seed is None:
            self._seed = torch.initial_seed()
        return self._seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self._seed = seed

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers with the shape, dtype and device of a tensor, at the current address."""
        return torch.randn(like.shape, generator=self.generator(like.device), device=like.device, dtype=like.dtype)

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator at the current address, another one at each call."""
        epoch, stage, batch = self._address
        found = seeded_generator(self.seed, epoch, stage, batch, self._rank, self._draws, device=device)
        self._draws += 1
        return found

    def set_address(self, stage: str, batch_idx: int) -> None:
        """Go to the noise of one batch; ``training_step`` and its siblings call it first.

        Args:
            stage: ``"train"``, ``"val"`` or ``"test"``.
            batch_idx: index of the batch.
        """
        epoch = self.current_epoch if stage == "train" else 0
        self._address, self._draws = (epoch, _STAGES[stage], batch_idx), 0

    def setup(self, stage: str) -> None:
        """Agree on the seed of rank 0: without ``seed_everything`` every process starts with its own."""
        super().setup(stage)
        self.seed = int(self.trainer.strategy.broadcast(self.seed))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lightning_ext_seed"] = self.seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the seed of the run that wrote the checkpoint, unless the constructor was given one."""
        super().on_load_checkpoint(checkpoint)
        if not self._seed_was_given:
            self.seed = checkpoint.get("lightning_ext_seed", self.seed)

    # One call of self.log costs about a tenth of a small network's step, and Lightning passes on every n-th only.

    @property
    def _is_logging_step(self) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    @property
    def _logs_now(self) -> bool:
        return self._is_logging_step or bool(self.trainer.is_last_batch)

    @property
    def _rank(self) -> int:
        return 0 if self._trainer is None else self.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self._trainer is None else int(self.trainer.world_size)
