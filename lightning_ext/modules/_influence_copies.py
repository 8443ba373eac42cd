"""Copies of one network side by side: stacked changes of its parameters, and what they do to outputs."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ext._lightning import LightningModule
from lightning_ext.data import IndexedBatch
from lightning_ext.functional import InfluenceObjective, ParameterView
from lightning_ext.modules._influence_data import plain
from lightning_ext.modules._influence_input import as_model


class StackedCopies(LightningModule):
    r"""G networks :math:`\theta_g = \theta^s + \delta_g`, held as a frozen network and changes ``(G, D)``.

    Subclasses set ``change`` and train it.
    """

    change: nn.Parameter
    response_name: str

    def __init__(
        self, base: nn.Module, objective: InfluenceObjective | None, include: str | None, chunk_size: int | None
    ) -> None:
        super().__init__()
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 or None; got {chunk_size}.")
        self.objective, self.chunk_size = InfluenceObjective.of(objective), chunk_size
        self.base = _uncompiled(copy.deepcopy(as_model(base))).eval()
        self.view = ParameterView(self.base, include)
        self.base.requires_grad_(False)

    def train(self, mode: bool = True) -> "StackedCopies":
        """Set the mode of everything but the network, which stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def _sync_view(self) -> None:
        """The view was made where the base was then."""
        self.view.device, self.view.dtype = self.change.device, self.change.dtype

    @torch.no_grad()
    def _outputs(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the copies ``(G, B, ...)``, of the trained network, and targets."""
        self._sync_view()
        content = plain(batch.batch if isinstance(batch, IndexedBatch) else batch, self.view.device, self.view.dtype)
        function, reference = self.objective.function(self.base, self.view, content), self.view.values()

        def moved(change: dict[str, Tensor]) -> Tensor:
            return function({name: reference[name] + value for name, value in change.items()})

        change = self.view.unflatten(self.change.detach())
        copies: Tensor = torch.func.vmap(moved, chunk_size=self.chunk_size)(change)
        return copies, function(reference), self.objective.targets(content)

    def _measured(self, batch: Any) -> Tensor:
        copies, reference, targets = self._outputs(batch)
        before = self.objective.measure(reference, targets)
        return torch.stack([self.objective.measure(y, targets) - before for y in copies])

    def _evaluate(self, stage: str, batch: Any) -> None:
        changes = self._measured(batch)
        value = changes.abs().mean()
        self.log(f"{self.response_name}/{stage}_change", value, batch_size=changes.shape[1], sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log how far the measurement moved."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log how far the measurement moved."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Change of the measurement at each sample in each copy, ``(B, G)``."""
        return self._measured(batch).mT

    def response(self) -> Tensor:
        r"""The change of the parameters, :math:`\theta_g - \theta^s`, ``(G, D)`` in the order of a ParameterView."""
        return self.change.detach().clone()

    def outputs(self, batches: Iterable[Any]) -> Tensor:
        """Outputs of the copies for all samples of a loader or list of batches, ``(G, M, ...)``."""
        return torch.cat([self._outputs(batch)[0] for batch in batches], dim=1)

    def measure(self, batches: Iterable[Any]) -> Tensor:
        r"""Change of the objective's measurement from the trained network, :math:`m(\theta_g) - m(\theta^s)`.

        Args:
            batches: a loader, or a list of batches, of M samples altogether.

        Returns:
            ``(G, M)`` in the measurement's units (nats for a cross-entropy); positive: removing made it larger.
        """
        return torch.cat([self._measured(batch) for batch in batches], dim=1)


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module without ``torch.compile``, which does not see through transforms of functions."""
    module = getattr(module, "_orig_mod", module)
    for name, child in module.named_children():
        setattr(module, name, _uncompiled(child))
    return module
