"""Callbacks to attach to a Trainer."""

from lightning_ext.callbacks.apo import APOLearningRate, HypergradientLR
from lightning_ext.callbacks.apo_preconditioning import APOPreconditioning
from lightning_ext.callbacks.influence import TracInCallback
from lightning_ext.callbacks.influence_curvature import CurvatureCollector
from lightning_ext.callbacks.laftr import FunctionSpaceRegularizer
from lightning_ext.callbacks.mrvae import KLSchedule, RateDistortionCallback
from lightning_ext.callbacks.mutual_information import MutualInformationCallback

__all__ = [
    "APOLearningRate",
    "APOPreconditioning",
    "CurvatureCollector",
    "FunctionSpaceRegularizer",
    "HypergradientLR",
    "KLSchedule",
    "MutualInformationCallback",
    "RateDistortionCallback",
    "TracInCallback",
]
