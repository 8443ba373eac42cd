"""Noise that is addressed: what a run draws depends on where it is, not on what was drawn before."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_ext._lightning import Trainer
from lightning_ext.modules.mrvae_noise import AddressedNoise
from lightning_ext.testing import ddp_trainer_kwargs

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
         "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip


class Draws(AddressedNoise):
    """Writes down what it draws in each step, one file per rank."""

    def __init__(self, folder=None, seed=None, own_seeds=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.folder, self.seed, self.own_seeds = folder, seed, own_seeds
        self.drawn = {}

    def setup(self, stage):
        if self.own_seeds:  # what happens without seed_everything
            torch.manual_seed(100 + self.global_rank)
        super().setup(stage)

    def step(self, stage, batch, batch_idx):
        self.set_address(stage, batch_idx)
        noise = torch.stack([self.noise(self.weight), self.noise(self.weight)])
        self.drawn[stage, self.current_epoch, batch_idx] = noise
        if self.folder:
            torch.save((self.seed, self.drawn), self.folder / f"{self.global_rank}.pt")
        return (self.weight * batch.sum()).sum()

    def training_step(self, batch, batch_idx):
        return self.step("train", batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.step("val", batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.step("test", batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loaders():
    return DataLoader(torch.ones(4, 1), 2), DataLoader(torch.ones(4, 1), 2)


def fitted(**kwargs):
    module = Draws(**kwargs)
    Trainer(max_epochs=2, **QUIET).fit(module, *loaders())
    return module


def test_training_draws_anew_and_evaluation_draws_the_same_in_every_epoch():
    module = fitted(seed=1)
    Trainer(**QUIET).test(module, loaders()[1])
    training = [noise for (stage, *_), noise in module.drawn.items() if stage == "train"]
    assert len(training) == 4
    evaluation = {key: noise for key, noise in module.drawn.items() if key[0] != "train" and key[1] == 0}
    everything = torch.stack([*training, *evaluation.values()]).flatten(0, 1)
    assert len(everything) == len(everything.unique(dim=0)), "stages, epochs, batches and draws all differ"
    for batch in range(2):
        assert torch.equal(module.drawn["val", 0, batch], module.drawn["val", 1, batch])


def test_a_second_run_draws_the_same_whatever_the_global_generator():
    first = fitted(seed=1).drawn
    torch.manual_seed(99)
    torch.rand(7)
    second = fitted(seed=1).drawn
    assert all(torch.equal(first[key], second[key]) for key in first)
    third = fitted(seed=2).drawn
    assert not any(torch.equal(first[key], third[key]) for key in first)


def test_the_global_generator_is_not_moved():
    module = Draws(seed=1)
    state = torch.get_rng_state()
    module.set_address("train", 0)
    noise = module.noise(torch.zeros(1000, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), state)
    assert noise.dtype == torch.float64
    assert noise.mean().abs() < 0.15
    assert noise.std().item() == pytest.approx(1.0, abs=0.1)


def test_going_to_an_address_starts_its_draws_over():
    module = Draws(seed=1)
    module.set_address("val", 3)
    first, second = module.noise(torch.zeros(4)), module.noise(torch.zeros(4))
    module.set_address("val", 3)
    assert torch.equal(module.noise(torch.zeros(4)), first)
    assert not torch.equal(first, second)


def test_without_a_seed_it_takes_the_one_of_the_program():
    torch.manual_seed(1234)
    assert Draws().seed == 1234
    assert Draws(seed=5).seed == 5


@pytest.mark.ddp
def test_ranks_agree_on_a_seed_and_draw_different_noise(tmp_path):
    module = Draws(tmp_path, own_seeds=True)
    Trainer(max_epochs=2, enable_checkpointing=False, **ddp_trainer_kwargs()).fit(module, *loaders())
    (seed, drawn), (other_seed, other_drawn) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert seed == other_seed == 100
    assert drawn.keys() == other_drawn.keys()
    assert not any(torch.equal(drawn[key], other_drawn[key]) for key in drawn)
    alone = fitted(seed=100).drawn
    assert all(torch.equal(drawn[key], alone[key]) for key in drawn), "rank 0 draws what a single process draws"


def test_a_checkpoint_keeps_the_seed(tmp_path):
    module = Draws(seed=17)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, *loaders())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["lightning_ext_seed"] == 17
    resumed = Draws(seed=3)
    Trainer(max_epochs=2, **QUIET).fit(resumed, *loaders(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert resumed.seed == 17
    whole = fitted(seed=17).drawn
    assert torch.equal(resumed.drawn["train", 1, 1], whole["train", 1, 1])
    assert Draws.load_from_checkpoint(tmp_path / "end.ckpt").seed == 17


def test_a_checkpoint_from_elsewhere_leaves_the_seed():
    module = Draws(seed=3)
    module.on_load_checkpoint({})
    assert module.seed == 3
