"""Schedulers and the callbacks that others bring: monitors, checkpoints, averages of the weights."""

import csv
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_ext._lightning import Callback, MisconfigurationException, Trainer, submodule
from lightning_ext.callbacks import APOLearningRate, HypergradientLR
from tests.callbacks import apo_toys as toys

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*called without a model")
SCHEDULERS = {
    "StepLR": lambda o: StepLR(o, 3, gamma=0.5),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=20),
    "LambdaLR": lambda o: LambdaLR(o, lambda step: min(1.0, step / 8)),  # a warm-up from 0
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.1, total_steps=25, cycle_momentum=False),
    "SequentialLR": lambda o: SequentialLR(o, [LinearLR(o, 0.1), StepLR(o, 4)], [6]),
}
MULTIPLY = {"on_scheduler": "multiply", "divergence": "kl", "every_n_steps": 2, "warmup_steps": 0}


class Scheduled(toys.Classifier):
    """Plain SGD, so that the step tells the learning rate, under a scheduler that moves with every step."""

    def __init__(self, scheduler, rate=0.05, **config):
        super().__init__(lambda p: torch.optim.SGD(p, lr=rate))
        self.scheduler, self.config = scheduler, config

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        config = {"scheduler": self.scheduler(optimizer), "interval": "step", **self.config}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Factors(Callback):
    """The rate that the schedule asks for, what the callback has learned, and the rate that each step was made with."""

    def __init__(self, callback):
        self.callback, self.factors, self.made, self.asked = callback, [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = pl_module.net[4].bias.detach().clone()
        self.asked.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        bias = pl_module.net[4].bias
        self.made.append(((self.before - bias.detach()) @ bias.grad / (bias.grad @ bias.grad)).item())
        self.factors.append(self.callback.state_dict()["optimizers"]["0"]["multiplier"][-1].item())

    def check(self):
        for asked, factor, made in zip(self.asked, self.factors, self.made, strict=True):
            assert made == pytest.approx(asked * factor, rel=1e-6, abs=1e-12)


def multiplied(module, **kwargs):
    callback = APOLearningRate(**{**MULTIPLY, **kwargs})
    watch = Factors(callback)
    trainer, seen = toys.fit(module.double(), doubles(120), callback, watch)
    return trainer, seen, watch


def doubles(n):
    x, labels = toys.rows(n).tensors
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.double(), labels), 6)


@pytest.mark.parametrize("granularity", ["group", "global", "layer"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_are_made_with_the_schedule_times_the_factor(name, granularity):
    _, alone = toys.fit(Scheduled(SCHEDULERS[name]).double(), doubles(120))
    torch.manual_seed(0)
    _, seen, watch = multiplied(Scheduled(SCHEDULERS[name]), granularity=granularity)
    assert seen.rates == alone.rates, "the schedule itself is untouched, to the last bit"
    assert len(set(watch.factors)) > 6
    watch.check()
    last = "net.4" if granularity == "layer" else "0"
    due = 18  # counted from 0
    assert seen.logged[due][f"apo/lr/0/{last}"] == pytest.approx(watch.made[due], rel=1e-6)


def test_a_plateau_lowers_the_schedule_and_not_the_factor():
    plateau = {"monitor": "train/loss", "reduce_on_plateau": True}
    module = Scheduled(lambda o: ReduceLROnPlateau(o, patience=2, factor=0.5, mode="max"), **plateau)
    _, seen, watch = multiplied(module)
    rates = [r[0] for r in seen.rates]
    assert set(rates) <= {0.05 / 2**k for k in range(20)}
    assert len(set(rates)) > 2
    watch.check()


def test_with_a_meta_learning_rate_of_zero_the_schedule_is_followed_to_the_last_bit():
    def weights(*callbacks):
        torch.manual_seed(0)
        module = Scheduled(SCHEDULERS["LambdaLR"])
        toys.fit(module, toys.loader(60), *callbacks)
        return [p.detach() for p in module.parameters()]

    ours = weights(APOLearningRate(meta_lr=0.0, **MULTIPLY))
    assert all(torch.equal(a, b) for a, b in zip(ours, weights(), strict=True))


@pytest.mark.parametrize("name", ["CosineAnnealingWarmRestarts", "warm-up"])
def test_where_a_schedule_goes_below_the_bounds_the_factor_does_not_leap(name):
    """The bounds limit what is learned; a schedule that goes to nothing is not to be filled up to them."""
    schedule = {
        "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 5, eta_min=1e-12),
        "warm-up": lambda o: LambdaLR(o, lambda step: 1e-9 * step if step < 8 else 1.0),
    }[name]
    _, _, watch = multiplied(Scheduled(schedule), every_n_steps=1)
    logs = [0.0, *(math.log(factor) for factor in watch.factors)]
    assert max(abs(b - a) for a, b in itertools.pairwise(logs)) <= math.log(2) + 1e-9


@pytest.mark.parametrize("kind", [APOLearningRate, HypergradientLR])
def test_a_scheduler_is_refused_by_name_with_the_way_out(kind):
    for name in ("StepLR", "OneCycleLR"):
        message = f"{kind.__name__}: {name} sets the learning rate of the same SGD.*on_scheduler='multiply'"
        with pytest.raises(MisconfigurationException, match=message):
            toys.fit(Scheduled(SCHEDULERS[name]), toys.loader(), kind())


def test_a_scheduler_of_another_optimizer_is_nobodys_business():
    class Two(toys.Manual):
        def configure_optimizers(self):
            first, second = (torch.optim.SGD(self.net[i].parameters(), lr=0.05) for i in (0, 4))
            return [first, second], [StepLR(second, 1)]

    callback = APOLearningRate(optimizers=[0], loss_fn=toys.cross_entropy, divergence="kl")
    _, seen = toys.fit(Two(), toys.loader(), callback)
    assert seen.rates[-1][0] != 0.05
    with pytest.raises(MisconfigurationException, match="StepLR"):
        toys.fit(Two(), toys.loader(), APOLearningRate(loss_fn=toys.cross_entropy))


def test_hypergradient_descent_on_top_of_a_schedule():
    module = Scheduled(SCHEDULERS["StepLR"])
    callback = HypergradientLR(meta_lr=1e-2, on_scheduler="multiply")
    watch = Factors(callback)
    toys.fit(module.double(), doubles(60), callback, watch)
    assert len(set(watch.factors)) > 6
    watch.check()


# -- callbacks --------------------------------------------------------------------------------------------------------


def lightning(name):
    return getattr(submodule("callbacks"), name)


def test_the_monitor_shows_the_learning_rates_that_were_found(tmp_path):
    logger = submodule("loggers").CSVLogger(tmp_path)
    monitor = lightning("LearningRateMonitor")(logging_interval="step")
    _, seen = toys.fit(toys.Classifier(), toys.loader(48), APOLearningRate(), monitor, logger=logger)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    shown = [float(row["lr-SGD"]) for row in table if row.get("lr-SGD")]
    assert shown == pytest.approx([0.05, *(r[0] for r in seen.rates[:-1])], rel=1e-6)
    found = [float(row["apo/lr/0/0"]) for row in table if row.get("apo/lr/0/0")]
    assert found == pytest.approx([r[0] for r in seen.rates[1:]], rel=1e-6)


@pytest.mark.parametrize("saved", ["ModelCheckpoint", "OnExceptionCheckpoint"])
def test_checkpoints_hold_what_was_learned(tmp_path, saved):
    class Stops(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 6:
                raise KeyError("an accident")

    callback = APOLearningRate(granularity="layer")
    if saved == "ModelCheckpoint":
        saver = lightning(saved)(dirpath=tmp_path, filename="saved", every_n_train_steps=6)
    else:
        saver = lightning(saved)(dirpath=tmp_path, filename="saved")
    kept = {}

    class Keeps(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept[batch_idx] = callback.state_dict()

    with pytest.raises(KeyError, match="an accident"):
        toys.fit(toys.Classifier(), toys.loader(48), callback, Keeps(), Stops(), saver, enable_checkpointing=True)
    state = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state, "nothing was saved"
    assert state["optimizers"]["0"]["count"] == 6
    assert torch.equal(state["optimizers"]["0"]["multiplier"], kept[5]["optimizers"]["0"]["multiplier"])


def test_averages_of_the_weights_beside_it(tmp_path):
    average = lightning("EMAWeightAveraging")(decay=0.5)
    module = toys.Classifier()
    _, seen = toys.fit(module, toys.loader(48), APOLearningRate(), average, max_epochs=2)
    weights = [p.clone() for p in seen.before[0]]
    expected = None
    for step in seen.after:
        expected = step if expected is None else [0.5 * e + 0.5 * s for e, s in zip(expected, step, strict=True)]
    assert seen.rates[-1][0] != 0.05
    assert not torch.equal(weights[0], module.net[0].weight)
    for p, e in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("granularity", ["group", "layer"])
def test_stochastic_weight_averaging_takes_the_learning_rate_over(granularity):
    averaging = lightning("StochasticWeightAveraging")(
        swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=2, annealing_strategy="linear"
    )
    callback = APOLearningRate(granularity=granularity)
    module = toys.Classifier(lambda p: torch.optim.SGD(p, lr=0.05))
    with pytest.warns(UserWarning, match="APOLearningRate: another callback has installed a learning-rate scheduler"):
        _, seen = toys.fit(module, toys.loader(24), callback, averaging, max_epochs=6)
    rates = [r[0] for r in seen.rates]
    if granularity == "group":
        assert len(set(rates[:4])) == 4
    assert rates[-1] == pytest.approx(0.02)
    assert all(b <= a for a, b in itertools.pairwise(rates[4:])), "annealed by the other callback alone"


def test_a_new_parameter_group_in_the_middle_of_training_is_taken_in():
    class Thaws(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": pl_module.net[0].parameters(), "lr": 0.001})

    module = toys.Classifier()
    module.optimizer = lambda p: torch.optim.SGD(module.net[4].parameters(), lr=0.05, momentum=0.9)
    _, seen = toys.fit(module, toys.loader(24), APOLearningRate(), Thaws(), max_epochs=2)
    assert seen.rates[4][1] != seen.rates[-1][1] != 0.001
    assert len({rates[0] for rates in seen.rates}) == 8
    assert not torch.equal(seen.after[-1][0], seen.before[4][0])


def test_validation_in_the_middle_of_an_epoch_changes_nothing():
    class Validates(toys.Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", toys.cross_entropy(self, batch))

    rates = []
    for kwargs in ({}, {"val_check_interval": 2}):
        torch.manual_seed(0)
        recorder, module = toys.Recorder(), Validates(norm=True)
        trainer = Trainer(callbacks=[APOLearningRate(), recorder], **{**toys.QUIET, **kwargs})
        trainer.fit(module, toys.loader(48), toys.loader(12))
        rates.append(recorder.rates)
    assert rates[0] == rates[1]
