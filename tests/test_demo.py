"""The demo engine: tiles become one self-contained page, and no tile can cost another its part of it."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lightning_ext._resources import UserError
from lightning_ext.cli import main
from lightning_ext.demo import demo, tiles

GOOD = """
from matplotlib import pyplot as plt
from lightning_ext.demo import Picture, Table, Tile
import torch

TITLE = "{title}"

def tile(output_dir):
    assert output_dir.is_dir()
    line, axes = plt.subplots()
    axes.plot([0, 1], [1, 0], label="ours")
    axes.set_xlabel("rate")
    axes.legend(frameon=True, facecolor="white")
    axes.plot([0, 1], [0, 0], color="0.4", marker="o", markerfacecolor="none")
    axes.scatter([0, 1], [1, 1], color="0.05")
    axes.axvspan(0, 1, facecolor="none", edgecolor="0.4", alpha=0.5)
    axes.scatter([0, 1], [0, 1], c=[0, 1], cmap="viridis", edgecolors="white")
    image, axes = plt.subplots()
    axes.imshow(torch.rand(8, 8).numpy(), cmap="gray")
    return Tile(
        heading="Finding of {title} <&>",
        summary="One sentence.",
        tables=[
            Table(["beta", "rate"], [[0.5, torch.tensor(12.345678)], [1, float("nan")]], "Rates"),
            (["a"], [["b"]]),
        ],
        figures=[Picture("A falling line", line, alt="A line from 1 to 0"), ("Noise", image)],
        figures_of_merit={{"auc": torch.tensor(0.5), "seconds": 1}},
    )
"""


@pytest.fixture
def examples(tmp_path):
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "alpha_demo.py").write_text(GOOD.format(title="Alpha"))
    (folder / "beta_demo.py").write_text(GOOD.format(title="Beta"))
    (folder / "alpha.py").write_text("raise RuntimeError('no tile')")
    return folder


class Page(HTMLParser):
    """Collects the tags of a page and what they hold."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words = [], []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data.strip())

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def results(output="runs/demo"):
    return json.loads((Path(output) / "results.json").read_text())


def test_the_page_holds_everything_and_asks_nobody(examples, capsys):
    demo(examples=examples)
    page = Page(Path("runs/demo/index.html"))
    references = [attributes.get(key) for _, attributes in page.tags for key in ("src", "href", "srcset")]
    assert len(references) > 8
    assert all(value is None or value.startswith(("data:image/", "#")) for value in references), references
    assert not page.named("script")
    assert not page.named("link")
    assert "url(" not in page.text
    assert "@import" not in page.text
    assert [image["alt"] for image in page.named("img")] == ["A line from 1 to 0", "Noise"] * 2
    assert {"A falling line", "Noise", "Rates", "12.35", "Finding of Alpha <&>", "One sentence."} <= set(page.words)
    assert page.named("html")[0]["lang"] == "en"
    assert page.named("meta")[1]["name"] == "viewport"
    out = capsys.readouterr().out
    assert "beta   rate\n----  -----\n 0.5  12.35\n" in out
    assert "runs/demo/index.html" in out


def test_pictures_are_vectors_in_two_inks(examples):
    demo(["alpha"], examples=examples)
    page = Page(Path("runs/demo/index.html"))
    light, dark = page.named("img")[0]["src"], page.named("source")[0]["srcset"]
    assert page.named("source")[0]["media"] == "(prefers-color-scheme: dark)"
    drawn = [base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode() for uri in (light, dark)]
    assert "#1d2733" in drawn[0]
    assert "#dfe6ee" not in drawn[0]
    assert "#1d2733" not in drawn[1]
    assert "#dfe6ee" in drawn[1]
    assert "#666666" in drawn[0]
    for grey in ("#666666", "#0d0d0d", "#ffffff"):  # of a line, of points, of the legend's ground and the points' rims
        assert grey in drawn[0]
        assert grey not in drawn[1]
    for color in ("#2f7de1", "#440154", "#fde725"):  # of the line and of the mapped points
        assert color in drawn[0]
        assert color in drawn[1]
    assert "opacity: 0.5" in drawn[1]
    assert not re.search(r"fill: #\w+; opacity: 0\.5", drawn[1])  # what is clear stays clear
    for text in drawn:
        for ground in ("patch_1", "patch_2"):  # of the figure and of its axes
            assert re.search(rf'id="{ground}">.*?style="([^"]*)"', text, re.DOTALL)[1] == "fill: none"


def test_a_picture_too_large_for_vectors_becomes_pixels(examples):
    (examples / "alpha_demo.py").write_text(
        "from matplotlib.figure import Figure\nfrom lightning_ext.demo import Tile\nTITLE = 'Many'\n"
        "def tile(output_dir):\n"
        "    figure = Figure()\n"
        "    figure.add_subplot().scatter(range(20_000), range(20_000))\n"
        "    return Tile('Many points', figures=[('Points', figure)])\n"
    )
    demo(["alpha"], examples=examples)
    assert Page(Path("runs/demo/index.html")).named("img")[0]["src"].startswith("data:image/png;base64,")


def test_results_are_plain_json(examples):
    demo(["beta"], examples=examples)
    (tile,) = results()["tiles"]
    assert (tile["name"], tile["title"], tile["error"]) == ("beta", "Beta", None)
    assert tile["figures"] == {"auc": 0.5, "seconds": 1}
    assert tile["pictures"] == ["A falling line", "Noise"]
    assert tile["tables"][0]["rows"] == [[0.5, pytest.approx(12.345678)], [1, None]]
    assert tile["seconds"] >= 0
    assert results()["environment"]["versions"]["torch"] == torch.__version__


def test_one_tile_leaves_the_others_on_the_page(examples):
    demo(["beta"], examples=examples)
    assert "lightning-ext demo alpha" in Path("runs/demo/index.html").read_text()
    (examples / "beta_demo.py").write_text("TITLE = 'never run again'\ndef tile(output_dir): raise SystemExit\n")
    demo(["alpha"], examples=examples)
    page = Page(Path("runs/demo/index.html"))
    assert {"Finding of Alpha <&>", "Finding of Beta <&>"} <= set(page.words)
    assert [link["href"] for link in page.named("a")] == ["#alpha", "#beta"]
    assert "Not run yet" not in page.text
    assert [tile["name"] for tile in results()["tiles"]] == ["alpha", "beta"]


def test_a_tile_that_raises_is_shown_and_the_others_go_on(examples, capsys):
    (examples / "alpha_demo.py").write_text("TITLE = 'Bad'\ndef tile(output_dir): raise ValueError('no <data>')\n")
    parts = demo(examples=examples)
    assert [part["error"] for part in parts] == ["ValueError: no <data>", None]
    page = Page(Path("runs/demo/index.html"))
    assert "This tile failed: ValueError: no <data>" in page.words
    assert "Finding of Beta <&>" in page.words
    out, err = capsys.readouterr()
    assert re.search(r"alpha failed after \d+ s: ValueError: no <data>", out)
    assert "Traceback" in err


def test_the_page_style_does_not_leak(examples):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    demo(["alpha"], examples=examples)
    after = dict(mpl.rcParams)
    assert {key for key in before if before[key] != after[key]} <= {"backend"}
    assert not mpl.pyplot.get_fignums()


def test_an_interruption_keeps_the_finished_tiles(examples):
    (examples / "beta_demo.py").write_text("TITLE = 'Slow'\ndef tile(output_dir): raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        demo(examples=examples)
    assert "Finding of Alpha" in Path("runs/demo/index.html").read_text()
    assert [tile["name"] for tile in results()["tiles"]] == ["alpha"]


@pytest.fixture
def shipped(examples, monkeypatch):
    monkeypatch.setattr("lightning_ext.demo.examples_dir", lambda: examples)


@pytest.mark.usefixtures("shipped")
def test_exit_codes_of_the_command(examples, capsys):
    assert main(["demo", "alpha", "--output", "elsewhere"]) == 0
    assert Path("elsewhere/index.html").is_file()
    (examples / "beta_demo.py").write_text("TITLE = 'Bad'\ndef tile(output_dir): raise ValueError('no data')\n")
    assert main(["demo", "--output", "elsewhere"]) == 1
    capsys.readouterr()
    assert main(["demo", "alhpa"]) == 2
    assert capsys.readouterr().err == (
        "lightning-ext: error: unknown demo 'alhpa'. Did you mean 'alpha'? Known: alpha, beta.\n"
    )


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("command", ["demo", "reproduce"])
def test_an_unwritable_folder_is_refused_before_anything_runs(examples, capsys, command):
    never = "raise AssertionError('ran')\n"
    (examples / "alpha_demo.py").write_text("TITLE = 'x'\ndef tile(output_dir): " + never)
    (examples / "alpha_reproduce.py").write_text(never)
    Path("file").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_ext.reproduce.examples_dir", lambda: examples)
        assert main([command, "alpha", "--output", "file/below"]) == 2
    assert capsys.readouterr().err == (
        "lightning-ext: error: cannot write to the output folder file/below: Not a directory. "
        "Choose another with --output DIR.\n"
    )


def test_a_folder_on_a_read_only_disk_is_refused(examples, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot write to the output folder runs/demo: Permission denied\."):
        demo(["alpha"], examples=examples)
    assert not Path("runs/demo/index.html").exists()


def test_a_tile_without_its_parts_or_its_packages_is_named_before_anything_runs(examples, monkeypatch):
    (examples / "beta_demo.py").write_text("TITLE = 'x'\n")
    with pytest.raises(UserError, match=r"beta_demo\.py must define tile\."):
        demo(examples=examples)
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    (examples / "beta_demo.py").write_text("import sklearn\n")
    with pytest.raises(
        UserError, match=r'beta_demo.py: this needs scikit-learn: pip install "lightning-ext\[examples\]"'
    ):
        demo(examples=examples)
    assert not Path("runs/demo/index.html").exists()


def test_shipped_tiles_can_be_listed_and_loaded():
    from lightning_ext._resources import load_script

    assert "mrvae" in tiles()
    for path in tiles().values():
        assert load_script(path, "TITLE", "tile").TITLE
