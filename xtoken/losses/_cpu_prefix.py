"""Prefix KL of the backend "cpu": hands tensors to csrc/cpu/prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xtoken import _core, reference
from xtoken.losses._backends import Labels, Problem
from xtoken.losses._cpu_arguments import ChunkArguments, LabelBuffers

_PLANS = WeakTensorKeyDictionary()


def plan_for(pieces: Tensor) -> _core.CpuPrefixPlan:
    """The layout of a piece index; kept for as long as its data lives and does not change."""
    kept = _PLANS.get(pieces)
    if kept is None or kept[0] != pieces._version:
        kept = _PLANS[pieces] = pieces._version, _core.CpuPrefixPlan(pieces.cpu().numpy())
    plan: _core.CpuPrefixPlan = kept[1]
    return plan


def run_prefix(
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    *labels: Labels,
    level: str = "",
) -> Tensor:
    """Prefix KL; writes every element of `student_grad`.

    Scratch memory is about 2 MB per thread for vocabularies of 150,000, whatever the number of rows.
    """
    options: Any = problem.options
    chunks = ChunkArguments(problem, student_grad, scale)
    buffers = LabelBuffers(*labels)
    _core.cpu_prefix(
        plan_for(options.pieces),
        *chunks.argument,
        buffers.argument,
        options.temperature,
        options.reverse,
        reference.LOWEST_LOGIT,
        level,
        torch.get_num_threads(),
    )
    buffers.finish()
    return chunks.losses()
