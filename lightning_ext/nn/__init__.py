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

__all__ = [
    "MLP",
    "CoresetEstimator",
    "EWCEstimator",
    "FullDataEstimator",
    "FunctionSpaceEstimator",
    "GatedFiLM",
    "KFACEstimator",
    "L2Estimator",
    "LAFTREstimator",
    "LadderDecoder",
    "LadderEncoder",
    "LogUniformBeta",
    "LogVarianceGate",
    "MLPDecoder",
    "MLPEncoder",
    "MeanDistance",
    "NTKEstimator",
    "PosteriorGate",
    "RateConditioner",
    "RateContext",
    "RateFiLM",
    "RateGate",
    "ResNetDecoder",
    "ResNetEncoder",
    "convert_to_multirate",
    "dry_run",
    "fold",
    "function_space_estimator",
    "posterior_parameters",
    "reconstruction_parameters",
]
