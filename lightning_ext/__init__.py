"""Research papers as PyTorch Lightning components: attach a callback, subclass a module, log a metric.

>>> from lightning_ext.callbacks import RateDistortionCallback
>>> from lightning_ext.metrics import RateDistortionCurve

The subpackages load on first use, so ``import lightning_ext`` alone costs nothing.
"""

import importlib
from types import ModuleType

from lightning_ext.__about__ import __version__

__all__ = ["__version__", "callbacks", "data", "functional", "metrics", "modules", "nn", "optim", "testing"]

_SUBMODULES = frozenset(__all__) - {"__version__"}


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
