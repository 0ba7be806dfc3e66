"""P-KL of logits in parts: the formula of `formula.pkl`, with W in the rows that a rank has."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks, Rows
from xtoken.losses.numerics import EPSILON, scaled, statistics_dtype
from xtoken.parallel.columns import Columns, Meeting, Parts
from xtoken.parallel.side import Side
from xtoken.projection.entries import project

if TYPE_CHECKING:
    from xtoken.losses.pkl import PreparedPKL


class InParts:
    """For the columns that the ranks have."""

    def __init__(self, options: PreparedPKL, student: Columns, teacher: Columns, device: torch.device) -> None:
        self.options = options
        self.rows = student.ranks.of_log_softmax(True) + teacher.ranks.of_log_softmax(False)
        columns, entries = options.columns, options.entries
        self.teacher_local = columns[teacher.here(columns)] - teacher.first
        place = torch.arange(len(columns), device=device)
        self.meeting = Meeting(
            len(columns),
            Parts(entries.column, student.rank_of(entries.student), student.ranks),
            Parts(place, teacher.rank_of(columns), teacher.ranks),
        )
        own = student.here(entries.student)
        self.entry_index = options.entry_index[own]
        self.entries = replace(
            entries,
            student=entries.student[own] - student.first,
            column=self.meeting.numbered(0, entries.column[own]),
            weight=entries.weight[own],
        )

    @property
    def exchanged(self) -> int:
        """How many numbers this rank gives for a chunk of one token, forward and backward together."""
        return self.rows + self.meeting.exchanged + 3 + 2

    def losses(self, student: Side, teacher: Side, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        """The loss of each chunk [K], on every rank."""
        options, meeting, ranks = self.options, self.meeting, self.meeting.ranks
        temperature, dtype = options.temperature, statistics_dtype(student.logits, teacher.logits)
        merged = chunks if options.merge == "mean" else chunks.first()
        entries = self.entries if weight is None else replace(self.entries, weight=weight[self.entry_index])

        def masses(z: Tensor) -> Tensor:
            p = student.columns.ranks.log_softmax(scaled(z, temperature, dtype)).exp()
            return project(p, entries, len(meeting.held(0)))

        def log_probabilities(y: Tensor) -> Tensor:
            return teacher.columns.ranks.log_softmax(scaled(y[:, self.teacher_local], temperature, dtype))

        x = meeting.totals(0, student.mean(merged.student, masses))
        m = x / (ranks.shared(ranks.summed(x.sum(-1, keepdim=True))) + EPSILON)
        log_m = (m + EPSILON).log()
        log_q = meeting.totals(1, teacher.mean(merged.teacher, log_probabilities))
        q, divergence = log_q.exp(), options.divergence
        if options.merge != "chain":
            return ranks.summed(divergence(q, log_q, m, log_m)) * temperature**2
        log_c_student = _later_log_probability(student, chunks.student, temperature, dtype)
        log_c_teacher = _later_log_probability(teacher, chunks.teacher, temperature, dtype)
        if divergence.is_mixed:
            c_s, c_t = ranks.shared(log_c_student)[:, None], log_c_teacher[:, None]
            loss = ranks.summed(divergence(c_t.exp() * q, c_t + log_q, c_s.exp() * m, c_s + log_m))
        else:
            loss, sign = ranks.summed(divergence(q, log_q, m, log_m)), -1.0 if divergence.reverse else 1.0
            factor = log_c_student if divergence.reverse else log_c_teacher
            loss = factor.exp() * (loss + sign * (log_c_teacher - log_c_student))
        return loss * temperature**2


def _later_log_probability(side: Side, rows: Rows, temperature: float, dtype: torch.dtype) -> Tensor:
    assert rows.next_ids is not None
    index, owner = rows.later()
    following = rows.next_ids[index]

    def of(z: Tensor, here: Tensor | slice) -> Tensor:
        log_p = side.columns.ranks.log_softmax(scaled(z, temperature, dtype))
        return side.columns.picked(log_p, following[here])

    return rows.total(side.each(index, of), owner)
