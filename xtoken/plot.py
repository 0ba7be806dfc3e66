"""Pictures of what xtoken makes, by matplotlib (`xtoken[plot]`): what `.plot()` of alignments, W, piece indices and
audits draws. Each draws into the given axes, or into a new figure of pyplot, and returns the axes."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

MOST_CHUNKS = 24
"""Of an alignment, by default: more cannot be read."""

MOST_ENTRIES = 8
"""Rows with more entries, or tokens with more pieces, share the last bar."""

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#e45756")
GREY = "#dddddd"


def require_matplotlib() -> None:
    """Raises ImportError, with the command that installs it, if matplotlib is not there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib; run: pip install 'xtoken[plot]'")


def axes_or_new(axes: Any, width: float, height: float) -> Any:
    """The given axes, or those of a new figure of a size in inches."""
    require_matplotlib()
    if axes is not None:
        return axes
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def stacked_shares(
    axes: Any,
    shares: Mapping[str, Sequence[float]],
    names: Sequence[str],
    title: str,
    marks: Sequence[float],
    mark: str,
) -> Any:
    """A horizontal bar from 0 to 1 for each name, in parts; `shares` has the parts of all names by their label. `marks`
    are places on the bars, `mark` their label."""
    axes = axes_or_new(axes, 7.0, 1.2 + 0.3 * len(names))
    places, left = range(len(names)), [0.0] * len(names)
    for color, (label, parts) in zip(COLORS, shares.items(), strict=False):
        axes.barh(places, parts, left=left, label=label, color=color)
        left = [a + b for a, b in zip(left, parts, strict=True)]
    axes.plot(marks, places, "k|", markersize=12, label=mark)
    axes.set_yticks(places, names, parse_math=False)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share", title=title)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def stacked_counts(axes: Any, counts: Mapping[str, Sequence[int]], xlabel: str, title: str, *, side: bool) -> Any:
    """How many tokens have 0, 1, 2 ... of something: bars beside each other on a logarithmic axis (`side`), or one on
    another on a linear one."""
    axes = axes_or_new(axes, 7.0, 3.6)
    size = max(map(len, counts.values()), default=1)
    width = 0.8 / len(counts) if side else 0.8
    bottom = [0] * size
    for k, (label, values) in enumerate(counts.items()):
        values = [*values, *[0] * (size - len(values))]
        shift = (k - (len(counts) - 1) / 2) * width if side else 0.0
        places = [place + shift for place in range(size)]
        axes.bar(places, values, width, bottom=None if side else bottom, label=label, color=COLORS[k % len(COLORS)])
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    more = [str(k) for k in range(size)]
    if size > MOST_ENTRIES:
        more[-1] = f"{size - 1} or more"
    axes.set_xticks(range(size), more)
    axes.set(xlabel=xlabel, ylabel="tokens", title=title)
    if side:
        axes.set_yscale("log")
    axes.legend(fontsize="small")
    return axes


def counted(numbers: Iterable[int]) -> list[int]:
    """How often each number from 0 occurs; those from `MOST_ENTRIES` on together."""
    found: list[int] = np.bincount(np.minimum(np.fromiter(numbers, np.int64), MOST_ENTRIES), minlength=1).tolist()
    return found


def two_rows(axes: Any, cells: Iterable[tuple[Sequence[str], Sequence[str], bool]]) -> Any:
    """The tokens of both sides above each other, as wide as their chunks; a chunk is a colour, grey is in no chunk."""
    colors = itertools.cycle(COLORS)
    drawn = (
        [[one for one in side if one] for side in sides] + [next(colors) if aligned else GREY]
        for *sides, aligned in cells
    )
    chunks: list[Any] = [one for one in drawn if one[0] or one[1]]
    width = [max(sum(len(one) + 1 for one in side) for side in chunk[:2]) for chunk in chunks]
    axes = axes_or_new(axes, max(4.0, 0.11 * sum(width)), 1.6)
    begin = 0.0
    for size, (*both, color) in zip(width, chunks, strict=True):
        for y, tokens in zip((1.1, 0.0), both, strict=True):
            used = sum(len(one) + 1 for one in tokens)
            x = begin
            for one in tokens:
                share = size * (len(one) + 1) / used
                axes.barh(y, share, 0.9, left=x, color=color, alpha=0.55, edgecolor="white")
                axes.text(x + share / 2, y, one, ha="center", va="center", fontsize=8, parse_math=False)
                x += share
        begin += size
    axes.set(xlim=(0, max(begin, 1.0)), ylim=(-0.6, 1.7))
    axes.set_xticks([])
    axes.set_yticks([1.1, 0.0], ["student", "teacher"])
    return axes
