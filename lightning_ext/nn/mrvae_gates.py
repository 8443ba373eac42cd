r"""Layers whose features are rescaled as a function of :math:`\log\beta`: the paper's gates and alternatives to them.

Source: Bae et al., *Multi-Rate VAE*, ICLR 2023, arXiv 2212.03905, sections 3 and 4.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ext.functional.mrvae import GateActivation, at_least_float32, gate_activation
from lightning_ext.nn.mrvae import RateContext

__all__ = ["GatedFiLM", "LogVarianceGate", "PosteriorGate", "RateConditioner", "RateFiLM", "RateGate"]

GateInit = Literal["identity", "paper"]

# Where an identity gate starts: well inside the open region, so that it can move both ways.
_IDENTITY_START: dict[GateActivation, float] = {"sigmoid": 2.0, "sqrt": -2.0, "two_sigmoid": 0.0}


def _check_init(init: str) -> None:
    if init not in ("identity", "paper"):
        raise ValueError(f"init must be 'identity' or 'paper'; got {init!r}.")


def _identity_gain(activation: GateActivation, dtype: torch.dtype) -> float:
    """The factor near ``1 / gate`` for which an identity gate starts as exactly 1, rounding included."""
    start = torch.tensor([_IDENTITY_START[activation]], dtype=dtype)
    gain = torch.tensor(1.0 / float(gate_activation(start, activation)), dtype=torch.float64)
    step = torch.finfo(dtype).eps / 16
    for k in sorted(range(-200, 201), key=abs):
        candidate = float(gain * (1.0 + k * step))
        if float(gate_activation(start, activation, candidate)) == 1.0:
            return candidate
    raise AssertionError(f"no gain makes an identity {activation} gate exact in {dtype}")


_IDENTITY_GAIN = {
    dtype: {activation: _identity_gain(activation, dtype) for activation in _IDENTITY_START}
    for dtype in (torch.float32, torch.float64)
}


class RateConditioner(nn.Module):
    """Base of all layers that rescale (and shift) features as a function of beta.

    At a fixed beta each of them is one affine map per channel, which is why :func:`fold` can absorb any of them into
    the layer before it. Subclasses implement :meth:`coefficients`.

    Args:
        num_features: channels ``C`` of the layer.
        context: where beta is read from.
        channel_dim: dimension of the channels in the layer's output: 1 for convolutions, -1 for linear layers.
    """

    def __init__(self, num_features: int, context: RateContext, channel_dim: int = 1) -> None:
        super().__init__()
        self.num_features = num_features
        self.context = context
        self.channel_dim = channel_dim

    def coefficients(self, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift for standardised log betas.

        Args:
            t: ``(B, 1)``.

        Returns:
            ``(scale, shift)``, each ``(B, C)`` in float32 or wider, or None for no scale or no shift.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement coefficients(t).")

    def forward(self, features: Tensor) -> Tensor:
        """Apply the affine map of the current beta.

        Args:
            features: ``(B, C, *)`` or, with ``channel_dim=-1``, ``(B, *, C)``.

        Returns:
            The same shape and dtype.

        Raises:
            ValueError: the features do not have ``C`` channels where they should.
        """
        if features.dim() < 2 or features.shape[self.channel_dim] != self.num_features:
            raise ValueError(
                f"expected a batch with {self.num_features} channels in dimension {self.channel_dim}; got shape "
                f"{tuple(features.shape)}. A single sample needs a batch dimension of 1."
            )
        scale, shift = self.coefficients(self.context.t.to(features.device))
        if scale is not None:
            features = features * self._fit(scale, features)
        return features if shift is None else features + self._fit(shift, features)

    def _fit(self, values: Tensor, features: Tensor) -> Tensor:
        values = self.context.rows(values, features.shape[0]).to(features.dtype)
        if features.dim() == 2:
            return values
        shape = [values.shape[0]] + [1] * (features.dim() - 1)
        shape[self.channel_dim] = self.num_features
        return values.view(shape)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.num_features}"


def _affine(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Elementwise on purpose: autocast leaves it in float32, a matrix product it would cast.
    weight, bias = at_least_float32(weight), at_least_float32(bias)
    return torch.addcmul(bias, t.to(weight.dtype), weight)


class RateGate(RateConditioner):
    r"""Gate :math:`g(\beta) = \sigma(w\,t(\beta) + c)` on the channels of a layer (2212.03905, Eq. 6-9).

    Multiplying the pre-activation by the gate is the same as multiplying the rows of the layer's weight and its bias.

    Args:
        num_features: channels ``C``; the gate has ``2 C`` parameters.
        context: where beta is read from.
        channel_dim: 1 for convolutions, -1 for linear layers.
        activation: ``"sigmoid"`` (the paper's encoder), ``"sqrt"`` (its decoder) or ``"two_sigmoid"``.
        init: ``"identity"`` starts as 1 for every beta (exactly, on a CPU), so a pretrained network is unchanged until
            training moves the gates; ``"paper"`` draws ``w, c ~ U(-1, 1)``, which with ``"sqrt"`` switches 14.4 % of
            the channels off for every beta in the range, for ever (their gradient is 0).

    Gate arithmetic is float32 under autocast and in half-precision models. Cost: two numbers per channel and one
    multiplication per activation; backpropagation keeps the un-gated activation.

    >>> from lightning_ext.nn import LogUniformBeta
    >>> gate = RateGate(3, RateContext(LogUniformBeta()), activation="sqrt")
    >>> with gate.context.at(0.5):
    ...     gate(torch.ones(2, 3)).unique().tolist()
    [1.0]
    """

    def __init__(
        self,
        num_features: int,
        context: RateContext,
        channel_dim: int = 1,
        activation: GateActivation = "sigmoid",
        init: GateInit = "identity",
    ) -> None:
        super().__init__(num_features, context, channel_dim)
        if activation not in _IDENTITY_START:
            raise ValueError(f"activation must be one of {', '.join(_IDENTITY_START)}; got {activation!r}.")
        _check_init(init)
        self.activation: GateActivation = activation
        self.init = init
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew as ``init`` says."""
        if self.init == "identity":
            nn.init.zeros_(self.weight)
            nn.init.constant_(self.bias, _IDENTITY_START[self.activation])
        else:
            nn.init.uniform_(self.weight, -1.0, 1.0)
            nn.init.uniform_(self.bias, -1.0, 1.0)

    def coefficients(self, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gate ``(B, C)`` and no shift."""
        x = _affine(t, self.weight, self.bias)
        gain = _IDENTITY_GAIN[x.dtype][self.activation] if self.init == "identity" else 1.0
        return gate_activation(x, self.activation, gain), None

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.num_features}, activation={self.activation}, init={self.init}"


class RateFiLM(RateConditioner):
    r"""Scale and shift :math:`(1 + s(t))\,h + u(t)` with two small networks ``1 - hidden - C`` of log beta.

    The conditioning of YOTO (Dosovitskiy, Djolonga, ICLR 2020), an alternative to gates with many more
    parameters, which may pay at small training budgets.

    Args:
        num_features: channels ``C``.
        context: where beta is read from.
        channel_dim: 1 for convolutions, -1 for linear layers.
        hidden: width of the two networks; they hold ``2 (2 hidden + (hidden + 1) C)`` parameters.
        init: ``"identity"`` starts with ``s = u = 0``; ``"paper"`` with PyTorch's default initialisation.
    """

    def __init__(
        self,
        num_features: int,
        context: RateContext,
        channel_dim: int = 1,
        hidden: int = 64,
        init: GateInit = "identity",
    ) -> None:
        super().__init__(num_features, context, channel_dim)
        _check_init(init)
        self.scale = self._network(hidden, num_features, init)
        self.shift = self._network(hidden, num_features, init)

    @staticmethod
    def _network(hidden: int, num_features: int, init: GateInit) -> nn.Sequential:
        last = nn.Linear(hidden, num_features)
        if init == "identity":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), last)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, each ``(B, C)``."""
        with torch.autocast(t.device.type, enabled=False):
            return 1.0 + self._run(self.scale, t), self._run(self.shift, t)

    @staticmethod
    def _run(network: nn.Sequential, t: Tensor) -> Tensor:
        first, _, last = network
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        weights = [at_least_float32(p) for layer in (first, last) for p in (layer.weight, layer.bias)]
        hidden = F.relu(F.linear(t.to(weights[0].dtype), weights[0], weights[1]))
        return F.linear(hidden, weights[2], weights[3])


class LogVarianceGate(RateConditioner):
    r"""Additive gate on log variances: :math:`\ell - \mathrm{softplus}(c - w\,t)`, shifted to start at ``0``.

    For a linear VAE the optimal posterior variance is :math:`\log C_i = -\max(0, \log\lambda_i - \log\beta)`: linear in
    log beta up to the collapse of the latent, which a multiplicative gate on the log variance cannot represent and this
    one can (derived; the exact form has ``relu`` for ``softplus``, see
    :func:`lightning_ext.functional.joint_exact_gates`).

    Args:
        num_features: latents ``k``; the gate has ``2 k`` parameters.
        context: where beta is read from.
        channel_dim: dimension of the latents, -1 for linear heads.
        init: ``"identity"`` starts as no shift; ``"paper"`` draws ``w, c ~ U(-1, 1)``.
    """

    def __init__(
        self, num_features: int, context: RateContext, channel_dim: int = -1, init: GateInit = "identity"
    ) -> None:
        super().__init__(num_features, context, channel_dim)
        _check_init(init)
        self.init = init
        paper = init == "paper"
        self.weight = nn.Parameter(torch.empty(num_features).uniform_(-1, 1) if paper else torch.zeros(num_features))
        self.bias = nn.Parameter(torch.empty(num_features).uniform_(-1, 1) if paper else torch.zeros(num_features))

    def coefficients(self, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """No scale, and the shift ``(B, k)``."""
        shift = F.softplus(_affine(-t, self.weight, self.bias))
        if self.init == "identity":
            shift = shift - F.softplus(torch.zeros(1, dtype=shift.dtype, device=shift.device))
        return None, -shift


class PosteriorGate(RateConditioner):
    """Gates for a head that returns ``[mu, logvar]`` in one vector: one conditioner for each half.

    Args:
        mean: conditioner of the first half, or None to leave it alone.
        log_variance: conditioner of the second half, or None.
    """

    def __init__(self, mean: RateConditioner | None, log_variance: RateConditioner | None) -> None:
        parts = [part for part in (mean, log_variance) if part is not None]
        if not parts:
            raise ValueError("PosteriorGate needs a conditioner for mean or log_variance; got None for both.")
        super().__init__(2 * parts[0].num_features, parts[0].context, parts[0].channel_dim)
        self.mean = mean
        self.log_variance = log_variance

    def coefficients(self, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift ``(B, 2 k)``: the halves side by side."""
        rows = t.expand(-1, self.num_features // 2)
        halves: Sequence[tuple[Tensor | None, Tensor | None]] = [
            (None, None) if part is None else part.coefficients(t) for part in (self.mean, self.log_variance)
        ]
        scale = torch.cat([torch.ones_like(rows) if s is None else s for s, _ in halves], dim=-1)
        shift = torch.cat([torch.zeros_like(rows) if u is None else u for _, u in halves], dim=-1)
        return scale, shift


class GatedFiLM(RateConditioner):
    r"""A gate on top of a conditioned affine map, :math:`g\,(s\,h + u)`: the ``"table1"`` layout of a BatchNorm.

    Args:
        gate: the gate.
        affine: the scale and shift.
    """

    def __init__(self, gate: RateConditioner, affine: RateFiLM) -> None:
        super().__init__(gate.num_features, gate.context, gate.channel_dim)
        self.gate = gate
        self.affine = affine

    def coefficients(self, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift, each ``(B, C)``, both multiplied by the gate."""
        (gate, _), (scale, shift) = self.gate.coefficients(t), self.affine.coefficients(t)
        factor = 1.0 if gate is None else gate
        return scale * factor, shift * factor


def apply_conditioner(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Forward hook of a converted layer: a function of this module, so that converted networks pickle."""
    conditioned: Tensor = module.rate_gate(output)  # type: ignore[operator]
    return conditioned
