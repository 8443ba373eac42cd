"""Quadratic distances in the weights: the rivals that see no activation."""

import inspect
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ext.functional import (
    InfluenceObjective,
    KroneckerStatistics,
    ParameterView,
    seeded_generator,
)
from lightning_ext.nn._laftr_network import Reduce, own_rank, plain_name, widened
from lightning_ext.nn.laftr import FunctionSpaceEstimator
from lightning_ext.nn.laftr_baselines import CoresetEstimator, FullDataEstimator, NTKEstimator
from lightning_ext.nn.laftr_estimator import LAFTREstimator

__all__ = ["EWCEstimator", "KFACEstimator", "L2Estimator", "function_space_estimator"]

Fisher = Literal["true", "mc", "empirical"]
_LOSSES = {"kl": "cross_entropy", "mse": "half_squared_error"}
_FISHERS: dict[str, Literal["type2", "mc", "empirical"]] = {"true": "type2", "mc": "mc", "empirical": "empirical"}


class L2Estimator(FunctionSpaceEstimator):
    r"""Half the squared distance of the weights, :math:`\tfrac12 \lVert \theta_1 - \theta_0 \rVert^2`.

    Args:
        kwargs: see :class:`FunctionSpaceEstimator`; ``divergence`` plays no part.

    >>> network = nn.Linear(1, 2)
    >>> estimator = L2Estimator().fit(network, [])
    >>> with torch.no_grad():
    ...     _ = network.bias.add_(torch.tensor([3.0, 4.0]))
    >>> round(estimator.distance(network).item(), 4)
    12.5
    """

    def _fit(self, module: nn.Module, batches: Iterable[Any], reduce: Reduce | None) -> None:
        pass

    def _distance(self, module: nn.Module) -> Tensor:
        current, reference = self.parameters_of(module), self.reference_values(module)
        names = [name for name in map(plain_name, dict(module.named_parameters())) if name in reference]
        return torch.stack([0.5 * (widened(current[n]) - reference[n]).square().sum() for n in names]).sum()

    def absorb(self, other: FunctionSpaceEstimator) -> None:
        """Nothing is kept of an earlier task but the weights, which are one's own now."""


class _FisherEstimator(FunctionSpaceEstimator):
    """Sums of curvature statistics over the data, and a quadratic form of their mean."""

    _max_width = 8192

    def __init__(self, fisher: Fisher = "true", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if fisher not in _FISHERS:
            raise ValueError(f"fisher must be one of {', '.join(map(repr, _FISHERS))}; got {fisher!r}.")
        if self.divergence not in _LOSSES:
            raise ValueError(f"{type(self).__name__} knows 'kl' and 'mse'; got divergence={self.divergence!r}.")
        self.fisher: Fisher = fisher

    def _objective(self) -> InfluenceObjective:
        """Of batches ``(x, targets)``, with the outputs that count."""

        def chosen(module: Any, batch: Any) -> Tensor:
            outputs = self._forward(module, batch[0])
            return outputs if self.heads is None else outputs[..., self.heads]

        return InfluenceObjective(_LOSSES[self.divergence], forward=chosen)

    def _fit(self, module: nn.Module, batches: Iterable[Any], reduce: Reduce | None) -> None:
        statistics = KroneckerStatistics(
            module, self._objective(), ParameterView(module), fisher=_FISHERS[self.fisher], max_width=self._max_width
        )
        sums = statistics.factor_zeros()
        generator = seeded_generator(self.seed, own_rank(reduce)) if self.fisher == "mc" else None
        for batch in batches:
            x = self.inputs_of(batch)
            with torch.enable_grad():
                statistics.factors((x, self._labels(module, batch, x)), generator=generator, sums=sums)
        sums = {name: value if reduce is None else reduce(value) for name, value in sums.items()}
        if not float(sums["count"]) > 0:
            raise ValueError("batches holds no batch: give a loader, or a list of batches.")
        bad = [name for name, value in sums.items() if not bool(value.isfinite().all())]
        if bad:
            raise ValueError(f"the Fisher information of {bad[:3]} is not finite: look at inputs and parameters.")
        self._kept = sums
        at = {place.start: plain_name(name) for name, place in statistics.view.slices().items()}
        self._facts["diagonal"] = [plain_name(name) for name in statistics.diagonal]
        self._facts["layers"] = [
            [layer.name, [at[place.start] for place in (layer.weight, layer.bias) if place is not None]]
            for layer in statistics.layers
        ]

    def _labels(self, module: nn.Module, batch: Any, x: Any) -> Tensor:
        """The targets among the outputs that count; any that fit where the Fisher information needs none."""
        if self.fisher != "empirical":
            outputs = self._objective().outputs(module, (x, None))
            return outputs.argmax(-1) if self.divergence == "kl" else outputs
        labels = self.targets_of(batch)
        if self.heads is None or labels.is_floating_point():
            return labels if self.heads is None else labels[..., self.heads]
        places = torch.arange(int(self._forward(module, x).shape[-1]), device=labels.device)[self.heads]
        found = places == labels[..., None]
        if not bool(found.any(-1).all()):
            raise ValueError(f"labels must be among the heads {places.tolist()}; got {torch.unique(labels).tolist()}.")
        return found.long().argmax(-1)

    def _change(self, module: nn.Module) -> dict[str, Tensor]:
        """Of the parameters that were trained when this was fitted."""
        current, reference = self.parameters_of(module), self.reference_values(module)
        names = [*self._facts["diagonal"], *(name for _, pair in self._facts["layers"] for name in pair)]
        trained = {plain_name(name) for name, p in module.named_parameters() if p.requires_grad} & reference.keys()
        if trained - set(names):
            raise ValueError(
                f"{sorted(trained - set(names))[:5]} did not require gradients at fit, so their Fisher information is "
                "not known: let them require gradients at fit, or leave them frozen."
            )
        return {name: widened(current[name]) - reference[name] for name in names}

    def _diagonal_form(self, change: dict[str, Tensor]) -> Tensor:
        moved = torch.cat([change[name].flatten() for name in self._facts["diagonal"]])
        return (self._kept["diagonal"].to(moved) * moved.square()).sum() / (2 * self._kept["count"].to(moved))

    def _require_alike(self, other: FunctionSpaceEstimator) -> None:
        shapes = [{name: value.shape for name, value in each._kept.items()} for each in (self, other)]
        if type(other) is not type(self) or shapes[0] != shapes[1]:
            raise ValueError(f"only two {type(self).__name__} of the same parameters can be merged.")

    def absorb(self, other: FunctionSpaceEstimator) -> None:
        """Add the earlier task's statistics; the quadratic form is that of both tasks' samples."""
        self._require_alike(other)
        self._kept = {name: value + other._kept[name].to(value.device) for name, value in self._kept.items()}


class EWCEstimator(_FisherEstimator):
    r"""Elastic weight consolidation: a quadratic form with the diagonal of the Fisher information.

    .. math:: \hat D = \tfrac12 \sum_j F_{jj}\, (\theta_{1,j} - \theta_{0,j})^2, \qquad
        F_{jj} = \frac1N \sum_{i=1}^N \bigl[ J_i^\top H_i J_i \bigr]_{jj}

    F is a mean over samples of squared gradients of single samples, so it does not depend on the batch size.

    Args:
        fisher: ``"true"``: the exact expectation over the model's labels, a backward pass for each output; ``"mc"``:
            one drawn label for each sample; ``"empirical"``: the data's labels, which is no Gauss-Newton matrix.
        online_gamma: with tasks merged, the weight of the earlier ones' sum, in (0, 1]: :math:`F \leftarrow \gamma
            F_{\text{old}} + F_{\text{new}}`. Default ``None``: samples of all tasks count alike.
        kwargs: see :class:`FunctionSpaceEstimator`.

    Source: Kirkpatrick et al. 2017 (arXiv:1612.00796); Schwarz et al. 2018 (arXiv:1805.06370) for the online form.

    >>> network = nn.Linear(1, 1, bias=False)
    >>> estimator = EWCEstimator(divergence="mse").fit(network, [(torch.tensor([[1.0], [3.0]]), None)])
    >>> with torch.no_grad():
    ...     _ = network.weight.add_(2.0)
    >>> round(estimator.distance(network).item(), 4)  # (1 + 9) / 2 * 2^2 / 2
    10.0
    """

    _max_width = 0  # a diagonal for every layer

    @property
    def merges_to_a_sum(self) -> bool:
        """The online form adds the tasks up."""
        return self.online_gamma is not None

    def __init__(self, fisher: Fisher = "true", online_gamma: float | None = None, **kwargs: Any) -> None:
        super().__init__(fisher, **kwargs)
        if online_gamma is not None and not 0 < online_gamma <= 1:
            raise ValueError(f"online_gamma must lie in (0, 1]; got {online_gamma}.")
        self.online_gamma = online_gamma

    @property
    def fisher_diagonal(self) -> Tensor:
        """F, ``(D,)``, of the parameters that are trained, in the order of ``named_parameters``."""
        self._require_fitted()
        return self._kept["diagonal"] / self._kept["count"]

    def _distance(self, module: nn.Module) -> Tensor:
        return self._diagonal_form(self._change(module))

    def absorb(self, other: FunctionSpaceEstimator) -> None:
        """Add the earlier tasks' Fisher information."""
        if self.online_gamma is None:
            super().absorb(other)
            return
        self._require_alike(other)
        earlier = self.online_gamma * other._kept["diagonal"] / other._kept["count"]
        self._kept["diagonal"] = self._kept["diagonal"] + self._kept["count"] * earlier.to(self._kept["diagonal"])


class KFACEstimator(_FisherEstimator):
    r"""A quadratic form with the Kronecker-factored Gauss-Newton matrix of each layer.

    .. math:: \hat D = \tfrac12 \sum_\ell \operatorname{tr}(\Delta_\ell^\top S_\ell \Delta_\ell A_\ell), \qquad
        \Delta_\ell = [\Delta W_\ell, \Delta b_\ell], \quad A_\ell = \mathbb E[\bar a \bar a^\top]

    with the bias as one more input, :math:`\bar a = [a; 1]`. Parameters of other layers have their exact diagonal.
    Tasks merge by adding factors, :math:`(\sum_t A_t) \otimes (\sum_t S_t)`, a heuristic.

    Args:
        fisher: as for :class:`EWCEstimator`.
        kwargs: see :class:`FunctionSpaceEstimator`.

    Source: Ritter, Botev & Barber 2018 (arXiv:1805.07810); Martens & Grosse 2015 (arXiv:1503.05671).
    """

    def _distance(self, module: nn.Module) -> Tensor:
        change, count = self._change(module), self._kept["count"]
        parts = [self._diagonal_form(change)] if self._facts["diagonal"] else []
        for layer, names in self._facts["layers"]:
            A, S = (self._kept[f"{layer}.{side}"] / count for side in "AS")  # (G, M, M), (G, P, P)
            matrices = torch.cat([change[name].reshape(*S.shape[:2], -1) for name in names], 2)
            parts.append(0.5 * (S.to(matrices) @ matrices @ A.to(matrices) * matrices).sum())
        return torch.stack(parts).sum()


_NAMED: dict[str, tuple[type[FunctionSpaceEstimator], dict[str, Any]]] = {
    "laftr": (LAFTREstimator, {}),
    "laftr-relu": (LAFTREstimator, {"mode": "relu"}),
    "laftr-sample": (LAFTREstimator, {"mode": "sample"}),
    "laftr-moments": (LAFTREstimator, {"mode": "moments"}),
    "laftr-mean": (LAFTREstimator, {"mode": "mean"}),
    "ntk": (NTKEstimator, {}),
    "coreset": (CoresetEstimator, {}),
    "full": (FullDataEstimator, {}),
    "ewc": (EWCEstimator, {}),
    "online-ewc": (EWCEstimator, {"online_gamma": 1.0}),
    "kfac": (KFACEstimator, {}),
    "l2": (L2Estimator, {}),
}


def function_space_estimator(name: str, **kwargs: Any) -> FunctionSpaceEstimator:
    """Build an estimator by its name.

    Args:
        name: ``"laftr"`` (the same as ``"laftr-relu"``), ``"laftr-sample"``, ``"laftr-moments"``, ``"laftr-mean"``,
            ``"ntk"``, ``"coreset"``, ``"full"``, ``"ewc"``, ``"online-ewc"``, ``"kfac"`` or ``"l2"``.
        kwargs: of its class.

    Raises:
        ValueError: For another name, or an option that its class does not have.

    >>> function_space_estimator("laftr-moments", divergence="mse")
    LAFTREstimator(mode='moments', divergence='mse', fitted=False)
    """
    if name not in _NAMED:
        raise ValueError(f"estimator must be one of {', '.join(map(repr, _NAMED))}; got {name!r}.")
    kind, options = _NAMED[name]
    known = {name for each in kind.__mro__[:-2] for name in inspect.signature(each).parameters} - {"kwargs"}
    unknown = sorted(kwargs.keys() - known)
    if unknown:
        raise ValueError(
            f"estimator {name!r} has no option {', '.join(map(repr, unknown))}; it knows {', '.join(sorted(known))}."
        )
    return kind(**{**options, **kwargs})
