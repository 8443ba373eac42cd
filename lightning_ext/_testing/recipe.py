"""Does a recipe train from the command line? :func:`assert_cli`."""

import contextlib
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["assert_cli"]

_SMALL = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
)


def assert_cli(recipe: str | Path | Sequence[str | Path], *overrides: str, small: bool = True) -> Any:
    """Assert that ``lightning-ext fit`` trains from a recipe, in this process.

    Args:
        recipe: path of a YAML file, or several in the order in which they compose.
        *overrides: further command-line arguments, such as ``"--model.lr=0.01"``; they win over everything else.
        small: run two batches of one epoch on a CPU with no logger, bar or checkpoint, whatever the recipe says;
            default True.

    Returns:
        The LightningCLI object, with ``.trainer``, ``.model``, ``.datamodule`` and ``.config``. What the run wrote
        under its default root folder is gone by then, unless an override named another folder.

    Raises:
        AssertionError: if the command failed, with what it said, or made no optimiser step.

    Note:
        Needs the extra ``cli``. The command seeds the global random state as it does for a user.

    >>> assert_cli("missing.yaml")
    Traceback (most recent call last):
    ...
    AssertionError: assert_cli: no such recipe: missing.yaml
    """
    recipes = [recipe] if isinstance(recipe, str | Path) else list(recipe)
    for path in recipes:
        if not Path(path).is_file():
            raise AssertionError(f"assert_cli: no such recipe: {path}")
    from lightning_ext import _training, cli

    runs: list[Any] = []

    class Recorded(_training._CLI):  # the command returns an exit code; the object behind it is wanted here
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            runs.append(self)
            super().__init__(*args, **kwargs)

    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(_training, "_CLI", Recorded):
        args = ["fit", *(f"--config={path}" for path in recipes), f"--trainer.default_root_dir={folder}"]
        with contextlib.redirect_stderr(said):
            code = cli.main([*args, *(_SMALL if small else ()), *overrides])
    if code:
        raise AssertionError(f"assert_cli: exit code {code}: {said.getvalue().strip()}")
    if not runs[-1].trainer.global_step:
        raise AssertionError("assert_cli: the command ended well but made no optimiser step.")
    return runs[-1]
