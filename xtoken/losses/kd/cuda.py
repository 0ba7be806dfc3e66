"""Same-tokenizer KL of the backend "cuda": hands tensors to csrc/cuda/kd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtoken.losses import numerics
from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cuda import (
    Kernels,
    floats_argument,
    gradient_argument,
    labels_argument,
    logits_argument,
    rows_argument,
)

TAKES_MASK = True


def run(
    kernels: Kernels,
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
) -> Tensor:
    """KL for one shared tokenizer."""
    options: Any = problem.options
    chunks, device = problem.chunks, problem.student.device
    losses = torch.empty(len(chunks), dtype=torch.float32, device=device)
    columns, place = options.columns, None
    width = problem.student.shape[-1]
    if columns is not None:
        place = torch.full((width,), -1, dtype=torch.int32, device=device)
        place[columns] = torch.arange(len(columns), dtype=torch.int32, device=device)
    with kernels.memory(device) as memory:
        student, grad = logits_argument(memory, problem.student), gradient_argument(memory, student_grad)
        student_rows = rows_argument(memory, chunks.student)
        label_arguments = labels_argument(memory, labels)
        kernels.module.kd(
            student,
            logits_argument(memory, problem.teacher),
            grad,
            student_rows[0],
            rows_argument(memory, chunks.teacher)[0],
            len(chunks),
            memory.input(None if columns is None else columns.to(torch.int32)),
            memory.input(place),
            width if columns is None else len(columns),
            floats_argument(memory, scale),
            memory.output(losses),
            label_arguments,
            options.temperature,
            options.reverse,
            numerics.LOWEST_LOGIT,
            memory.launch,
        )
        if student_grad is not None or labels is not None:
            kernels.other_rows(memory, student, grad, student_rows, chunks.student, label_arguments)
    return losses
