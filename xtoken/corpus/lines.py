"""Documents of JSON lines, plain text and JSON arrays; see `source`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from . import source
from .documents import ID, Broken, documents, numbered
from .files import InputFile
from .partition import MOST_SLICES, FileSlice
from .source import as_object, blocks, elements, json_object, numbered_lines, whole_lines


def scan(file: InputFile, target: int) -> list[FileSlice]:
    """Cuts a file into slices of about `target` bytes; ValueError if it cannot be read."""
    if file.format == "array":
        return _scan_array(file, target)
    cuts = [(0, 1)]  # byte and line number at which a slice begins
    position, line = 0, 1
    for block in blocks(file):
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
    if file.packing:
        cuts = cuts[:: -(-len(cuts) // MOST_SLICES) or 1]
    ends = [start for start, _ in cuts[1:]] + [position]
    return [FileSlice(file, start, end, number, end - start) for (start, number), end in zip(cuts, ends, strict=False)]


def _scan_array(file: InputFile, target: int) -> list[FileSlice]:
    """The same of an array, whose slices are counted in elements."""
    sizes = [size for size, _ in elements(file)]
    target = max(target, -(-sum(sizes) // MOST_SLICES))
    slices, start, held = [], 0, 0
    for stop, size in enumerate(sizes, 1):
        held += size
        if held >= target or stop == len(sizes):
            slices.append(FileSlice(file, start, stop, start + 1, held))
            start, held = stop, 0
    return slices


def read(file_slice: FileSlice, text_column: str, broken: Broken) -> Iterator[pa.RecordBatch]:
    """The documents of a slice, in batches of about `source.BLOCK_BYTES`."""
    file, number = file_slice.file, file_slice.number
    if file.format == "array":
        yield from _read_array(file_slice, text_column, broken)
        return
    parse = _JsonLines(text_column) if file.format == "json" else _text
    for block in whole_lines(blocks(file, file_slice.start, file_slice.stop)):
        count = block.count(b"\n") + (not block.endswith(b"\n"))
        yield parse(file, block, number, count, broken)
        number += count


def _read_array(file_slice: FileSlice, text_column: str, broken: Broken) -> Iterator[pa.RecordBatch]:
    waiting, size, number = [], 0, file_slice.number
    for size_of, row in islice(elements(file_slice.file), file_slice.start, file_slice.stop):
        waiting.append((number, row))
        size += size_of
        number += 1
        if size >= source.BLOCK_BYTES:
            yield _documents(file_slice.file, waiting, broken, lambda row: _document(as_object(row), text_column))
            waiting, size = [], 0
    yield _documents(file_slice.file, waiting, broken, lambda row: _document(as_object(row), text_column))
    if number - file_slice.number < file_slice.stop - file_slice.start:
        raise ValueError(f"{file_slice.file.path}: was changed while it is read: ends at element {number - 1}")


def _documents(
    file: InputFile, rows: Iterable[tuple[int, Any]], broken: Broken, parse: Callable[[Any], tuple[str | None, str]]
) -> pa.RecordBatch:
    """Documents of numbered lines or elements; `parse` finds the id, if there is one, and the text."""
    ids, texts = [], []
    for number, row in rows:
        try:
            name, text = parse(row)
        except (ValueError, RecursionError) as error:
            broken(file, number, f"not UTF-8: {error}" if file.format == "text" else str(error))
        else:
            ids.append(f"{file.name}:{number}" if name is None else name)
            texts.append(text)
    return documents(ids, texts)


def _text(file: InputFile, block: bytes, number: int, count: int, broken: Broken) -> pa.RecordBatch:
    """Documents of a block of plain text."""
    return _documents(file, numbered_lines(block, number), broken, lambda line: (None, line.decode()))


def _document(row: dict[str, Any], text_column: str) -> tuple[str | None, str]:
    """The id, if there is one, and the text of a row; ValueError if it has no text, or an id of another type."""
    text = row.get(text_column)
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        found = f"got {found}" if text_column in row else f"the row has {', '.join(row) or 'nothing'}"
        raise ValueError(f"expected text in field {text_column!r}, {found}")
    text.encode()  # a lone surrogate is no text
    name = row.get(ID) if text_column != ID else None
    if name is None:
        return None, text
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f"expected a string or an integer in field {ID!r}, got {type(name).__name__}")
    str(name).encode()
    return str(name), text


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
        lines = numbered_lines(block, number)
        return _documents(file, lines, broken, lambda line: _document(json_object(line), self.text_column))
