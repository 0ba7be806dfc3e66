"""GOLD, H-KL and ULD of the backend "cpu": hands tensors to csrc/cpu/gold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xtoken import _core, reference
from xtoken.losses._backends import Problem
from xtoken.losses._cpu_arguments import logits_argument, rows_argument, unit_stride

_PLANS = WeakTensorKeyDictionary()


def plan_for(student_ids: Tensor, teacher_ids: Tensor, shape: tuple[int, int]) -> _core.CpuGoldPlan:
    """The layouts of common pairs; kept for as long as the tensor `student_ids` lives."""
    kept = _PLANS.get(student_ids)
    if kept is None or kept[0] is not teacher_ids or kept[1] != shape:
        kept = teacher_ids, shape, _core.CpuGoldPlan(student_ids.numpy(), teacher_ids.numpy(), *shape)
        _PLANS[student_ids] = kept
    plan: _core.CpuGoldPlan = kept[2]
    return plan


def run_gold(
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    level: str = "",
) -> Tensor:
    """GOLD, H-KL or ULD, by the problem's options; writes every element of `student_grad`.

    Scratch memory is about 3 MB per thread (ULD: 9 MB) for vocabularies of 150,000, whatever the number of rows.
    """
    options: Any = problem.options
    student, teacher = unit_stride(problem.student), unit_stride(problem.teacher)
    paired = options.operation == "gold"
    shape = student.shape[-1], teacher.shape[-1]
    (student_start, student_count, _), kept_student = rows_argument(problem.chunks.student)
    (teacher_start, teacher_count, _), kept_teacher = rows_argument(problem.chunks.teacher)
    factors = None if scale is None else scale.detach().double().contiguous()
    losses = torch.empty(len(problem.chunks), dtype=torch.float64)
    _core.cpu_gold(
        plan_for(options.student_ids, options.teacher_ids, shape) if paired else None,
        logits_argument(student),
        logits_argument(teacher),
        logits_argument(student_grad),
        (student_start, student_count, 0),
        (teacher_start, teacher_count, 0),
        len(problem.chunks),
        0 if factors is None else factors.data_ptr(),
        losses.data_ptr(),
        options.temperature,
        paired and options.reverse,
        options.uncommon_top_k if paired else 0,
        reference.LOWEST_LOGIT,
        level,
        torch.get_num_threads(),
    )
    del kept_student, kept_teacher
    return losses.float()
