"""Latent variable models out of VAEs that were trained elsewhere."""

import math
from typing import Any

from lightning_ext.nn.mutual_information import BernoulliDecoderModel, GaussianDecoderModel, LatentModel

__all__ = ["latent_model_from_pythae", "latent_model_from_vae"]


def latent_model_from_vae(module: Any, beta: float | None = None, variance: float | None = None) -> LatentModel:
    r"""A VAE of this library, such as :class:`~lightning_ext.modules.BetaVAE`; a multi-rate one with its gates folded.

    Its Bernoulli distortions are likelihoods. A Gaussian one has a variance that only :math:`\beta` decides: training
    at :math:`\beta` is training with the variance :math:`\beta` (of ``"sse"``: :math:`\beta / 2`), which is the default
    here; a :class:`~lightning_ext.modules.SigmaVAE` has one of its own.

    Args:
        module: with ``encoder``, ``decoder``, ``distortion``, ``objective`` and ``latent_dim``. Networks are shared,
            but those of a multi-rate one are copies at one rate.
        beta: the rate of a :class:`~lightning_ext.modules.MultiRateVAE`, within its range. Default: 1, or what a
            single-rate module was trained with.
        variance: of the pixels, for Gaussian distortions alone.

    Raises:
        ValueError: If its distortion is a function, it has no single latent vector, or a number is out of range.
    """
    if module.objective == "hierarchical" or module.latent_dim is None:
        raise ValueError("a hierarchical VAE has no single latent vector whose information could be measured.")
    own = getattr(module, "beta", None)
    beta = beta if beta is not None else float(own) if isinstance(own, int | float) else 1.0
    networks = module.fold(beta) if hasattr(module, "fold") else vars(module)["_modules"]
    decoder, encoder, latents = networks["decoder"], networks["encoder"], module.latent_dim
    if module.distortion in ("bernoulli", "bernoulli_logits"):
        if variance is not None:
            raise ValueError(f"variance has no meaning with distortion={module.distortion!r}.")
        return BernoulliDecoderModel(decoder, latents, logits=module.distortion == "bernoulli_logits", encoder=encoder)
    if module.distortion not in ("gaussian", "sse"):
        raise ValueError(
            f"distortion={module.distortion!r} is no density that is known here: wrap the networks in a LatentModel."
        )
    if variance is None:
        learned = getattr(module, "variance", None)
        variance = float(learned) if learned is not None else beta if module.distortion == "gaussian" else beta / 2
    if not variance > 0:
        raise ValueError(f"variance must be positive; got {variance}.")
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
