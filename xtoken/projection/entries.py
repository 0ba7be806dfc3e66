"""What losses take of W: its entries in some columns, the columns, and the pairs that it makes one to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtoken import _core

EXACT_WEIGHT = 1.0
"""A row's largest weight where the teacher has the same token, and nothing else."""

DOMINANT_WEIGHT = 0.6
"""A row's largest weight where one teacher token stands for the student's well enough to be its partner."""


SAME = [_core.row_kinds.index(name) for name in ("exact", "role")]
"""Kinds of rows of tokens that both vocabularies have."""


@dataclass(frozen=True)
class Entries:
    """The entries of W whose teacher token is in the column set."""

    student: Tensor  # int64 [E], ids, ascending
    column: Tensor  # int64 [E], positions in the column set
    weight: Tensor  # floating [E]


def restrict(projection: Any, columns: Tensor) -> Entries:
    """The entries of W in columns int64 [C], on their device; differentiable with respect to ``projection.weight``.

    `projection` is a ProjectionMatrix, or anything with its ``row_ptr``, ``col``, ``weight`` and ``shape``.
    """
    device = columns.device
    position = torch.full((projection.shape[1],), -1, dtype=torch.int64, device=device)
    position[columns] = torch.arange(len(columns), device=device)
    position = position[projection.col.to(device).long()]
    kept = (position >= 0).nonzero()[:, 0]
    student = torch.searchsorted(projection.row_ptr.to(device), kept, right=True) - 1
    return Entries(student, position[kept], projection.weight.to(device)[kept])


def project(p: Tensor, entries: Entries, size: int) -> Tensor:
    """``p @ W[:, C]``: the mass p [K, V_student] of student tokens, moved to `size` teacher columns: [K, C].

    On CUDA the order of additions is not fixed (atomics).
    """
    rows = len(p)
    moved = p.gather(1, entries.student.expand(rows, -1)) * entries.weight.to(p.dtype)
    return p.new_zeros(rows, size).scatter_add(1, entries.column.expand(rows, -1), moved)


def column_set(teacher_logits: Tensor, top_k: int | None) -> Tensor:
    """The `top_k` columns with the largest maximum over all rows of logits [..., V]; lower ids first among equals.

    int64 [min(top_k, V)], ascending; all columns for None.
    """
    width = teacher_logits.shape[-1]
    size = width if top_k is None else min(top_k, width)
    if size == width or teacher_logits.numel() == 0:
        return torch.arange(size, device=teacher_logits.device)
    maxima = teacher_logits.detach().amax(dim=tuple(range(teacher_logits.dim() - 1)))
    return maxima.sort(descending=True, stable=True).indices[:size].sort().values


def common_pairs(projection: Any, min_weight: float) -> tuple[Tensor, Tensor]:
    """The pairs (student token, teacher token), int64 [P] twice, that W makes one to one; student ids ascend.

    A student token is paired with the teacher token of its row's largest weight, if that weight is at least
    ``min_weight``, such as `EXACT_WEIGHT` or `DOMINANT_WEIGHT`. Where several student tokens claim one teacher
    token, the largest weight wins, then a row of kind "exact" or "role", then the lowest student id.
    """
    weight, row_ptr, size = projection.weight.detach(), projection.row_ptr, projection.shape[0]
    student = torch.searchsorted(row_ptr, torch.arange(len(weight), device=row_ptr.device), right=True) - 1
    student, teacher, weight = _first_of_each(student, projection.col.long(), weight)
    keep = weight >= min_weight
    kind = getattr(projection, "kind", None)
    if kind is not None:  # other rows come behind
        student = student + size * ~torch.isin(kind, kind.new_tensor(SAME)).to(student.device)[student]
    teacher, student, weight = _first_of_each(teacher[keep], student[keep], weight[keep])
    student = student % size
    order = student.argsort()
    return student[order], teacher[order]


def _first_of_each(key: Tensor, other: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each key its entry of largest weight, then smallest `other`."""
    order = other.argsort(stable=True)
    order = order[weight[order].argsort(stable=True, descending=True)]
    order = order[key[order].argsort(stable=True)]
    key, other, weight = key[order], other[order], weight[order]
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    return key[first], other[first], weight[first]
