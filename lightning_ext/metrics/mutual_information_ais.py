"""Bounds on mutual information from annealed importance sampling, and several bounds side by side."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_ext.functional import ais_lower, ais_upper
from lightning_ext.metrics._per_datum import SidedMean, require_finite
from lightning_ext.metrics.mutual_information import BarberAgakovBound, GIWAEBound, IWAEBound, Side, StructuredInfoNCE
from lightning_ext.metrics.mutual_information_plot import plot_bounds

__all__ = ["AISBound", "MutualInformationSandwich", "mutual_information_sandwich"]

Scheme = Literal["single", "independent", "independent_reverse", "coupled_reverse"]
SandwichedBound = Literal["ais", "barber_agakov", "giwae", "iwae", "structured_infonce"]

_MIXED = {("upper", "independent_reverse"), ("upper", "coupled_reverse"), ("lower", "independent")}
"""Where one chain stands beside K - 1 of the other direction."""

_TITLES = {
    "ais": "AIS",
    "barber_agakov": "Barber-Agakov",
    "giwae": "GIWAE",
    "iwae": "IWAE",
    "structured_infonce": "S-InfoNCE",
}


class AISBound(SidedMean):
    r"""Bounds from the log weights of annealed chains, K forward and K reverse.

    .. math:: \mathbb E\left[\log p(x|z) - \widehat{\log p}(x)\right]

    with the estimate of the evidence that the scheme makes of the weights :math:`w_k`, of the forward chains
    :math:`f_k` and the reverse chains :math:`r_k`:

    ========================== =================================== ================================
    scheme                     upper                               lower
    ========================== =================================== ================================
    ``"single"``               mean of log f                       mean of log r
    ``"independent"``          log mean of f                       log mean of r_1, f_2, ..., f_K
    ``"independent_reverse"``  minus log mean of 1/f_1, 1/r_2, ... minus log mean of 1/r
    ``"coupled_reverse"``      minus log mean of 1/f_1, 1/r_2, ... minus log mean of 1/r
    ========================== =================================== ================================

    Reverse chains of a lower bound start in posterior samples: with ``"coupled_reverse"`` all in the pair's own z, with
    ``"independent_reverse"`` in K independent ones. Simulated pairs come with one such sample, real data with none, and
    so without a lower bound. With ``"coupled_reverse"``, reverse chains of the upper bound start where chain f_1 ended;
    as these are not the lower bound's, build a metric for each side.

    ``update(log_likelihood, forward=None, reverse=None)`` takes

    - ``log_likelihood``: :math:`\log p(x_b|z_b)` at the pair's own z, ``(B,)``, finite;
    - ``forward``, ``reverse``: log weights, ``(K, B)``, those that the scheme needs; reverse ones finite.

    ``compute()`` returns what :class:`BarberAgakovBound` does.

    Args:
        side: ``"lower"``, ``"upper"`` or ``"both"``.
        scheme: One of the above for the side; for both, ``(upper, lower)``. Default: ``"independent"`` for the upper
            side, ``"coupled_reverse"`` for the lower.
        key_prefix: Stands before each key.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: On unknown schemes; from ``update``, on malformed shapes, empty batches, NaN, missing chains, and
            reverse weights that are not finite.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Brekelmans et al. 2022 (arXiv 2303.06992).

    Note:
        Distributed behaviour as :class:`BarberAgakovBound`. The larger of two lower bounds that were both estimated is
        none: report schemes apart.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import AISBound
        >>> bound = AISBound()
        >>> bound.update(torch.tensor([-1.0, -1.0]), torch.full((8, 2), -4.0), torch.full((8, 2), -3.0))
        >>> round(bound.compute()["gap"].item(), 6)
        1.0
    """

    def __init__(
        self,
        side: Side = "both",
        scheme: Scheme | Sequence[Scheme] | None = None,
        key_prefix: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(side, key_prefix, **kwargs)
        self.schemes = _schemes(side, scheme)

    def update(self, log_likelihood: Tensor, forward: Tensor | None = None, reverse: Tensor | None = None) -> None:
        """Add pairs; see the class for the arguments."""
        (log_likelihood,) = self.widened(log_likelihood=log_likelihood)
        forward, reverse = (
            None if chains is None else self.widened(**{name: chains})[0]
            for name, chains in (("forward", forward), ("reverse", reverse))
        )
        sides = {}
        for side, scheme in self.schemes.items():
            first, rest, scheme = _chains_of(side, scheme, forward, reverse)
            bound = ais_upper if side == "upper" else ais_lower
            sides[side] = bound(log_likelihood, first, rest, scheme=scheme)
        require_finite("log_likelihood", log_likelihood)
        if reverse is not None:
            require_finite("the log weights of reverse chains", reverse)
        self.add_sides(**sides)


class MutualInformationSandwich(MetricCollection):
    """What :func:`mutual_information_sandwich` builds: two-sided bounds under one ``update``, with one figure."""

    def plot(  # type: ignore[override]
        self,
        val: Mapping[str, Tensor] | None = None,
        ax: Any = None,
        truth: float | None = None,
    ) -> tuple[Any, Any]:
        """Draw a row per bound: its lower and upper side with standard errors.

        Args:
            val: What ``compute`` returned. Default: ``compute()``.
            ax: Matplotlib axes to draw in. Default: those of a new figure.
            truth: The mutual information where it is known, in nats, drawn as a line.

        Returns:
            ``(figure, axes)``.

        Raises:
            ModuleNotFoundError: If matplotlib is missing, with the line that installs it.
        """
        rows: dict[str, dict[str, Tensor]] = {}
        for key, value in (self.compute() if val is None else val).items():
            bound, _, name = key.removeprefix(self.prefix or "").rpartition("/")
            rows.setdefault(_TITLES.get(bound, bound), {})[name] = value
        return plot_bounds(rows, ax, truth)


def mutual_information_sandwich(
    bounds: Sequence[SandwichedBound] = ("iwae", "ais"), prefix: str | None = None, **kwargs: Any
) -> MutualInformationSandwich:
    """Lower and upper bounds side by side, as one collection of metrics.

    ``update`` takes, by keyword, what the bounds take together: ``log_likelihood`` for all; ``log_weights`` and
    ``posterior_log_weight`` for ``"iwae"``; ``forward`` and ``reverse`` for ``"ais"``; ``scores`` for
    ``"structured_infonce"``; ``log_q``, ``log_prior`` and ``log_weight`` for ``"barber_agakov"``; ``log_q``,
    ``log_prior``, ``critic``, ``posterior_critic`` and ``log_weights`` for ``"giwae"``. Samples are of the proposal,
    and posterior ones apart, as each metric says for ``side="both"``.

    ``compute`` returns, for each bound, ``<bound>/lower``, ``<bound>/upper`` and ``<bound>/gap`` in nats, each also
    with ``_stderr``, and ``<bound>/count``.

    Args:
        bounds: At least one, each once.
        prefix: Stands before each key; ``"mutual_information/"`` gives the keys that the callback logs.
        kwargs: Passed on to each metric.

    Returns:
        The collection.

    Raises:
        ValueError: On bounds that are unknown, doubled or missing.

    Source: Brekelmans et al. 2022 (arXiv 2303.06992).

    Note:
        Distributed behaviour as :class:`BarberAgakovBound`.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import mutual_information_sandwich
        >>> sandwich = mutual_information_sandwich(["ais", "structured_infonce"], prefix="mutual_information/")
        >>> weights = torch.tensor([[-4.0, -4.0], [-4.0, -4.0]])
        >>> sandwich.update(log_likelihood=torch.tensor([-3.0, -3.0]), forward=weights, reverse=weights, scores=weights)
        >>> {name: round(value.item(), 3) for name, value in sandwich.compute().items() if name.endswith("er")}
        {'mutual_information/ais/lower': 1.0, 'mutual_information/ais/upper': 1.0, \
'mutual_information/structured_infonce/lower': 0.38, 'mutual_information/structured_infonce/upper': 1.0}
    """
    kinds: dict[str, type[Metric]] = {
        "ais": AISBound,
        "barber_agakov": BarberAgakovBound,
        "giwae": GIWAEBound,
        "iwae": IWAEBound,
        "structured_infonce": StructuredInfoNCE,
    }
    chosen = [bounds] if isinstance(bounds, str) else list(bounds)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(kinds):
        raise ValueError(f"bounds must be some of {', '.join(map(repr, kinds))}, each once; got {chosen}.")
    metrics: dict[str, Metric | MetricCollection] = {
        name: kinds[name](side="both", key_prefix=f"{name}/", **kwargs) for name in chosen
    }
    # one group each: the states of different bounds may be equal on a batch by chance
    return MutualInformationSandwich(metrics, prefix=prefix, compute_groups=False)


def _schemes(side: str, scheme: str | Sequence[str] | None) -> dict[str, Scheme]:
    if scheme is None:
        chosen = {"upper": "independent", "lower": "coupled_reverse"}
    elif isinstance(scheme, str):
        chosen = {"upper": scheme, "lower": scheme}
    else:
        if len(scheme) != 2:
            raise ValueError(f"scheme must be one scheme or (upper, lower); got {list(scheme)}.")
        chosen = dict(zip(("upper", "lower"), scheme, strict=True))
    if not set(chosen.values()) <= set(get_args(Scheme)):
        raise ValueError(
            f"scheme must be one of {', '.join(map(repr, get_args(Scheme)))}, or two of them; got {scheme!r}."
        )
    if side == "both" and chosen["upper"] == "coupled_reverse":
        raise ValueError(
            "the coupled reverse chains of the upper bound start elsewhere than those of the lower one: build an "
            "AISBound for each side."
        )
    return {name: scheme for name, scheme in chosen.items() if side in (name, "both")}  # type: ignore[misc]


def _chains_of(
    side: str, scheme: Scheme, forward: Tensor | None, reverse: Tensor | None
) -> tuple[Tensor, Tensor | None, Scheme]:
    """The chains that start where the side's single ones do, those of the other direction, and their scheme."""
    chains = {"forward": forward, "reverse": reverse}
    first, other = ("forward", "reverse") if side == "upper" else ("reverse", "forward")
    mixed = (side, scheme) in _MIXED
    for name in (first, other) if mixed else (first,):
        if chains[name] is None:
            raise ValueError(f"the {side} bound with scheme={scheme!r} needs {name} chains; pass {name}, (K, B).")
    ours, others = chains[first], chains[other]
    assert ours is not None
    if not mixed:
        return ours, None, scheme
    assert others is not None
    return (ours[:1], others[1:], scheme) if len(others) > 1 else (ours[:1], None, "single")
