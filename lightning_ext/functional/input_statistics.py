"""What is kept of the data: moments of the inputs and mean gates, by group, and the inputs drawn from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lightning_ext.functional.activation_sites import ActivationSite
from lightning_ext.functional.counter_rng import seeded_generator

__all__ = ["InputModel", "InputStatistics"]

Covariance = Literal["full", "diag", "lowrank"]
Granularity = Literal["unit", "channel"]
Generators = Generator | Sequence[Generator] | None


@dataclass(eq=False)
class InputStatistics:
    r"""Sums over the data from which an `InputModel` is made; sums of shards of any size add up to those of the whole.

    For each group c: :math:`n_c`, :math:`\sum x`, of :math:`\sum x x^\top` all, the diagonal, or a sketch
    :math:`\sum x x^\top \Omega`, and for each ReLU the sum of :math:`1[s > 0]`. All in float64.

    Args:
        state: The sums by name, ``"count"`` ``(G,)``, ``"sum"`` ``(G, d)``, ``"second"`` ``(G, d, d)``, ``(G, d)`` or
            ``(G, d, r)``, ``"gate.0"``, ...: make them with `zeros`. They may be reduced over ranks by a sum.
        shape: Of one input.
        units: Shape of one example at each gate.
        covariance: "full", "diag" or "lowrank".
        origin: ``(d,)``, subtracted from every input before it is squared.
        seed: Of the sketch.

    >>> statistics = InputStatistics.zeros((1,))
    >>> statistics.add(torch.tensor([[0.0], [2.0]])).finalise(jitter=0.0).covariance()
    tensor([[[1.]]], dtype=torch.float64)

    Note:
        Memory 8 G d (d + 1) bytes for "full", 8 G d (r + 1) for "lowrank"; each batch costs B d^2 or 2 B d r
        multiplications in float64.
    """

    state: dict[str, Tensor]
    shape: tuple[int, ...]
    units: tuple[tuple[int, ...], ...] = ()
    covariance: Covariance = "full"
    origin: Tensor | None = None
    seed: int = 0

    @classmethod
    def zeros(
        cls,
        shape: Sequence[int],
        sites: Sequence[ActivationSite] = (),
        *,
        num_groups: int = 1,
        covariance: Covariance = "full",
        rank: int = 64,
        granularity: Granularity = "unit",
        origin: Tensor | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> "InputStatistics":
        """Sums over nothing.

        Args:
            shape: Of one input, without the batch.
            sites: From a reference pass over any batch; those without a gate are left out. Default: no gates.
            num_groups: G, at least 1, such as the number of classes. Default 1.
            covariance: "full", "diag", or "lowrank": a Nystrom approximation, exact from the true rank on.
            rank: r of "lowrank"; no more than d is used. Default 64.
            granularity: a mean gate for every unit, or one for each channel of a feature map, the mean over its
                positions. Default "unit".
            origin: an input near the data's mean, where means are 1e4 standard deviations and more from 0; one for
                all ranks. Default 0.
            seed: of the sketch; one for all that are to be merged. Default 0.
            device: where the sums live. Default the CPU.

        Raises:
            ValueError: For another covariance or granularity, or sizes below 1.
        """
        for name, value, known in (
            ("covariance", covariance, get_args(Covariance)),
            ("granularity", granularity, get_args(Granularity)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")
        size = torch.Size(shape).numel()
        if min(size, num_groups, rank) < 1:
            raise ValueError(f"sizes must be at least 1; got shape {tuple(shape)}, {num_groups} groups, rank {rank}.")
        tail = {"full": (size, size), "diag": (size,), "lowrank": (size, min(rank, size))}[covariance]
        gated = [site for site in sites if site.gate is not None]
        sums = {"count": (), "sum": (size,), "second": tail}
        sums |= {f"gate.{i}": _kept(site, granularity) for i, site in enumerate(gated)}
        state = {name: torch.zeros(num_groups, *s, dtype=torch.float64, device=device) for name, s in sums.items()}
        origin = None if origin is None else origin.detach().flatten().to(state["sum"])
        units = tuple(site.shape[1:] for site in gated)
        return cls(state, tuple(shape), units, covariance, origin, seed)

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.state["count"])

    @cached_property
    def _sketch(self) -> Tensor:
        _, size, rank = self.state["second"].shape
        draws = torch.randn(size, rank, generator=seeded_generator(self.seed, size, rank), dtype=torch.float64)
        basis: Tensor = torch.linalg.qr(draws).Q
        return basis.to(self.state["second"])

    def sketched(self, rows: Tensor) -> Tensor:
        r"""Rows ``(..., d)`` times :math:`\Omega` of a "lowrank" sketch."""
        return rows @ self._sketch.to(rows)

    @torch.no_grad()
    def add(self, x: Tensor, groups: Tensor | None = None, sites: Sequence[ActivationSite] = ()) -> "InputStatistics":
        """Add a batch, in place.

        Args:
            x: ``(B, *shape)``, floating.
            groups: ``(B,)``, integers from 0 to G - 1; None only for one group.
            sites: From the reference pass over x.

        Raises:
            ValueError: If a shape or number does not fit, or a group is out of range.
            TypeError: If x is not floating.
        """
        flat, groups = self._check(x, groups)
        gated = [site.gate for site in sites if site.gate is not None]
        if [tuple(gate.shape) for gate in gated] != [(len(x), *unit) for unit in self.units]:
            raise ValueError(
                f"sites must have gates of shapes {[(len(x), *unit) for unit in self.units]}, from a reference pass "
                f"over x; got {[tuple(gate.shape) for gate in gated]}."
            )
        self.state["count"].index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))
        self.state["sum"].index_add_(0, groups, flat)
        self._add_second(flat, groups)
        members = F.one_hot(groups, self.num_groups)
        for i, gate in enumerate(gated):
            total = self.state[f"gate.{i}"]
            positions = [dim for dim in range(1, gate.ndim) if total.shape[dim] == 1 and gate.shape[dim] > 1]
            gate = gate.to(torch.promote_types(gate.dtype, torch.float32))  # which counts exactly
            with torch.autocast(gate.device.type, enabled=False):
                sums = (members.mT.to(gate) @ gate.flatten(1)).view(-1, *gate.shape[1:]).to(total)
            total += sums.mean(positions, keepdim=True) if positions else sums
        return self

    def _check(self, x: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
        if not x.is_floating_point():
            raise TypeError(
                f"inputs must be floating, to have a mean and a covariance; got {x.dtype}. For token ids, take the "
                "embedding's output as the input."
            )
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"inputs must have shape (B, {', '.join(map(str, self.shape))}); got {tuple(x.shape)}.")
        if groups is None:
            if self.num_groups > 1:
                raise ValueError(f"groups must say which of the {self.num_groups} groups each input belongs to.")
            groups = torch.zeros(len(x), dtype=torch.long, device=self.state["sum"].device)
        elif groups.shape != x.shape[:1] or groups.is_floating_point():
            raise ValueError(
                f"groups must be integers of shape ({len(x)},); got {groups.dtype}, {tuple(groups.shape)}."
            )
        elif len(x) and not 0 <= int(groups.min()) <= int(groups.max()) < self.num_groups:
            raise ValueError(
                f"groups must lie between 0 and {self.num_groups - 1}; got {int(groups.min())} to {int(groups.max())}."
            )
        flat = x.flatten(1).to(self.state["sum"])
        return flat if self.origin is None else flat - self.origin, groups.to(flat.device, torch.long)

    def _add_second(self, flat: Tensor, groups: Tensor) -> None:
        second = self.state["second"]
        if self.covariance == "diag":
            second.index_add_(0, groups, flat.square())
            return
        # sorted, so that the rows of a group are a slice
        order, counts = groups.argsort(), torch.bincount(groups, minlength=self.num_groups).tolist()
        sorted_rows = flat if self.num_groups == 1 else flat[order]
        for total, rows in zip(second, torch.split(sorted_rows, counts), strict=True):
            if len(rows):
                total.addmm_(rows.mT, rows if self.covariance == "full" else rows @ self._sketch)

    def merge(self, other: "InputStatistics") -> "InputStatistics":
        """Add the sums of another shard, in place.

        Raises:
            ValueError: If it does not have the same sums, origin and seed.
        """
        shapes = [{name: value.shape for name, value in each.state.items()} for each in (self, other)]
        alike = (self.covariance, self.units, self.seed) == (other.covariance, other.units, other.seed)
        origins = [each.state["sum"].new_zeros(1) if each.origin is None else each.origin for each in (self, other)]
        if shapes[0] != shapes[1] or not alike or bool((origins[0] != origins[1].to(origins[0])).any()):
            raise ValueError("only statistics of the same shapes, covariance, origin and seed can be merged.")
        for name, value in self.state.items():
            value += other.state[name].to(value.device)
        return self

    def reduce(self, function: Callable[[Tensor], Tensor]) -> "InputStatistics":
        """Replace each tensor of sums by ``function`` of it, such as its sum over ranks."""
        self.state = {name: function(value) for name, value in self.state.items()}
        return self

    def finalise(self, jitter: float = 1e-4) -> "InputModel":
        r"""Means, factors of covariances and mean gates.

        .. math:: \pi_c = \frac{n_c}{n}, \quad m_c = \frac{1}{n_c} \sum x, \quad
            L_c L_c^\top = \frac{1}{n_c} \sum (x - m_c)(x - m_c)^\top + \epsilon I

        Args:
            jitter: :math:`\epsilon \ge 0`, in squared units of the inputs; not added to "lowrank".

        Returns:
            The model, in float64. A group without examples has weight 0 and is never drawn.

        Raises:
            ValueError: If there are no examples, they are not finite, or jitter is negative.
        """
        if jitter < 0:
            raise ValueError(f"jitter must be at least 0; got {jitter}.")
        count, total = self.state["count"], self.state["count"].sum()
        if not bool(total > 0):
            raise ValueError("there are no examples to take statistics of.")
        if not all(bool(value.isfinite().all()) for value in self.state.values()):
            raise ValueError("the inputs are not finite: their sums hold NaN or infinity.")
        n = count.clamp_min(1.0).unsqueeze(1)
        mean = self.state["sum"] / n
        factors = self._factors(mean, n, jitter)
        gates = [self.state[f"gate.{i}"] for i in range(len(self.units))]
        rates = tuple(gate / n.reshape(-1, *[1] * (gate.ndim - 1)) for gate in gates)
        means = (mean if self.origin is None else mean + self.origin).reshape(-1, *self.shape)
        return InputModel(count / total, means, factors, rates, self.units)

    def _factors(self, mean: Tensor, n: Tensor, jitter: float) -> Tensor:
        if self.covariance == "diag":
            variance = (self.state["second"] / n - mean.square()).clamp_min(0.0)
            deviation: Tensor = (variance + jitter).sqrt()
            return deviation
        second = self.state["second"] / n.unsqueeze(2)
        if self.covariance == "full":
            sigma = second - mean.unsqueeze(2) * mean.unsqueeze(1)
            sigma.diagonal(dim1=1, dim2=2).add_(jitter)
            return _roots(sigma)
        image = second - mean.unsqueeze(2) * (mean @ self._sketch).unsqueeze(1)
        core = self._sketch.mT @ image
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        kept = values > values[:, -1:] * (1e-12 * core.shape[-1])
        scaled: Tensor = vectors * torch.where(kept, values, torch.inf).rsqrt().unsqueeze(1)
        return image @ scaled


def _kept(site: ActivationSite, granularity: Granularity) -> tuple[int, ...]:
    units = site.shape[1:]
    if granularity == "unit" or len(units) < 2:
        return units
    channel = (site.channel if site.channel < 0 else site.channel - 1) % len(units)
    return tuple(size if dim == channel else 1 for dim, size in enumerate(units))


def _roots(sigma: Tensor) -> Tensor:
    """L with L L^T = sigma: the Cholesky factor, or where sigma is singular one from its eigenvectors."""
    factors: Tensor
    factors, status = torch.linalg.cholesky_ex(sigma)
    singular = status != 0
    if bool(singular.any()):
        values, vectors = torch.linalg.eigh(sigma[singular])
        factors[singular] = vectors * values.clamp_min(0.0).sqrt().unsqueeze(1)
    return factors


@dataclass(frozen=True, eq=False)
class InputModel:
    r"""Groups of inputs with a mean, a covariance and mean gates; Gaussian when drawn from.

    Args:
        weights: :math:`\pi_c`, ``(G,)``, summing to 1.
        means: :math:`m_c`, ``(G, *shape)``.
        factors: :math:`L_c`, ``(G, d, r)``, or ``(G, d)`` for a diagonal one.
        gates: for each ReLU the mean gates :math:`\mu`, ``(G, *units)``, with 1 for dimensions over which they were
            averaged.
        units: Shape of one example at each gate.

    >>> model = InputModel(torch.tensor([0.25, 0.75]), torch.tensor([[0.0], [8.0]]), torch.zeros(2, 1))
    >>> x, weights, group = model.sample(4)
    >>> x.flatten(), weights, group
    (tensor([0., 8., 8., 8.]), tensor([0.2500, 0.2500, 0.2500, 0.2500]), tensor([0, 1, 1, 1]))
    """

    weights: Tensor
    means: Tensor
    factors: Tensor
    gates: tuple[Tensor, ...] = ()
    units: tuple[tuple[int, ...], ...] = ()
    _layouts: dict[int, tuple[list[int], Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def mean_of(cls, models: "Sequence[InputModel]") -> "InputModel":
        """The groups of several models side by side, each model with an equal share.

        Args:
            models: at least one, with inputs and units of one shape and factors of one size.
        """
        first, share = models[0], 1 / len(models)
        return cls(
            torch.cat([model.weights * share for model in models]),
            torch.cat([model.means for model in models]),
            torch.cat([model.factors for model in models]),
            tuple(torch.cat(gates) for gates in zip(*(model.gates for model in models), strict=True)),
            first.units,
        )

    def to(self, like: Tensor) -> "InputModel":
        """The same in the dtype and on the device of a tensor."""
        gates = tuple(gate.to(like) for gate in self.gates)
        means, factors = self.means.to(like), self.factors.to(like)
        return replace(self, weights=self.weights.to(like), means=means, factors=factors, gates=gates)

    def covariance(self) -> Tensor:
        r""":math:`L_c L_c^\top`, ``(G, d, d)``."""
        if self.factors.ndim == 2:
            return torch.diag_embed(self.factors.square())
        return self.factors @ self.factors.mT

    def gate_means(self) -> list[Tensor]:
        r""":math:`\mu` of every unit, ``(G, *units)`` for each ReLU."""
        return [gate.expand(-1, *units) for gate, units in zip(self.gates, self.units, strict=True)]

    def sample(self, num: int, generator: Generators = None) -> tuple[Tensor, Tensor, Tensor]:
        r"""Draw inputs, stratified by group.

        .. math:: x_s = m_c + L_c \epsilon, \quad S_c = \max(1, \operatorname{round}(S \pi_c)), \quad
            w_s = \pi_c / S_c

        so that :math:`\sum_s w_s \rho_s` estimates :math:`\sum_c \pi_c D_c` without bias.

        Args:
            num: S, at least 1; a few more are drawn where there are more groups.
            generator: on the model's device. Several: a draw from each. Default: torch's own.

        Returns:
            Inputs ``(S, *shape)``, of several draws ``(n, S, *shape)``; weights ``(S,)``, groups ``(S,)``; the model's
            dtype.

        Raises:
            ValueError: If num is below 1.
        """
        counts, weights, group = self._layout(num)
        noise = _drawn("normal_", (len(group), self.factors.shape[-1]), self.means, generator)
        x = self._inputs(noise, counts, group).reshape(*noise.shape[:2], *self.means.shape[1:])
        return x if isinstance(generator, Sequence) else x[0], weights, group

    def _inputs(self, noise: Tensor, counts: list[int], group: Tensor) -> Tensor:
        means = self.means.flatten(1)
        (draws, _, rank), width = noise.shape, means.shape[1]
        if self.factors.ndim == 2:
            return torch.addcmul(means[group], self.factors[group], noise)
        if min(counts) == max(counts):
            rows = noise.view(draws, len(counts), -1, rank).transpose(0, 1).flatten(1, 2)
            x = torch.baddbmm(means.unsqueeze(1), rows, self.factors.mT)
            return x.view(len(counts), draws, -1, width).transpose(0, 1).flatten(1, 2)
        parts = zip(means, self.factors, torch.split(noise, counts, dim=1), strict=True)
        drawn = [torch.addmm(m, e.flatten(0, 1), factor.mT) for m, factor, e in parts if e.shape[1]]
        return torch.cat([x.view(draws, -1, width) for x in drawn], dim=1)

    def _layout(self, num: int) -> tuple[list[int], Tensor, Tensor]:
        if num < 1:
            raise ValueError(f"num must be at least 1; got {num}.")
        if num not in self._layouts:
            shares = self.weights.tolist()
            counts = [max(1, round(num * share)) if share > 0 else 0 for share in shares]
            repeats = torch.tensor(counts, device=self.weights.device)
            group = torch.repeat_interleave(torch.arange(len(counts), device=self.weights.device), repeats)
            self._layouts[num] = counts, (self.weights / repeats.clamp_min(1))[group], group
        return self._layouts[num]

    def draw_gates(self, group: Tensor, generator: Generators = None) -> list[Tensor]:
        r"""Bernoulli(:math:`\mu`) gates of every unit, drawn anew for each example.

        Args:
            group: ``(S,)``, from `sample`.
            generator: on the model's device. Several: a draw from each. Default: torch's own.

        Returns:
            ``(S, *units)`` in {0, 1} for each ReLU, for `gates`; of several draws ``(n, S, *units)``.
        """
        found = []
        for gate, units in zip(self.gates, self.units, strict=True):
            mean = gate[group].expand(-1, *units)
            wide = mean.to(torch.promote_types(mean.dtype, torch.float32))  # rates below a half type's steps
            drawn = (wide - _drawn("uniform_", wide.shape, wide, generator)).relu_().sign_().to(mean.dtype)
            found.append(drawn if isinstance(generator, Sequence) else drawn[0])
        return found


def _drawn(kind: str, shape: Sequence[int], like: Tensor, generator: Generators) -> Tensor:
    """Random numbers ``(n, *shape)``, from each generator in turn."""
    each = generator if isinstance(generator, Sequence) else (generator,)
    found = torch.empty(len(each), *shape, dtype=like.dtype, device=like.device)
    for rows, own in zip(found, each, strict=True):
        getattr(rows, kind)(generator=own)
    return found
