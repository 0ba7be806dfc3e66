"""Drawing: the chunks of a sample as two lines of cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from xtoken.terminal import printable
from xtoken.vocabulary import TokenizerLike, Vocabulary

T = TypeVar("T")


def shown_tokens(tokenizer: TokenizerLike, ids: Tensor, name: str) -> list[str]:
    """The text of each token [T] on one line, with spaces visible, control characters and bytes that are not UTF-8
    escaped; empty for padding. ValueError, which names the tokenizer's argument, for ids that it does not have."""
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    most = max(ids.tolist(), default=-1)
    if most >= len(vocabulary):
        raise ValueError(f"{name}: expected ids in 0 ... {len(vocabulary) - 1}, got {most}; are both sides swapped?")
    pad = vocabulary.roles.get("pad", -1)
    texts = {i: vocabulary[i].decode("utf-8", "backslashreplace") for i in {*ids.tolist()} - {-1, pad}}
    return [printable(texts[i].replace(" ", "·")) or "∅" if i in texts else "" for i in ids.tolist()]


def in_chunks(
    spans: Sequence[Sequence[int]], student: Sequence[T], teacher: Sequence[T]
) -> Iterator[tuple[Sequence[T], Sequence[T], bool]]:
    """The tokens of both sides, chunk by chunk, and (False) those between chunks."""
    i = j = 0
    for a, b, c, d in [*spans, [len(student), len(student), len(teacher), len(teacher)]]:
        if i < a or j < c:
            yield student[i:a], teacher[j:c], False
        if a < b:
            yield student[a:b], teacher[c:d], True
        i, j = b, d


def two_lines(spans: list[list[int]], student: list[str], teacher: list[str], color: bool, width: int) -> str:
    """Cells of equal width, one a chunk; tokens between chunks in cells of their own; padding (empty) left out."""
    cells: list[tuple[str, str, bool]] = []
    for *sides, aligned in in_chunks(spans, student, teacher):
        above, below = ("|".join(filter(None, side)) for side in sides)
        if above or below:
            cells.append((above, below, True) if aligned else (above and f"({above})", below and f"({below})", False))
    lines, used = ["", ""], 0
    for k, (above, below, aligned) in enumerate(cells):
        size = max(len(above), len(below))
        if used and used + size + 1 > width:
            lines, used = [*lines, "", "", ""], 0
        gap = " " if used else ""
        used += size + 1
        start, end = (f"\x1b[4{2 + k % 5}m\x1b[30m" if aligned else "\x1b[2m", "\x1b[0m") if color else ("", "")
        lines[-2] += gap + start + above.ljust(size) + end
        lines[-1] += gap + start + below.ljust(size) + end
    return "\n".join(lines)
