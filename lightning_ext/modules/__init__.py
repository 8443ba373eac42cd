"""LightningModules to subclass or to run."""

from lightning_ext.modules.mrvae import MultiRateMixin, MultiRateVAE
from lightning_ext.modules.mrvae_base import BaseVAE, RateDistortion
from lightning_ext.modules.mrvae_baselines import GECOVAE, BetaVAE, FreeBitsVAE, SigmaVAE

__all__ = [
    "GECOVAE",
    "BaseVAE",
    "BetaVAE",
    "FreeBitsVAE",
    "MultiRateMixin",
    "MultiRateVAE",
    "RateDistortion",
    "SigmaVAE",
]
