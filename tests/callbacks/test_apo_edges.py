"""Where the learning-rate callback could go wrong without a word: rates of zero, odd modules, odd loaders."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_ext._lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_ext.callbacks import APOLearningRate, HypergradientLR, _apo_lookahead
from lightning_ext.callbacks._quiet import undisturbed
from lightning_ext.optim import APOPreconditioner
from tests.callbacks import apo_toys as toys


def test_the_first_step_after_the_warm_up_is_no_longer_than_any_other():
    callback = APOLearningRate(warmup_steps=6, every_n_steps=1, meta_lr=0.01)
    _, seen = toys.fit(toys.Classifier(), toys.loader(72), callback)
    logs = [math.log(rates[0]) for rates in seen.rates]
    assert abs(logs[6] - logs[5]) == pytest.approx(0.01, rel=1e-6)


class Zeros(toys.Classifier):
    """A schedule that is 0 at every third step."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, lambda t: float(t % 3 > 0)), "interval": "step"}]


@pytest.mark.parametrize(
    "make",
    [
        lambda: HypergradientLR(meta_lr=1e-4, on_scheduler="multiply"),
        lambda: HypergradientLR(meta_lr=1e-4, multiplicative=True, on_scheduler="multiply"),
        lambda: APOLearningRate(granularity="global", on_scheduler="multiply", **toys.EVERY_STEP),
    ],
)
def test_a_scheduled_rate_of_zero_breaks_nothing(make):
    callback, module = make(), Zeros()
    toys.fit(module, toys.loader(72), callback)
    factors = callback.state_dict()["optimizers"]["0"]["multiplier"]
    assert factors.isfinite().all()
    assert (factors != 1).all()
    assert all(p.isfinite().all() for p in module.parameters())


def test_one_tensor_for_the_rates_of_two_groups():
    def rates(lr):
        torch.manual_seed(0)
        module = toys.Classifier()
        half = list(module.parameters())
        module.optimizer = lambda p: torch.optim.Adam([{"params": half[:2]}, {"params": half[2:]}], lr=lr)
        return toys.fit(module, toys.loader(48), APOLearningRate(meta_optimizer="sgd", **toys.EVERY_STEP))[1].rates

    shared, own = rates(torch.tensor(1e-3, dtype=torch.float64)), rates(1e-3)
    assert shared == [pytest.approx(pair, rel=1e-9) for pair in own]
    assert shared[-1][0] != shared[-1][1]


class Normaliser(LightningModule):
    """Updates a buffer in the forward pass and multiplies by it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("mean", torch.tensor(1.0))

    def forward(self, x):
        self.mean.mul_(0.5).add_(x)
        return self.weight * self.mean


def test_a_graph_built_in_the_guard_keeps_the_buffers_it_was_built_with():
    module = Normaliser()
    with undisturbed(module):
        output = module(torch.tensor(5.0))
    (slope,) = torch.autograd.grad(output.square(), module.weight)
    assert slope.item() == pytest.approx(2 * 3 * 5.5 * 5.5)
    assert module.mean.item() == 1.0


class Dropped(LightningModule):
    def __init__(self, loss, outputs=5):
        super().__init__()
        self.net, self.loss = nn.Sequential(nn.Linear(6, outputs), nn.Dropout(0.5)), loss

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def half_sum(z, t):
    return 0.5 * (z - t).square().sum(1).mean()


def targets(n=24):
    x = toys.rows(n).tensors[0]
    return DataLoader(TensorDataset(x, x[:, :5] + 1), 6)


def test_dropout_does_not_hide_the_loss_and_another_training_is_recognised_anew(monkeypatch):
    said = []
    monkeypatch.setattr(_apo_lookahead, "rank_zero_info", said.append)
    callback = APOLearningRate()
    toys.fit(Dropped(half_sum), targets(), callback)
    toys.fit(Dropped(F.cross_entropy), toys.loader(), callback)
    assert ["divergence='squared_error', which belongs" in said[0], "divergence='kl', which belongs" in said[1]] == [
        True,
        True,
    ]


def test_labels_that_cross_entropy_leaves_out_are_left_out():
    class Tokens(Dropped):
        def training_step(self, batch, batch_idx):
            labels = batch[1].clone()
            labels[::2] = -100
            return F.cross_entropy(self(batch[0]), labels)

    x, t = toys.rows(24).tensors
    t = t.clone()
    t[::2] = -100
    callback = APOLearningRate()
    toys.fit(Tokens(None), DataLoader(TensorDataset(x, t), 6), callback)
    assert callback.state_dict()["optimizers"]["0"]["meta_count"] > 0


def test_a_checkpoint_that_was_tested_is_none_for_the_next_training(tmp_path):
    class Tested(toys.Classifier):
        def test_step(self, batch, batch_idx):
            self.log("test/loss", toys.cross_entropy(self, batch))

    callback, module = APOLearningRate(), Tested()
    trainer, _ = toys.fit(module, toys.loader(24), callback)
    path = tmp_path / "end.ckpt"
    trainer.save_checkpoint(path)
    fresh = APOLearningRate()
    again = Trainer(callbacks=[fresh], **toys.QUIET)
    again.test(module, toys.loader(24), ckpt_path=path, verbose=False)
    again.fit(module, toys.loader(24))
    assert fresh.state_dict()["optimizers"]["0"]["count"] == 4


def test_once_another_sets_the_rate_the_factors_of_layers_rest():
    class Pauses(Callback):
        def on_train_batch_start(self, trainer, *args):
            for controller in getattr(trainer.callbacks[0], "_controllers", {}).values():
                controller.paused = True
                controller.multiplier.fill_(11.0)

    def weights(*callbacks):
        torch.manual_seed(0)
        module = toys.Classifier()
        toys.fit(module, toys.loader(24), *callbacks)
        return [p.detach() for p in module.parameters()]

    ours = weights(APOLearningRate(granularity="layer"), Pauses())
    assert all(torch.equal(a, b) for a, b in zip(ours, weights(), strict=True))


def test_an_optimizer_has_one_callback():
    for pair in ([APOLearningRate(), HypergradientLR()], [APOLearningRate(optimizers=[0]), APOLearningRate()]):
        with pytest.raises(
            MisconfigurationException, match=r"both adapt optimizer 0\. Keep one of them.*optimizers=\["
        ):
            toys.fit(toys.Classifier(), toys.loader(), *pair)
    with pytest.raises(MisconfigurationException, match="APOPreconditioner cannot be rescaled: it learns the length"):
        toys.fit(toys.Classifier(APOPreconditioner), toys.loader(), APOLearningRate())


def test_a_micro_batch_without_a_loss():
    class Skips(toys.Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 4 == 3 else super().training_step(batch, batch_idx)

    _, seen = toys.fit(Skips(), toys.loader(72), APOLearningRate(), accumulate_grad_batches=2)
    assert seen.rates[-1][0] != 0.05


def test_sparse_and_complex_parameters_are_refused():
    class Sparse(toys.Classifier):
        def __init__(self):
            super().__init__(lambda p: torch.optim.SGD(p, lr=0.05))
            self.table = nn.Embedding(9, 6, sparse=True)

        def forward(self, x):
            return super().forward(x + self.table(torch.arange(len(x))))

    class Complex(toys.Classifier):
        def __init__(self):
            super().__init__(lambda p: torch.optim.SGD(p, lr=0.05))
            self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    with pytest.raises(RuntimeError, match=r"needs dense gradients.*sparse=False"):
        toys.fit(Sparse(), toys.loader(), APOLearningRate())
    with pytest.raises(MisconfigurationException, match=r"complex parameters.*view_as_real"):
        toys.fit(Complex(), toys.loader(), APOLearningRate())


def test_a_loss_that_does_not_reach_the_optimizer_is_an_error():
    callback = APOLearningRate(loss_fn=lambda module, batch: module.net[0].weight.sum(), lam_f=0.0)
    module = toys.Classifier()
    module.optimizer = lambda p: torch.optim.SGD(module.net[4].parameters(), lr=0.05)
    with pytest.raises(ValueError, match="neither the loss nor the outputs depend on these parameters; check loss_fn"):
        toys.fit(module, toys.loader(), callback)


@pytest.mark.parametrize("kind", ["batch sampler", "ready-made batches"])
def test_loaders_of_another_make(kind):
    rows = toys.rows(24)
    if kind == "batch sampler":
        data = DataLoader(rows, batch_sampler=BatchSampler(RandomSampler(rows), 6, False))
    else:
        data = DataLoader([rows[i : i + 6] for i in range(0, 24, 6)], batch_size=None)
    callback = APOLearningRate(fsd_batch="loader", fsd_fraction=1.0)
    toys.fit(toys.Classifier(), data, callback)
    assert callback.state_dict()["optimizers"]["0"]["meta_count"] > 0


class Slope(LightningModule):
    """A loss of slope 1 everywhere, and a schedule that divides the rate by ten."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = LambdaLR(optimizer, lambda t: 0.1 ** min(t, 1))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_hypergradient_descent_counts_in_the_rate_of_now():
    callback = HypergradientLR(meta_lr=1e-3, on_scheduler="multiply")
    toys.fit(Slope(), DataLoader([0, 0], batch_size=1), callback)
    factor = callback.state_dict()["optimizers"]["0"]["multiplier"].item()
    assert factor == pytest.approx((0.01 + 1e-3) / 0.01, rel=1e-9)


def test_a_step_that_16_bits_round_away_grows():
    module = toys.Classifier(lambda p: torch.optim.SGD(p, lr=1e-6))
    _, seen = toys.fit(module, toys.loader(48), APOLearningRate(), precision="bf16-true", max_epochs=4)
    assert seen.rates[-1][0] > 1e-4


def test_a_gradient_of_zero_is_no_reason_for_a_longer_step():
    class Satisfied(toys.Classifier):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]) - 100.0).relu().sum()

    options = {"loss_fn": lambda module, batch: (module(batch[0]) - 100.0).relu().sum(), "divergence": "mse"}
    _, seen = toys.fit(Satisfied(lambda p: torch.optim.SGD(p, lr=0.05)), toys.loader(48), APOLearningRate(**options))
    assert {rates[0] for rates in seen.rates} == {0.05}


def test_collections_of_optimizers_are_told_apart():
    library = pytest.importorskip("pytorch_optimizer")
    _, seen = toys.fit(
        toys.Classifier(lambda p: library.Lion(p, lr=1e-3, weight_decay=0.0)), toys.loader(24), APOLearningRate()
    )
    assert seen.rates[-1][0] != 1e-3
    for name in ("Prodigy", "DAdaptAdam", "ScheduleFreeAdamW"):
        with pytest.raises(MisconfigurationException, match=f"{name} cannot be rescaled: it (estimates|keeps)"):
            toys.fit(toys.Classifier(lambda p, name=name: getattr(library, name)(p)), toys.loader(), APOLearningRate())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"every_n_steps": 2.5}, "every_n_steps must be a whole number; got 2.5"),
        ({"lr_bounds": 0.1}, r"lr_bounds must be \(low, high\) with 0 < low < high; got 0.1"),
        ({"lam_f": [1]}, r"lam_f must be a number of at least 0; got \[1\]"),
        ({"output_fn": 3}, r"output_fn must be a function \(module, batch\) -> tensor, or None; got 3"),
        ({"optimizers": [0, 0]}, r"each once; got \[0, 0\]"),
    ],
)
def test_arguments_of_another_kind(arguments, said):
    with pytest.raises(ValueError, match=said):
        APOLearningRate(**arguments)
