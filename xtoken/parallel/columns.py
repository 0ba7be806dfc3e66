"""Which rank has which columns of a vocabulary, and how what both sides say of one thing comes to one rank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtoken.parallel.ranks import Ranks


class Columns(NamedTuple):
    """The columns of one side."""

    bounds: tuple[int, ...]  # rank r has the columns bounds[r] ... bounds[r + 1] - 1
    ranks: Ranks  # of a group; or this rank alone, which has all
    held: int | None = None  # how many there are of all ranks together, perhaps less than the size; None: not known

    @classmethod
    def of(cls, widths: Sequence[int], size: int, ranks: Ranks) -> Columns:
        """Of a vocabulary of `size`, by the columns that the ranks hold; the last has what is missing at the end."""
        ends = (min(size, end) for end in itertools.accumulate(widths[:-1]))
        return cls((0, *ends, size), ranks)

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

    @property
    def width(self) -> int:
        """How many columns are here."""
        return self.last - self.first

    def rank_of(self, ids: Tensor) -> Tensor:
        """int64, like ids: the rank that has each."""
        return torch.searchsorted(torch.tensor(self.bounds[1:], device=ids.device), ids, right=True)

    def here(self, ids: Tensor) -> Tensor:
        """int64: the places of those of the ids [n] that this rank has."""
        return ((ids >= self.first) & (ids < self.last)).nonzero()[:, 0]

    def picked(self, values: Tensor, ids: Tensor) -> Tensor:
        """[n]: of rows [n, columns here] the value in column ids[n], from whichever rank has it; used alike by all."""
        here = self.here(ids)
        found = values[here].gather(1, ids[here, None] - self.first)[:, 0]
        return self.ranks.summed(values.new_zeros(len(ids)).index_copy(0, here, found))


def as_slice(index: Tensor) -> Tensor | slice:
    """Numbers int64 [n]; if each follows the one before, as a range, which takes no copy to choose."""
    if len(index) and bool((index.diff() == 1).all()):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def chosen(values: Tensor, index: Tensor | slice) -> Tensor:
    """Columns of values [n, m] by their numbers, which are distinct."""
    if isinstance(index, slice):
        return values if index == slice(0, values.shape[1]) else values[:, index]
    found: Tensor = _Chosen.apply(values, index)
    return found


class _Chosen(torch.autograd.Function):
    """index_select, whose backward adds column by column, as if they were not distinct."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.size = values.shape[1]
        ctx.save_for_backward(index)
        return values.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return upstream.new_zeros(len(upstream), ctx.size).index_copy_(1, index, upstream), None


class Parts(NamedTuple):
    """What of some categories (columns, pairs, events) the ranks have: parts of category[e] on rank[e]."""

    category: Tensor  # int64 [E]
    rank: Tensor  # int64 [E]
    ranks: Ranks


class _Way(NamedTuple):
    """Of one side: which of its values this rank compares itself, and which come from or go to other ranks."""

    ranks: Ranks
    held: Tensor  # int64 [m]: the categories of which this rank has parts, ascending
    own: tuple[Tensor, Tensor]  # int64 twice: places in `held` of those that it compares, and in `mine`
    sent: Tensor  # int64: places in `held` of the others, by the ranks that compare them
    received: Tensor  # int64: places in `mine` of what comes from others, by the ranks that it comes from
    sends: list[int]  # how many go to each rank
    receives: list[int]
    crossing: int  # how many parts go from one rank to another, of all ranks


class Meeting:
    """Which rank compares which category, and the way of both sides' values to it.

    A category is compared where the teacher has it, or if every rank has the teacher's, where the student has it; of
    several ranks on the first. Parts that others have go to it alone.
    """

    def __init__(self, count: int, student: Parts, teacher: Parts) -> None:
        ranks = student.ranks
        firsts = [_first_rank(count, side) for side in (student, teacher)]
        owner = torch.arange(count, device=student.category.device) % ranks.size
        owner = torch.where(firsts[0] < ranks.size, firsts[0], owner)
        if teacher.ranks.size > 1:
            owner = torch.where(firsts[1] < ranks.size, firsts[1], owner)
        self.count, self.ranks = count, ranks
        self.mine = (owner == ranks.rank).nonzero()[:, 0]
        """int64 [n]: the categories that this rank compares, ascending."""
        self._ways = [_way(count, side, owner, self.mine, ranks.rank) for side in (student, teacher)]

    def held(self, side: int) -> Tensor:
        """int64 [m]: the categories of which this rank has parts, ascending; side 0 is the student."""
        return self._ways[side].held

    @property
    def exchanged(self) -> int:
        """How many numbers this rank sends for a chunk: twice forward, and once backward for the student."""
        student, teacher = self._ways
        return 2 * len(student.sent) + len(student.received) + 2 * len(teacher.sent)

    def numbered(self, side: int, categories: Tensor) -> Tensor:
        """int64: the places of categories in `held`, which has them."""
        return torch.searchsorted(self.held(side), categories)

    def totals(self, side: int, values: Tensor) -> Tensor:
        """[K, n]: the sums over the ranks of values [K, m] of `held`, for `mine`; 0 where there is none."""
        own, received = self._met(side, values, 0.0)
        return own if received is None else own.index_add(1, self._ways[side].received, received)

    def log_totals(self, side: int, values: Tensor) -> Tensor:
        """As `totals`, of logarithms: -inf where there is none."""
        own, received = self._met(side, values, -torch.inf)
        if received is None:
            return own
        place = self._ways[side].received
        top = own.detach().scatter_reduce(1, place.expand(len(own), -1), received.detach(), "amax")
        top = top.masked_fill(top.isinf(), 0)
        mass = (own - top).exp().index_add(1, place, (received - top.index_select(1, place)).exp())
        return (mass.masked_fill(mass == 0, 1).log() + top).masked_fill(mass == 0, -torch.inf)

    def _met(self, side: int, values: Tensor, none: float) -> tuple[Tensor, Tensor | None]:
        """Of `mine` what this rank has [K, n], and what others send [K, r], None if nothing crosses on any rank."""
        way = self._ways[side]
        if not way.crossing and len(way.own[0]) == len(way.held) == len(self.mine):  # the same ones
            return values, None
        own = values.new_full((len(values), len(self.mine)), none)
        own = own.index_copy(1, way.own[1], chosen(values, way.own[0]))
        if not way.crossing:
            return own, None
        return own, way.ranks.exchanged(values.index_select(1, way.sent).t(), way.sends, way.receives).t()

    def at(self, values: Tensor, category: Tensor) -> Tensor:
        """[K]: of values [K, n] of `mine` that of category[k], from whichever rank compares it; without a gradient."""
        place = _places(self.count, self.mine)[category]
        if values.shape[1] == 0:
            return self.ranks.total(values.new_zeros(len(values)))
        found = values.gather(1, place.clamp_min(0)[:, None])[:, 0]
        return self.ranks.total(torch.where(place >= 0, found, 0.0))


def _places(count: int, chosen: Tensor) -> Tensor:
    """int64 [count]: the place of each number among the chosen ones, -1 where it is none."""
    place = torch.full((count,), -1, dtype=torch.int64, device=chosen.device)
    place[chosen] = torch.arange(len(chosen), device=chosen.device)
    return place


def _first_rank(count: int, side: Parts) -> Tensor:
    """int64 [count]: the lowest rank with a part; a number beyond all ranks where there is none."""
    none = torch.full((count,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=side.category.device)
    return none.scatter_reduce(0, side.category, side.rank, "amin")


def _way(count: int, side: Parts, owner: Tensor, mine: Tensor, me: int) -> _Way:
    ranks = side.ranks
    if ranks.size == 1:  # it has everything
        held, is_own = side.category.unique(), owner[side.category.unique()] == me
        none = held[:0]
        own = is_own.nonzero()[:, 0], _places(count, mine)[held[is_own]]
        return _Way(ranks, held, own, none, none, [], [], 0)
    parts = (side.rank * count + side.category).unique()
    rank, category = parts // count, parts % count
    to = owner[category]
    held = category[rank == me]
    place, place_of_mine = _places(count, held), _places(count, mine)
    is_sent, is_received = (rank == me) & (to != me), (rank != me) & (to == me)
    order = to[is_sent].argsort(stable=True)
    is_own = (rank == me) & (to == me)
    return _Way(
        ranks,
        held,
        (place[category[is_own]], place_of_mine[category[is_own]]),
        place[category[is_sent][order]],
        place_of_mine[category[is_received]],
        torch.bincount(to[is_sent], minlength=ranks.size).tolist(),
        torch.bincount(rank[is_received], minlength=ranks.size).tolist(),
        int((rank != to).sum()),
    )
