"""Tokenizers: read from anywhere, without padding and cutting, and encoding texts byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .families import WITH_SPACES, recognise, words_of

_OFF = re.compile(rb'"(?!strip_accents":false)[a-z_]+":(null|false|""),?')  # accents: null is what lowercase says

_Reads = Callable[[str], list[int]]

_STRAY_BYTE = re.compile("([\udc80-\udcff])")  # what "surrogateescape" makes of bytes that are not UTF-8


def unpadded(tokenizer: Any) -> Any:
    """A copy of a `tokenizers.Tokenizer` that neither pads nor cuts."""
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


@contextmanager
def refusals() -> Iterator[None]:
    """Makes a ValueError of what `tokenizers` raises where a model needs a token for the unknown and has none."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ValueError(f"tokenizer: it cannot encode some of the texts or tokens: {error}") from error


def prefix_of(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text, such as BOS, whatever the text."""
    from tokenizers import Tokenizer, models

    text = 2**31 - 1  # an id that is no special token's
    probe = Tokenizer(models.WordLevel({"a": text}, "a"))
    if tokenizer.post_processor is not None:
        probe.post_processor = tokenizer.post_processor
    ids: list[int] = probe.encode("a").ids
    return ids[: ids.index(text)]


def behaviour(tokenizer: Any) -> bytes:
    """What decides which ids a `tokenizers.Tokenizer` makes of a text; nothing for None.

    Options that are off, and post-processors that add nothing, are left out: other versions may not write them.
    """
    if tokenizer is None:
        return b""
    parts = [tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor]
    *before, last = ({} if part is None else json.loads(part.__getstate__()) for part in parts)
    behind = [
        one
        for one in last.get("processors", [last])
        if one.get("type") not in (None, "ByteLevel") and one.get("special_tokens") != {}
    ]
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = [
        [i, *(getattr(token, flag) for flag in flags)]
        for i, token in sorted(tokenizer.get_added_tokens_decoder().items())
    ]
    said = json.dumps([*before, behind, added], sort_keys=True, separators=(",", ":")).encode()
    return _OFF.sub(b"", tokenizer.model.__getstate__() + said)


class Encoder:
    """`Vocabulary.encode_pieces` for a `tokenizers.Tokenizer`; `is_text` [V] says which tokens stand for text."""

    def __init__(self, tokenizer: Any, is_text: NDArray[np.bool_]) -> None:
        family, parts = recognise(tokenizer)
        self.encode_bytes = family.encode_bytes
        spaces = WITH_SPACES if family.plain and parts.adds_spaces else {}
        self.tokenizer = _plain_copy(tokenizer, {**family.plain, **spaces})
        self.is_text = is_text.tolist()
        self.goes_on = _inside(self.tokenizer.model, parts.going_on) if parts.going_on else None

    def __call__(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Ids of each text; ValueError as `refusals` has it."""
        with refusals():
            return self._ids(texts)

    def _ids(self, texts: Sequence[bytes]) -> list[list[int]]:
        parts: list[list[list[int]]] = [[] for _ in texts]  # of each text, in order
        batch: list[str] = []
        places: list[list[int]] = []  # where the ids of each entry of the batch go
        for row, raw in zip(parts, texts, strict=True):
            text = raw.decode("utf-8", "surrogateescape")
            if self.encode_bytes is not None and _STRAY_BYTE.search(text):
                row.append(self.encode_bytes(self.tokenizer, raw))
                continue
            for run in _STRAY_BYTE.split(text):
                if _STRAY_BYTE.match(run):
                    byte_id = self.tokenizer.token_to_id(f"<0x{ord(run) - 0xDC00:02X}>")
                    row.append([] if byte_id is None else [byte_id])
                elif run:
                    row.append([])
                    places.append(row[-1])
                    batch.append(run)
        encoded = self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for ids, run, encoding in zip(places, batch, encoded, strict=True):
            ids += self._going_on(run, encoding.ids, self.goes_on) if self.goes_on else encoding.ids
        return [[i for ids in row for i in ids if self.is_text[i]] for row in parts]

    def _going_on(self, text: str, ids: list[int], goes_on: _Reads) -> list[int]:
        """The ids of a text in words, of which the first goes on with a word before it, unless it stands alone, is an
        added token, or would be unknown."""
        words = words_of(self.tokenizer, text)
        if len(words_of(self.tokenizer, "a" + text)) > len(words):
            return ids
        begun = [one.id for one in self.tokenizer.model.tokenize(words[0])]
        inside = goes_on(words[0])
        is_word = ids[: len(begun)] == begun and len(inside) > 0 and all(self.is_text[i] for i in inside)
        return inside + ids[len(begun) :] if is_word else ids


def _inside(model: Any, mark: str) -> _Reads:
    """Reads a word as the rest of one, whose pieces all have the mark of those that go on."""
    if type(model).__name__ == "WordPiece":
        return lambda word: [one.id for one in model.tokenize(mark + word)]
    from tokenizers import models

    spec = json.loads(model.__getstate__())
    start = len(mark)
    vocab = {piece[start:]: i for piece, i in spec["vocab"].items() if piece.startswith(mark) and len(piece) > start}
    merges = [(one[start:], two[start:]) for one, two in spec["merges"] if one.startswith(mark)]
    inside = models.BPE(vocab, merges, ignore_merges=spec["ignore_merges"])
    return lambda word: [one.id for one in inside.tokenize(word)]


def _plain_copy(tokenizer: Any, changed: Mapping[str, Mapping[str, Any] | None]) -> Any:
    """A copy that encodes a text as it stands: parts changed as in `AS_IT_STANDS`, special tokens read as text."""
    from tokenizers import Tokenizer, models

    def plain(part: Any) -> Any:
        if part is None:
            return None
        name = f"Split {part['behavior']}" if part["type"] == "Split" else part["type"]
        changes = changed.get(name, {})
        if changes is None:
            return None
        part = {**part, **changes}
        for nested in ("normalizers", "pretokenizers"):
            if nested in part:
                part[nested] = [kept for kept in map(plain, part[nested]) if kept is not None]
        return part

    # With the same model, since a copy of it is read from JSON, which takes a second.
    model = tokenizer.model
    for chance in ("dropout", "alpha"):
        if getattr(model, chance, None) is not None:
            model = deepcopy(model)
            setattr(model, chance, None)
    copy, added = Tokenizer(model), tokenizer.get_added_tokens_decoder()
    copy.normalizer = tokenizer.normalizer
    copy.add_tokens([added[i] for i in sorted(added)])
    if {i: one.content for i, one in copy.get_added_tokens_decoder().items()} != {
        i: one.content for i, one in added.items()
    }:
        copy = unpadded(tokenizer)  # ids that do not follow the model's
        copy.model = model
    copy.encode_special_tokens = True
    # The changed parts are read through a tokenizer without a vocabulary: its JSON is short.
    spec = json.loads(Tokenizer(models.BPE()).to_str())
    for name in ("normalizer", "pre_tokenizer"):
        part = getattr(tokenizer, name)
        spec[name] = plain(json.loads(part.__getstate__()) if part is not None else None)
    parts = Tokenizer.from_str(json.dumps(spec))
    copy.normalizer, copy.pre_tokenizer = parts.normalizer, parts.pre_tokenizer
    return copy
