"""Callbacks to attach to a Trainer."""

from lightning_ext.callbacks.mrvae import KLSchedule, RateDistortionCallback

__all__ = ["KLSchedule", "RateDistortionCallback"]
