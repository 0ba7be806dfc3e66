"""The input files: their format, how they are packed, and stamps that tell whether they changed."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """Absolute."""
    name: str
    """Relative to the folder that all inputs share: what ids are made of."""
    format: str
    packing: str
    """What it is packed with, "" if with nothing; a packed file can only be read from its start."""
    size: int
    mtime_ns: int

    @property
    def unit(self) -> str:
        """What a document of it is."""
        return "line" if self.format in ("json", "text") else "row"

    def check_unchanged(self) -> None:
        """Raises ValueError if the file is not the one that was found."""
        try:
            stat = os.stat(self.path)
        except OSError as error:
            raise ValueError(f"{self.path}: is gone while it is read: {error}") from error
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            sizes = f"{self.size} bytes at first, {stat.st_size} now"
            raise ValueError(f"{self.path}: was changed while it is read ({sizes}); start again")


def find_files(inputs: Sequence[str | os.PathLike[str]]) -> list[InputFile]:
    """The files that paths and glob patterns stand for, each once; those of a pattern sorted.

    Raises FileNotFoundError if one matches no file; ValueError for a folder, for an ending not in `FORMATS`, and for a
    file that is packed by name and neither packed nor text by content.
    """
    from .source import sniff

    paths: dict[str, None] = {}
    for given in (os.fspath(path) for path in inputs):
        matches = [given] if os.path.exists(given) else _matches(given)
        if not matches:
            raise FileNotFoundError(f"input: no file matches {given}")
        paths.update((os.path.abspath(path), None) for path in matches)
    if not paths:
        raise ValueError("input: expected at least one file")
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    files = []
    for path in paths:
        if os.path.isdir(path):
            raise ValueError(f"input: {path} is a folder; expected files, such as '{path}/*.parquet'")
        plain, ending = os.path.splitext(path.lower())
        is_packed = ending in PACKED_ENDINGS
        kind = FORMATS.get(os.path.splitext(plain)[1] if is_packed else ending)
        if kind is None or (is_packed and kind not in LINES):
            known = f"{', '.join(FORMATS)}, the first four also with {', '.join(PACKED_ENDINGS)}"
            raise ValueError(f"input: {path} has an unknown ending; expected one of {known}")
        stat, name = os.stat(path), Path(path).relative_to(root).as_posix()
        file = InputFile(path, name, kind, "", stat.st_size, stat.st_mtime_ns)
        files.append(sniff(file, is_packed) if kind in LINES else file)
    return files


def _matches(pattern: str) -> list[str]:
    """The files of a glob pattern; folders at its beginning that exist as they are written count as that."""
    parts = Path(pattern).parts
    known = next(k for k in range(len(parts), -1, -1) if os.path.isdir(os.path.join("", *parts[:k]) or "."))
    pattern = os.path.join("", *map(glob.escape, parts[:known]), *parts[known:])
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
