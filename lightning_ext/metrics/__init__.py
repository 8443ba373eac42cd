"""Metrics with state: ``torchmetrics.Metric`` subclasses."""

from lightning_ext.metrics.curvature import EigenCorrection, KroneckerFactors
from lightning_ext.metrics.influence import InfluenceScores
from lightning_ext.metrics.influence_quality import (
    LinearDatamodelingScore,
    LOOCorrelation,
    MislabelDetection,
    TopKOverlap,
)
from lightning_ext.metrics.influence_self import SelfInfluence
from lightning_ext.metrics.laftr import FunctionSpaceDistance, LAFTRStatistics
from lightning_ext.metrics.laftr_continual import ContinualMetrics
from lightning_ext.metrics.mrvae import RateDistortionCurve
from lightning_ext.metrics.mrvae_information import MutualInformationGap

__all__ = [
    "ContinualMetrics",
    "EigenCorrection",
    "FunctionSpaceDistance",
    "InfluenceScores",
    "KroneckerFactors",
    "LAFTRStatistics",
    "LOOCorrelation",
    "LinearDatamodelingScore",
    "MislabelDetection",
    "MutualInformationGap",
    "RateDistortionCurve",
    "SelfInfluence",
    "TopKOverlap",
]
