"""LAFTR: the distance from moments of the inputs and mean gates, or the reference's own gates on drawn inputs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_ext.functional import (
    ActivationSite,
    InputModel,
    InputStatistics,
    RecordActivations,
    ReferenceMoments,
    ReplayActivations,
    class_hessians,
    gates,
    joint_moments,
    mean_gate_distance,
    output_divergence,
    sequential_layers,
)
from lightning_ext.functional.parameters import recomputation_refused
from lightning_ext.nn._laftr_ahead import Address, DrawnChain, Rows
from lightning_ext.nn._laftr_network import Reduce, require_batches, weight_of, widened
from lightning_ext.nn._laftr_pool import PooledLAFTR
from lightning_ext.nn._laftr_sums import Gathered, packed, unpacked
from lightning_ext.nn.laftr import FunctionSpaceEstimator, MeanDistance

__all__ = ["LAFTREstimator"]

Mode = Literal["relu", "sample", "moments", "mean"]
Runner = Callable[[Mapping[str, Tensor], Tensor], Tensor]


class LAFTREstimator(FunctionSpaceEstimator):
    r"""LAFTR (BGLN): only the activations are linearised, around the reference, and inputs are drawn from moments.

    .. math:: \hat D = \sum_c \pi_c\, \mathbb E_{x \sim (m_c, \Sigma_c)}\,
        \rho\bigl(f(x; \theta_0), \tilde f(x; \theta_1)\bigr)

    with shares :math:`\pi_c`, means and covariances of the inputs of each class, and :math:`\tilde f` the network with
    weights :math:`\theta_1` and the reference's gates. The modes differ in these:

    - ``"relu"``: inputs are drawn from Gaussians and the reference says which units are open. Any architecture;
    - ``"sample"``: gates are drawn too, Bernoulli with each unit's mean rate, one draw per example for both networks
      (BGLN-S). ReLU and leaky ReLU; max-pooling and normalisation are expanded around the reference;
    - ``"moments"``: the exact expectation over independent gates and any inputs of these moments (BGLN-D, with all
      covariances). Chains of linear layers and ReLU;
    - ``"mean"``: every gate at its mean, a lower bound of ``"moments"``. Anything linear between its gates.

    The last two draw nothing. Their ``"kl"`` is of second order, with the mean Hessian of each class in place of
    :math:`\rho`; they have no ``"softmax_l2"``.

    Args:
        mode: see above. Default ``"relu"``, often the nearest.
        class_conditional: moments of each class; the target must hold class numbers below the number of outputs.
            ``False``: moments of all inputs together, for regression too.
        num_samples: S, inputs drawn for a distance, at least 1; one for each class at least.
        covariance: ``"full"``, ``"diag"``, or ``"lowrank"`` for inputs of many dimensions.
        rank: of ``"lowrank"``.
        gates: a mean for each ``"unit"``, or for each ``"channel"`` of a feature map.
        jitter: added to the variances, in squared units of the inputs.
        fixed_draws: the same draws for every distance, for optimisers that search along a line.
        variant: ``"official"``: the formula of the authors' code in mode ``"moments"``, for comparison only.
        store_dtype: of the reference's floating-point tensors, ``"bfloat16"`` or ``"float16"`` for half the memory.
            Default: as they are.
        kwargs: see :class:`FunctionSpaceEstimator`.

    Raises:
        ValueError: For arguments out of range or that do not go together; from ``fit`` as stated there.
        NotImplementedError: From ``fit``, where the network is not what the mode needs; it names what is not.

    Source: Dhawan, Huang, Bae & Grosse 2023 (arXiv:2302.03519).

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> data = [(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1]))]
    >>> estimator = LAFTREstimator(divergence="mse").fit(network, data)
    >>> estimator.distance(network).item()
    0.0
    >>> with torch.no_grad():
    ...     _ = network[2].bias.add_(torch.tensor([3.0, 4.0]))
    >>> round(estimator.distance(network).item(), 4)
    12.5

    Note:
        ``fit``: one pass without gradients, :math:`B d^2` multiplications per batch for a full covariance, sums that
        add up over ranks. ``distance``: a forward and backward pass over S inputs and a forward pass of the reference;
        without draws as stated in :func:`~lightning_ext.functional.joint_moments` and
        :func:`~lightning_ext.functional.mean_gate_distance`. Kept: one copy of parameters and buffers, and
        in the parameters' precision :math:`G d (d + 3) / 2` numbers for full covariances and one for each unit and
        class. Where inputs are drawn and the network is a chain of linear layers and ReLU, its Python is not run for
        every distance: the reference is taken for up to 128 draws at once, in at most 8 MiB, and the chain is looked
        for anew with them, and whenever an attribute, a part or a hook of the module is another one.
    """

    def __init__(
        self,
        mode: Mode = "relu",
        class_conditional: bool = True,
        num_samples: int = 200,
        covariance: Literal["full", "diag", "lowrank"] = "full",
        rank: int = 64,
        gates: Literal["unit", "channel"] = "unit",
        jitter: float = 1e-4,
        fixed_draws: bool = False,
        variant: Literal["exact", "official"] = "exact",
        store_dtype: Literal["bfloat16", "float16"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(map(repr, get_args(Mode)))}; got {mode!r}.")
        if not isinstance(num_samples, int) or num_samples < 1 or not jitter >= 0:
            raise ValueError(
                f"num_samples must be an integer of at least 1, and jitter at least 0; got {num_samples}, {jitter}."
            )
        if mode in ("moments", "mean") and self.divergence == "softmax_l2":
            raise ValueError(f"mode={mode!r} has a closed form for 'mse' and 'kl' only; got divergence='softmax_l2'.")
        if variant not in ("exact", "official") or (variant == "official" and mode != "moments"):
            raise ValueError(f"variant is 'exact', or 'official' with mode='moments'; got {variant!r}, {mode!r}.")
        if store_dtype not in (None, "bfloat16", "float16"):
            raise ValueError(f"store_dtype must be None, 'bfloat16' or 'float16'; got {store_dtype!r}.")
        InputStatistics.zeros((1,), covariance=covariance, rank=rank, granularity=gates)  # knows the names
        self.mode, self.class_conditional, self.num_samples = mode, class_conditional, num_samples
        self.covariance, self.rank, self.gates, self.jitter = covariance, rank, gates, jitter
        self.fixed_draws, self.variant, self.store_dtype = fixed_draws, variant, store_dtype
        self._forget()

    @property
    def kind(self) -> str:
        """The mode too: each keeps something else."""
        return f"{super().kind}(mode={self.mode!r})"

    def extra_repr(self) -> str:
        """The mode too."""
        return f"mode={self.mode!r}, {super().extra_repr()}"

    def _forget(self) -> None:
        self._model: InputModel | None = None
        self._templates: list[ActivationSite] | None = None
        self._moments: ReferenceMoments | None = None
        self._layers: list[tuple[str, str | None]] | None = None
        self._ahead = DrawnChain()

    # -- statistics ---------------------------------------------------------------------------------------------------

    def _fit(self, module: nn.Module, batches: Iterable[Any], reduce: Reduce | None) -> None:
        statistics, hessians = self._collect(module, batches)
        require_batches(statistics is not None, module, reduce)
        assert statistics is not None
        if reduce is not None:
            statistics.reduce(reduce)
            hessians = None if hessians is None else reduce(hessians)
        statistics.finalise(self.jitter)  # refuses what is not finite
        dtype = torch.promote_types(next(p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        self._keep(statistics, dtype)
        if hessians is not None:
            self._kept["hessians"] = hessians.to(dtype)
        if self.mode in ("moments", "mean"):
            own = self._distance(module)  # refuses what it cannot do while there are data for another mode
            if not bool(own.isfinite()):
                raise ValueError(
                    f"the reference's distance to itself is {float(own)}: are some outputs infinite, such as masked "
                    "logits? Leave them out with heads."
                )
        if self.store_dtype is not None:
            dtype = getattr(torch, self.store_dtype)
            held = self._reference
            self._reference = {n: v.to(dtype) if v.is_floating_point() else v for n, v in held.items()}

    def _collect(self, module: nn.Module, batches: Iterable[Any]) -> tuple[InputStatistics | None, Tensor | None]:
        """Sums over the batches, and of the outputs' Hessians where they are kept; None where there is no batch."""
        statistics: InputStatistics | None = None
        hessians: Tensor | None = None

        def take(x: Tensor, groups: Tensor | None) -> None:
            nonlocal hessians
            assert statistics is not None
            outputs, sites = (None, []) if self.mode == "relu" else self._recorded(module, x)
            statistics.add(x, groups, sites)
            if outputs is not None and self.mode != "sample" and self.divergence == "kl":
                chosen = outputs if self.heads is None else outputs[..., self.heads]
                found = class_hessians(chosen.double(), groups, statistics.num_groups, "sum")
                hessians = found if hessians is None else hessians + found

        gathered = Gathered(take)
        for batch in batches:
            x = self.inputs_of(batch)
            if statistics is None:
                outputs, sites = self._recorded(module, x, watch=True)
                statistics = self._zeros(x, outputs, sites)
                self._facts["outputs"] = outputs.shape[-1]
                gathered.row_bytes = sum(math.prod(unit) for unit in statistics.units) * x.element_size()
            gathered.add(_tensor(x), self._groups(batch, len(x)))
        gathered.flush()
        return statistics, hessians

    def _recorded(self, module: nn.Module, x: Any, *, watch: bool = False) -> tuple[Tensor, list[ActivationSite]]:
        with RecordActivations(watch=watch, own=self.values_of(module).values()) as tape:
            outputs = self._forward(module, x)
        return outputs, tape.sites

    def _zeros(self, x: Tensor, outputs: Tensor, sites: Sequence[ActivationSite]) -> InputStatistics:
        x = _tensor(x)
        if any(site.gate is None and site.slope is not None for site in sites) and self.mode != "relu":
            name = next(site.name for site in sites if site.gate is None and site.slope is not None)
            raise NotImplementedError(
                f"mode={self.mode!r} needs units that are open or closed, and the network calls {name}: use "
                "mode='relu', which expands any activation around the reference."
            )
        return InputStatistics.zeros(
            x.shape[1:], sites if self.mode != "relu" else (),
            num_groups=outputs.shape[-1] if self.class_conditional else 1,
            covariance=self.covariance, rank=self.rank, granularity=self.gates, seed=self.seed,
            device=x.device if x.device.type != "mps" else "cpu",
        )  # fmt: skip

    def _groups(self, batch: Any, size: int) -> Tensor | None:
        if not self.class_conditional:
            return None
        labels = self.targets_of(batch)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != (size,):
            told = f"{labels.dtype}, {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"class_conditional=True needs a class number for each of {size} samples as the target; got "
                f"{told}. Say with target= where they are, or set class_conditional=False."
            )
        return labels

    def _keep(self, statistics: InputStatistics, dtype: torch.dtype) -> None:
        """Keep means and centred moments, which lose nothing to cancellation in the network's precision."""
        state = dict(statistics.state)
        count = state.pop("count")
        n = count.clamp(min=1)
        rows = {name: value / n.view(-1, *[1] * (value.ndim - 1)) for name, value in state.items()}
        rows["second"] = packed(rows["second"] - self._outer(statistics, rows["sum"]), self.covariance)
        self._kept |= {f"statistics.{name}": value.to(dtype) for name, value in rows.items()}
        self._kept["statistics.count"] = count
        self._facts |= {"shape": list(statistics.shape), "units": [list(unit) for unit in statistics.units]}

    def _outer(self, statistics: InputStatistics, mean: Tensor) -> Tensor:
        """What the means contribute to the second moments that the statistics hold."""
        if self.covariance == "diag":
            return mean.square()
        return mean.unsqueeze(2) * (mean if self.covariance == "full" else statistics.sketched(mean)).unsqueeze(1)

    @property
    def statistics(self) -> InputStatistics:
        """The sums over the data, in float64."""
        self._require_fitted()
        rows = {name[11:]: value.double() for name, value in self._kept.items() if name.startswith("statistics.")}
        count = rows.pop("count")
        rows["second"] = unpacked(rows["second"], self.covariance)
        units = tuple(tuple(unit) for unit in self._facts["units"])
        found = InputStatistics(rows, tuple(self._facts["shape"]), units, self.covariance, None, self.seed)
        rows["second"] = rows["second"] + self._outer(found, rows["sum"])
        found.state = {name: value * count.view(-1, *[1] * (value.ndim - 1)) for name, value in rows.items()}
        found.state["count"] = count.clone()  # they are added to in place
        return found

    @property
    def input_model(self) -> InputModel:
        """Groups of inputs with mean, covariance and mean gates, in float64."""
        if self._model is None:
            self._model = self.statistics.finalise(self.jitter)
        return self._model

    def absorb(self, other: FunctionSpaceEstimator) -> None:
        """Add the sums of an earlier task.

        Raises:
            ValueError: If it is another kind of estimator, has other sums, or other heads.
        """
        kinds = [(each._facts, list(each._kept)) for each in (self, other)]
        if not isinstance(other, LAFTREstimator) or kinds[0] != kinds[1]:
            raise ValueError("only LAFTR statistics of one kind, with inputs, units and heads of one shape, can merge.")
        self._keep(self.statistics.merge(other.statistics), self._kept["statistics.sum"].dtype)
        if "hessians" in self._kept:
            self._kept["hessians"] = self._kept["hessians"] + other._kept["hessians"].to(self._kept["hessians"].device)
        self._forget()

    @classmethod
    def pool(cls, estimators: Sequence[FunctionSpaceEstimator]) -> FunctionSpaceEstimator:
        """The mean of several distances from one reference, in one pass where inputs are drawn."""
        drawn = all(isinstance(each, LAFTREstimator) and each.mode in ("relu", "sample") for each in estimators)
        return PooledLAFTR(estimators) if drawn else MeanDistance(estimators)

    # -- distances ----------------------------------------------------------------------------------------------------

    @property
    def address(self) -> tuple[int, ...]:
        """Always the first with ``fixed_draws``."""
        return (0,) if self.fixed_draws else super().address

    def distance(self, module: nn.Module) -> Tensor:
        """See :meth:`FunctionSpaceEstimator.distance`."""
        self._require_fitted()
        found = None
        if self.mode in ("relu", "sample"):
            found = self._ahead.distance(self, module, self.rows, self.address)
        if found is None:
            return super().distance(module)
        self._draws += 1
        return found

    def rows(self, module: nn.Module, addresses: Sequence[Address]) -> Rows:
        """What is drawn for distances at some addresses."""
        return self.drawn(self._model_for(module), self.num_samples, addresses)[0]

    def drawn(self, model: InputModel, num: int, addresses: Sequence[Address]) -> tuple[Rows, Tensor]:
        """Of inputs of some model, and their groups ``(S,)``."""
        generators = [self.generator(model.means.device, address) for address in addresses]
        x, weights, group = model.sample(num, generators)
        return Rows(x, weights, model.draw_gates(group, generators) if self.mode == "sample" else ()), group

    def _model_for(self, module: nn.Module) -> InputModel:
        weight, model = weight_of(module), self.input_model
        if model.means.dtype != weight.dtype or model.means.device != weight.device:
            self._model = model = model.to(weight)
        return model

    def reference_batches(
        self, module: nn.Module, num: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[ActivationSite | None] | None]:
        """Inputs drawn in place of the data, with what both networks are run with.

        Args:
            module: the network.
            num: how many, default ``num_samples``.

        Returns:
            Inputs ``(S, *shape)``; weights ``(S,)``, which sum to 1; groups ``(S,)``; and the gates of both networks,
            or None for the reference's own.
        """
        rows, group = self.drawn(self._model_for(module), num or self.num_samples, [self.address])
        return rows.x[0], rows.weights, group, self.given(module, rows)

    def given(self, module: nn.Module, rows: Rows) -> list[ActivationSite | None] | None:
        """The gates of the first draw, for both networks; None for the reference's own."""
        return gates(self._sites(module, rows.x[0]), [each[0] for each in rows.gates]) if rows.gates else None

    def _sites(self, module: nn.Module, x: Tensor) -> list[ActivationSite]:
        if self._templates is None:
            reference = self.reference_values(module)
            with torch.no_grad(), RecordActivations(own=reference.values()) as tape:
                self.run(module, reference, x[:1])
            self._templates = tape.sites
        return self._templates

    def _distance(self, module: nn.Module) -> Tensor:
        if self.mode in ("relu", "sample"):
            x, weights, _, given = self.reference_batches(module)
            old, new = self.replay(module, x, given)
            return output_divergence(new, old, self.divergence, self.heads, weights)
        per_group = self._moment_distance(module) if self.mode == "moments" else self._mean_distance(module)
        return self.input_model.weights.to(per_group) @ per_group

    def replay(
        self, module: nn.Module, x: Tensor, given: Sequence[ActivationSite | None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs of the reference, and of the module with the reference's activations, on the same inputs."""
        reference, current = self.reference_values(module), self.parameters_of(module)  # modes slow every look at them
        with torch.no_grad(), RecordActivations(given or (), watch=False, own=reference.values()) as tape:
            old = self.run(module, reference, x)
        with ReplayActivations(tape.sites, own=current.values()), recomputation_refused():
            new = self.run(module, current, x)
        return old, new

    def _metric(self, like: Tensor) -> Tensor | None:
        if self.divergence != "kl":
            return None
        count = self._kept["statistics.count"].clamp(min=1)
        return (self._kept["hessians"] / count[:, None, None]).to(like)

    def _moment_distance(self, module: nn.Module) -> Tensor:
        current, model = self.parameters_of(module), self.input_model
        if self._layers is None:
            example = model.means[:1].to(next(iter(current.values())))
            self._layers = sequential_layers(
                lambda values, x: self.run(module, values, x), self.reference_values(module), example
            )
        pairs = [(current[weight], None if bias is None else current[bias]) for weight, bias in self._layers]
        mean, rates = model.means.flatten(1), model.gate_means()
        diagonal = self.covariance == "diag"
        spread = model.factors.square() if diagonal else None
        factor = None if diagonal else model.factors
        if self.variant == "official":
            arguments = (mean.to(pairs[0][0]), None if spread is None else spread.to(pairs[0][0]))
            found = joint_moments(
                self._reference_layers(module), pairs, *arguments, [rate.to(pairs[0][0]) for rate in rates],
                factor=None if factor is None else factor.to(pairs[0][0]), variant="official", heads=self.heads,
            )  # fmt: skip
        else:
            if self._moments is None or self._moments.dtype != torch.promote_types(pairs[0][0].dtype, torch.float32):
                self._moments = ReferenceMoments(
                    self._reference_layers(module), mean, spread, rates, factor=factor, heads=self.heads,
                    dtype=pairs[0][0].dtype,
                )  # fmt: skip
            found = self._moments.compare(pairs)
        return found.distance(self._metric(found.second))

    def _reference_layers(self, module: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
        reference = self.reference_values(module)
        assert self._layers is not None
        return [(reference[weight], None if bias is None else reference[bias]) for weight, bias in self._layers]

    def _mean_distance(self, module: nn.Module) -> Tensor:
        reference, current = (
            {name: widened(value) for name, value in values.items()}
            for values in (self.reference_values(module), self.parameters_of(module))
        )
        model, diagonal = self.input_model, self.covariance == "diag"
        like = next(value for value in current.values() if value.is_floating_point())
        return mean_gate_distance(
            lambda values, x: self.run(module, values, x), reference, current,
            model.means.to(like), None if diagonal else model.factors.to(like), model.gate_means(),
            covariance=model.factors.square().to(like) if diagonal else None,
            metric=self._metric(like), heads=self.heads,
        )  # fmt: skip


def _tensor(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise ValueError(
            f"inputs must be a tensor to have a mean and a covariance; got {type(x).__name__}. Say with inputs= "
            "what the network's input is in a batch, and with forward= how it is called on it."
        )
    return x
