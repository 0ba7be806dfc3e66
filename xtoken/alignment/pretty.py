"""Drawing: the chunks of a sample as two lines of cells."""

from __future__ import annotations

from torch import Tensor

from xtoken.terminal import printable
from xtoken.vocabulary import TokenizerLike, Vocabulary


def shown_tokens(tokenizer: TokenizerLike, ids: Tensor, name: str) -> list[str]:
    """The text of each token [T] on one line; empty for padding. ValueError, which names the tokenizer's argument, for
    ids that it does not have."""
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    most = max(ids.tolist(), default=-1)
    if most >= len(vocabulary):
        raise ValueError(f"{name}: expected ids in 0 ... {len(vocabulary) - 1}, got {most}; are both sides swapped?")
    pad = vocabulary.roles.get("pad", -1)
    return [_shown(vocabulary[i]) if i not in (-1, pad) else "" for i in ids.tolist()]


def _shown(token: bytes) -> str:
    """A token on one line: control characters and bytes that are not UTF-8 escaped, spaces visible."""
    return printable(token.decode("utf-8", "backslashreplace").replace(" ", "·")) or "∅"


def two_lines(spans: list[list[int]], student: list[str], teacher: list[str], color: bool, width: int) -> str:
    """Cells of equal width, one a chunk; tokens between chunks in cells of their own; padding (empty) left out."""
    cells: list[tuple[str, str, bool]] = []
    i = j = 0
    for a, b, c, d in [*spans, [len(student), len(student), len(teacher), len(teacher)]]:
        alone = ["(" + "|".join(filter(None, side)) + ")" for side in (student[i:a], teacher[j:c])]
        if alone != ["()", "()"]:
            cells.append((alone[0].replace("()", ""), alone[1].replace("()", ""), False))
        if b > a:
            cells.append(("|".join(student[a:b]), "|".join(teacher[c:d]), True))
        i, j = b, d
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
