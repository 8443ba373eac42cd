"""The command: sub-commands of LightningCLI with our classes by bare name, list, recipe, and every wrong use."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_ext
from lightning_ext import _resources, cli
from lightning_ext._cards import KINDS, read_card, read_cards
from lightning_ext._resources import UserError, examples_dir, recipes_dir
from lightning_ext.cli import main

PACKAGE = Path(lightning_ext.__file__).parent
CARD = """---
method: Toy
title: A toy method
paper: {authors: "A. Author", year: 2020, arxiv: "2001.00001"}
components:
  - {kind: module, class: ToyModule, logs: [train/loss, toy/x], cost: "1.1 x a plain step"}
  - {kind: callback, class: ToyMark, logs: [], cost: none}
---
# Toy
---
text after a rule
"""
COMPONENTS = """
import torch
from lightning_ext._lightning import Callback, LightningDataModule, LightningModule
from lightning_ext.benchmark import paired_ratio

__all__ = ["ToyData", "ToyMark", "ToyModule"]


class ToyModule(LightningModule):
    def __init__(self, width: int = 2, repeats: int = 2, accident: bool = False):
        super().__init__()
        paired_ratio(int, int, repeats=repeats, clock=iter(range(99)).__next__)
        if accident:
            raise ValueError("somebody else's bug")
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).pow(2).mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.layer(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ToyData(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class ToyMark(Callback):
    def __init__(self, mark: str = "default", repeats: int = 2):
        paired_ratio(int, int, repeats=repeats, clock=iter(range(99)).__next__)
        self.mark = mark

    @property
    def state_key(self):
        return f"ToyMark{self.mark}"

    def setup(self, trainer, pl_module, stage):
        with open("marks.txt", "a") as file:
            print(stage.value, self.mark, torch.initial_seed(), file=file)
"""
BASE = {
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "callbacks": [{"class_path": "ToyMark", "init_args": {"mark": "base"}}],
    },
    "model": {"class_path": "ToyModule"},
    "data": {"class_path": "ToyData"},
}


@pytest.fixture(scope="module")
def _planted(tmp_path_factory):
    """A subpackage of lightning_ext that no list in the library knows."""
    root = tmp_path_factory.mktemp("planted")
    (root / "toykind").mkdir()
    (root / "toykind" / "__init__.py").write_text(COMPONENTS)
    lightning_ext.__path__.append(str(root))
    yield
    lightning_ext.__path__.remove(str(root))


@pytest.fixture
def config(_planted, tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return str(path)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of recipes and cards that the command takes for the shipped one."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / "toy.md").write_text(CARD)
    (folder / "toy.yaml").write_text("trainer: {}\n")
    monkeypatch.setattr(cli, "recipes_dir", lambda: folder)
    return folder


def fails(capsys, *args):
    """Run the command, expect wrong usage, and return its one line on stderr."""
    capsys.readouterr()
    assert main(list(args)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lightning-ext: error: ")
    assert err.count("\n") == 1
    return err


def marks():
    return [line.split() for line in Path("marks.txt").read_text().splitlines()]


@pytest.mark.parametrize(("command", "stage"), [("fit", "fit"), ("validate", "validate"), ("test", "test")])
def test_every_component_is_known_by_its_bare_name(config, command, stage):
    assert main([command, "--config", config]) == 0
    assert marks() == [[stage, "base", "42"]]


def test_predict_runs(config):
    assert main(["predict", "--config", config, "--return_predictions=false", "--seed_everything=7"]) == 0
    assert marks() == [["predict", "base", "7"]]


def test_configs_compose_and_callbacks_append(config, tmp_path):
    extra = tmp_path / "extra.yaml"
    callback = {"class_path": "ToyMark", "init_args": {"mark": "extra"}}
    extra.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    line = ["--trainer.callbacks+=ToyMark", "--trainer.callbacks.mark=line"]
    assert main(["fit", "--config", config, "--config", str(extra), *line]) == 0
    assert [mark for _, mark, _ in marks()] == ["base", "extra", "line"]


def test_a_module_of_the_user_is_taken_by_import_path(config, tmp_path, monkeypatch):
    source = "from lightning_ext.toykind import ToyModule\nclass Mine(ToyModule):\n    pass\n"
    (tmp_path / "users_own_code.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["fit", "--config", config, "--model=users_own_code.Mine"]) == 0


def test_a_second_run_into_the_same_folder_is_allowed(config):
    assert main(["fit", "--config", config]) == 0
    assert main(["fit", "--config", config]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.max_epochs=many"], r'"trainer.max_epochs".*many'),
        (["--model.widht=3"], "widht"),
        (["--trainer.callbacks+=NoSuchCallback"], "NoSuchCallback"),
        (["--config=nowhere.yaml"], "File does not exist.*nowhere.yaml"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (["--trainer.devices=0"], "devices"),
        (["--model.repeats=1"], r"error: repeats must be at least 2, for a spread; got 1\.$"),
        (["--trainer.callbacks.repeats=1"], r"error: repeats must be at least 2, for a spread; got 1\.$"),
    ],
)
def test_a_wrong_configuration_is_one_line(config, capsys, args, message):
    assert re.search(message, fails(capsys, "fit", "--config", config, *args))


def test_an_accident_in_foreign_code_keeps_its_traceback(config):
    with pytest.raises(ValueError, match="somebody else's bug"):
        main(["fit", "--config", config, "--model.accident=true"])


def test_list_shows_every_component(shelf, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["method", "kind", "class", "recipe", "logs", "relative cost"]
    assert cells[2] == ["Toy", "module", "ToyModule", "toy", "train/loss, toy/x", "1.1 x a plain step"]
    assert cells[3] == ["Toy", "callback", "ToyMark", "toy", "-", "none"]


def test_list_json(shelf, capsys):
    (shelf / "toy.yaml").unlink()
    assert main(["list", "--json"]) == 0
    (card,) = json.loads(capsys.readouterr().out)
    assert (card["name"], card["recipe"], card["paper"]["arxiv"]) == ("toy", None, "2001.00001")
    assert [part["class"] for part in card["components"]] == ["ToyModule", "ToyMark"]


def test_recipe_prints_the_path_alone(shelf, capsys):
    assert main(["recipe", "toy"]) == 0
    assert capsys.readouterr().out == f"{shelf / 'toy.yaml'}\n"


@pytest.mark.usefixtures("shelf")
def test_unknown_names_suggest_the_closest(capsys):
    assert "unknown recipe 'toi'. Did you mean 'toy'? Known: toy." in fails(capsys, "recipe", "toi")
    assert "unknown command 'fti'. Did you mean 'fit'?" in fails(capsys, "fti")
    assert "the following arguments are required: NAME" in fails(capsys, "recipe")
    assert "unrecognized arguments: --jsn" in fails(capsys, "list", "--jsn")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("---\nmethod", "method", "toy.md: a method card starts with YAML front matter"),
        ("title: A", "title: [", "toy.md: the front matter is not valid YAML"),
        ("method: Toy", "method: ''", "toy.md: method must be a non-empty str"),
        ("title: A toy method\n", "", "missing: title"),
        ("title:", "colour: red\ntitle:", "unknown: colour"),
        ("year: 2020", "year: soon", "toy.md: paper: year must be a non-empty int; got 'soon'"),
        ("kind: module", "kind: gadget", r"components\[0\]: kind must be one of callback, module"),
        ("class: ToyMark", "class: toy.ToyMark", r"components\[1\]: class must be a bare class name"),
        ("logs: []", "logs: [1]", r"components\[1\]: logs must list logging keys"),
        ("cost: none", "", r"components\[1\] must have exactly .*; missing: cost"),
    ],
)
def test_a_broken_card_is_named(tmp_path, old, new, message):
    assert old in CARD
    (tmp_path / "toy.md").write_text(CARD.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_card(tmp_path / "toy.md")


def test_shipped_cards_are_sound_and_complete():
    cards = read_cards(recipes_dir())
    assert cards
    for card in cards:
        assert card.recipe is not None, f"{card.stem}.md has no {card.stem}.yaml"
        for part in card.components:
            package = importlib.import_module(f"lightning_ext.{KINDS[part.kind]}")
            assert part.name in package.__all__, f"{card.stem}.md lists {part.name}"


def test_resources_of_a_wheel_of_a_checkout_and_of_neither(tmp_path):
    package = tmp_path / "lightning_ext"
    package.mkdir()
    (tmp_path / "callbacks").mkdir()
    with pytest.raises(UserError, match=r"cannot find the shipped callbacks.*Reinstall"):
        recipes_dir(package)  # a folder of that name in site-packages is somebody else's
    (tmp_path / "pyproject.toml").touch()
    assert recipes_dir(package) == tmp_path / "callbacks"
    (package / "_recipes").mkdir()
    (package / "_examples").mkdir()
    assert recipes_dir(package) == package / "_recipes"
    assert examples_dir(package) == package / "_examples"


@pytest.mark.parametrize(
    ("absent", "args", "command"),
    [
        ({"jsonargparse"}, ["fit"], 'this needs jsonargparse: pip install "lightning-ext[cli]"'),
        ({"jinja2", "matplotlib"}, ["demo"], 'this needs jinja2 and matplotlib: pip install "lightning-ext[cli,plot]"'),
        ({"matplotlib"}, ["reproduce", "x"], 'this needs matplotlib: pip install "lightning-ext[plot]"'),
    ],
)
def test_a_missing_extra_is_one_line(monkeypatch, capsys, absent, args, command):
    found = importlib.util.find_spec
    monkeypatch.setattr(_resources.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    assert command in fails(capsys, *args)


def run(*args, cwd=None):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, *args], env=environment, capture_output=True, text=True, timeout=120, check=False, cwd=cwd
    )


def test_the_console_command_runs():
    done = run("-m", "lightning_ext.cli", "--version")
    assert (done.returncode, done.stdout) == (0, f"lightning-ext {lightning_ext.__version__}\n")
    done = run("-m", "lightning_ext.cli", "recipe", "none")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_light_commands_import_neither_torch_nor_an_extra():
    script = (
        "import sys; from lightning_ext.cli import main\n"
        "codes = [main([a]) for a in ('list', '--help', '--version')] + [main(['recipe', 'none'])]\n"
        "heavy = {'torch', 'numpy', 'pytorch_lightning', 'lightning', 'jsonargparse', 'jinja2', 'matplotlib'}\n"
        "sys.exit(f'{codes} {heavy & set(sys.modules)}' if codes != [0, 0, 0, 2] or heavy & set(sys.modules) else 0)"
    )
    done = run("-c", script)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command_and_no_arguments_means_help(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == text
    for name in ("fit", "validate", "test", "predict", "list", "recipe", "demo", "reproduce"):
        assert f"    {name}" in text


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{shlex.quote(sys.executable)} -m lightning_ext.cli list | head -1"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
