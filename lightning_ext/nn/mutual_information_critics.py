r"""Critics :math:`T(x, z)` of pairs, and proposals :math:`q(z \mid x)` to train beside them."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from lightning_ext.nn.mlp import ACTIVATIONS
from lightning_ext.nn.mrvae_convert import posterior_parameters

__all__ = ["ConcatenatedCritic", "GaussianProposal", "PairCritic", "QuadraticCritic", "SeparableCritic"]


class PairCritic(nn.Module):
    r"""A function :math:`T(x, z)` of pairs that treats x once, however many z it meets.

    To write another one, implement ``score``; and ``embed``, if there is something to compute of x alone. Under
    Hamiltonian Monte Carlo T should be smooth in z.
    """

    def embed(self, x: Tensor) -> Tensor:
        """What ``score`` needs of data ``(B, *event)``, ``(B, h)``."""
        return x

    @abstractmethod
    def score(self, embedded: Tensor, z: Tensor) -> Tensor:
        """T ``(..., B)`` of ``embedded (B, h)`` and ``z (..., B, d)``, or of shapes that broadcast to these."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """T of each data point with its own latents.

        Args:
            x: ``(B, *event)``.
            z: ``(..., B, d)``; or ``(..., 1, d)``, latents for all data points.

        Returns:
            ``(..., B)``.

        Raises:
            ValueError: If z has another number of latents, or ``score`` gives another shape.
        """
        if z.ndim < 2 or z.shape[-2] not in (1, len(x)):
            raise ValueError(f"z must have shape (..., {len(x)}, d), latents of each data point; got {tuple(z.shape)}.")
        found, shape = self.score(self.embed(x), z), (*z.shape[:-2], len(x))
        if found.shape != shape:
            raise ValueError(
                f"{type(self).__name__}.score must give one number per pair, {shape}; got {tuple(found.shape)}."
            )
        return found

    def matrix(self, x: Tensor, z: Tensor) -> Tensor:
        """T of all data points with all latents.

        Args:
            x: ``(B, *event)``.
            z: ``(C, d)``.

        Returns:
            ``(B, C)``, rows x and columns z.
        """
        if z.ndim != 2:
            raise ValueError(f"z must have shape (C, d); got {tuple(z.shape)}.")
        found: Tensor = self(x, z.unsqueeze(1))
        return found.mT


class SeparableCritic(PairCritic):
    r""":math:`T(x, z) = \langle f(x), g(z) \rangle`; a table of B by B pairs costs B evaluations of each network.

    Args:
        x_net: f, ``(B, *event)`` to ``(B, k)``.
        z_net: g, ``(N, d)`` to ``(N, k)``.

    >>> critic = SeparableCritic(nn.Identity(), nn.Identity())
    >>> critic.matrix(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
    tensor([[ 3.,  5.],
            [ 6., 10.]])

    Source: van den Oord et al. 2018 (arXiv:1807.03748).
    """

    def __init__(self, x_net: nn.Module, z_net: nn.Module) -> None:
        super().__init__()
        self.x_net, self.z_net = x_net, z_net

    def embed(self, x: Tensor) -> Tensor:
        """f(x)."""
        features: Tensor = self.x_net(x)
        return features

    def score(self, embedded: Tensor, z: Tensor) -> Tensor:
        """The inner product."""
        features: Tensor = self.z_net(z.reshape(-1, z.shape[-1])).reshape(*z.shape[:-1], -1)
        if features.shape[-1] != embedded.shape[-1]:
            raise ValueError(
                f"x_net and z_net must give equally many features; got {embedded.shape[-1]} and {features.shape[-1]}."
            )
        if features.shape[-2] == 1:  # each z with all x
            return features.squeeze(-2) @ embedded.mT
        return (features * embedded).sum(-1)


class ConcatenatedCritic(PairCritic):
    r"""A fully connected network of x and z together.

    Its first layer is split, :math:`W [x; z] = W_x x + W_z z`, so that a table of B by B pairs makes no concatenations
    and passes that layer 2 B times instead of :math:`B^2`.

    Args:
        x_dim: of x, flattened; of what ``x_net`` gives where there is one.
        z_dim: d.
        hidden: widths, at least one.
        activation: ``"gelu"``, ``"tanh"`` or ``"relu"``, which is not smooth.
        x_net: looks at x first, such as a convolutional network.

    Raises:
        ValueError: For no hidden layer, or an unknown activation.

    >>> ConcatenatedCritic(3, 2)(torch.zeros(5, 3), torch.zeros(7, 5, 2)).shape
    torch.Size([7, 5])

    Source: Belghazi et al. 2018 (arXiv:1801.04062).
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (64, 64),
        activation: Literal["gelu", "tanh", "relu"] = "gelu",
        x_net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not hidden or activation not in ACTIVATIONS:
            raise ValueError(
                f"hidden must name a width, and activation be one of {', '.join(map(repr, ACTIVATIONS))}; got "
                f"{list(hidden)} and {activation!r}."
            )
        self.x_net = nn.Flatten() if x_net is None else nn.Sequential(x_net, nn.Flatten())
        joint = nn.Linear(x_dim + z_dim, hidden[0])  # for the scale of both parts
        self.x_part, self.z_part = nn.Linear(x_dim, hidden[0]), nn.Linear(z_dim, hidden[0], bias=False)
        with torch.no_grad():
            self.x_part.weight.copy_(joint.weight[:, :x_dim])
            self.x_part.bias.copy_(joint.bias)
            self.z_part.weight.copy_(joint.weight[:, x_dim:])
        layers: list[nn.Module] = []
        for width, next_width in zip(hidden, [*hidden[1:], 1], strict=True):
            layers += [ACTIVATIONS[activation](), nn.Linear(width, next_width)]
        self.rest = nn.Sequential(*layers)

    def embed(self, x: Tensor) -> Tensor:
        """The part of the first layer that x has."""
        part: Tensor = self.x_part(self.x_net(x))
        return part

    def score(self, embedded: Tensor, z: Tensor) -> Tensor:
        """All other layers."""
        found: Tensor = self.rest(embedded + self.z_part(z))
        return found.squeeze(-1)


class QuadraticCritic(PairCritic):
    r"""A quadratic form, which holds the best critic of correlated Gaussians.

    .. math:: T(x, z) = x^\top A z - \tfrac12 z^\top \operatorname{diag}(e^b) z
        - \tfrac12 x^\top \operatorname{diag}(e^c) x + o

    Args:
        x_dim: of x, flattened.
        z_dim: d.

    >>> critic = QuadraticCritic(1, 1)
    >>> critic(torch.tensor([[2.0]]), torch.tensor([[1.0]]))  # A is zero at first, b and c are
    tensor([-2.5000], grad_fn=<AddBackward0>)
    """

    def __init__(self, x_dim: int, z_dim: int) -> None:
        super().__init__()
        self.coupling = nn.Parameter(torch.zeros(x_dim, z_dim))
        self.z_log_curvature = nn.Parameter(torch.zeros(z_dim))
        self.x_log_curvature = nn.Parameter(torch.zeros(x_dim))
        self.offset = nn.Parameter(torch.zeros(1))

    def embed(self, x: Tensor) -> Tensor:
        r""":math:`x^\top A`, and what x adds by itself."""
        flat = x.flatten(1)
        alone = self.offset - 0.5 * (flat.square() * self.x_log_curvature.exp()).sum(-1, keepdim=True)
        return torch.cat([flat @ self.coupling, alone], -1)

    def score(self, embedded: Tensor, z: Tensor) -> Tensor:
        """T."""
        pulled = embedded[..., :-1] - 0.5 * z * self.z_log_curvature.exp()
        return (pulled * z).sum(-1) + embedded[..., -1]


class GaussianProposal(nn.Module):
    r"""Diagonal Gaussians :math:`q(z \mid x) = \mathcal N(m(x), \operatorname{diag}(s(x)^2))` from any encoder.

    Args:
        network: data to ``(mean, log variance)``, to one tensor ``(B, 2 d)`` with both, or to pythae's output.
        min_scale: added to the standard deviations, at least 0: a density that may become a point loses all bounds
            to infinities.

    >>> GaussianProposal(nn.Linear(3, 4))(torch.zeros(5, 3)).rsample().shape
    torch.Size([5, 2])
    """

    def __init__(self, network: nn.Module, min_scale: float = 1e-4) -> None:
        super().__init__()
        if min_scale < 0:
            raise ValueError(f"min_scale must be at least 0; got {min_scale}.")
        self.network, self.min_scale = network, min_scale

    def forward(self, x: Tensor) -> Distribution:
        """A distribution with batch ``(B,)`` and event ``(d,)``."""
        mean, log_var = posterior_parameters(self.network(x))
        return Independent(Normal(mean, (0.5 * log_var).exp() + self.min_scale), 1)
