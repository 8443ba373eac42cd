"""VAEs from elsewhere: their likelihood is the one they were trained with."""

import math

import pytest
import torch
from torch import nn

from lightning_ext.modules import MultiRateVAE, SigmaVAE
from lightning_ext.nn import (
    BernoulliDecoderModel,
    GaussianDecoderModel,
    MLPDecoder,
    MLPEncoder,
    latent_model_from_pythae,
    latent_model_from_vae,
)


def multi_rate(distortion, **options):
    torch.manual_seed(0)
    nets = MLPEncoder([9], [8], latent_dim=2), MLPDecoder(2, [8], [9])
    module = MultiRateVAE(*nets, input_shape=[9], beta_range=(0.1, 10.0), distortion=distortion, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module.eval()


@pytest.mark.parametrize(("distortion", "variance"), [("gaussian", 0.5), ("sse", 0.25), ("bernoulli_logits", None)])
@torch.no_grad()
def test_a_multi_rate_vae_at_one_rate(distortion, variance):
    module = multi_rate(distortion)
    model = latent_model_from_vae(module, 0.5)
    x, z = torch.rand(4, 9).round(), torch.randn(4, 2)
    with module.at(0.5):
        outputs, (mu, log_var) = module.decode(z), module.encode(x)
    torch.testing.assert_close(model.decode(z), outputs)
    proposal = model.proposal(x)
    torch.testing.assert_close(proposal.density.mean, mu)
    torch.testing.assert_close(proposal.density.scale, (0.5 * log_var).exp())
    if variance is None:
        assert isinstance(model, BernoulliDecoderModel)
        torch.testing.assert_close(model.log_likelihood(x, z), -module._distortion(outputs, x))
        with pytest.raises(ValueError, match="variance has no meaning"):
            latent_model_from_vae(module, 0.5, variance=1.0)
        return
    assert isinstance(model, GaussianDecoderModel)
    assert model.log_var.exp().item() == pytest.approx(variance)
    # up to a constant the training's D / beta
    differences = model.log_likelihood(x, z) + module._distortion(outputs, x) / 0.5
    torch.testing.assert_close(differences, differences[:1].expand(4))
    assert latent_model_from_vae(module, 0.5, variance=2.0).log_var.item() == pytest.approx(math.log(2))


def test_a_vae_with_a_variance_of_its_own_keeps_it():
    module = SigmaVAE(MLPEncoder([6], [5], 2), MLPDecoder(2, [5], [6]), input_shape=[6])
    module.variance.fill_(0.04)
    assert latent_model_from_vae(module).log_var.item() == pytest.approx(math.log(0.04))
    assert latent_model_from_vae(module, variance=0.5).log_var.item() == pytest.approx(math.log(0.5))
    with pytest.raises(ValueError, match="variance must be positive; got 0"):
        latent_model_from_vae(module, variance=0.0)


def test_distortions_that_are_no_density_are_refused():
    module = multi_rate(lambda reconstruction, x: (reconstruction - x).abs().sum(1))
    with pytest.raises(ValueError, match="no density that is known here"):
        latent_model_from_vae(module, 0.5)
    module.latent_dim = None
    with pytest.raises(ValueError, match="no single latent vector"):
        latent_model_from_vae(module, 0.5)


@pytest.mark.parametrize("loss", ["mse", "bce"])
@torch.no_grad()
def test_a_vae_of_pythae(loss):
    pytest.importorskip("pythae")
    from pythae.models import VAE, VAEConfig

    torch.manual_seed(0)
    vae = VAE(VAEConfig(input_dim=(1, 3, 3), latent_dim=2, reconstruction_loss=loss)).eval()
    model = latent_model_from_pythae(vae)
    x, z = torch.rand(4, 1, 3, 3).round(), torch.randn(4, 2)
    reconstruction = vae.decoder(z).reconstruction
    if loss == "bce":
        expected = -nn.functional.binary_cross_entropy(reconstruction, x, reduction="none").flatten(1).sum(1)
    else:
        expected = torch.distributions.Normal(reconstruction, 1.0).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(model.log_likelihood(x, z), expected)
    encoded = vae.encoder(x)
    torch.testing.assert_close(model.proposal(x).density.mean, encoded.embedding)
    vae.model_config.reconstruction_loss = "l1"
    with pytest.raises(ValueError, match="must be 'mse' or 'bce'; got 'l1'"):
        latent_model_from_pythae(vae)
