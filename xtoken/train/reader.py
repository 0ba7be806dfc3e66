"""How one model reads examples: written by its chat template, tokenized, with the byte at which each token begins."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtoken.audit import same_tokens
from xtoken.vocabulary import TokenizerLike, Vocabulary, load_tokenizer, prefix_of, unpadded
from xtoken.vocabulary.long_texts import encode_texts

from .chat import BLANK, ChatTemplate, Place
from .example import Example, Ints


class Tokens(NamedTuple):
    """The tokens of B examples on one side, one example after the other.

    Byte positions count through all examples, with gaps between them, so that one search serves the batch.
    """

    ids: Ints
    start: Ints
    """[N]: byte at which a token begins, not decreasing."""
    end: Ints
    is_special: NDArray[np.bool_]
    """[N]: the token stands for no text."""
    ptr: Ints
    """[B + 1]: example b has the tokens ``ptr[b] ... ptr[b + 1] - 1``."""
    base: Ints
    """[B]: byte at which the text of an example begins."""
    raw: list[bytes]
    """[B]: the texts."""
    is_exact: NDArray[np.bool_]
    """[B]: whether the tokens' bytes, put together, are the text; else places are estimated."""
    piece_start: Ints
    """[P]: byte at which each piece begins, -1 if it does not stand there verbatim."""
    turn_end: Ints
    """[M]: the token that ends each turn, -1 if there is none."""
    is_open: NDArray[np.bool_]
    """[B]: the text of a chat ends without a token that ends its last turn."""
    why: dict[int, str]
    """Why a piece has no place."""

    def ids_of(self, k: int) -> Ints:
        """Those of example k."""
        return self.ids[self.ptr[k] : self.ptr[k + 1]]

    def within(self, begin: Ints, length: Ints) -> Ints:
        """[S, 2]: the tokens that reach into stretches of bytes, with nothing but white space outside of them."""
        until = begin + length
        first = np.minimum(np.searchsorted(self.end, begin, "right"), np.searchsorted(self.start, begin))
        last = np.maximum(np.searchsorted(self.start, until), np.searchsorted(self.end, until, "right"))
        found = np.stack([first, np.maximum(first, last)], axis=1)
        start, end = np.append(self.start, 0), np.append(self.end, 0)
        for s in ((start[first] < begin) | (end[last - 1] > until)).nonzero()[0].tolist():
            i, j = found[s].tolist()
            while i < j and start[i] < begin[s] and not self._is_space(start[i], begin[s]):
                i += 1
            while i < j and end[j - 1] > until[s] and not self._is_space(until[s], end[j - 1]):
                j -= 1
            found[s] = i, j
        return found

    def _is_space(self, start: int, end: int) -> bool:
        """Whether the text between two bytes is white space."""
        k = int(np.searchsorted(self.base, start, "right")) - 1
        return self.raw[k][start - self.base[k] : end - self.base[k]].decode("utf-8", "replace").isspace()


class _Layout(NamedTuple):
    """An example as one model's text."""

    text: str
    raw: bytes
    base: int
    """Number of its first byte."""
    piece_start: list[int]
    """Byte at which each piece begins, -1 if it does not stand there verbatim."""
    turn_end: list[tuple[int, int]]
    """For each turn the bytes between which its end token is looked for, (-1, -1) if nothing of it is there."""
    is_open: bool
    """Whether nothing ends the last turn."""
    why: dict[int, str]
    """Why a piece has no place."""


class Reader:
    """One model's tokenizer and chat template, and a system message that it alone is told."""

    def __init__(
        self, tokenizer: TokenizerLike, name: str, now: datetime | None = None, system: str | None = None
    ) -> None:
        self.now = now
        self.system = system
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = load_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.name = name
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer)
        if self.vocabulary.tokenizer is None:
            raise ValueError(f"{name}: expected a tokenizer that encodes text, got a Vocabulary made of tokens alone")
        self.backend = self.vocabulary.tokenizer
        if self.backend.padding is not None or self.backend.truncation is not None:
            self.backend = unpadded(self.backend)
        self.tokens = [self.vocabulary[i] for i in range(len(self.vocabulary))]
        self.lengths = np.fromiter(map(len, self.tokens), np.int64, len(self.tokens))
        self.is_special = ~self.vocabulary.is_text
        self.prefix = prefix_of(self.backend)
        """The special tokens that the tokenizer puts before a text, such as BOS."""
        self.end_id = self.vocabulary.roles.get("eos")
        self.is_end = np.zeros(len(self.tokens), bool)
        self.is_end[[i for role, i in self.vocabulary.roles.items() if role in ("end_of_turn", "eos")]] = True

        self.is_mark = self.is_special.copy()
        self.is_mark[[i for role, i in self.vocabulary.roles.items() if role in ("unk", "pad")]] = False

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.name, self.now, self.system)

    def facts(self) -> list[Any]:
        """What decides how it writes and encodes, for a fingerprint; of the time what the template may write of it."""
        template = str(getattr(self.tokenizer, "chat_template", None))
        time = self.template.time_in(template) if "strftime_now" in template else []
        special = {name: str(one) for name, one in getattr(self.tokenizer, "special_tokens_map", {}).items()}
        return [self.name, self.system, self.vocabulary.fingerprint(), template, special, time]

    def reads_as(self, other: Reader) -> bool:
        """Whether this model reads the other's ids as its own: same tokens, same template, same system message."""
        return (
            self.system == other.system
            and same_tokens(self.vocabulary, other.vocabulary)
            and self.backend.to_str() == other.backend.to_str()
            and getattr(self.tokenizer, "chat_template", None) == getattr(other.tokenizer, "chat_template", None)
        )

    def prompt(self, example: Example) -> tuple[str, list[int]]:
        """What the model goes on from when it writes a completion: the text, and its tokens."""
        if example.conversation is None:
            text, before = "".join(example.pieces), self.prefix
        else:
            text, before = self.template.prompt(example.conversation), []
        return text, [*before, *self.backend.encode(text, add_special_tokens=False).ids]

    def encode(
        self, examples: Sequence[Example], add_end: bool, first_row: int = 0, is_read: Sequence[bool] | None = None
    ) -> Tokens:
        """Writes and encodes examples, those that it reads (default: all); errors count rows from `first_row`."""
        layouts, base = [], 2
        is_read = [True] * len(examples) if is_read is None else is_read
        for number, (example, wanted) in enumerate(zip(examples, is_read, strict=True), first_row):
            try:
                layouts.append(self._layout(example, base) if wanted else _nothing(example, base))
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
            base += len(layouts[-1].raw) + 3
        encoded = encode_texts(self.backend, [layout.text for layout in layouts])
        rows, is_exact = [], np.ones(len(examples), bool)
        pairs = list(zip(layouts, examples, strict=True))
        for k, (own, (layout, example)) in enumerate(zip(encoded, pairs, strict=True)):
            row = np.asarray(own, np.int64)
            is_exact[k] = b"".join([self.tokens[i] for i in own]) == layout.raw
            if is_exact[k]:
                end = np.cumsum(self.lengths[row])
                start = end - self.lengths[row]
            else:
                row, start, end = self._offsets(layout, first_row + k)
            if example.conversation is None:
                start[:1], end[-1:] = 0, len(layout.raw)
            before = self.prefix if example.conversation is None and is_read[k] else []
            behind = [self.end_id] if add_end and self.end_id is not None and layout.is_open else []
            row = np.concatenate([np.array(before, np.int64), row, np.array(behind, np.int64)])
            around = np.full(len(before), -1), np.full(len(behind), len(layout.raw) + 1)
            start, end = (np.concatenate([around[0], one, around[1]]) for one in (start, end))
            rows.append((row, start + layout.base, end + layout.base))
        ids, start, end = (np.concatenate(columns) for columns in zip(*rows, strict=True))
        ptr = np.cumsum([0, *(len(row) for row, _, _ in rows)])
        piece_start = np.array([at for layout in layouts for at in layout.piece_start], np.int64)
        turn_end = self._turn_ends(ids, start, [stretch for layout in layouts for stretch in layout.turn_end])
        begins, raw = np.array([layout.base for layout in layouts]), [layout.raw for layout in layouts]
        is_open = np.array([one.is_open and example.conversation is not None for one, example in pairs], bool)
        first = itertools.accumulate((len(layout.piece_start) for layout in layouts), initial=0)
        why = {k + at: one for at, layout in zip(first, layouts, strict=False) for k, one in layout.why.items()}
        is_special = self.is_special[ids]
        return Tokens(ids, start, end, is_special, ptr, begins, raw, is_exact, piece_start, turn_end, is_open, why)

    def _layout(self, example: Example, base: int) -> _Layout:
        """An example as this model's text, whose first byte has number `base`."""
        ends = [(-1, -1)] * len(example.trained)
        if example.conversation is None:
            raw = "".join(example.pieces).encode()
            starts = [base + at for at in itertools.accumulate(example.sizes[:-1], initial=0)][: len(example.pieces)]
            ends[-1:] = [(base + len(raw), base + len(raw) + 2)] * len(ends[-1:])
            return _Layout("".join(example.pieces), raw, base, starts, ends, bool(example.pieces), {})
        text, places, why = self.template.render(example.conversation)
        if example.conversation.messages[-1].get("content") == BLANK:
            text, places = _without_blank(text, places)
        raw, byte = text.encode(), base + byte_of(text)
        starts = [-1] * len(example.pieces)
        begins = np.array([place.start for place in places] + [len(text)])
        for place in places:
            if place.is_verbatim:
                starts[place.piece] = int(byte[place.start])
            turn = example.owners[place.piece]
            behind = begins[np.searchsorted(begins[:-1], max(place.end, place.start + 1))]
            ends[turn] = max(ends[turn], (int(byte[place.end]), int(byte[behind])))
        after, role = ends[-1][0] if ends else -1, example.conversation.messages[-1]["role"]
        is_open = after >= 0 and not raw[after - base :].strip() and role == "assistant"
        if is_open:
            ends[-1] = after, base + len(raw) + 2
        return _Layout(text, raw, base, starts, ends, is_open, why)

    def _offsets(self, layout: _Layout, number: int) -> tuple[Ints, Ints, Ints]:
        """Ids and byte ranges by the tokenizer's own offsets, for one that does not spell the text as it is.

        Some tokenizers leave the white space of a token out of them.
        """
        encoding = self.backend.encode(layout.text, add_special_tokens=False)
        row = np.asarray(encoding.ids, np.int64)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        if offsets.max(initial=0) > len(layout.text):  # as where BPE has a prefix and falls back on bytes
            said = f"its tokenizer has tokens at characters up to {offsets.max()} of a text of {len(layout.text)}"
            raise ValueError(f"row {number}: {self.name}: {said}")
        start, end = byte_of(layout.text)[offsets.T]
        for k, (i, last) in enumerate(zip(encoding.ids, end.tolist(), strict=True)):
            if layout.raw.endswith(self.tokens[i], 0, last):
                start[k] = last - self.lengths[i]
        return row, np.minimum.accumulate(start[::-1])[::-1], np.maximum.accumulate(end)

    def _turn_ends(self, ids: Ints, start: Ints, stretches: Sequence[tuple[int, int]]) -> Ints:
        """The first end token in each stretch of bytes, or the special token that it begins with, as where a template
        ends a turn by the mark of the next; -1 if there is none or the stretch begins at -1."""
        after, until = np.array(stretches, np.int64).reshape(-1, 2).T
        (places,) = self.is_end[ids].nonzero()
        places = np.append(places, -1)
        position = np.append(start[places[:-1]], np.iinfo(np.int64).max)
        k = np.searchsorted(position[:-1], after)
        found = np.where((after >= 0) & (position[k] < until), places[k], -1)
        for turn in ((after >= 0) & (found < 0)).nonzero()[0].tolist():
            k = int(np.searchsorted(start, after[turn]))
            while k < len(ids) and start[k] < until[turn] and self.tokens[ids[k]].isspace():
                k += 1
            if k < len(ids) and start[k] < until[turn] and self.is_mark[ids[k]]:
                found[turn] = k
        return found


def _nothing(example: Example, base: int) -> _Layout:
    """Of an example that is not read."""
    return _Layout("", b"", base, [-1] * len(example.pieces), [(-1, -1)] * len(example.trained), False, {})


def _without_blank(text: str, places: Sequence[Place]) -> tuple[str, list[Place]]:
    """The text without `BLANK`, and places in it."""

    def place(at: int) -> int:
        return at - text.count(BLANK, 0, at)

    return text.replace(BLANK, ""), [one._replace(start=place(one.start), end=place(one.end)) for one in places]


def byte_of(text: str) -> Ints:
    """[T + 1]: the byte at which each character begins."""
    code = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return np.concatenate([[0], np.cumsum(1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF))])
