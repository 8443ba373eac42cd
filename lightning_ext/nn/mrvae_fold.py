"""Turn a multi-rate network into the ordinary network it is at one beta.

Source: Bae et al., *Multi-Rate VAE*, ICLR 2023, arXiv 2212.03905, Eq. 6.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_ext.nn.mrvae_gates import RateConditioner, apply_conditioner

__all__ = ["fold"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold(network: nn.Module, beta: float, extrapolate: bool = False) -> nn.Module:
    r"""Copy a multi-rate network as the ordinary network it is at one beta.

    Every gate is absorbed into the layer that it follows, :math:`W \leftarrow g(\beta)\,W`,
    :math:`b \leftarrow g(\beta)\,b`, so inference costs nothing extra.

    Args:
        network: converted by :func:`convert_to_multirate`; it is not changed.
        beta: inside the trained range.
        extrapolate: allow a beta outside it.

    Returns:
        A copy without gates whose state-dict keys are those of the ordinary network. A bias is added only where a
        conditioner shifts a layer that has none.

    Raises:
        ValueError: beta is outside the range, the network has no gates, or a gate follows a norm without affine
            parameters or a parametrised weight, which cannot absorb it.
    """
    if torch.as_tensor(beta).numel() != 1:
        raise ValueError(f"beta must be one number to fold; got shape {tuple(torch.as_tensor(beta).shape)}.")
    network = copy.deepcopy(network)
    conditioned = [m for m in network.modules() if isinstance(getattr(m, "rate_gate", None), RateConditioner)]
    if not conditioned:
        raise ValueError("the network has no gates to fold; convert it with convert_to_multirate first.")
    for module in conditioned:
        conditioner = module.rate_gate
        assert isinstance(conditioner, RateConditioner)
        with conditioner.context.at(beta, extrapolate=extrapolate), torch.no_grad():
            t = conditioner.context.t.to(next(conditioner.parameters()).device)
            scale, shift = (None if part is None else part[0] for part in conditioner.coefficients(t))
            _absorb(module, scale, shift)
        del module.rate_gate
        for handle, hook in list(module._forward_hooks.items()):
            if hook is apply_conditioner:
                del module._forward_hooks[handle]
    return network


def _absorb(module: nn.Module, scale: Tensor | None, shift: Tensor | None) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or parametrize.is_parametrized(module):
        raise ValueError(f"cannot fold a gate into this {type(module).__name__}: it has no plain weight to absorb it.")
    bias: Tensor | None = getattr(module, "bias", None)
    if scale is not None:
        factor = scale.to(weight.dtype)
        if isinstance(module, _TRANSPOSED):
            groups = int(module.groups)
            per_group = weight.view(groups, -1, *weight.shape[1:])
            scaled = (per_group * _trailing(factor.view(groups, 1, -1), per_group)).flatten(0, 1)
        else:
            scaled = weight * _trailing(factor, weight)
        # New parameters: a weight that two layers share is scaled for each of them.
        module.weight = nn.Parameter(scaled)
        if bias is not None:
            bias = bias * factor
    if shift is not None:
        bias = shift.to(weight.dtype) + (0.0 if bias is None else bias)
    if bias is not None:
        module.bias = nn.Parameter(bias)


def _trailing(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(*values.shape, *[1] * (like.dim() - values.dim()))
