"""Callbacks to attach to a Trainer."""

from lightning_ext.callbacks.apo import APOLearningRate, HypergradientLR
from lightning_ext.callbacks.apo_preconditioning import APOPreconditioning
from lightning_ext.callbacks.mrvae import KLSchedule, RateDistortionCallback

__all__ = ["APOLearningRate", "APOPreconditioning", "HypergradientLR", "KLSchedule", "RateDistortionCallback"]
