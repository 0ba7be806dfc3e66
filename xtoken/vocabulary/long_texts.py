"""Token ids of texts, however long.

A tokenizer takes over a hundred bytes of memory for each byte of a text, and one processor for each text. So a long
text is encoded in windows that overlap, as many at a time as there are processors. What two windows share is also
encoded by itself: it begins as the second window does and ends as the first. Where an encoding begins or ends does not
matter a few tokens away; so if its last three quarters are the end of the first window's ids, and its first three
quarters the beginning of the second's, one goes on for the other in its middle. If not, the windows are too short for
such a text, and longer ones are tried; the last is all of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken import _core

from .encode import refusals, unpadded

WINDOW = 1 << 18
"""Characters of the first windows; those of the second try are `GROWTH` times as long, and so on."""

OVERLAP = 1 << 13
"""Characters that two windows share."""

LEAST = 64
"""Tokens that must be in these."""

GROWTH = 16

Ids = Sequence[int] | NDArray[np.int32]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Ids of each text without special tokens, as ``tokenizer.encode_batch_fast`` of `tokenizers` makes them, but
    neither padded nor cut."""
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        tokenizer = unpadded(tokenizer)
    long = {k: _encode_long(tokenizer, text) for k, text in enumerate(texts) if len(text) > 4 * WINDOW}
    rest = iter(_encode(tokenizer, [text for k, text in enumerate(texts) if k not in long]))
    return [long[k] if k in long else next(rest) for k in range(len(texts))]


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    with refusals():
        return [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _encode_long(tokenizer: Any, text: str) -> NDArray[np.int32]:
    window = WINDOW
    while window < len(text):
        found = _in_windows(tokenizer, text, window)
        if found is not None:
            return found
        window *= GROWTH
    return np.array(_encode(tokenizer, [text])[0], np.int32)


def _in_windows(tokenizer: Any, text: str, window: int) -> NDArray[np.int32] | None:
    """The ids, or None where two windows do not fit together."""
    starts = iter(range(0, len(text) - OVERLAP, window - OVERLAP))
    parts: list[NDArray[np.int32]] = []
    while group := list(itertools.islice(starts, _core.available_processors())):
        encoded = _encode(tokenizer, [text[at : at + size] for at in group for size in (OVERLAP, window)])
        arrays = [np.array(ids, np.int32) for ids in encoded]
        for shared, ids in zip(arrays[::2], arrays[1::2], strict=True):
            if parts:
                seam = _seam(parts[-1], shared, ids)
                if seam is None:
                    return None
                parts[-1], ids = parts[-1][: seam[0]], ids[seam[1] :]
            parts.append(ids)
    return np.concatenate(parts)


def _seam(left: NDArray[np.int32], shared: NDArray[np.int32], right: NDArray[np.int32]) -> tuple[int, int] | None:
    """Where to leave the ids of a window and where to enter those of the next, if what they share agrees with both."""
    count = len(shared)
    if count < LEAST:
        return None
    begin, end = shared[: count - count // 4], shared[count // 4 :]
    if not np.array_equal(left[-len(end) :], end) or not np.array_equal(right[: len(begin)], begin):
        return None
    return len(left) - (count - count // 2), count // 2
