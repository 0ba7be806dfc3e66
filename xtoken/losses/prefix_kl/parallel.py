"""Prefix KL of logits in parts: the formula of `formula.prefix`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks
from xtoken.losses.numerics import scaled, statistics_dtype
from xtoken.losses.on_pieces import event_log_mass
from xtoken.losses.prefix_kl import formula
from xtoken.parallel.columns import Columns, Meeting, Parts
from xtoken.parallel.ranks import Ranks
from xtoken.parallel.side import Side
from xtoken.pieces import sides as piece_sides

if TYPE_CHECKING:
    from xtoken.losses.prefix_kl import PrefixKL


class InParts:
    """For the columns that the ranks have.

    The events at the starts of chunks are compared where their tokens are, and only those whose tokens several ranks
    have cross. Inside chunks events are few, and all of them are added up.
    """

    def __init__(self, options: PrefixKL, student: Columns, teacher: Columns, device: torch.device) -> None:
        self.options, self.pieces, self.count = options, options.pieces, int(options.pieces[2])
        self.sides = piece_sides(options.pieces)
        self.roots = [side.event.to(device).long() for side in self.sides]
        self.merged = formula.merged_events(self.sides, self.count).to(device)
        found = []
        for root, columns in zip(self.roots, (student, teacher), strict=True):
            tokens = torch.arange(columns.size, device=device)
            found.append(Parts(root[: columns.size], columns.rank_of(tokens), columns.ranks))
        self.meeting = Meeting(self.count, *found)
        self.events = [
            self.meeting.numbered(k, self.roots[k][columns.first : columns.last])
            for k, columns in enumerate((student, teacher))
        ]

    @property
    def exchanged(self) -> int:
        """How many numbers this rank gives for a chunk of one token, forward and backward together."""
        ranks = self.meeting.ranks
        both = ranks.of_log_softmax(True) + ranks.of_log_softmax(False)
        return both + self.meeting.exchanged + 2 + 2

    def losses(self, student: Side, teacher: Side, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        """The loss of each chunk [K], on every rank."""
        options, both, device = self.options, (student, teacher), student.logits.device
        dtype = statistics_dtype(student.logits, teacher.logits)
        student_ids, teacher_ids = chunks.student.next_ids, chunks.teacher.next_ids
        assert student_ids is not None
        assert teacher_ids is not None
        next_ids = student_ids, teacher_ids
        loss, probability = self._starts(both, chunks, dtype)

        boundaries = formula.inner_boundaries(chunks, self.pieces).to(device)
        chunk, _, whole_row, part_row = boundaries[:, :4].unbind(1)
        inner, inner_probability = loss.new_zeros(len(chunk)), probability.new_zeros(len(chunk))
        for whole in (0, 1):
            index = (boundaries[:, 1] == whole).nonzero()[:, 0]
            if len(index) == 0:
                continue
            rows, depth, *tokens = [whole_row[index], part_row[index]], *boundaries[index, 4:].unbind(1)
            *events, count = formula.next_pieces(self.sides[whole], self.sides[1 - whole], depth, *tokens)
            left_out = torch.zeros(len(index), count, dtype=torch.bool, device=device)
            left_out[:, 0] = self.merged[self.roots[1 - whole][next_ids[1 - whole][part_row[index] - depth]]]
            if whole == 1:
                rows, events = rows[::-1], events[::-1]
            log_p, log_q = (
                _log_masses(side, row, event, count, dtype) for side, row, event in zip(both, rows, events, strict=True)
            )
            terms, q = self._compared(log_p, log_q, left_out, Ranks())
            inner = inner.index_copy(0, index, terms)
            inner_probability[index] = q.gather(1, events[1].gather(1, teacher_ids[rows[1], None]))[:, 0]
        if options.weighting == "teacher":
            student_row = torch.where(boundaries[:, 1] == 0, whole_row, part_row)
            inner = inner * formula.of_prefixes(probability, inner_probability, chunk, student_row)
        return loss.index_add(0, chunk, inner) * options.temperature**2

    def _starts(self, both: tuple[Side, Side], chunks: Chunks, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The terms [K] of the starts, and the teacher's probabilities of what it realises there."""
        meeting = self.meeting

        def log_masses(k: int, rows: Tensor) -> Tensor:
            def of(z: Tensor, here: Tensor | slice) -> Tensor:
                return event_log_mass(scaled(z, 1.0, dtype), self.events[k].expand(len(z), -1), len(meeting.held(k)))

            return meeting.log_totals(k, both[k].each(rows, of))

        log_p, log_q = log_masses(0, chunks.student.start), log_masses(1, chunks.teacher.start)
        left_out = formula.cannot_follow(chunks, self.sides, self.merged)[:, meeting.mine]
        terms, q = self._compared(log_p, log_q, left_out, meeting.ranks)
        realised = formula.first_events(chunks, (self.roots[0], self.roots[1]))
        terms = meeting.ranks.summed(terms).masked_fill(realised[0] != realised[1], 0)
        return terms, meeting.at(q, realised[1])

    def _compared(self, log_p: Tensor, log_q: Tensor, left_out: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """The divergence [n] of events [n, m], of which each of the ranks has some, and the teacher's probabilities."""
        missing = log_p.isinf() | log_q.isinf() | left_out
        log_p, log_q = (
            ranks.log_softmax(x.masked_fill(missing, -torch.inf) / self.options.temperature).masked_fill(missing, 0)
            for x in (log_p, log_q)
        )
        p, q = (x.exp().masked_fill(missing, 0) for x in (log_p, log_q))
        return self.options.divergence(q, log_q, p, log_p), q.detach()


def _log_masses(side: Side, rows: Tensor, events: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[n, count]: of events [n, V], on every rank."""
    events = events[:, side.columns.first : side.columns.last]

    def of(z: Tensor, here: Tensor | slice) -> Tensor:
        return side.columns.ranks.log_sums(event_log_mass(scaled(z, 1.0, dtype), events[here], count))

    return side.each(rows, of)
