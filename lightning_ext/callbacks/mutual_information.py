"""A callback that measures how many nats the latents of a model in training carry about its data."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from lightning_utilities.core.imports import RequirementCache
from tqdm.auto import tqdm

from lightning_ext._lightning import Callback, LightningModule, MisconfigurationException, Trainer, pl, refuse_sharded
from lightning_ext.callbacks._quiet import quietly
from lightning_ext.functional import evaluating
from lightning_ext.modules import BaseVAE
from lightning_ext.modules._mutual_information_options import Bound, SandwichOptions
from lightning_ext.modules.mutual_information_sandwich import MutualInformationMeasurement, run_sandwich
from lightning_ext.nn import LatentModel, latent_model_from_vae

__all__ = ["MutualInformationCallback"]

Adapter = Callable[[Any], LatentModel]

_MATPLOTLIB = RequirementCache("matplotlib")


class MutualInformationCallback(Callback):
    r"""Measures the mutual information of a module's generative model, between a lower and an upper bound.

    At the end of a validation (or test) epoch pairs are simulated from the model, and bounds are taken of them: see
    :func:`~lightning_ext.modules.measure_mutual_information`. The data of the loader are not used: what is measured is
    what the decoder makes of its prior. Nothing about the training changes: the same run without the callback is
    bit-identical. Every epoch measures with the same draws, so that its changes are the model's.

    When hooks fire: ``on_validation_epoch_end`` (not in the sanity check), or ``on_test_epoch_end``.

    Args:
        adapter: gives the module's :class:`~lightning_ext.nn.LatentModel`, such as ``lambda module:
            GaussianDecoderModel(module.decoder, module.log_var, latent_dim=10)``. Default: what the module's method
            ``latent_model()`` returns; a VAE of this library needs neither.
        bounds: ``"iwae"``, ``"ais"`` or both.
        num_points: simulated pairs, over all ranks.
        num_samples: K of ``"iwae"``.
        num_chains: K of ``"ais"``, each way.
        num_steps: temperatures of each chain: the gap falls about as their inverse.
        num_leapfrog: gradients of a transition.
        schedule: ``"sigmoid"`` or ``"linear"``.
        delta: of the sigmoid.
        proposal: where samples and chains start: the ``"prior"``, or the ``"model"``'s proposal (its encoder).
        every_n_epochs: measure in every n-th training epoch only. A callback that monitors the values, such as
            ``EarlyStopping``, needs them in every epoch that it looks at.
        stage: ``"validate"`` or ``"test"``.
        chunk_size: chains, and samples, of each pair that run at once, for less memory.
        seed: of all draws.
        log_figure: hand a picture of the bounds to every logger that takes figures (needs matplotlib).
        name: what logged names begin with; of two such callbacks each needs its own.

    Attributes:
        measurement: the latest :class:`~lightning_ext.modules.MutualInformationMeasurement`; None before the first and
            after a resumption.
        result: its values by logged name, as numbers; empty before the first.

    Raises:
        ValueError: an argument is out of range.
        MisconfigurationException: there is no adapter for the module, or the strategy shards its parameters.

    Logged: ``<name>/<bound>/lower``, ``/upper`` and ``/gap`` in nats, each with its standard error
    (``.../lower_stderr``); and of ``"ais"`` ``accept``, ``divergent`` (share of proposals), ``ess`` and ``step_size``.

    Cost: 2 x points x chains x steps x leapfrog gradients of the decoder with respect to z, and an eighth or so more
    for the pilot of 64 chains that tunes the steps. Distributed: pairs are shared out, sums are reduced over ranks.
    """

    def __init__(
        self,
        adapter: Adapter | None = None,
        bounds: Sequence[Bound] = ("iwae", "ais"),
        num_points: int = 128,
        num_samples: int = 1000,
        num_chains: int = 16,
        num_steps: int = 200,
        num_leapfrog: int = 10,
        schedule: Literal["sigmoid", "linear"] = "sigmoid",
        delta: float = 4.0,
        proposal: Literal["prior", "model"] = "prior",
        every_n_epochs: int = 1,
        stage: Literal["validate", "test"] = "validate",
        chunk_size: int | None = None,
        seed: int = 0,
        log_figure: bool = True,
        name: str = "mutual_information",
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1; got {every_n_epochs}.")
        if stage not in ("validate", "test"):
            raise ValueError(f"stage must be 'validate' or 'test'; got {stage!r}.")
        if adapter is not None and not callable(adapter):
            raise ValueError(f"adapter must be a function of the module; got {type(adapter).__name__}.")
        self.adapter = adapter
        self.options = SandwichOptions(
            num_chains, num_steps, num_leapfrog, schedule, delta, chunk_size=chunk_size, bounds=bounds,
            num_points=num_points, num_samples=num_samples, proposal=proposal,
        )  # fmt: skip
        self.every_n_epochs, self.stage, self.seed = every_n_epochs, stage, seed
        self.log_figure, self.name = log_figure, name
        self.measurement: MutualInformationMeasurement | None = None
        self.result: dict[str, float] = {}
        self._measured: bool | None = None  # in this fit, as soon as a validation has ended

    @property
    def state_key(self) -> str:
        """Different settings are different callbacks in a checkpoint."""
        return self._generate_state_key(options=repr(self.options), stage=self.stage, seed=self.seed, name=self.name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module has a latent variable model, and that its parameters are whole."""
        refuse_sharded(trainer, type(self).__name__, "runs the decoder outside of the strategy's wrapper")
        self._model(pl_module)
        known = [c for c in trainer.callbacks if isinstance(c, MutualInformationCallback)]  # type: ignore[attr-defined]
        if self is not known[0] and self.name in [other.name for other in known if other is not self]:
            pl.utilities.rank_zero_warn(
                f"several MutualInformationCallbacks log as {self.name!r}: what Lightning logs is their mean. Give "
                "each its own name=."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if nothing will be measured."""
        self._measured = None
        if self.stage == "validate" and not trainer.enable_validation:
            pl.utilities.rank_zero_warn(
                "MutualInformationCallback measures when a validation ends, and this fit has none: give the module a "
                "validation_step and a val_dataloader, or call measure_mutual_information after the fit."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if nothing was measured."""
        if self._measured is False and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            pl.utilities.rank_zero_warn(
                f"MutualInformationCallback measured nothing in this fit: no validation ended in an epoch that "
                f"every_n_epochs={self.every_n_epochs} allows. Let it divide the epochs of check_val_every_n_epoch."
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        during_fit = trainer.state.fn == "fit"
        skipped = during_fit and (trainer.current_epoch + 1) % self.every_n_epochs
        if self.stage == "validate" and not trainer.sanity_checking:
            self._measured = bool(self._measured) or not skipped
            if not skipped:
                self._measure(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        if self.stage == "test":
            self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The latest values."""
        return {"result": dict(self.result)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the latest values."""
        self.result = dict(state_dict["result"])

    def _model(self, pl_module: LightningModule) -> LatentModel:
        if self.adapter is not None:
            found = self.adapter(pl_module)
        elif hasattr(pl_module, "latent_model"):
            found = cast(Any, pl_module).latent_model()
        elif isinstance(pl_module, BaseVAE):
            found = latent_model_from_vae(pl_module)
        else:
            raise MisconfigurationException(
                f"MutualInformationCallback does not know the latents and likelihood of {type(pl_module).__name__}: "
                "pass adapter=lambda module: GaussianDecoderModel(module.decoder, log_var, latent_dim), or give the "
                "module a method latent_model()."
            )
        if not isinstance(found, LatentModel):
            raise MisconfigurationException(f"adapter must return a LatentModel; got {type(found).__name__}.")
        return found

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bar = tqdm(
            desc="mutual information", total=self.options.total, leave=False, delay=2,
            disable=None if trainer.is_global_zero else True,
        )  # fmt: skip
        with quietly(pl_module), evaluating(pl_module), torch.inference_mode(False), bar:
            model = self._model(pl_module).to(pl_module.device).eval()
            if model.dtype in (torch.float16, torch.bfloat16):
                model = copy.deepcopy(model).float()
            found = run_sandwich(model, self.options, seed=self.seed, progress=bar.update)
        self.measurement = found
        values = {f"{self.name}/{name}": value for name, value in found.values.items() if "count" not in name}
        self.result = {name: float(value) for name, value in values.items()}
        logged = {name: value.to(pl_module.device, torch.float32) for name, value in values.items()}
        pl_module.log_dict(logged, sync_dist=True)
        if self.log_figure and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._show(trainer, found)

    def _show(self, trainer: Trainer, found: MutualInformationMeasurement) -> None:
        loggers: list[Any] = list(trainer.loggers)
        takers = [lg for lg in loggers if hasattr(lg, "log_image") or hasattr(lg.experiment, "add_figure")]
        if not takers:
            return
        if not _MATPLOTLIB:
            pl.utilities.rank_zero_warn(
                "no picture of the bounds: pip install 'lightning-ext[plot]', or pass log_figure=False."
            )
            return
        from matplotlib import pyplot as plt

        figure, _ = found.plot()
        for logger in takers:
            if hasattr(logger, "log_image"):
                logger.log_image(f"{self.name}/bounds", [figure], step=trainer.global_step)
            else:
                logger.experiment.add_figure(f"{self.name}/bounds", figure, global_step=trainer.global_step)
        plt.close(figure)
