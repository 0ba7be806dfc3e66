"""Workers that die: counted, told once, and how often a shard may be made again."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import AbstractContextManager

from .partition import Shard

MOST = 3
"""Workers that may die at one shard, or at their start one after the other; it is then taken for the cause."""

logger = logging.getLogger(__name__)


class Deaths(AbstractContextManager["Deaths"]):
    """Counts the workers that died in a run. Their sum is told at its end, however it ends."""

    def __init__(self) -> None:
        self._at: Counter[str] = Counter()
        self._at_start = 0

    @property
    def total(self) -> int:
        """Workers that died."""
        return sum(self._at.values())

    def started(self) -> None:
        """A worker has started."""
        self._at_start = 0

    def __call__(self, shard: Shard | None, reason: str) -> None:
        """A worker died while it made a shard, which is to be made again, or at its start.

        Raises OSError if that has killed `MOST`.
        """
        name = "the start" if shard is None else shard.file_name
        self._at[name] += 1
        self._at_start += shard is None
        if (self._at_start if shard is None else self._at[name]) == MOST:
            hint = "complete shards stay, and can be resumed"
            raise OSError(f"{name}: {MOST} workers died at it, the last of them so: {reason}; {hint}")

    def __exit__(self, *_: object) -> None:
        if self.total:
            where = ", ".join(f"{name} ({count})" for name, count in self._at.items())
            logger.warning("%d workers died; what they made was lost and begun again: %s", self.total, where)
