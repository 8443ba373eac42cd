"""Callbacks to attach to a Trainer."""

from lightning_ext.callbacks.apo import APOLearningRate, HypergradientLR
from lightning_ext.callbacks.mrvae import KLSchedule, RateDistortionCallback

__all__ = ["APOLearningRate", "HypergradientLR", "KLSchedule", "RateDistortionCallback"]
