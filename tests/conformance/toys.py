"""Small right components, and wrong ones on purpose: what the helpers and the suite are tried on."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_ext._lightning import Callback, LightningModule
from lightning_ext.testing import StatefulLoader


def rows(n=12, width=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(n, width, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def loaders():
    """Three batches of four to train on, two to validate on; order and content never touch the global generator."""
    return StatefulLoader(rows(), batch_size=4), DataLoader(rows(6, seed=2), batch_size=3)


class Net(LightningModule):
    """BatchNorm and momentum: state that an observer can disturb. Dropout too, on request."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[0]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


class Plain(Net):
    """Without BatchNorm: two processes make the steps of one."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class NoisyNet(Net):
    """Draws from the global generator in every step: right in itself, but it cannot resume bit for bit."""

    def __init__(self):
        super().__init__(dropout=0.5)


class Norm(Callback):
    """A right observer: reads parameters, logs, keeps a running maximum that is saved."""

    def __init__(self, every=1):
        self.every, self.largest = every, 0.0

    @property
    def state_key(self):
        return self._generate_state_key(every=self.every)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        norm = sum(p.detach().square().sum() for p in pl_module.parameters())
        self.largest = max(self.largest, norm.item())
        pl_module.log("toy/norm", norm)

    def state_dict(self):
        return {"largest": self.largest}

    def load_state_dict(self, state_dict):
        self.largest = state_dict["largest"]


class Backward(Callback):
    """Fault: a second backward before the optimiser step."""

    def on_after_backward(self, trainer, pl_module):
        pl_module.net.eval()
        pl_module(torch.ones(2, 6)).sum().backward()
        pl_module.net.train()


class TakesGrad(Callback):
    """Fault: throws the gradients away after the step, where nothing but ``.grad`` shows it."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.zero_grad()


class DrawsTorch(Callback):
    """Fault: draws from torch's global generator."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.rand(1)


class DrawsNumpy(Callback):
    """Fault: draws from NumPy's global generator."""

    def on_validation_end(self, trainer, pl_module):
        import numpy as np

        np.random.rand()  # noqa: NPY002


class DrawsPython(Callback):
    """Fault: draws from Python's global generator."""

    def on_train_epoch_end(self, trainer, pl_module):
        import random

        random.random()


class FlipsMode(Callback):
    """Fault: leaves the module in eval mode."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.net[3].eval()


class MovesBatchNorm(Callback):
    """Fault: a forward pass in train mode updates running statistics."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.net[:2](batch[0])


class LeavesHook(Callback):
    """Fault: a forward hook that nobody removes."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.net[0].register_forward_hook(lambda *_: None)


class ScalesLoggedLoss(Callback):
    """Fault: changes the optimiser's learning rate."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.optimizers[0].param_groups[0]["lr"] *= 0.5


class Decay(Callback):
    """A right method: shrinks the weights by a factor that itself shrinks, and saves it."""

    def __init__(self):
        self.factor = 0.99

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.factor *= 0.99
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(self.factor)

    def state_dict(self):
        return {"factor": self.factor}

    def load_state_dict(self, state_dict):
        self.factor = state_dict["factor"]


class ForgetfulDecay(Decay):
    """Fault: state that is not saved."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


class Mean(Metric):
    """A right metric: the mean over rows, from a sum and a count."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, value):
        self.total += value.sum()
        self.count += value.numel()

    def compute(self):
        return {"mean": self.total / self.count, "count": self.count}


class Sorted(Metric):
    """A right metric with a list state; sorted, because merging and gathering do not keep the order."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, values):
        self.values.append(values)

    def compute(self):
        return dim_zero_cat(self.values).sort().values


class UnreducedMean(Mean):
    """Fault: ranks keep their own sums."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx=None)
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx=None)

    def compute(self):
        return {"mean": (self.total / self.count).reshape(-1)[0], "count": self.count.reshape(-1)[0]}


class UnsyncedMean(Mean):
    """Fault: right in one process, but never reduced over ranks."""

    def _sync_dist(self, *args, **kwargs):
        pass


class MeanOfMeans(Mean):
    """Fault: forgets that batches have sizes."""

    def update(self, value):
        self.total += value.mean()
        self.count += 1


class AttributeMean(Mean):
    """Fault: a running number outside the states, which reset and ranks do not see."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def update(self, value):
        super().update(value)
        self.seen += value.numel()

    def compute(self):
        return {"mean": self.total / self.seen, "count": self.count}


class StrayTensor(Mean):
    """Fault: a tensor that does not move with the metric."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(())


class RefusesMerge(Mean):
    """Fault: ``merge_state`` is not supported by this setting."""

    full_state_update = True


class OrderMean(Mean):
    """Fault: the first update counts twice, so parts depend on who saw them."""

    def update(self, value):
        super().update(value if self.count else torch.cat([value, value]))


class DestructiveCompute(Mean):
    """Fault: ``compute`` changes the state."""

    def compute(self):
        self.total = self.total / self.count
        return {"mean": self.total, "count": self.count}


class KeepsOldSums(Mean):
    """Fault: ``reset`` forgets to, once there are many rows."""

    def reset(self):
        if self.count <= 6:
            super().reset()


class SharesItsCopy(Mean):
    """Fault: a copy is the same object."""

    def __deepcopy__(self, memo):
        return self


class ForgetsWhenPickled(Mean):
    """Fault: pickling starts afresh."""

    def __reduce__(self):
        return type(self), ()

    def __deepcopy__(self, memo):
        twin = type(self)()
        twin.total, twin.count, twin._update_count = self.total.clone(), self.count.clone(), self._update_count
        return twin


class IgnoresPartner(Mean):
    """Fault: ``merge_state`` does nothing."""

    def merge_state(self, incoming_state):
        pass


class SavesZeros(Mean):
    """Fault: ``state_dict`` does not hold the sums."""

    def state_dict(self, *args, **kwargs):
        return {name: torch.zeros_like(value) for name, value in super().state_dict(*args, **kwargs).items()}


class StaysSynced(Mean):
    """Fault: after ``compute`` a rank keeps the sums of all ranks as its own."""

    def unsync(self, *args, **kwargs):
        self._is_synced = False
