"""What `XTokenLoss` reports beside the losses: how far student and teacher agree, on some chunks of a call.

Nothing waits for the device, but for the first use of a W or of a piece index there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xtoken import reference
from xtoken.alignment import Chunks, synchronized
from xtoken.losses.backends import BLOCK_ELEMENTS
from xtoken.losses.logits import Source
from xtoken.losses.pkl.cuda import entries_of, plan_for
from xtoken.pieces import PieceIndex
from xtoken.projection import Entries, restrict

DIAGNOSED_CHUNKS = 256
"""Chunks of a call that its diagnostics look at, evenly spaced, so that they stay cheap beside the loss."""

NAMES = ("agreement", "mass", "outside")
"""Means over chunks; see `XTokenLoss.forward`."""


def nothing(device: torch.device) -> Tensor:
    """float32 [3]: the values of `NAMES` where there is nothing to look at."""
    return torch.full((len(NAMES),), math.nan, device=device)


def diagnose(
    student: Source, teacher: Source, chunks: Chunks, columns: Tensor, count: Tensor | None, projection: Any
) -> Tensor:
    """float32 [3]: the means of `xtoken.reference.diagnosis` over the first rows of some chunks."""
    entries = None if projection is None else _entries(projection, columns)
    return _means(student, teacher, chunks, lambda z, y: reference.diagnosis(z, y, columns, entries, count))


def diagnose_events(student: Source, teacher: Source, chunks: Chunks, pieces: PieceIndex) -> Tensor:
    """The same for prefix KL's events, which leave nothing out on either side."""
    events = _events(pieces, chunks.used.device)

    def values(z: Tensor, y: Tensor) -> Tensor:
        same = reference.event_agreement(z, y, events, pieces.events).to(torch.float32)
        return torch.stack([same, torch.ones_like(same), torch.zeros_like(same)], 1)

    return _means(student, teacher, chunks, values)


@torch.no_grad()
def _means(student: Source, teacher: Source, chunks: Chunks, values: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    count = min(DIAGNOSED_CHUNKS, len(chunks))
    if count == 0:
        return nothing(chunks.used.device)
    index, counts = _sample(chunks, count)
    rows = [side.start[index].clamp_min(0) for side in (chunks.student, chunks.teacher)]
    most = BLOCK_ELEMENTS.get(index.device.type, BLOCK_ELEMENTS["cpu"])
    step = max(1, most // (student.size + teacher.size))
    parts = [values(student.at(z), teacher.at(y)) for z, y in zip(*(one.split(step) for one in rows), strict=True)]
    total = torch.where(counts[:, None], torch.cat(parts), 0.0).sum(0)
    return (total / counts.sum()).float()


def _sample(chunks: Chunks, most: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced ones of the chunks that count: int64 [most], and which of these places are taken: bool [most]."""
    place = torch.arange(most, device=chunks.used.device)
    if chunks.mask is None:
        return place * len(chunks) // most, torch.ones_like(place, dtype=torch.bool)
    before = chunks.mask.cumsum(0)
    taken = before[-1].clamp_max(most)
    wanted = place * before[-1] // taken.clamp_min(1)
    return torch.searchsorted(before, wanted + 1).clamp_max(len(chunks) - 1), place < taken


def _entries(projection: Any, columns: Tensor) -> Entries:
    """As `xtoken.projection.restrict`, for a device without asking how many there are: some may have no weight."""
    if columns.device.type == "cpu":
        return restrict(projection, columns)
    plan = plan_for(projection, columns, projection.weight.requires_grad)
    entries = entries_of(plan, columns)
    weight = torch.cat([plan.weight, plan.weight.new_zeros(1)])[entries.index]
    return Entries(entries.row, entries.column.clamp_max(len(columns) - 1), weight)


_EVENTS: Any = WeakIdKeyDictionary()
"""By the data of a piece index: {device: the events of both sides' tokens}."""


def _events(pieces: PieceIndex, device: torch.device) -> tuple[Tensor, Tensor]:
    kept: dict[torch.device, tuple[Tensor, Tensor]] = _EVENTS.setdefault(pieces.data, {})
    if device not in kept:
        student, teacher = (synchronized(side.event.to(device).long()) for side in (pieces.student, pieces.teacher))
        kept[device] = student, teacher
    return kept[device]
