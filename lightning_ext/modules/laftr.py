r"""Influence functions, mislabel scores and the proximal Bregman response without the training data.

Source: Dhawan, Huang, Bae & Grosse, *Efficient Parametric Approximations of Neural Network Function Space Distance*,
ICML 2023, arXiv:2302.03519; Bae, Ng, Lo, Ghassemi & Grosse 2022, arXiv:2209.05364, for the response.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_ext.functional import ConvergenceWarning, InfluenceObjective, ParameterView, differentiable, evaluating
from lightning_ext.modules._influence_engine import Engine
from lightning_ext.modules._influence_identity import digest
from lightning_ext.modules._influence_newton import Newton
from lightning_ext.modules._influence_source import CurvatureSource
from lightning_ext.modules._laftr_newton import Evaluate, newton_steps
from lightning_ext.modules._laftr_statistics import DistanceStatistics, drawn_inputs, require_fitted
from lightning_ext.modules.influence import InfluenceModule
from lightning_ext.nn.laftr import FunctionSpaceEstimator
from lightning_ext.nn.laftr_estimator import LAFTREstimator

__all__ = ["LAFTRInfluence"]

Solver = Literal[
    "auto", "direct", "dual", "block_cg", "nystrom_cg", "cg", "normal_cg", "nystrom", "lanczos", "neumann", "lissa",
    "ekfac", "kfac", "identity",
]  # fmt: skip


_QUASI_NEWTON = 30  # steps before curvature at the reference is given up as a guide


class LAFTRInfluence(InfluenceModule):
    r"""Influence from what an estimator kept of the training data, which is not gone through again.

    .. math:: \tau(m, z) = \tfrac1N\, \nabla m^\top (\hat G + \lambda I)^{-1} \nabla L(z), \qquad
        \hat G = \nabla_\theta^2 \hat D(\theta_0, \theta) \big|_{\theta = \theta_0},

    with :math:`\hat D` the estimate of the function-space distance on the training data. For the loss's own Bregman
    divergence (``"kl"`` for cross-entropy, ``"mse"`` for half the squared error) :math:`\hat G` stands for the
    Gauss-Newton matrix G of :class:`InfluenceModule`, of which this is a special case: scores, modes, Trainer, files
    and ranks are those described there. N is the number of samples the estimator was fitted with; the samples that are
    scored can be any.

    LAFTR's modes ``"relu"`` and ``"sample"`` give a Gauss-Newton matrix over drawn inputs, the same in all products;
    its closed forms, and other estimators, the Hessian of the distance itself. Mode ``"self"`` finds wrong labels.
    :meth:`respond` and :meth:`pbrf` go beyond the quadratic: they minimise the proximal Bregman objective, in which
    the distance is the statistics' own.

    Args:
        base: the network, with the weights that the estimator was fitted with.
        estimator: a fitted :class:`~lightning_ext.nn.LAFTREstimator`, or another estimator.
        objective: see :class:`InfluenceModule`; loss and measurement of the samples and queries.
        queries: loader or list of batches at which the measurement is taken. Not needed for ``mode="self"`` and
            ``"gradients"``.
        mode: ``"pairwise"``, ``"self"`` or ``"gradients"``, see :class:`InfluenceModule`.
        solver: as there, but for ``"trak"``. With a closed form or another estimator: not those that take single
            samples' curvature, ``"dual"``, ``"lissa"``, ``"kfac"`` and ``"ekfac"``.
        damping: :math:`\lambda > 0`; ``"auto"``, a tenth of the mean eigenvalue, with drawn inputs.
        weight_decay: L2 coefficient of the training objective, added to the damping.
        num_samples: inputs to draw; more cost more and vary less. Default: as many as the estimator draws.
        num_train: N. Default: what a ``LAFTREstimator`` counted; other estimators do not know it.
        rank: see :class:`InfluenceModule`, and so on.
        tol: relative residual of iterative solvers.
        max_iterations: of iterative solvers.
        normalize: None, ``"parameter"`` or ``"loss"``.
        include: regular expression; only parameters whose name it finds.
        output_dir: folder for the results.
        double: compute in float64, on a copy.
        seed: of the draws, and of sketches.
        cache_bytes: memory for linearised batches.

    Raises:
        ValueError: For arguments out of range; where the estimator is not fitted, or with another network. As
            :class:`InfluenceModule`.

    Source: Dhawan, Huang, Bae & Grosse 2023 (arXiv:2302.03519); the influence functions are those of Bae et al. 2022
    (arXiv:2209.05364). The paper's code for them was not released; choices are ours.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> base, x = nn.Sequential(nn.ReLU(), nn.Linear(1, 1, bias=False)), torch.tensor([[1.0], [3.0]])
    >>> _ = base[1].weight.data.fill_(1.0)
    >>> estimator = LAFTREstimator("mean", class_conditional=False, divergence="mse", jitter=0.0).fit(base, [x])
    >>> influence = LAFTRInfluence(base, estimator, InfluenceObjective("half_squared_error"), damping=1.0)
    >>> influence.self_influence(DataLoader(TensorDataset(x, torch.zeros(2, 1))))  # (x x)^2 / (mean of x^2 + damping)
    tensor([ 0.1667, 13.5000])

    Note:
        Cost of a product with :math:`\hat G`: as :class:`InfluenceModule` with ``num_samples`` for the training data;
        for a closed form about three times its forward and backward pass. Drawn inputs are shared out over ranks;
        every rank needs the same statistics. ``report`` says what was solved, ``samples`` counts drawn inputs.
    """

    def __init__(
        self,
        base: nn.Module,
        estimator: FunctionSpaceEstimator,
        objective: InfluenceObjective | None = None,
        queries: Iterable[Any] | None = None,
        mode: Literal["pairwise", "self", "gradients"] = "pairwise",
        solver: Solver = "auto",
        damping: float | Literal["auto"] = 1e-2,
        weight_decay: float = 0.0,
        num_samples: int | None = None,
        num_train: int | None = None,
        rank: int = 100,
        tol: float = 1e-2,
        max_iterations: int = 200,
        normalize: Literal["parameter", "loss"] | None = None,
        include: str | None = None,
        output_dir: str | Path | None = None,
        double: bool = False,
        seed: int = 0,
        cache_bytes: int = 2**30,
    ) -> None:
        if not isinstance(estimator, FunctionSpaceEstimator):
            raise ValueError(
                f"estimator must be a fitted FunctionSpaceEstimator; got {estimator!r}. "
                "function_space_estimator(name).fit(base, batches) makes one."
            )
        require_fitted(estimator)
        drawn = drawn_inputs(estimator)
        _check(drawn, solver, damping, weight_decay, num_samples, num_train)
        super().__init__(
            base, objective, queries, mode, solver, curvature="ggn" if drawn else "hessian", damping=damping,
            weight_decay=weight_decay, rank=rank, tol=tol, max_iterations=max_iterations, normalize=normalize,
            include=include, output_dir=output_dir, double=double, seed=seed, cache_bytes=cache_bytes,
        )  # fmt: skip
        self.estimator, self.num_samples, self.num_train = estimator, num_samples, num_train
        self._statistics: DistanceStatistics | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is drawn again from the same seed."""
        return {**super().__getstate__(), "_statistics": None}

    def _source_state(self) -> Any:
        return digest(self.estimator.get_extra_state()), self.num_samples, self.num_train

    def _source(self, view: ParameterView, rank: int, world: int) -> CurvatureSource | None:
        self._statistics = DistanceStatistics(
            self.estimator, self.base, self.num_samples, self._population(), self.options.seed
        )
        return self._statistics.source(view, rank, world)

    def _population(self) -> int:
        if self.num_train is not None:
            return self.num_train
        if not isinstance(self.estimator, LAFTREstimator):
            raise ValueError(
                f"num_train is None, and {type(self.estimator).__name__} does not count the training samples: say "
                "how many there were."
            )
        return int(self.estimator.statistics.state["count"].sum()) if self.estimator.fitted else 1

    def leave_out(self, groups: Sequence[Sequence[int]], loader: Any, rescale: bool = False) -> Tensor:
        """Effects of removing whole groups of samples on the queries' measurement, to first order.

        Args:
            groups: positions of each group's samples in the loader's data set.
            loader: DataLoader over samples of the training set.
            rescale: must be False: statistics cannot be told to leave samples out.

        Returns:
            ``(Q, len(groups))`` in the measurement's units.
        """
        if rescale:
            raise ValueError("rescale takes samples out of the curvature, and statistics keep none: use False.")
        return super().leave_out(groups, loader, False)

    def respond(
        self,
        groups: Sequence[int | Sequence[int]],
        loader: Any,
        tolerance: float = 1e-3,
        max_steps: int = 200,
        chunk_size: int | None = None,
    ) -> Tensor:
        r"""What the parameters become when samples leave, by the proximal Bregman objective on the statistics.

        .. math:: \delta_S = \arg\min_\delta\ \hat D(\theta_0, \theta_0 + \delta) - \frac1N \sum_{z \in S}
            \nabla L(z)^\top \delta + \frac\lambda2 \lVert \delta \rVert^2

        The loss of what is removed is linear here. As it is, the objective has no minimum: the gated network is linear
        in its inputs, and the loss of the removed sample is not bounded where the statistics do not hold it down.

        Args:
            groups: for each response a position in the loader's data set, or a list of them.
            loader: DataLoader over samples of the training set.
            tolerance: norm of the gradient, relative to that at 0, which every response must reach.
            max_steps: at least 1. The first 30 are quasi-Newton steps behind the solver's
                :math:`(\hat G + \lambda I)^{-1}`; what is not there by then takes Newton steps.
            chunk_size: responses that are computed together. Default: all.

        Returns:
            :math:`\delta` ``(len(groups), D)``, in the order of the chosen parameters.

        Raises:
            ValueError: For arguments out of range, and as the class says.

        Note:
            A step costs a forward and backward pass of the distance, and a solve, for every response that is not there
            yet; ten are common. Newton steps, each up to 250 products with the distance's Hessian, are for removals
            that lead far from the reference. Warns where ``tolerance`` was not reached; ``double=True`` helps where
            rounding is in the way.
        """
        if not 0 < tolerance < 1 or max_steps < 1:
            raise ValueError(
                f"tolerance must be between 0 and 1 and max_steps at least 1; got {tolerance}, {max_steps}."
            )
        if not len(groups):
            raise ValueError("groups must name at least one sample or group; got none.")
        with differentiable(None):
            engine = self._engine_for(loader)
            return self._respond(engine, groups, tolerance, max_steps, chunk_size)

    def pbrf(
        self,
        groups: Sequence[int | Sequence[int]],
        loader: Any,
        tolerance: float = 1e-3,
        max_steps: int = 200,
        chunk_size: int | None = None,
    ) -> Tensor:
        """How the queries' measurement changes with the responses of :meth:`respond`.

        Args:
            groups: see there, and so on.
            loader: see there.
            tolerance: see there.
            max_steps: see there.
            chunk_size: see there.

        Returns:
            ``(Q, len(groups))``, positive where the measurement rises: what :meth:`leave_out` says to first order.
        """
        changes = self.respond(groups, loader, tolerance, max_steps, chunk_size)
        with differentiable(None), evaluating(self.base):
            parts = [self._measured(batch, changes, chunk_size) for batch in self._query_batches(self._prepared)]
        return torch.cat(parts, dim=1).mT

    def _measured(self, batch: Any, changes: Tensor, chunk_size: int | None) -> Tensor:
        view, objective = self.view, self.objective
        function, targets, reference = (
            objective.function(self.base, view, batch),
            objective.targets(batch),
            view.values(),
        )

        def change(row: Mapping[str, Tensor]) -> Tensor:
            moved = {name: reference[name] + value for name, value in row.items()}
            return objective.measure(function(moved), targets)

        with torch.no_grad():
            moved: Tensor = torch.func.vmap(change, chunk_size=chunk_size)(view.unflatten(changes))
            return moved - objective.measure(function(reference), targets)

    def _respond(
        self, engine: Engine, groups: Sequence[int | Sequence[int]], tolerance: float, max_steps: int, chunk: int | None
    ) -> Tensor:
        pull = torch.stack([self._removed(engine, group) for group in groups])
        engine.inverse  # noqa: B018  # what it refuses it refuses now
        assert self._statistics is not None
        statistics, view, damping = self._statistics, engine.view, float(engine.report["damping"])
        reference = view.values()

        def objective(row: Tensor, linear: Tensor) -> Tensor:
            moved = {name: reference[name] + change for name, change in view.unflatten(row).items()}
            return statistics.distance(moved) - linear @ row + 0.5 * damping * row.square().sum()

        evaluate = torch.func.vmap(torch.func.grad_and_value(objective), chunk_size=chunk)
        norms = pull.norm(dim=1).clamp(min=torch.finfo(pull.dtype).tiny)
        with evaluating(self.base), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a rough solve is a good step
            point, size = _quasi_newton(engine, evaluate, pull, tolerance * norms, min(max_steps, _QUASI_NEWTON))
            if max_steps > _QUASI_NEWTON and bool((size > tolerance * norms).any()):
                product = torch.func.vmap(_hessian_product(objective), chunk_size=chunk)
                steps = max_steps - _QUASI_NEWTON
                point, size = newton_steps(evaluate, product, point, pull, tolerance * norms, steps)
        ratio = size / norms
        if not bool((ratio <= tolerance).all()):
            rank_zero_warn(
                f"{int((~(ratio <= tolerance)).sum())} of {len(ratio)} responses stopped at a relative gradient of up "
                f"to {float(ratio.max()):.2e}, above tolerance={tolerance:g}: raise max_steps or damping, or use "
                "double=True. Networks with kinks in an exact distance may have their minimum at one."
            )
        return point

    def _removed(self, engine: Engine, group: int | Sequence[int]) -> Tensor:
        members = [group] if isinstance(group, int) else list(group)
        if len(set(members)) < len(members):
            raise ValueError(f"a sample can leave only once; got the group {members[:20]}.")
        batch = engine.shard.get(members)
        with engine.naming([(torch.tensor(members), batch)]):
            return engine.losses.explicit(batch).sum(0) / engine.num_train


def _hessian_product(objective: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def product(row: Tensor, linear: Tensor, vector: Tensor) -> Tensor:
        (result,) = torch.func.vjp(lambda x: torch.func.grad(objective)(x, linear), row)[1](vector)  # it is symmetric
        found: Tensor = result
        return found

    return product


def _quasi_newton(
    engine: Engine, evaluate: Evaluate, pull: Tensor, tolerance: Tensor, max_steps: int
) -> tuple[Tensor, Tensor]:
    """The responses and the norms of their gradients after L-BFGS behind the inverse curvature."""
    newton = Newton(len(pull), pull.shape[1], pull.dtype).to(pull.device)
    point, gradient, value = torch.zeros_like(pull), torch.zeros_like(pull), pull.new_zeros(len(pull))
    going = torch.ones_like(value, dtype=torch.bool)
    newton.solve = lambda rows: rows.index_put((going,), engine.solve_replicated(rows[going]))
    for _ in range(max_steps):
        gradient[going], value[going] = evaluate(point[going], pull[going])
        going &= gradient.norm(dim=1) > tolerance
        if not bool(going.any()):
            return point, gradient.norm(dim=1)
        point = newton.step(point, gradient, value, torch.zeros_like(value), ~going)
    return newton.point, newton.gradient.norm(dim=1)


def _check(
    drawn: bool, solver: str, damping: float | str, weight_decay: float, num_samples: int | None, num_train: int | None
) -> None:
    if solver == "trak":
        raise ValueError("solver='trak' projects the training samples' gradients, which statistics do not keep.")
    if damping != "auto" and not isinstance(damping, str) and damping + weight_decay == 0:
        raise ValueError("damping and weight_decay are 0, and the curvature of statistics is singular: give a damping.")
    if damping == "auto" and not drawn:
        raise ValueError("damping='auto' takes the trace over drawn inputs; this estimator draws none: give a number.")
    for name, value in (("num_samples", num_samples), ("num_train", num_train)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
