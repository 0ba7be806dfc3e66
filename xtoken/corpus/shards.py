"""The one shard function: documents in, a complete parquet file of ids and chunks out. Both engines run it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .. import _core
from ..alignment import Aligner, Ragged
from ..remote import Place, arrow_file, in_threads, located, sizes
from ..storage import atomic
from ..vocabulary import TokenizerLike, Vocabulary, unpadded
from ..vocabulary.long_texts import encode_texts
from . import Options, lines, tables
from .documents import BATCH_BYTES, Broken
from .files import LINES, InputFile
from .manifest import INDEX, Counts
from .partition import FileSlice, Shard

ROW_GROUP_TOKENS = 32768
"""Student tokens of a row group, about: what reading one document at random decompresses (1 ms)."""

BATCHES_AT_ONCE = 2
"""Batches worked on at the same time, so that the processors have tokenizing to do while Python handles the other."""

_INT = pa.field("element", pa.int32(), nullable=False)
_IDS = pa.list_(_INT)
_SPAN = pa.list_(_INT, 4)
_SPANS = pa.list_(pa.field("element", _SPAN, nullable=False))
_COLUMNS = {"id": pa.string(), "student_ids": _IDS, "teacher_ids": _IDS, "spans": _SPANS}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()])
# Spans compress best as differences between neighbours; dictionaries only cost time on token ids.
_WRITER: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
    "column_encoding": {"spans.list.element.list.element": "DELTA_BINARY_PACKED"},
}
COUNTS, SUMS, NUMBER = "xtoken.counts", "xtoken.checksums", "xtoken.shard"
"""In the metadata of a shard: its counts, the `checksum` of each row group, and its number."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know to make any shard."""

    student: Vocabulary
    teacher: Vocabulary
    output: str
    options: Options


Advance = Callable[[int, int, int], None]
"""Called after each batch with its documents, tokens of both sides and bytes of text; may raise to stop the work."""


def encoder(tokenizer: TokenizerLike, side: str) -> Vocabulary:
    """A vocabulary whose tokenizer encodes text as it is: no padding, no truncation.

    Raises ValueError if there is no tokenizer, only tokens, or if it encodes at random (BPE dropout).
    """
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    if vocabulary.tokenizer is None:
        raise ValueError(f"{side}: expected a tokenizer that encodes text, got a Vocabulary made of tokens alone")
    plain = unpadded(vocabulary.tokenizer)
    if getattr(plain.model, "dropout", None):
        raise ValueError(f"{side}: the tokenizer has dropout {plain.model.dropout}, so each run would give other ids")
    tokens = [vocabulary[i] for i in range(len(vocabulary))]
    return Vocabulary(tokens, vocabulary.kinds.tolist(), vocabulary.roles, plain)


def scan_file(file: InputFile, text_column: str, target: int) -> list[FileSlice]:
    """Cuts a file into slices of about `target` bytes; see `lines.scan` and `tables.scan`."""
    return lines.scan(file, target) if file.format in LINES else tables.scan(file, text_column, target)


def read_shard(shard: Shard, text_column: str, broken: Broken) -> Iterator[pa.RecordBatch]:
    """All documents of a shard, in order, in batches of at most `BATCH_BYTES` of text or one document.

    ValueError if a file has changed since it was found.
    """
    waiting: list[pa.RecordBatch] = []
    size = 0
    for file_slice in shard.slices:
        module = lines if file_slice.file.format in LINES else tables
        for batch in module.read(file_slice, text_column, broken):
            ends = np.cumsum(pc.binary_length(batch["text"]).to_numpy(zero_copy_only=False).astype(np.int64))
            for start, stop, part_size in ranges(ends, BATCH_BYTES):
                if waiting and size + part_size > BATCH_BYTES:
                    yield pa.concat_batches(waiting)
                    waiting, size = [], 0
                waiting.append(batch.slice(start, stop - start))
                size += part_size
        file_slice.file.check_unchanged()
    if waiting:
        yield pa.concat_batches(waiting)


def ranges(ends: NDArray[Any], most: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of documents with running sums `ends`, and their sizes: at most `most`, or one document."""
    start = before = 0
    while start < len(ends):
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield start, stop, int(ends[stop - 1]) - before
        start, before = stop, int(ends[stop - 1])


class ShardMaker:
    """Makes shards; one for each process. The alignment uses so many `threads`, by default all processors."""

    def __init__(self, job: Job, threads: int | None = None) -> None:
        self.job = job
        self.aligner = Aligner(job.student, job.teacher, job.options.method, num_threads=threads)
        self.schema = SCHEMA.with_metadata(
            {
                "xtoken.format": INDEX.version,
                "xtoken.version": _core.version,
                "xtoken.student": job.student.fingerprint(),
                "xtoken.teacher": job.teacher.fingerprint(),
                "xtoken.method": job.options.method,
                "xtoken.max_length": json.dumps(job.options.max_length),
            }
        )

    def make(self, shard: Shard, advance: Advance) -> Counts:
        """Reads, tokenizes, aligns and writes one shard; it appears under its name when it is complete.

        Raises ValueError for broken input, with the file and the line, and OSError if the file cannot be written.
        """
        counts, sums = Counts(), []
        broken = Broken(self.job.options.on_error)
        batches = read_shard(shard, self.job.options.text_column, broken)
        path = located(self.job.output) / shard.file_name
        try:
            with (
                atomic(path) as temporary,
                pa.OSFile(str(temporary), "wb") as file,
                pq.ParquetWriter(file, self.schema, **_WRITER) as writer,
            ):
                for table, part in in_threads(self._align, batches, BATCHES_AT_ONCE):
                    ends = table["student_ids"].chunk(0).offsets.to_numpy()[1:]
                    for start, stop, _ in ranges(ends, ROW_GROUP_TOKENS):
                        group = table.slice(start, stop - start)
                        writer.write_table(group)
                        sums.append(checksum(group))
                    counts.add(part)
                    advance(part.documents, part.student_tokens + part.teacher_tokens, part.text_bytes)
                counts.skipped = dict(sorted(broken.skipped.items()))
                held = {COUNTS: json.dumps(asdict(counts)), SUMS: json.dumps(sums), NUMBER: str(shard.index)}
                writer.add_key_value_metadata(held)
        except OSError as error:  # reading raises ValueError, so this is about the output
            raise OSError(f"{path}: cannot write it: {error}; complete shards stay, and can be resumed") from error
        return counts

    def _align(self, batch: pa.RecordBatch) -> tuple[pa.Table, Counts]:
        """The rows of one batch of documents."""
        texts = batch["text"].to_pylist()
        sides = [_encode(vocabulary.tokenizer, texts) for vocabulary in (self.job.student, self.job.teacher)]
        max_length = self.job.options.max_length
        if max_length is None:
            alignment = self.aligner.align(sides[0], sides[1])
        else:
            alignment = self.aligner.truncate(sides[0], sides[1], max_length, max_length)
            sides = [ids for side in ("student", "teacher") if (ids := alignment.ragged_ids(side)) is not None]
        spans = pa.FixedSizeListArray.from_arrays(pa.array(alignment.spans.numpy().reshape(-1)), type=_SPAN)
        columns = [_lists(ids.flat.astype(np.int32), ids.offsets, _IDS) for ids in sides]
        columns.append(_lists(spans, alignment.offsets.numpy(), _SPANS))
        text_bytes = pc.sum(pc.binary_length(batch["text"])).as_py() or 0
        student, teacher = (len(ids.flat) for ids in sides)
        not_optimal = int((~alignment.optimal).sum())
        counts = Counts(batch.num_rows, text_bytes, student, teacher, alignment.num_chunks, not_optimal)
        return pa.Table.from_arrays([batch["id"], *columns], schema=self.schema), counts


def checksum(group: pa.Table) -> int:
    """CRC-32 of the content of a row group."""
    digest = zlib.crc32("\0".join(group["id"].to_pylist()).encode())
    for name in ("student_ids", "teacher_ids", "spans"):
        for chunk in group[name].chunks:
            digest = zlib.crc32(np.diff(chunk.offsets.to_numpy()), digest)
            values = chunk.flatten().flatten() if name == "spans" else chunk.flatten()
            digest = zlib.crc32(values.to_numpy(), digest)
    return digest


def read_counts(shard: Shard, metadata: Any) -> tuple[Counts, list[int]]:
    """Counts and checksums out of the metadata of a shard; ValueError if it is not whole, or another shard."""
    held = {name.decode(): text for name, text in (metadata.metadata or {}).items()}
    try:
        counts, sums = Counts.of(json.loads(held[COUNTS])), list(json.loads(held[SUMS]))
        number = int(held[NUMBER])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its metadata are not those of a shard: {error!r}") from error
    if number != shard.index or counts.documents != metadata.num_rows or len(sums) != metadata.num_row_groups:
        raise ValueError(f"expected shard {shard.index} with {counts.documents} documents, got {metadata.num_rows}")
    return counts, sums


def complete_shards(shards: Iterable[Shard], folder: Place) -> dict[int, Counts]:
    """The shards that are there and whole, by number, with their counts."""
    held = sizes(folder)

    def counts(shard: Shard) -> Counts | None:
        with suppress(pa.ArrowException, OSError, ValueError), arrow_file(folder / shard.file_name) as file:
            return read_counts(shard, pq.read_metadata(file))[0]
        return None

    there = [shard for shard in shards if shard.file_name in held]
    found = zip(there, in_threads(counts, there), strict=True)
    return {shard.index: one for shard, one in found if one is not None}


def _encode(tokenizer: Any, texts: list[str]) -> Ragged:
    rows = encode_texts(tokenizer, texts)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    if any(isinstance(ids, np.ndarray) for ids in rows):
        return Ragged(np.concatenate([np.asarray(ids, np.int64) for ids in rows]), offsets)
    # The one step that costs Python time for each token, 30 ns: tokenizers hand out ids only as a list.
    return Ragged(np.fromiter(chain.from_iterable(rows), np.int64, int(offsets[-1])), offsets)


def _lists(values: Any, offsets: NDArray[np.int64], kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values), type=kind)
