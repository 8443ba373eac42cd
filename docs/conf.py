"""Sphinx configuration: MyST pages, a gallery from ../examples, method pages from ../callbacks, an API reference."""

import importlib
import inspect
import os
import re
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: Sphinx forks its readers
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import lightning_ext

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
    "data": "Data",
    "functional": "Functions",
    "testing": "Testing",
}


def _rewrite(text: str) -> str:
    """Point the relative links of a card, which lies in callbacks/, from docs/methods/; web links and anchors stay."""

    def link(match: re.Match[str]) -> str:
        before, path, after = match.groups()
        target = (ROOT / "callbacks" / path).resolve()
        if target.suffix == ".md" and target.parent == ROOT / "callbacks":
            return match[0]  # another card: its page lies beside this one
        outside = target.suffix == ".md" and DOCS not in target.parents
        return f"{before}{'path:' if outside else ''}{os.path.relpath(target, DOCS / 'methods')}{after}"

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
        _write(DOCS / "methods" / card.name, _rewrite(body.lstrip()))
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
