"""Prefix KL of logits in parts: the formula of `formula.prefix`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks
from xtoken.losses.numerics import scaled, statistics_dtype
from xtoken.losses.on_pieces import event_log_mass
from xtoken.losses.prefix_kl import formula
from xtoken.parallel.columns import Columns, Meeting, Parts, as_slice, chosen
from xtoken.parallel.ranks import Ranks
from xtoken.parallel.side import Formula, Side
from xtoken.pieces import sides as piece_sides

if TYPE_CHECKING:
    from xtoken.losses.prefix_kl import PrefixKL


class InParts(Formula):
    """For the columns that the ranks have.

    The events at the starts of chunks are compared where their tokens are, and only those whose tokens several ranks
    have cross. Inside chunks events are few, and all of them are added up.
    """

    options: PrefixKL
    added_up = 2 + 2

    def __init__(self, options: PrefixKL, student: Columns, teacher: Columns, device: torch.device) -> None:
        self.pieces, self.count = options.pieces, int(options.pieces[2])
        self.sides = piece_sides(options.pieces)
        self.roots = [side.event.to(device).long() for side in self.sides]
        self.merged = formula.merged_events(self.sides, self.count).to(device)
        found = []
        for root, columns in zip(self.roots, (student, teacher), strict=True):
            tokens = torch.arange(columns.size, device=device)
            found.append(Parts(root[: columns.size], columns.rank_of(tokens), columns.ranks))
        super().__init__(options, Meeting(self.count, *found), student.ranks, student.ranks)
        self.events = [
            _Events(self.meeting.numbered(k, self.roots[k][columns.first : columns.last]), len(self.meeting.held(k)))
            for k, columns in enumerate((student, teacher))
        ]

    def across(self, chunks: Chunks) -> int:
        boundaries = formula.inner_boundaries(chunks, self.pieces).to(chunks.used.device)
        inside = formula.insides(chunks, boundaries, self.sides, self.roots, self.merged)
        return super().across(chunks) + sum(4 * len(one.place) * one.number for one in inside)

    def losses(self, student: Side, teacher: Side, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        """The loss of each chunk [K], on every rank."""
        options, both, device = self.options, (student, teacher), student.logits.device
        dtype = statistics_dtype(student.logits, teacher.logits)
        loss, probability = self._starts(both, chunks, dtype)

        boundaries = formula.inner_boundaries(chunks, self.pieces).to(device)
        inner, inner_probability = loss.new_zeros(len(boundaries)), probability.new_zeros(len(boundaries))
        for one in formula.insides(chunks, boundaries, self.sides, self.roots, self.merged):
            log_p, log_q = (
                _log_masses(side, row, event, one.number, dtype)
                for side, row, event in zip(both, one.rows, one.events, strict=True)
            )
            terms, q = self._compared(log_p, log_q, one.left_out, Ranks())
            inner = inner.index_copy(0, one.place, terms)
            realised = one.events[1].gather(1, chunks.teacher.realised[one.rows[1], None])
            inner_probability[one.place] = q.gather(1, realised)[:, 0]
        if options.weighting == "teacher":
            inner = inner * formula.of_prefixes(probability, inner_probability, boundaries)
        return loss.index_add(0, boundaries[:, 0], inner) * options.temperature**2

    def _starts(self, both: tuple[Side, Side], chunks: Chunks, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The terms [K] of the starts, and the teacher's probabilities of what it realises there."""
        meeting = self.meeting

        def log_masses(k: int, rows: Tensor) -> Tensor:
            def of(z: Tensor, here: Tensor | slice) -> Tensor:
                return self.events[k].log_masses(scaled(z, 1.0, dtype))

            return meeting.log_totals(k, both[k].each(rows, of))

        log_p, log_q = log_masses(0, chunks.student.start), log_masses(1, chunks.teacher.start)
        left_out = formula.cannot_follow(chunks, self.sides, self.merged)[:, meeting.mine]
        terms, q = self._compared(log_p, log_q, left_out, meeting.ranks)
        realised = formula.first_events(chunks, (self.roots[0], self.roots[1]))
        terms = meeting.ranks.summed(terms).masked_fill(realised[0] != realised[1], 0)
        return terms, meeting.at(q, realised[1])

    def _compared(self, log_p: Tensor, log_q: Tensor, left_out: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """The divergence [n] of events [n, m], of which each of the ranks has some, and the teacher's probabilities."""
        missing, temperature = log_p.isinf() | log_q.isinf() | left_out, self.options.temperature
        log_p, log_q = (x.masked_fill(missing, -torch.inf) for x in (log_p, log_q))
        if temperature != 1.0:
            log_p, log_q = log_p / temperature, log_q / temperature
        log_p, log_q = (ranks.log_softmax(x).masked_fill(missing, 0) for x in (log_p, log_q))
        q, divergence = log_q.exp().masked_fill(missing, 0), self.options.divergence
        p = log_p.exp().masked_fill(missing, 0) if divergence.student else log_p.new_zeros(())
        return divergence(q, log_q, p, log_p), q.detach()


class _Events:
    """The events of columns int64 [m], each below `count` of at least one; most of them have no other."""

    def __init__(self, events: Tensor, count: int) -> None:
        columns = torch.arange(len(events), device=events.device)
        first = columns.new_empty(count).scatter_reduce(0, events, columns, "amin", include_self=False)
        self._first = as_slice(first)
        has_several = events.bincount(minlength=count) > 1
        self._several = has_several.nonzero()[:, 0]
        self._columns = has_several[events].nonzero()[:, 0]
        self._numbers = torch.searchsorted(self._several, events[self._columns])

    def log_masses(self, z: Tensor) -> Tensor:
        """[n, count]: logsumexp of rows [n, m] over the columns of each event."""
        found = chosen(z, self._first)
        if not len(self._several):
            return found
        numbers = self._numbers.expand(len(z), -1)
        return found.index_copy(1, self._several, event_log_mass(chosen(z, self._columns), numbers, len(self._several)))


def _log_masses(side: Side, rows: Tensor, events: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[n, count]: of events [n, V], on every rank."""
    events = events[:, side.columns.first : side.columns.last]

    def of(z: Tensor, here: Tensor | slice) -> Tensor:
        return side.columns.ranks.log_sums(event_log_mass(scaled(z, 1.0, dtype), events[here], count))

    return side.each(rows, of)
