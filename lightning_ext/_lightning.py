"""The one import point for Lightning.

``pytorch_lightning`` and ``lightning.pytorch`` ship the same code as *different* classes: a callback or module built on
one is refused by the other's Trainer or CLI. This file picks one flavour when the package is first used and everything
else imports the names from here. The choice, in order:

1. the environment variable ``LIGHTNING_EXT_BACKEND`` (``pytorch_lightning`` or ``lightning.pytorch``);
2. the only flavour that the program has already imported;
3. ``pytorch_lightning``, our declared dependency;
4. ``lightning.pytorch``.

Two cases cannot be told apart from here and choose ``pytorch_lightning``: both flavours are already imported, or
``lightning_ext`` is imported before a ``lightning`` Trainer. Import Lightning first, or set the variable.
"""

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

__all__ = [
    "BACKEND",
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "pl",
    "refuse_sharded",
    "submodule",
]

_FLAVOURS = ("pytorch_lightning", "lightning.pytorch")


def _choose() -> str:
    asked = os.environ.get("LIGHTNING_EXT_BACKEND", "")
    if asked:
        if asked not in _FLAVOURS:
            raise ImportError(f"LIGHTNING_EXT_BACKEND must be one of {', '.join(_FLAVOURS)}; got {asked!r}.")
        return asked
    imported = [name for name in _FLAVOURS if name in sys.modules]
    if len(imported) == 1:
        return imported[0]
    if importlib.util.find_spec("pytorch_lightning") is not None:
        return "pytorch_lightning"
    if importlib.util.find_spec("lightning") is not None:
        return "lightning.pytorch"
    raise ImportError("lightning_ext needs Lightning: pip install pytorch-lightning")


BACKEND: str = _choose()


def submodule(name: str) -> Any:
    """Import ``<chosen flavour>.<name>``, for parts of Lightning that are costly or optional (``"cli"``)."""
    return importlib.import_module(f"{BACKEND}.{name}")


if TYPE_CHECKING:
    import pytorch_lightning as pl
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
else:
    pl = importlib.import_module(BACKEND)
    Callback = pl.Callback
    LightningDataModule = pl.LightningDataModule
    LightningModule = pl.LightningModule
    Trainer = pl.Trainer
    MisconfigurationException = submodule("utilities.exceptions").MisconfigurationException


_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")


def refuse_sharded(trainer: Any, who: str, why: str) -> None:
    """Raise for strategies under which a rank does not hold whole parameters, or defers its steps."""
    strategies = submodule("strategies")
    for name in _SHARDED:
        if isinstance(trainer.strategy, getattr(strategies, name)):
            raise MisconfigurationException(
                f"{who} does not work with {name}: it {why}, and this strategy shards or defers the parameters. "
                "Use strategy='ddp' or a single device."
            )
