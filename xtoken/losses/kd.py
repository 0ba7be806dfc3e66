"""The KL divergence for a teacher that shares the student's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from xtoken import reference
from xtoken.alignment import Alignment
from xtoken.losses._backends import Problem
from xtoken.losses._common import (
    REDUCTIONS,
    aligned_chunks,
    check_choice,
    check_count,
    check_logits,
    check_temperature,
    chunk_losses,
    reduce,
    vocabulary_columns,
)
from xtoken.reference import Chunks, Rows


@dataclass(frozen=True)
class KdOptions:
    """The column set [C], or None for all, and the switches."""

    operation: ClassVar[str] = "kd"
    columns: Tensor | None
    temperature: float
    reverse: bool

    def reference(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None) -> Tensor:
        """See `xtoken.reference.kd`."""
        return reference.kd(student, teacher, chunks, self.columns, temperature=self.temperature, reverse=self.reverse)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alignment: Alignment | None = None,
    *,
    mask: Any = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    reverse: bool = False,
    reduction: str = "mean",
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(teacher || student) at each position, for one shared tokenizer.

    The formula is that of `xtoken.reference.kd`. Arguments, results, errors, gradients and memory are as for
    `pkl_loss`, except:

    Parameters
    ----------
    alignment : Alignment, optional
        Chunks of one token on each side. Default: both models read the same tokens at the same positions.
    mask : bool [B, T] or [T], optional
        Without an alignment: the rows to use (row ``t`` predicts token ``t + 1``). Default: all.
    top_k : int or None
        Columns with the teacher's largest logits, chosen as in `pkl_loss`; both sides are normalised over
        them. None: all columns.
    vocab_size : int, optional
        Columns that belong to tokens. Default: the smaller of the two widths (models of one family often pad
        their output layers differently).

    Returns
    -------
    Tensor
        Scalar; for ``reduction="none"`` [K], or [B, T] (or [T]) without an alignment, 0 at rows not used.

    Source: Distilling the Knowledge in a Neural Network (arXiv 1503.02531).
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    check_count(top_k, "top_k", optional=True)
    check_count(vocab_size, "vocab_size", optional=True)
    check_choice(reduction, "reduction", REDUCTIONS)
    if vocab_size is None:
        vocab_size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student = vocabulary_columns(student_logits, vocab_size, "student_logits")
    teacher = vocabulary_columns(teacher_logits, vocab_size, "teacher_logits")
    if alignment is None:
        chunks = position_chunks(student_logits, teacher_logits, mask)
    elif mask is not None:
        raise ValueError("mask: expected None together with an alignment, which already names the positions")
    else:
        chunks = aligned_chunks(alignment, student, teacher)
        _check_single(chunks)
    columns = None if top_k is None or top_k >= vocab_size else reference.column_set(teacher, top_k)
    options = KdOptions(columns, float(temperature), bool(reverse))
    losses = chunk_losses(student_logits, Problem(student, teacher, chunks, options), None, backend)
    if alignment is not None:
        return reduce(losses, chunks, alignment.num_chunks, reduction)
    shape = student_logits.shape[:-1]
    loss = reduce(losses, chunks, shape.numel(), reduction)
    return loss.view(shape) if reduction == "none" else loss


def position_chunks(student_logits: Tensor, teacher_logits: Tensor, mask: Any = None) -> Chunks:
    """One chunk for each position that `mask` names, the same on both sides."""
    shape = student_logits.shape[:-1]
    if teacher_logits.shape[:-1] != shape:
        raise ValueError(
            f"teacher_logits: expected the positions of student_logits {list(shape)}, got "
            f"{list(teacher_logits.shape[:-1])}; pass an alignment if they differ"
        )
    if mask is None:
        used = torch.arange(shape.numel(), device=student_logits.device)
    else:
        mask = torch.as_tensor(mask, device=student_logits.device)
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(f"mask: expected bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
        used = mask.flatten().nonzero()[:, 0]
    rows = Rows(used, torch.ones_like(used))
    return Chunks(rows, rows, used)


def _check_single(chunks: Chunks) -> None:
    bad = (chunks.student.count > 1) | (chunks.teacher.count > 1)
    if bool(bad.any()):
        k = int(bad.nonzero()[0])
        raise ValueError(
            f"alignment: expected chunks of one token on each side (a shared tokenizer), got chunk "
            f"{int(chunks.used[k])} with {int(chunks.student.count[k])} and {int(chunks.teacher.count[k])}"
        )
