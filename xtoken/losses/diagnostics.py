"""What `XTokenLoss` reports beside the losses: how well student and teacher agree, on some chunks of a call.

Nothing waits for the device, but for the first use of a W or of a piece index there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks
from xtoken.losses.columns import entries_in, select_columns
from xtoken.losses.logits import Source
from xtoken.losses.numerics import scaled, statistics_dtype, temporary_elements
from xtoken.projection.entries import Entries, project

DIAGNOSED_CHUNKS = 256
"""Chunks of a call that its diagnostics look at, evenly spaced, so that they stay cheap beside the loss."""

NAMES = ("agreement", "mass", "outside", "flat", "left_out")
"""Means over chunks; see `XTokenLoss.forward`."""


def nothing(device: torch.device) -> Tensor:
    """float32 [5]: the values of `NAMES` where there is nothing to look at."""
    return torch.full((len(NAMES),), math.nan, dtype=torch.float32, device=device)


def by_projection(
    student: Source,
    teacher: Source,
    chunks: Chunks,
    projection: Any,
    device: torch.device,
    backend: str,
    left_out: Tensor | None = None,
) -> Tensor:
    """float32 [5]: `in_columns` of the teacher's largest columns; nan without a projection."""
    if projection is None:
        return nothing(device)
    columns = select_columns(teacher, projection.shape[1], device=device, backend=backend)
    return in_columns(student, teacher, chunks, columns, projection, None, left_out)


def in_columns(
    student: Source,
    teacher: Source,
    chunks: Chunks,
    columns: Tensor,
    projection: Any = None,
    count: Tensor | None = None,
    left_out: Tensor | None = None,
) -> Tensor:
    """float32 [5]: the means of `diagnosis` over the first rows of some chunks; `projection` None: one tokenizer.

    `left_out` as for `means`.
    """
    entries = None if projection is None else entries_in(projection, columns)
    width = 0 if entries is None else len(entries.weight)
    return means(student, teacher, chunks, lambda z, y: diagnosis(z, y, columns, entries, count), width, left_out)


@torch.no_grad()
def means(
    student: Source,
    teacher: Source,
    chunks: Chunks,
    values: Callable[[Tensor, Tensor], Tensor],
    width: int = 0,
    left_out: Tensor | None = None,
) -> Tensor:
    """float32 [5]: the means of ``values(student rows, teacher rows)`` [n, 4] over the first rows of some chunks, and
    the share of all chunks that are `left_out`: bool [K], default none.

    `width` elements a row are what `values` needs beside the logits.
    """
    count = min(DIAGNOSED_CHUNKS, len(chunks))
    if count == 0:
        return nothing(chunks.used.device)
    index, counts = _sample(chunks, count)
    rows = [side.start[index].clamp_min(0) for side in (chunks.student, chunks.teacher)]
    step = max(1, temporary_elements(index.device) // (student.size + teacher.size + width))
    parts = [values(student.at(z), teacher.at(y)) for z, y in zip(*(one.split(step) for one in rows), strict=True)]
    total = torch.where(counts[:, None], torch.cat(parts), 0.0).sum(0)
    result = (total / counts.sum()).float()
    if left_out is None:
        return torch.nn.functional.pad(result, (0, 1))
    if chunks.mask is not None:
        left_out = left_out & chunks.mask
    return torch.cat([result, (left_out.sum() / chunks.number)[None].float()])


def _sample(chunks: Chunks, most: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced ones of the chunks that count: int64 [most], and which of these places are taken: bool [most]."""
    place = torch.arange(most, device=chunks.used.device)
    if chunks.mask is None:
        return place * len(chunks) // most, torch.ones_like(place, dtype=torch.bool)
    before = chunks.mask.cumsum(0)
    taken = before[-1].clamp_max(most)
    wanted = place * before[-1] // taken.clamp_min(1)
    return torch.searchsorted(before, wanted + 1).clamp_max(len(chunks) - 1), place < taken


@torch.no_grad()
def diagnosis(
    student_logits: Tensor,
    teacher_logits: Tensor,
    columns: Tensor,
    entries: Entries | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """[K, 4]: how well the projected student agrees with the teacher inside the columns C, for each pair of rows.

    Whether both have the same largest column (1 or 0); the teacher's probability inside C; the student's probability
    that W sends to no column of C; whether the teacher has the same logit in all columns of C (1 or 0).

    Parameters
    ----------
    student_logits : [K, V_student]
    teacher_logits : [K, V_teacher]
    columns : int64 [C]
    entries : Entries, optional
        W in the columns. Default: the tokenizer is the same.
    count : int32 [], optional
        So many of the columns, from the first on, are C, and no entry is in the others. Default: all are.
    """
    dtype = statistics_dtype(student_logits, teacher_logits)
    student, teacher = (scaled(logits, 1.0, dtype) for logits in (student_logits, teacher_logits))
    p, q, inside = student.softmax(-1), teacher.softmax(-1), teacher.index_select(1, columns)
    x = p.index_select(1, columns) if entries is None else project(p, entries, len(columns))
    y, is_first, number = q.index_select(1, columns), inside == inside[:, :1], len(columns) if count is None else count
    if count is not None:
        is_out = torch.arange(len(columns), device=y.device) >= count
        y, is_first = y.masked_fill(is_out, 0.0), is_first | is_out
    is_flat = is_first.all(-1) & (number > 1)
    return torch.stack([(x.argmax(-1) == y.argmax(-1)).to(dtype), y.sum(-1), 1 - x.sum(-1), is_flat.to(dtype)], 1)
