"""Regularizers that have a task behind them."""

from typing import Any

from torch.utils.data import DataLoader

from lightning_ext._testing.bitwise import seeded
from lightning_ext.callbacks import FunctionSpaceRegularizer
from tests.conformance import toys


def remembering(**chosen: Any) -> FunctionSpaceRegularizer:
    """One past task, learned by other weights than those that are trained."""
    callback = FunctionSpaceRegularizer(weight=0.5, log_every_n_steps=1, **chosen)
    with seeded(7):
        module = toys.Plain()
    callback.end_task(None, module, DataLoader(toys.rows(), 4))
    return callback
