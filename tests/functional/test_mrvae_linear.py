"""The linear VAE: printed tables, stationarity, envelope identities, and the gates of Theorem 1."""

import math

import numpy as np
import pytest
import torch

from lightning_ext.functional import (
    best_response,
    linear_vae_optimum,
    linear_vae_terms,
    reverse_waterfilling,
)

LOW, HIGH = 0.01, 10.0
S1 = torch.tensor([6, 3, 1.5, 0.8, 0.4, 0.2, 0.1, 0.05], dtype=torch.float64)
S1_TABLE = {  # beta: rate, distortion, loss; five latents
    0.01: (12.591127, 0.200000, 0.325911),
    0.1: (6.834664, 0.425000, 1.108466),
    0.5: (2.922641, 1.375000, 2.836321),
    1.0: (1.647918, 2.275000, 3.922918),
    2.0: (0.752039, 3.525000, 5.029077),
    5.0: (0.091161, 5.525000, 5.980804),
    10.0: (0.0, 6.025000, 6.025000),
}


@pytest.fixture(scope="module")
def digits_covariance():
    data = pytest.importorskip("sklearn.datasets").load_digits().data / 16
    data = torch.tensor(data - data.mean(0))
    return data.T @ data / len(data)


def random_covariance(d, rank=None, seed=0):
    factor = torch.randn(d, rank or d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.T / d


def optimum_loss(eigenvalues, beta, k=None):
    rate, distortion = reverse_waterfilling(eigenvalues, beta, k)
    return distortion + torch.as_tensor(beta, dtype=rate.dtype) * rate


def log_uniform_nodes(n=48):
    nodes, weights = np.polynomial.legendre.leggauss(n)
    middle, half = (math.log(LOW) + math.log(HIGH)) / 2, (math.log(HIGH) - math.log(LOW)) / 2
    return torch.tensor(np.exp(middle + half * nodes)), torch.tensor(weights / 2)


class TestReverseWaterfilling:
    @pytest.mark.parametrize(("beta", "row"), S1_TABLE.items())
    def test_spectrum_table(self, beta, row):
        rate, distortion = reverse_waterfilling(S1, beta, num_latents=5)
        assert (rate.item(), distortion.item()) == pytest.approx(row[:2], abs=5e-7)
        assert (distortion + beta * rate).item() == pytest.approx(row[2], abs=5e-7)

    @pytest.mark.parametrize(
        ("beta", "rate", "distortion"),
        [
            (0.01, 14.192976, 0.805224),
            (0.03, 9.798527, 0.885224),
            (0.1, 4.982636, 1.165224),
            (0.3, 1.244487, 1.803498),
            (0.6989, 0.0, 2.346638),
        ],
    )
    def test_digits_table(self, digits_covariance, beta, rate, distortion):
        spectrum = torch.linalg.eigvalsh(digits_covariance).clamp(min=0)
        ours = reverse_waterfilling(spectrum, beta, num_latents=8)
        assert [x.item() for x in ours] == pytest.approx([rate, distortion], abs=6e-7)

    def test_digits_spectrum(self, digits_covariance):
        spectrum = torch.linalg.eigvalsh(digits_covariance).flip(0)
        top = [0.698857, 0.639167, 0.553553, 0.394704, 0.271385, 0.230764, 0.202561, 0.171838]
        assert spectrum.sum().item() == pytest.approx(4.693276, abs=6e-7)
        assert spectrum[:8].tolist() == pytest.approx(top, abs=6e-7)

    @pytest.mark.parametrize(("beta", "rate", "distortion"), [(0.1, 7.755224, 1.930448), (1.0, 0.341072, 4.301700)])
    def test_squared_error_convention_is_a_decoder_variance_of_one_half(
        self, digits_covariance, beta, rate, distortion
    ):
        spectrum = torch.linalg.eigvalsh(digits_covariance).clamp(min=0)
        ours = reverse_waterfilling(spectrum, beta, num_latents=8, decoder_variance=0.5)
        assert [x.item() for x in ours] == pytest.approx([rate, distortion], abs=6e-7)

    def test_expected_loss_over_the_default_range(self):
        betas, weights = log_uniform_nodes()
        assert (weights * optimum_loss(S1, betas, 5)).sum().item() == pytest.approx(2.77199, abs=5e-6)

    def test_distortion_falls_at_beta_per_nat(self):
        betas = torch.tensor([0.03, 0.3, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
        rate, distortion = reverse_waterfilling(S1, betas, 5)
        (rate_slope,) = torch.autograd.grad(rate.sum(), betas, retain_graph=True)
        (distortion_slope,) = torch.autograd.grad(distortion.sum(), betas)
        torch.testing.assert_close(distortion_slope / rate_slope, -betas.detach(), rtol=1e-12, atol=0)
        step = 1e-4
        (r0, d0), (r1, d1) = (reverse_waterfilling(S1, 1.0 * math.exp(s), 5) for s in (-step, step))
        assert ((d1 - d0) / (r1 - r0)).item() == pytest.approx(-1, abs=1e-8)

    def test_envelope_and_shape_of_the_curve(self):
        grid = torch.logspace(-2, 1, 400, dtype=torch.float64).requires_grad_()
        rate, distortion = reverse_waterfilling(S1, grid, 5)
        (slope,) = torch.autograd.grad((distortion + grid * rate).sum(), grid)
        torch.testing.assert_close(slope, rate, rtol=1e-10, atol=1e-12)  # dL*/dbeta = R*
        assert bool((rate.diff() <= 0).all())
        assert bool((distortion.diff() >= 0).all())
        linear = torch.linspace(0.01, 10, 1000, dtype=torch.float64)
        assert bool((optimum_loss(S1, linear, 5).diff().diff() <= 1e-12).all())  # concave in beta

    def test_rate_loses_half_a_nat_per_latent_and_log_beta(self):
        eta = torch.tensor(math.log(0.5), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(reverse_waterfilling(S1, eta.exp(), 5)[0], eta)
        assert slope.item() == pytest.approx(-4 / 2, abs=1e-12)  # 6, 3, 1.5 and .8 exceed .5

    def test_constant_and_variance(self):
        _, distortion = reverse_waterfilling(S1, 0.3, 5, decoder_variance=2.0)
        _, full = reverse_waterfilling(S1, 0.3, 5, decoder_variance=2.0, include_constant=True)
        assert (full - distortion).item() == pytest.approx(4 * math.log(2 * math.pi * 2.0), rel=1e-15)

    def test_beta_of_any_shape(self):
        betas = torch.tensor([[0.1, 1.0, 2.0]], dtype=torch.float64)
        rate, distortion = reverse_waterfilling(S1.flip(0), betas, 5)
        assert rate.shape == distortion.shape == (1, 3)
        assert rate[0, 1].item() == pytest.approx(1.647918, abs=5e-7)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"eigenvalues": torch.tensor([1.0, -1.0])}, "eigenvalues must be a non-empty vector .* minimum -1"),
            ({"eigenvalues": torch.ones(2, 2)}, r"got shape \(2, 2\)"),
            ({"beta": 0.0}, "beta must be positive"),
            ({"beta": torch.tensor([1.0, float("nan")])}, "beta must be positive and finite"),
            ({"decoder_variance": -1.0}, "decoder_variance must be positive"),
            ({"num_latents": 9}, "from 0 to the data's dimension 8, got 9"),
            ({"num_latents": -1}, "num_latents must be from 0"),
        ],
    )
    def test_errors(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            reverse_waterfilling(**{"eigenvalues": S1, "beta": 1.0, **kwargs})


class TestOptimum:
    @pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 10.0])
    @pytest.mark.parametrize("spread", [1.0, 0.5, 3.0])
    def test_parameters_attain_the_closed_form(self, beta, spread):
        covariance = random_covariance(7)
        best = linear_vae_optimum(covariance, 4, beta, spread)
        rate, distortion = linear_vae_terms(best.encoder, best.decoder, best.variance, covariance, spread)
        torch.testing.assert_close((rate, distortion), (best.rate, best.distortion), rtol=1e-10, atol=1e-12)
        encoder, variance = best_response(best.decoder, beta, spread)
        torch.testing.assert_close((encoder, variance), (best.encoder, best.variance), rtol=1e-9, atol=1e-12)

    def test_matches_terms_by_sampling(self):
        torch.manual_seed(0)
        covariance, k = random_covariance(3), 2
        encoder, decoder = torch.randn(k, 3, dtype=torch.float64), torch.randn(3, k, dtype=torch.float64)
        variance = torch.tensor([0.3, 1.7], dtype=torch.float64)
        x = torch.randn(400_000, 3, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
        mu = x @ encoder.T
        z = mu + variance.sqrt() * torch.randn(len(x), k, dtype=torch.float64)
        rate = 0.5 * (mu.square() + variance - 1 - variance.log()).sum(1).mean()
        distortion = 0.5 * (x - z @ decoder.T).square().sum(1).mean() / 2.0
        ours = linear_vae_terms(encoder, decoder, variance, covariance, decoder_variance=2.0)
        torch.testing.assert_close(ours, (rate, distortion), rtol=1e-2, atol=0)

    def test_leading_dimensions_of_beta(self):
        covariance, betas = random_covariance(5), torch.logspace(-2, 1, 6, dtype=torch.float64).view(2, 3)
        best = linear_vae_optimum(covariance, 3, betas)
        assert best.decoder.shape == (2, 3, 5, 3)
        assert best.encoder.shape == (2, 3, 3, 5)
        terms = linear_vae_terms(best.encoder, best.decoder, best.variance, covariance)
        torch.testing.assert_close(terms, (best.rate, best.distortion), rtol=1e-9, atol=1e-12)
        single = linear_vae_optimum(covariance, 3, betas[1, 0].item())
        torch.testing.assert_close(best.decoder[1, 0], single.decoder)

    def test_more_latents_than_dimensions_stay_collapsed(self):
        best = linear_vae_optimum(random_covariance(3), 5, 1e-3)
        assert best.decoder.shape == (3, 5)
        torch.testing.assert_close(best.variance[3:], torch.ones(2, dtype=torch.float64))
        assert not best.encoder[3:].any()

    def test_gradient_reaches_the_covariance_past_the_collapse(self):
        covariance = torch.diag(S1).requires_grad_()
        best = linear_vae_optimum(covariance, 5, 1.0)
        terms = linear_vae_terms(best.encoder, best.decoder, best.variance, covariance)
        (terms[0] + terms[1]).backward()
        assert bool(covariance.grad.isfinite().all())
        # dL*/dlambda = beta/(2 lambda) for a latent in use and 1/2 for the rest
        expected = torch.where(S1 > 1, 0.5 / S1, torch.full_like(S1, 0.5))
        torch.testing.assert_close(covariance.grad.diagonal(), expected)

    def test_gradient_is_finite_at_the_collapse_itself(self):
        covariance = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)).requires_grad_()
        best = linear_vae_optimum(covariance, 2, 1.0)
        (best.decoder.sum() + best.encoder.sum()).backward()
        assert bool(covariance.grad.isfinite().all())

    @pytest.mark.parametrize("beta", [0.01, 0.5, 5.0])
    def test_best_response_is_stationary_for_a_random_decoder(self, beta):
        torch.manual_seed(1)
        covariance = random_covariance(6, seed=3)
        decoder = torch.randn(6, 3, dtype=torch.float64)
        gram = decoder.T @ decoder
        assert (gram - torch.diag(gram.diagonal())).abs().max() > 0.5  # not diagonal
        encoder, variance = (x.requires_grad_() for x in best_response(decoder, beta))
        rate, distortion = linear_vae_terms(encoder, decoder, variance, covariance)
        gradients = torch.autograd.grad(distortion + beta * rate, (encoder, variance))
        assert max(g.abs().max().item() for g in gradients) < 2e-14

    def test_gradient_formulas(self):
        torch.manual_seed(2)
        covariance, beta = random_covariance(4), 0.7
        encoder = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
        decoder = torch.randn(4, 2, dtype=torch.float64)
        variance = torch.rand(2, dtype=torch.float64).add(0.1).requires_grad_()
        rate, distortion = linear_vae_terms(encoder, decoder, variance, covariance)
        for_encoder, for_variance = torch.autograd.grad(distortion + beta * rate, (encoder, variance))
        gram = decoder.T @ decoder
        ascent = decoder.T @ covariance - gram @ encoder @ covariance - beta * encoder @ covariance
        torch.testing.assert_close(for_encoder, -ascent)
        torch.testing.assert_close(for_variance, -0.5 * (beta / variance - beta - gram.diagonal()))

    @pytest.mark.parametrize("beta", list(S1_TABLE))
    def test_training_reaches_the_table(self, beta):
        torch.manual_seed(5)
        covariance = torch.diag(S1)
        encoder = (0.3 * torch.randn(5, 8, dtype=torch.float64)).requires_grad_()
        decoder = (0.3 * torch.randn(8, 5, dtype=torch.float64)).requires_grad_()
        log_variance = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [encoder, decoder, log_variance],
            max_iter=3000,
            tolerance_grad=1e-10,
            tolerance_change=1e-15,
            history_size=50,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            rate, distortion = linear_vae_terms(encoder, decoder, log_variance.exp(), covariance)
            value = distortion + beta * rate
            value.backward()
            return value

        optimizer.step(closure)
        with torch.no_grad():
            rate, distortion = linear_vae_terms(encoder, decoder, log_variance.exp(), covariance)
        row = S1_TABLE[beta]
        assert (rate.item(), distortion.item()) == pytest.approx(row[:2], abs=1e-4)
        assert (distortion + beta * rate).item() == pytest.approx(row[2], abs=1e-5)
        assert int((log_variance.exp() < 0.999).sum()) == int((S1[:5] > beta).sum())

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: linear_vae_optimum(torch.ones(2, 3), 1, 1.0), "square matrix"),
            (lambda: linear_vae_optimum(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 1, 1.0), "symmetric"),
            (lambda: linear_vae_optimum(torch.diag(torch.tensor([1.0, -2.0])), 1, 1.0), "positive semi-definite"),
            (lambda: linear_vae_optimum(torch.eye(2), -1, 1.0), "num_latents must be at least 0"),
            (lambda: best_response(torch.ones(3), 1.0), "decoder must have shape"),
            (lambda: best_response(torch.ones(3, 1), -1.0), "beta must be positive"),
            (
                lambda: linear_vae_terms(torch.ones(3, 2), torch.ones(3, 2), torch.ones(2), torch.eye(3)),
                "do not fit",
            ),
        ],
    )
    def test_errors(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


BETAS = [0.01, 0.037, 0.2, 0.79, 1.0, 2.5, 6.1, 10.0]
