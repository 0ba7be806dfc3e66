"""What of the rows cannot be trained on though it should be: counted, told once, refused if it is most rows."""

from __future__ import annotations

import json
import logging
from collections import Counter

from xtoken.terminal import printable

logger = logging.getLogger(__name__)


class Report:
    """Counts by kind, of turns or examples, and of rows of which a kind leaves nothing; the first of each is told."""

    NO_LABEL = "turns without a label"
    NO_END = "turns whose end nothing supervises"
    ADDED_END = "last turns that get the end token, since the chat template writes none"
    AMBIGUOUS_TURNS = "turns with a content that cannot be told from other text"
    CUT = "rows that lose what is beyond a length limit"
    UNSEEN = "turns with pictures or sounds, which no model is shown"
    NO_ROUTE = "rows that name no teacher and go to all"
    NO_SYSTEM = "rows that are no chats, which {} reads without its system message"
    NO_CHUNK = "turns or texts without a chunk for {}"
    UNPREDICTED = "texts of one piece with no token before it for {}"
    NO_FIRST_CHUNK = "turns whose first token is in no chunk for {}"

    def __init__(self, is_told: bool = True) -> None:
        self.is_told = is_told
        self.rows = 0
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._lost: Counter[str] = Counter()
        self._not_all: set[str] = set()

    def add(self, kind: str, reason: str, row: int, turn: int | None = None, may_be_all: bool = True) -> None:
        """Counts something, and tells the first of its kind."""
        self.counts[kind] += 1
        self._not_all |= set() if may_be_all else {kind}
        if kind not in self._first:
            self._tell(kind, f"row {row}" + (f", turn {turn}" if turn is not None else "") + f": {reason}")

    def _tell(self, kind: str, first: str) -> None:
        self._first[kind] = first
        if self.is_told:
            logger.warning("%s; more of these are counted: %s", printable(first), kind)

    def lose(self, kind: str) -> None:
        """Counts a row that is lost to a kind."""
        self._lost[kind] += 1

    def to_json(self) -> str:
        """For `merge`."""
        return json.dumps([self.rows, self.counts, self._first, self._lost, sorted(self._not_all)])

    def merge(self, report: str) -> None:
        """Adds what another report, of the rows behind these, has become by `to_json`."""
        rows, counts, first, lost, not_all = json.loads(report)
        self.rows += rows
        self.counts.update(counts)
        self._lost.update(lost)
        self._not_all.update(not_all)
        for kind in [one for one in first if one not in self._first]:
            self._tell(kind, first[kind])

    def conclude(self, examples: int, dropped: int) -> None:
        """Tells what is lost, and how many rows are dropped since nothing of them is trained on.

        Raises ValueError as `check` does, and if there are no examples.
        """
        self.check()
        if not examples:
            raise ValueError(f"rows: expected something to train on, got {dropped} rows of which nothing is")
        if dropped:
            message = "%d rows are left out, since nothing of them is trained on; %d examples"
            logger.warning(message, dropped, examples)
        if self.counts:
            logger.warning("of %d rows: %s", self.rows, self)

    def check(self) -> None:
        """Raises ValueError if a kind of loss is that of most rows, or if all rows have what they may not all have."""
        for kind in self._not_all:
            if self.counts[kind] == self.rows > 0:
                raise ValueError(f"rows: all {self.rows} are {kind}, first {self._first[kind]}")
        for kind, count in self._lost.items():
            if 2 * count > self.rows:
                raise ValueError(f"rows: {count} of {self.rows} are lost to {kind}, first {self._first[kind]}")

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
