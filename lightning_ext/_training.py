"""``fit``, ``validate``, ``test``, ``predict``: LightningCLI with every class of the library known by its bare name."""

import importlib
import pkgutil
import traceback
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning_ext
from lightning_ext._lightning import MisconfigurationException, submodule
from lightning_ext._resources import UserError

__all__ = ["import_components", "train"]

_SEED = 42
LightningCLI = submodule("cli").LightningCLI


def import_components() -> list[str]:
    """Import every public subpackage, after which jsonargparse finds their classes by bare name; return their names."""
    names = [
        f"{lightning_ext.__name__}.{module.name}"
        for module in pkgutil.iter_modules(lightning_ext.__path__)
        if module.ispkg and not module.name.startswith("_")
    ]
    for name in names:
        importlib.import_module(name)
    return names


class _CLI(LightningCLI):  # type: ignore[misc, valid-type]
    def parse_arguments(self, parser: Any, args: Any) -> None:
        # Lightning's version warns when a program that has arguments of its own passes args, as our tests do
        self.config = parser.parse_args(args)


def _own_message(error: BaseException | None) -> str | None:
    """Return the message of the first error in the chain that our own code raised: a sentence for the user.

    jsonargparse wraps what a constructor raises into a report on every type of a union that did not fit.
    """
    package = Path(__file__).resolve().parent
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        if frames and Path(frames[-1][0].f_code.co_filename).resolve().is_relative_to(package):
            return str(error)
        error = error.__cause__
    return None


def train(args: Sequence[str]) -> None:
    """Run one of LightningCLI's sub-commands.

    Args:
        args: Command line, the sub-command first.

    Raises:
        UserError: For a mistake in the configuration: what the parser refuses, what Lightning calls a
            misconfiguration, a file that is not there, or an error that a component of ours raised. Every other
            exception passes through with its traceback.
    """
    import_components()
    quiet = {"exit_on_error": False}  # raise instead of printing every option there is
    try:
        _CLI(
            args=list(args),
            seed_everything_default=_SEED,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "lightning-ext", **quiet, **dict.fromkeys(_CLI.subcommands(), quiet)},
        )
    except ArgumentError as error:
        raise UserError(f"{args[0]}: {error} (see: lightning-ext {args[0]} --help)") from error
    except (MisconfigurationException, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UserError(str(error)) from error
    except (TypeError, ValueError, RuntimeError) as error:
        message = _own_message(error)
        if message is None:
            raise
        raise UserError(message) from error
