"""Two ranks with their own batches: rates and weights stay equal to the last bit, and rejections are shared."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ext._lightning import Callback, LightningDataModule, Trainer, submodule
from lightning_ext.callbacks import APOLearningRate, HypergradientLR, apo
from lightning_ext.testing import ddp_trainer_kwargs
from tests.callbacks import apo_toys as toys

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Agree(Callback):
    """Fails on every rank where weights, learning rates or the callback's state differ, or batches do not."""

    def __init__(self, callback):
        self.callback, self.losses, self.meta_steps = callback, [], 0

    def numbers(self, trainer, pl_module):
        state = self.callback.state_dict()["optimizers"]["0"]
        self.meta_steps = state["meta_count"]
        learned = [state[k].double().reshape(-1) for k in ("multiplier", "second_moment")]
        rates = torch.tensor([float(g["lr"]) for g in trainer.optimizers[0].param_groups], dtype=torch.float64)
        counts = torch.tensor([state[k] for k in ("count", "meta_count", "rejections", "lam_f")], dtype=torch.float64)
        weights = [p.detach().double().reshape(-1) for p in pl_module.parameters()]
        return torch.cat([rates, counts, *learned, *weights])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ours, theirs = trainer.strategy.all_gather(self.numbers(trainer, pl_module))
        assert torch.equal(ours, theirs), f"apart by {(ours - theirs).abs().max()} at step {trainer.global_step}"
        self.losses.append(outputs["loss"].detach().double())

    def on_train_end(self, trainer, pl_module):
        ours, theirs = trainer.strategy.all_gather(torch.stack(self.losses))
        assert (ours != theirs).all(), "the ranks saw the same batches, so nothing was shown"


class MetaSteps(Agree):
    def __init__(self, callback, wanted):
        super().__init__(callback)
        self.wanted = wanted

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        assert self.meta_steps == self.wanted, self.meta_steps


OPTIONS = {
    "default": lambda: APOLearningRate(every_n_steps=1, warmup_steps=10),
    "secant layer": lambda: APOLearningRate(every_n_steps=1, meta_optimizer="secant", granularity="layer"),
    "auto loader": lambda: APOLearningRate(every_n_steps=1, lam_f="auto", fsd_batch="loader", fsd_fraction=0.5),
    "hypergradient": lambda: HypergradientLR(meta_lr=1e-3),
}


def run(callback, steps=104, module=None, data=None, **kwargs):
    module = module or toys.Classifier(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5), dropout=0.2)
    data = data or DataLoader(toys.rows(96), 6, shuffle=True)
    watch = kwargs.pop("watch", [Agree(callback)])
    settings = ddp_trainer_kwargs(max_epochs=1000, max_steps=steps, log_every_n_steps=10, **kwargs)
    trainer = Trainer(callbacks=[callback, *watch], **settings)
    trainer.fit(module, data)
    return trainer, module


@pytest.mark.parametrize("name", OPTIONS)
def test_after_many_meta_steps_ranks_agree_to_the_last_bit(name):
    callback, steps = OPTIONS[name](), 101 if name == "default" else 24
    meta_steps = steps if name == "auto loader" else steps - 1  # the first batch has none before it
    trainer, _ = run(callback, steps, watch=[MetaSteps(callback, meta_steps)], enable_checkpointing=False)
    assert trainer.callback_metrics["apo/rejected"] == 0


def test_without_the_mean_over_ranks_they_would_part(monkeypatch):
    monkeypatch.setattr(apo, "_mean", lambda trainer, numbers: numbers)
    with pytest.raises(Exception, match="apart by"):
        run(OPTIONS["default"](), steps=6, enable_checkpointing=False)


def fails_on_rank_one(module, batch):
    """The loss of the look-ahead only; the training pass is all right."""
    broken = module.global_rank == 1 and module.trainer.global_step in (4, 9)
    return toys.cross_entropy(module, batch) * (math.nan if broken else 1.0)


class Halved(Agree):
    """The rates of the steps at which one rank's look-ahead was not finite."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        halved = trainer.optimizers[0].param_groups[0]["lr"] == self.before / 2
        assert halved == (trainer.global_step in (5, 10)), trainer.global_step


def test_a_rank_whose_look_ahead_is_not_finite_makes_all_reject_together():
    callback = APOLearningRate(loss_fn=fails_on_rank_one, every_n_steps=1, warmup_steps=0)
    trainer, module = run(callback, steps=12, watch=[Halved(callback)], enable_checkpointing=False)
    assert trainer.callback_metrics["apo/rejected"] == 2
    assert all(p.isfinite().all() for p in module.parameters())


def test_two_ranks_find_the_slope_of_one_process_with_both_their_batches():
    """Everything is a mean over examples, and the other batch is used whole: two halves make one."""

    class Data(LightningDataModule):
        def __init__(self, ranks):
            super().__init__()
            self.ranks = ranks

        def train_dataloader(self):
            rank = self.trainer.global_rank
            sampler = DistributedSampler(toys.rows(64), self.ranks, rank, shuffle=False)
            return DataLoader(toys.rows(64), 8 // self.ranks, sampler=sampler)

    def found(ranks, **kwargs):
        torch.manual_seed(0)
        module = toys.Classifier(lambda p: torch.optim.SGD(p, lr=0.05))
        callback = APOLearningRate(every_n_steps=1, warmup_steps=4, fsd_fraction=1.0)
        settings = {**toys.QUIET, **kwargs, "use_distributed_sampler": False, "enable_checkpointing": False}
        trainer = Trainer(callbacks=[callback], **settings)
        trainer.fit(module, Data(ranks))
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if k != "apo/rejected"}
        return metrics, [p.detach() for p in module.parameters()]

    (one, weights), (two, also) = found(1), found(2, **ddp_trainer_kwargs())
    assert two == pytest.approx(one, rel=1e-3)
    for a, b in zip(weights, also, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_two_ranks_resume_with_their_own_previous_batches(tmp_path):
    def train(steps, path=None, **kwargs):
        callback = APOLearningRate(every_n_steps=2, warmup_steps=3)
        saver = submodule("callbacks").ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=6)
        torch.manual_seed(0)
        module = toys.Classifier()
        trainer = Trainer(callbacks=[callback, Agree(callback), saver],
                          **ddp_trainer_kwargs(max_steps=steps, log_every_n_steps=1, **kwargs))  # fmt: skip
        trainer.fit(module, DataLoader(toys.rows(72), 6), ckpt_path=path)
        return [p.detach() for p in module.parameters()]

    whole = train(8)  # the first step after the checkpoint looks ahead
    path = tmp_path / "step=6.ckpt"
    (state,) = (v for k, v in torch.load(path, weights_only=True)["callbacks"].items() if k.startswith("APO"))
    mine, other = state["look_ahead"]["previous"]
    assert not torch.equal(mine[0], other[0])
    for a, b in zip(whole, train(8, path), strict=True):
        assert torch.equal(a, b)
