"""Vocabularies: the raw bytes of every token, its kind, and the roles that special tokens play."""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken import _core

from . import families
from .encode import Encoder, behaviour, prefix_of, unpadded
from .roles import MARK, RESERVED, ROLES, find_roles
from .sources import load_tokenizer

__all__ = [
    "MOST_HOLES", "ROLES", "TOKEN_KINDS", "TokenizerLike", "Vocabulary", "check_several", "load_tokenizer", "prefix_of",
    "unpadded",
]  # fmt: skip

TOKEN_KINDS: tuple[str, ...] = _core.token_kinds
"""Names of the token kinds; `Vocabulary.kinds` holds indices into this tuple."""

MOST_HOLES = 1 << 20
"""Ids without a token that a vocabulary may have, more or less."""

TokenizerLike = Any
"""A `transformers` fast tokenizer, a `tokenizers.Tokenizer`, a path, a Hub id, or a `Vocabulary`."""


def check_several(texts: Any, name: str) -> None:
    """Raises TypeError for a text in place of several, which would be read character by character."""
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"{name}: expected several texts, got one {type(texts).__name__}")


class Vocabulary:
    """The tokens of a tokenizer as raw bytes.

    Raises TypeError if a token is not bytes; ValueError if lengths differ, a kind is unknown, or a role's id is out of
    range or not special.

    Parameters
    ----------
    tokens : sequence of bytes, length V
        Bytes of each token id. Several ids may have the same bytes; an empty token is allowed.
    kinds : sequence of str or int, length V, optional
        ``"normal"`` (text), ``"byte"`` (one byte, produced where nothing else fits), ``"special"`` (no text) or
        ``"unused"`` (never produced). Default: special if the id has a role, else normal.
    roles : mapping of str to int, optional
        Token id of each role, such as ``{"bos": 0, "eos": 1, "pad": 1}``. See `ROLES`.
    tokenizer : tokenizers.Tokenizer, optional
        Encodes text for this vocabulary. Without one, text is cut by the longest token that fits next.

    Attributes
    ----------
    kinds : uint8 [V]
    roles : dict of str to int

    Examples
    --------
    >>> vocabulary = Vocabulary([b"<s>", b"a", b"ab"], roles={"bos": 0})
    >>> len(vocabulary), vocabulary[2], vocabulary.encode(b"aab")
    (3, b'ab', [1, 2])
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        kinds: Sequence[str | int] | None = None,
        roles: Mapping[str, int] | None = None,
        tokenizer: Any = None,
    ) -> None:
        tokens = list(tokens)
        for i, token in enumerate(tokens):
            if not isinstance(token, bytes):
                raise TypeError(f"tokens: expected bytes, got {type(token).__name__} at position {i}")
        given = {role: operator.index(i) for role, i in (roles or {}).items() if i is not None}
        self.roles = {role: given.pop(role) for role in ROLES if role in given} | given
        if kinds is None:
            special = set(self.roles.values())
            kinds = ["special" if i in special else "normal" for i in range(len(tokens))]
        try:
            codes = [TOKEN_KINDS.index(kind) if isinstance(kind, str) else operator.index(kind) for kind in kinds]
        except ValueError:
            raise ValueError(f"kinds: expected names among {TOKEN_KINDS}, got {sorted(set(map(str, kinds)))}") from None
        if any(not 0 <= code < len(TOKEN_KINDS) for code in codes):
            raise ValueError(f"kinds: expected indices below {len(TOKEN_KINDS)}, got {min(codes)} to {max(codes)}")
        self.kinds: NDArray[np.uint8] = np.asarray(codes, dtype=np.uint8)
        self.tokenizer = tokenizer
        self._tokens = tokens
        self._core = _core.Vocabulary(tokens, self.kinds, list(self.roles.items()))

    @classmethod
    def from_tokenizer(cls, tokenizer: TokenizerLike) -> Vocabulary:
        """Reads the tokens of a tokenizer.

        Raises TypeError if `tokenizer` is none of those below, or a slow (pure Python) tokenizer; ValueError if it
        writes its tokens in a way that is not known here: ByteLevel BPE, SentencePiece / Metaspace (with or without
        byte fallback, BPE or Unigram) and WordPiece are, but not others whose tokens do not hold the spaces of a text;
        FileNotFoundError if a path does not exist.

        Parameters
        ----------
        tokenizer
            A `transformers` fast tokenizer, a `tokenizers.Tokenizer`, what `load_tokenizer` takes (a path or a Hub id),
            or a `Vocabulary`, which is returned as it is.
        """
        if isinstance(tokenizer, Vocabulary):
            return tokenizer
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = load_tokenizer(tokenizer)
        backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not all(hasattr(backend, name) for name in ("get_vocab", "get_added_tokens_decoder", "decoder", "model")):
            raise TypeError(
                "tokenizer: expected a transformers fast tokenizer, a tokenizers.Tokenizer, a path or a Hub id, got "
                f"{type(tokenizer).__name__}; slow tokenizers have no fast backend to read, load with use_fast=True"
            )
        base, added_tokens = backend.get_vocab(with_added_tokens=False), backend.get_added_tokens_decoder()
        size = max([*base.values(), *added_tokens], default=-1) + 1
        if size > MOST_HOLES + 2 * (len(base) + len(added_tokens)):
            raise ValueError(f"tokenizer: its largest id is {size - 1}, but it has {len(base)} tokens: is it damaged?")
        tokens: list[bytes] = [b""] * size
        kinds = ["unused"] * size
        family, texts, are_bytes = families.spell(backend, list(base))
        for i, text, is_byte in zip(base.values(), texts, are_bytes, strict=True):
            tokens[i], kinds[i] = text, "byte" if is_byte else "normal"
        parts, special = families.Parts.of(backend), dict[str, int]()
        if family.lists_special:
            special = {name: base[name] for names in ROLES.values() for name in names if name in base}
        unknown = families.unknown_id(backend)
        name = None if unknown is None else backend.model.id_to_token(unknown)
        if name is not None and (family.lists_special or len(name) > 1):  # else a byte
            special[name] = base[name]
        for i, added in added_tokens.items():
            if not added.special and base.get(added.content) == i:
                continue  # it is spelled like the rest of the vocabulary
            tokens[i], kinds[i] = families.text_of_added(backend, parts, added), "normal"
            if added.special:
                kinds[i] = "unused" if RESERVED.search(added.content) else "special"
                special[added.content] = i
        # A token of text that a tokenizer is told to pad with, say, stays text.
        words = {i for i, added in added_tokens.items() if not added.special and not MARK.fullmatch(added.content)}
        of_text = words.union(base.values()).difference(special.values())
        roles = {role: i for role, i in find_roles(tokenizer, special).items() if i not in of_text}
        if unknown is not None and unknown in special.values() and unknown not in roles.values():
            roles["unk"] = unknown
        for i in roles.values():
            kinds[i] = "special"
        for name, i in special.items():
            if i in roles.values() or i == unknown:
                tokens[i], kinds[i] = name.encode(), "special"
        return cls(tokens, kinds, roles, tokenizer=backend)

    def __len__(self) -> int:
        """Number of ids, holes included: the largest id plus one."""
        return len(self._tokens)

    def __getitem__(self, token_id: int) -> bytes:
        """Raw bytes of a token; the literal of a special token."""
        return self._tokens[token_id]

    def kind(self, token_id: int) -> str:
        """Kind of a token, one of `TOKEN_KINDS`."""
        return TOKEN_KINDS[int(self.kinds[token_id])]

    @property
    def is_text(self) -> NDArray[np.bool_]:
        """bool [V]: the token stands for text (normal or byte)."""
        return self.kinds <= TOKEN_KINDS.index("byte")

    def decode(self, ids: Any) -> bytes:
        """The bytes of a sequence of ids, put together; tokens that stand for no text add nothing."""
        given = np.asarray(ids)
        if given.size and (given.dtype.kind not in "iu" or not np.can_cast(given.dtype, np.int64)):
            raise TypeError(f"ids: expected integers, got {given.dtype}")
        return self._core.join(np.ascontiguousarray(given, dtype=np.int64))

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of one piece of text, without special tokens and without a dummy space; see `encode_pieces`."""
        return self._encoder([text.encode() if isinstance(text, str) else text])[0]

    def encode_pieces(self, texts: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Encodes each text on its own, as it would stand within a longer one.

        Valid UTF-8 goes through the tokenizer in one batch. Bytes that are not valid UTF-8 go to the byte-level model
        itself or to byte-fallback pieces, never through U+FFFD; what has no piece, and unknown tokens, are left out.
        Returns ptr, int64 [len(texts) + 1], and ids, int32: text ``k`` has the ids ``ids[ptr[k]:ptr[k + 1]]``.
        """
        rows = self._encoder(texts)
        ptr = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return ptr, np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=int(ptr[-1]))

    def pieces(
        self, wanted: NDArray[np.bool_], other: Vocabulary
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
        """The text tokens among those that `wanted` [V] names, int32, and their pieces: ``other.encode_pieces``."""
        tokens = np.flatnonzero(wanted & self.is_text).astype(np.int32)
        return tokens, *other.encode_pieces([self[i] for i in tokens.tolist()])

    @cached_property
    def _encoder(self) -> Callable[[Sequence[bytes]], list[list[int]]]:
        if self.tokenizer is not None:
            return Encoder(self.tokenizer, self.is_text)
        matcher = _core.LongestMatch(self._core)
        return lambda texts: [matcher.encode(text) for text in texts]

    def fingerprint(self) -> str:
        """SHA-256, in hex, over all tokens, kinds and roles, and over what else decides how its tokenizer encodes: the
        model with its merges, normalizer, pre-tokenizer, post-processor, added tokens and their flags. Stable across
        machines and versions.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(b"xtoken vocabulary 2\n")
        digest.update(np.asarray([len(token) for token in self._tokens], dtype="<i8").tobytes())
        digest.update(b"".join(self._tokens))
        digest.update(self.kinds.tobytes())
        digest.update(json.dumps(sorted(self.roles.items())).encode())
        digest.update(behaviour(self.tokenizer))
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return Vocabulary, (self._tokens, self.kinds.tolist(), self.roles, self.tokenizer)

    def __repr__(self) -> str:
        counts = np.bincount(self.kinds, minlength=len(TOKEN_KINDS))
        kinds = ", ".join(f"{count} {kind}" for kind, count in zip(TOKEN_KINDS, counts, strict=True) if count)
        return f"Vocabulary({len(self)} tokens: {kinds}; roles: {', '.join(self.roles) or 'none'})"
