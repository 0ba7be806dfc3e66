"""Vocabularies: the raw bytes of every token, its kind, and the roles that special tokens play."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .retokenize import encode_pieces, plain_copy

TOKEN_KINDS: tuple[str, ...] = _core.token_kinds
"""Names of the token kinds; `Vocabulary.kinds` holds indices into this tuple."""

ROLES: dict[str, tuple[str, ...]] = {
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "end_of_turn": ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<turn|>", "<|end|>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "start_of_turn": ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|turn>", "<|start|>"),
    "end_of_header": ("<|end_header_id|>", "<|message|>"),
    "unk": ("<unk>", "[UNK]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>"),
}
"""Roles in order of precedence, each with well-known names, used where the tokenizer itself names no token.

Equal roles of two tokenizers match each other, whatever their text."""

_ATTRIBUTES = {"eos": "eos_token_id", "bos": "bos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}
_RESERVED = re.compile(r"(unused|reserved)[a-z_ ]*\d+", re.IGNORECASE)
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

TokenizerLike = Any
"""A `transformers` fast tokenizer, a `tokenizers.Tokenizer`, a path, a Hub id, or a `Vocabulary`."""


class Vocabulary:
    """The tokens of a tokenizer as raw bytes.

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

    Raises
    ------
    TypeError
        If a token is not bytes.
    ValueError
        If lengths differ, a kind is unknown, or a role's id is out of range or not special.

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
        given = {role: int(i) for role, i in (roles or {}).items() if i is not None}
        order = {role: i for i, role in enumerate(ROLES)}
        self.roles = dict(sorted(given.items(), key=lambda item: order.get(item[0], len(order))))
        if kinds is None:
            special = set(self.roles.values())
            kinds = ["special" if i in special else "normal" for i in range(len(tokens))]
        try:
            codes = [TOKEN_KINDS.index(kind) if isinstance(kind, str) else int(kind) for kind in kinds]
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

        Parameters
        ----------
        tokenizer
            A `transformers` fast tokenizer, a `tokenizers.Tokenizer`, the path of a ``tokenizer.json`` or of a folder
            that `transformers.AutoTokenizer` can load, a Hub id, or a `Vocabulary`, which is returned as it is.

        Raises
        ------
        TypeError
            If `tokenizer` is none of these, or a slow (pure Python) tokenizer.
        ValueError
            If the tokenizer writes its tokens in a way that is not known here. ByteLevel BPE, SentencePiece / Metaspace
            (with or without byte fallback, BPE or Unigram) and WordPiece are.
        FileNotFoundError
            If a path does not exist.
        """
        if isinstance(tokenizer, Vocabulary):
            return tokenizer
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = _load(tokenizer)
        backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not all(hasattr(backend, name) for name in ("get_vocab", "get_added_tokens_decoder", "decoder", "model")):
            raise TypeError(
                "tokenizer: expected a transformers fast tokenizer, a tokenizers.Tokenizer, a path or a Hub id, got "
                f"{type(tokenizer).__name__}; slow tokenizers have no fast backend to read, load with use_fast=True"
            )
        spelling, word_prefix, byte_fallback = _spelling(backend)

        base = backend.get_vocab(with_added_tokens=False)
        added_tokens = backend.get_added_tokens_decoder()
        size = max([*base.values(), *added_tokens], default=-1) + 1
        tokens: list[bytes] = [b""] * size
        kinds = np.full(size, TOKEN_KINDS.index("unused"), dtype=np.uint8)
        pieces = list(base)
        for piece, text in zip(pieces, _core.spelled_bytes(pieces, spelling, word_prefix), strict=True):
            i = base[piece]
            tokens[i] = text
            kinds[i] = TOKEN_KINDS.index("normal")
            match = _BYTE_PIECE.fullmatch(piece) if byte_fallback else None
            if match:
                tokens[i] = bytes.fromhex(match[1])
                kinds[i] = TOKEN_KINDS.index("byte")
        special: dict[str, int] = {}
        for i, added in added_tokens.items():
            if added.special:
                tokens[i] = added.content.encode()
                kinds[i] = TOKEN_KINDS.index("unused" if _RESERVED.search(added.content) else "special")
                special[added.content] = i
            elif base.get(added.content) != i:  # otherwise it is spelled like the rest of the vocabulary
                tokens[i] = added.content.encode()
                kinds[i] = TOKEN_KINDS.index("normal")
        if spelling != _core.TokenSpelling.byte_level:  # these list <s>, <unk> and the like in the vocabulary itself
            special = {
                **{name: base[name] for names in ROLES.values() for name in names if name in base},
                **special,
            }
        roles = _find_roles(tokenizer, special)
        kinds[list(roles.values())] = TOKEN_KINDS.index("special")
        return cls(tokens, kinds.tolist(), roles, tokenizer=backend)

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
        joined: bytes = self._core.join(np.ascontiguousarray(ids, dtype=np.int64))
        return joined

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of one piece of text, without special tokens and without a dummy space. See `xtoken.retokenize`."""
        _, ids = encode_pieces(self, [text.encode() if isinstance(text, str) else text])
        pieces: list[int] = ids.tolist()
        return pieces

    @cached_property
    def _plain_tokenizer(self) -> Any:
        return plain_copy(self.tokenizer)

    def fingerprint(self) -> str:
        """SHA-256 over all tokens, kinds and roles, in hex. Stable across machines and versions."""
        digest = hashlib.sha256(b"xtoken vocabulary 1\n")
        digest.update(np.asarray([len(token) for token in self._tokens], dtype="<i8").tobytes())
        digest.update(b"".join(self._tokens))
        digest.update(self.kinds.tobytes())
        digest.update(json.dumps(sorted(self.roles.items())).encode())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return Vocabulary, (self._tokens, self.kinds.tolist(), self.roles, self.tokenizer)

    def __repr__(self) -> str:
        counts = np.bincount(self.kinds, minlength=len(TOKEN_KINDS))
        kinds = ", ".join(f"{count} {kind}" for kind, count in zip(TOKEN_KINDS, counts, strict=True) if count)
        return f"Vocabulary({len(self)} tokens: {kinds}; roles: {', '.join(self.roles) or 'none'})"


def unpadded(tokenizer: Any) -> Any:
    """A copy of a `tokenizers.Tokenizer` that neither pads nor cuts."""
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def _load(source: str | os.PathLike[str]) -> Any:
    """A tokenizer from a path or a Hub id."""
    from tokenizers import Tokenizer

    path = Path(source)
    if path.is_file():
        return Tokenizer.from_file(str(path))
    if path.is_dir() and not (path / "tokenizer_config.json").exists() and (path / "tokenizer.json").exists():
        return Tokenizer.from_file(str(path / "tokenizer.json"))
    looks_local = path.is_absolute() or str(source).startswith(".") or len(path.parts) > 2
    if looks_local and not path.exists():
        raise FileNotFoundError(f"tokenizer: no such file or folder: {source}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(source))


def _components(part: Any) -> Iterable[dict[str, Any]]:
    """The parts of a decoder, pre-tokenizer or normalizer, as their JSON describes them, sequences flattened."""
    if part is None:
        return
    stack = [json.loads(part.__getstate__())]
    while stack:
        component = stack.pop()
        nested = component.get("decoders") or component.get("pretokenizers") or component.get("normalizers")
        if component.get("type") == "Sequence" and nested:
            stack.extend(nested)
        else:
            yield component


def _spelling(backend: Any) -> tuple[_core.TokenSpelling, str, bool]:
    """How a tokenizer writes its tokens: spelling, continuation mark, whether ``<0xHH>`` pieces are bytes."""
    parts = [*_components(backend.decoder), *_components(backend.pre_tokenizer)]
    types = {part["type"] for part in parts}
    model = backend.model
    name = type(model).__name__
    suffix = getattr(model, "end_of_word_suffix", None)
    if name == "WordPiece":
        return _core.TokenSpelling.wordpiece, model.continuing_subword_prefix, False
    if "ByteLevel" in types and not suffix:
        return _core.TokenSpelling.byte_level, "", False
    spaces = {part["content"] for part in parts if part["type"] == "Replace" and part["pattern"] == {"String": "▁"}}
    if ("Metaspace" in types or " " in spaces) and not suffix:
        byte_fallback = bool(getattr(model, "byte_fallback", False)) or "ByteFallback" in types
        return _core.TokenSpelling.metaspace, "", byte_fallback
    raise ValueError(
        f"tokenizer: unknown family: model {name}, decoder and pre-tokenizer {sorted(types) or 'none'}"
        + (f", word suffix {suffix!r}" if suffix else "")
        + "; ByteLevel, Metaspace / SentencePiece and WordPiece are known. For others pass "
        "Vocabulary(tokens=[bytes, ...])"
    )


def _find_roles(tokenizer: Any, special: Mapping[str, int]) -> dict[str, int]:
    """Roles from the tokenizer's attributes, then from well-known names."""
    roles: dict[str, int] = {}
    for role, names in ROLES.items():
        token_id = getattr(tokenizer, _ATTRIBUTES[role], None) if role in _ATTRIBUTES else None
        if token_id is not None:
            roles[role] = token_id
            continue
        found = [special[name] for name in names if name in special]
        if found:
            roles[role] = found[0]
    return roles
