"""Kronecker factors and their eigenvalue corrections, summed over batches and ranks."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ext.functional import (
    InfluenceObjective,
    KroneckerCurvature,
    KroneckerStatistics,
    ParameterView,
    seeded_generator,
)
from lightning_ext.metrics._precise import PreciseMetric

__all__ = ["EigenCorrection", "KroneckerFactors"]

Fisher = Literal["type2", "mc", "empirical"]


class _CurvatureMetric(PreciseMetric):
    """Sums of curvature statistics; the module comes with each update and is no part of the metric."""

    higher_is_better: bool | None = None
    _module: nn.Module | None
    _statistics: KroneckerStatistics | None

    def __init__(
        self,
        module: nn.Module,
        objective: InfluenceObjective,
        include: str | None = None,
        fisher: Fisher = "type2",
        max_width: int = 8192,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._module, self._statistics = None, None
        self._drawn = 0  # updates so far: torchmetrics' own count starts anew in every forward
        self.objective, self.include, self.fisher = objective, include, fisher
        self.max_width, self.seed = max_width, seed
        statistics = self._made_for(module)
        self.layers, self.places, self.parameter_dtype = statistics.layers, statistics.places, statistics.dtype
        self.state_names: dict[str, str] = {}

    def _add_states(self, zeros: dict[str, Tensor]) -> None:
        for index, (key, zero) in enumerate(zeros.items()):
            self.state_names[key] = f"sum_{index}"
            self.add_state(f"sum_{index}", self.float_state(*zero.shape), dist_reduce_fx="sum")

    def _made_for(self, module: nn.Module) -> KroneckerStatistics:
        view = ParameterView(module, self.include)
        return KroneckerStatistics(module, self.objective, view, fisher=self.fisher, max_width=self.max_width)

    def _of(self, module: nn.Module) -> KroneckerStatistics:
        if self._statistics is None or self._module is not module:
            statistics = self._made_for(module)
            if (statistics.layers, statistics.places) != (self.layers, self.places):
                raise ValueError("module must have the layers and parameters of the one that the metric was made for.")
            # past nn.Module's own __setattr__, which would make the network a part of the metric
            self.__dict__["_module"], self.__dict__["_statistics"] = module, statistics
            return statistics
        return self._statistics

    def __getstate__(self) -> dict[str, Any]:
        """Leave the network of the last update out of copies and pickles."""
        return super().__getstate__() | {"_module": None, "_statistics": None}

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self.fisher != "mc":
            return None
        ranked = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if ranked else 0
        self._drawn += 1
        return seeded_generator(self.seed, self._drawn, rank, device=device)

    def _add(self, sums: dict[str, Tensor]) -> None:
        for key, state in self.state_names.items():
            total = getattr(self, state)
            setattr(self, state, total + sums[key].to(total))

    def compute(self) -> dict[str, Tensor]:
        """Means over all samples of all ranks, and their ``"count"``; see the class for the keys."""
        sums: dict[str, Tensor] = {key: getattr(self, state) for key, state in self.state_names.items()}
        if not float(sums["count"]) > 0:
            raise RuntimeError(f"{type(self).__name__} has seen no sample on any rank; call update before compute.")
        return {key: value if key == "count" else value / sums["count"] for key, value in sums.items()}

    def _normalized(self) -> dict[str, Tensor]:
        means = self.compute()  # in which torchmetrics takes the dimensions of a single number away
        shaped = {key: means[key].reshape(getattr(self, state).shape) for key, state in self.state_names.items()}
        return shaped | {"count": torch.ones_like(shaped["count"])}


class KroneckerFactors(_CurvatureMetric):
    r"""The factors of K-FAC, and the exact diagonal of the Gauss-Newton matrix where there are none.

    .. math:: A = \mathbb E[\bar a \bar a^\top], \qquad S = \mathbb E[Ds\,Ds^\top]

    for the inputs :math:`\bar a = [a; 1]` and pseudo-gradients :math:`Ds` of every Linear and convolution, see
    :class:`lightning_ext.functional.KroneckerStatistics`.

    ``update(module, batch)`` adds a batch; ``compute()`` returns ``"<layer>.A"`` ``(G, M, M)``, ``"<layer>.S"``
    ``(G, P, P)``, ``"diagonal"`` and ``"count"``; :meth:`curvature` decomposes them.

    Args:
        module: The network, for the shapes of its layers.
        objective: Loss and outputs. To pickle the metric, its functions must be importable.
        include: A regular expression searched in the parameters' names. Default None, all that require gradients.
        fisher: "type2" (exact), "mc" (labels drawn from the model) or "empirical". Default "type2".
        max_width: Layers with more inputs or outputs per group get no factors. Default 8192.
        seed: Of the labels drawn; each update and each rank draws its own. Default 0.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Attributes:
        diagonal: Names of the parameters without factors, which get the diagonal of their curvature; a warning says so.

    Raises:
        ValueError: From an update, on another network than the metric was made for, or on layers that do not explain
            their gradients.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Martens and Grosse 2015 (arXiv 1503.05671); Grosse and Martens 2016 (arXiv 1602.01407).

    Note:
        States are float64 sums: they add up exactly whatever the batches' sizes, and over ranks. While ranks are
        synchronised, each holds the states of all. The network runs in eval mode and is left as it was.

    Example:
        >>> from lightning_ext.functional import InfluenceObjective
        >>> network = nn.Linear(1, 1, bias=False)
        >>> factors = KroneckerFactors(network, InfluenceObjective("half_squared_error"))
        >>> factors.update(network, (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)))
        >>> factors.curvature().eigenvalues()  # the mean of x squared
        tensor([5.])
    """

    def __init__(
        self,
        module: nn.Module,
        objective: InfluenceObjective,
        include: str | None = None,
        fisher: Fisher = "type2",
        max_width: int = 8192,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, objective, include, fisher, max_width, seed, **kwargs)
        statistics = self._made_for(module)
        statistics.warn_of_diagonal()
        self.diagonal, zeros = statistics.diagonal, statistics.factor_zeros()
        self._add_states({key: zero for key, zero in zeros.items() if zero.numel()})

    def update(self, module: nn.Module, batch: Any) -> None:
        """Add a batch; see the class."""
        statistics = self._of(module)
        self._add(statistics.factors(batch, self._generator(statistics.view.device)))

    def curvature(self) -> KroneckerCurvature:
        """K-FAC over all ranks, in the parameters' dtype, at least float32."""
        sums = {"diagonal": self.float_state(0)} | self._normalized()
        return KroneckerCurvature.from_factors(self.layers, self.places, sums, self.parameter_dtype)


class EigenCorrection(_CurvatureMetric):
    r"""The eigenvalues of EK-FAC, in the eigenvectors of K-FAC.

    .. math:: \Lambda_{pm} = \mathbb E\big[(Q_S^\top \textstyle\sum_t Ds_t \bar a_t^\top Q_A)_{pm}^2\big]

    A second pass over the data, after :class:`KroneckerFactors`. ``update(module, batch)`` adds a batch; ``compute()``
    returns ``"<layer>"`` ``(G, P, M)`` and ``"count"``; :meth:`curvature` puts them into the curvature.

    Args:
        module: The network, for the shapes of its layers.
        objective: Loss and outputs.
        curvature: K-FAC, as :meth:`KroneckerFactors.curvature` gives it; the same on every rank.
        include: As in :class:`KroneckerFactors`, with the same value.
        fisher: As there.
        max_width: As there, with the same value.
        seed: As there.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``curvature`` has other layers than the network; else as :class:`KroneckerFactors`.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: George et al. 2018 (arXiv 1806.03884), Eq. 7.

    Note:
        As :class:`KroneckerFactors`; the eigenvectors are kept beside the states.

    Example:
        >>> from lightning_ext.functional import InfluenceObjective
        >>> network, objective = nn.Linear(1, 1, bias=False), InfluenceObjective("half_squared_error")
        >>> batch = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> factors = KroneckerFactors(network, objective)
        >>> factors.update(network, batch)
        >>> correction = EigenCorrection(network, objective, factors.curvature())
        >>> correction.update(network, batch)
        >>> correction.compute()[""]  # the network itself is the layer
        tensor(5., dtype=torch.float64)
    """

    def __init__(
        self,
        module: nn.Module,
        objective: InfluenceObjective,
        curvature: KroneckerCurvature,
        include: str | None = None,
        fisher: Fisher = "type2",
        max_width: int = 8192,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, objective, include, fisher, max_width, seed, **kwargs)
        if tuple(block.layer for block in curvature.blocks) != self.layers or curvature.places != self.places:
            raise ValueError(
                f"curvature has the layers {[block.layer.name for block in curvature.blocks]}, the network "
                f"{[layer.name for layer in self.layers]}; fit it with the same network, include and max_width."
            )
        self.factored = curvature
        self._add_states(self._made_for(module).correction_zeros())

    def update(self, module: nn.Module, batch: Any) -> None:
        """Add a batch; see the class."""
        statistics = self._of(module)
        device, dtype = statistics.view.device, statistics.dtype
        bases = {name: (a.to(device, dtype), s.to(device, dtype)) for name, (a, s) in self.factored.bases.items()}
        self._add(statistics.corrections(batch, bases, self._generator(statistics.view.device)))

    def curvature(self) -> KroneckerCurvature:
        """EK-FAC over all ranks, in the parameters' dtype, at least float32."""
        return self.factored.corrected(self._normalized())
