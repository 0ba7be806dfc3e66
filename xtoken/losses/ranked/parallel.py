"""The common part of losses on pairs and ranks, of logits in parts: that of `ranked`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks, Rows
from xtoken.losses.numerics import scaled, statistics_dtype
from xtoken.parallel.columns import Columns, Meeting, Parts, as_slice, chosen
from xtoken.parallel.side import Formula, Side

if TYPE_CHECKING:
    from xtoken.losses.ranked import PairedLoss


class InParts(Formula):
    """For the columns that the ranks have.

    Raises
    ------
    ValueError
        If there is an uncommon part too: it sorts whole rows.
    """

    options: PairedLoss

    def __init__(self, options: PairedLoss, student: Columns, teacher: Columns, device: torch.device) -> None:
        if options.uncommon_top_k:
            raise ValueError(
                "uncommon_top_k: expected 0 (the common part alone) for logits in parts, since the others are sorted, "
                f"which needs whole rows; got {options.uncommon_top_k}"
            )
        sides, ids = (student, teacher), options.pairs
        place = torch.arange(len(ids[0]), device=device)
        parts = (Parts(place, side.rank_of(one), side.ranks) for side, one in zip(sides, ids, strict=True))
        super().__init__(options, Meeting(len(place), *parts), student.ranks, teacher.ranks)
        self.local = [as_slice(one[self.meeting.held(k)] - sides[k].first) for k, one in enumerate(ids)]

    def losses(self, student: Side, teacher: Side, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        """The loss of each chunk [K], on every rank."""
        temperature, dtype = self.options.temperature, statistics_dtype(student.logits, teacher.logits)

        def log_probabilities(k: int, side: Side, rows: Rows) -> Tensor:
            def of(z: Tensor) -> Tensor:
                return chosen(side.columns.ranks.log_softmax(scaled(z, temperature, dtype)), self.local[k])

            return self.meeting.totals(k, side.mean(rows, of))

        log_p = log_probabilities(0, student, chunks.student)
        log_q = log_probabilities(1, teacher, chunks.teacher)
        return self.meeting.ranks.summed(self.options.divergence.of_logarithms(log_q, log_p)) * temperature**2
