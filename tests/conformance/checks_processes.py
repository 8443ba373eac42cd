"""Checks over two processes, and of strategies that shard parameters."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ext._lightning import Callback, LightningDataModule, MisconfigurationException, submodule
from lightning_ext._testing.bitwise import first_difference, fit, seeded
from lightning_ext.testing import ddp_trainer_kwargs, run_ddp
from tests.conformance.entry import Entry, new_trainer
from tests.conformance.suite import TRAINS, assert_finite, check, finite_metrics, total_of, weights


class Spread(Callback):
    """Fails on every rank if the ranks' weights or gradients have drifted apart, or if they saw the same data."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        tensors: list[Tensor] = []
        apply_to_collection(batch, Tensor, tensors.append)
        self.seen.append(tensors[0].detach().double().sum())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.compare(trainer, pl_module, lambda p: p.detach(), "weights")
        self.compare(trainer, pl_module, lambda p: p.grad, "gradients")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        gathered = trainer.strategy.all_gather(torch.stack(self.seen))
        assert (gathered[0] != gathered[1]).any(), "both ranks trained on the same data, so nothing was shown"

    def compare(self, trainer: Any, pl_module: Any, read: Callable[[Any], Any], what: str) -> None:
        flat = torch.cat([v.reshape(-1) for p in pl_module.parameters() if (v := read(p)) is not None])
        gathered = trainer.strategy.all_gather(flat)
        spread = (gathered[0] - gathered[1]).abs().max().item()
        assert spread == 0.0, f"the ranks' {what} have drifted apart by {spread:.3g}"


@check(*TRAINS)
@pytest.mark.ddp
def ddp_ranks_agree(entry: Entry) -> None:
    module = entry.new_module()
    before = weights(module)
    callbacks = [*entry.new_callbacks(), Spread()]
    trainer = new_trainer(callbacks, **ddp_trainer_kwargs(max_epochs=2))
    fit(trainer, module, entry.sharded_data())
    assert first_difference(before, weights(module)) is not None
    assert_finite(finite_metrics(entry, trainer), "a logged metric")


@check(*TRAINS)
@pytest.mark.ddp
def ddp_equals_one_process(entry: Entry) -> None:
    """Two ranks with batches of two make the steps of one process with batches of four, up to rounding."""

    def run(world_size: int, **kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with seeded(0):
            module = entry.new_module()
            entry.quiet(module)
            trainer = new_trainer(entry.new_callbacks(), **{"use_distributed_sampler": False, **kwargs})
            fit(trainer, module, _Halves(entry.dataset(), world_size))
        return weights(module), dict(trainer.callback_metrics)

    one, one_logged = run(1)
    two, two_logged = run(2, **ddp_trainer_kwargs())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=f"{name} differs from one process")
    for name in (key for key in one_logged if not key.startswith("train/")):  # those are rank 0's own
        torch.testing.assert_close(two_logged[name], one_logged[name], rtol=1e-4, atol=1e-5, msg=f"{name} differs")


class _Halves(LightningDataModule):
    """Rank r takes every other row; a global batch has the rows of the single process's batch."""

    def __init__(self, items: Any, world_size: int) -> None:
        super().__init__()
        self.items, self.world_size = items, world_size

    def train_dataloader(self) -> DataLoader[Any]:
        rank = dist.get_rank() if self.world_size > 1 else 0
        sampler = DistributedSampler(self.items, self.world_size, rank, shuffle=False)
        return DataLoader(self.items, batch_size=4 // self.world_size, sampler=sampler)

    val_dataloader = train_dataloader


@check("callback-observer", "callback-method")
def fsdp_is_refused_or_stated(entry: Entry) -> None:
    """A callback that reads or writes parameters refuses sharded strategies by name, in ``setup``."""
    trainer = types.SimpleNamespace(strategy=submodule("strategies").FSDPStrategy(), world_size=1)
    with pytest.raises(MisconfigurationException, match="FSDP"):
        entry.factory().setup(trainer, entry.new_module(), "fit")


@check("module", "nn")
@pytest.mark.ddp
def fsdp_shards(entry: Entry) -> None:
    """Sharded over two ranks, the networks give the same outputs and gradients as whole."""

    def whole(component: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        value = _scalar(entry, component)
        value.backward()
        grads = {n: p.grad for n, p in component.named_parameters() if p.grad is not None}
        return value.detach(), grads

    def sharded(rank: int, component: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for network in [getattr(component, name) for name in entry.networks] if entry.kind == "module" else [component]:
            fully_shard(network, mesh=mesh)
        value, grads = whole(component)
        return value, {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}

    with seeded(0):
        component = entry.factory()
    results = run_ddp(sharded, component)
    value, grads = whole(component)
    for ours, shards in results:
        torch.testing.assert_close(ours, value, msg="the output of the sharded network differs")
        assert set(shards) == set(grads)
        for name, grad in grads.items():
            torch.testing.assert_close(shards[name], grad, msg=f"the sharded gradient of {name} differs")


def _scalar(entry: Entry, component: nn.Module) -> Tensor:
    if entry.kind == "nn":
        return total_of(entry.call(component, entry.inputs()))
    component.log = component.log_dict = lambda *args, **kwargs: None  # type: ignore[assignment]
    component.trainer = new_trainer()
    component.trainer.training = True
    batch = next(iter(DataLoader(entry.dataset(), batch_size=4)))
    return component.training_step(batch, 0)
