"""A plain classifier, for recipes and examples of methods that attach to one."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ext._lightning import LightningModule

__all__ = ["Classifier"]


class Classifier(LightningModule):
    r"""A network trained with cross-entropy, :math:`-\frac{1}{B} \sum_b \log \operatorname{softmax}(z_b)_{t_b}`.

    Args:
        network: maps inputs ``(B, ...)`` to logits ``(B, classes)``.
        optimizer: builds the optimizer from the parameters, such as ``torch.optim.Adam`` or
            ``functools.partial(torch.optim.SGD, lr=0.1)``; in YAML a ``class_path`` with ``init_args``.

    Batches are ``(x, t)`` with integer labels ``t`` of shape ``(B,)``. Logs ``train/loss``, ``val/loss``, ``test/loss``
    in nats and ``val/accuracy``, ``test/accuracy``. ``predict`` returns logits.

    >>> Classifier(nn.Linear(4, 3))(torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, network: nn.Module, optimizer: Callable[[Any], Optimizer] = torch.optim.Adam) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, batch_size=len(batch[1]))
        return loss

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        logits, n = self(batch[0]), len(batch[1])
        self.log(f"{stage}/loss", F.cross_entropy(logits, batch[1]), batch_size=n, sync_dist=True)
        correct = (logits.argmax(-1) == batch[1]).float().mean()
        self.log(f"{stage}/accuracy", correct, batch_size=n, sync_dist=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on held-out data."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on held-out data."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits of a batch ``(x, ...)`` or ``x``."""
        logits: Tensor = self(batch[0] if isinstance(batch, (tuple, list)) else batch)
        return logits

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer."""
        return self.optimizer(self.parameters())
