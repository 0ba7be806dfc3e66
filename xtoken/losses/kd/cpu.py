"""Same-tokenizer KL, cross-entropy and column sets of the backend "cpu": hands tensors to csrc/cpu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtoken import _core
from xtoken.losses import numerics
from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cpu import ChunkArguments, LabelBuffers


def run(
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
    *,
    level: str = "",
) -> Tensor:
    """KL for one shared tokenizer; writes every element of `student_grad`.

    Needs no scratch memory for all columns, and 8 bytes a column and thread for a subset.
    """
    options: Any = problem.options
    chunks = ChunkArguments(problem, student_grad, scale)
    buffers = LabelBuffers(labels)
    _core.cpu_kd(
        *chunks.argument,
        buffers.argument,
        options.temperature,
        options.reverse,
        numerics.LOWEST_LOGIT,
        None if options.columns is None else options.columns.to(torch.int32).numpy(),
        level,
        torch.get_num_threads(),
    )
    buffers.finish()
    return chunks.losses()
