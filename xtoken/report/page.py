"""Pages from templates. Whatever comes from tokens, texts or files is escaped; data for scripts is compressed JSON."""

from __future__ import annotations

import base64
import gzip
import json
import os
from typing import Any

import jinja2

from xtoken import _core
from xtoken.storage import write_atomically
from xtoken.terminal import LINES, printable

_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("xtoken.report"), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
    # What could steer who reads the page, in any text that goes into it, is escaped.
    finalize=lambda value: printable(value, LINES) if type(value) is str else value,
)  # fmt: skip
_PAGES.filters["percent"] = lambda share: "" if share is None else f"{100 * share:.1f} %"
_PAGES.filters["printable"] = printable
_PAGES.filters["count"] = lambda number: f"{number:,}"


def render(template: str, **facts: Any) -> str:
    """The page of a template."""
    return _PAGES.get_template(template).render(version=_core.version, **facts)


def packed(facts: Any) -> str:
    """JSON, gzip, base64: the same facts give the same text, in which no character means anything to HTML."""
    written = json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(written, mtime=0)).decode()


def save(html: str, path: str | os.PathLike[str]) -> None:
    """Writes a page; the file is there as a whole or not at all."""
    write_atomically(path, html.encode("utf-8", "backslashreplace"))
