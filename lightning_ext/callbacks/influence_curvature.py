"""The Kronecker-factored curvature of a network, collected when its training ends."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_ext._lightning import Callback, LightningModule, Trainer, refuse_sharded
from lightning_ext.callbacks._influence_samples import training_samples
from lightning_ext.callbacks._quiet import beside
from lightning_ext.functional import (
    InfluenceObjective,
    KroneckerBlock,
    KroneckerCurvature,
    KroneckerLayer,
    KroneckerStatistics,
    ParameterView,
    kronecker_curvature,
    map_tensors,
    seeded_generator,
)
from lightning_ext.modules._influence_identity import digest

__all__ = ["CurvatureCollector"]

_STATE_BYTES = 2**28  # more is no guest for the Trainer's checkpoints


class CurvatureCollector(Callback):
    r"""Fits EK-FAC or K-FAC to the trained network, over all its training data, before the Trainer lets go of both.

    With the eigenvalues :math:`\mu_d` of the approximation of :math:`G = \tfrac1N \sum_i J_i^\top H_i J_i`, and damping
    :math:`\lambda`, it logs the trace :math:`\sum_d \mu_d` (exact for EK-FAC with ``fisher="type2"``), the largest
    eigenvalue, and the effective dimension :math:`\sum_d \mu_d / (\mu_d + \lambda)`.

    When hooks fire: ``on_train_epoch_end`` of the last epoch, so that a checkpoint of that epoch holds the result, and
    of every n-th; ``on_train_end`` where the training ended otherwise or a callback changed the weights after its last
    epoch (weight averaging; attach it before this one). Samples are those of the training loader's data set in its own
    order; a sampler that takes some only is refused, then pass ``samples``. The network runs in eval mode. Nothing
    about the training changes: without the callback it is bit-identical.

    Args:
        objective: loss and outputs; default cross-entropy of ``module(batch[0])`` against ``batch[1]``.
        method: ``"ekfac"``, or ``"kfac"`` in one pass over the data instead of two.
        fisher: ``"type2"``, exact; ``"mc"``, labels drawn from the model, one backward pass whatever the number of
            outputs; ``"empirical"``, the gradients of the loss itself.
        samples: loader whose data set is gone through. Default: the trainer's only training loader.
        include: regular expression; only parameters whose name it finds.
        every_n_epochs: collect and log at the end of every n-th epoch too. Default: at the end of the training alone.
        damping: :math:`\lambda > 0` of the effective dimension, on the scale of the mean loss.
        max_width: layers with more inputs or outputs have their exact diagonal only.
        output_dir: folder for ``curvature.pt``, see :meth:`load`. Default: no file, unless the result has more than
            256 MiB and so stays out of the Trainer's checkpoints: then the log folder.
        seed: of the labels that ``"mc"`` draws.

    Attributes:
        curvature: :class:`~lightning_ext.functional.KroneckerCurvature`: ``curvature.solve(rows, damping)`` multiplies
            gradients ``(R, D)`` by the inverse. On the module's device, on the CPU where it was loaded. ``None`` before
            the first collection.

    Raises:
        ValueError: an argument is out of range; a layer does not explain the gradients of its parameters, said before
            the training; statistics that are not finite.
        MisconfigurationException: several training loaders, or one without positions or that takes some samples only,
            and no ``samples``; a strategy that shards parameters.

    Logged: ``influence/trace``, ``influence/lambda_max``, ``influence/effective_dimension``; from ``on_train_end``
    straight to the loggers.

    Source: Martens and Grosse 2015 (arXiv 1503.05671); George et al. 2018 (arXiv 1806.03884).

    Note:
        A pass is a forward pass and, per output, a backward pass that leaves out the weights' products; then one
        eigendecomposition per factor. Memory: the factors in float64, :math:`M^2 + P^2` numbers for a layer of M inputs
        and P outputs, then :math:`M^2 + P^2 + MP` in the parameters' type. Distributed: ranks share the samples out and
        sums are reduced, so one and two processes find the same, but for the labels of ``"mc"``.
    """

    def __init__(
        self,
        objective: InfluenceObjective | None = None,
        method: Literal["ekfac", "kfac"] = "ekfac",
        fisher: Literal["type2", "mc", "empirical"] = "type2",
        samples: Iterable[Any] | None = None,
        include: str | None = None,
        every_n_epochs: int | None = None,
        damping: float = 1e-2,
        max_width: int = 8192,
        output_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        if method not in ("ekfac", "kfac"):
            raise ValueError(f"method must be 'ekfac' or 'kfac'; got {method!r}.")
        if fisher not in ("type2", "mc", "empirical"):
            raise ValueError(f"fisher must be 'type2', 'mc' or 'empirical'; got {fisher!r}.")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, or None for the end alone; got {every_n_epochs}.")
        if not damping > 0:
            raise ValueError(f"damping must be positive: without it the effective dimension is a rank; got {damping}.")
        if isinstance(samples, Iterator):
            raise ValueError("samples is gone through more than once: pass a loader, no iterator.")
        self.objective = InfluenceObjective.of(objective)
        self.method, self.fisher = method, fisher
        self.samples, self.include, self.every_n_epochs = samples, include, every_n_epochs
        self.damping, self.max_width, self.output_dir, self.seed = damping, max_width, output_dir, seed
        self._forget()

    def _forget(self) -> None:
        self.curvature: KroneckerCurvature | None = None
        self._file: str | None = None
        self._digest: str | None = None  # of the parameters that the curvature is of

    @property
    def state_key(self) -> str:
        """Different settings are different callbacks in a checkpoint."""
        return self._generate_state_key(
            method=self.method, fisher=self.fisher, include=self.include, every_n_epochs=self.every_n_epochs,
            max_width=self.max_width, output_dir=self.output_dir, seed=self.seed,
        )  # fmt: skip

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the strategy, and start anew where a training does."""
        refuse_sharded(trainer, type(self).__name__, "takes whole parameters apart")
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at two samples, so that what does not fit is said before the training."""
        with beside(trainer, pl_module):
            view = ParameterView(pl_module, self.include)
            shard = training_samples(trainer, pl_module, view, self.samples, type(self).__name__)
            statistics = KroneckerStatistics(
                pl_module, self.objective, view, fisher=self.fisher, max_width=self.max_width
            )
            statistics.factors(shard.get([0, shard.num_samples - 1]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect and log, where the epoch is one of the n-th or the last."""
        epoch = trainer.current_epoch + 1
        due = self.every_n_epochs is not None and epoch % self.every_n_epochs == 0
        steps_are_over = -1 < trainer.max_steps <= trainer.global_step
        if due or trainer.should_stop or epoch == trainer.max_epochs or steps_are_over:
            pl_module.log_dict(self._collect(trainer, pl_module), sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect, where the weights are not those that were collected last."""
        changed = self._digest != digest(*ParameterView(pl_module, self.include).values().values())
        if trainer.strategy.broadcast(changed):
            summary = {name: float(value) for name, value in self._collect(trainer, pl_module).items()}
            for logger in trainer.loggers:
                logger.log_metrics(summary, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The curvature as tensors and numbers, or the file that holds it; the same on every rank."""
        state = None if self.curvature is None else _packed(self.curvature)
        small = state is not None and _bytes(state) <= _STATE_BYTES
        return {"curvature": state if small else None, "file": self._file, "digest": self._digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved curvature."""
        self._file, self._digest = state_dict["file"], state_dict["digest"]
        self.curvature = None
        if state_dict["curvature"] is not None:
            self.curvature = _unpacked(state_dict["curvature"])
        elif self._file is not None and Path(self._file).is_file():
            self.curvature = self.load(self._file)
        elif self._digest is not None:
            rank_zero_warn(f"CurvatureCollector: the curvature of this checkpoint is in {self._file}, which is gone.")

    @staticmethod
    def load(path: str | Path) -> KroneckerCurvature:
        """The curvature that a file of ``output_dir`` holds, on the CPU."""
        return _unpacked(torch.load(path, map_location="cpu", weights_only=True))

    def _collect(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        def reduce(tensor: Tensor) -> Tensor:
            total: Any = trainer.strategy.reduce(tensor, reduce_op="sum")
            summed: Tensor = total
            return summed

        with beside(trainer, pl_module):
            view = ParameterView(pl_module, self.include)
            shard = training_samples(trainer, pl_module, view, self.samples, type(self).__name__)
            self.curvature = kronecker_curvature(
                pl_module, self.objective, shard, view, corrected=self.method == "ekfac", fisher=self.fisher,
                max_width=self.max_width, reduce=reduce,
                generator=seeded_generator(self.seed, trainer.global_step, trainer.global_rank, device=view.device),
            )  # fmt: skip
        self._digest = digest(*view.values().values())
        self._write(trainer, self.curvature)
        values = self.curvature.eigenvalues()
        return {
            "influence/trace": values.sum(),
            "influence/lambda_max": values.max(),
            "influence/effective_dimension": (values / (values + self.damping)).sum(),
        }

    def _write(self, trainer: Trainer, curvature: KroneckerCurvature) -> None:
        folder, state = trainer.log_dir, _packed(curvature)  # log_dir is a collective: asked for on every rank
        if self.output_dir is not None or _bytes(state) > _STATE_BYTES:
            folder = self.output_dir or folder
        else:
            return
        if folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(folder, "curvature.pt")
        self._file = str(path)
        if trainer.is_global_zero:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    torch.save(state, file)
            except OSError as error:  # a training must not end for a file whose content the callback still holds
                rank_zero_warn(f"the curvature could not be written to {path}: {error}")


def _ends(part: slice | None) -> list[int] | None:
    return None if part is None else [part.start, part.stop]


def _part(ends: list[int] | None) -> slice | None:
    return None if ends is None else slice(*ends)


def _packed(curvature: KroneckerCurvature) -> dict[str, Any]:
    """Tensors on the CPU, and primitives."""
    blocks = [
        {
            "name": block.layer.name,
            "weight": _ends(block.layer.weight),
            "bias": _ends(block.layer.bias),
            "sizes": [block.layer.groups, block.layer.outputs, block.layer.inputs],
            "inputs": block.inputs,
            "outputs": block.outputs,
            "eigenvalues": block.eigenvalues,
            "factors": None if block.factors is None else list(block.factors),
        }
        for block in curvature.blocks
    ]
    state = {"blocks": blocks, "diagonal": list(curvature.diagonal), "places": [_ends(p) for p in curvature.places]}
    packed: dict[str, Any] = map_tensors(Tensor.cpu, state)
    return packed


def _unpacked(state: dict[str, Any]) -> KroneckerCurvature:
    blocks = [
        KroneckerBlock(
            KroneckerLayer(b["name"], _part(b["weight"]), _part(b["bias"]), *b["sizes"]),
            b["inputs"],
            b["outputs"],
            b["eigenvalues"],
            None if b["factors"] is None else tuple(b["factors"]),
        )
        for b in state["blocks"]
    ]
    return KroneckerCurvature(tuple(blocks), tuple(state["diagonal"]), tuple(slice(*p) for p in state["places"]))


def _bytes(state: dict[str, Any]) -> int:
    sizes: list[int] = []
    map_tensors(lambda tensor: sizes.append(tensor.nbytes), state)
    return sum(sizes)
