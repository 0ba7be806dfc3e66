"""Which rank has which columns of a vocabulary, and how what both sides say of one thing comes to one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xtoken.parallel.ranks import Ranks


class Columns(NamedTuple):
    """The columns of one side."""

    bounds: tuple[int, ...]  # rank r has the columns bounds[r] ... bounds[r + 1] - 1
    ranks: Ranks  # of a group; or this rank alone, which has all

    @classmethod
    def of(cls, widths: Sequence[int], size: int, ranks: Ranks) -> Columns:
        """Of a vocabulary of `size`, by the columns that the ranks hold; the last has what is missing at the end."""
        bounds = [0]
        for width in widths[:-1]:
            bounds.append(min(size, bounds[-1] + width))
        return cls((*bounds, size), ranks)

    @property
    def size(self) -> int:
        """Of the vocabulary."""
        return self.bounds[-1]

    @property
    def first(self) -> int:
        """The first column here."""
        return self.bounds[self.ranks.rank]

    @property
    def last(self) -> int:
        """That after the last column here."""
        return self.bounds[self.ranks.rank + 1]

    def rank_of(self, ids: Tensor) -> Tensor:
        """int64, like ids: the rank that has each."""
        return torch.searchsorted(torch.tensor(self.bounds[1:], device=ids.device), ids, right=True)

    def here(self, ids: Tensor) -> Tensor:
        """int64: the places of those of the ids [n] that this rank has."""
        return ((ids >= self.first) & (ids < self.last)).nonzero()[:, 0]

    def picked(self, values: Tensor, ids: Tensor) -> Tensor:
        """[n]: of rows [n, columns here] the value in column ids[n], from whichever rank has it; used alike by all."""
        is_here = (ids >= self.first) & (ids < self.last)
        found = values.new_zeros(len(ids)).index_copy(
            0, is_here.nonzero()[:, 0], values[is_here].gather(1, ids[is_here, None] - self.first)[:, 0]
        )
        return self.ranks.summed(found)


class Parts(NamedTuple):
    """What of some categories (columns, pairs, events) the ranks have: parts of category[e] on rank[e]."""

    category: Tensor  # int64 [E]
    rank: Tensor  # int64 [E]
    ranks: Ranks


class _Way(NamedTuple):
    """Of one side: what this rank has, and where what it compares comes from."""

    ranks: Ranks
    held: Tensor  # int64 [m]: the categories of which this rank has parts, ascending
    sent: Tensor  # int64: places in `held` of categories that are not compared where all of their parts are
    place: Tensor  # int64: their places among all such categories
    crossing: int  # how many of these there are
    source: Tensor  # int64 [n]: places of `mine` among [held, crossing, nothing]


class Meeting:
    """Which rank compares which category, and the way of both sides' values to it.

    A category is compared where the teacher has it, or if every rank has the teacher's, where the student has it. Only
    categories of which another rank has a part cross: they are added up over the ranks, [K] values each.
    """

    def __init__(self, count: int, student: Parts, teacher: Parts) -> None:
        ranks = student.ranks
        device = student.category.device
        spans = [_span(count, side, ranks.size) for side in (student, teacher)]
        owner = torch.arange(count, device=device) % ranks.size
        owner = torch.where(spans[0][1] >= 0, spans[0][0], owner)
        if teacher.ranks.size > 1:
            owner = torch.where(spans[1][1] >= 0, spans[1][0], owner)
        self.count, self.ranks = count, ranks
        self.mine = (owner == ranks.rank).nonzero()[:, 0]
        """int64 [n]: the categories that this rank compares, ascending."""
        self._ways = [
            _way(count, side, span, owner, self.mine) for side, span in zip((student, teacher), spans, strict=True)
        ]

    def held(self, side: int) -> Tensor:
        """int64 [m]: the categories of which this rank has parts, ascending; side 0 is the student."""
        return self._ways[side].held

    def crossing(self, side: int) -> int:
        """How many categories of a side cross."""
        return self._ways[side].crossing

    def numbered(self, side: int, categories: Tensor) -> Tensor:
        """int64: the places of categories in `held`, which has them."""
        return torch.searchsorted(self.held(side), categories)

    def totals(self, side: int, values: Tensor) -> Tensor:
        """[K, n]: the sums over the ranks of values [K, m] of `held`, for `mine`; 0 where there is none."""
        way = self._ways[side]
        cross = way.ranks.shared(way.ranks.summed(self._sent(way, values, 0.0)))
        return torch.cat([values, cross, values.new_zeros(len(values), 1)], 1).index_select(1, way.source)

    def log_totals(self, side: int, values: Tensor) -> Tensor:
        """As `totals`, of logarithms: -inf where there is none."""
        way = self._ways[side]
        sent = self._sent(way, values, -torch.inf)
        top = way.ranks.largest(sent)
        top = top.masked_fill(top.isinf(), 0)
        mass = way.ranks.shared(way.ranks.summed((sent - top).exp()))
        cross = (mass.masked_fill(mass == 0, 1).log() + top).masked_fill(mass == 0, -torch.inf)
        return torch.cat([values, cross, values.new_full((len(values), 1), -torch.inf)], 1).index_select(1, way.source)

    def _sent(self, way: _Way, values: Tensor, none: float) -> Tensor:
        empty = values.new_full((len(values), way.crossing), none)
        return empty.index_copy(1, way.place, values.index_select(1, way.sent))

    def at(self, values: Tensor, category: Tensor) -> Tensor:
        """[K]: of values [K, n] of `mine` that of category[k], from whichever rank compares it; without a gradient."""
        place = torch.full((self.count,), -1, dtype=torch.int64, device=category.device)
        place[self.mine] = torch.arange(len(self.mine), device=category.device)
        place = place[category]
        if values.shape[1] == 0:
            return self.ranks.total(values.new_zeros(len(values)))
        found = values.gather(1, place.clamp_min(0)[:, None])[:, 0]
        return self.ranks.total(torch.where(place >= 0, found, 0.0))


def _span(count: int, side: Parts, size: int) -> tuple[Tensor, Tensor]:
    """int64 [count] twice: the lowest and the highest rank with parts; (size, -1) where there are none."""
    none = side.rank.new_full((count,), -1)
    low = (none + size + 1).scatter_reduce(0, side.category, side.rank, "amin")
    return low, none.scatter_reduce(0, side.category, side.rank, "amax")


def _way(count: int, side: Parts, span: tuple[Tensor, Tensor], owner: Tensor, mine: Tensor) -> _Way:
    ranks, (low, high) = side.ranks, span
    held = side.category[side.rank == ranks.rank].unique()
    is_crossing = (high >= 0) & ((low != owner) | (high != owner)) & (ranks.size > 1)
    crossing = int(is_crossing.sum())
    place = is_crossing.cumsum(0) - 1
    sent = is_crossing[held].nonzero()[:, 0]
    source = torch.full((count,), len(held) + crossing, dtype=torch.int64, device=held.device)
    source[held] = torch.arange(len(held), device=held.device)
    source = torch.where(is_crossing, len(held) + place, source)[mine]
    return _Way(ranks, held, sent, place[held[sent]], crossing, source)
