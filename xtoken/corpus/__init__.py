"""Aligning whole corpora: text files in, parquet shards of token ids and chunks out.

One file, one job, in the order in which a run passes through them:

* `files`: which input files there are, and of which format
* `source`: the content of JSON and text files, unpacked, as lines or elements; training reads by it too
* `lines`, `tables`: where a file may be cut, and reading a slice of it (JSON and text; parquet and Arrow)
* `partition`: which slices make which shard
* `documents`: what readers return, and what happens to a broken line or row
* `shards`: the one function that turns a shard's documents into a parquet file
* `engine_local`, `engine_ray`: running it for all shards, on this machine or on a Ray cluster
* `deaths`: how many workers may die
* `manifest`: the index of the output, and what may be resumed
* `run`: the whole run, with its progress bar
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from ..alignment import METHODS
from ..vocabulary import TokenizerLike
from .manifest import Counts, Manifest

__all__ = ["Counts", "Manifest", "align_corpus"]

SHARD_BYTES = 64 << 20
"""Default size of a shard in bytes of input: half a minute of work for one core."""


KNOWN: dict[str, tuple[str, ...]] = {"method": METHODS, "engine": ("local", "ray"), "on_error": ("raise", "skip")}
"""What an option may be."""


@dataclass(frozen=True)
class Options:
    """The options of `xtoken.align_corpus`, which documents them. Raises ValueError for values that are not known."""

    text_column: str = "text"
    max_length: int | None = None
    method: str = "auto"
    engine: str = "local"
    workers: int | None = None
    resume: bool = False
    on_error: str = "raise"
    shard_bytes: int = SHARD_BYTES
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name, known in KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name in ("max_length", "workers", "shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")


def align_corpus(
    student_tok: TokenizerLike,
    teacher_tok: TokenizerLike,
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    text_column: str = "text",
    max_length: int | None = None,
    method: str = "auto",
    engine: str = "local",
    workers: int | None = None,
    resume: bool = False,
    on_error: str = "raise",
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> Manifest:
    """Tokenizes every document of a corpus with both tokenizers, aligns it, and writes parquet shards.

    Parameters
    ----------
    student_tok, teacher_tok
        Tokenizers, as for `Vocabulary.from_tokenizer`. Padding, truncation and special tokens that they would add are
        turned off.
    inputs : path or sequence of paths
        Files, glob patterns (``**`` too), or URLs of either (``s3://``, ``gs://``): parquet, JSON lines or one JSON
        array, text with a document a line, Arrow IPC files and streams; see `xtoken.corpus.files.FORMATS` for the
        endings. JSON and text may be compressed by gzip, bzip2, xz or zstd, which their content says, whatever the
        ending. Blank lines are no documents.
    output : path
        Folder, or URL of one, to write to: ``shard-00000.parquet`` and so on, and ``manifest.json``. Created if
        missing.
    text_column : str
        Column (parquet, Arrow) or field (JSON) with the text.
    max_length : int, optional
        Most tokens of a document on either side; longer ones are cut as `Aligner.truncate` does.
    method : str
        Method of `Aligner`.
    engine : "local" or "ray"
        Where the shards are made: on this machine, or by Ray on the cluster that it finds (it starts a local one
        if there is none). The output is the same.
    workers : int, optional
        Processes. Default: 1 with "local", whose tokenizers use all processors from that one process; all processors of
        the cluster with "ray".
    resume : bool
        Go on with a run that was stopped: complete shards are kept, the others are made. Tokenizers, parameters and
        inputs must be the same.
    on_error : "raise" or "skip"
        What to do about a broken line or row: stop, or leave it out and count it in the manifest.
    shard_bytes : int
        Size of a shard in bytes of (decompressed) input, up to the end of a document.
    progress : bool, optional
        Whether to draw a progress bar. Default: if standard error is a terminal.

    Returns
    -------
    Manifest
        What was written; ``output / "manifest.json"`` in memory.

    Raises
    ------
    ValueError
        For broken input, with file and line or row; for a file that changes while it is read; for options that are not
        known; for an `output` that holds something and no `resume`, or that another run writes to; for a `resume` with
        another tokenizer, parameter or input, naming it.
    FileNotFoundError
        If a path or pattern matches no file.
    OSError
        If a shard cannot be written, such as on a full disk, or workers die again and again. What is complete stays,
        and can be resumed.
    ImportError
        If pyarrow, with ``engine="ray"`` Ray, or the library of a URL's file system is not installed.

    Notes
    -----
    A row is a document: ``id`` string (the column ``id`` if there is one, else ``file:line``, counted from 1),
    ``student_ids`` and ``teacher_ids`` list<int32>, ``spans`` list<int32[4]> as in `Alignment`. Rows keep the order of
    the input. The same input gives the same bytes, however many workers there are and however often the run
    was stopped. Memory does not grow with the input: a worker holds a few batches of 2 MiB of text, or a few documents
    if these are larger.
    """
    require("pyarrow", "corpus")
    from .run import run

    options = Options(text_column, max_length, method, engine, workers, resume, on_error, shard_bytes, progress)
    return run(student_tok, teacher_tok, [inputs] if isinstance(inputs, (str, PathLike)) else inputs, output, options)


def require(module: str, extra: str) -> Any:
    """Imports a module of an optional dependency; the ImportError says which extra of this package installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed; pip install 'xtoken[{extra}]' brings it") from error
