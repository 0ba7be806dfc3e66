"""A teacher's log-probabilities on disk: run the teacher once, distil into any student, with any tokenizer.

One folder holds ``cache.json``, the index, and ``shard-00000.safetensors`` and so on. A shard holds documents one after
the other, N tokens in all of D documents:

========== ============ ==========================================================================
tensor     type, shape  meaning
========== ============ ==========================================================================
tokens     int32 [N]    the teacher's token ids
byte_ends  int32 [N]    bytes of text that the document's tokens up to this one spell
ids        int32 [N, k] the k likeliest next tokens, likeliest first
logprobs   f16 [N, k]   their log-probabilities (softmax over the vocabulary, temperature 1)
tail       float32 [N]  probability of all other tokens together
offsets    int64 [D+1]  where each document begins
digests    u8 [D, 32]   `document_digest` of each document
sums       int64 [D]    CRC-32 of each document's part of the first five
========== ============ ==========================================================================

A document is looked up by all of its token ids but an end token, even where log-probabilities cover only its beginning.
So a cache serves plain text and chats alike, and any student: the student's tokenizer plays no part in it.

Nothing is mapped. The file's checksum, which is looked at when a shard is opened, covers the last three tensors; what
is read of a document is compared with its sum, and must be sorted log-probabilities of tokens of the vocabulary.

float16 rather than bfloat16: log-probabilities lie within -65504 ... 0, and three more bits of precision cost nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _core
from .losses import TopKLogits
from .losses.logits import LEAST_TAIL
from .served import ServedModel
from .storage import FolderLock, Index, Numbering, TensorFile, TensorReader, other_tokenizers
from .vocabulary import TokenizerLike, Vocabulary, check_several, unpadded

_REBUILD = "xtoken cache-teacher with another --output"
INDEX = Index("cache.json", 2, "the index of a teacher cache", _REBUILD)
_TENSORS = {
    "tokens": ("I32", 1),
    "byte_ends": ("I32", 1),
    "ids": ("I32", 2),
    "logprobs": ("F16", 2),
    "tail": ("F32", 1),
    "offsets": ("I64", 1),
    "digests": ("U8", 2),
    "sums": ("I64", 1),
}
_OF_TOKENS = ("tokens", "byte_ends", "ids", "logprobs", "tail")
_FORMAT = {"format": "xtoken.teacher_cache", "version": "2"}
_SHARD = TensorFile("a shard of a teacher cache", _FORMAT, _TENSORS, _OF_TOKENS, _REBUILD)
SHARD_TOKENS = 1 << 18
"""Tokens of a shard, about: 200 MB at ``top_k=128``."""

OPEN_SHARDS = 64
"""Shards that a process keeps open."""

WINDOW = 256
"""Documents that are sorted by length together, so that a batch holds documents of similar length."""

SURE = 8
"""Different tokens that must be listed in places that are not theirs before an answer is taken for a shifted one."""

BLOCK_ROWS = 512
"""Rows of logits turned into log-probabilities at a time."""


@dataclass(frozen=True)
class CachedDocument:
    """What a cache holds of one document of T tokens."""

    token_ids: Tensor
    """int64 [T]: the teacher's tokens, as `Aligner.align` takes them."""
    byte_ends: Tensor
    """int64 [T]: bytes of text that tokens 0 ... t spell; special tokens spell none."""
    logits: TopKLogits
    """``ids`` and ``logprobs`` [T, k], in place of the teacher's logits in every loss; they and the tail sum to 1."""


def document_digest(token_ids: Sequence[int] | Tensor | NDArray[Any], end_id: int | None = None) -> bytes:
    """What a document is found by: SHA-256 of its token ids as little-endian int32, without `end_id` at their end."""
    ids = _int32("token_ids", token_ids)
    if end_id is not None:
        (others,) = (ids != end_id).nonzero()
        ids = ids[: others[-1] + 1 if len(others) else 0]
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i4").tobytes()).digest()


def _int32(name: str, values: Any) -> NDArray[np.int32]:
    """Token ids [T]; ValueError if they are not integers that fit."""
    if isinstance(values, Tensor) and (values.is_meta or values.layout != torch.strided):
        raise ValueError(f"{name}: expected token ids in memory, got a tensor of another form")
    ids = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or not 0 <= ids.min() <= ids.max() < 1 << 31)):
        raise ValueError(f"{name}: expected a list of token ids, got {str(values)[:60]}")
    return ids.astype(np.int32)


def _byte_lengths(vocabulary: Vocabulary) -> NDArray[np.int64]:
    """[V]: bytes of text that each token spells."""
    lengths = np.fromiter((len(vocabulary[i]) for i in range(len(vocabulary))), np.int64, len(vocabulary))
    return lengths * vocabulary.is_text


def _sums(part: Mapping[str, Tensor], offsets: Sequence[int]) -> list[int]:
    """CRC-32 of each document's part of what is there for each token."""
    arrays = [part[name].contiguous().numpy() for name in _OF_TOKENS]
    sums = []
    for first, last in itertools.pairwise(offsets):
        digest = 0
        for array in arrays:
            digest = zlib.crc32(array[first:last].tobytes(), digest)
        sums.append(digest)
    return sums


class TeacherCacheWriter(AbstractContextManager["TeacherCacheWriter"]):
    """Writes a cache, document by document; `cache_teacher` does so with a model, a served teacher can fill one too.

    A shard appears under its name when it is complete, so a run that is killed loses less than one shard. Leaving the
    ``with`` block without an exception writes the last shard and marks the cache as complete.

    Raises ValueError if the folder holds something and `resume` is false; if it was written otherwise, naming the
    difference; for a `top_k` or `max_length` below 1.

    Parameters
    ----------
    output : path
        Folder, created if missing.
    teacher_tok
        The teacher's tokenizer, as for `Vocabulary.from_tokenizer`.
    top_k : int
        Log-probabilities kept for each token; at most the size of the vocabulary.
    max_length : int, optional
        Most tokens of a document that log-probabilities are kept of.
    resume : bool
        Resume after the documents of complete shards.
    now : datetime, optional
        The time that the chat template has written into the documents, as `xtoken.train.teacher_documents` was told.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        teacher_tok: TokenizerLike,
        top_k: int = 128,
        *,
        max_length: int | None = None,
        resume: bool = False,
        shard_tokens: int = SHARD_TOKENS,
        now: datetime | None = None,
    ) -> None:
        for name, number in (("top_k", top_k), ("max_length", max_length), ("shard_tokens", shard_tokens)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        self.vocabulary = vocabulary = Vocabulary.from_tokenizer(teacher_tok)
        self.top_k, self.max_length = min(top_k, len(vocabulary)), max_length
        self.shard_tokens = shard_tokens
        self.folder = Path(output).absolute()
        self._lengths = _byte_lengths(vocabulary)
        sizes = {"vocab_size": len(vocabulary), "top_k": self.top_k, "max_length": max_length}
        self.end_id = vocabulary.roles.get("eos")
        self._parameters = {"teacher": vocabulary.fingerprint(), "end_id": self.end_id, **sizes}
        self._parameters["time"] = None if now is None else now.isoformat()
        self._shards: list[dict[str, Any]] = []
        self._waiting: list[tuple[NDArray[np.int32], TopKLogits, Tensor, bytes]] = []
        self._waiting_tokens = 0
        self._lock = FolderLock(self.folder)
        try:
            self._begin(resume)
        except BaseException:
            self._lock.__exit__()
            raise

    def _begin(self, resume: bool) -> None:
        if INDEX.prepare(self.folder, resume, "a teacher cache"):
            index = _read_index(self.folder)
            for name, value in self._parameters.items():
                if index[name] != value:
                    raise ValueError(f"resume: {self.folder} was made with {name}={index[name]!r}, now {value!r}")
            self._shards = index["shards"]
        else:
            self._save_index(complete=False)

    def __len__(self) -> int:
        """Documents of complete shards; after ``resume=True``, those that need not be added again."""
        return sum(shard["documents"] for shard in self._shards)

    def digests(self) -> Iterator[bytes]:
        """SHA-256 of the documents of complete shards, in order."""
        for shard in self._shards:
            with _SHARD.open(self.folder / shard["file"]) as file:
                yield from map(bytes, file.read("digests").numpy())

    def add(self, token_ids: Sequence[int] | Tensor, logits: TopKLogits, tail: Tensor | None = None) -> None:
        """Adds a document.

        Raises ValueError for shapes that do not fit, ids out of range, log-probabilities that are NaN or above 0, and
        a server's answer that is shifted by one token.

        Parameters
        ----------
        token_ids : int [T]
            The whole document, as `xtoken.train.teacher_documents` gives it for training; whether it ends with the end
            token does not matter.
        logits : TopKLogits
            [R, k] with k >= `top_k` or the whole vocabulary; row t predicts token t + 1. R may be less than T where
            only the beginning is kept. Ids of -1 stand for less than k.
        tail : [R], optional
            Probability of tokens that are not among the `top_k`. Default: what the listed ones leave.
        """
        tokens = _int32("token_ids", token_ids)
        size, shape = len(self.vocabulary), list(logits.ids.shape)
        most = len(tokens[: self.max_length])
        if len(shape) != 2 or shape[0] > most or shape[1] < self.top_k:
            expected = f"[<= {most}, >= {self.top_k}] as token_ids, max_length and top_k"
            raise ValueError(f"logits: expected {expected}, got {shape}")
        for name, ids, low in (("token_ids", tokens, 0), ("logits.ids", logits.ids, -1)):
            if len(ids) and not low <= int(ids.min()) <= int(ids.max()) < size:
                raise ValueError(f"{name}: expected {low} ... {size - 1}, got {int(ids.min())} to {int(ids.max())}")
        logprobs = logits.logprobs.detach().float().masked_fill(logits.ids < 0, -torch.inf)
        # A little above 0 is rounding of whoever computed them.
        if not bool((logprobs <= 1e-3).all()):
            raise ValueError(f"logits.logprobs: expected logarithms of probabilities, got {float(logprobs.max())}")
        _check_place(tokens, logits.ids.cpu().numpy(), logprobs.cpu().numpy())
        logprobs, order = logprobs.clamp_max_(0.0).sort(dim=1, descending=True, stable=True)
        logprobs, order = logprobs[:, : self.top_k], order[:, : self.top_k]
        if tail is None:
            tail = 1.0 - logprobs.double().exp().sum(1)
        elif tail.shape != logprobs.shape[:1] or not bool(torch.isfinite(tail).all()):
            raise ValueError(f"tail: expected {len(logprobs)} probabilities, got {list(tail.shape)}")
        ids = logits.ids.gather(1, order).to(torch.int32).cpu()
        lowest = torch.where(ids < 0, -torch.inf, torch.finfo(torch.float16).min)
        kept = TopKLogits(ids, torch.maximum(logprobs.cpu(), lowest).half())
        rows = len(logprobs)
        self._waiting.append(
            (tokens[:rows], kept, tail.float().clamp(0.0, 1.0).cpu(), document_digest(tokens, self.end_id))
        )
        self._waiting_tokens += rows
        if self._waiting_tokens >= self.shard_tokens:
            self._write_shard()

    def _write_shard(self) -> None:
        documents, logits, tails, digests = zip(*self._waiting, strict=True)
        byte_ends = np.concatenate([np.cumsum(self._lengths[tokens]) for tokens in documents])
        content = {
            "tokens": torch.from_numpy(np.concatenate(documents)),
            "byte_ends": torch.from_numpy(byte_ends.astype(np.int32)),
            "ids": torch.cat([one.ids for one in logits]),
            "logprobs": torch.cat([one.logprobs for one in logits]),
            "tail": torch.cat(tails),
            "offsets": torch.tensor([0, *itertools.accumulate(map(len, documents))], device="cpu"),
            "digests": torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32),
        }
        content["sums"] = torch.tensor(_sums(content, content["offsets"].tolist()), device="cpu")
        name = _file_name(len(self._shards))
        _SHARD.save(self.folder / name, content)
        self._shards.append({"file": name, "documents": len(documents), "tokens": self._waiting_tokens})
        self._waiting, self._waiting_tokens = [], 0
        self._save_index(complete=False)

    def _save_index(self, complete: bool) -> None:
        content = {"xtoken": _core.version, "complete": complete, **self._parameters, "shards": self._shards}
        INDEX.write(self.folder, content)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._lock:
            if kind is None:
                if self._waiting:
                    self._write_shard()
                self._save_index(complete=True)


def _check_place(tokens: NDArray[np.int32], ids: NDArray[Any], logprobs: NDArray[np.float32]) -> None:
    """Raises ValueError if rows list what was predicted one token earlier or later.

    A server lists the token that stands in a place too: if it is none of the likeliest, a row is longer by this one,
    which is its least likely.
    """
    counts = (ids >= 0).sum(1)[1 : max(len(tokens) - 2, 1)]  # but of rows at the ends, which a shift leaves empty
    rows = 1 + np.flatnonzero(counts == counts.max(initial=1))
    if len(rows) and (counts == counts.max() - 1).any():
        listed = np.where(ids[rows] >= 0, logprobs[rows], np.inf)
        is_least = listed == listed.min(1, keepdims=True)
        own, before, behind = (tokens[rows + k] for k in (1, 0, 2))
        in_place, *shifted = ((is_least & (ids[rows] == one[:, None])).any(1).all() for one in (own, before, behind))
        for where, one, is_shifted in zip(("t", "t + 2"), (before, behind), shifted, strict=True):
            if is_shifted and not in_place and len(np.unique(one)) >= SURE:
                raise ValueError(
                    f"logits: expected row t to predict token t + 1, but all {len(rows)} rows that list a token "
                    f"besides the likeliest list token {where}: the answer is shifted by one"
                )


def _read_index(folder: Path) -> dict[str, Any]:
    def count(value: Any, low: int) -> None:
        if type(value) is not int or not low <= value < 1 << 48:
            raise TypeError(f"expected a count of at least {low}, got {value!r}")

    with INDEX.read(folder) as index:
        index["complete"], index["teacher"], index["end_id"]
        if index.setdefault("time", None) is not None:
            datetime.fromisoformat(index["time"])
        for name in ("vocab_size", "top_k") if index["max_length"] is None else ("vocab_size", "top_k", "max_length"):
            count(index[name], 1 if name != "vocab_size" else 0)
        for k, shard in enumerate(index["shards"]):
            if shard["file"] != _file_name(k):
                raise TypeError(f"expected {_file_name(k)}, got {shard['file']!r}")
            for name in ("documents", "tokens"):
                count(shard[name], 0)
        return dict(index)


def _file_name(k: int) -> str:
    return f"shard-{k:05d}.safetensors"


def cached_time(folder: str | os.PathLike[str]) -> datetime | None:
    """The time that a cache's documents were written at, if their chat template tells it; None without a cache."""
    index = _read_index(Path(folder)) if (Path(folder) / INDEX.name).exists() else {}
    return datetime.fromisoformat(index["time"]) if index.get("time") else None


class TeacherCache:
    """A teacher cache, read document by document. Can be sent to the workers of a DataLoader.

    Raises ValueError if the cache is not complete or was made with another tokenizer, and as soon as something damaged
    is met, with the file; FileNotFoundError if the folder, its index or a shard is missing.

    Parameters
    ----------
    path : path
        What `cache_teacher` wrote.
    teacher_tok : optional
        Tokenizer that the cache must have been made with.

    Attributes
    ----------
    fingerprint : str
        Of the teacher's vocabulary; see `Vocabulary.fingerprint`.
    vocab_size, top_k, max_length : int
    end_id : int or None
        The end token, with or without which a document is found.
    now : datetime or None
        The time that its chat template has written into the documents, for `xtoken.train.ExampleEncoder`.

    Examples
    --------
    ::

        cached = TeacherCache("cache").lookup(teacher_tok(text).input_ids)
        alignment = aligner.align(student_ids, cached.token_ids)
        criterion = xtoken.XTokenLoss([xtoken.Teacher(W)])
        total, parts = criterion(student_logits, labels, cached.logits, alignment)
    """

    def __init__(self, path: str | os.PathLike[str], teacher_tok: TokenizerLike = None) -> None:
        self.path = Path(path).absolute()
        index = _read_index(self.path)
        if not index["complete"]:
            raise ValueError(f"path: {self.path} is not complete; finish it with cache_teacher(..., resume=True)")
        self.fingerprint: str = index["teacher"]
        self.vocab_size: int = index["vocab_size"]
        self.top_k: int = index["top_k"]
        self.max_length: int | None = index["max_length"]
        self.end_id: int | None = index["end_id"]
        self.now = None if index["time"] is None else datetime.fromisoformat(index["time"])
        for _, recorded, given in other_tokenizers({"teacher": self.fingerprint}, teacher_tok=teacher_tok):
            other = f"another tokenizer: fingerprint {recorded}, got {given}"
            raise ValueError(f"teacher_tok: {self.path} was made with {other}; {_REBUILD} makes another")
        self._vocabulary = None if teacher_tok is None else Vocabulary.from_tokenizer(teacher_tok)
        self._lengths = None if self._vocabulary is None else torch.from_numpy(_byte_lengths(self._vocabulary))
        self._shards: list[dict[str, Any]] = index["shards"]
        for shard in self._shards:
            if not (self.path / shard["file"]).exists():
                raise FileNotFoundError(f"path: {self.path / shard['file']} is missing")
        self._numbering = Numbering(shard["documents"] for shard in self._shards)
        self._forget()
        starts = (self._shard(k)[0].read("digests").numpy()[:, :8].copy() for k in range(len(self._shards)))
        keys = np.concatenate([np.zeros((0, 8), np.uint8), *starts]).view("<u8")[:, 0]
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def _forget(self) -> None:
        self._shard = lru_cache(OPEN_SHARDS)(self._open)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shard": None, "_vocabulary": None, "_lengths": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __repr__(self) -> str:
        made = f"top_k={self.top_k}, max_length={self.max_length}, teacher={self.fingerprint[:12]}"
        return f"TeacherCache({str(self.path)!r}, documents={len(self)}, {made})"

    def _open(self, k: int) -> tuple[TensorReader, NDArray[np.int64], list[int]]:
        """A shard, where its documents begin, and their sums."""
        path, shard = self.path / self._shards[k]["file"], self._shards[k]
        file = _SHARD.open(path)
        offsets, sums = file.read("offsets").numpy(), file.read("sums").tolist()
        documents, tokens = shard["documents"], shard["tokens"]
        per_token = {"ids": [tokens, self.top_k], "logprobs": [tokens, self.top_k]}
        shapes = {"offsets": [documents + 1], "digests": [documents, 32], "sums": [documents], **per_token}
        for name, (_, shape, _) in file.parts.items():
            if shape != shapes.get(name, [tokens]):
                raise ValueError(f"{path}: damaged: {name}: expected {shapes.get(name, [tokens])}, got {shape}")
        if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 0).any():
            raise ValueError(f"{path}: damaged: offsets: expected 0 to {tokens}, ascending")
        return file, offsets, sums

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._numbering)

    def __getitem__(self, index: int) -> CachedDocument:
        """A document by its number in the order in which they were added.

        Raises IndexError if there is no such document, ValueError if it is damaged.
        """
        k, row = self._numbering.find(index)
        file, offsets, sums = self._shard(k)
        start, stop = offsets[row : row + 2].tolist()
        part = {name: file.read(name, start, stop) for name in _OF_TOKENS}
        if _sums(part, [0, stop - start]) != [sums[row]]:
            raise ValueError(f"{file.path}: damaged: the checksum of document {row} does not fit the content")
        ids, logprobs, tail = part["ids"], part["logprobs"].float(), part["tail"].double()
        tokens, byte_ends = part["tokens"], part["byte_ends"]
        is_right = ((logprobs <= 0) & (logprobs.isfinite() | (ids < 0)) & (ids >= -1) & (ids < self.vocab_size)).all()
        is_right &= (logprobs[:, 1:] <= logprobs[:, :-1]).all() & ((tail >= 0) & (tail <= 1)).all()
        is_right &= ((tokens >= 0) & (tokens < self.vocab_size)).all() & (byte_ends.diff() >= 0).all()
        if is_right and self._lengths is not None:
            is_right = (self._lengths[tokens.long()].cumsum(0) == byte_ends).all()
        if not is_right:
            raise ValueError(f"{file.path}: damaged: document {row} does not hold sorted log-probabilities of tokens")
        # Rounding to float16 moved the listed probabilities a little; the tail was kept exactly.
        listed = logprobs.double().exp().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        rest = tail if ids.shape[1] == self.vocab_size else tail.clamp_min(LEAST_TAIL)
        logprobs = logprobs + ((1.0 - rest) / listed).log().float()[:, None]
        return CachedDocument(tokens.long(), byte_ends.long(), TopKLogits(ids, logprobs))

    def lookup(self, token_ids: Sequence[int] | Tensor | NDArray[Any]) -> CachedDocument:
        """A document by the teacher's token ids, all of them, with the end token or without, whichever it has itself.

        Raises ValueError if it is not in the cache, saying where the nearest one differs.
        """
        found = self.find(document_digest(token_ids, self.end_id))
        if found is None:
            cache = f"the {len(self)} documents of the teacher cache {self.path}"
            why = "which was made from other text or with other special tokens"
            raise ValueError(f"token_ids: not among {cache}, {why}: {list(token_ids[:8])}; {self.nearest(token_ids)}")
        return found

    def find(self, digest: bytes) -> CachedDocument | None:
        """A document by its `document_digest` with `end_id`; None if there is none."""
        key = np.frombuffer(digest[:8], "<u8")[0]
        for at in range(*(int(np.searchsorted(self._keys, key, side=side)) for side in ("left", "right"))):
            k, row = self._numbering.find(index := int(self._order[at]))
            if bytes(self._shard(k)[0].read("digests", row, row + 1).numpy()[0]) == digest:
                return self[index]
        return None

    def nearest(self, token_ids: Sequence[int] | Tensor | NDArray[Any]) -> str:
        """Where token ids differ from the document that begins most like them, in words."""
        wanted, best, number = _int32("token_ids", token_ids), (0, -1), 0
        for k in range(min(len(self._shards), OPEN_SHARDS)):
            file, offsets, _ = self._shard(k)
            tokens = file.read("tokens").numpy()
            for first, last in itertools.pairwise(offsets.tolist()):
                both = min(last - first, len(wanted))
                (other,) = (tokens[first : first + both] != wanted[:both]).nonzero()
                best = max(best, (int(other[0]) if len(other) else both, -number))
                number += 1
        same, nearest = best[0], -best[1]
        if not same:
            told = f"none of the first {number} documents begins with that token: asked is {self._shown(wanted[:4])}"
            return told + (f", document 0 is {self._shown(self[0].token_ids.numpy()[:4])}" if number else "")
        has, asked = self[nearest].token_ids.numpy(), wanted
        shown = [
            f"{self._shown(ids[max(0, same - 4) : same])} {self._shown(ids[same : same + 4])}" for ids in (has, asked)
        ]
        return (
            f"document {nearest} begins with the same {same} tokens and goes on as {shown[0]}, but asked is {shown[1]}"
        )

    def _shown(self, ids: NDArray[Any]) -> str:
        if not len(ids):
            return "the end"
        vocabulary = self._vocabulary
        if vocabulary is None or ids.max() >= len(vocabulary):
            return str(ids.tolist())
        return repr(b"".join(vocabulary[i] for i in ids.tolist()))


def cache_teacher(
    model: Any,
    teacher_tok: TokenizerLike,
    documents: Iterable[str | Sequence[int]],
    output: str | os.PathLike[str],
    *,
    top_k: int = 128,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    resume: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    advance: Any = None,
    now: datetime | None = None,
) -> TeacherCache:
    """Keeps a teacher's top-k log-probabilities of texts: ``10 + 6 top_k`` bytes a token and 48 a document, about.

    Raises ValueError if logits are NaN, naming the document; if they lack a token of text, or the model one of a
    document; if `resume` meets other documents; and as `TeacherCacheWriter`. TypeError if they are no tensor, as
    `OrderedLogits`, or `documents` is one string or holds something else.

    Parameters
    ----------
    model
        A causal language model of transformers, or a callable ``model(input_ids=, attention_mask=)`` whose result has
        ``logits`` [B, T, >= V]. It is not trained; columns beyond the tokenizer's vocabulary are ignored. Or a
        `ServedModel` with at least `top_k` ``logprobs``, whose errors are raised.
    teacher_tok
        Its tokenizer, as for `Vocabulary.from_tokenizer`. Special tokens that it adds to a text (bos) are part of
        the document.
    documents : iterable of str or of token ids
        Texts, or what the tokenizer made of them, such as a chat by its template. With `resume`, the same ones in the
        same order.
    output : path
        Folder to write to.
    top_k : int
    max_length : int, optional
        Most tokens of a document that log-probabilities are kept of. Default: what the model's configuration says, or
        its server.
    batch_tokens : int
        Most tokens of a batch, padding included (at least one document).
    resume : bool
        Go on with a run that was stopped: complete shards are kept, and the others become what they would have been.
    shard_tokens : int
        Tokens of a file, about.
    advance : callable, optional
        Called as ``advance(documents, tokens)`` as they get done.
    now : datetime, optional
        As for `TeacherCacheWriter`.
    """
    check_several(documents, "documents")
    vocabulary = Vocabulary.from_tokenizer(teacher_tok)
    advance = advance or (lambda documents, tokens: None)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
    if isinstance(model, ServedModel):
        wanted = (("top_k", min(top_k, len(vocabulary)), model.logprobs), ("max_length", max_length, model.positions))
        for name, given, most in wanted:
            if given is not None and most is not None and given > most:
                raise ValueError(f"{name}: expected at most {most}, what {model} has, got {given}")
        max_length = model.positions if max_length is None else max_length
    elif max_length is None:
        max_length = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    remaining = _token_ids(documents, vocabulary)
    first = [*itertools.islice(remaining, 1)]  # broken rows are met before the folder is made
    remaining = itertools.chain(first, remaining)
    with TeacherCacheWriter(
        output, vocabulary, top_k, max_length=max_length, resume=resume, shard_tokens=shard_tokens, now=now
    ) as writer:
        begun: deque[Sequence[int]] = deque(maxlen=WINDOW)
        for number, digest in enumerate(writer.digests()):
            begun.append(next(remaining, []))
            if document_digest(begun[-1], writer.end_id) != digest:
                raise ValueError(f"documents: number {number} is not the one that {writer.folder} was begun with")
        done, known = len(writer) // WINDOW * WINDOW, len(writer) % WINDOW
        if isinstance(model, ServedModel):
            sent, kept = itertools.tee(remaining)
            for ids, found in zip(kept, model.each(ids[:max_length] for ids in sent), strict=True):
                writer.add(ids, found)
                advance(1, len(found.ids))
            model.tell_faults()
        else:  # what else is in a batch changes the last bits of logits: it is made of the same documents again
            remaining = itertools.chain(itertools.islice(begun, len(begun) - known, None), remaining)
        rows = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "num_embeddings", None)
        while window := list(itertools.islice(remaining, WINDOW)):
            read = [ids[:max_length] for ids in window]
            if rows is not None:
                _check_known(read, rows, done)
            results: dict[int, tuple[TopKLogits, Tensor]] = {}
            for batch in _batches(read, batch_tokens):
                if max(batch) < known:
                    continue
                logits = _run(model, [read[k] for k in batch])
                size, width = len(vocabulary), logits.shape[-1]
                if bool(vocabulary.is_text[width:].any()):
                    raise ValueError(f"model: expected logits at least {size} wide, as teacher_tok, got {width}")
                if width < size:
                    _check_known(read, width, done)
                    logits = torch.nn.functional.pad(logits, (0, size - width), value=-torch.inf)
                for k, row in zip(batch, logits, strict=True):
                    results[k] = _top_k(row[: len(read[k]), :size], writer.top_k)
                    if not bool(torch.isfinite(results[k][1]).all()):
                        raise ValueError(f"model: NaN or infinite logits in document {done + k}")
            for k in range(known, len(window)):
                writer.add(window[k], *results[k])
            advance(len(window) - known, sum(map(len, read[known:])))
            done, known = done + len(window), 0
    return TeacherCache(output)


def _token_ids(documents: Iterable[str | Sequence[int]], vocabulary: Vocabulary) -> Iterator[Sequence[int]]:
    """The documents as token ids; texts are encoded many at a time."""
    plain: Any = None
    source = iter(documents)
    while window := list(itertools.islice(source, WINDOW)):
        texts = [one for one in window if isinstance(one, str)]
        if wrong := [one for one in window if not hasattr(one, "__len__")]:
            raise TypeError(f"documents: expected texts or token ids, got {type(wrong[0]).__name__}")
        if texts and vocabulary.tokenizer is None:
            raise ValueError("teacher_tok: expected a tokenizer that encodes text, got one made of tokens alone")
        if texts and plain is None:
            plain = unpadded(vocabulary.tokenizer)
        encodings = iter(plain.encode_batch(texts) if texts else [])
        for one in window:
            yield next(encodings).ids if isinstance(one, str) else one


def _batches(documents: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of documents, similar lengths together; no more than `batch_tokens` with padding unless it is one."""
    batch: list[int] = []
    for k in sorted(range(len(documents)), key=lambda k: -len(documents[k])):
        if batch and (len(batch) + 1) * max(1, len(documents[batch[0]])) > batch_tokens:
            yield batch
            batch = []
        batch.append(k)
    if batch:
        yield batch


def _check_known(documents: Sequence[Sequence[int]], rows: int, first: int) -> None:
    for number, ids in enumerate(documents, first):
        if len(ids) and max(ids) >= rows:
            raise ValueError(f"documents: number {number} has token {max(ids)}, the model has {rows} of them")


@torch.inference_mode()
def _run(model: Any, documents: Sequence[Sequence[int]]) -> Tensor:
    """Logits [B, T, V] of documents, padded on the right."""
    device = getattr(model, "device", None)
    ids = torch.zeros(len(documents), max(1, *map(len, documents)), dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document, dtype=torch.int64, device="cpu")
        mask[row, : len(document)] = 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: expected logits as a tensor, in the tokenizer's order, got {type(logits).__name__}")
    return logits


@torch.inference_mode()
def _top_k(rows: Tensor, k: int) -> tuple[TopKLogits, Tensor]:
    """The k largest log-probabilities of rows [T, V], and the probability [T] of the rest."""
    parts = []
    for block in rows.split(BLOCK_ROWS):
        logprobs, ids = block.float().log_softmax(-1).topk(k, dim=-1)
        tail = 1.0 - logprobs.double().exp().sum(-1)
        parts.append((ids.to(torch.int32).cpu(), logprobs.cpu(), tail.float().cpu()))
    ids, logprobs, tail = (torch.cat(blocks) for blocks in zip(*parts, strict=True))
    return TopKLogits(ids, logprobs), tail
