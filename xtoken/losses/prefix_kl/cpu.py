"""Prefix KL of the backend "cpu": hands tensors to csrc/cpu/prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtoken import _core
from xtoken.losses import numerics
from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cpu import ChunkArguments, LabelBuffers, Layouts

_PLANS = Layouts[_core.CpuPrefixPlan]()


def run(
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
    *,
    level: str = "",
) -> Tensor:
    """Prefix KL; writes every element of `student_grad`.

    Scratch memory is about 2.4 MB per thread for vocabularies of 150,000, whatever the number of rows.
    """
    options: Any = problem.options
    pieces = options.pieces
    chunks = ChunkArguments(problem, student_grad, scale)
    buffers = LabelBuffers(labels)
    _core.cpu_prefix(
        _PLANS.of((pieces,), lambda: _core.CpuPrefixPlan(pieces.cpu().numpy())),
        *chunks.argument,
        buffers.argument,
        options.temperature,
        options.reverse,
        numerics.LOWEST_LOGIT,
        level,
        torch.get_num_threads(),
    )
    buffers.finish()
    return chunks.losses()
