"""The batches of a look-ahead, and a module's own loss and outputs on them."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_ext._lightning import LightningModule, MisconfigurationException, Trainer, submodule
from lightning_ext.callbacks._apo_divergence import Divergence, recognise
from lightning_ext.callbacks._apo_options import NoLoss
from lightning_ext.callbacks._quiet import undisturbed
from lightning_ext.functional import ProximalObjective, divergence_named, fold_in

BatchFn = Callable[[LightningModule, Any], Tensor]
SAVED_BATCH_LIMIT = 16 * 2**20  # bytes over all ranks; a larger batch is not worth its place in every checkpoint


def check_indices(optimizers: Literal["all"] | list[int]) -> Literal["all"] | list[int]:
    """``"all"``, or a list of indices."""
    if optimizers == "all":
        return optimizers
    whole = all(type(i) is int and i >= 0 for i in optimizers)
    if not optimizers or not whole or len(set(optimizers)) < len(optimizers):
        raise ValueError(f"optimizers must be 'all' or a list of indices from 0 on, each once; got {optimizers!r}.")
    return optimizers


def chosen_optimizers(trainer: Trainer, optimizers: Literal["all"] | list[int], who: str) -> list[int]:
    """Indices of the chosen optimizers, which must exist."""
    # where configure_optimizers returned nothing, Lightning puts a stand-in without parameters
    available = [i for i, optimizer in enumerate(trainer.optimizers) if getattr(optimizer, "param_groups", None)]
    if not available:
        raise MisconfigurationException(f"{who}: the module has no optimizer; return one from configure_optimizers.")
    chosen = list(available) if optimizers == "all" else list(optimizers)
    if any(i not in available for i in chosen):
        raise MisconfigurationException(
            f"{who}: optimizers={optimizers}, but the module has {len(available)} of them, counted from 0. Name those "
            "that are there."
        )
    return chosen


def publish(trainer: Trainer, found: dict[str, float]) -> bool:
    """Give loggers and ``callback_metrics`` what a meta-step found, on logged steps and at the end of an epoch.

    As Lightning's own ``LearningRateMonitor`` does it: the numbers are equal on ranks, and going through ``log`` would
    cost more than the meta-step of a small network.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    logged = every > 0 and trainer.global_step % every == 0
    if not found or not (logged or trainer.is_last_batch):
        return False
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in found.items()})
    for logger in trainer.loggers:
        logger.log_metrics(found, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
    return True


class LookAhead:
    """Keeps B and B', and builds the proximal objective of the coming step.

    Args:
        who: the callback's name, for messages.
        output_fn: ``(module, batch) -> outputs``; default ``module(batch[0])``.
        loss_fn: ``(module, batch) -> loss``; default the module's ``training_step``.
        divergence: a name, a function, or ``"auto"``.
        fsd_batch: ``"previous"``, ``"loader"`` or a DataLoader.
        fsd_fraction: the part of B' that is used, in ``(0, 1]``.
        fsd_rows: how many rows of B', where it has them, are used in any case; one is too few for batch norm.
        loss_fraction: the part of B on which the loss is taken, likewise.
        seed: of the dropout masks on B' and of its draws from a loader.
    """

    def __init__(
        self,
        who: str,
        *,
        output_fn: BatchFn | None,
        loss_fn: BatchFn | None,
        divergence: str | Divergence,
        fsd_batch: Literal["previous", "loader"] | DataLoader[Any],
        fsd_fraction: float,
        fsd_rows: int = 2,
        loss_fraction: float,
        seed: int,
    ) -> None:
        for argument, fraction in (("fsd_fraction", fsd_fraction), ("loss_fraction", loss_fraction)):
            if not 0 < fraction <= 1:
                raise ValueError(f"{argument} must be in (0, 1]; got {fraction}.")
        if fsd_batch not in ("previous", "loader") and not isinstance(fsd_batch, DataLoader):
            raise ValueError(f"fsd_batch must be 'previous', 'loader' or a DataLoader; got {fsd_batch!r}.")
        if isinstance(fsd_batch, DataLoader):
            _random_access(fsd_batch, who)
        self.who, self.output_fn, self.loss_fn = who, output_fn, loss_fn
        self.fsd_batch, self.loss_fraction, self.seed = fsd_batch, loss_fraction, seed
        self.fsd_fraction, self.fsd_rows = fsd_fraction, fsd_rows
        for name, function in (("output_fn", output_fn), ("loss_fn", loss_fn)):
            if function is not None and not callable(function):
                raise ValueError(f"{name} must be a function (module, batch) -> tensor, or None; got {function!r}.")
        if not isinstance(divergence, str) and not callable(divergence):
            raise ValueError(f"divergence must be a name or a function (new, old) -> scalar; got {divergence!r}.")
        by_name = isinstance(divergence, str) and divergence != "auto"
        self.divergence = divergence_named(divergence) if by_name else divergence  # type: ignore[arg-type]
        self._recognised: Divergence | None = None
        self._batch: Any = None
        self._batch_idx = 0
        self._rng: tuple[Tensor, Tensor | None] | None = None
        self._previous: tuple[Any, float] | None = None  # a batch, and the part of it that is B'
        self._saved: list[Any] | None = None
        self.step_made = False
        self.draws = 0

    # -- the batches

    def check(self, pl_module: LightningModule) -> None:
        """Refuse modules whose loss cannot be had a second time."""
        if self.loss_fn is None and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{self.who}: under manual optimisation training_step makes the steps itself and cannot be run for a "
                "look-ahead. Pass loss_fn=..., a function (module, batch) -> scalar loss."
            )
        if self.loss_fn is None and "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise MisconfigurationException(
                f"{self.who}: a training_step that takes dataloader_iter cannot be run twice on one batch. Pass "
                "loss_fn=..., a function (module, batch) -> scalar loss."
            )

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a restored B' back; another module may train with another loss than the last one."""
        self._batch = self._previous = self._recognised = None
        if self.fsd_batch == "loader":
            self._loader(trainer)
        if self._saved is not None and len(self._saved) == trainer.world_size:
            previous = self._saved[trainer.global_rank]
            if previous is not None:
                self._previous = apply_to_collection(previous, Tensor, lambda t: t.to(pl_module.device)), 1.0
        self._saved = None

    def observe(self, batch: Any, batch_idx: int, device: torch.device, *, keep_rng: bool) -> None:
        """Remember B and, with ``keep_rng``, the random state from which the training pass on it starts."""
        self._batch, self._batch_idx, self._rng = batch, batch_idx, None
        if keep_rng:
            cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            self._rng = torch.get_rng_state(), cuda

    @property
    def rows(self) -> int | None:
        """Rows of B, where its tensors agree on their number."""
        lengths = _lengths(self._batch)
        return lengths.pop() if len(lengths) == 1 else None

    def batch_done(self, *, keep: bool = True) -> None:
        """Where B was the last batch of an optimizer step, it becomes the previous one."""
        if self.step_made:
            self._previous, self.step_made = ((self._batch, self.fsd_fraction) if keep else None), False
        self._batch = self._rng = None

    def drop_restored(self) -> None:
        """Let go of what a checkpoint brought."""
        self._saved = None

    def forget(self) -> None:
        """Let go of every batch."""
        self._batch = self._previous = self._rng = None
        self.step_made = False

    def _other_batch(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Batch B', or ``None`` where there is none yet."""
        if self.fsd_batch == "previous":
            return self._part_of_previous()
        loader = self._loader(trainer)
        dataset = loader.dataset
        size = int(loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1)
        size = max(min(size, self.fsd_rows), math.ceil(size * self.fsd_fraction))
        generator = torch.Generator().manual_seed(fold_in(self.seed, self.draws, trainer.global_rank))
        self.draws += 1
        chosen = torch.randint(len(dataset), (size,), generator=generator).tolist()  # type: ignore[arg-type]
        with undisturbed(pl_module):  # transforms draw from the global generators
            items = [dataset[i] for i in chosen]
            ready_made = loader.batch_sampler is None  # batch_size=None: the items are batches
            batch = items[0] if ready_made else loader.collate_fn(items)
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)  # also that of a data module
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _part_of_previous(self) -> Any:
        return None if self._previous is None else _part(*self._previous, self.fsd_rows)

    def _loader(self, trainer: Trainer) -> DataLoader[Any]:
        loader = trainer.train_dataloader if self.fsd_batch == "loader" else self.fsd_batch
        return _random_access(loader, self.who)

    # -- the objective

    def objective(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *,
        outputs: bool,
        address: Sequence[int],
        loss_before: Tensor | None = None,
        whole: bool = False,
    ) -> ProximalObjective | None:
        """Return the objective of the coming step, or ``None`` where it needs a batch B' and there is none yet.

        Args:
            trainer: of the fit.
            pl_module: the module.
            outputs: whether the change of the outputs counts.
            address: of the dropout masks on B'.
            loss_before: the loss on B where it is known; used where the loss is taken on all of B.
            whole: take the loss on all of B.
        """
        batch, batch_idx, rng = self._batch, self._batch_idx, self._rng
        other = self._other_batch(trainer, pl_module) if outputs else None
        if outputs and other is None:
            return None
        seed = fold_in(self.seed, trainer.global_rank, *address)
        part = batch if whole else _part(batch, self.loss_fraction)

        def loss_fn(chosen: Any = part) -> Tensor:
            with self._side(trainer, pl_module):
                _set_rng(rng, pl_module.device)
                return self._loss(pl_module, chosen, batch_idx)

        def outputs_of_loss() -> Tensor:
            with self._side(trainer, pl_module):
                _set_rng(rng, pl_module.device)
                return self._outputs(pl_module, batch)

        def output_fn(chosen: Any = other) -> Tensor:
            with self._side(trainer, pl_module):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed spends a millisecond on absent devices
                if pl_module.device.type == "cuda":
                    torch.cuda.manual_seed(seed)
                return self._outputs(pl_module, chosen)

        if outputs and self.divergence == "auto" and self._recognised is None:
            try:
                with torch.no_grad():
                    found = recognise(outputs_of_loss(), batch, loss_fn(batch), self.who)
            except NoLoss:
                return None
            self._recognised = found.divergence
            rank_zero_info(f"{self.who}: the change of the outputs is measured by {found}.")
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return ProximalObjective(
            loss_fn,
            output_fn if outputs else None,
            self._recognised or self.divergence,  # type: ignore[arg-type]
            loss_at_anchor=loss_before if part is batch else None,
            grad_scale=1.0 if scaler is None else float(scaler.get_scale()),
        )

    @contextmanager
    def _side(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        with undisturbed(pl_module), trainer.precision_plugin.train_step_context():
            yield

    def _loss(self, pl_module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
        if self.loss_fn is not None:
            name, loss = "loss_fn", cast(Any, self.loss_fn(pl_module, batch))
        else:
            takes_index = submodule("utilities.signature_utils").is_param_in_hook_signature(
                pl_module.training_step, "batch_idx", min_args=2
            )
            name = "training_step"
            result: Any = pl_module.training_step(batch, *([batch_idx] if takes_index else []))
            loss = result["loss"] if isinstance(result, dict) and "loss" in result else result
            if loss is None:
                raise NoLoss
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise MisconfigurationException(
                f"{self.who}: {name} must return a scalar loss; got {_described(loss)}. Pass loss_fn=..., a function "
                "(module, batch) -> scalar loss."
            )
        return loss

    def _outputs(self, pl_module: LightningModule, batch: Any) -> Tensor:
        outputs = (
            _default_outputs(pl_module, batch, self.who) if self.output_fn is None else self.output_fn(pl_module, batch)
        )
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.numel() == 0:
            raise MisconfigurationException(
                f"{self.who}: output_fn must return a floating-point tensor, the network's outputs (logits, or the "
                f"mean of a regression); got {_described(outputs)}. Pass output_fn=..., "
                "a function (module, batch) -> tensor."
            )
        return outputs

    # -- state

    def state_dict(self, *, collective: bool = True) -> dict[str, Any]:
        """The number of draws, and B' of every rank while it is small and made of tensors.

        With ``collective=False`` no other rank is asked, and of several ranks no batch is kept.
        """
        distributed = dist.is_available() and dist.is_initialized()
        if distributed and not collective:
            return {"draws": self.draws, "previous": None}
        previous = self._part_of_previous() if self.fsd_batch == "previous" else None
        plain = _plain_bytes(previous)
        size = math.inf if plain is None else plain
        if distributed:
            sizes: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(sizes, size)
            size = sum(sizes)
        if size > SAVED_BATCH_LIMIT:
            return {"draws": self.draws, "previous": None}
        batches = [apply_to_collection(previous, Tensor, lambda t: t.detach().cpu().clone())]
        if distributed:
            mine, batches = batches[0], [None] * dist.get_world_size()
            dist.all_gather_object(batches, mine)
        return {"draws": self.draws, "previous": batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state back; B' moves to its device when training starts."""
        self.draws, self._saved = state["draws"], state["previous"]


def _set_rng(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> None:
    """Start from the random state that the training pass started from."""
    if state is not None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)


def _random_access(loader: Any, who: str) -> DataLoader[Any]:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = "an IterableDataset" if isinstance(loader, DataLoader) else f"a {type(loader).__name__}"
        raise MisconfigurationException(
            f"{who}: fsd_batch draws random examples and needs one DataLoader over a map-style dataset; got {kind}. "
            "Use fsd_batch='previous', or pass such a DataLoader."
        )
    return loader


def _default_outputs(pl_module: LightningModule, batch: Any, who: str) -> Any:
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, Tensor):
        raise MisconfigurationException(
            f"{who}: the outputs are module(batch[0]) by default, and this batch is {_described(batch)}. Pass "
            "output_fn=..., a function (module, batch) -> tensor of outputs."
        )
    try:
        return pl_module(inputs)
    except (TypeError, NotImplementedError) as error:
        raise MisconfigurationException(
            f"{who}: the outputs are module(batch[0]) by default, and that failed: {error}. Pass output_fn=..., a "
            "function (module, batch) -> tensor of outputs."
        ) from error


def _lengths(batch: Any) -> set[int]:
    lengths: set[int] = set()
    apply_to_collection(batch, Tensor, lambda t: lengths.add(len(t) if t.ndim else 0))
    return lengths


def _part(batch: Any, fraction: float, least: int = 2) -> Any:
    """The first rows of every tensor, at least so many, where all tensors agree on their number."""
    lengths = _lengths(batch)
    if fraction == 1 or len(lengths) != 1 or (n := lengths.pop()) < 2:
        return batch
    rows = max(least, math.ceil(n * fraction))
    return apply_to_collection(batch, Tensor, lambda t: t[:rows])


def _plain_bytes(batch: Any) -> int | None:
    """Size of a batch made of tensors, plain values and plain containers; ``None`` for any other."""
    if batch is None or type(batch) in (bool, int, float, str):
        return 0
    if type(batch) is Tensor:
        return batch.numel() * batch.element_size()
    if type(batch) in (tuple, list, dict):
        sizes = [_plain_bytes(part) for part in (batch.values() if type(batch) is dict else batch)]
        return None if None in sizes else sum(size for size in sizes if size is not None)
    return None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, dict):
        return f"a dict with keys {list(value)}"
    return "None" if value is None else f"a {type(value).__name__}"
