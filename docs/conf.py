"""Sphinx configuration: MyST pages, a gallery from ../examples, method pages from ../callbacks, an API reference."""

import importlib
import inspect
import os
import re
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: Sphinx forks its readers
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from sphinx.application import Sphinx

import lightning_ext

warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own, under torch 2.13

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

project = "lightning_ext"
author = "The lightning_ext developers"
copyright = f"2026, {author}"  # the name Sphinx reads
version = release = lightning_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery/**/*.ipynb", "gallery/**/*.zip"]
suppress_warnings = ["sphinx_gallery.space_in_filename"]  # the clone may lie in a folder with a space
html_theme = "furo"
html_title = "lightning_ext"
html_show_sourcelink = False

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
napoleon_use_rtype = False
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
add_module_names = False
python_use_unqualified_type_names = True

sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "ignore_pattern": r"(^_\w+|_demo|_reproduce)\.py$",  # of the bare file name
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
}

KINDS = {
    "callbacks": "Callbacks",
    "modules": "Modules",
    "metrics": "Metrics",
    "nn": "Layers",
    "optim": "Optimizers",
    "data": "Data",
    "functional": "Functions",
    "testing": "Testing",
}


def _rewrite(text: str, source: Path, page: Path) -> str:
    """Point the relative links of a text that lies in folder ``source`` from a page in folder ``page``.

    A link to a card leads to its page; one to another text outside of the documentation becomes a download.
    """

    def link(match: re.Match[str]) -> str:
        before, path, after = match.groups()
        target = (source / path).resolve()
        if target.suffix == ".md" and target.parent == ROOT / "callbacks":
            target = DOCS / "methods" / target.name
        outside = target.suffix == ".md" and DOCS not in target.parents
        return f"{before}{'path:' if outside else ''}{os.path.relpath(target, page)}{after}"

    return re.sub(r"(\]\()(?![a-z]+:|#|/)([^)#\s]+)([^)]*\))", link, text)


def _write(page: Path, text: str) -> None:
    """Write a page only when it changed, so that a second build reads nothing again."""
    page.parent.mkdir(exist_ok=True)
    if not page.exists() or page.read_text(encoding="utf-8") != text:
        page.write_text(text, encoding="utf-8")


def _method_pages() -> None:
    """One page per method: its card without the front matter. The card stays the only source."""
    cards = sorted((ROOT / "callbacks").glob("*.md"))
    for card in cards:
        body = card.read_text(encoding="utf-8").split("---\n", 2)[2]
        _write(DOCS / "methods" / card.name, _rewrite(body.lstrip(), ROOT / "callbacks", DOCS / "methods"))
    for page in set((DOCS / "methods").glob("*.md")) - {DOCS / "methods" / card.name for card in cards}:
        page.unlink()


def _api_pages() -> None:
    """One page per kind, with everything in its ``__all__``."""
    for kind, title in KINDS.items():
        package = importlib.import_module(f"lightning_ext.{kind}")
        parts = [f"# {title}", f"`lightning_ext.{kind}`: {inspect.getdoc(package)}"]
        for name in package.__all__:
            if inspect.ismodule(thing := getattr(package, name)):
                directive, options = "automodule", [":members:"]
            elif inspect.isclass(thing):
                directive, options = "autoclass", [":members:"]
            else:
                directive, options = ("autofunction" if inspect.isroutine(thing) else "autodata"), []
            body = "\n".join([f".. {directive}:: lightning_ext.{kind}.{name}", *(f"   {line}" for line in options)])
            parts.append(f"## {name}\n\n```{{eval-rst}}\n{body}\n```")
        _write(DOCS / "api" / f"{kind}.md", "\n\n".join(parts) + "\n")


_method_pages()
_api_pages()


def _included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    content[0] = _rewrite(content[0], (DOCS / path).resolve().parent, DOCS)


def setup(app: Sphinx) -> None:
    """Let the part of README that getting_started.md includes keep its links."""
    app.connect("include-read", _included)
    # Lightning's format, set when it is imported, would print paths of the builder's machine into the gallery
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
