"""What a formula sees of logits in parts: rows of a side by their numbers, wherever they are; and what all share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xtoken.alignment.chunks import Chunks, Rows
from xtoken.parallel.columns import Columns, Meeting, as_slice
from xtoken.parallel.ranks import Ranks


@dataclass(frozen=True)
class Side:
    """Some rows of logits, of which this rank has some columns."""

    logits: Tensor  # [N, columns here]
    columns: Columns
    sequence: Ranks  # that have the other rows, if `place` is given
    place: Tensor | None = None
    """int64: for each number of a row its place in `logits`, -1 where another rank has it. None: all are here."""

    def _rows(self, index: Tensor) -> Tensor:
        """Rows of the logits; no copy where they follow each other, if that is known without waiting for a device."""
        found = as_slice(index) if index.device.type == "cpu" else index
        if isinstance(found, slice):
            return self.logits if found == slice(0, len(self.logits)) else self.logits[found]
        return self.logits.index_select(0, found)

    def each(self, rows: Tensor, values: Callable[[Tensor, Tensor | slice], Tensor]) -> Tensor:
        """[n, ...]: ``values(logits of r rows, their places among the n)`` [r, ...] of the rows with these numbers
        int64 [n], on every rank of the sequence."""
        if self.place is None:
            return values(self._rows(rows), slice(None))
        place = self.place[rows]
        here = (place >= 0).nonzero()[:, 0]
        found = values(self._rows(place[here]), here)
        return self.sequence.summed(found.new_zeros(len(rows), *found.shape[1:]).index_copy(0, here, found))

    def mean(self, rows: Rows, values: Callable[[Tensor], Tensor]) -> Tensor:
        """[K, ...]: the mean of ``values(logits)`` [r, ...] over the rows of each chunk, wherever they are."""
        if self.place is None:
            return rows.mean(values(self._rows(rows.index())))
        place = self.place[rows.index()]
        here = (place >= 0).nonzero()[:, 0]
        total = self.sequence.summed(rows.total(values(self._rows(place[here])), rows.owner()[here]))
        return total / rows.count.view(-1, *[1] * (total.dim() - 1))


class Formula:
    """What is alike in the classes ``InParts``: how much a loss exchanges for the columns that the ranks have."""

    added_up = 2
    """Numbers of a chunk that the formula itself sums over the ranks, forward and backward together."""

    def __init__(self, options: Any, meeting: Meeting, student: Ranks, teacher: Ranks) -> None:
        self.options, self.meeting = options, meeting
        self.rows = student.of_log_softmax(True) + teacher.of_log_softmax(False)

    @property
    def exchanged(self) -> int:
        """How many numbers this rank gives for a chunk of one token, forward and backward together."""
        return self.rows + self.meeting.exchanged + self.added_up

    def across(self, chunks: Chunks) -> int:
        """How many numbers this rank gives for chunks whose rows lie on several ranks of a sequence, forward and
        backward together: what the formula takes of their rows, twice forward."""
        return 2 * len(chunks) * (len(self.meeting.held(0)) + len(self.meeting.held(1)))
