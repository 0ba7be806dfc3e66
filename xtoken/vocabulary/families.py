"""Families of tokenizers: how each is recognised, how it spells its tokens, and how it takes text as it stands."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from xtoken import _core

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_MARKING = {"ByteLevel", "Metaspace"}
"""Parts that write something for a space."""

_UNKNOWN_ID = re.compile(rb'"unk_id":(\d+)')


def words_of(tokenizer: Any, text: str) -> list[str]:
    """What a tokenizer cuts a text into; its model reads each by itself."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    cut = tokenizer.pre_tokenizer
    return [text] if cut is None else [word for word, _ in cut.pre_tokenize_str(text)]


@dataclass(frozen=True)
class Parts:
    """What a `tokenizers.Tokenizer` is made of, as far as it tells how tokens are written."""

    model: str
    encodes: set[str]
    """Types of its normalizer and pre-tokenizer."""
    decodes: set[str]
    """Types of its decoder."""
    space: str | None
    """What becomes of a space between two words, and stands for it in tokens; "" if they do not hold spaces, None if
    it is not known."""
    going_on: str
    """What its model writes before a piece that goes on with a word, maybe nothing."""
    adds_spaces: bool
    """Whether its pre-tokenizer puts a space before each word that it cuts out."""

    @classmethod
    def of(cls, tokenizer: Any) -> Parts:
        types: dict[str, set[str]] = {"normalizer": set(), "pre_tokenizer": set(), "decoder": set()}
        adds_spaces = False
        between = re.search("a(.*)b", "".join(words_of(tokenizer, "a b")), re.DOTALL)
        for name, found in types.items():
            part = getattr(tokenizer, name)
            states = [json.loads(part.__getstate__())] if part is not None else []
            for state in states:
                nested = state.get("decoders") or state.get("pretokenizers") or state.get("normalizers")
                if nested:
                    states += nested  # the loop comes to them
                    continue
                found.add(state["type"])
                if name == "pre_tokenizer":
                    adds_spaces |= state.get("add_prefix_space", False) or state.get("prepend_scheme") == "always"
        encodes = types["normalizer"] | types["pre_tokenizer"]
        mark = getattr(tokenizer.model, "continuing_subword_prefix", None) or ""
        space = re.sub(r"(.+?)\1*", r"\1", between[1], count=1, flags=re.DOTALL) if between else None
        return cls(type(tokenizer.model).__name__, encodes, types["decoder"], space, mark, adds_spaces)

    @property
    def are_bytes(self) -> bool:
        """Whether the characters of tokens are bytes in GPT-2's table."""
        if "ByteLevel" in self.encodes:
            return self.space == _core.byte_level_piece(b" ")
        return "ByteLevel" in self.decodes and self.space == " " and self.model != "WordPiece"

    @property
    def are_words(self) -> bool:
        """Whether they are words, or go on with one, without what is between words."""
        return self.model == "WordPiece" and self.space == "" and bool(self.going_on and not self.encodes & _MARKING)


AS_IT_STANDS: Mapping[str, Mapping[str, Any] | None] = {
    "ByteLevel": {"add_prefix_space": False},
    "Metaspace": {"prepend_scheme": "never"},
    **dict.fromkeys(("Prepend", "Strip", "UnicodeScripts")),  # the last loses the space that a text begins with
}
"""Parts by type, with the options that leave the spaces of a text as they are; None: parts to take out."""

_PUNCTUATION = r"\p{P}$+<=>^`|~"
_LETTERS = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}"  # the \w of Split takes some fractions too


def _cut(pattern: str) -> Mapping[str, Any]:
    return {"type": "Split", "pattern": {"Regex": rf"\s*(?:{pattern})"}, "behavior": "Isolated", "invert": False}


WITH_SPACES: Mapping[str, Mapping[str, Any] | None] = {
    "WhitespaceSplit": None,
    "Whitespace": _cut(rf"[{_LETTERS}]+|[^{_LETTERS}\s]+"),
    "BertPreTokenizer": _cut(rf"[^\s{_PUNCTUATION}]+|[{_PUNCTUATION}]"),
    "CharDelimiterSplit": _cut(r"\S+"),
    "Split Removed": {"behavior": "MergedWithNext"},
}
"""The same of parts that drop spaces, where another puts one before each word."""


@dataclass(frozen=True)
class Family:
    """One family. A new one is a record in `FAMILIES`."""

    name: str
    recognised: Callable[[Parts], bool]
    spelled: Callable[[Any, Parts, list[str], list[bool]], list[bytes]] | None
    """The bytes of pieces, and whether each goes on with a word, by the model's mark, which is taken off; None: not
    known, they must be given."""
    byte_fallback: bool = False
    """Whether tokens ``<0xHH>`` may be bytes."""
    lists_special: bool = True
    """Whether the vocabulary itself lists ``<s>``, ``<unk>`` and the like, besides the added tokens."""
    plain: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    """As `AS_IT_STANDS`."""
    encode_bytes: Callable[[Any, bytes], list[int]] | None = None
    """Ids of a text that is not UTF-8; None: its stray bytes are tokens ``<0xHH>``, if there are any."""


def _words(tokenizer: Any, parts: Parts, pieces: list[str], go_on: list[bool]) -> list[bytes]:
    """Words after a space, unless the tokenizer begins a word with that character wherever it stands.

    Such a word, punctuation or an ideograph, does not tell whether a space came before it.
    """

    @functools.cache
    def stands_alone(character: str) -> bool:
        return len(words_of(tokenizer, "a" + character)) > 1

    glued = (goes or stands_alone(piece[:1]) for piece, goes in zip(pieces, go_on, strict=True))
    return [(piece if is_glued else f" {piece}").encode() for piece, is_glued in zip(pieces, glued, strict=True)]


FAMILIES: tuple[Family, ...] = (
    Family(
        "ByteLevel",
        lambda parts: parts.are_bytes,
        lambda tokenizer, parts, pieces, go_on: _core.byte_level_bytes(pieces),
        lists_special=False,
        plain=AS_IT_STANDS,
        encode_bytes=lambda tokenizer, text: [t.id for t in tokenizer.model.tokenize(_core.byte_level_piece(text))],
    ),
    Family("WordPiece", lambda parts: parts.are_words, _words),
    Family(
        "Metaspace / SentencePiece",
        lambda parts: "ByteLevel" not in parts.encodes and bool(parts.space),
        lambda tokenizer, parts, pieces, go_on: [piece.replace(str(parts.space), " ").encode() for piece in pieces],
        byte_fallback=True,
        plain=AS_IT_STANDS,
    ),
    Family("unknown", lambda parts: True, None),
)
"""In the order in which they are tried."""


def recognise(tokenizer: Any) -> tuple[Family, Parts]:
    """The family of a `tokenizers.Tokenizer`, and what tells so."""
    parts = Parts.of(tokenizer)
    return next(family for family in FAMILIES if family.recognised(parts)), parts


def text_of_added(tokenizer: Any, parts: Parts, added: Any) -> bytes:
    """The text that an added token stands for: its content, as the normalizer writes it if that comes first."""
    if added.special or not added.normalized or tokenizer.normalizer is None:
        return bytes(added.content, "utf-8")
    written, pair = map(tokenizer.normalizer.normalize_str, (added.content, "a b"))
    if parts.are_bytes and "b" in pair and " " not in pair:
        return _core.byte_level_bytes([written])[0]
    return bytes(written.replace(parts.space, " ") if parts.space and f"a{parts.space}b" in pair else written, "utf-8")


def unknown_id(tokenizer: Any) -> int | None:
    """The token that a model writes for what it does not know, if it has one."""
    if hasattr(tokenizer.model, "unk_token"):
        name = tokenizer.model.unk_token
        return None if name is None else tokenizer.model.token_to_id(name)
    found = _UNKNOWN_ID.search(tokenizer.model.__getstate__())  # of Unigram
    return None if found is None else int(found[1])


def spell(tokenizer: Any, pieces: list[str]) -> tuple[Family, list[bytes], list[bool]]:
    """The family, the bytes of tokens as the tokenizer writes them, and whether each stands for one byte.

    Raises ValueError if the family is not known.
    """
    family, parts = recognise(tokenizer)
    model, suffix = tokenizer.model, getattr(tokenizer.model, "end_of_word_suffix", None)
    if family.spelled is None or suffix:
        *names, last = sorted(known.name for known in FAMILIES if known.spelled is not None)
        found = f"model {parts.model}, normalizer and pre-tokenizer {sorted(parts.encodes) or 'none'}, by which tokens "
        found += f"hold {parts.space!r} for a space" if parts.space else "do not hold spaces"
        found += f", decoder {sorted(parts.decodes) or 'none'}" + (f", word suffix {suffix!r}" if suffix else "")
        hint = f"{', '.join(names)} and {last} are known. For others pass Vocabulary(tokens=[bytes, ...])"
        raise ValueError(f"tokenizer: unknown family: {found}; {hint}")
    falls_back = getattr(model, "byte_fallback", None)
    if falls_back is None:  # which Unigram does not tell otherwise
        falls_back = b'"byte_fallback":true' in model.__getstate__()
    may_be_bytes = family.byte_fallback and (falls_back or "ByteFallback" in parts.decodes)
    are_bytes = [bool(may_be_bytes and _BYTE_PIECE.fullmatch(piece)) for piece in pieces]
    mark = parts.going_on
    go_on = [bool(mark) and len(piece) > len(mark) and piece.startswith(mark) for piece in pieces]
    stems = [piece[len(mark) :] if goes else piece for piece, goes in zip(pieces, go_on, strict=True)]
    spelled = family.spelled(tokenizer, parts, stems, go_on)
    for k in (k for k, is_byte in enumerate(are_bytes) if is_byte):
        spelled[k] = bytes.fromhex(pieces[k][3:5])
    return family, spelled, are_bytes
