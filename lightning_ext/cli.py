"""The command ``lightning-ext``: training through LightningCLI, and list, recipe, demo and reproduce.

Only the standard library is imported here; a sub-command imports what it needs when it runs, so that ``list``,
``recipe``, ``--help`` and ``--version`` answer at once and do without the optional extras.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_ext.__about__ import __version__
from lightning_ext._cards import Card, read_cards
from lightning_ext._report import text_table
from lightning_ext._resources import (
    UserError,
    choose,
    examples_dir,
    missing_extra,
    named_files,
    recipes_dir,
    require,
)

__all__ = ["main"]

_TRAINING = {
    "fit": "train a model",
    "validate": "run one evaluation epoch over the validation set",
    "test": "run one evaluation epoch over the test set",
    "predict": "run inference",
}
_EPILOG = """\
training: LightningCLI with every class of the library known by its bare name
  lightning-ext fit --config "$(lightning-ext recipe mrvae)"
  lightning-ext fit --config base.yaml --config extra.yaml --trainer.callbacks+=RateDistortionCallback
  lightning-ext fit --help

exit codes: 0 done (a claim that failed is a result, not an error), 1 a tile or a measurement crashed, 2 wrong usage
"""


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as an exception, so that it becomes one line and a return value."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see: {self.prog} --help)")


def _stems(ending: str) -> str:
    try:
        return ", ".join(named_files(examples_dir(), ending)) or "none yet"
    except UserError:
        return "none found"


def _parser() -> _Parser:
    parser = _Parser(
        prog="lightning-ext",
        description="Research papers as PyTorch Lightning components.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lightning-ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in _TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)

    listing = commands.add_parser("list", help="list methods, classes, recipes, what they log and what they cost")
    listing.add_argument("--json", action="store_true", help="print JSON")

    recipe = commands.add_parser("recipe", help="print the path of a method's recipe")
    recipe.add_argument("name", metavar="NAME")

    demo = commands.add_parser("demo", help="train small examples and write a page with the results")
    demo.add_argument("names", nargs="*", metavar="NAME", help=f"tiles to run, default all: {_stems('_demo.py')}")
    demo.add_argument("--output", default="runs/demo", metavar="DIR", help="default: %(default)s")

    reproduce = commands.add_parser("reproduce", help="check a paper's claims and print the table")
    reproduce.add_argument("name", metavar="NAME", help=_stems("_reproduce.py"))
    reproduce.add_argument("--full", action="store_true", help="the large experiments too; hours, wants a GPU")
    reproduce.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    reproduce.add_argument("--output", default="runs/reproduce", metavar="DIR", help="default: %(default)s")
    reproduce.add_argument("--data", metavar="DIR", help="folder with data that is already on this machine")
    return parser


def _card_json(card: Card) -> dict[str, Any]:
    return {
        "name": card.stem,
        "method": card.method,
        "title": card.title,
        "paper": {"authors": card.paper.authors, "year": card.paper.year, "arxiv": card.paper.arxiv},
        "recipe": None if card.recipe is None else str(card.recipe),
        "components": [
            {"kind": part.kind, "class": part.name, "logs": list(part.logs), "cost": part.cost}
            for part in card.components
        ],
    }


def _list(as_json: bool) -> int:
    cards = read_cards(recipes_dir())
    if as_json:
        print(json.dumps([_card_json(card) for card in cards], indent=2))
        return 0
    rows = [
        [card.method, part.kind, part.name, card.stem if card.recipe else None, ", ".join(part.logs) or None, part.cost]
        for card in cards
        for part in card.components
    ]
    print(text_table(["method", "kind", "class", "recipe", "logs", "relative cost"], rows))
    return 0


def _recipe(name: str) -> int:
    print(choose(name, named_files(recipes_dir(), ".yaml"), "recipe"))
    return 0


def _demo(names: Sequence[str], output: str) -> int:
    require("jinja2", "matplotlib")
    from lightning_ext.demo import demo

    return int(any(part["error"] for part in demo(names, output=output)))


def _reproduce(options: argparse.Namespace) -> int:
    require("matplotlib")
    from lightning_ext.reproduce import reproduce

    rows = reproduce(
        options.name,
        full=options.full,
        seeds=options.seeds,
        output=options.output,
        data_dir=None if options.data is None else Path(options.data),
    )
    return int(any("error" in row for row in rows))


def _train(args: Sequence[str]) -> int:
    require("jsonargparse")
    from lightning_ext._training import train

    train(args)
    return 0


def _dispatch(args: Sequence[str]) -> int:
    parser = _parser()
    commands = [*_TRAINING, "list", "recipe", "demo", "reproduce"]
    if not args:
        parser.print_help()
        return 0
    if not args[0].startswith("-"):
        choose(args[0], dict.fromkeys(commands), "command")
    if args[0] in _TRAINING:
        return _train(args)
    options = parser.parse_args(args)
    if options.command == "list":
        return _list(options.json)
    if options.command == "recipe":
        return _recipe(options.name)
    if options.command == "demo":
        return _demo(options.names, options.output)
    return _reproduce(options)


def _fail(message: str) -> int:
    print("lightning-ext: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        args: Command line without the program's name; default ``sys.argv[1:]``.

    Returns:
        Exit code: 0 done, 1 a demo tile or a measurement crashed, 2 wrong usage (one line on stderr), 130 interrupted.

    >>> main(["recipe", "no-such-method"])
    2
    """
    try:
        code = _dispatch(sys.argv[1:] if args is None else list(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `lightning-ext list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        sentence = missing_extra([error.name])
        if sentence is None:
            raise
        return _fail(sentence)
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("lightning-ext: interrupted; what was finished is kept.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
