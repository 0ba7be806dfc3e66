"""Which rank has which positions of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks, Rows
from xtoken.parallel.ranks import Ranks


class Positions(NamedTuple):
    """Of the positions of one side's sequences, each on one rank."""

    rank: Tensor  # int64 [T]
    place: Tensor  # int64 [T]: among the positions of that rank

    @classmethod
    def of(cls, lengths: Sequence[int], layout: str) -> Positions:
        """By the number of positions that the ranks hold.

        "contiguous": one part after the other, of any lengths. "zigzag": of 2 n equal parts rank r has r and
        2 n - 1 - r, so that causal attention costs all ranks the same.

        Raises ValueError for other lengths than equal even ones with "zigzag".
        """
        count = len(lengths)
        if layout == "contiguous" or count == 1:
            sizes = torch.tensor(lengths, device="cpu")
            rank = torch.repeat_interleave(torch.arange(count, device="cpu"), sizes)
            return cls(rank, torch.arange(len(rank), device="cpu") - (sizes.cumsum(0) - sizes)[rank])
        if len(set(lengths)) > 1 or lengths[0] % 2:
            raise ValueError(
                "cp_layout: expected the same even number of positions on every rank with 'zigzag', got "
                f"{list(lengths)}"
            )
        half = lengths[0] // 2
        part = torch.arange(2 * count, device="cpu").repeat_interleave(half)
        within = torch.arange(half, device="cpu").repeat(2 * count)
        is_first = part < count
        return cls(torch.where(is_first, part, 2 * count - 1 - part), torch.where(is_first, within, half + within))

    def rows(self, samples: int, rank: int) -> Tensor:
        """int64 [N]: of each row of all samples, one after the other, the place among those of a rank; -1 elsewhere."""
        own = int((self.rank == rank).sum())
        place = torch.where(self.rank == rank, self.place, -1)
        shift = own * torch.arange(samples, device="cpu")[:, None]
        return torch.where(place >= 0, place + shift, -1).flatten()


class Share(NamedTuple):
    """The chunks of a call, by where their rows are."""

    own: Chunks
    """All of whose rows are here, numbered among the rows here."""
    own_places: Tensor  # int64: which chunks of the call these are
    split: Chunks
    """Whose rows are on several ranks; the same on every rank, numbered as in the whole sequences."""
    split_places: Tensor


def share(chunks: Chunks, sides: tuple[Positions, Positions], samples: int, ranks: Ranks) -> Share:
    """This rank's share of chunks whose rows are numbered as in the whole sequences."""
    device = chunks.used.device
    first: Tensor | None = None
    is_split = torch.zeros(len(chunks), dtype=torch.bool, device=device)
    for rows, positions in zip((chunks.student, chunks.teacher), sides, strict=True):
        holder = positions.rank.to(device).repeat(samples)
        start = holder[rows.start]
        first = start if first is None else first
        elsewhere = (holder[rows.index()] != first[rows.owner()]).long()
        is_split |= torch.zeros_like(rows.count).index_add(0, rows.owner(), elsewhere) > 0
    assert first is not None
    own, split = ((mask.nonzero()[:, 0]) for mask in (~is_split & (first == ranks.rank), is_split))
    here = [
        _renumbered(rows.chosen(own), positions.rows(samples, ranks.rank).to(device))
        for rows, positions in zip((chunks.student, chunks.teacher), sides, strict=True)
    ]
    whole = [rows.chosen(split) for rows in (chunks.student, chunks.teacher)]
    return Share(Chunks(here[0], here[1], chunks.used[own]), own, Chunks(whole[0], whole[1], chunks.used[split]), split)


def _renumbered(rows: Rows, place: Tensor) -> Rows:
    next_ids = rows.next_ids
    if next_ids is not None:
        here = (place >= 0).nonzero()[:, 0]
        next_ids = torch.full_like(next_ids[: len(here)], -1).index_copy(0, place[here], next_ids[here])
    return Rows(place[rows.start], rows.count, next_ids, rows.before)
