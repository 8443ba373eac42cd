"""The gates of Theorem 1 and the jointly exact ones, against the closed form of the linear VAE."""

import math

import pytest
import torch

from lightning_ext.functional import (
    best_response,
    joint_exact_gates,
    linear_vae_optimum,
    linear_vae_terms,
    theorem1_gates,
)
from tests.functional.test_mrvae_linear import BETAS, HIGH, LOW, S1, log_uniform_nodes, optimum_loss, random_covariance


def standardised(beta):
    middle, half = (math.log(LOW) + math.log(HIGH)) / 2, (math.log(HIGH) - math.log(LOW)) / 2
    return math.sqrt(3) * (math.log(beta) - middle) / half


ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "sqrt": lambda x: torch.sqrt(torch.relu(1 - torch.exp(x))),
    "relu_log": lambda x: torch.exp(-torch.relu(x)),
    "none": torch.ones_like,
}


def assemble(gates, beta):
    """Encoder, variance and decoder of the gated network at one beta, from its standardised input."""
    t = standardised(beta)

    def product(layers):
        total = None
        for layer in layers:
            gate = ACTIVATIONS[layer.activation](layer.gate_weight * t + layer.gate_bias)
            if layer.weight.ndim == 1:
                total = gate * layer.weight if total is None else gate * layer.weight * total
            else:
                matrix = gate[:, None] * layer.weight
                total = matrix if total is None else matrix @ total
        return total

    return product(gates.encoder), product(gates.variance), product(gates.decoder)


def loss(parts, covariance, beta):
    encoder, variance, decoder = parts
    rate, distortion = linear_vae_terms(encoder, decoder, variance, covariance)
    return distortion + beta * rate


class TestGates:
    @pytest.mark.parametrize("beta", BETAS)
    def test_theorem_gates_follow_their_formulas_exactly(self, beta):
        torch.manual_seed(3)
        covariance = random_covariance(6, seed=1)
        fixed = torch.randn(6, 4, dtype=torch.float64)
        encoder, variance, decoder = assemble(theorem1_gates(covariance, 4, LOW, HIGH, fixed), beta)
        torch.testing.assert_close((encoder, variance), best_response(fixed, beta), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(decoder, linear_vae_optimum(covariance, 4, beta).decoder, rtol=1e-11, atol=1e-13)

    def test_theorem_gates_with_an_unused_column(self):
        fixed = torch.zeros(5, 3, dtype=torch.float64)
        fixed[:, :2] = torch.randn(5, 2, dtype=torch.float64)
        encoder, variance, _ = assemble(theorem1_gates(random_covariance(5), 3, LOW, HIGH, fixed), 0.4)
        torch.testing.assert_close((encoder, variance), best_response(fixed, 0.4), rtol=1e-12, atol=1e-13)

    def test_theorem_gates_of_a_decoder_that_lost_rank_have_bounded_weights(self):
        torch.manual_seed(0)
        fixed = torch.randn(5, 2, dtype=torch.float64) @ torch.randn(2, 3, dtype=torch.float64)
        gates = theorem1_gates(random_covariance(5), 3, LOW, HIGH, fixed)
        assert gates.encoder[1].weight.abs().max() < 100
        encoder, variance, _ = assemble(gates, 0.4)
        torch.testing.assert_close((encoder, variance), best_response(fixed, 0.4), rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("covariance", [random_covariance(6, seed=4), random_covariance(6, rank=2), torch.diag(S1)])
    @pytest.mark.parametrize("beta", BETAS)
    def test_joint_gates_reach_the_optimum_at_every_beta(self, covariance, beta):
        best = linear_vae_optimum(covariance, 4, beta)
        parts = assemble(joint_exact_gates(covariance, 4, LOW, HIGH), beta)
        torch.testing.assert_close(parts, (best.encoder, best.variance, best.decoder), rtol=1e-9, atol=1e-12)
        excess = loss(parts, covariance, beta) - (best.distortion + beta * best.rate)
        assert abs(excess.item()) < 5e-15 * max(1.0, best.distortion.item() + beta * best.rate.item())

    def test_theorem_gates_with_a_moving_decoder_miss_the_joint_optimum(self):
        covariance = torch.tensor([[1.5]], dtype=torch.float64)
        gates = theorem1_gates(covariance, 1, LOW, HIGH)  # the encoder answers the decoder that is optimal at 0.01

        def excess(gates, beta):
            return (loss(assemble(gates, beta), covariance, beta) - optimum_loss(covariance[0], beta)).item()

        grid = torch.logspace(-2, 1, 48, dtype=torch.float64).tolist()
        assert max(excess(gates, b) for b in grid) == pytest.approx(0.324, abs=5e-4)
        assert min(excess(gates, b) for b in grid) > -1e-14
        # the supremum is where the decoder dies, at beta = 1.5, while the encoder still sends
        variance = 1.5 / (1.49 + 1.5)
        rate = (1.5 * 1.49 / (1.49 + 1.5) ** 2 + variance - 1 - math.log(variance)) / 2
        assert excess(gates, 1.5) == pytest.approx(1.5 * rate, rel=1e-12)
        assert excess(gates, 1.5) == pytest.approx(0.3311, abs=5e-5)
        assert max(abs(excess(joint_exact_gates(covariance, 1, LOW, HIGH), b)) for b in grid) < 2e-15

    def test_decoder_variance_only_moves_the_water_level(self):
        covariance, spread = random_covariance(5, seed=2), 0.25
        best = linear_vae_optimum(covariance, 3, 0.8, spread)
        parts = assemble(joint_exact_gates(covariance, 3, LOW, HIGH, spread), 0.8)
        torch.testing.assert_close(parts, (best.encoder, best.variance, best.decoder), rtol=1e-9, atol=1e-12)
        _, _, decoder = assemble(theorem1_gates(covariance, 3, LOW, HIGH, decoder_variance=spread), 0.8)
        torch.testing.assert_close(decoder, best.decoder, rtol=1e-9, atol=1e-12)

    def test_no_latent_at_all(self):
        encoder, variance, decoder = assemble(theorem1_gates(torch.eye(3), 0), 1.0)
        assert (encoder.shape, variance.shape, decoder.shape) == ((0, 3), (0,), (3, 0))
        assert linear_vae_terms(encoder, decoder, variance, torch.eye(3)) == (0.0, 1.5)

    def test_a_range_of_one_point(self):
        gates = joint_exact_gates(torch.diag(S1), 2, low=0.5, high=0.5)
        assert not gates.encoder[0].gate_weight.any()
        assert torch.sqrt(1 - torch.exp(gates.encoder[0].gate_bias))[0].item() == pytest.approx(math.sqrt(1 - 0.5 / 6))

    def test_no_gated_linear_vae_beats_the_bound(self):
        """Training the paper's family from random gates never goes below the expected optimum."""
        torch.manual_seed(7)
        betas, weights = log_uniform_nodes()
        t = torch.tensor([standardised(b) for b in betas.tolist()])[:, None]
        shapes = {"E": (5, 8), "D": (8, 5), "v": (5,), "we": (5,), "ce": (5,), "wd": (5,), "cd": (5,), "wv": (5,)}
        p = {n: (0.4 * torch.randn(s, dtype=torch.float64)).requires_grad_() for n, s in shapes.items()}
        optimizer = torch.optim.Adam(p.values(), lr=0.03)
        history = []
        for _ in range(300):
            encoder = torch.sigmoid(p["we"] * t + p["ce"])[..., None] * p["E"]
            gate = torch.sqrt(torch.relu(1 - torch.exp(p["wd"] * t + p["cd"] - 1)) + 1e-12)
            variance = torch.exp(p["v"] + p["wv"] * t)
            rate, distortion = linear_vae_terms(encoder, p["D"] * gate[:, None], variance, torch.diag(S1))
            value = distortion + betas * rate
            assert bool((value >= optimum_loss(S1, betas, 5) - 1e-12).all())
            history.append((weights * value).sum())
            optimizer.zero_grad()
            history[-1].backward()
            optimizer.step()
        history = torch.stack(history).detach()
        assert history.min().item() >= 2.77199
        assert history[-1].item() < 2.77199 + 0.6  # it did learn; the ungated network is 1.755 above

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: joint_exact_gates(torch.eye(2), 1, low=0.0), "0 < low <= high"),
            (lambda: joint_exact_gates(torch.eye(2), 1, low=2.0, high=1.0), "low=2.0, high=1.0"),
            (lambda: joint_exact_gates(torch.eye(2), 3), "from 0 to the data's dimension 2, got 3"),
            (lambda: joint_exact_gates(torch.eye(2), 1, decoder_variance=0.0), "decoder_variance must be positive"),
            (lambda: theorem1_gates(torch.eye(2), 1, decoder=torch.ones(1, 2)), r"shape \(2, 1\), got \(1, 2\)"),
        ],
    )
    def test_errors(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()
