"""Families of tokenizers: how each is recognised, how it spells its tokens, and how it takes text as it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from xtoken import _core

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Family:
    """One family. A new one is a record in `FAMILIES`, and its spelling in ``csrc/core/vocabulary``."""

    name: str
    recognised: Callable[[str, set[str], set[str]], bool]
    """By the name of its model, the types of decoder and pre-tokenizer, and what these put in place of ``"▁"``."""
    spelling: _core.TokenSpelling | None
    """How its tokens are written; None: not known, their bytes must be given."""
    continuation: str = ""
    """Attribute of the model with the mark of tokens that go on with a word."""
    byte_fallback: bool = False
    """Whether tokens ``<0xHH>`` may be bytes."""
    lists_special: bool = True
    """Whether the vocabulary itself lists ``<s>``, ``<unk>`` and the like, besides the added tokens."""
    plain: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    """Parts by type, with the options that leave a text as it stands; None: parts to take out."""
    encode_bytes: Callable[[Any, bytes], list[int]] | None = None
    """Ids of a text that is not UTF-8; None: its stray bytes are tokens ``<0xHH>``, if there are any."""


FAMILIES: tuple[Family, ...] = (
    Family(
        "WordPiece",
        lambda model, parts, spaces: model == "WordPiece",
        _core.TokenSpelling.wordpiece,
        continuation="continuing_subword_prefix",
    ),
    Family(
        "ByteLevel",
        lambda model, parts, spaces: "ByteLevel" in parts,
        _core.TokenSpelling.byte_level,
        lists_special=False,
        plain={"ByteLevel": {"add_prefix_space": False}},
        encode_bytes=lambda tokenizer, text: [t.id for t in tokenizer.model.tokenize(_core.byte_level_piece(text))],
    ),
    Family(
        "Metaspace / SentencePiece",
        lambda model, parts, spaces: "Metaspace" in parts or " " in spaces,
        _core.TokenSpelling.metaspace,
        byte_fallback=True,
        plain={"Metaspace": {"prepend_scheme": "never"}, "Prepend": None},
    ),
    Family("unknown", lambda model, parts, spaces: True, None),
)
"""In the order in which they are tried."""


def recognise(tokenizer: Any) -> tuple[Family, set[str]]:
    """The family of a `tokenizers.Tokenizer`, and the types of its decoder and pre-tokenizer."""
    parts = (tokenizer.decoder, tokenizer.pre_tokenizer)
    states = [json.loads(part.__getstate__()) for part in parts if part is not None]
    types, spaces = set(), set()
    for state in states:
        nested = state.get("decoders") or state.get("pretokenizers")
        if nested:
            states += nested  # the loop comes to them
            continue
        types.add(state["type"])
        if state["type"] == "Replace" and state["pattern"] == {"String": "▁"}:
            spaces.add(state["content"])
    model = type(tokenizer.model).__name__
    return next(family for family in FAMILIES if family.recognised(model, types, spaces)), types


def spell(tokenizer: Any, pieces: list[str]) -> tuple[Family, list[bytes], list[bool]]:
    """The family, the bytes of tokens as the tokenizer writes them, and whether each stands for one byte.

    Raises ValueError if the family is not known.
    """
    family, types = recognise(tokenizer)
    model, suffix = tokenizer.model, getattr(tokenizer.model, "end_of_word_suffix", None)
    if family.spelling is None or suffix:
        *names, last = sorted(known.name for known in FAMILIES if known.spelling is not None)
        found = f"model {type(model).__name__}, decoder and pre-tokenizer {sorted(types) or 'none'}"
        found += f", word suffix {suffix!r}" if suffix else ""
        hint = f"{', '.join(names)} and {last} are known. For others pass Vocabulary(tokens=[bytes, ...])"
        raise ValueError(f"tokenizer: unknown family: {found}; {hint}")
    spelled = _core.spelled_bytes(pieces, family.spelling, getattr(model, family.continuation, ""))
    may_be_bytes = family.byte_fallback and (getattr(model, "byte_fallback", False) or "ByteFallback" in types)
    are_bytes = [bool(may_be_bytes and _BYTE_PIECE.fullmatch(piece)) for piece in pieces]
    for k in (k for k, is_byte in enumerate(are_bytes) if is_byte):
        spelled[k] = bytes.fromhex(pieces[k][3:5])
    return family, spelled, are_bytes
