"""The input files: their format, how they are packed, and stamps that tell whether they changed."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..remote import Remote, check_regular, in_threads, is_url, located

FORMATS: dict[str, str] = {
    **{f".{name}": "json" for name in ("jsonl", "json", "ndjson")},
    ".txt": "text",
    ".parquet": "parquet",
    **{f".{name}": "arrow" for name in ("arrow", "feather", "ipc")},
}
"""Format by the ending of a file's name, in any case. A JSON file that holds one array has the format "array"."""

LINES = ("json", "text", "array")
"""The formats that `source` reads; the others are tables."""

PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
"""Endings that JSON and text may have besides. What a file is packed with is read from its first bytes alone."""


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus."""

    path: str
    """Absolute, or a URL."""
    name: str
    """Relative to the folder that all inputs share: what ids are made of."""
    format: str
    packing: str
    """What it is packed with, "" if with nothing; a packed file can only be read from its start."""
    size: int
    mtime_ns: int
    version: str = ""
    """What says of a file at a URL whether it has changed, such as its ETag."""

    @property
    def unit(self) -> str:
        """What a document of it is."""
        return "line" if self.format in ("json", "text") else "row"

    def check_unchanged(self) -> None:
        """Raises ValueError if the file is not the one that was found."""
        try:
            size, mtime_ns, version = _stamp(self.path)
        except OSError as error:
            raise ValueError(f"{self.path}: is gone while it is read: {error}") from error
        if (size, mtime_ns, version) != (self.size, self.mtime_ns, self.version):
            sizes = f"{self.size} bytes at first, {size} now"
            raise ValueError(f"{self.path}: was changed while it is read ({sizes}); start again")


def _stamp(path: str) -> tuple[int, int, str]:
    """Size, time of the last change, and version of a file."""
    place = located(path)
    if isinstance(place, Remote):
        size, version = place.stamp()
        return size, 0, version
    stat = place.stat()
    return stat.st_size, stat.st_mtime_ns, ""


def find_files(inputs: Sequence[str | os.PathLike[str]], option: str = "inputs") -> list[InputFile]:
    """The files that paths, URLs and patterns stand for, each once; those of a pattern sorted. `option` is for errors.

    Raises FileNotFoundError if one matches no file; OSError if a file system cannot be reached; ValueError for a
    folder, for an ending not in `FORMATS`, and for a file that is packed by name and neither packed nor text by
    content.
    """
    paths: dict[str, None] = {}
    for given in (os.fspath(path) for path in inputs):
        if not given:
            raise ValueError(f"{option}: expected the name of a file, got an empty text")
        matches = _matches(given, option)
        if not matches:
            missing = place.root_is_missing() if isinstance(place := located(given, option), Remote) else ""
            reason = f": there is no {missing}" if missing else ""
            raise FileNotFoundError(f"{option}: no file matches {given}{reason}")
        paths.update(dict.fromkeys(matches))
    if not paths:
        raise ValueError(f"{option}: expected at least one file")
    parts = {path: tuple(path.split("/")) if is_url(path) else Path(path).parts for path in paths}
    levels = zip(*(found[:-1] for found in parts.values()), strict=False)
    root = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    names = {
        path: "/".join(found[root:]) if is_url(path) else Path(*found[root:]).as_posix()
        for path, found in parts.items()
    }
    return list(in_threads(functools.partial(_look_at, option), names.items()))


def _look_at(option: str, named: tuple[str, str]) -> InputFile:
    from .source import sniff

    path, name = named
    if any("\ud800" <= c <= "\udfff" for c in path):  # which Python has for other bytes
        raise ValueError(f"{option}: expected a name in UTF-8, got {path!r}")
    if os.path.islink(path) and not os.path.exists(path):
        raise FileNotFoundError(f"{option}: {path} is a link to a file that is not there")
    if located(path).is_dir():
        raise ValueError(f"{option}: {path} is a folder; expected files, such as '{path.rstrip('/')}/*.parquet'")
    plain, ending = os.path.splitext(path.lower())
    is_packed = ending in PACKED_ENDINGS
    kind = FORMATS.get(os.path.splitext(plain)[1] if is_packed else ending)
    if kind is None or (is_packed and kind not in LINES):
        known = f"{', '.join(FORMATS)}, the first four also with {', '.join(PACKED_ENDINGS)}"
        raise ValueError(f"{option}: {path} has an unknown ending; expected one of {known}")
    check_regular(located(path))
    file = InputFile(path, name, kind, "", *_stamp(path))
    return sniff(file, is_packed) if kind in LINES else file


def _matches(pattern: str, option: str) -> list[str]:
    """The file, if it exists, or the files of a glob pattern, of which folders at its beginning that exist as they are
    written count as that. Paths are absolute."""
    place = located(pattern, option)
    if isinstance(place, Remote):
        return [pattern] if place.is_dir() else place.glob()
    if is_url(pattern):
        pattern = str(place)
    if os.path.exists(pattern):
        return [os.path.abspath(pattern)]
    parts = Path(pattern).parts
    known = next(k for k in range(len(parts), -1, -1) if os.path.isdir(os.path.join("", *parts[:k]) or "."))
    parts = (*map(glob.escape, parts[:known]), *parts[known:])
    for k in range(known, len(parts)):  # glob leaves out folders that it cannot read
        above = os.path.join("", *parts[:k], "") or os.curdir
        for folder in glob.glob(above, recursive=True) if glob.has_magic(parts[k]) else ():
            try:
                os.scandir(folder).close()
            except OSError as error:
                raise OSError(f"{option}: {pattern}: cannot look into {folder}: {error}") from error
    found = sorted(path for path in glob.glob(os.path.join("", *parts), recursive=True) if not os.path.isdir(path))
    return [os.path.abspath(path) for path in found]
