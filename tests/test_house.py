"""The layout holds: imports go down, names are exported once, every method has all its parts, extras stay optional."""

import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lightning_ext._lightning import BACKEND

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_ext"
KINDS = ("callbacks", "data", "functional", "metrics", "modules", "nn", "optim")
STEMS = sorted(path.stem for path in (ROOT / "callbacks").glob("*.yaml"))
FILES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    """Run the contracts of pyproject.toml over the package in ``folder``."""
    run = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run([sys.executable, "-c", run], cwd=folder, capture_output=True, text=True, timeout=120)


def test_imports_only_go_down():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("functional/mrvae.py", "import pytorch_lightning", "Only _lightning.py imports Lightning"),
        ("functional/mrvae.py", "import lightning_ext._lightning", "functional, nn, metrics and optim do without"),
        ("functional/mrvae.py", "import torchmetrics", "functional imports torch only"),
        ("functional/mrvae.py", "import lightning_ext.nn", "Imports only go down"),
        ("nn/mrvae.py", "import lightning_ext.modules", "Imports only go down"),
        ("nn/mrvae.py", "import lightning_ext.metrics", "Imports only go down"),
        ("modules/planted.py", "import lightning_ext.callbacks", "Imports only go down"),
        ("callbacks/planted.py", "from pytorch_lightning import Callback", "Only _lightning.py imports Lightning"),
        ("callbacks/planted.py", "def f():\n    import lightning.pytorch", "Only _lightning.py imports Lightning"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, file, line, contract):
    shutil.copytree(PACKAGE, tmp_path / "lightning_ext", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / "lightning_ext" / file
    target.write_text(f"{target.read_text() if target.exists() else ''}\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout
    broken = [entry for entry in result.stdout.splitlines() if entry.endswith("BROKEN")]
    assert any(entry.startswith(contract) for entry in broken), result.stdout


def test_the_contracts_cover_every_kind_that_does_without_lightning():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    covered = next(entry["source_modules"] for entry in contracts if entry["name"].endswith("do without Lightning"))
    kinds = [kind for kind in ("functional", "nn", "metrics", "optim") if (PACKAGE / kind).is_dir()]
    assert covered == [f"lightning_ext.{kind}" for kind in kinds]


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").glob("*.py")), ids=lambda path: path.name)
def test_functional_imports_only_torch_and_the_standard_library(path):
    allowed = {"torch", "lightning_ext"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        assert not {name.split(".")[0] for name in names} - allowed, ast.unparse(node)


@pytest.mark.parametrize("kind", KINDS)
def test_public_names_are_declared_and_live_where_they_are_exported(kind):
    package = importlib.import_module(f"lightning_ext.{kind}")
    assert package.__all__ == sorted(set(package.__all__), key=package.__all__.index), "a name stands twice"
    for name in package.__all__:
        thing = getattr(package, name)
        home = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", f"lightning_ext.{kind}")
        assert home.startswith(f"lightning_ext.{kind}"), f"{name} belongs to {home}"
        assert inspect.getdoc(thing), f"{name} has no docstring"


def test_a_public_name_is_exported_by_one_kind_only():
    owners = {}
    for kind in KINDS:
        for name in importlib.import_module(f"lightning_ext.{kind}").__all__:
            owners.setdefault(name, []).append(kind)
    assert not {name: kinds for name, kinds in owners.items() if len(kinds) > 1}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_declares_public_is_exported_by_its_kind(kind):
    exported = set(importlib.import_module(f"lightning_ext.{kind}").__all__)
    for path in sorted((PACKAGE / kind).glob("[a-z]*.py")):
        module = importlib.import_module(f"lightning_ext.{kind}.{path.stem}")
        # aliases of types are written by people who read the file, classes and functions by everybody
        declared = {
            name for name in module.__all__ if inspect.isroutine(thing := vars(module)[name]) or inspect.isclass(thing)
        }
        assert declared <= exported, f"{path.name} declares {declared - exported}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_one_room(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 450
    assert path.name not in {"utils.py", "helpers.py", "common.py", "base.py"}, "name it after what is in it"


def test_there_is_a_method():
    assert "mrvae" in STEMS


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(
    "part",
    [
        "callbacks/{}.md",
        "examples/{}.py",
        "examples/{}_demo.py",
        "examples/{}_reproduce.py",
        "benchmarks/{}.py",
        "benchmarks/results/{}.json",
        "lightning_ext/functional/{}.py",
        "tests/functional/test_{}.py",
    ],
)
def test_a_method_has_all_its_parts(stem, part):
    assert (ROOT / part.format(stem)).is_file(), f"{part.format(stem)} is missing"


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_file_offers_is_used_by_the_tests_of_its_kind(kind):
    exported = set(importlib.import_module(f"lightning_ext.{kind}").__all__)
    tested = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / kind).glob("test_*.py"))
    words = set(re.findall(r"\w+", tested))
    for path in sorted((PACKAGE / kind).glob("[a-z]*.py")):
        offered = exported & set(importlib.import_module(f"lightning_ext.{kind}.{path.stem}").__all__)
        assert not offered or offered & words, f"no test in tests/{kind} names anything of {path.name}"


def test_each_card_stands_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for stem in STEMS:
        assert f"callbacks/{stem}.yaml" in readme
        assert f"callbacks/{stem}.md" in readme


def test_the_version_is_the_same_everywhere():
    version = importlib.import_module("lightning_ext").__version__
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


IMPORT = '''
import importlib, json, sys

class Without:
    """A finder that finds neither the code nor the metadata of some packages."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {absent} else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        finds = getattr(self.finder, "find_distributions", lambda context: [])
        return [] if context.name in {absent} else finds(context)

sys.meta_path[:] = map(Without, sys.meta_path)
for name in {names}:
    importlib.import_module(name)
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
'''


def imported(names: list[str], absent: tuple[str, ...] = ()) -> set[str]:
    """Import ``names`` in a new process; return the top-level modules it loaded."""
    code = IMPORT.format(names=names, absent=absent)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout.splitlines()[-1])
    return {name for name in modules if name not in sys.stdlib_module_names and not name.startswith("_")}


EXTRAS = ("matplotlib", "jsonargparse", "sklearn", "scikit-learn", "scipy", "jinja2", "tensorboard", "pythae")


def test_import_needs_no_extra_and_loads_nothing_but_torch_and_lightning():
    ours = ["lightning_ext", *(f"lightning_ext.{kind}" for kind in KINDS), "lightning_ext.testing"]
    assert imported(ours, EXTRAS) - imported(["torch", BACKEND], EXTRAS) == {"lightning_ext"}


def test_the_bare_package_imports_nothing():
    assert imported(["lightning_ext"]) - imported([]) == {"lightning_ext"}
