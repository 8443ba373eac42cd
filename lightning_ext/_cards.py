"""Method cards: the YAML front matter of ``callbacks/<stem>.md``, read by ``lightning-ext list`` and the docs.

The format::

    ---
    method: MR-VAE
    title: Multi-Rate VAE
    paper: {authors: "Bae, Zhang, Ruan, ...", year: 2023, arxiv: "2212.03905"}
    components:
      - {kind: module, class: MultiRateVAE, logs: [train/loss], cost: "1.1 x a plain VAE step"}
      - {kind: callback, class: RateDistortionCallback, logs: [mrvae/auc], cost: "one evaluation per beta"}
    ---

All keys are required and no others are allowed. ``kind`` is one of ``callback``, ``module``, ``metric``, ``layer``,
``optimizer`` and ``data``; ``class`` is a public name of that kind's package; ``logs`` lists the logging keys and may
be empty; ``cost`` is one phrase. The file's stem is the method's name on the command line, and its recipe is the
``.yaml`` of the same stem.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ext._resources import UserError, named_files

__all__ = ["KINDS", "Card", "Component", "Paper", "read_card", "read_cards"]

KINDS = {
    "callback": "callbacks",
    "module": "modules",
    "metric": "metrics",
    "layer": "nn",
    "optimizer": "optim",
    "data": "data",
}
"""Kind of a component -> subpackage that exports it."""


@dataclass(frozen=True)
class Paper:
    """The paper behind a method."""

    authors: str
    year: int
    arxiv: str


@dataclass(frozen=True)
class Component:
    """One public class of a method."""

    kind: str
    name: str
    logs: tuple[str, ...]
    cost: str


@dataclass(frozen=True)
class Card:
    """The front matter of one method card."""

    stem: str
    method: str
    title: str
    paper: Paper
    components: tuple[Component, ...]
    recipe: Path | None


class _Reader:
    """Takes typed fields out of one mapping; every complaint names the file and the field."""

    def __init__(self, where: str, value: object, fields: Mapping[str, type]) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping with the keys {', '.join(fields)}; got {value!r}.")
        unknown = [str(key) for key in value if key not in fields]
        missing = [key for key in fields if key not in value]
        if unknown or missing:
            found = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
            raise UserError(f"{where} must have exactly the keys {', '.join(fields)}; {found}.")
        for key, kind in fields.items():
            if not isinstance(value[key], kind) or value[key] == "":
                raise UserError(f"{where}: {key} must be a non-empty {kind.__name__}; got {value[key]!r}.")
        self.value: dict[str, Any] = value


def _component(where: str, value: object) -> Component:
    fields = _Reader(where, value, {"kind": str, "class": str, "logs": list, "cost": str}).value
    if fields["kind"] not in KINDS:
        raise UserError(f"{where}: kind must be one of {', '.join(KINDS)}; got {fields['kind']!r}.")
    if not fields["class"].isidentifier():
        raise UserError(f"{where}: class must be a bare class name; got {fields['class']!r}.")
    if not all(isinstance(key, str) for key in fields["logs"]):
        raise UserError(f"{where}: logs must list logging keys; got {fields['logs']!r}.")
    return Component(fields["kind"], fields["class"], tuple(fields["logs"]), fields["cost"])


def read_card(path: Path) -> Card:
    """Read and check the front matter of one card.

    Args:
        path: ``<stem>.md``.

    Raises:
        UserError: When the front matter is missing, is not YAML or breaks the format; names the file and the field.
    """
    import yaml

    parts = path.read_text(encoding="utf-8").split("---\n", 2)
    if len(parts) != 3 or parts[0].strip():
        raise UserError(f"{path.name}: a method card starts with YAML front matter between two lines of '---'.")
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise UserError(f"{path.name}: the front matter is not valid YAML: {' '.join(str(error).split())}") from error
    fields = _Reader(path.name, front, {"method": str, "title": str, "paper": dict, "components": list}).value
    paper = _Reader(f"{path.name}: paper", fields["paper"], {"authors": str, "year": int, "arxiv": str}).value
    if not fields["components"]:
        raise UserError(f"{path.name}: components must list at least one class.")
    components = [_component(f"{path.name}: components[{i}]", item) for i, item in enumerate(fields["components"])]
    recipe = path.with_suffix(".yaml")
    return Card(
        stem=path.stem,
        method=fields["method"],
        title=fields["title"],
        paper=Paper(**paper),
        components=tuple(components),
        recipe=recipe if recipe.is_file() else None,
    )


def read_cards(folder: Path) -> list[Card]:
    """Read every card of ``folder``, in order of stem."""
    return [read_card(path) for path in named_files(folder, ".md").values() if path.stem.upper() != "README"]
