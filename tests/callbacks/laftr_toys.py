"""An estimator whose distance is known in closed form, modules to attach it to, and a fit."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import LightningModule, Trainer
from lightning_ext._testing.bitwise import seeded
from lightning_ext.nn import FunctionSpaceEstimator

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
         "enable_model_summary": False, "enable_checkpointing": False, "max_epochs": 1}  # fmt: skip


def table(n=11, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def loader(n=12, seed=1, **kwargs):
    return DataLoader(table(n, seed), **{"batch_size": 4, **kwargs})


class Net(LightningModule):
    """Linear, tanh, linear, and plain SGD: a step is ``-lr`` times the gradient."""

    lr = 0.1

    def __init__(self, net=None):
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def flat(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def seeded_net(cls=Net, seed=0, **kwargs):
    with seeded(seed):
        return cls(**kwargs)


def train(module, callbacks, data=None, **kwargs):
    trainer = Trainer(callbacks=callbacks, **{**QUIET, **kwargs})
    trainer.fit(module, loader() if data is None else data)
    return trainer


class Anchor(FunctionSpaceEstimator):
    r"""D = c/2 |theta - theta_0|^2 + noise * e . (theta - theta_0): the gradient is known by hand.

    ``seen`` (samples, sum of inputs) stands for the statistics.
    """

    def __init__(self, scale=1.0, noise=0.0, **kwargs):
        super().__init__(**kwargs)
        self.scale, self.noise = scale, noise

    def _fit(self, module, batches, reduce):
        seen = torch.zeros(2, dtype=torch.float64)
        for x, _ in batches:
            seen += torch.tensor([len(x), x.double().sum()])
        self._kept = {"anchor": flat(module).clone(), "seen": seen if reduce is None else reduce(seen)}

    @property
    def anchor(self):
        return self._kept["anchor"]

    @property
    def seen(self):
        return self._kept["seen"]

    def draw(self):
        return torch.randn(len(self.anchor), generator=self.generator(torch.device("cpu")))

    def _distance(self, module):
        change = torch.cat([p.reshape(-1) for p in module.parameters()]) - self.anchor
        return self.scale / 2 * change.square().sum() + self.noise * self.draw() @ change
