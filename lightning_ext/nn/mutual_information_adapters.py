"""Latent variable models out of VAEs that were trained elsewhere."""

import math
from typing import Any

from lightning_ext.nn.mutual_information import BernoulliDecoderModel, GaussianDecoderModel, LatentModel

__all__ = ["latent_model_from_multi_rate_vae", "latent_model_from_pythae"]


def latent_model_from_multi_rate_vae(module: Any, beta: float, variance: float | None = None) -> LatentModel:
    r"""A :class:`~lightning_ext.modules.MultiRateVAE` at one rate, with its networks folded.

    Its Bernoulli distortions are likelihoods. A Gaussian one has a variance that only :math:`\beta` decides: training
    at :math:`\beta` is training with the variance :math:`\beta` (twice that of ``"sse"``: :math:`\beta / 2`), which is
    the default here.

    Args:
        module: the module, or another with ``fold``, ``distortion``, ``objective`` and ``latent_dim``.
        beta: within its range.
        variance: of the pixels, for Gaussian distortions alone.

    Raises:
        ValueError: If its distortion is a function, it has no single latent vector, or beta is out of range.
    """
    if module.objective == "hierarchical" or module.latent_dim is None:
        raise ValueError("a hierarchical VAE has no single latent vector whose information could be measured.")
    networks, latents = module.fold(beta), module.latent_dim
    decoder, encoder = networks["decoder"], networks["encoder"]
    if module.distortion in ("bernoulli", "bernoulli_logits"):
        if variance is not None:
            raise ValueError(f"variance has no meaning with distortion={module.distortion!r}.")
        return BernoulliDecoderModel(decoder, latents, logits=module.distortion == "bernoulli_logits", encoder=encoder)
    if module.distortion not in ("gaussian", "sse"):
        raise ValueError(
            f"distortion={module.distortion!r} is no density that is known here: wrap the networks in a LatentModel."
        )
    variance = variance or (beta if module.distortion == "gaussian" else beta / 2)
    return GaussianDecoderModel(decoder, math.log(variance), latents, encoder=encoder)


def latent_model_from_pythae(model: Any) -> LatentModel:
    """A VAE of pythae with its encoder and decoder.

    Its ``"mse"`` loss is half the squared error, a Gaussian of variance 1; its ``"bce"`` loss takes probabilities.

    Args:
        model: with ``encoder``, ``decoder``, ``latent_dim`` and ``model_config.reconstruction_loss``.

    Raises:
        ValueError: If the loss is another one.
    """
    loss = model.model_config.reconstruction_loss
    if loss == "mse":
        return GaussianDecoderModel(model.decoder, 0.0, model.latent_dim, encoder=model.encoder)
    if loss == "bce":
        return BernoulliDecoderModel(model.decoder, model.latent_dim, logits=False, encoder=model.encoder)
    raise ValueError(f"reconstruction_loss must be 'mse' or 'bce'; got {loss!r}.")
