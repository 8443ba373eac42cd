"""Tiny builds of the modules that retrain copies of a network."""

from typing import Any

from lightning_ext.modules import PBRFModule, ResponseModule
from tests.conformance import components

REMOVE = [1, [0, 2]]


def retrained(response: str, **kwargs: Any) -> ResponseModule:
    """The data set is named, because the suite's resumable loader does not say what it reads."""
    settings = {"remove": REMOVE, "damping": 0.05, "weight_decay": 0.01, "dataset": components.pixels(), **kwargs}
    return ResponseModule(components.small_classifier(), None, response, **settings)


def bregman(**kwargs: Any) -> PBRFModule:
    """Without a tolerance: a few steps reach none, and it would warn."""
    settings = {"damping": 0.05, "lr": 0.01, "tolerance": None, "dataset": components.pixels(), **kwargs}
    return PBRFModule(components.small_classifier(), None, REMOVE, **settings)
