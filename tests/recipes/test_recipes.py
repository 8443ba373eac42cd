"""Every recipe trains from the command line, alone and with a file of the user's behind it."""

from pathlib import Path

import pytest

from lightning_ext.testing import assert_cli

RECIPES = sorted((Path(__file__).resolve().parents[2] / "callbacks").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(path):
    assert_cli(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_second_file_adds_to_its_callbacks(path, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "trainer:\n"
        "  callbacks+:\n"
        "    - class_path: GradientAccumulationScheduler\n"
        "      init_args: {scheduling: {0: 2}}\n"
    )
    alone = {type(callback).__name__ for callback in assert_cli(path).trainer.callbacks}
    both = {type(callback).__name__ for callback in assert_cli([path, mine]).trainer.callbacks}
    assert both == alone | {"GradientAccumulationScheduler"}
