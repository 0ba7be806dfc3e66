"""GOLD, H-KL and ULD of the backend "cpu": hands tensors to csrc/cpu/gold."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from xtoken import _core
from xtoken.losses import numerics
from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cpu import ChunkArguments, Layouts
from xtoken.losses.ranked import PreparedRanked

FUSES_LABELS = False

_PLANS = Layouts[_core.CpuGoldPlan]()


def plan_for(student_ids: Tensor, teacher_ids: Tensor, shape: tuple[int, int]) -> _core.CpuGoldPlan:
    """The layouts of common pairs."""
    make = partial(_core.CpuGoldPlan, student_ids.numpy(), teacher_ids.numpy(), *shape)
    return _PLANS.of((student_ids, teacher_ids), make, shape)


def run(
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
    *,
    level: str = "",
) -> Tensor:
    """GOLD, H-KL or ULD, by the problem's options; writes every element of `student_grad`.

    Scratch memory is about 3 MB per thread (ULD: 9 MB) for vocabularies of 150,000, whatever the number of rows.
    """
    assert labels is None
    options: Any = problem.options
    chunks = ChunkArguments(problem, student_grad, scale)
    paired = isinstance(options, PreparedRanked)
    shape = problem.student.shape[-1], problem.teacher.shape[-1]
    _core.cpu_gold(
        plan_for(options.student_ids, options.teacher_ids, shape) if paired else None,
        *chunks.argument,
        options.temperature,
        paired and options.reverse,
        options.uncommon_top_k if paired else 0,
        numerics.LOWEST_LOGIT,
        level,
        torch.get_num_threads(),
    )
    return chunks.losses()
