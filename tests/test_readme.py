"""What README, documentation and method cards tell people to type works.

The ``python`` blocks of one file are executed in order and share their names, in an empty folder, with every Trainer
held to a few batches. In ``console`` and ``bash`` blocks, ``lightning-ext`` commands must parse and ``make`` targets
must exist. An HTML comment ``<!-- test: skip <reason> -->`` on the line before a block leaves it out; there is none at
present, and the last test says so.
"""

import functools
import re
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import yaml

from lightning_ext import cli
from lightning_ext._lightning import BACKEND

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "callbacks").glob("*.md")])
LIMITS = {"limit_train_batches": 2, "limit_val_batches": 2, "limit_test_batches": 2, "enable_progress_bar": False}
FENCE = re.compile(
    r"^(?:<!-- test: skip (?P<skip>.+) -->\n)?^(?P<fence>```+|:::+)(?P<kind>\S*).*\n(?P<body>(?:.*\n)*?)(?P=fence)$",
    re.MULTILINE,
)


@dataclass
class Block:
    """One fenced block of a page."""

    kind: str
    body: str
    line: int
    skip: str | None


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, each with the line on which its body starts."""
    return [
        Block(match["kind"], match["body"], text.count("\n", 0, match.start("body")), match["skip"])
        for match in FENCE.finditer(text)
    ]


def commands(page: Path) -> list[str]:
    """Return the commands of a page's shell blocks: prompts and comments removed, continued lines joined."""
    shell = [block.body for block in blocks(page.read_text(encoding="utf-8")) if block.kind in ("console", "bash")]
    lines = "".join(shell).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines]


def execute(text: str, name: str) -> dict:
    """Run the Python blocks of a page in one namespace; a traceback shows the page's own lines.

    Pages are written for ``pytorch_lightning``; where the tests run on the other package, so do the pages.
    """
    names = {"__name__": "__main__"}
    for block in blocks(text):
        if block.kind == "python" and block.skip is None:
            exec(compile("\n" * block.line + block.body.replace("pytorch_lightning", BACKEND), name, "exec"), names)
    return names


@pytest.fixture
def quick(monkeypatch):
    """Hold every Trainer of both packages to one short epoch, whatever a page asks for."""
    warnings.filterwarnings("ignore", message=".*stopped at a relative gradient")  # it had one epoch
    for trainer in (pytorch_lightning.Trainer, lightning.pytorch.Trainer):

        def limited(self, *args, __init__=trainer.__init__, **kwargs):
            __init__(self, *args, **kwargs | LIMITS | {"max_epochs": 1})

        monkeypatch.setattr(trainer, "__init__", functools.wraps(trainer.__init__)(limited))


def test_blocks_are_found():
    page = "a\n```python\nx = 1\n```\n\n<!-- test: skip needs a GPU -->\n```python\nboom\n```\n```console\n$ ls\n```\n"
    assert blocks(page) == [
        Block("python", "x = 1\n", 2, None),
        Block("python", "boom\n", 7, "needs a GPU"),
        Block("console", "$ ls\n", 10, None),
    ]
    assert execute(page, "page")["x"] == 1


def test_blocks_share_names_and_fail_on_their_own_line():
    with pytest.raises(ZeroDivisionError) as caught:
        execute("```python\nx = 0\n```\ntext\n```python\ny = 1\ny / x\n```\n", "page.md")
    entry = caught.traceback[-1]
    assert (str(entry.path), entry.lineno + 1) == ("page.md", 7)


def test_trainers_are_short(quick):
    for flavour in (pytorch_lightning, lightning.pytorch):
        trainer = flavour.Trainer(max_epochs=50, accelerator="cpu", logger=False)
        assert (trainer.max_epochs, trainer.limit_train_batches) == (1, 2)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, quick):
    execute(page.read_text(encoding="utf-8"), str(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_escapes_under_another_name(page):
    known = {"", "python", "console", "bash", "text", "yaml", "toml", "json", "bibtex", "math"}
    kinds = {block.kind for block in blocks(page.read_text(encoding="utf-8")) if not block.kind.startswith("{")}
    assert kinds <= known
    assert page.read_text(encoding="utf-8").count("```python") == sum(
        block.kind == "python" for block in blocks(page.read_text(encoding="utf-8"))
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_blocks_are_yaml(page):
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.kind == "yaml":
            assert yaml.safe_load(block.body) is not None


def arguments(command: str, monkeypatch, capsys) -> list[str]:
    """Split a ``lightning-ext`` command; ``$(lightning-ext recipe NAME)`` becomes the path that it prints."""

    def recipe(match: re.Match) -> str:
        assert cli.main(["recipe", match[1]]) == 0
        return capsys.readouterr().out.strip()

    return shlex.split(re.sub(r"\$\(lightning-ext recipe (\S+)\)", recipe, command), comments=True)[1:]


def assert_parses(args: list[str], capsys) -> None:
    """Parse without running: training commands by printing their configuration, the others by their parser."""
    if args[0] not in ("fit", "validate", "test", "predict"):
        cli._parser().parse_args(args)
        return
    try:
        code = cli.main([*args, "--print_config"])
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    assert not code, output.err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        if command.startswith("lightning-ext "):
            assert_parses(arguments(command, monkeypatch, capsys), capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for command in commands(page):
        if command.startswith("make "):
            targets = [word for word in shlex.split(command, comments=True)[1:] if "=" not in word and word[0] != "-"]
            assert set(targets) <= known, command


def test_nothing_is_skipped():
    skips = {page.name: block.skip for page in PAGES for block in blocks(page.read_text("utf-8")) if block.skip}
    assert skips == {}
