"""The input files, their formats, and stamps that tell whether they changed."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FORMATS: dict[str, str] = {
    **{f".{name}{compressed}": "json" for name in ("jsonl", "json", "ndjson") for compressed in ("", ".gz", ".zst")},
    **{f".txt{compressed}": "text" for compressed in ("", ".gz", ".zst")},
    ".parquet": "parquet",
    **{f".{name}": "arrow" for name in ("arrow", "feather", "ipc")},
}
"""Format by the ending of a file's name."""


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus."""

    path: str
    """Absolute."""
    name: str
    """Relative to the folder that all inputs share: what ids are made of."""
    format: str
    size: int
    mtime_ns: int

    @property
    def is_compressed(self) -> bool:
        """Whether the file can only be read from its start."""
        return self.path.endswith((".gz", ".zst"))


def find_files(inputs: Sequence[str | os.PathLike[str]]) -> list[InputFile]:
    """The files that paths and glob patterns stand for, each once; those of a pattern sorted.

    Raises FileNotFoundError if one matches no file, ValueError for a folder and for an ending not in `FORMATS`.
    """
    paths: dict[str, None] = {}
    for given in (os.fspath(path) for path in inputs):
        matches = [given]
        if not os.path.exists(given):
            matches = sorted(path for path in glob.glob(given, recursive=True) if os.path.isfile(path))
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
        kind = next((kind for ending, kind in FORMATS.items() if path.lower().endswith(ending)), None)
        if kind is None:
            raise ValueError(f"input: {path} has an unknown ending; expected one of {', '.join(FORMATS)}")
        stat, name = os.stat(path), Path(path).relative_to(root).as_posix()
        files.append(InputFile(path, name, kind, stat.st_size, stat.st_mtime_ns))
    return files
