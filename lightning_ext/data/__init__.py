"""Datasets and LightningDataModules."""

from lightning_ext.data.digits import DigitsDataModule
from lightning_ext.data.dsprites import DSpritesDataModule
from lightning_ext.data.mnist import MNISTDataModule

__all__ = ["DSpritesDataModule", "DigitsDataModule", "MNISTDataModule"]
