"""Callbacks for multi-rate VAEs and their baselines: measure the rate-distortion curve, schedule the KL weight.

Source: Bae et al., *Multi-Rate VAE*, ICLR 2023, arXiv 2212.03905, sections 4.2 and 5.
"""

import csv
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor

from lightning_ext._lightning import Callback, LightningModule, MisconfigurationException, Trainer, pl, refuse_sharded
from lightning_ext.callbacks._quiet import quietly
from lightning_ext.functional.counter_rng import fold_in
from lightning_ext.functional.mrvae import kl_weight
from lightning_ext.metrics import RateDistortionCurve
from lightning_ext.modules import MultiRateMixin

__all__ = ["KLSchedule", "RateDistortionCallback"]

_MATPLOTLIB = RequirementCache("matplotlib")


class RateDistortionCallback(Callback):
    r"""Measures the rate-distortion curve of a multi-rate module on the validation and test data.

    At the end of a validation epoch every batch has been evaluated at every beta of a grid, with the same noise for all
    of them. Nothing about the training changes: the same run without the callback is bit-identical.

    When hooks fire: the sweep runs in ``on_validation_batch_end`` and ``on_test_batch_end`` (not in the sanity check),
    the logging in ``on_validation_epoch_end`` and ``on_test_epoch_end``.

    Args:
        num_betas: number of betas, evenly spaced on a log scale over the module's range.
        betas: explicit betas instead of a grid, ascending, inside the module's range.
        every_n_epochs: measure in every n-th training epoch only.
        reference_point: ``(rate, distortion)``, the corner of the hypervolume; without it none is logged.
        rate_interval: rates, in nats, between which ``auc`` averages the distortion; default: the whole curve. Give one
            to compare runs.
        log_figure: hand a picture of the curve to every logger that takes figures (needs matplotlib).
        save_csv: write the curve to ``<log dir>/rate_distortion/<stage>_epoch=<n>.csv``.
        baselines: points to draw beside the curve, ``{label: [[rate, distortion], ...]}``.

    Attributes:
        curve: the latest measurement, what :class:`lightning_ext.metrics.RateDistortionCurve` computes; ``None`` before
            the first.

    Raises:
        ValueError: an argument is out of range.
        MisconfigurationException: the module is not a :class:`lightning_ext.modules.MultiRateMixin`, or the strategy
            shards its parameters (FSDP, ModelParallel, DeepSpeed).

    Logged: ``mrvae/auc``, ``mrvae/slope_error`` (while the rate depends on beta; not for a beta-TCVAE),
    ``mrvae/hypervolume`` (with a reference point), ``mrvae/best_elbo``, ``mrvae/beta_at_best_elbo`` and, where the
    module has a ``latent_dim`` and returns posterior means, ``mrvae/active_units`` (at the beta nearest to 1).

    Cost: ``num_betas`` forward passes per evaluated batch, no memory that grows with the data. Distributed: sums are
    reduced over ranks; files and figures are written by rank 0.
    """

    def __init__(
        self,
        num_betas: int = 20,
        betas: Sequence[float] | None = None,
        every_n_epochs: int = 1,
        reference_point: Sequence[float] | None = None,
        rate_interval: Sequence[float] | None = None,
        log_figure: bool = True,
        save_csv: bool = True,
        baselines: dict[str, list[list[float]]] | None = None,
    ) -> None:
        if num_betas < 2 or (betas is not None and len(betas) < 2):
            num_betas = num_betas if betas is None else len(betas)
            raise ValueError(f"num_betas must be at least 2, a curve needs two points; got {num_betas}.")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1; got {every_n_epochs}.")
        self.num_betas = num_betas
        self.betas = None if betas is None else [float(beta) for beta in betas]
        self.every_n_epochs = every_n_epochs
        self.reference_point = reference_point
        self.rate_interval = rate_interval
        self.log_figure = log_figure
        self.save_csv = save_csv
        self.baselines = baselines
        self.curve: dict[str, Tensor] | None = None
        self._metric: RateDistortionCurve | None = None

    @property
    def state_key(self) -> str:
        """Different settings are different callbacks in a checkpoint."""
        return self._generate_state_key(num_betas=self.num_betas, betas=self.betas, every_n_epochs=self.every_n_epochs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module has a curve to measure and that its parameters are whole."""
        refuse_sharded(trainer, type(self).__name__, "runs the module outside of the strategy's wrapper")
        if not isinstance(pl_module, MultiRateMixin):
            raise MisconfigurationException(
                f"RateDistortionCallback needs a MultiRateVAE or a module with MultiRateMixin; got "
                f"{type(pl_module).__name__}. A single-rate VAE has no curve: it logs val/rate and val/distortion."
            )
        if pl_module.beta_prior.low == pl_module.beta_prior.high:
            raise MisconfigurationException(
                f"RateDistortionCallback needs a range of beta; this module has the single value "
                f"{pl_module.beta_prior.low:g}."
            )
        metric = self._new_metric(pl_module)  # checks betas and intervals before the training starts
        for beta in metric.betas:
            with pl_module.at(float(beta)):
                pass  # raises for a beta outside the range

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new curve."""
        self._begin(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new curve."""
        self._begin(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Evaluate the batch at every beta."""
        self._sweep(trainer, pl_module, batch, batch_idx)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Evaluate the batch at every beta."""
        self._sweep(trainer, pl_module, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute, log and save the curve."""
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute, log and save the curve."""
        self._finish(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        """The latest curve."""
        return {"curve": None if self.curve is None else {k: v.cpu() for k, v in self.curve.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the latest curve."""
        self.curve = state_dict["curve"]

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metric = None
        during_fit = trainer.state.fn == "fit"
        if trainer.sanity_checking or (during_fit and (trainer.current_epoch + 1) % self.every_n_epochs):
            return
        assert isinstance(pl_module, MultiRateMixin)
        self._metric = self._new_metric(pl_module).to(pl_module.device)

    def _new_metric(self, pl_module: MultiRateMixin) -> RateDistortionCurve:
        betas = pl_module.beta_prior.grid(self.num_betas) if self.betas is None else self.betas
        latent_dim = getattr(pl_module, "latent_dim", None)
        return RateDistortionCurve(betas, latent_dim, self.reference_point, self.rate_interval)

    def _sweep(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._metric is None:
            return
        assert isinstance(pl_module, MultiRateMixin)
        precision = trainer.strategy.precision_plugin
        with quietly(pl_module), torch.no_grad(), precision.val_step_context():
            for index, beta in enumerate(self._metric.betas):
                # The same noise at every beta: differences along the curve are then differences of beta.
                torch.manual_seed(fold_in(0, batch_idx))
                pl_module.set_address("val", batch_idx)
                with pl_module.at(float(beta)):
                    terms = pl_module.rate_distortion(batch)
                mu = terms.mu if self._metric.latent_dim is not None else None
                self._metric.update(index, terms.rate, terms.distortion, mu)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._metric is None:
            return
        with warnings.catch_warnings():
            # Early in a training all latents are collapsed; the key is then left out below, which says it well enough.
            warnings.filterwarnings("ignore", message=".*slope_error is NaN")
            curve = {name: value.detach().cpu() for name, value in self._metric.compute().items()}
        self.curve, metric = curve, self._metric
        self._metric = None
        values = _summary(curve)
        if getattr(pl_module, "objective", None) == "tcvae" or values["slope_error"].isnan():
            del values["slope_error"]  # with total correlation beta is no slope; with a flat rate there is none
        pl_module.log_dict(
            {f"mrvae/{name}": value.to(pl_module.device) for name, value in values.items()}, sync_dist=True
        )
        log_dir = trainer.log_dir  # a collective: asked for on every rank
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.save_csv and log_dir is not None:
            _write_curve(curve, Path(log_dir) / "rate_distortion" / f"{stage}_epoch={trainer.current_epoch}.csv")
        if self.log_figure:
            self._show(trainer, metric, curve, stage)

    def _show(self, trainer: Trainer, metric: RateDistortionCurve, curve: dict[str, Tensor], stage: str) -> None:
        loggers: list[Any] = list(trainer.loggers)
        takers = [lg for lg in loggers if hasattr(lg, "log_image") or hasattr(lg.experiment, "add_figure")]
        if not takers:
            return
        if not _MATPLOTLIB:
            pl.utilities.rank_zero_warn(
                "no picture of the curve: pip install 'lightning-ext[plot]', or pass log_figure=False."
            )
            return
        from matplotlib import pyplot as plt

        baselines = {label: _points(points) for label, points in (self.baselines or {}).items()}
        figure, _ = metric.plot(curve, baselines=baselines or None)
        for logger in takers:
            tag = f"mrvae/{stage}_curve"
            if hasattr(logger, "log_image"):
                logger.log_image(tag, [figure], step=trainer.global_step)
            else:
                logger.experiment.add_figure(tag, figure, global_step=trainer.global_step)
        plt.close(figure)


def _points(points: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    table = torch.tensor([list(point) for point in points], dtype=torch.float64)
    return table[:, 0], table[:, 1]


def _summary(curve: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scalars of a curve that are worth a line in a logger."""
    best = int(torch.nan_to_num(curve["elbo"], nan=-torch.inf).argmax())
    values = {name: curve[name] for name in ("auc", "hypervolume", "slope_error") if name in curve}
    values |= {"best_elbo": curve["elbo"][best], "beta_at_best_elbo": curve["beta"][best]}
    if "active_units" in curve:
        values["active_units"] = curve["active_units"][int(curve["beta"].log().abs().argmin())]
    return {name: value.float() for name, value in values.items()}


def _write_curve(curve: Mapping[str, Tensor], path: Path) -> None:
    """Write the columns of a curve that have one value per beta as CSV."""
    columns = {name: value.tolist() for name, value in curve.items() if value.dim() == 1}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    except OSError as error:  # a training must not end for a table that the callback still holds
        pl.utilities.rank_zero_warn(f"the rate-distortion curve could not be written to {path}: {error}")


class KLSchedule(Callback):
    r"""Anneals the weight of the KL term of any module that keeps it in a plain attribute.

    The value is a function of the trainer's progress alone, so a resumed run needs no state. Set in
    ``on_train_epoch_start`` (or, with ``interval="step"``, ``on_train_batch_start``) and restored nowhere: after the
    training the attribute holds the final value.

    Args:
        schedule: ``"monotonic"`` (Bowman et al. 2016), ``"cyclical"`` (Fu et al. 2019), ``"constant"``, or ``"hold"``:
            the attribute is ``target`` during the warm-up and ``None`` afterwards, which trains a multi-rate VAE at one
            small beta first (``attribute="fixed_beta"``; the paper's recipe for hierarchical VAEs on CelebA).
        target: final weight, at least 0.
        attribute: name of the module's attribute, ``"beta"`` for :class:`lightning_ext.modules.BetaVAE`.
        warmup_fraction: part of the training that the ramp of ``"monotonic"`` or the ``"hold"`` takes, in (0, 1].
        num_cycles: cycles of ``"cyclical"``, at least 1.
        ramp_fraction: part of each cycle that rises, in (0, 1].
        interval: ``"epoch"`` (the paper) or ``"step"``.

    Raises:
        ValueError: an argument is out of range.
        MisconfigurationException: the module has no such attribute, or the Trainer has no end (``max_epochs`` or
            ``max_steps``).

    Logged: ``mrvae/kl_weight``. Distributed: every rank computes the same value.
    """

    def __init__(
        self,
        schedule: Literal["monotonic", "cyclical", "constant", "hold"] = "monotonic",
        target: float = 1.0,
        attribute: str = "beta",
        warmup_fraction: float = 0.3,
        num_cycles: int = 4,
        ramp_fraction: float = 0.5,
        interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        if schedule not in ("monotonic", "cyclical", "constant", "hold"):
            raise ValueError(f"schedule must be 'monotonic', 'cyclical', 'constant' or 'hold'; got {schedule!r}.")
        if interval not in ("epoch", "step"):
            raise ValueError(f"interval must be 'epoch' or 'step'; got {interval!r}.")
        if not target >= 0.0:
            raise ValueError(f"target must be at least 0; got {target}.")
        for name, value in (("warmup_fraction", warmup_fraction), ("ramp_fraction", ramp_fraction)):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"{name} must be in (0, 1]; got {value}.")
        if num_cycles < 1:
            raise ValueError(f"num_cycles must be at least 1; got {num_cycles}.")
        self.schedule: Literal["monotonic", "cyclical", "constant", "hold"] = schedule
        self.target = target
        self.attribute = attribute
        self.warmup_fraction = warmup_fraction
        self.num_cycles = num_cycles
        self.ramp_fraction = ramp_fraction
        self.interval: Literal["epoch", "step"] = interval

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is an attribute to set and an end to count from."""
        if not hasattr(pl_module, self.attribute):
            raise MisconfigurationException(
                f"KLSchedule sets {type(pl_module).__name__}.{self.attribute}, which does not exist: pass attribute= "
                "the name of the attribute that weights your KL term."
            )
        if stage == "fit" and self._total(trainer) is None:
            raise MisconfigurationException(
                "KLSchedule counts from the end of the training: give the Trainer max_epochs or max_steps "
                "(interval='step' for max_steps)."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the weight of a run that resumes inside an epoch, whose start hook does not fire again."""
        self._set(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set and log the weight of this epoch."""
        if self.interval == "epoch":
            self._set_and_log(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set and log the weight of this step."""
        if self.interval == "step":
            self._set_and_log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a hold, also one that the training did not outlast."""
        if self.schedule == "hold":
            setattr(pl_module, self.attribute, None)

    def value(self, progress: float) -> float | None:
        """Weight at a progress in [0, 1); ``None`` when a hold is over."""
        if self.schedule == "hold":
            return self.target if progress < self.warmup_fraction else None
        return self.target * kl_weight(
            progress, self.schedule, self.warmup_fraction, self.num_cycles, self.ramp_fraction
        )

    def _total(self, trainer: Trainer) -> float | None:
        if self.interval == "epoch":
            epochs = trainer.max_epochs
            return None if epochs is None or epochs < 1 else float(epochs)
        steps = trainer.max_steps if trainer.max_steps > 0 else trainer.max_epochs
        return None if steps is None or steps < 1 else float(steps)

    def _epochs(self, trainer: Trainer) -> float:
        epochs = self._total(trainer) or 1.0
        if trainer.max_steps < 1:
            return epochs
        steps_per_epoch = float(trainer.num_training_batches) / trainer.accumulate_grad_batches
        return min(epochs, max(1.0, math.ceil(trainer.max_steps / steps_per_epoch)))

    def _set(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        by_step = self.interval == "step"
        position = trainer.global_step if by_step else trainer.current_epoch
        total = trainer.estimated_stepping_batches if by_step else self._epochs(trainer)
        weight = self.value(position / float(total or 1))
        setattr(pl_module, self.attribute, weight)
        return weight

    def _set_and_log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weight, by_step = self._set(trainer, pl_module), self.interval == "step"
        if weight is not None:
            pl_module.log("mrvae/kl_weight", weight, on_step=by_step, on_epoch=not by_step)
