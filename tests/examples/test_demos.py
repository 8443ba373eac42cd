"""Every demo tile runs and gives the page something to show. The gallery scripts are executed by the docs build."""

import json
import os
from pathlib import Path

import pytest

from lightning_ext._resources import load_script
from lightning_ext.demo import demo

ROOT = Path(__file__).resolve().parents[2]
TILES = sorted((ROOT / "examples").glob("*_demo.py"))
SHORT = {
    "apo": {"EPOCHS": 2},
    "influence": {"NUM_TRAIN": 200, "FLIPPED": 20},
    "laftr": {"EPOCHS": 1},
    "mrvae": {"EPOCHS": 2},
    "mutual_information": {"EPOCHS": 15, "PAIRS": 8, "CHAINS": 2, "SAMPLES": (10, 100, 1000), "STEPS": (5, 10)},
}

pytestmark = pytest.mark.skipif(
    os.environ.get("LIGHTNING_EXT_BACKEND", "pytorch_lightning") != "pytorch_lightning",
    reason="examples are written for pytorch_lightning, as most users have it",
)


@pytest.mark.parametrize("path", TILES, ids=lambda path: path.stem)
def test_a_tile_runs_short(path, tmp_path):
    script = load_script(path)
    stem = path.stem.removesuffix("_demo")
    for name, value in SHORT[stem].items():
        assert hasattr(script, name)
        setattr(script, name, value)
    tile = script.tile(tmp_path)
    assert tile.heading
    assert all(picture.alt and picture.figure.axes for picture in tile.figures)
    assert all(len(row) == len(table.header) for table in tile.tables for row in table.rows)
    assert all(value == value for value in tile.figures_of_merit.values())


def test_the_issue_s_table_is_on_the_page(tmp_path, monkeypatch):
    copy = tmp_path / "examples"
    copy.mkdir()
    text = (ROOT / "examples" / "mrvae_demo.py").read_text().replace("EPOCHS = 300", "EPOCHS = 1")
    (copy / "mrvae_demo.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    demo(["mrvae"], examples=copy)
    page = (tmp_path / "runs" / "demo" / "index.html").read_text()
    for word in ("beta", "R, MR-VAE", "D, beta-VAE", "loss, MR-VAE", "loss, beta-VAE", "seconds"):
        assert word in page
    tiles = json.loads((tmp_path / "runs" / "demo" / "results.json").read_text())
    assert "runs_cost_ratio" in json.dumps(tiles)
