"""One call of a nonlinearity, expanded to first order around the activations of a reference network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ActivationSite", "gates"]

LinearMap = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class ActivationSite:
    r"""A nonlinearity :math:`\phi` at the reference's pre-activation :math:`s_0`, as an affine map of another one.

    .. math:: a_1' = \phi(s_0) + J_\phi(s_0)\,(s_1 - s_0)

    For ReLU, with its gate :math:`g = 1[s_0 > 0]`, this is :math:`g \odot s_1`.

    Args:
        name: The nonlinearity, such as ``"relu"``.
        shape: Of :math:`s_0`, batch first.
        slope: :math:`\phi'(s_0)` of an elementwise nonlinearity; None for the others.
        point: :math:`s_0`; None where :math:`\phi(s_0) = J_\phi(s_0)\,s_0`, as for ReLU.
        value: :math:`\phi(s_0)`; None likewise.
        gate: 1 where a unit is open, else 0, for ReLU and leaky ReLU; None for all others.
        negative_slope: Of leaky ReLU; 0 for ReLU.
        push: :math:`v \mapsto J_\phi(s_0)\,v` of a nonlinearity that mixes elements.
        channel: Which dimension holds the channels: 1 after a convolution, -1 after a linear layer.
        shared: Whether one expansion serves every example, so that ``shape`` begins with 1.
        output: :math:`\phi(s_0)`, where it was worked out on the way, for whoever records to take away.

    >>> site = relu_site("relu", torch.tensor([[-1.0, 2.0]]))
    >>> site(torch.tensor([[5.0, 7.0]])), site.slope
    (tensor([[0., 7.]]), tensor([[0., 1.]]))
    """

    name: str
    shape: tuple[int, ...]
    slope: Tensor | None = None
    point: Tensor | None = None
    value: Tensor | None = None
    gate: Tensor | None = None
    negative_slope: float = 0.0
    push: LinearMap | None = None
    channel: int = -1
    shared: bool = False
    output: Tensor | None = None

    @property
    def intercept(self) -> Tensor | None:
        r""":math:`\phi(s_0) - \phi'(s_0) \odot s_0` of an elementwise nonlinearity; None if it is 0."""
        if self.slope is None or self.point is None or self.value is None:
            return None
        return self.value - self.slope * self.point

    def accepts(self, s: Tensor) -> bool:
        """Whether pre-activations of this shape can go through."""
        shape = tuple(s.shape)
        return shape == self.shape or (self.shared and len(shape) == len(self.shape) and shape[1:] == self.shape[1:])

    def __call__(self, s: Tensor) -> Tensor:
        """Apply the affine map; equal, bit for bit, to the reference's activation at the reference's ``s``."""
        moved = s if self.point is None else s - self.point
        if self.push is not None:
            moved = self.push(moved)
        elif self.slope is not None:
            moved = self.slope * moved
        return moved if self.value is None else self.value + moved


def relu_site(name: str, s: Tensor, negative_slope: float = 0.0, channel: int = -1) -> ActivationSite:
    """ReLU, or leaky ReLU, whose gate is closed at 0 as in autograd."""
    output = s.relu()
    site = _gated(name, output.sign(), negative_slope, channel)  # many times faster than a comparison and a cast
    site.output = output if negative_slope == 0.0 else None
    return site


def _gated(name: str, gate: Tensor, negative_slope: float, channel: int, shared: bool = False) -> ActivationSite:
    slope = gate if negative_slope == 0.0 else negative_slope + (1.0 - negative_slope) * gate
    return ActivationSite(
        name, tuple(gate.shape), slope, gate=gate, negative_slope=negative_slope, channel=channel, shared=shared
    )


def elementwise_site(name: str, function: LinearMap, s: Tensor) -> ActivationSite:
    """Any function of each element."""
    s = s.clone()  # here and below: what comes in may be overwritten in place later
    value, slope = torch.func.jvp(function, (s,), (torch.ones_like(s),))[:2]
    return ActivationSite(name, tuple(s.shape), slope, s, value)


def softmax_site(name: str, s: Tensor, dim: int) -> ActivationSite:
    """Softmax; masked scores, minus infinity in both networks, stay masked."""
    s = s.clone()
    value, masked = s.softmax(dim), s == -torch.inf

    def push(v: Tensor) -> Tensor:
        v = v.masked_fill(masked, 0.0)
        return value * (v - (value * v).sum(dim, keepdim=True))

    return ActivationSite(name, tuple(s.shape), point=s, value=value, push=push)


def normalisation_site(name: str, s: Tensor, rows: tuple[int, ...], eps: float, centre: bool = True) -> ActivationSite:
    """Standardisation, or division by the root mean square, along the last dimension of ``s.reshape(rows)``."""
    s = s.clone()
    flat = s.reshape(rows)
    flat = flat - flat.mean(-1, keepdim=True) if centre else flat
    scale = (flat.square().mean(-1, keepdim=True) + eps).rsqrt()
    value = flat * scale

    def push(v: Tensor) -> Tensor:
        v = v.reshape(rows)
        v = v - v.mean(-1, keepdim=True) if centre else v
        return (scale * (v - value * (value * v).mean(-1, keepdim=True))).reshape(s.shape)

    return ActivationSite(name, tuple(s.shape), point=s, value=value.reshape(s.shape), push=push)


def pool_site(name: str, s: Tensor, index: Tensor) -> ActivationSite:
    """A maximum over windows: the element at the reference's ``index``, counted within the last dimensions of ``s``."""
    windows = int(name[-2])  # "max_pool2d"

    def push(v: Tensor) -> Tensor:
        return v.flatten(-windows).gather(-1, index.flatten(-windows)).view(index.shape)

    return ActivationSite(name, tuple(s.shape), push=push)


def gates(sites: Sequence[ActivationSite], values: Sequence[Tensor]) -> list[ActivationSite | None]:
    r"""Sites whose gates are given, in place of those of a reference pass.

    .. math:: a_k = \bigl(g + \alpha (1 - g)\bigr) \odot s_k, \quad k = 0, 1

    for ReLU (:math:`\alpha = 0`) and leaky ReLU. Both networks get the same gates.

    Args:
        sites: From a reference pass over any batch, in order.
        values: One for each site with a gate, in order: draws ``(B, *units)`` in {0, 1}, one for each example, or
            ``(*units)`` in [0, 1], one for all, such as mean gates.

    Returns:
        One for each of ``sites``; None for max-pool, softmax and normalisation, which have no gate and are to be
        expanded around the reference under these gates.

    Raises:
        ValueError: If a site is smooth or has slopes of its own (PReLU), if none has a gate, or if the number or a
            shape of ``values`` does not fit.

    Source: Dhawan, Huang, Bae & Grosse 2023 (arXiv:2302.03519): Bernoulli gates; one draw for each example.

    >>> site = relu_site("relu", torch.tensor([[-1.0, 2.0]]))
    >>> [half] = gates([site], [torch.tensor([0.5, 0.5])])
    >>> half(torch.tensor([[4.0, 6.0]]))
    tensor([[2., 3.]])
    """
    gated = [site for site in sites if site.gate is not None]
    for site in sites:
        if site.gate is None and site.slope is not None:
            raise ValueError(
                f"{site.name} has no gate that is open or closed: only ReLU and leaky ReLU have. "
                'Take the expansion around the reference, mode="relu".'
            )
    if not gated or len(gated) != len(values):
        raise ValueError(f"values must hold one tensor for each of {len(gated)} ReLU calls; got {len(values)}.")
    given = iter(values)
    return [None if site.gate is None else _given(site, next(given)) for site in sites]


def _given(site: ActivationSite, value: Tensor) -> ActivationSite:
    units = site.shape[1:]
    shared = tuple(value.shape) == units
    if not shared and tuple(value.shape[1:]) != units:
        raise ValueError(f"gates of {site.name} must have shape {units}, or a batch of them; got {tuple(value.shape)}.")
    value = value[None] if shared else value
    return _gated(site.name, value, site.negative_slope, site.channel, shared)
