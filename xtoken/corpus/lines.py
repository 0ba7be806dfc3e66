"""Files with a document a line: JSON lines and plain text, as they are or compressed by gzip or zstd."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.json

from .documents import ID, Broken, documents, numbered
from .files import InputFile
from .partition import MOST_SLICES, FileSlice

BLOCK_BYTES = 2 << 20
"""Bytes read at a time; a block grows to the end of its last line."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def scan(file: InputFile, target: int) -> list[FileSlice]:
    """Cuts a file into slices of about `target` bytes, at line ends; ValueError if it cannot be decompressed."""
    cuts = [(0, 1)]  # byte and line number at which a slice begins
    position, line = 0, 1
    for block in _blocks(file, 0, None):
        while cuts[-1][0] + target < position + len(block):
            end = block.find(b"\n", max(0, cuts[-1][0] + target - 1 - position)) + 1
            if end == 0 or end == len(block):
                break
            cuts.append((position + end, line + block[:end].count(b"\n")))
        position += len(block)
        line += block.count(b"\n")
        if block.endswith(b"\n") and cuts[-1][0] + target <= position:
            cuts.append((position, line))
    if cuts[-1][0] == position:
        cuts.pop()
    if file.is_compressed:
        cuts = cuts[:: -(-len(cuts) // MOST_SLICES) or 1]
    ends = [start for start, _ in cuts[1:]] + [position]
    return [FileSlice(file, start, end, number, end - start) for (start, number), end in zip(cuts, ends, strict=False)]


def read(file_slice: FileSlice, text_column: str, broken: Broken) -> Iterator[pa.RecordBatch]:
    """The documents of a slice, in batches of about `BLOCK_BYTES`."""
    parse = _JsonLines(text_column) if file_slice.file.format == "json" else _text
    number = file_slice.number
    for block in _whole_lines(_blocks(file_slice.file, file_slice.start, file_slice.stop)):
        count = block.count(b"\n") + (not block.endswith(b"\n"))
        if number == 1:
            block = block.removeprefix(_BYTE_ORDER_MARK)
        yield parse(file_slice.file, block, number, count, broken)
        number += count


def _blocks(file: InputFile, start: int, stop: int | None) -> Iterator[bytes]:
    """Bytes ``start ... stop - 1`` of the decompressed file."""
    try:
        if file.is_compressed:
            stream = pa.input_stream(file.path, compression="detect")
        else:
            stream = pa.OSFile(file.path)
            stream.seek(start)
        with stream:
            position = 0 if file.is_compressed else start
            while stop is None or position < stop:
                block = stream.read(BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - position))
                if not block:
                    return
                position += len(block)
                if position > start:
                    yield block[max(0, len(block) - (position - start)) :]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.path}: cannot read it: {error}") from error


def _whole_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, each block up to the end of a line."""
    rest: list[bytes] = []
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join([*rest, block[:end]])
            rest = []
        if end < len(block):
            rest.append(block[end:])
    if rest:
        yield b"".join(rest)


def _line_by_line(
    file: InputFile, block: bytes, number: int, broken: Broken, parse: Callable[[bytes], tuple[str | None, str]]
) -> pa.RecordBatch:
    """Documents of the lines of a block, blank ones left out; `parse` finds the id, if there is one, and the text."""
    ids, texts = [], []
    for i, line in enumerate(block.split(b"\n"), number):
        if not line.strip():
            continue
        try:
            name, text = parse(line)
        except (ValueError, RecursionError) as error:
            broken(file, i, f"not UTF-8: {error}" if file.format == "text" else str(error))
        else:
            ids.append(f"{file.name}:{i}" if name is None else name)
            texts.append(text)
    return documents(ids, texts)


def _text(file: InputFile, block: bytes, number: int, count: int, broken: Broken) -> pa.RecordBatch:
    """Documents of a block of plain text."""
    return _line_by_line(file, block, number, broken, lambda line: (None, line.removesuffix(b"\r").decode()))


class _JsonLines:
    """Documents of a block of JSON lines.

    pyarrow parses a block at once; where it fails, or the result is not exactly one text a line, Python's parser goes
    through the block line by line, and knows which line is broken.
    """

    def __init__(self, text_column: str) -> None:
        self.text_column = text_column
        # Types of the field `id` to try, the one that worked last first.
        self.id_types = [pa.string(), pa.int64()] if text_column != ID else [None]

    def __call__(self, file: InputFile, block: bytes, number: int, count: int, broken: Broken) -> pa.RecordBatch:
        for id_type in list(self.id_types):
            fields = [(self.text_column, pa.string())] + ([(ID, id_type)] if id_type else [])
            try:
                reading = pa.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
                parsing = pa.json.ParseOptions(pa.schema(fields), unexpected_field_behavior="ignore")
                table = pa.json.read_json(pa.BufferReader(block), reading, parsing)
                table.validate(full=True)
            except (pa.ArrowException, OverflowError):
                continue
            text = table[self.text_column]
            if len(text) != count or text.null_count:
                break
            ids = table[ID].cast(pa.string()) if id_type else None
            if ids is None or ids.null_count == len(ids):
                return documents(numbered(file, np.arange(number, number + count)), text)
            if ids.null_count:
                break
            self.id_types.sort(key=lambda known: known != id_type)
            return documents(ids, text)
        return _line_by_line(file, block, number, broken, self._document)

    def _document(self, line: bytes) -> tuple[str | None, str]:
        row = json.loads(line.decode())
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, got {type(row).__name__}")
        text = row.get(self.text_column)
        if not isinstance(text, str):
            found = f"got {type(text).__name__}" if text is not None else f"the line has {', '.join(row) or 'nothing'}"
            raise ValueError(f"expected text in field {self.text_column!r}, {found}")
        text.encode()  # a lone surrogate is no text
        name = row.get(ID) if self.text_column != ID else None
        if name is None:
            return None, text
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise ValueError(f"expected a string or an integer in field {ID!r}, got {type(name).__name__}")
        str(name).encode()
        return str(name), text
