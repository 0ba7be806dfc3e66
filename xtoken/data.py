"""Reading aligned corpora back: a map-style dataset over the shards of `xtoken.align_corpus`, and its collator."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .alignment import Alignment, pad_rows
from .alignment.alignment import as_tensor
from .corpus import Manifest, require
from .remote import arrow_file, located, sizes
from .storage import Numbering, other_tokenizers
from .vocabulary import TokenizerLike, Vocabulary
from .vocabulary.roles import filler

__all__ = ["AlignedCollator", "AlignedDataset"]

OPEN_SHARDS = 16
"""Shards that a process keeps open."""

KEPT_GROUPS = 8
"""Row groups (about 32,768 student tokens each) that a process keeps decompressed."""


class AlignedDataset(Dataset[dict[str, Any]]):
    """The documents of an aligned corpus, by number, in the order of the input.

    Opening a corpus costs its index alone. A document costs reading and checking its row group, some two milliseconds,
    and its neighbours come free: the checksums of pages and row group, ids within the vocabularies, spans within the
    ids. Can be sent to the workers of a DataLoader by either start method; each process opens the shards for itself.

    Raises ValueError if the corpus was made with another tokenizer, saying on which side, or is not complete, and as
    soon as a damaged shard is met, with its name; FileNotFoundError if the folder, its index or a shard is missing;
    ImportError if pyarrow is not installed.

    Parameters
    ----------
    path : path
        Output folder of `xtoken.align_corpus`, or its URL.
    student_tok, teacher_tok : optional
        Tokenizers, as for `Vocabulary.from_tokenizer`, that the corpus must have been made with.

    Attributes
    ----------
    counts : xtoken.corpus.Counts
        Documents, tokens and chunks of the corpus.
    """

    def __init__(
        self, path: str | os.PathLike[str], student_tok: TokenizerLike = None, teacher_tok: TokenizerLike = None
    ) -> None:
        require("pyarrow", "corpus")
        self.path = located(path)
        manifest = Manifest.load(self.path)
        if not manifest.is_complete:
            raise ValueError(f"path: {self.path} is not complete; finish it with align_corpus(..., resume=True)")
        for side, recorded, given in other_tokenizers(manifest.parameters, student_tok, teacher_tok):
            other = f"another {side} tokenizer: fingerprint {recorded}, got {given}"
            raise ValueError(f"{side}_tok: {self.path} was made with {other}")
        self.counts = manifest.total
        self._sizes = [int(manifest.parameters.get(f"{side}_vocab_size", 0)) for side in ("student", "teacher")]
        self._shards, self._counts = manifest.shards, manifest.counts
        self._files = [self.path / shard.file_name for shard in manifest.shards]
        held = sizes(self.path)
        for file in self._files:
            if file.name not in held:
                raise FileNotFoundError(f"path: {file} is missing")
        self._numbering = Numbering(counts.documents for counts in manifest.counts)
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._file = lru_cache(OPEN_SHARDS)(self._open)
        self._row_group = lru_cache(KEPT_GROUPS)(self._decompress)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_process": None, "_file": None, "_row_group": None}

    def __repr__(self) -> str:
        return f"AlignedDataset({str(self.path)!r}, documents={len(self)}, shards={len(self._files)})"

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._numbering)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One document: ``id`` str, ``student_ids`` and ``teacher_ids`` int64 [T], ``spans`` int32 [K, 4].

        Raises IndexError if there is no such document.
        """
        if self._process != os.getpid():  # forked or pickled: what another process opened is not ours to share
            self._forget()
        shard, row = self._numbering.find(index)
        k, row = self._file(shard)[2].find(row)
        group = self._row_group(shard, k)
        document: dict[str, Any] = {"id": group["id"][row].as_py()}
        for side in ("student_ids", "teacher_ids"):
            document[side] = torch.from_numpy(group[side].slice(row, 1).flatten().to_numpy().astype(np.int64))
        spans = group["spans"].slice(row, 1).flatten().flatten().to_numpy()
        return {**document, "spans": torch.from_numpy(spans.reshape(-1, 4).copy())}

    def _decompress(self, shard: int, k: int) -> dict[str, Any]:
        """A row group, checked."""
        from .corpus.shards import checksum

        file, sums, _ = self._file(shard)
        with self._damage(shard):
            table = file.read_row_group(k, use_threads=False).combine_chunks()
            if checksum(table) != sums[k]:
                raise ValueError(f"the checksum of row group {k} does not fit the content")
            group = {name: table[name].combine_chunks() for name in table.column_names}
            spans = group["spans"].flatten().flatten().to_numpy().reshape(-1, 4)
            counts = np.diff(group["spans"].offsets.to_numpy())
            for column, side, size in ((0, "student", self._sizes[0]), (2, "teacher", self._sizes[1])):
                ids, (start, stop) = group[f"{side}_ids"], spans[:, column : column + 2].T
                flat, lengths = ids.flatten().to_numpy(), np.diff(ids.offsets.to_numpy())
                if len(flat) and not 0 <= flat.min() <= flat.max() < size:
                    raise ValueError(f"{side}_ids: expected 0 ... {size - 1}, got {flat.min()} to {flat.max()}")
                if not ((start >= 0) & (start < stop) & (stop <= np.repeat(lengths, counts))).all():
                    raise ValueError(f"spans: expected chunks within the {side}_ids of row group {k}")
        return group

    def _open(self, shard: int) -> tuple[Any, list[int], Numbering]:
        """A shard, the checksums of its row groups, and the numbering of its documents."""
        import pyarrow.parquet as pq

        from .corpus.shards import SCHEMA, read_counts

        with self._damage(shard):
            file = pq.ParquetFile(arrow_file(self._files[shard]), pre_buffer=False, page_checksum_verification=True)
            if not file.schema_arrow.equals(SCHEMA):
                raise ValueError(f"expected the columns {SCHEMA.names}, got {file.schema_arrow.names}")
            counts, sums = read_counts(self._shards[shard], file.metadata)
            if counts != self._counts[shard]:
                raise ValueError(f"expected {self._counts[shard]}, as in the index, got {counts}")
            return file, sums, Numbering(file.metadata.row_group(k).num_rows for k in range(file.num_row_groups))

    @contextmanager
    def _damage(self, shard: int) -> Iterator[None]:
        """What is wrong with a shard as ValueError that names it."""
        import pyarrow as pa

        try:
            yield
        except FileNotFoundError:
            raise
        except (pa.ArrowException, ValueError, OSError) as error:
            path = self._files[shard]
            if isinstance(error, OSError) and error.errno is not None:  # of the system, not of the content
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise ValueError(f"{path}: damaged: {error}; delete it and align again with resume (--resume)") from error


class AlignedCollator:
    """Puts documents of an `AlignedDataset` together to a batch.

    Parameters
    ----------
    student_tok, teacher_tok : optional
        Tokenizers, as for `Vocabulary.from_tokenizer`, whose pad token (else the end token) fills the rows.
    student_pad_id, teacher_pad_id : int, optional
        Id that fills the rows instead. Default, without a tokenizer or a pad token: 0; the masks tell what is padding.

    Examples
    --------
    >>> document = {"id": "a", "student_ids": [7, 8], "teacher_ids": [5], "spans": [[0, 2, 0, 1]]}
    >>> longer = {"id": "b", "student_ids": [7, 8, 9], "teacher_ids": [5, 6], "spans": [[0, 2, 0, 1], [2, 3, 1, 2]]}
    >>> batch = AlignedCollator(student_pad_id=1)([document, longer])
    >>> batch["student_ids"].tolist(), batch["teacher_mask"].tolist(), batch["alignment"].offsets.tolist()
    ([[7, 8, 1], [7, 8, 9]], [[1, 0], [1, 1]], [0, 1, 3])
    """

    def __init__(
        self,
        student_tok: TokenizerLike = None,
        teacher_tok: TokenizerLike = None,
        *,
        student_pad_id: int | None = None,
        teacher_pad_id: int | None = None,
    ) -> None:
        self.student_pad_id = _pad_id(student_tok) if student_pad_id is None else student_pad_id
        self.teacher_pad_id = _pad_id(teacher_tok) if teacher_pad_id is None else teacher_pad_id

    def __repr__(self) -> str:
        return f"AlignedCollator(student_pad_id={self.student_pad_id}, teacher_pad_id={self.teacher_pad_id})"

    def __call__(self, documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of B documents.

        ``ids`` list of str; ``student_ids`` int64 [B, T], padded on the right, and ``student_mask`` int64 [B, T], 1 for
        tokens; ``teacher_ids`` and ``teacher_mask`` likewise; ``alignment``, an `Alignment` with the ids. Raises
        ValueError if there are no documents.
        """
        if not documents:
            raise ValueError("documents: expected at least one")
        batch: dict[str, Any] = {"ids": [document["id"] for document in documents]}
        for side, pad_id in (("student", self.student_pad_id), ("teacher", self.teacher_pad_id)):
            rows = [as_tensor(document[f"{side}_ids"], torch.int64) for document in documents]
            batch[f"{side}_ids"] = pad_rows(rows, pad_id)
            batch[f"{side}_mask"] = pad_rows([torch.ones_like(row) for row in rows], 0)
        spans = [as_tensor(document["spans"], torch.int32).reshape(-1, 4) for document in documents]
        offsets = np.cumsum([0, *map(len, spans)])
        batch["alignment"] = Alignment(torch.cat(spans), offsets, batch["student_ids"], batch["teacher_ids"])
        return batch


def _pad_id(tokenizer: TokenizerLike) -> int:
    return 0 if tokenizer is None else filler(Vocabulary.from_tokenizer(tokenizer).roles) or 0
