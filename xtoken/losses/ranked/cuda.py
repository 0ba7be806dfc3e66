"""What GOLD, H-KL and ULD of the backend "cuda" need beside their kernels: the pairs' layout, and the sorted L1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xtoken.alignment import Rows, synchronized
from xtoken.losses import numerics
from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cuda import (
    Kernels,
    Memory,
    floats_argument,
    gradient_argument,
    labels_argument,
    logits_argument,
    rows_argument,
)
from xtoken.losses.numerics import sorted_l1
from xtoken.losses.ranked import PreparedRanked

SORTED_ELEMENTS = 2**23
"""Probabilities outside the pairs that are sorted at a time; temporaries take about 50 bytes for each."""


@dataclass(frozen=True)
class GoldPlan:
    """Common pairs and the ids outside, int32; see csrc/cuda/gold.h."""

    student_pair: Tensor
    teacher_pair: Tensor
    student_others: Tensor
    teacher_others: Tensor
    slot: Tensor


_PLANS = WeakTensorKeyDictionary()


def gold_plan_for(student_ids: Tensor, teacher_ids: Tensor, shape: tuple[int, int]) -> GoldPlan:
    """The layout of common pairs; kept for as long as the tensor `student_ids` lives. The first call waits for it."""
    kept = _PLANS.get(student_ids)
    if kept is None or kept[0] is not teacher_ids or kept[1] != shape:
        others = []
        for ids, size in zip((student_ids, teacher_ids), shape, strict=True):
            outside = torch.ones(size, dtype=torch.bool, device=ids.device)
            outside[ids] = False
            others.append(outside.nonzero()[:, 0].to(torch.int32))
        slot = torch.empty(shape[0], dtype=torch.int32, device=student_ids.device)
        slot[student_ids] = teacher_ids.to(torch.int32)
        slot[others[0].long()] = -1 - torch.arange(len(others[0]), dtype=torch.int32, device=slot.device)
        plan = GoldPlan(
            student_ids.to(torch.int32), teacher_ids.to(torch.int32), others[0], others[1], synchronized(slot)
        )
        kept = _PLANS[student_ids] = teacher_ids, shape, plan
    made: GoldPlan = kept[2]
    return made


def unpaired_plan(shape: tuple[int, int], device: torch.device) -> GoldPlan:
    """The layout without any pair, which makes GOLD's kernels those of ULD."""
    none = torch.empty(0, dtype=torch.int32, device=device)
    student, teacher = (torch.arange(size, dtype=torch.int32, device=device) for size in shape)
    return GoldPlan(none, none, student, teacher, -1 - student)


def run(
    kernels: Kernels,
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
) -> Tensor:
    """GOLD, H-KL and ULD: kernels around torch's sort, a group of chunks at a time; see `SORTED_ELEMENTS`."""
    options: Any = problem.options
    chunks, device = problem.chunks, problem.student.device
    shape = problem.student.shape[-1], problem.teacher.shape[-1]
    paired = isinstance(options, PreparedRanked)
    if paired:
        plan = gold_plan_for(options.student_ids, options.teacher_ids, shape)
    else:
        plan = unpaired_plan(shape, device)
    rest = len(plan.student_others), len(plan.teacher_others)
    compared = min(options.uncommon_top_k, *rest) if paired else max(rest)
    reverse = paired and options.reverse
    step = max(1, SORTED_ELEMENTS // max(1, sum(rest)))
    parts = []
    for first in range(0, len(chunks), step):
        last = min(len(chunks), first + step)
        count = last - first
        common = torch.empty(count, dtype=torch.float32, device=device)
        p, q = (torch.empty(count, size, dtype=torch.float32, device=device) for size in rest)
        with kernels.memory(device) as memory:
            given = _gold(kernels, memory, problem, plan, first, last)
            outputs = [memory.output(tensor) for tensor in (common, p, q)]
            kernels.module.gold_forward(
                *given[:5],
                count,
                options.temperature,
                reverse,
                numerics.LOWEST_LOGIT,
                given[5],
                *outputs,
                memory.launch,
            )
        uncommon, slope = sorted_l1(p, q, compared)
        parts.append(common + uncommon * options.temperature**2)
        if student_grad is None:
            continue
        with kernels.memory(device) as memory:
            given = _gold(kernels, memory, problem, plan, first, last)
            kernels.module.gold_backward(
                *given[:3],
                gradient_argument(memory, student_grad, keep=True),
                *given[3:5],
                count,
                floats_argument(memory, None if scale is None else scale[first:last]),
                labels_argument(memory, labels, keep=True),
                options.temperature,
                reverse,
                numerics.LOWEST_LOGIT,
                given[5],
                memory.input(slope),
                memory.launch,
            )
    if student_grad is not None:
        with kernels.memory(device) as memory:
            student, grad = logits_argument(memory, problem.student), gradient_argument(memory, student_grad, keep=True)
            rows = rows_argument(memory, chunks.student)
            others = labels_argument(memory, labels, keep=True)
            kernels.other_rows(memory, student, grad, rows, chunks.student, others)
    elif labels is not None:
        kernels.cross_entropy(problem.student, labels)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32, device=device)


def _gold(kernels: Kernels, memory: Memory, problem: Problem, plan: GoldPlan, first: int, last: int) -> tuple[Any, ...]:
    """Plan, logits, rows and workspace of a group of chunks."""
    widths = problem.student.shape[-1], problem.teacher.shape[-1]
    sides = [
        Rows(rows.start[first:last], rows.count[first:last])
        for rows in (problem.chunks.student, problem.chunks.teacher)
    ]
    pairs, rest = len(plan.student_pair), (len(plan.student_others), len(plan.teacher_others))
    return (
        (pairs, *rest, *(memory.input(tensor) for tensor in vars(plan).values())),
        logits_argument(memory, problem.student),
        logits_argument(memory, problem.teacher),
        *(rows_argument(memory, rows) for rows in sides),
        memory.output(memory.scratch((memory.launch[0], kernels.module.gold_workspace(*widths)))),
    )
