"""The wheel has everything in it and works away from the source tree."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=150, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel from a copy of what a clone has, without network: hatchling is in the environment."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("lightning_ext", "callbacks", "examples"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", output, source)
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Unpack the wheel as pip does, where nothing of the source tree is."""
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def shipped(folder: str, *endings: str) -> set[str]:
    return {path.name for path in (ROOT / folder).iterdir() if path.suffix in endings}


def test_the_wheel_has_recipes_cards_examples_and_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()

    def inside(folder):
        return {name.removeprefix(folder) for name in names if name.startswith(folder)}

    recipes = shipped("callbacks", ".yaml", ".md")
    assert "mrvae.yaml" in recipes
    assert recipes <= inside("lightning_ext/_recipes/")
    assert shipped("examples", ".py") <= inside("lightning_ext/_examples/")
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_ext").rglob("*.py")}
    assert sources <= set(names)
    assert "lightning_ext/py.typed" in names


def test_the_wheel_has_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_ext"}
    assert not [name for name in names if name.endswith((".pyc", ".ckpt", ".png~"))]


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    entry_points = archive.read(f"{folder}/entry_points.txt").decode().split("\n")
    assert entry_points[:2] == ["[console_scripts]", "lightning-ext = lightning_ext.cli:main"]
    metadata = archive.read(f"{folder}/METADATA").decode().splitlines()
    assert "License-Expression: Apache-2.0" in metadata
    lightning = next(line for line in metadata if line.startswith("Requires-Dist: pytorch-lightning"))
    assert "!=2.6.2" in lightning
    assert "!=2.6.3" in lightning
    assert {"cli", "plot", "examples", "ksg", "all"} == {
        line.removeprefix("Provides-Extra: ") for line in metadata if line.startswith("Provides-Extra")
    }


def test_the_command_works_away_from_the_source(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = installed / "bin" / "lightning-ext"
    assert "MR-VAE" in run(command, "list", env=environment, cwd=tmp_path)
    recipe = Path(run(command, "recipe", "mrvae", env=environment, cwd=tmp_path).strip())
    assert recipe == installed / "lightning_ext" / "_recipes" / "mrvae.yaml"
    assert recipe.read_bytes() == (ROOT / "callbacks" / "mrvae.yaml").read_bytes()


def test_the_installed_recipe_trains(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    recipe = installed / "lightning_ext" / "_recipes" / "mrvae.yaml"
    command = [installed / "bin" / "lightning-ext", "fit", "--config", recipe, "--trainer.fast_dev_run", "true"]
    run(*command, env=environment, cwd=tmp_path)
