"""Slices of the input, and the documents of a shard in batches of even size, whatever the formats of the files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from . import lines, tables
from .documents import BATCH_BYTES, Broken
from .files import LINES, InputFile
from .partition import FileSlice, Shard


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
