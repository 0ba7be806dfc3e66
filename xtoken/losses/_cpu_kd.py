"""Same-tokenizer KL, cross-entropy and column sets of the backend "cpu": hands tensors to csrc/cpu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtoken import _core, reference
from xtoken.losses import _backends
from xtoken.losses._backends import Labels, Problem
from xtoken.losses._cpu_arguments import ELEMENTS, ChunkArguments, LabelBuffers, logits_argument, unit_stride


def run_kd(
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    *labels: Labels,
    level: str = "",
) -> Tensor:
    """KL for one shared tokenizer; writes every element of `student_grad`.

    Needs no scratch memory for all columns, and 8 bytes a column and thread for a subset.
    """
    options: Any = problem.options
    chunks = ChunkArguments(problem, student_grad, scale)
    buffers = LabelBuffers(*labels)
    _core.cpu_kd(
        *chunks.argument,
        buffers.argument,
        options.temperature,
        options.reverse,
        reference.LOWEST_LOGIT,
        None if options.columns is None else options.columns.to(torch.int32).numpy(),
        level,
        torch.get_num_threads(),
    )
    buffers.finish()
    return chunks.losses()


def run_cross_entropy(
    student: Tensor,
    labels: Labels,
    student_grad: Tensor | None = None,
    factor: Tensor | None = None,
    *,
    level: str = "",
) -> None:
    """See `CrossEntropy`; logits of types that the kernels do not take are left to plain PyTorch."""
    if student.dtype not in ELEMENTS:
        return _backends.run_cross_entropy(student, labels, student_grad, factor)
    if student_grad is not None and factor is not None and float(factor) != 1.0:
        student_grad.mul_(factor)
    student = unit_stride(student)
    buffers = LabelBuffers(labels)
    _core.cpu_cross_entropy(
        logits_argument(student),
        logits_argument(student_grad),
        buffers.argument,
        reference.LOWEST_LOGIT,
        level,
        torch.get_num_threads(),
    )
    return buffers.finish()


def column_set(logits: Tensor, top_k: int | None, *, level: str = "") -> Tensor:
    """`xtoken.reference.column_set` for logits [B, T, V], without a sort."""
    width = logits.shape[-1]
    if top_k is None or top_k >= width or logits.numel() == 0 or logits.dtype not in ELEMENTS:
        return reference.column_set(logits, top_k)
    logits = unit_stride(logits.detach())
    ids = torch.empty(top_k, dtype=torch.int64)
    _core.cpu_largest_columns(logits_argument(logits), top_k, ids.data_ptr(), level, torch.get_num_threads())
    return ids
