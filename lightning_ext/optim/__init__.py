"""Optimizers: plain ``torch.optim.Optimizer``s, with or without Lightning."""

from lightning_ext.optim.apo import APOPreconditioner

__all__ = ["APOPreconditioner"]
