"""What an estimator of function-space distance says in place of the training data: its curvature and its values."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.functional import (
    ActivationSite,
    CallableLoss,
    DivergenceLoss,
    InfluenceObjective,
    ParameterView,
    RecordActivations,
    ReplayActivations,
    evaluating,
    gates,
)
from lightning_ext.modules._influence_data import Shard, plain
from lightning_ext.modules._influence_identity import digest
from lightning_ext.modules._influence_source import CurvatureSource
from lightning_ext.nn._laftr_network import named_values, plain_name
from lightning_ext.nn.laftr import FunctionSpaceEstimator
from lightning_ext.nn.laftr_estimator import LAFTREstimator
from lightning_ext.nn.laftr_fisher import L2Estimator

_BATCH = 256  # drawn inputs that are linearised together


def drawn_inputs(estimator: FunctionSpaceEstimator) -> bool:
    """Whether the distance is a mean over drawn inputs, rather than one function of the parameters."""
    return isinstance(estimator, LAFTREstimator) and estimator.mode in ("relu", "sample")


def require_fitted(estimator: FunctionSpaceEstimator) -> None:
    """Refuse one that keeps nothing."""
    if not estimator.fitted:
        raise ValueError(
            f"the {type(estimator).__name__} keeps no statistics yet: call estimator.fit(base, batches) on training "
            "data, or load its state_dict."
        )


def require_reference(estimator: FunctionSpaceEstimator, base: nn.Module) -> None:
    """Refuse a network that is not the one of whose data the estimator keeps statistics."""
    require_fitted(estimator)
    now, kept = named_values(base), estimator.reference_values(base)
    other = [name for name, value in now.items() if name not in kept or kept[name].shape != value.shape]
    coarse = getattr(estimator, "store_dtype", None)

    def rounded(value: Tensor) -> Tensor:
        stored = value if coarse is None or not value.is_floating_point() else value.to(getattr(torch, coarse))
        return stored.to(torch.float32) if stored.is_floating_point() else stored  # a copy in float64 is the same

    other += [n for n, value in kept.items() if n not in other and not torch.equal(rounded(now[n]), rounded(value))]
    if other:
        raise ValueError(
            f"base is not the network that the estimator was fitted with: {sorted(other)[:5]} differ. Influence is "
            "taken at the reference; fit the estimator again, or load its weights."
        )


class _Distance(nn.Module):
    """A module whose call is the estimate for what it holds."""

    def __init__(self, estimator: FunctionSpaceEstimator, module: nn.Module) -> None:
        super().__init__()
        self.module, self._estimator = module, [estimator]  # in a list: no part of what is swapped

    def forward(self) -> Tensor:
        return self._estimator[0].distance(self.module)


class DistanceStatistics:
    r""":math:`\hat D(\theta)` around :math:`\theta_0`, with fixed draws: its Hessian at 0, and its values elsewhere.

    Args:
        estimator: fitted with ``base``.
        base: the network.
        num_samples: inputs drawn, where the estimator draws any.
        num_train: N of the training data.
        seed: which draws.
    """

    def __init__(
        self, estimator: FunctionSpaceEstimator, base: nn.Module, num_samples: int | None, num_train: int, seed: int
    ) -> None:
        require_reference(estimator, base)
        self.base, self.num_train = base, num_train
        self.estimator: Any = copy.copy(estimator)  # its place in the stream of draws is its own
        self.estimator.share_reference(L2Estimator().fit(base, []))  # in full precision, whatever was stored
        self.estimator.reseed(seed)
        self.name = f"{estimator!r} {num_samples} {seed} {num_train} {digest(estimator.get_extra_state())}"
        self._tape: tuple[Tensor, list[ActivationSite], Tensor] | None = None
        self.loss = DivergenceLoss(estimator.divergence)
        if drawn_inputs(estimator):
            self._draw(num_samples)
        else:
            with torch.no_grad():
                self.estimator.distance(base)  # what it derives from the reference, outside of any transform

    def _draw(self, num_samples: int | None) -> None:
        with torch.no_grad(), evaluating(self.base):
            x, weights, _, given = self.estimator.reference_batches(self.base, num_samples)
        self.x, self.weights = x, weights * len(x)
        self.templates = [site for site in given or () if site is not None]
        self._order = [site is not None for site in given or ()]

    # -- curvature ----------------------------------------------------------------------------------------------------

    @property
    def curvature(self) -> str:
        """Which operator it is of, on the samples of :meth:`source`."""
        return "ggn" if drawn_inputs(self.estimator) else "hessian"

    def source(self, view: ParameterView, rank: int = 0, world: int = 1) -> CurvatureSource:
        """The Hessian at the reference: of drawn inputs with weights, or of the distance as one sample's loss."""
        if drawn_inputs(self.estimator):
            tensors = [self.x, self.weights, *(site.gate for site in self.templates if site.gate is not None)]
            objective = InfluenceObjective(self.loss, self._outputs)
        else:
            tensors = [torch.zeros(1), torch.zeros(1)]
            identity = CallableLoss(lambda y, t: y, convex=False)
            objective = InfluenceObjective(identity, lambda module, batch: self.estimator.distance(module)[None])
        loader = DataLoader(TensorDataset(*tensors), batch_size=_BATCH)
        shard = Shard(loader, lambda batch: plain(batch, view.device, view.dtype), rank, world)
        return CurvatureSource(
            self.base, objective, shard, self.num_train, semidefinite=self.curvature == "hessian", name=self.name
        )

    def _chosen(self, outputs: Tensor) -> Tensor:
        heads = self.estimator.heads
        return outputs if heads is None else outputs[..., heads]

    def _sites(self, values: list[Tensor]) -> list[ActivationSite | None]:
        given = iter(gates(self.templates, values))
        return [next(given) if there else None for there in self._order]

    def _outputs(self, module: nn.Module, batch: Any) -> Tensor:
        x, _, *values = batch
        if not values:
            return self._chosen(self.estimator.run(module, {}, x))
        with RecordActivations(self._sites(values)):
            return self._chosen(self.estimator.run(module, {}, x))

    # -- values -------------------------------------------------------------------------------------------------------

    def distance(self, params: Mapping[str, Tensor]) -> Tensor:
        """The distance at other values of some parameters, in eval mode; for ``torch.func`` transforms."""
        if not drawn_inputs(self.estimator):
            named = {f"module.{name}": value for name, value in params.items()}
            found: Tensor = torch.func.functional_call(_Distance(self.estimator, self.base), named, ())
            return found
        old, sites, targets = self._recorded()
        with ReplayActivations(sites):
            new = self.estimator.run(self.base, {plain_name(name): value for name, value in params.items()}, self.x)
        return self.loss.bregman(self._chosen(new), old, targets).mean()

    def _recorded(self) -> tuple[Tensor, list[ActivationSite], Tensor]:
        if self._tape is None:
            values = [site.gate for site in self.templates if site.gate is not None]
            with torch.no_grad(), RecordActivations(self._sites(values) if values else ()) as tape:
                old = self._chosen(self.estimator.run(self.base, {}, self.x))
            self._tape = old, tape.sites, self.weights
        return self._tape
