"""A whole run: find the files, cut them into shards, make the shards that are missing, and write the index."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from .. import _core
from ..remote import Place, in_threads, located
from ..storage import only_run
from ..terminal import is_terminal
from ..vocabulary import TokenizerLike
from . import Options, engine_local, engine_ray
from .deaths import Deaths
from .files import InputFile, find_files
from .manifest import INDEX, Manifest
from .partition import into_shards
from .shards import Job, complete_shards, encoder, scan_file

DECISIVE = ("method", "max_length", "text_column", "on_error", "shard_bytes")
"""Options that the output depends on."""


class Progress:
    """A `bar` on standard error, drawn only if `visible`.

    Progress is measured in bytes of input. A shard in the making counts the text read so far; a complete one counts its
    full size, markup around the text included.
    """

    def __init__(self, visible: bool) -> None:
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
        description = TextColumn("{task.description}")
        console = Console(stderr=True, quiet=not visible)
        self.bar = RichProgress(description, *columns, console=console, disable=not visible)
        self._task = self.bar.add_task("scanning", total=None, speed="")
        self._started = 0.0
        self._complete = self._text = self._documents = self._tokens = 0

    def start(self, total: int, complete: int) -> None:
        """The work begins: bytes of input in all, and those of shards that an earlier run completed."""
        self._started = time.monotonic()
        self._complete = complete
        self.bar.reset(self._task, total=total, completed=complete, description="aligning")

    def advance(self, documents: int, tokens: int, text_bytes: int) -> None:
        """So much more was done."""
        self._documents += documents
        self._tokens += tokens
        self._text += text_bytes
        self._draw()

    def shard_done(self, size: int, text_bytes: int) -> None:
        """A shard of so many bytes of input, of which so many are text, is complete."""
        self._complete += size
        self._text -= text_bytes
        self._draw()

    def _draw(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed = f"{self._documents / seconds:,.0f} documents/s, {self._tokens / seconds / 1e6:,.2f} M tokens/s"
        self.bar.update(self._task, completed=self._complete + self._text, speed=speed)


def run(
    student_tok: TokenizerLike,
    teacher_tok: TokenizerLike,
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: Options,
    name: str = "inputs",
) -> Manifest:
    """`xtoken.align_corpus`, which documents the arguments; errors call the inputs `name`."""
    folder = located(output, "output")
    with only_run(folder) as alone:
        going_on = INDEX.prepare(folder, options.resume, "an output of this command")
        files = find_files(inputs, name)
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
            with Deaths() as deaths:
                made = engine.make_shards(job, missing, options.workers, progress.advance, deaths) if missing else ()
                for shard, counts in made:
                    done[shard.index] = counts
                    progress.shard_done(shard.size, counts.text_bytes)
            list(in_threads(InputFile.check_unchanged, manifest.inputs))
            alone.check()
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
    slices = chain.from_iterable(in_threads(scan, wanted.inputs, _core.available_processors()))
    wanted.shards = list(into_shards(slices, options.shard_bytes))
    if wanted.shards:  # an output without shards is complete as it is
        wanted.save(folder)
    return wanted
