"""Encoding the texts of single tokens by another tokenizer, byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _core

if TYPE_CHECKING:
    from .vocabulary import Vocabulary

_STRAY_BYTE = re.compile("([\udc80-\udcff])")  # what "surrogateescape" makes of bytes that are not UTF-8


def encode_pieces(vocabulary: Vocabulary, texts: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Encodes each text on its own: no special tokens, no dummy space in front, no truncation.

    Valid UTF-8 goes through the tokenizer in one batch. Bytes that are not valid UTF-8 go to the byte-level model
    itself or to byte-fallback pieces, never through U+FFFD; what has no piece, and unknown tokens, are left out.

    Parameters
    ----------
    vocabulary : Vocabulary
        With a tokenizer, or without one: then the longest token that fits next is taken.
    texts : sequence of bytes

    Returns
    -------
    ptr : int64 [len(texts) + 1]
        Text ``k`` has the ids ``ids[ptr[k]:ptr[k + 1]]``.
    ids : int32
    """
    if vocabulary.tokenizer is None:
        matcher = _core.LongestMatch(vocabulary._core)
        return _flatten([matcher.encode(text) for text in texts])
    tokenizer = vocabulary._plain_tokenizer
    is_byte_level = any('"ByteLevel"' in _state(part) for part in (tokenizer.pre_tokenizer, tokenizer.decoder))

    parts: list[list[list[int]]] = [[] for _ in texts]  # of each text, in order
    batch: list[str] = []
    places: list[tuple[int, int]] = []  # (text, part) of each entry of the batch
    for k, raw in enumerate(texts):
        text = raw.decode("utf-8", "surrogateescape")
        if _STRAY_BYTE.search(text) is None:
            runs = [text]
        elif is_byte_level:
            parts[k].append([token.id for token in tokenizer.model.tokenize(_core.byte_level_piece(raw))])
            continue
        else:
            runs = _STRAY_BYTE.split(text)
        for run in runs:
            if _STRAY_BYTE.fullmatch(run):
                byte_id = tokenizer.token_to_id(f"<0x{ord(run) - 0xDC00:02X}>")
                parts[k].append([] if byte_id is None else [byte_id])
            elif run:
                places.append((k, len(parts[k])))
                parts[k].append([])
                batch.append(run)
    encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    for (k, part), encoding in zip(places, encoded, strict=True):
        parts[k][part] = encoding.ids
    is_text = vocabulary.is_text.tolist()
    return _flatten([[i for ids in row for i in ids if is_text[i]] for row in parts])


def _flatten(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    ptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=ptr[1:])
    return ptr, np.fromiter((i for row in rows for i in row), dtype=np.int32, count=int(ptr[-1]))


def _state(part: Any) -> str:
    return "" if part is None else part.__getstate__().decode()


def plain_copy(tokenizer: Any) -> Any:
    """A copy that encodes a text as it stands within a longer one: no dummy space, special tokens read as text."""
    from tokenizers import Tokenizer, models

    def plain(part: Any) -> Any:
        if part is None or part.get("type") == "Prepend":
            return None
        if part.get("type") == "Metaspace":
            part = {**part, "prepend_scheme": "never"}
        if "add_prefix_space" in part:
            part = {**part, "add_prefix_space": False}
        for nested in ("normalizers", "pretokenizers"):
            if nested in part:
                part = {**part, nested: [kept for kept in map(plain, part[nested]) if kept is not None]}
        return part

    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    # The changed parts are read through a tokenizer without a vocabulary: its JSON is short.
    spec = json.loads(Tokenizer(models.BPE()).to_str())
    for name in ("normalizer", "pre_tokenizer"):
        spec[name] = plain(json.loads(_state(getattr(tokenizer, name)) or "null"))
    parts = Tokenizer.from_str(json.dumps(spec))
    copy.normalizer, copy.pre_tokenizer = parts.normalizer, parts.pre_tokenizer
    return copy
