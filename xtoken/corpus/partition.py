"""The partition of the input into shards: a function of the files and the shard size alone, so that runs can resume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .files import InputFile

MOST_SLICES = 8
"""Most slices of what can only be read from its start (a compressed file, a row group).

Each slice reads past the ones before it, so k slices cost (k - 1) / 2 extra readings, at hundreds of MB/s;
tokenizing runs at a few MB/s."""


@dataclass(frozen=True)
class FileSlice:
    """A contiguous part of one file."""

    file: InputFile
    start: int
    """First byte of the (decompressed) lines, or first row."""
    stop: int
    number: int
    """Line or row number of the first document, counted from 1."""
    size: int
    """Bytes of input."""


@dataclass(frozen=True)
class Shard:
    """What one output file is made from."""

    index: int
    slices: tuple[FileSlice, ...]

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(file_slice.size for file_slice in self.slices)

    @property
    def file_name(self) -> str:
        """Name of the output file."""
        return f"shard-{self.index:05d}.parquet"


def into_shards(slices: Iterable[FileSlice], shard_bytes: int) -> Iterator[Shard]:
    """Puts slices together, in order, into shards of at most `shard_bytes`, or of one slice that is larger."""
    index, size = 0, 0
    current: list[FileSlice] = []
    for file_slice in slices:
        if current and size + file_slice.size > shard_bytes:
            yield Shard(index, tuple(current))
            index, size, current = index + 1, 0, []
        last = current[-1] if current else None
        if last is not None and last.file == file_slice.file and last.stop == file_slice.start:
            current[-1] = replace(last, stop=file_slice.stop, size=last.size + file_slice.size)
        else:
            current.append(file_slice)
        size += file_slice.size
    if current:
        yield Shard(index, tuple(current))
