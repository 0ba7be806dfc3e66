"""KL for one shared tokenizer, of logits in parts: the formula of `kd`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks
from xtoken.losses.divergence import Divergence
from xtoken.losses.numerics import scaled, statistics_dtype
from xtoken.parallel.columns import Columns, Meeting, Parts, as_slice, chosen
from xtoken.parallel.side import Formula, Side

if TYPE_CHECKING:
    from xtoken.losses.kd import KD


class InParts(Formula):
    """For the columns that the ranks have."""

    options: KD

    def __init__(self, options: KD, student: Columns, teacher: Columns, device: torch.device) -> None:
        columns = torch.arange(student.size, device=device) if options.columns is None else options.columns
        self.local = [as_slice(columns[side.here(columns)] - side.first) for side in (student, teacher)]
        place = torch.arange(len(columns), device=device)
        parts = (Parts(place, side.rank_of(columns), side.ranks) for side in (student, teacher))
        super().__init__(options, Meeting(len(columns), *parts), student.ranks, teacher.ranks)

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
