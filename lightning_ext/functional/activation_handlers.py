"""What each nonlinearity of torch does to a site, whether it is called as a function or a method, in place or not."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ext.functional.activation_sites import (
    ActivationSite,
    elementwise_site,
    normalisation_site,
    pool_site,
    relu_site,
    softmax_site,
)

__all__: list[str] = []

Build = Callable[[str, Tensor], ActivationSite]
Activate = Callable[[str, Build, Tensor], Tensor]
Handler = Callable[..., Any]  # a Tensor, or NotImplemented where the call is to run as it is

# fmt: off
_ELEMENTWISE = (
    "celu", "clamp", "clamp_max", "clamp_min", "clip", "cos", "elu", "erf", "expit", "gelu", "hardshrink",
    "hardsigmoid", "hardswish", "hardtanh", "logsigmoid", "mish", "relu6", "rrelu", "selu", "sigmoid", "silu",
    "sin", "softplus", "softshrink", "softsign", "tanh", "tanhshrink", "threshold",
)
# fmt: on
_OWNERS = (F, torch, Tensor, torch.special)


def _named(name: str) -> list[Callable[..., Any]]:
    return [getattr(owner, name) for owner in _OWNERS if hasattr(owner, name)]


def _elementwise(name: str, function: Callable[..., Tensor]) -> Handler:
    def handler(activate: Activate, input: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            return NotImplemented  # bounds that may be learned, which an expansion in s alone would keep as they were

        def build(name: str, s: Tensor) -> ActivationSite:
            return elementwise_site(name, lambda x: function(x, *args, **kwargs), s)

        out = activate(name, build, input)
        return input.copy_(out) if inplace else out

    return handler


def _relu(activate: Activate, input: Tensor, inplace: bool = False) -> Tensor:
    out = activate("relu", relu_site, input)
    return input.copy_(out) if inplace else out


def _leaky_relu(activate: Activate, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    out = activate("leaky_relu", lambda name, s: relu_site(name, s, negative_slope), input)
    return input.copy_(out) if inplace else out


def _prelu(activate: Activate, input: Tensor, weight: Tensor) -> Tensor:
    if weight.numel() > 1:
        weight = weight.reshape(-1, *[1] * (input.ndim - 2))

    def build(name: str, s: Tensor) -> ActivationSite:
        site = relu_site(name, s)
        return ActivationSite(name, site.shape, site.slope)

    return weight * input + (1 - weight) * activate("prelu", build, input)


def _glu(activate: Activate, input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * activate("glu", lambda name, s: elementwise_site(name, torch.sigmoid, s), gate)


def _softmax(
    activate: Activate,
    input: Tensor,
    dim: int | None = None,
    *args: Any,
    dtype: torch.dtype | None = None,
    **_: Any,
) -> Tensor:
    dim = int(input.ndim not in (0, 1, 3)) if dim is None else dim  # torch's own choice
    dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), dtype)
    return activate("softmax", lambda name, s: softmax_site(name, s, dim), input if dtype is None else input.to(dtype))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(
    activate: Activate,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    rows = (*input.shape[: input.ndim - len(normalized_shape)], -1)
    out = activate("layer_norm", lambda name, s: normalisation_site(name, s, rows, eps), input)
    return _affine(out, weight, bias)


def _rms_norm(
    activate: Activate,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    rows = (*input.shape[: input.ndim - len(normalized_shape)], -1)
    small = torch.finfo(input.dtype).eps if eps is None else eps
    out = activate("rms_norm", lambda name, s: normalisation_site(name, s, rows, small, centre=False), input)
    return _affine(out, weight, None)


def _per_channel(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.reshape(-1, *[1] * (like.ndim - 2))


def _group_norm(
    activate: Activate,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    rows = (input.shape[0], num_groups, -1)
    out = activate("group_norm", lambda name, s: normalisation_site(name, s, rows, eps), input)
    return _affine(out, _per_channel(weight, input), _per_channel(bias, input))


def _instance_norm(
    activate: Activate,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    rows = (*input.shape[:2], -1)
    out = activate("instance_norm", lambda name, s: normalisation_site(name, s, rows, eps), input)
    return _affine(out, _per_channel(weight, input), _per_channel(bias, input))


def _attention(
    activate: Activate,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = activate("attention", lambda name, s: softmax_site(name, s, -1), scores)
    return F.dropout(weights, dropout_p) @ value


def _max_pool(name: str) -> Handler:
    function = getattr(F, name)

    def handler(activate: Activate, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("return_indices", None)

        def build(name: str, s: Tensor) -> ActivationSite:
            return pool_site(name, s, function(s, *args, return_indices=True, **kwargs)[1])

        return activate(name, build, input)

    return handler


def activation_handlers() -> dict[Callable[..., Any], Handler]:
    by_name: dict[str, Handler] = {name: _elementwise(name, _named(name)[0]) for name in _ELEMENTWISE}
    by_name |= {"relu": _relu, "leaky_relu": _leaky_relu, "prelu": _prelu, "glu": _glu, "softmax": _softmax}
    by_name |= {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm}
    by_name |= {"instance_norm": _instance_norm, "scaled_dot_product_attention": _attention}
    pools = [f"{kind}max_pool{dim}d" for kind in ("", "adaptive_") for dim in (1, 2, 3)]
    by_name |= {name: _max_pool(name) for name in pools}
    table: dict[Callable[..., Any], Handler] = {}
    for name, handler in by_name.items():
        table |= dict.fromkeys(_named(name), handler)
        table |= dict.fromkeys(_named(name + "_"), _in_place(handler))
    return table


def _in_place(handler: Handler) -> Handler:
    return lambda *args, **kwargs: handler(*args, inplace=True, **kwargs)
