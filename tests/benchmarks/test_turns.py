"""Two training loops take turns, step by step."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture
def turns(scripts):
    import _turns

    return _turns


def test_a_loop_goes_as_many_steps_as_it_is_told_and_ends_with_the_block(turns):
    turn, done = turns.Turns(), []

    def loop():
        while not turn.pause():
            done.append(threading.current_thread())

    with turn.running(loop) as run:
        assert done == []
        run(3)
        assert len(done) == 3
        run(1)
        assert len(done) == 4
    assert len(done) == 4
    assert not done[0].is_alive()


def test_what_a_loop_dies_of_is_raised_where_it_is_run(turns):
    turn = turns.Turns()

    def loop():
        turn.pause()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), turn.running(loop) as run:
        run(1)


def test_a_fit_goes_by_steps(turns):
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.steps = nn.Linear(2, 1), 0

        def training_step(self, batch, batch_idx):
            self.steps += 1
            return self.net(batch[0]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    with turns.fitting(module, DataLoader(TensorDataset(torch.ones(3, 2)))) as run:
        assert module.steps == 0
        run(5)  # beyond the first epoch
        assert module.steps == 5
    assert module.steps == 6  # the one that had begun
