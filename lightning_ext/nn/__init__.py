"""Layers and model parts: plain ``torch.nn.Module``."""

from lightning_ext.nn.laftr import FunctionSpaceEstimator, MeanDistance
from lightning_ext.nn.laftr_baselines import CoresetEstimator, FullDataEstimator, NTKEstimator
from lightning_ext.nn.laftr_estimator import LAFTREstimator
from lightning_ext.nn.laftr_fisher import EWCEstimator, KFACEstimator, L2Estimator, function_space_estimator
from lightning_ext.nn.mlp import MLP
from lightning_ext.nn.mrvae import LogUniformBeta, RateContext
from lightning_ext.nn.mrvae_convert import (
    convert_to_multirate,
    dry_run,
    posterior_parameters,
    reconstruction_parameters,
)
from lightning_ext.nn.mrvae_fold import fold
from lightning_ext.nn.mrvae_gates import GatedFiLM, LogVarianceGate, PosteriorGate, RateConditioner, RateFiLM, RateGate
from lightning_ext.nn.mrvae_nets import (
    LadderDecoder,
    LadderEncoder,
    MLPDecoder,
    MLPEncoder,
    ResNetDecoder,
    ResNetEncoder,
)
from lightning_ext.nn.mutual_information import (
    BernoulliDecoderModel,
    DistributionModel,
    GaussianDecoderModel,
    LatentModel,
    Proposal,
    check_deterministic,
)
from lightning_ext.nn.mutual_information_adapters import latent_model_from_pythae, latent_model_from_vae
from lightning_ext.nn.mutual_information_critics import (
    ConcatenatedCritic,
    GaussianProposal,
    PairCritic,
    QuadraticCritic,
    SeparableCritic,
)
from lightning_ext.nn.mutual_information_known import FiniteModel, LinearGaussianModel

__all__ = [
    "MLP",
    "BernoulliDecoderModel",
    "ConcatenatedCritic",
    "CoresetEstimator",
    "DistributionModel",
    "EWCEstimator",
    "FiniteModel",
    "FullDataEstimator",
    "FunctionSpaceEstimator",
    "GatedFiLM",
    "GaussianDecoderModel",
    "GaussianProposal",
    "KFACEstimator",
    "L2Estimator",
    "LAFTREstimator",
    "LadderDecoder",
    "LadderEncoder",
    "LatentModel",
    "LinearGaussianModel",
    "LogUniformBeta",
    "LogVarianceGate",
    "MLPDecoder",
    "MLPEncoder",
    "MeanDistance",
    "NTKEstimator",
    "PairCritic",
    "PosteriorGate",
    "Proposal",
    "QuadraticCritic",
    "RateConditioner",
    "RateContext",
    "RateFiLM",
    "RateGate",
    "ResNetDecoder",
    "ResNetEncoder",
    "SeparableCritic",
    "check_deterministic",
    "convert_to_multirate",
    "dry_run",
    "fold",
    "function_space_estimator",
    "latent_model_from_pythae",
    "latent_model_from_vae",
    "posterior_parameters",
    "reconstruction_parameters",
]
