"""P-KL of logits in parts: the formula of `pkl`, with W in the rows that a rank has."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks, Rows
from xtoken.losses.numerics import EPSILON, scaled, statistics_dtype
from xtoken.parallel.columns import Columns, Meeting, Parts, as_slice, chosen
from xtoken.parallel.side import Formula, Side
from xtoken.projection.entries import Entries, project

if TYPE_CHECKING:
    from xtoken.losses.pkl import PKL


class InParts(Formula):
    """For the columns that the ranks have."""

    options: PKL
    added_up = 3 + 2

    def __init__(self, options: PKL, student: Columns, teacher: Columns, device: torch.device) -> None:
        columns, entries = options.column_set, options.entries
        self.teacher_local = as_slice(columns[teacher.here(columns)] - teacher.first)
        place = torch.arange(len(columns), device=device)
        meeting = Meeting(
            len(columns),
            Parts(entries.column, student.rank_of(entries.student), student.ranks),
            Parts(place, teacher.rank_of(columns), teacher.ranks),
        )
        super().__init__(options, meeting, student.ranks, teacher.ranks)
        own = student.here(entries.student)
        self.entry_index = options.entry_index[own]
        self.image = _Image(
            replace(
                entries,
                student=entries.student[own] - student.first,
                column=self.meeting.numbered(0, entries.column[own]),
                weight=entries.weight[own],
            ),
            len(self.meeting.held(0)),
        )

    def across(self, chunks: Chunks) -> int:
        later = 0
        if self.options.merge == "chain":
            later = sum(int(rows.count.sum()) - len(chunks) for rows in (chunks.student, chunks.teacher))
        return super().across(chunks) + 2 * later

    def losses(self, student: Side, teacher: Side, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        """The loss of each chunk [K], on every rank."""
        options, meeting, ranks = self.options, self.meeting, self.meeting.ranks
        temperature, dtype = options.temperature, statistics_dtype(student.logits, teacher.logits)
        merged = chunks if options.merge == "mean" else chunks.first()
        own = None if weight is None else weight[self.entry_index]

        def masses(z: Tensor) -> Tensor:
            p = student.columns.ranks.log_softmax(scaled(z, temperature, dtype)).exp()
            return self.image.masses(p, own)

        def log_probabilities(y: Tensor) -> Tensor:
            return teacher.columns.ranks.log_softmax(scaled(chosen(y, self.teacher_local), temperature, dtype))

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


class _Image:
    """Entries of W, of which each of `count` columns has one. Where a column has no other, and its token neither, which
    is nearly everywhere, there is nothing to add up."""

    def __init__(self, entries: Entries, count: int) -> None:
        self.weight = entries.weight
        of_column, of_student = (of.bincount(minlength=1) for of in (entries.column, entries.student))
        is_alone = (of_column[entries.column] == 1) & (of_student[entries.student] == 1)
        self._alone, self._others = (one.nonzero()[:, 0] for one in (is_alone, ~is_alone))
        self._students = as_slice(entries.student[self._alone])
        columns, numbers = entries.column[self._others].unique(return_inverse=True)
        self._count, self._entries = len(columns), Entries(entries.student[self._others], numbers, self.weight[:0])
        order = torch.empty(count, dtype=torch.int64, device=columns.device)
        order[torch.cat([entries.column[self._alone], columns])] = torch.arange(count, device=columns.device)
        self._order = as_slice(order)

    def masses(self, p: Tensor, weight: Tensor | None) -> Tensor:
        """[n, count]: the mass p [n, V] in each column; `weight` takes the place of W's."""
        weight = self.weight if weight is None else weight
        alone = chosen(p, self._students) * weight[self._alone].to(p.dtype)
        if not self._count:
            return chosen(alone, self._order)
        entries = replace(self._entries, weight=weight[self._others])
        return chosen(torch.cat([alone, project(p, entries, self._count)], 1), self._order)


def _later_log_probability(side: Side, rows: Rows, temperature: float, dtype: torch.dtype) -> Tensor:
    index, owner = rows.later()
    following = rows.realised[index]

    def of(z: Tensor, here: Tensor | slice) -> Tensor:
        log_p = side.columns.ranks.log_softmax(scaled(z, temperature, dtype))
        return side.columns.picked(log_p, following[here])

    return rows.total(side.each(index, of), owner)
