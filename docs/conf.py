"""The site: the pages of this folder, and the API from its docstrings. `make docs` builds it; a warning is an error."""

from __future__ import annotations

import re
from typing import Any

import xtoken

project = "xtoken"
release = xtoken.__version__
extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "sphinx.ext.napoleon",
]  # fmt: skip
html_theme = "furo"
html_title = "xtoken"
html_copy_source = False
exclude_patterns = ["_build"]

# Markdown: links to headings, and formulas between dollars.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autosummary_generate = True
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
"""Docstrings say types in words: shapes, dtypes, units."""

default_role = "code"


def end_sections(_app: Any, _what: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    """A section of a docstring ends with a blank line, and what follows is text again: napoleon wants two of them."""
    lines[:] = re.sub(r"\n\n(?=\S)", "\n\n\n", "\n".join(lines)).split("\n")


def setup(app: Any) -> None:
    """Of a link to a file of the project that is no page here, its words remain."""
    outside = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\.md[^)]*\)")
    app.connect("source-read", lambda _app, _name, text: text.__setitem__(0, outside.sub(r"\1", text[0])))
    app.connect("autodoc-process-docstring", end_sections, priority=400)  # before napoleon
