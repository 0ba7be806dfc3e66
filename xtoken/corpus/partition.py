"""The partition of the input into shards: a function of the files and the shard size alone, so that runs can resume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .files import InputFile

MOST_PIECES = 8
"""Pieces of a part that can only be read from its start (a packed file, a row group).

Each piece reads past the ones before it, so k pieces cost (k - 1) / 2 extra readings of the part, at hundreds of MB/s;
tokenizing runs at a few MB/s."""


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one file."""

    file: InputFile
    start: int
    """First byte of the (unpacked) lines, or first row."""
    stop: int
    number: int
    """Line or row number of the first document, counted from 1."""
    size: int
    """Bytes of input."""


@dataclass(frozen=True)
class Shard:
    """What one output file is made from."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for piece in self.pieces)

    @property
    def file_name(self) -> str:
        """Name of the output file."""
        return f"shard-{self.index:05d}.parquet"


def into_shards(pieces: Iterable[Piece], shard_bytes: int) -> Iterator[Shard]:
    """Puts pieces together, in order, into shards of at most `shard_bytes`, or of one piece that is larger."""
    index, size = 0, 0
    current: list[Piece] = []
    for piece in pieces:
        if current and size + piece.size > shard_bytes:
            yield Shard(index, tuple(current))
            index, size, current = index + 1, 0, []
        last = current[-1] if current else None
        if last is not None and last.file == piece.file and last.stop == piece.start:
            current[-1] = replace(last, stop=piece.stop, size=last.size + piece.size)
        else:
            current.append(piece)
        size += piece.size
    if current:
        yield Shard(index, tuple(current))
