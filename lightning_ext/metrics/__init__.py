"""Metrics with state: ``torchmetrics.Metric`` subclasses."""

from lightning_ext.metrics.mrvae import RateDistortionCurve
from lightning_ext.metrics.mrvae_information import MutualInformationGap

__all__ = ["MutualInformationGap", "RateDistortionCurve"]
