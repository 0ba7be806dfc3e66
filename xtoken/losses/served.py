"""Log-probabilities as servers return them: vLLM, SGLang, and the API of OpenAI."""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtoken.vocabulary import TokenizerLike, Vocabulary

logger = logging.getLogger(__name__)

ROUNDING = 1e-2
"""What log-probabilities, and a sum of probabilities, may be above 0 and 1: bfloat16 rounds."""

_LISTS = ("prompt_logprobs", "input_top_logprobs", "top_logprobs", "content", "input_token_logprobs", "token_logprobs")
_HOLDERS = ("choices", "logprobs", "meta_info")
"""What of a whole answer holds one of the lists."""
_OF_TEXT = ("top_logprobs", "content", "token_logprobs")
_ID = re.compile(r"(?:token_id:)?(\d+)")
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")  # of a token that is no text by itself

Pair = tuple[Any, float]
"""A token, as id, text or bytes, and its log-probability."""


def served_entries(answer: Any, tokenizer: TokenizerLike = None) -> list[dict[int, float] | None]:
    """For each token of a text the tokens that were listed in its place, with their log-probabilities; None where
    nothing is.

    `answer` is a list of entries, or what holds one: the forms are those of `TopKLogits.from_vllm`. Raises ValueError
    for anything else, and for tokens given as text without a `tokenizer`, or mostly unknown to it.
    """
    holder, name = _holder(answer)
    entries = _field(holder, name) if name else answer
    if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Sequence):
        raise ValueError(f"prompt_logprobs: expected a list with an entry for each token, got {type(answer).__name__}")
    if name not in _OF_TEXT and name != "input_top_logprobs" and (quickly := _of_vllm(entries)) is not None:
        return quickly
    if name in ("input_token_logprobs", "token_logprobs"):
        entries = [None] * len(entries)
    try:
        realised = _realised(holder, name, len(entries))
        pairs = [
            None if entry is None and one is None else [*_pairs(entry), *([] if one is None else [one])]
            for entry, one in zip(entries, realised, strict=True)
        ]
    except (TypeError, ValueError, LookupError, OverflowError, AttributeError) as error:
        raise ValueError(
            f"prompt_logprobs: expected tokens with log-probabilities, got another form: {error}"
        ) from error
    keys = {key for entry in pairs for key, _ in entry or () if not isinstance(key, int)}
    texts = {key for key in keys if not (isinstance(key, str) and _ID.fullmatch(key))}
    if name in _OF_TEXT or texts:
        texts = {key for key in keys if not (isinstance(key, str) and key.startswith("token_id:"))}
    known = _ids_of(texts, tokenizer) if texts else {}
    found: list[dict[int, float] | None] = []
    for entry in pairs:
        own: dict[int, float] = {}
        for key, value in entry or ():
            token = known.get(key) if key in texts else _as_id(key)
            if token is not None:
                own.setdefault(token, value)
        found.append(None if entry is None else own)
    return found


def _holder(answer: Any) -> tuple[Any, str]:
    """What holds the list of entries, and the list's name; "" if the answer itself is all there is."""
    if (name := next((name for name in _LISTS if _field(answer, name) is not None), "")) != "":
        return answer, name
    held = next((held for name in _HOLDERS if (held := _field(answer, name)) is not None), None)
    if held is None:
        return answer, ""
    return _holder(held[0] if isinstance(held, Sequence) and len(held) else held)


def _realised(holder: Any, name: str, count: int) -> list[Pair | None]:
    """For each of `count` entries the token that stands there, which need not be among the likeliest; None where its
    log-probability is not said."""
    pairs: list[Any] = []
    if name == "content":
        pairs = [(_spelled(one), _field(one, "logprob")) for one in _field(holder, name)]
    elif name in ("input_top_logprobs", "input_token_logprobs"):
        pairs = [(one[1], one[0]) for one in _field(holder, "input_token_logprobs") or ()]
    elif name in ("top_logprobs", "token_logprobs"):
        pairs = list(zip(*(_field(holder, one) or () for one in ("tokens", "token_logprobs")), strict=False))
    if len(pairs) != count:
        return [None] * count
    return [None if value is None else (_token(token), float(value)) for token, value in pairs]


def as_tables(entries: Sequence[Mapping[int, float]], width: int) -> tuple[Tensor, Tensor]:
    """Ids int64 and log-probabilities float32 [T, width] of what is listed for T tokens; -1 and -inf for no more."""
    counts = torch.tensor([len(entry) for entry in entries], dtype=torch.int64, device="cpu")
    ids = torch.full((len(entries), width), -1, device="cpu")
    logprobs = torch.full(ids.shape, -torch.inf, dtype=torch.float32, device="cpu")
    filled = torch.arange(width, device="cpu") < counts[:, None]
    try:
        ids[filled] = torch.from_numpy(np.fromiter(chain.from_iterable(entries), np.int64))
    except OverflowError as error:
        raise ValueError(f"prompt_logprobs: expected token ids of up to 64 bits: {error}") from error
    values = chain.from_iterable(entry.values() for entry in entries)
    logprobs[filled] = torch.from_numpy(np.fromiter(values, np.float32))
    return ids, logprobs


def _of_vllm(entries: Sequence[Any]) -> list[dict[int, float] | None] | None:
    """The entries of vLLM's JSON, in a tenth of the time; None for other forms."""
    try:
        return [
            None if entry is None else {int(key): float(one["logprob"]) for key, one in entry.items()}
            for entry in entries
        ]
    except (AttributeError, TypeError, KeyError, ValueError, IndexError):
        return None


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _pairs(entry: Any) -> Iterator[Pair]:
    """Everything that an entry lists."""
    if entry is None:
        return
    if isinstance(entry, Mapping) and "logprob" not in entry:
        yield from ((_token(key), _logprob(value)) for key, value in entry.items())
    elif _field(entry, "logprob") is not None:  # OpenAI's chat: a token with its alternatives
        yield from ((_spelled(one), _logprob(one)) for one in _field(entry, "top_logprobs") or ())
    else:  # SGLang: log-probability, id, text
        yield from ((operator.index(one[1]), float(one[0])) for one in entry)


def _spelled(token: Any) -> Any:
    spelled = _field(token, "bytes")
    return bytes(list(spelled)) if spelled is not None else _field(token, "token")


def _token(key: Any) -> Any:
    """A token as id, text or bytes."""
    if isinstance(key, (str, bytes)):
        escaped = _BYTES.fullmatch(key) if isinstance(key, str) else None
        return bytes.fromhex(escaped[1].replace("\\x", "")) if escaped else key
    return operator.index(key)


def _logprob(value: Any) -> float:
    return float(value["logprob"] if isinstance(value, Mapping) else getattr(value, "logprob", value))


def _as_id(key: Any) -> int:
    if isinstance(key, int):
        return key
    found = _ID.fullmatch(key)
    if found is None:
        raise ValueError(f"prompt_logprobs: expected a token id, got {key!r:.40}")
    return int(found[1])


def _ids_of(texts: set[Any], tokenizer: TokenizerLike) -> dict[Any, int]:
    """Ids of tokens given as text or bytes; unknown ones are left out, so that they count to the rest, and said."""
    if tokenizer is None:
        raise ValueError(
            f"prompt_logprobs: expected token ids, got texts such as {min(texts, key=str)!r:.40}; give the teacher's "
            "tokenizer as tokenizer=, or let the server return ids (vLLM: return_tokens_as_token_ids)"
        )
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    ids: dict[bytes, int] = {}
    for i in sorted(range(len(vocabulary)), key=lambda i: int(vocabulary.kinds[i])):
        ids.setdefault(vocabulary[i], i)
    spelled = {text: text if isinstance(text, bytes) else str(text).encode() for text in texts}
    known = {text: ids[raw] for text, raw in spelled.items() if raw in ids}
    if 2 * len(known) < len(texts):
        raise ValueError(f"prompt_logprobs: only {len(known)} of {len(texts)} tokens are in the tokenizer's vocabulary")
    if len(known) < len(texts):
        message = "%d of %d tokens are not in the tokenizer's vocabulary, such as %r; they count to the rest"
        logger.warning(message, len(texts) - len(known), len(texts), min(texts - set(known), key=str))
    return known
