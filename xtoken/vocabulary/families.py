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


@dataclass(frozen=True)
class Parts:
    """What a `tokenizers.Tokenizer` is made of, as far as it tells how tokens are written."""

    model: str
    types: set[str]
    """Of its decoder and pre-tokenizer."""
    before: set[str]
    """Of its pre-tokenizer."""
    space: str | None
    """What stands in tokens for a space, by its own decoder, pre-tokenizer or normalizer."""
    adds_spaces: bool
    """Whether its pre-tokenizer puts a space before each word that it cuts out."""

    @classmethod
    def of(cls, tokenizer: Any) -> Parts:
        types: dict[str, set[str]] = {"decoder": set(), "pre_tokenizer": set(), "normalizer": set()}
        spaces: list[str] = []
        adds_spaces = False
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
                if state["type"] == "Metaspace":
                    spaces.append(state["replacement"])
                elif state["type"] == "Replace":  # a normalizer writes the mark, a decoder takes it off
                    ends = state["pattern"].get("String"), state["content"]
                    mark, space = ends if name == "decoder" else ends[::-1]
                    spaces += [mark] if space == " " and mark else []
        both = types["decoder"] | types["pre_tokenizer"]
        space = spaces[0] if spaces else None
        return cls(type(tokenizer.model).__name__, both, types["pre_tokenizer"], space, adds_spaces)


AS_IT_STANDS: Mapping[str, Mapping[str, Any] | None] = {
    "ByteLevel": {"add_prefix_space": False},
    "Metaspace": {"prepend_scheme": "never"},
    **dict.fromkeys(("Prepend", "Strip", "UnicodeScripts")),  # the last loses the space that a text begins with
}
"""Parts by type, with the options that leave the spaces of a text as they are; None: parts to take out."""

_PUNCTUATION = r"\p{P}$+<=>^`|~"


def _cut(pattern: str) -> Mapping[str, Any]:
    return {"type": "Split", "pattern": {"Regex": rf"\s*(?:{pattern})"}, "behavior": "Isolated", "invert": False}


WITH_SPACES: Mapping[str, Mapping[str, Any] | None] = {
    "WhitespaceSplit": None,
    "Whitespace": _cut(r"\w+|[^\w\s]+"),
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


def words_of(tokenizer: Any, text: str) -> list[str]:
    """What a tokenizer cuts a text into; its model reads each by itself."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    cut = tokenizer.pre_tokenizer
    return [text] if cut is None else [word for word, _ in cut.pre_tokenize_str(text)]


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
        lambda parts: "ByteLevel" in (parts.before if parts.model == "WordPiece" else parts.types),
        lambda tokenizer, parts, pieces, go_on: _core.byte_level_bytes(pieces),
        lists_special=False,
        plain=AS_IT_STANDS,
        encode_bytes=lambda tokenizer, text: [t.id for t in tokenizer.model.tokenize(_core.byte_level_piece(text))],
    ),
    Family("WordPiece", lambda parts: parts.model == "WordPiece" and "Metaspace" not in parts.before, _words),
    Family(
        "Metaspace / SentencePiece",
        lambda parts: parts.space is not None,
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


def spell(tokenizer: Any, pieces: list[str]) -> tuple[Family, list[bytes], list[bool]]:
    """The family, the bytes of tokens as the tokenizer writes them, and whether each stands for one byte.

    Raises ValueError if the family is not known.
    """
    family, parts = recognise(tokenizer)
    model, suffix = tokenizer.model, getattr(tokenizer.model, "end_of_word_suffix", None)
    if family.spelled is None or suffix:
        *names, last = sorted(known.name for known in FAMILIES if known.spelled is not None)
        found = f"model {parts.model}, decoder and pre-tokenizer {sorted(parts.types) or 'none'}"
        found += f", word suffix {suffix!r}" if suffix else ""
        hint = f"{', '.join(names)} and {last} are known. For others pass Vocabulary(tokens=[bytes, ...])"
        raise ValueError(f"tokenizer: unknown family: {found}; {hint}")
    may_be_bytes = family.byte_fallback and (getattr(model, "byte_fallback", False) or "ByteFallback" in parts.types)
    are_bytes = [bool(may_be_bytes and _BYTE_PIECE.fullmatch(piece)) for piece in pieces]
    mark = getattr(model, "continuing_subword_prefix", "") or ""
    go_on = [bool(mark) and len(piece) > len(mark) and piece.startswith(mark) for piece in pieces]
    stems = [piece[len(mark) :] if goes else piece for piece, goes in zip(pieces, go_on, strict=True)]
    spelled = family.spelled(tokenizer, parts, stems, go_on)
    for k in (k for k, is_byte in enumerate(are_bytes) if is_byte):
        spelled[k] = bytes.fromhex(pieces[k][3:5])
    return family, spelled, are_bytes
