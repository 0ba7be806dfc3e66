"""KL for one shared tokenizer, of logits in parts: the formula of `formula.kd`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks
from xtoken.losses.divergence import Divergence
from xtoken.losses.numerics import scaled, statistics_dtype
from xtoken.parallel.columns import Columns, Meeting, Parts, as_slice, chosen
from xtoken.parallel.side import Side

if TYPE_CHECKING:
    from xtoken.losses.kd import KD


class InParts:
    """For the columns that the ranks have."""

    def __init__(self, options: KD, student: Columns, teacher: Columns, device: torch.device) -> None:
        self.options = options
        self.rows = student.ranks.of_log_softmax(True) + teacher.ranks.of_log_softmax(False)
        columns = torch.arange(student.size, device=device) if options.columns is None else options.columns
        self.local = [as_slice(columns[side.here(columns)] - side.first) for side in (student, teacher)]
        place = torch.arange(len(columns), device=device)
        self.meeting = Meeting(
            len(columns), *(Parts(place, side.rank_of(columns), side.ranks) for side in (student, teacher))
        )

    @property
    def exchanged(self) -> int:
        """How many numbers this rank gives for a chunk of one token, forward and backward together."""
        return self.rows + self.meeting.exchanged + 2

    def across(self, chunks: Chunks) -> int:
        """How many numbers this rank gives for chunks whose rows lie on several ranks of a sequence, forward and
        backward together: what the formula takes of their rows, twice forward."""
        return 2 * len(chunks) * (len(self.meeting.held(0)) + len(self.meeting.held(1)))

    def losses(self, student: Side, teacher: Side, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        """The loss of each chunk [K], on every rank."""
        temperature, dtype = self.options.temperature, statistics_dtype(student.logits, teacher.logits)

        def log_probabilities(k: int, side: Side, rows: Tensor) -> Tensor:
            def of(z: Tensor, here: Tensor | slice) -> Tensor:
                return side.columns.ranks.log_softmax(scaled(chosen(z, self.local[k]), temperature, dtype))

            return self.meeting.totals(k, side.each(rows, of))

        log_p = log_probabilities(0, student, chunks.student.start)
        log_q = log_probabilities(1, teacher, chunks.teacher.start)
        divergence: Divergence = self.options.divergence
        return self.meeting.ranks.summed(divergence.of_logarithms(log_q, log_p)) * temperature**2
