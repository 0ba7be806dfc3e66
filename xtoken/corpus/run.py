"""A whole run: find the files, cut them into shards, make the shards that are missing, and write the index."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import _core
from ..alignment import METHODS
from ..storage import TEMPORARY
from ..vocabulary import TokenizerLike
from . import engine_local, engine_ray
from .files import InputFile, find_files
from .manifest import FILE_NAME, Manifest, complete_shards
from .partition import Piece, into_shards
from .progress import Progress
from .reading import scan_file
from .shards import Job, encoder, tokenizer_hash

ENGINES = ("local", "ray")
ON_ERROR = ("raise", "skip")


def run(
    student_tok: TokenizerLike,
    teacher_tok: TokenizerLike,
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    text_column: str,
    max_length: int | None,
    method: str,
    engine: str,
    workers: int | None,
    resume: bool,
    on_error: str,
    shard_bytes: int,
    progress: bool | None,
) -> Manifest:
    """`xtoken.align_corpus`, which documents the arguments."""
    for name, value, known in (
        ("engine", engine, ENGINES),
        ("on_error", on_error, ON_ERROR),
        ("method", method, METHODS),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    for name, number in (("workers", workers), ("max_length", max_length), ("shard_bytes", shard_bytes)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    folder = Path(output).absolute()
    _check_output(folder, resume)
    files = find_files(inputs)
    student, teacher = encoder(student_tok, "student"), encoder(teacher_tok, "teacher")
    job = Job(student, teacher, str(folder), text_column, max_length, method, on_error)
    parameters = {
        "xtoken": _core.version,
        "student": student.fingerprint(),
        "student_tokenizer": tokenizer_hash(student),
        "teacher": teacher.fingerprint(),
        "teacher_tokenizer": tokenizer_hash(teacher),
        "method": method,
        "max_length": max_length,
        "text_column": text_column,
        "on_error": on_error,
        "shard_bytes": shard_bytes,
    }
    with Progress(sys.stderr.isatty() if progress is None else progress) as bar:
        manifest = _begin(folder, Manifest(parameters, files, []), text_column, shard_bytes)
        done = complete_shards(manifest, folder)
        missing = [shard for shard in manifest.shards if shard.index not in done]
        bar.start(sum(shard.size for shard in manifest.shards), sum(manifest.shards[k].size for k in done))
        if missing:
            if engine == "local":
                made = engine_local.make_shards(job, missing, workers or 1, bar.advance)
            else:
                made = engine_ray.make_shards(job, missing, workers, bar.advance)
            for shard, counts in made:
                done[shard.index] = counts
                bar.shard_done(shard.size, counts.text_bytes)
        manifest.counts = [done[shard.index] for shard in manifest.shards]
        manifest.save(folder)
    return manifest


def _check_output(folder: Path, resume: bool) -> None:
    """Refuses a folder that holds something else than an output to go on with."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not resume and held:
        raise ValueError(f"output: {folder} is not empty; give another folder, or resume (--resume) what is in it")
    strange = sorted(name for name in held if not name.endswith(TEMPORARY))
    if strange and FILE_NAME not in held:
        raise ValueError(f"output: {folder} holds {strange[0]} but no {FILE_NAME}; expected an output of this command")
    folder.mkdir(parents=True, exist_ok=True)


def _begin(folder: Path, wanted: Manifest, text_column: str, shard_bytes: int) -> Manifest:
    """The index of the run that was stopped, if there is one and it fits; else a new one."""
    if (folder / FILE_NAME).exists():
        before = Manifest.load(folder)
        changes = before.changes(wanted)
        if changes:
            raise ValueError(f"resume: {folder} was made otherwise, so its shards cannot be kept: {'; '.join(changes)}")
        return Manifest(before.parameters, before.inputs, before.shards)

    def scan(file: InputFile) -> list[Piece]:
        return scan_file(file, text_column, shard_bytes)

    with ThreadPoolExecutor(_core.available_processors()) as threads:
        pieces = [piece for found in threads.map(scan, wanted.inputs) for piece in found]
    wanted.shards = list(into_shards(pieces, shard_bytes))
    if wanted.shards:  # an output without shards is complete as it is
        wanted.save(folder)
    return wanted
