"""P-KL: the projected KL divergence."""

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
    check_projection,
    check_temperature,
    chunk_losses,
    reduce,
    vocabulary_columns,
)
from xtoken.reference import Chunks, Entries

MERGES = ("first", "mean", "chain")
SUPPORTS = ("all", "reachable")


@dataclass(frozen=True)
class PklOptions:
    """The column set [C] (teacher ids, ascending), the indices [E] of W's entries in it, and the switches."""

    operation: ClassVar[str] = "pkl"
    columns: Tensor
    entry_student: Tensor
    entry_column: Tensor
    temperature: float
    merge: str
    reverse: bool

    def reference(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None) -> Tensor:
        """See `xtoken.reference.pkl`."""
        if weight is None:
            raise ValueError("weight: P-KL needs the weights of W")
        return reference.pkl(
            student,
            teacher,
            chunks,
            Entries(self.entry_student, self.entry_column, weight),
            self.columns,
            temperature=self.temperature,
            merge=self.merge,
            reverse=self.reverse,
        )


def pkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alignment: Alignment,
    projection: Any,
    *,
    temperature: float = 1.0,
    top_k: int | None = 8192,
    merge: str = "first",
    reverse: bool = False,
    reduction: str = "mean",
    support: str = "all",
    columns: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Projected KL: KL(teacher || W^T student) on the teacher's columns C, for each chunk of aligned text.

    The formulas are those of `xtoken.reference.pkl`. Forward computes the gradient at once, in the student
    logits' type and size; other temporaries are bounded by a block of chunks. Backward only scales it. The
    teacher's logits get no gradient. Second derivatives raise RuntimeError.

    Parameters
    ----------
    student_logits : float16, bfloat16, float32 or float64 [B, T_s, >= V_student], or [T_s, >= V_student]
        Row ``t`` predicts token ``t + 1``. Columns beyond the vocabulary take no part and get zero gradient.
    teacher_logits : floating [B, T_t, >= V_teacher], or [T_t, >= V_teacher]
        On the same device.
    alignment : Alignment
        Of the same batch. Chunks without a predictor on either side are left out.
    projection : ProjectionMatrix
        W [V_student, V_teacher]; or any object with ``row_ptr``, ``col``, ``weight`` and ``shape``. If
        ``weight`` requires a gradient, it gets one (and backward then computes the gradients itself, in a
        second pass).
    temperature : float
        Divides all logits; the loss is multiplied by its square.
    top_k : int or None
        C is the ``top_k`` teacher columns with the largest logit in any row of ``teacher_logits`` (lower ids
        first among equals). None: all.
    merge : "first", "mean" or "chain"
        Chunks of several tokens: first predictor rows; mean over the rows; or "first" multiplied by the
        probabilities of the realised later tokens (needs the alignment's ids).
    reverse : bool
        KL(W^T student || teacher).
    reduction : "mean", "sum" or "none"
        "mean" is over the chunks used; no chunk gives 0. "none" gives the losses of all chunks of the
        alignment [K], 0 where a chunk has no predictor.
    support : "all" or "reachable"
        "reachable" removes from C the columns that no student token reaches under W.
    columns : int64 [C], optional
        Teacher ids, distinct; replaces ``top_k``.
    backend : "auto", "reference", ...
        See `select_backend`.

    Returns
    -------
    Tensor
        Scalar, or [K] for ``reduction="none"``; float32, or float64 if an input is. Deterministic on the CPU;
        on CUDA the reference backend adds with atomics.

    Raises
    ------
    ValueError, TypeError
        For shapes, types or options that do not fit; the message names the argument.
    RuntimeError
        If the backend cannot do it.

    Source: X-Token (arXiv 2605.21699); ``merge="mean"`` follows NVIDIA NeMo-RL.

    Examples
    --------
    >>> import torch, xtoken
    >>> W = xtoken.ProjectionMatrix.from_topk([[0], [1], [2]], [[1.0], [1.0], [1.0]], teacher_vocab_size=3)
    >>> same = xtoken.Alignment([[1, 2, 1, 2], [2, 3, 2, 3]])
    >>> student = torch.zeros(3, 3, requires_grad=True)
    >>> loss = xtoken.pkl_loss(student, torch.zeros(3, 3), same, W)
    >>> f"{loss.item():.4f}"
    '0.0000'
    """
    check_logits(student_logits, teacher_logits)
    check_projection(projection)
    check_temperature(temperature)
    check_choice(merge, "merge", MERGES)
    check_choice(reduction, "reduction", REDUCTIONS)
    student = vocabulary_columns(student_logits, projection.shape[0], "student_logits")
    teacher = vocabulary_columns(teacher_logits, projection.shape[1], "teacher_logits")
    chunks = aligned_chunks(alignment, student, teacher, realised=merge == "chain")
    if merge == "first":
        chunks = chunks.first()
    if merge == "chain":
        _check_realised(chunks, projection.shape)
    columns = select_columns(teacher, projection, top_k=top_k, support=support, columns=columns)
    entries = reference.restrict(projection, columns)
    options = PklOptions(columns, entries.student, entries.column, float(temperature), merge, bool(reverse))
    problem = Problem(student, teacher, chunks, options, entries.weight.detach())
    losses = chunk_losses(student_logits, problem, entries.weight, backend)
    return reduce(losses, chunks, alignment.num_chunks, reduction)


def select_columns(
    teacher_logits: Tensor,
    projection: Any,
    *,
    top_k: int | None = 8192,
    support: str = "all",
    columns: Tensor | None = None,
) -> Tensor:
    """The column set C that `pkl_loss` uses with the same arguments: int64 [C], ascending."""
    check_count(top_k, "top_k", optional=True)
    check_choice(support, "support", SUPPORTS)
    width = projection.shape[1]
    if columns is None:
        columns = reference.column_set(vocabulary_columns(teacher_logits, width, "teacher_logits"), top_k)
    else:
        columns = _checked_columns(columns, width).to(teacher_logits.device)
    if support == "reachable":
        reachable = torch.zeros(width, dtype=torch.bool, device=columns.device)
        reachable[projection.col.to(columns.device).long()] = True
        columns = columns[reachable[columns]]
        if columns.numel() == 0:
            raise ValueError("support: expected a column that the projection reaches, got none; use support='all'")
    return columns


def _checked_columns(given: Any, width: int) -> Tensor:
    ids = torch.as_tensor(given)
    if ids.dim() != 1 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"columns: expected teacher ids [C], got {ids.dtype} of shape {list(ids.shape)}")
    ordered: Tensor = ids.long().sort().values
    low, high = int(ordered[0]), int(ordered[-1])
    if low < 0 or high >= width:
        raise ValueError(f"columns: expected ids in 0 ... {width - 1}, got {low if low < 0 else high}")
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise ValueError("columns: expected distinct ids, got one twice")
    return ordered


def _check_realised(chunks: Chunks, shape: tuple[int, int]) -> None:
    for name, rows, size in (("student", chunks.student, shape[0]), ("teacher", chunks.teacher, shape[1])):
        if rows.next_ids is None:
            continue
        ids = rows.next_ids[rows.later()[0]]
        bad = (ids < 0) | (ids >= size)
        if bool(bad.any()):
            raise ValueError(
                f"alignment: expected {name}_ids in 0 ... {size - 1} within chunks, got {int(ids[bad][0])}"
            )
