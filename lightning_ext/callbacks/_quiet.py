"""The guard under which a callback runs a module's own code on the side."""

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning_ext._lightning import LightningModule, submodule


def _muted(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``log`` and ``log_dict``."""


@contextlib.contextmanager
def quietly(pl_module: LightningModule) -> Iterator[None]:
    """Mute ``log`` and ``log_dict`` and put every random state (torch, CUDA, NumPy, Python) back afterwards."""
    own: dict[str, Any] = {name: vars(pl_module)[name] for name in ("log", "log_dict") if name in vars(pl_module)}
    with submodule("utilities.seed").isolate_rng():
        pl_module.log = pl_module.log_dict = _muted  # type: ignore[method-assign]
        try:
            yield
        finally:
            del pl_module.log, pl_module.log_dict
            vars(pl_module).update(own)
