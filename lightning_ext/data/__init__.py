"""Datasets and LightningDataModules."""

from lightning_ext.data.cifar import CIFAR10, CIFAR100, CIFARImages, CIFARLayout, read_cifar
from lightning_ext.data.continual import ContinualDataModule
from lightning_ext.data.digits import DigitsDataModule
from lightning_ext.data.dsprites import DSpritesDataModule
from lightning_ext.data.indexed import IndexedBatch, IndexedDataset
from lightning_ext.data.mnist import MNISTDataModule
from lightning_ext.data.mutual_information import (
    CorrelatedGaussianDataModule,
    FiniteJointDataModule,
    LinearGaussianDataModule,
    PairLoader,
    SimulatedPairsDataModule,
)
from lightning_ext.data.resumable import EpochSampler, ResumableDataModule, ResumableLoader
from lightning_ext.data.row_store import RowStore

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CIFARImages",
    "CIFARLayout",
    "ContinualDataModule",
    "CorrelatedGaussianDataModule",
    "DSpritesDataModule",
    "DigitsDataModule",
    "EpochSampler",
    "FiniteJointDataModule",
    "IndexedBatch",
    "IndexedDataset",
    "LinearGaussianDataModule",
    "MNISTDataModule",
    "PairLoader",
    "ResumableDataModule",
    "ResumableLoader",
    "RowStore",
    "SimulatedPairsDataModule",
    "read_cifar",
]
