"""The engine of ``lightning-ext demo``: runs tiles and keeps one self-contained page of their results.

A tile is one small file, ``examples/<stem>_demo.py``::

    from lightning_ext.demo import Picture, Table, Tile

    TITLE = "MR-VAE: one training run, every beta"


    def tile(output_dir):
        ...  # train with an ordinary Trainer; its progress bar shows
        return Tile(
            heading="One run draws the whole rate-distortion curve",
            summary="Trained for 40 s on 1,797 digits, against four separate beta-VAEs.",
            tables=[Table(["beta", "rate (nats)"], rows)],
            figures=[Picture("Rate against distortion", figure, alt="The curve passes through all four points.")],
            figures_of_merit={"seconds": 41.2, "auc": 0.93},
        )

Figures are drawn under the page's own style (``PAGE_STYLE``) and stand on the page twice, with dark ink and with light,
as inline pictures. Each tile's rendered part is kept in ``<output>/tiles/<stem>.json``: running one tile renews only
its part of the page.
"""

import base64
import io
import json
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_ext._lightning import submodule
from lightning_ext._report import format_cell, plain, text_table, write_json
from lightning_ext._resources import choose, examples_dir, load_script, named_files, require, writable_folder
from lightning_ext.benchmark import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAGE_STYLE", "EpochBar", "Picture", "Table", "Tile", "demo", "tiles"]

_LIGHT_INK, _DARK_INK, _DARK_CARD = "#1d2733", "#dfe6ee", "#18202a"  # as in the template
_INK_LEVEL = 0.18  # brightness up to which a grey counts as full ink
_GREY = 0.15  # spread of the channels up to which a colour counts as grey
_SVG_LIMIT = 400_000  # bytes; beyond it a picture of pixels is the smaller one

PAGE_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _LIGHT_INK,
    "axes.grid": True,
    "axes.labelcolor": _LIGHT_INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.figsize": (6.4, 4.0),
    "font.size": 11,
    "grid.alpha": 0.25,
    "grid.color": "#8a97a6",
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "svg.hashsalt": "lightning_ext",
    "text.color": _LIGHT_INK,
    "xtick.color": _LIGHT_INK,
    "ytick.color": _LIGHT_INK,
}
"""Matplotlib settings in force while a tile runs."""
_PALETTE = ("#2f7de1", "#f2762e", "#14a37f", "#d6456b", "#8f63e0", "#c79a12")  # told apart on white and on near-black


class EpochBar(submodule("callbacks").TQDMProgressBar):  # type: ignore[misc]
    """Lightning's bar, counting epochs under a name of its own: hundreds of short epochs share one line.

    Args:
        name: what stands before the bar.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_start(self, trainer: Any, *args: Any) -> None:
        """Count to the number of epochs."""
        super().on_train_start(trainer, *args)
        self.train_progress_bar.reset(trainer.max_epochs)
        self.train_progress_bar.set_description(self.name)

    def on_train_epoch_start(self, *args: Any) -> None:
        """Keep the line."""

    def on_train_batch_end(self, *args: Any) -> None:
        """Keep the line."""

    def on_train_epoch_end(self, *args: Any) -> None:
        """Count."""
        self.train_progress_bar.update(1)


class Table(NamedTuple):
    """A table on the page and in the terminal."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""


class Picture(NamedTuple):
    """A matplotlib figure with its caption; ``alt`` says in words what the picture shows (default: the caption)."""

    caption: str
    figure: "Figure"
    alt: str = ""


@dataclass(frozen=True)
class Tile:
    """What a tile shows.

    Attributes:
        heading: The finding, as a headline.
        summary: One or more sentences.
        tables: Tables, or plain ``(header, rows)`` tuples.
        figures: Pictures, or plain ``(caption, figure)`` tuples.
        figures_of_merit: Numbers by name, kept in ``results.json``.
    """

    heading: str
    summary: str | Sequence[str] = ()
    tables: Sequence[Table | tuple[Any, ...]] = ()
    figures: Sequence[Picture | tuple[Any, ...]] = ()
    figures_of_merit: Mapping[str, Any] = field(default_factory=dict)


def tiles(examples: Path | None = None) -> dict[str, Path]:
    """Return ``{stem: path}`` of the tiles in ``examples`` (default: the shipped ones)."""
    return named_files(examples or examples_dir(), "_demo.py")


def _data_uri(figure: "Figure") -> str:
    """Draw a figure with a clear background: as vectors, or as pixels where vectors would be the larger file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=200, transparent=True, metadata={"Date": None})
    kind = "svg+xml"
    if buffer.tell() > _SVG_LIMIT:
        buffer, kind = io.BytesIO(), "png"
        figure.savefig(buffer, format="png", dpi=200, transparent=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _on_dark(color: Any) -> Any:
    """Mirror a grey from ink on paper to ink on the dark card; colours, and what is clear, stay as they are."""
    from matplotlib.colors import to_rgb, to_rgba

    red, green, blue, alpha = rgba = to_rgba(color)
    if alpha == 0:
        return "none"  # numbers would become visible on a patch that has an alpha of its own
    if max(red, green, blue) - min(red, green, blue) > _GREY:
        return rgba
    paper = min(1.0, max(0.0, ((red + green + blue) / 3 - _INK_LEVEL) / (1 - _INK_LEVEL)))
    mixed = [ink + paper * (card - ink) for ink, card in zip(to_rgb(_DARK_INK), to_rgb(_DARK_CARD), strict=True)]
    return (*mixed, alpha)


def _use_light_ink(figure: "Figure") -> None:
    """Redraw a figure's greys, black and white included, for the dark page; mapped data and pictures keep theirs."""
    from matplotlib.collections import Collection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    parts = {
        Text: ("color",),
        Line2D: ("color", "markerfacecolor", "markeredgecolor"),
        Patch: ("edgecolor", "facecolor"),
    }
    for artist in figure.findobj():
        names = next((names for kind, names in parts.items() if isinstance(artist, kind)), ())
        # read all before writing any: a marker's colour may follow the line's
        colors = [(name, _on_dark(getattr(artist, f"get_{name}")())) for name in names]
        for name, color in colors:
            getattr(artist, f"set_{name}")(color)
        if isinstance(artist, Collection):
            artist.set_edgecolor([_on_dark(color) for color in artist.get_edgecolor()])
            artist.set_facecolor([_on_dark(color) for color in artist.get_facecolor()])  # mapped data win when drawn


def _picture(picture: Picture) -> dict[str, str]:
    light = _data_uri(picture.figure)
    _use_light_ink(picture.figure)
    dark = _data_uri(picture.figure)
    return {"caption": picture.caption, "alt": picture.alt or picture.caption, "light": light, "dark": dark}


def _rendered(tile: Tile) -> dict[str, Any]:
    tables = [Table(*table) for table in tile.tables]
    return {
        "heading": tile.heading,
        "summary": [tile.summary] if isinstance(tile.summary, str) else list(tile.summary),
        "tables": [{"caption": t.caption, "header": t.header, "rows": plain(t.rows)} for t in tables],
        "pictures": [_picture(Picture(*figure)) for figure in tile.figures],
        "figures": dict(tile.figures_of_merit),
        "error": None,
    }


def _run(stem: str, module: Any, folder: Path) -> dict[str, Any]:
    """Run one tile; an error becomes its content, so that the other tiles go on."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt
    from matplotlib.rcsetup import cycler

    style: dict[Any, Any] = {**PAGE_STYLE, "axes.prop_cycle": cycler(color=_PALETTE)}
    print(f"\n=== {stem}: {module.TITLE}", flush=True)
    part: dict[str, Any] = {"name": stem, "title": module.TITLE}
    start = time.perf_counter()
    with mpl.rc_context(style):
        try:
            part |= _rendered(module.tile(folder))
        except Exception as error:
            traceback.print_exc()
            empty = _rendered(Tile(heading=module.TITLE))
            part |= {**empty, "error": f"{type(error).__name__}: {error}"}
        finally:
            plt.close("all")
    part |= {"seconds": round(time.perf_counter() - start, 1), "environment": environment()}
    return part


def _print(part: Mapping[str, Any]) -> None:
    if part["error"]:
        print(f"{part['name']} failed after {part['seconds']:.0f} s: {part['error']}", flush=True)
        return
    print("\n".join(["", part["heading"], *part["summary"]]))
    for table in part["tables"]:
        print(f"\n{table['caption']}\n".replace("\n\n", "\n") + text_table(table["header"], table["rows"]))
    print(f"({part['seconds']:.0f} s)", flush=True)


def _stored(folder: Path, known: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Read the parts that earlier calls left, in the order of ``known``."""
    paths = [folder / f"{stem}.json" for stem in known]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def _write_page(folder: Path, known: Mapping[str, Path]) -> Path:
    import jinja2

    parts = _stored(folder / "tiles", known)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.filters["cell"] = format_cell
    templates.tests["figure"] = lambda value: value is None or isinstance(value, (int, float))
    page = folder / "index.html"
    page.write_text(
        templates.get_template("_demo.html.jinja").render(
            parts=parts,
            missing=[stem for stem in known if stem not in {part["name"] for part in parts}],
            seconds=sum(part["seconds"] for part in parts),
            environment=environment(),
        ),
        encoding="utf-8",
    )
    keys = ("name", "title", "seconds", "figures", "tables", "error", "environment")
    results = [
        {key: part[key] for key in keys} | {"pictures": [picture["caption"] for picture in part["pictures"]]}
        for part in parts
    ]
    write_json(folder / "results.json", {"environment": environment(), "tiles": results})
    return page


def demo(
    names: Sequence[str] = (), *, output: Path | str = "runs/demo", examples: Path | None = None
) -> list[dict[str, Any]]:
    """Run tiles and write the page.

    Args:
        names: Stems of the tiles; empty for all.
        output: Folder of ``index.html`` and ``results.json``.
        examples: Folder with the tiles; default the shipped ones.

    Returns:
        The rendered parts of the tiles that ran now; ``error`` is ``None`` or the text of what went wrong.

    Raises:
        UserError: Unknown name, a folder that cannot be written, or a missing extra; before anything trains.

    Note:
        The page is written again after every tile. Torch's threads and Lightning's progress bars are left as they are.
    """
    require("jinja2", "matplotlib")
    known = tiles(examples)
    chosen = {name: choose(name, known, "demo") for name in names} or known
    folder = writable_folder(Path(output))
    modules = {stem: load_script(path, "TITLE", "tile") for stem, path in chosen.items()}

    import matplotlib as mpl

    mpl.use("Agg")
    parts = []
    for stem, module in modules.items():
        part = _run(stem, module, folder)
        write_json(folder / "tiles" / f"{stem}.json", part)
        _write_page(folder, known)
        _print(part)
        parts.append(part)
    print(f"\n{sum(part['seconds'] for part in parts):.0f} s in all; open {_write_page(folder, known)}", flush=True)
    return parts
