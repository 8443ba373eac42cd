"""Experiment A of the MR-VAE reproduction: gated linear VAEs, trained at all betas at once, against the closed form.

Everything is analytic: no data are sampled, the expectation over beta is a 48-point Gauss-Legendre rule, so what is
left of the excess loss is the family's expressivity and the optimiser.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_ext.functional import (
    GatedLinear,
    best_response,
    joint_exact_gates,
    linear_vae_terms,
    reverse_waterfilling,
)
from lightning_ext.functional.mrvae import beta_grid, gate_activation
from lightning_ext.nn import LogUniformBeta, LogVarianceGate, RateContext, RateGate

SPECTRUM = torch.tensor([6.0, 3.0, 1.5, 0.8, 0.4, 0.2, 0.1, 0.05], dtype=torch.float64)
LATENTS = 5
FAMILIES = ("ungated", "paper", "joint", "fixed")
LABELS = {
    "ungated": "no gates",
    "paper": "paper's gates",
    "joint": "square-root encoder gate,\nadditive log-variance gate",
    "fixed": "paper's gates,\nfixed decoder",
}
GATES = {
    "ungated": (),
    "paper": ("encoder_1", "encoder_2", "variance_1", "variance_2", "decoder_1"),
    "joint": ("encoder_1", "encoder_2", "log_variance", "decoder_1"),
    "fixed": ("encoder_1", "encoder_2", "variance_1", "variance_2"),
}
COVARIANCE = torch.diag(SPECTRUM)
FIXED_DECODER = torch.eye(len(SPECTRUM), dtype=torch.float64)[:, :LATENTS] * SPECTRUM[:LATENTS].sqrt()
"""The best decoder as beta goes to 0: orthogonal columns, as the paper's theorem wants them."""


def quadrature(num: int = 48, low: float = 0.01, high: float = 10.0) -> tuple[Tensor, Tensor]:
    """Betas and weights with ``sum(weights * f(betas))`` the mean of ``f`` over a log-uniform beta."""
    k = torch.arange(1, num, dtype=torch.float64)
    jacobi = torch.diag(k / (4 * k**2 - 1).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(jacobi + jacobi.T)  # Golub and Welsch: eigenvalues of the Legendre recurrence
    logs = torch.tensor([low, high], dtype=torch.float64).log()
    return torch.exp(logs.mean() + nodes * (logs[1] - logs[0]) / 2), vectors[0].square()


class GatedLinearVAE(nn.Module):
    """Two linear layers on each side and a free variance per latent, all of them functions of beta; one per seed.

    The seeds share nothing but the loop: their parameters lie side by side, and Adam moves every number by itself.

    Args:
        family: ``"ungated"``; ``"paper"`` (sigmoid gates on both encoder layers and both factors of the variance, a
            square-root gate on the decoder's first layer); ``"joint"`` (square-root gates on the encoder, an additive
            gate on the log variance); ``"fixed"`` (the paper's encoder, for a decoder that does not move).
        seeds: seeds of the initial weights.
    """

    def __init__(self, family: str, seeds: Sequence[int]) -> None:
        super().__init__()
        d, k = len(SPECTRUM), LATENTS
        self.family, self.seeds = family, tuple(seeds)
        self.context = RateContext(LogUniformBeta())
        shapes = {"encoder_1": (k, d), "encoder_2": (k, k), "decoder_1": (k, k), "decoder_2": (d, k)}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for name, shape in shapes.items():
            # Orthogonal: with correlated rows some latents are switched off in the first steps and never come back.
            weights = torch.empty(len(generators), *shape, dtype=torch.float64)
            for weight, generator in zip(weights, generators, strict=True):
                nn.init.orthogonal_(weight, generator=generator)
            setattr(self, name, nn.Parameter(weights))
        self.log_variance = nn.Parameter(torch.zeros(len(seeds), k, dtype=torch.float64))
        self.gates = nn.ModuleDict({name: self._gate(name) for name in GATES[family]}).double()

    def _gate(self, name: str) -> RateGate | LogVarianceGate:
        features = len(self.seeds) * LATENTS
        if name == "log_variance":
            return LogVarianceGate(features, self.context)
        root = name == "decoder_1" or self.family == "joint"
        return RateGate(features, self.context, -1, "sqrt" if root else "sigmoid")

    def parts(self, betas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encoders ``(B, S, k, d)``, decoders ``(B, S, d, k)`` and variances ``(B, S, k)``."""
        t = self.context.prior.standardize(betas).unsqueeze(1)

        def gated(name: str, weight: Tensor) -> Tensor:
            if name not in self.gates:
                return weight
            return self.gates[name].coefficients(t)[0].view(len(t), -1, LATENTS, 1) * weight

        encoder = gated("encoder_2", self.encoder_2) @ gated("encoder_1", self.encoder_1)
        log_variance = self.log_variance.expand(len(t), -1, -1)
        for name in ("variance_1", "variance_2"):
            if name in self.gates:
                log_variance = log_variance + self.gates[name].coefficients(t)[0].log().view_as(log_variance)
        if "log_variance" in self.gates:
            log_variance = log_variance + self.gates["log_variance"].coefficients(t)[1].view_as(log_variance)
        decoder = FIXED_DECODER if self.family == "fixed" else self.decoder_2 @ gated("decoder_1", self.decoder_1)
        shape = (len(t), len(self.seeds), -1, -1)  # a part without gates is the same for every beta
        return encoder.expand(shape), decoder.expand(shape), log_variance.exp()

    def forward(self, betas: Tensor) -> Tensor:
        """``D + beta R`` at each beta, ``(B, S)`` nats."""
        encoder, decoder, variance = self.parts(betas)
        rate, distortion = linear_vae_terms(encoder, decoder, variance, COVARIANCE)
        return distortion + betas.unsqueeze(1) * rate


def optimal_losses(betas: Tensor, family: str) -> Tensor:
    """The smallest loss at each beta: reverse water-filling, or the best response to the decoder that is held."""
    if family == "fixed":
        encoder, variance = best_response(FIXED_DECODER.expand(len(betas), -1, -1), betas)
        rate, distortion = linear_vae_terms(encoder, FIXED_DECODER.expand(len(betas), -1, -1), variance, COVARIANCE)
    else:
        rate, distortion = reverse_waterfilling(SPECTRUM, betas, LATENTS)
    return distortion + betas * rate


def train(
    family: str, seeds: Sequence[int], steps: int, on_step: Callable[[], object] = lambda: None
) -> tuple[GatedLinearVAE, list[float]]:
    """Minimise the expected loss; return the model and the excess over the optimum for each seed, nats."""
    model = GatedLinearVAE(family, seeds)
    betas, weights = quadrature()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (weights @ model(betas)).sum().backward()
        optimizer.step()
        schedule.step()
        on_step()
    with torch.no_grad():
        return model, (weights @ (model(betas) - optimal_losses(betas, family).unsqueeze(1))).tolist()


def formula_excess() -> float:
    """Largest excess over beta of the gates that :func:`joint_exact_gates` writes down, without any training."""
    betas, _ = quadrature()
    gates = joint_exact_gates(COVARIANCE, LATENTS)
    t = LogUniformBeta().standardize(betas).unsqueeze(1)

    def gate(layer: GatedLinear) -> Tensor:
        return gate_activation(t * layer.gate_weight + layer.gate_bias, "sqrt")

    (encoder,), (variance,), (inner, outer) = gates
    rate, distortion = linear_vae_terms(
        gate(encoder).unsqueeze(2) * encoder.weight,
        outer.weight @ (gate(inner).unsqueeze(2) * inner.weight),
        variance.weight * torch.exp(-torch.relu(t * variance.gate_weight + variance.gate_bias)),
        COVARIANCE,
    )
    return float((distortion + betas * rate - optimal_losses(betas, "joint")).abs().max())


def shrinkage(model: GatedLinearVAE, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How much of each direction survives encoding and decoding: betas, eigenvalues, closed form, trained."""
    betas = beta_grid(181, 0.01, 10.0)
    eigenvalues = SPECTRUM[:LATENTS]
    exact = (1 - betas.unsqueeze(1) / eigenvalues).clamp_min(0)
    with torch.no_grad():
        encoder, decoder, _ = model.parts(betas)
    kept = (decoder @ encoder)[:, index].diagonal(dim1=-2, dim2=-1)[:, :LATENTS]
    return betas, eigenvalues, exact, kept
