"""Datasets and LightningDataModules."""

from lightning_ext.data.digits import DigitsDataModule
from lightning_ext.data.dsprites import DSpritesDataModule
from lightning_ext.data.mnist import MNISTDataModule
from lightning_ext.data.resumable import EpochSampler, ResumableDataModule, ResumableLoader
from lightning_ext.data.row_store import RowStore

__all__ = [
    "DSpritesDataModule",
    "DigitsDataModule",
    "EpochSampler",
    "MNISTDataModule",
    "ResumableDataModule",
    "ResumableLoader",
    "RowStore",
]
