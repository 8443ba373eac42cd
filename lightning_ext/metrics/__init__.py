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
from lightning_ext.metrics.mutual_information import BarberAgakovBound, GIWAEBound, IWAEBound, StructuredInfoNCE
from lightning_ext.metrics.mutual_information_ais import (
    AISBound,
    MutualInformationSandwich,
    mutual_information_sandwich,
)
from lightning_ext.metrics.mutual_information_critic import (
    DonskerVaradhanEstimate,
    IBALEstimate,
    InfoNCE,
    NWJEstimate,
)
from lightning_ext.metrics.mutual_information_ksg import KSGEstimate

__all__ = [
    "AISBound",
    "BarberAgakovBound",
    "ContinualMetrics",
    "DonskerVaradhanEstimate",
    "EigenCorrection",
    "FunctionSpaceDistance",
    "GIWAEBound",
    "IBALEstimate",
    "IWAEBound",
    "InfluenceScores",
    "InfoNCE",
    "KSGEstimate",
    "KroneckerFactors",
    "LAFTRStatistics",
    "LOOCorrelation",
    "LinearDatamodelingScore",
    "MislabelDetection",
    "MutualInformationGap",
    "MutualInformationSandwich",
    "NWJEstimate",
    "RateDistortionCurve",
    "SelfInfluence",
    "StructuredInfoNCE",
    "TopKOverlap",
    "mutual_information_sandwich",
]
