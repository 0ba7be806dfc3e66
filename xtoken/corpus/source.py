"""The content of JSON and text files: unpacked, cut into lines, or into the elements of an array.

Corpora and training read by this module, which needs pyarrow for zstd alone.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..remote import located
from .files import InputFile

BLOCK_BYTES = 2 << 20
"""Bytes read at a time; a block of lines grows to the end of its last line."""

SNIFFED_BYTES = 1 << 16
"""Of the beginning of a file, looked at to find out what it is."""

_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
_STARTS = (b"\x1f\x8b\x08", b"BZh91AY&SY", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_UNPACK: dict[str, Callable[[Any], Any]] = {
    "gzip": lambda packed: gzip.GzipFile(fileobj=packed),
    "bz2": lambda packed: io.BufferedReader(_Members(packed, bz2.BZ2Decompressor)),
    "xz": lambda packed: io.BufferedReader(_Members(packed, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))),
}
_MARK = b"\xef\xbb\xbf"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_SPACE = re.compile(r"[ \t\n\r]*")


def sniff(file: InputFile, is_packed: bool) -> InputFile:
    """The file with what its beginning says: its packing, and whether its JSON is one array.

    Raises ValueError if it cannot be unpacked, is UTF-16, or is neither packed nor text although its name says the one
    (`is_packed`).
    """
    with _readable(file), located(file.path).open("rb") as stream:
        head = stream.read(SNIFFED_BYTES)
    packing = next((name for name, magic in _MAGIC.items() if magic.match(head)), "")
    if is_packed and head and not packing:
        is_text = not _CONTROL.search(head) and not any(start.startswith(head) for start in _STARTS)
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
        except UnicodeDecodeError:
            is_text = False
        if not is_text:
            raise ValueError(f"{file.path}: cannot read it: its name says packed, its content is neither that nor text")
    file = replace(file, packing=packing)
    if packing:
        with _readable(file), _open(file) as stream:
            head = stream.read(SNIFFED_BYTES)
    if head.startswith(_UTF16):
        raise ValueError(f"{file.path}: cannot read it: expected UTF-8, got UTF-16")
    if file.format == "json" and head.removeprefix(_MARK).lstrip().startswith(b"["):
        file = replace(file, format="array")
    return file


def blocks(file: InputFile, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Bytes ``start ... stop - 1`` of the unpacked file; ValueError if it cannot be read, or ends before `stop`."""
    with _readable(file), _open(file) as stream:
        position = 0
        if not file.packing:
            position = stream.seek(start)
        while stop is None or position < stop:
            block = stream.read(BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - position))
            if not block:
                break
            position += len(block)
            if position > start:
                yield block[max(0, len(block) - (position - start)) :]
    if stop is not None and position < stop:
        raise ValueError(f"{file.path}: was changed while it is read: ends at byte {position}, expected {stop}")


def whole_lines(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, each block up to the end of a line."""
    rest: list[bytes] = []
    for block in parts:
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join([*rest, block[:end]])
            rest = []
        if end < len(block):
            rest.append(block[end:])
    if rest:
        yield b"".join(rest)


def numbered_lines(block: bytes, number: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a block whose first one has this number, without their ends; blank ones are left out."""
    if number == 1:
        block = block.removeprefix(_MARK)
    for k, line in enumerate(block.split(b"\n"), number):
        if line.strip():
            yield k, line.removesuffix(b"\r")


class Row(dict[str, Any]):
    """A row of a file, with the `place` where it stands."""

    def __init__(self, row: Mapping[str, Any], file: InputFile, number: int) -> None:
        super().__init__(row)
        self.place = f"{file.path}, {file.unit} {number}"


def rows(file: InputFile, text_column: str) -> Iterator[Row]:
    """The rows of a file, with all their fields; a line of text is a row with `text_column`.

    Raises ValueError if one is broken, with file and line or row.
    """
    if file.format == "array":
        for number, (_, row) in enumerate(elements(file), 1):
            with _broken(file, number):
                row = as_object(row)
            yield Row(row, file, number)
        return
    number = 1
    for block in whole_lines(blocks(file)):
        for k, line in numbered_lines(block, number):
            with _broken(file, k):
                row = json_object(line) if file.format == "json" else {text_column: line.decode()}
            yield Row(row, file, k)
        number += block.count(b"\n")


def json_object(line: bytes) -> dict[str, Any]:
    """A line of JSON lines; ValueError if it is no object."""
    try:
        row = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"{error}; expected JSON lines (an object a line) or one array of objects") from error
    return as_object(row)


def as_object(row: Any) -> dict[str, Any]:
    """The row; ValueError if it is no object."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def without_nulls(value: Any) -> Any:
    """A value of a table without the fields that are null: a table has every field in every row, and templates ask
    whether one is there. A ``content`` stays: that is how messages with tool calls are written.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None or key == "content"}
    return [without_nulls(one) for one in value] if isinstance(value, (list, tuple)) else value


def elements(file: InputFile) -> Iterator[tuple[int, Any]]:
    """The elements of a file that is one JSON array: their sizes in the file, and the values.

    Raises ValueError if it is no array, with the line. In memory is one element at a time, or a block.
    """
    source = codecs.iterdecode(blocks(file), "utf-8-sig")
    decoder = json.JSONDecoder()
    text, at, line = "", 0, 1

    def more() -> bool:
        """Reads as much as is waiting, and at least a block."""
        nonlocal text, at
        parts, size = [text[at:]], 0
        while size <= len(parts[0]) and (part := next(source, "")):
            parts.append(part)
            size += len(part)
        text, at = "".join(parts), 0
        return size > 0

    def upcoming() -> str:
        """The next character that is no white space; none at the end."""
        nonlocal at, line
        while True:
            space = _SPACE.match(text, at)
            end = space.end() if space else at
            line, at = line + text.count("\n", at, end), end
            if at < len(text) or not more():
                return text[at : at + 1]

    def value() -> tuple[int, Any]:
        nonlocal at, line
        upcoming()
        while True:
            try:
                found, end = decoder.raw_decode(text, at)
                if end == len(text) and more():  # a number may go on
                    continue
            except json.JSONDecodeError as error:
                # What fails near the end of the text, or is a string without an end, may only be cut here.
                if (error.pos >= len(text) - 16 or "Unterminated" in error.msg) and more():
                    continue
                lines = line + text.count("\n", at, error.pos)
                raise ValueError(f"{file.path}, line {lines}: {error.msg}, in a JSON array") from error
            except ValueError as error:  # a number of thousands of digits
                raise ValueError(f"{file.path}, line {line} or later: {error}") from error
            size, line, at = end - at, line + text.count("\n", at, end), end
            return size, found

    def fail(expected: str) -> ValueError:
        return ValueError(f"{file.path}, line {line}: expected {expected} of a JSON array, got {text[at : at + 1]!r}")

    try:
        if upcoming() != "[":
            raise fail("the beginning")
        at += 1
        if upcoming() != "]":
            while True:
                yield value()
                if upcoming() != ",":
                    break
                at += 1
        if upcoming() != "]":
            raise fail("a comma or the end")
        at += 1
        if upcoming():
            raise fail("nothing behind the end")
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file.path}, line {line} or later: {error}") from error


class _Members(io.RawIOBase):
    """The unpacked members of a file, one behind the other, with zeros between and behind them.

    Python's own readers of bz2 and xz end without an error at what begins like no member, and at zeros.
    """

    def __init__(self, packed: Any, unpacker: Callable[[], Any]) -> None:
        self._packed, self._unpacker = packed, unpacker
        self._member = unpacker()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._member.eof:
                data = self._member.unused_data.lstrip(b"\0")
                while not data and (block := self._packed.read(SNIFFED_BYTES)):
                    data = block.lstrip(b"\0")
                if not data:
                    return 0
                self._member = self._unpacker()
            elif self._member.needs_input:
                data = self._packed.read(SNIFFED_BYTES)
                if not data:
                    raise EOFError("it ends within what is packed")
            found = self._member.decompress(data, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)


@contextmanager
def _open(file: InputFile) -> Iterator[Any]:
    """A stream of the unpacked bytes."""
    with located(file.path).open("rb") as packed:
        if not file.packing:
            yield packed
            return
        if file.packing == "zstd":
            from . import require

            stream = require("pyarrow", "corpus").input_stream(packed, compression="zstd")
        else:
            stream = _UNPACK[file.packing](packed)
        with stream:
            yield stream


@contextmanager
def _readable(file: InputFile) -> Iterator[None]:
    """Errors of reading and unpacking as ValueError that names the file."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:  # pyarrow's are one of these
        raise ValueError(f"{file.path}: cannot read it: {error}") from error


@contextmanager
def _broken(file: InputFile, number: int) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.path}, {file.unit} {number}: {error}") from error
