"""Datasets and LightningDataModules."""

from lightning_ext.data.digits import DigitsDataModule

__all__ = ["DigitsDataModule"]
