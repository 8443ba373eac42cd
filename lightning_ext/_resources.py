"""Where recipes, method cards and examples lie, in a checkout and in an installed wheel, and how they are named.

A wheel carries them as ``lightning_ext/_recipes`` and ``lightning_ext/_examples``; a source checkout has the same files
in ``callbacks/`` and ``examples/`` beside the package. Nothing here imports torch: ``lightning-ext list`` is instant.
"""

import difflib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar

__all__ = [
    "UserError",
    "choose",
    "examples_dir",
    "load_script",
    "named_files",
    "recipes_dir",
    "require",
    "writable_folder",
]

_T = TypeVar("_T")
_PACKAGE = Path(__file__).resolve().parent
_EXTRAS = {
    "jsonargparse": ("jsonargparse", "cli"),
    "jinja2": ("jinja2", "cli"),
    "matplotlib": ("matplotlib", "plot"),
    "sklearn": ("scikit-learn", "examples"),
    "tensorboard": ("tensorboard", "examples"),
}


class UserError(Exception):
    """A mistake that one sentence explains; the command prints the sentence and exits with 2."""


def _shipped(installed: str, checkout: str, package: Path) -> Path:
    inside, beside = package / installed, package.parent / checkout
    if inside.is_dir():
        return inside
    # site-packages may hold a folder of the same name that belongs to somebody else
    if beside.is_dir() and (package.parent / "pyproject.toml").is_file():
        return beside
    raise UserError(
        f"cannot find the shipped {checkout}: neither {inside} nor {beside} of a source checkout exists. "
        "Reinstall the package: pip install --force-reinstall lightning-ext"
    )


def recipes_dir(package: Path = _PACKAGE) -> Path:
    """Return the folder with the recipes (``<stem>.yaml``) and the method cards (``<stem>.md``).

    Args:
        package: Folder of the package; default this one.

    Raises:
        UserError: When neither an installed nor a checkout's folder is there.
    """
    return _shipped("_recipes", "callbacks", package)


def examples_dir(package: Path = _PACKAGE) -> Path:
    """Return the folder with the examples, the demo tiles and the reproductions.

    Args:
        package: Folder of the package; default this one.

    Raises:
        UserError: When neither an installed nor a checkout's folder is there.
    """
    return _shipped("_examples", "examples", package)


def named_files(folder: Path, ending: str) -> dict[str, Path]:
    """Return ``{stem: path}``, sorted, of the files ``<stem><ending>`` in ``folder`` (``ending="_demo.py"``)."""
    paths = sorted(folder.glob(f"*{ending}"))
    return {path.name.removesuffix(ending): path for path in paths if not path.name.startswith(("_", "."))}


def choose(name: str, known: Mapping[str, _T], what: str) -> _T:
    """Return ``known[name]``.

    Args:
        name: What the user typed.
        known: The choices.
        what: What a choice is called in the message, such as ``"recipe"``.

    Raises:
        UserError: When there is no such name; names the closest and all known ones.

    >>> choose("a", {"a": 1}, "recipe")
    1
    >>> choose("mrva", {"apo": 1, "mrvae": 2}, "recipe")
    Traceback (most recent call last):
        ...
    lightning_ext._resources.UserError: unknown recipe 'mrva'. Did you mean 'mrvae'? Known: apo, mrvae.
    """
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UserError(f"unknown {what} {name!r}.{hint} Known: {', '.join(known) or 'none'}.")


def missing_extra(modules: Iterable[str | None]) -> str | None:
    """Return the sentence that says which extra brings ``modules``, or ``None`` when no extra of ours does."""
    wanted = [_EXTRAS[name] for name in dict.fromkeys(modules) if name in _EXTRAS]
    if not wanted:
        return None
    packages = " and ".join(package for package, _ in wanted)
    extras = ",".join(dict.fromkeys(extra for _, extra in wanted))
    return f'this needs {packages}: pip install "lightning-ext[{extras}]"'


def require(*modules: str) -> None:
    """Check that optional ``modules`` can be imported, without importing them.

    Raises:
        UserError: Names the missing packages and the pip command that brings them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(missing_extra(missing) or f"this needs {' and '.join(missing)}")


def load_script(path: Path, *required: str) -> ModuleType:
    """Import an example by its path.

    Args:
        path: The file.
        required: Names that the file must define.

    Raises:
        UserError: When one of ``required`` is missing, or the file needs a package that an extra of ours brings.
    """
    name = f"lightning_ext_example_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look classes up here
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        del sys.modules[name]
        sentence = missing_extra([error.name])
        if sentence is None:
            raise
        raise UserError(f"{path.name}: {sentence}") from error
    except BaseException:
        del sys.modules[name]
        raise
    absent = [wanted for wanted in required if not hasattr(module, wanted)]
    if absent:
        raise UserError(f"{path} must define {' and '.join(absent)}.")
    return module


def writable_folder(folder: Path) -> Path:
    """Create ``folder`` and prove that a file can be written in it, before any time is spent.

    Raises:
        UserError: Names the folder, the reason and the way out.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the output folder {folder}: {error.strerror or error}. Choose another with --output DIR."
        ) from error
    return folder
