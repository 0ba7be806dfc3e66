"""Files with a document a row: parquet, and Arrow IPC files and streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..remote import arrow_file, located
from .documents import BATCH_BYTES, ID, Broken, documents, numbered
from .files import InputFile
from .partition import MOST_SLICES, FileSlice
from .source import Row, without_nulls

BATCH_ROWS = 1024
"""Rows taken from a file at a time, at most."""

_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def scan(file: InputFile, text_column: str, target: int) -> list[FileSlice]:
    """Cuts a file into slices of about `target` bytes of text: row groups or record batches, or even parts of them.

    Raises ValueError if the file cannot be read, or has no column of text with this name.
    """
    slices: list[FileSlice] = []
    start = 0
    most = MOST_SLICES if file.format == "parquet" else 1 << 30
    for rows, size in _parts(file, text_column):
        parts = max(1, min(-(-size // target), most, rows))
        cuts = [start + rows * k // parts for k in range(parts + 1)]
        size = -(-size // parts)
        slices += [FileSlice(file, first, last, first + 1, size) for first, last in pairwise(cuts) if last > first]
        start += rows
    return slices


def read(file_slice: FileSlice, text_column: str, broken: Broken) -> Iterator[pa.RecordBatch]:
    """The documents of a slice, in batches of at most `BATCH_ROWS` rows."""
    number = file_slice.number
    for batch in _rows(file_slice, text_column):
        yield _documents(batch, file_slice.file, text_column, number, broken)
        number += batch.num_rows


def rows(file: InputFile) -> Iterator[Row]:
    """The rows of a file with all their columns; ValueError if it cannot be read."""
    number = 1
    with _opened(file) as reader:
        for batch in reader.iter_batches(BATCH_ROWS) if file.format == "parquet" else reader:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                try:
                    plain = batch.slice(start, BATCH_ROWS).to_pylist()
                except UnicodeDecodeError as error:
                    raise ValueError(f"{file.path}, row {number} or later: not UTF-8: {error}") from error
                for row in plain:
                    yield Row({name: without_nulls(value) for name, value in row.items()}, file, number)
                    number += 1


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _columns(schema: pa.Schema, file: InputFile, text_column: str) -> list[str]:
    """The columns to read."""
    if schema.names.count(text_column) != 1 or not _is_text(schema.field(text_column).type):
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ValueError(f"{file.path}: expected a column {text_column!r} of strings, got {found or 'no columns'}")
    if text_column == ID or schema.names.count(ID) != 1:
        return [text_column]
    kind = schema.field(ID).type
    if not _is_text(kind) and not pa.types.is_integer(kind):
        raise ValueError(f"{file.path}: expected strings or integers in column {ID!r}, got {kind}")
    return [text_column, ID]


@contextmanager
def _opened(file: InputFile, text_column: str | None = None, buffer_size: int = 0) -> Iterator[Any]:
    """A `ParquetFile`; or of Arrow the batches, of the columns that are read, all by default. Errors of pyarrow become
    such that name the file."""
    try:
        with arrow_file(located(file.path)) as source:
            if file.format == "parquet":
                with pq.ParquetFile(source, pre_buffer=False, buffer_size=buffer_size) as reader:
                    yield reader
            else:
                yield _arrow_batches(file, source, text_column)
    except (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.path}: cannot read it as {file.format}: {error}") from error


def _arrow_batches(file: InputFile, source: Any, text_column: str | None) -> Iterator[pa.RecordBatch]:
    is_file = source.read(6) == b"ARROW1"
    open_reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
    if not is_file:  # a stream that was cut between two batches only lacks its end
        source.seek(max(0, source.size() - len(_STREAM_END)))
        if source.read() != _STREAM_END:
            raise ValueError(f"{file.path}: cannot read it as arrow: the end of the stream is missing")
    source.seek(0)
    schema = open_reader(source).schema
    names = [] if text_column is None else _columns(schema, file, text_column)
    columns = [schema.get_field_index(name) for name in names] or None
    source.seek(0)
    reader = open_reader(source, options=pa.ipc.IpcReadOptions(included_fields=columns))
    return map(_sound, map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader)


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch; ArrowInvalid if its offsets or indices point elsewhere. Text that is not UTF-8 is left to others."""
    for column in batch.columns:
        kind = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
        (column if kind is None else column.cast(kind)).validate(full=True)
    return batch


def _parts(file: InputFile, text_column: str) -> Iterator[tuple[int, int]]:
    """Rows and bytes of text of every row group or record batch."""
    with _opened(file, text_column) as reader:
        if file.format != "parquet":
            yield from ((batch.num_rows, batch[text_column].nbytes) for batch in reader)
            return
        _columns(reader.schema_arrow, file, text_column)
        metadata = reader.metadata
        leaf = [metadata.schema.column(k).path for k in range(metadata.num_columns)].index(text_column)
        for k in range(metadata.num_row_groups):
            group = metadata.row_group(k)
            yield group.num_rows, group.column(leaf).total_uncompressed_size


def _rows(file_slice: FileSlice, text_column: str) -> Iterator[pa.RecordBatch]:
    """The rows of a slice."""
    file, start, stop = file_slice.file, file_slice.start, file_slice.stop
    with _opened(file, text_column, 1 << 20) as reader:
        if file.format != "parquet":
            yield from _between(reader, start, stop)
            return
        counts = [reader.metadata.row_group(k).num_rows for k in range(reader.metadata.num_row_groups)]
        ends = np.cumsum(counts)
        groups = [k for k, end in enumerate(ends) if end > start and end - counts[k] < stop]
        before = int(ends[groups[0]] - counts[groups[0]])
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES * (stop - start) // max(1, file_slice.size)))
        columns = _columns(reader.schema_arrow, file, text_column)
        batches = reader.iter_batches(rows, groups, columns, use_threads=False)
        yield from _between(batches, start - before, stop - before)


def _between(batches: Iterator[pa.RecordBatch], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Rows ``start ... stop - 1`` of a sequence of batches, in batches of at most `BATCH_ROWS`."""
    first = 0
    for batch in batches:
        last = first + batch.num_rows
        for begin in range(max(start, first), min(stop, last), BATCH_ROWS):
            yield batch.slice(begin - first, min(BATCH_ROWS, stop - begin, last - begin))
        first = last
        if first >= stop:
            return


def _documents(batch: pa.RecordBatch, file: InputFile, text_column: str, number: int, broken: Broken) -> pa.RecordBatch:
    text = batch[text_column].cast(pa.string())
    ids = names = numbered(file, np.arange(number, number + len(text)))
    if ID in batch.schema.names and text_column != ID:
        ids = pc.coalesce(batch[ID].cast(pa.string()), names)
    faults = dict.fromkeys(np.flatnonzero(text.is_null()).tolist(), "the text is null") if text.null_count else {}
    for column in (text, ids):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            raw = [value or b"" for value in column.cast(pa.binary()).to_pylist()]
            faults |= {i: "not UTF-8" for i, one in enumerate(raw) if one.decode(errors="ignore").encode() != one}
    for i in sorted(faults):
        broken(file, number + i, faults[i])
    whole = np.ones(len(text), bool)
    whole[list(faults)] = False
    return documents(ids.filter(pa.array(whole)), text.filter(pa.array(whole)))
