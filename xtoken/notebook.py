"""What objects show of themselves in a notebook (`_repr_html_`): small tables, with everything escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .terminal import printable

MOST = 20
"""Rows of a table that are shown."""


def html_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]], total: int | None = None) -> str:
    """A table of the first `MOST` rows; `total` is how many there are, if more than `rows` has."""
    listed = list(rows)
    left = (len(listed) if total is None else total) - MOST
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in listed[:MOST])
    more = f"<tr><td colspan={len(header)}>and {left:,} more</td></tr>" if left > 0 else ""
    return f"<table><caption>{_shown(caption)}</caption><tr>{_cells('th', header)}</tr>{body}{more}</table>"


def html_list(title: str, items: Iterable[object]) -> str:
    """A title and a list of sentences."""
    return f"<p><b>{_shown(title)}</b></p><ul>{''.join(f'<li>{_shown(one)}</li>' for one in items)}</ul>"


def _cells(kind: str, row: Sequence[object]) -> str:
    return "".join(f"<{kind}>{_shown(one)}</{kind}>" for one in row)


def _shown(value: object) -> str:
    return escape(printable(f"{value:,}" if isinstance(value, int) else value))
