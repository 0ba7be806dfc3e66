"""A whole run: find the files, cut them into shards, make the shards that are missing, and write the index."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

from .. import _core
from ..remote import THREADS, Place, located
from ..storage import only_run
from ..terminal import is_terminal
from ..vocabulary import TokenizerLike
from . import engine_local, engine_ray
from .deaths import Deaths
from .files import InputFile, find_files
from .manifest import INDEX, Manifest
from .options import Options
from .partition import into_shards
from .progress import Progress
from .reading import scan_file
from .shards import Job, complete_shards, encoder

DECISIVE = ("method", "max_length", "text_column", "on_error", "shard_bytes")
"""Options that the output depends on."""


def run(
    student_tok: TokenizerLike,
    teacher_tok: TokenizerLike,
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: Options,
) -> Manifest:
    """`xtoken.align_corpus`, which documents the arguments."""
    folder = located(output, "output")
    with only_run(folder) as alone:
        return _run(student_tok, teacher_tok, inputs, folder, options, alone.check)


def _run(
    student_tok: TokenizerLike,
    teacher_tok: TokenizerLike,
    inputs: Sequence[str | os.PathLike[str]],
    folder: Place,
    options: Options,
    check_alone: Callable[[], None],
) -> Manifest:
    going_on = INDEX.prepare(folder, options.resume, "an output of this command")
    files = find_files(inputs)
    progress = Progress(is_terminal(sys.stderr) if options.progress is None else options.progress)
    with progress.bar:
        job = Job(encoder(student_tok, "student"), encoder(teacher_tok, "teacher"), str(folder), options)
        parameters: dict[str, Any] = {"xtoken": _core.version}
        for side, vocabulary in (("student", job.student), ("teacher", job.teacher)):
            parameters |= {side: vocabulary.fingerprint(), f"{side}_vocab_size": len(vocabulary)}
        parameters |= {name: getattr(options, name) for name in DECISIVE}
        manifest = _begin(folder, Manifest(parameters, files, []), going_on, options)
        done = complete_shards(manifest.shards, folder)
        missing = [shard for shard in manifest.shards if shard.index not in done]
        progress.start(sum(shard.size for shard in manifest.shards), sum(manifest.shards[k].size for k in done))
        engine = engine_local if options.engine == "local" else engine_ray
        deaths = Deaths()
        with deaths:
            made = engine.make_shards(job, missing, options.workers, progress.advance, deaths) if missing else ()
            for shard, counts in made:
                done[shard.index] = counts
                progress.shard_done(shard.size, counts.text_bytes)
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(InputFile.check_unchanged, manifest.inputs))
        check_alone()
        manifest.counts = [done[shard.index] for shard in manifest.shards]
        manifest.save(folder)
    manifest.deaths = deaths.total
    return manifest


def _begin(folder: Place, wanted: Manifest, going_on: bool, options: Options) -> Manifest:
    """The index of the run that was stopped, if there is one and it fits; else a new one."""
    if going_on:
        before = Manifest.load(folder)
        changes = before.changes(wanted)
        if changes:
            raise ValueError(f"resume: {folder} was made otherwise, so its shards cannot be kept: {'; '.join(changes)}")
        return Manifest(before.parameters, before.inputs, before.shards)
    scan = partial(scan_file, text_column=options.text_column, target=options.shard_bytes)
    with ThreadPoolExecutor(_core.available_processors()) as threads:
        slices = chain.from_iterable(threads.map(scan, wanted.inputs))
        wanted.shards = list(into_shards(slices, options.shard_bytes))
    if wanted.shards:  # an output without shards is complete as it is
        wanted.save(folder)
    return wanted
