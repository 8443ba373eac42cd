"""A training that was stopped and resumed finds the same learning rates; a checkpoint of another set-up is refused."""

import copy

import pytest
import torch

from lightning_ext._lightning import Trainer
from lightning_ext.callbacks import APOLearningRate, HypergradientLR, _apo_lookahead
from lightning_ext.testing import StatefulLoader, assert_resumes
from tests.callbacks import apo_toys as toys

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*when using .ckpt_path")

# Meta-steps at every second step, the first ones secant; the crash comes between two meta-steps and right after one.
RESUMED = {
    "rmsprop": lambda: APOLearningRate(every_n_steps=2, warmup_steps=2),
    "sgd": lambda: APOLearningRate(every_n_steps=2, warmup_steps=2, meta_optimizer="sgd"),
    "secant": lambda: APOLearningRate(every_n_steps=2, meta_optimizer="secant"),
    "warm-up": lambda: APOLearningRate(every_n_steps=2, warmup_steps=6),
    "global": lambda: APOLearningRate(every_n_steps=2, warmup_steps=2, granularity="global"),
    "layer": lambda: APOLearningRate(every_n_steps=2, warmup_steps=2, granularity="layer"),
    "auto": lambda: APOLearningRate(every_n_steps=2, warmup_steps=2, lam_f="auto"),
    "after": lambda: APOLearningRate(every_n_steps=2, warmup_steps=2, apply="after"),
    "next": lambda: APOLearningRate(every_n_steps=2, lam_f=0.0, loss_batch="next"),
    "own loader": lambda: APOLearningRate(every_n_steps=2, fsd_batch=toys.loader(12, 4, seed=9), fsd_fraction=1.0),
    "a part": lambda: APOLearningRate(every_n_steps=2, warmup_steps=2, fsd_fraction=0.6),
    "hypergradient": lambda: HypergradientLR(meta_lr=1e-2),
    "hypergradient layer": lambda: HypergradientLR(meta_lr=1e-2, granularity="layer"),
    "scheduler": lambda: APOLearningRate(every_n_steps=2, warmup_steps=2, on_scheduler="multiply"),
}


class Two(toys.Classifier):
    def __init__(self, scheduled=False):
        super().__init__(self.groups, norm=True)
        self.scheduled = scheduled

    def groups(self, params):
        params = list(params)
        optimizer = torch.optim.Adam([{"params": params[:2], "lr": 0.01}, {"params": params[2:]}], lr=0.003)
        if not self.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_training_ends_as_if_it_had_never_stopped(name):
    for crash_at in ((1, 1), (1, 2)):
        assert_resumes(
            lambda: Two(name == "scheduler"),
            lambda: StatefulLoader(toys.rows(20), 4),
            lambda: [RESUMED[name]()],
            crash_at=crash_at,
        )


@pytest.mark.parametrize("key", ["count", "meta_count", "second_moment", "multiplier", "lam_f", "carried", "previous"])
def test_every_part_of_the_state_is_needed(key, monkeypatch):
    """With one part left as it is at the start of a training, the resumed training goes another way."""
    whole = APOLearningRate.load_state_dict

    def forgetful(self, state):
        state = copy.deepcopy(state)
        fresh = {"count": 0, "meta_count": 0, "lam_f": 1.0, "carried": None}
        for one in state["optimizers"].values():
            for name in ("second_moment", "multiplier"):
                fresh[name] = 0 * one[name] + (name == "multiplier")
            one.update({key: fresh[key]} if key in fresh else {})
        if key == "previous":
            state["look_ahead"]["previous"] = None
        whole(self, state)

    monkeypatch.setattr(APOLearningRate, "load_state_dict", forgetful)
    name = {"multiplier": "layer", "lam_f": "auto", "carried": "hypergradient"}.get(key, "rmsprop")
    with pytest.raises(AssertionError, match="differs"):
        test_resumed_training_ends_as_if_it_had_never_stopped(name)


def saved(callback, module=toys.Classifier):
    trainer, _ = toys.fit(module(), toys.loader(), callback)
    trainer.save_checkpoint("end.ckpt")
    return "end.ckpt"


def test_a_checkpoint_of_other_blocks_is_refused():
    class More(toys.Classifier):
        def __init__(self):
            super().__init__(lambda p: torch.optim.SGD([{"params": [q]} for q in p], lr=0.05, momentum=0.9))

    before, callback = APOLearningRate(), APOLearningRate()
    toys.fit(More(), toys.loader(), before)
    callback.load_state_dict(before.state_dict())
    with pytest.raises(ValueError, match="4 learning rates for optimizer 0, this run has 1"):
        toys.fit(toys.Classifier(), toys.loader(), callback)


def test_a_large_previous_batch_is_left_out_of_the_checkpoint(monkeypatch):
    callback = APOLearningRate()
    saved(callback)
    (previous,) = callback.state_dict()["look_ahead"]["previous"]
    assert [t.shape for t in previous] == [(2, 6), (2,)], "a part of the batch, in the CPU's memory"
    monkeypatch.setattr(_apo_lookahead, "SAVED_BATCH_LIMIT", 63)
    callback = APOLearningRate()
    path = saved(callback)
    assert callback.state_dict()["look_ahead"]["previous"] is None
    trainer = Trainer(callbacks=[APOLearningRate()], **{**toys.QUIET, "max_epochs": 2})
    trainer.fit(toys.Classifier(), toys.loader(), ckpt_path=path)
    assert trainer.global_step == 8


def test_a_used_callback_can_be_copied_and_used_again():
    callback = APOLearningRate(granularity="layer")
    toys.fit(toys.Classifier(), toys.loader(), callback)
    twin = copy.deepcopy(callback)
    assert twin.state_dict()["optimizers"]["0"]["count"] == 4
    toys.fit(toys.Classifier(), toys.loader(), twin)
    assert twin.state_dict()["optimizers"]["0"]["count"] == 4, "a new training starts anew"


def test_state_keys_tell_callbacks_for_different_optimizers_apart():
    keys = {APOLearningRate(optimizers=o).state_key for o in ("all", [0], [1])}
    assert len(keys | {HypergradientLR().state_key}) == 4
