"""LightningModules to subclass or to run."""

from lightning_ext.modules.classifier import Classifier
from lightning_ext.modules.influence import InfluenceModule
from lightning_ext.modules.influence_gaps import InfluenceGapAnalyzer, InfluenceGaps
from lightning_ext.modules.influence_pbrf import PBRFModule
from lightning_ext.modules.influence_response import ResponseModule
from lightning_ext.modules.laftr import LAFTRInfluence
from lightning_ext.modules.mrvae import AtBeta, MultiRateMixin, MultiRateVAE
from lightning_ext.modules.mrvae_base import BaseVAE, RateDistortion
from lightning_ext.modules.mrvae_baselines import GECOVAE, BetaVAE, FreeBitsVAE, SigmaVAE
from lightning_ext.modules.mrvae_noise import AddressedNoise
from lightning_ext.modules.mutual_information import BarberAgakovModule, CriticModule
from lightning_ext.modules.mutual_information_giwae import GIWAEModule
from lightning_ext.modules.mutual_information_ibal import ImplicitBound, measure_implicit_bound
from lightning_ext.modules.mutual_information_mine_ais import MINEAISModule
from lightning_ext.modules.mutual_information_sandwich import MutualInformationMeasurement, measure_mutual_information

__all__ = [
    "GECOVAE",
    "AddressedNoise",
    "AtBeta",
    "BarberAgakovModule",
    "BaseVAE",
    "BetaVAE",
    "Classifier",
    "CriticModule",
    "FreeBitsVAE",
    "GIWAEModule",
    "ImplicitBound",
    "InfluenceGapAnalyzer",
    "InfluenceGaps",
    "InfluenceModule",
    "LAFTRInfluence",
    "MINEAISModule",
    "MultiRateMixin",
    "MultiRateVAE",
    "MutualInformationMeasurement",
    "PBRFModule",
    "RateDistortion",
    "ResponseModule",
    "SigmaVAE",
    "measure_implicit_bound",
    "measure_mutual_information",
]
