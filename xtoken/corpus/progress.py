"""The progress bar of a run: documents and tokens a second, and the remaining time."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A `bar` on standard error, drawn only if `visible`.

    Progress is measured in bytes of input. A shard in the making counts the text read so far; a complete one counts its
    full size, markup around the text included.
    """

    def __init__(self, visible: bool) -> None:
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
        description = TextColumn("{task.description}")
        self.bar = RichProgress(description, *columns, console=Console(stderr=True), disable=not visible)
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
