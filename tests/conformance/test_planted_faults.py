"""A suite that never goes red proves nothing: here every check meets the fault that it is for."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_ext._lightning import Callback, LightningDataModule
from tests.conformance import toys
from tests.conformance.checks import CHECKS
from tests.conformance.entry import Entry
from tests.conformance.registry import TOYS

NORM, PLAIN, MEAN, LINEAR = TOYS


def observer(fault, module=toys.NoisyNet):
    return dataclasses.replace(NORM, factory=fault, other=None, module=module)


def method(fault):
    return Entry(["Fault"], "callback-method", fault, module=toys.Plain)


def module(fault):
    return dataclasses.replace(PLAIN, factory=fault)


def metric(fault):
    return dataclasses.replace(MEAN, factory=fault)


def layer(fault):
    return dataclasses.replace(LINEAR, factory=fault)


class NoDocs(toys.Plain):
    __doc__ = None


class Unpicklable(toys.Norm):
    """Fault: holds a function that cannot be pickled."""

    def __init__(self, every=1):
        super().__init__(every)
        self.function = lambda: None


class ForgetsOnCopy(toys.Norm):
    """Fault: a copy loses an argument."""

    def __getstate__(self):
        return {"every": 7, "largest": self.largest}


class KeepsBatches(toys.Norm):
    """Fault: after training it holds what cannot be pickled."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.kept = (item for item in batch)


class NoTest(toys.Plain):
    """Fault: logs nothing when tested."""

    def test_step(self, batch, batch_idx):
        pass


class NeedsLogger(toys.Norm):
    """Fault: takes a logger for granted, which fast_dev_run and ``logger=False`` do not have."""

    def on_train_start(self, trainer, pl_module):
        trainer.logger.log_metrics({})


class StopsAfterStep(toys.Norm):
    """Fault: counts steps of its own and ends the training."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = True


class OnlyOnce(toys.Plain):
    """Fault: cannot be trained twice."""

    used = False

    def on_fit_start(self):
        if self.used:
            raise RuntimeError("already trained")
        self.used = True


class StepsAlways(toys.Plain):
    """Fault: switches the user's accumulation off."""

    def on_train_start(self):
        self.trainer.accumulate_grad_batches = 1


class Unclipped(toys.Plain):
    """Fault: undoes the clipping."""

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        for parameter in self.parameters():
            parameter.grad.mul_(100)


class HalvesItself(toys.Plain):
    """Fault: turns its parameters into bfloat16."""

    def on_train_end(self):
        self.bfloat16()


class Overflows(toys.Plain):
    """Fault: mathematics that half precision cannot hold."""

    def training_step(self, batch, batch_idx):
        hidden = self.net[0](batch[0])
        loss = super().training_step(batch, batch_idx) + (hidden.exp() * 1e5).log().square().mean()
        self.log("train/loss", loss)
        return loss


class NeedsGrad(toys.Norm):
    """Fault: autograd in validation."""

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        with torch.enable_grad():
            pl_module(batch[0]).sum().backward()
        pl_module.zero_grad()


class Breaks(nn.Module):
    """A network that behaves otherwise when it is compiled."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x):
        return self.inner(x) * (2.0 if torch.compiler.is_compiling() else 1.0)


class BreaksWhenCompiled(toys.Plain):
    """Fault: the inner network computes something else when compiled."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 4), Breaks(), nn.Linear(2, 3))


class LosesWeights(toys.Plain):
    """Fault: a weight that the checkpoint does not hold."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"]["net.0.weight"] = torch.zeros(8, 6)


class SavesObjects(toys.Norm):
    """Fault: state that ``weights_only=True`` refuses."""

    def state_dict(self):
        return {"largest": object.__new__(NoTest)}


class RankOnly(toys.Plain):
    """Fault: a quantity of one rank goes into the weights unreduced."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            self.net[0].weight.add_(batch[0].mean())


class SameData(LightningDataModule):
    """Fault: every rank trains on the same batches."""

    def train_dataloader(self):
        return toys.StatefulLoader(toys.rows(), batch_size=4)

    def val_dataloader(self):
        return DataLoader(toys.rows(), batch_size=4)


class SumLoss(toys.Plain):
    """Fault: a loss that is summed over the batch, which DDP then averages over ranks."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * len(batch[0])


class OneKey(toys.Norm):
    """Fault: two instances collide in the checkpoint."""

    @property
    def state_key(self):
        return "one"


SHARED = nn.Linear(8, 3)


class Shares(toys.Plain):
    """Fault: two modules share a layer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), SHARED)


class DeadWeight(nn.Linear):
    """Fault: a parameter that nothing uses."""

    def __init__(self):
        super().__init__(4, 2)
        self.unused = nn.Parameter(torch.ones(1))


class StateOutside(nn.Linear):
    """Fault: computes with a tensor that the state dict does not hold."""

    def __init__(self):
        super().__init__(4, 2)
        self.scale = torch.rand(())

    def forward(self, x):
        return super().forward(x) * self.scale


class OnlyFloat32(nn.Linear):
    """Fault: fixes the dtype of its own tensor."""

    def __init__(self):
        super().__init__(4, 2)

    def forward(self, x):
        return x @ torch.ones(4, 2)


class GradientInForward(nn.Linear):
    """Fault: autograd in the forward pass."""

    def __init__(self):
        super().__init__(4, 2)

    def forward(self, x):
        y = super().forward(x.requires_grad_())
        return torch.autograd.grad(y.sum(), x)[0]


class CompiledDiffers(Breaks):
    """Fault: computes something else when compiled."""


SHARED_WEIGHT = nn.Parameter(torch.ones(2, 4))


class SharesWeight(nn.Linear):
    """Fault: two instances share a parameter."""

    def __init__(self):
        super().__init__(4, 2)
        self.weight = SHARED_WEIGHT


class RankDependent(nn.Linear):
    """Fault: behaves otherwise where parameters are sharded."""

    def __init__(self):
        super().__init__(4, 2)

    def forward(self, x):
        return super().forward(x) * (2 if torch.distributed.is_initialized() else 1)


class SharedTotal(toys.Mean):
    """Fault: instances add into one class attribute."""

    seen = [0.0]  # noqa: RUF012

    def update(self, value):
        super().update(value)
        self.seen[0] += 1.0

    def compute(self):
        return {"mean": self.total / self.count, "count": self.count * 0 + self.seen[0]}


FAULTS = [
    # the four that every method must be safe from
    ("leaves_training_alone", observer(toys.Backward), "gradient of"),
    ("leaves_training_alone", observer(toys.DrawsTorch), "global torch random state"),
    ("resumes_from_the_middle_of_an_epoch", method(toys.ForgetfulDecay), "differs from the uninterrupted one"),
    ("metric_laws", metric(toys.UnsyncedMean), "two ranks"),
    # further faults of observers
    ("leaves_training_alone", observer(toys.FlipsMode), "training mode of"),
    ("leaves_training_alone", observer(toys.MovesBatchNorm), "running_mean"),
    ("leaves_training_alone", observer(toys.LeavesHook), "number of hooks"),
    # one for each of the other checks
    ("construct_and_repr", module(NoDocs), "docstring"),
    ("pickle_and_deepcopy", observer(Unpicklable), "pickle"),
    ("pickle_and_deepcopy", observer(ForgetsOnCopy), "the copy differs"),
    ("copies_after_training", observer(KeepsBatches), "pickle"),
    ("fit_validate_test_predict", module(NoTest), "test logged nothing"),
    ("fit_validate_test_predict", observer(NeedsLogger), "log_metrics"),
    ("fast_dev_run", observer(NeedsLogger), "log_metrics"),
    ("overfit_batches", observer(StopsAfterStep), "assert 1 == 3"),
    ("second_fit", module(OnlyOnce), "already trained"),
    ("accumulate_grad_batches", module(StepsAlways), "three batches in twos"),
    ("gradient_clipping", module(Unclipped), "were not clipped"),
    ("bf16_mixed", module(HalvesItself), "bfloat16"),
    ("fp16_with_a_scaler", module(Overflows), "not finite|left every weight as it was"),
    ("validate_in_inference_mode", observer(NeedsGrad, toys.Plain), "inference|does not require grad"),
    ("compiled_inner_network", module(BreaksWhenCompiled), "differs"),
    ("weights_only_load", module(LosesWeights), "a weight is lost"),
    ("weights_only_load", observer(SavesObjects), "(?i)weights.only"),
    ("resumes_from_the_end_of_an_epoch", method(toys.ForgetfulDecay), "differs from the uninterrupted one"),
    ("resumes_from_the_end_of_an_epoch", module(toys.NoisyNet), "differs from the uninterrupted one"),
    ("ddp_ranks_agree", module(RankOnly), "weights have drifted apart"),
    ("ddp_ranks_agree", Entry(["SameData"], "data", SameData), "both ranks trained on the same data"),
    ("ddp_equals_one_process", module(SumLoss), "differs from one process"),
    ("ddp_equals_one_process", module(toys.Net), "differs from one process"),
    ("two_instances", observer(OneKey), "state_key"),
    ("two_instances", module(Shares), "training one module changes another"),
    ("cli_recipe", NORM, "name the recipe"),
    ("cli_recipe", dataclasses.replace(NORM, recipe="no-such-recipe"), "no such recipe"),
    ("fsdp_is_refused_or_stated", NORM, "DID NOT RAISE"),
    ("fsdp_shards", layer(RankDependent), "sharded network differs"),
    ("two_metrics", metric(SharedTotal), "a second metric changes the first"),
    ("forward_backward", layer(DeadWeight), "no gradient reaches"),
    ("state_dict_round_trip", layer(StateOutside), "computes something else"),
    ("float64_and_bf16", layer(OnlyFloat32), "dtype"),
    ("compiled", layer(CompiledDiffers), "computes something else"),
    ("inference_mode", layer(GradientInForward), "does not require grad"),
    ("two_modules", layer(SharesWeight), "share a parameter"),
]


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [pytest.param(*fault, id=f"{fault[0]}-{getattr(fault[1].factory, '__name__', 'toy')}") for fault in FAULTS],
)
@pytest.mark.filterwarnings("ignore")
def test_a_planted_fault_is_caught(name, entry, message):
    kinds, function = CHECKS[name]
    assert entry.kind in kinds
    with pytest.raises((Exception, pytest.fail.Exception), match=message):
        function(entry)


def test_every_check_has_a_planted_fault():
    # manual_optimisation can only fail by the component's own exception, which the next test plants
    assert {name for name, _, _ in FAULTS} | {"manual_optimisation"} == set(CHECKS)


def test_manual_optimisation_passes_on_the_components_own_error():
    class Refuses(Callback):
        def setup(self, trainer, pl_module, stage):
            if not pl_module.automatic_optimization:
                raise ValueError("only automatic optimisation")

    with pytest.raises(ValueError, match="only automatic optimisation"):
        CHECKS["manual_optimisation"][1](method(Refuses))
