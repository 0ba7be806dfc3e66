"""The ranked losses of the backend "cuda": csrc/losses/ranked, and around it the pairs' layout and the sorted L1."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from xtoken.alignment import Chunks, Rows, synchronized
from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cached import Cached
from xtoken.losses.cuda import Kernels, Memory, chunk_fields, label_fields
from xtoken.losses.numerics import sorted_l1
from xtoken.losses.ranked import PreparedRanked, Unpaired

SORTED_ELEMENTS = 2**23
"""Probabilities outside the pairs that are sorted at a time; temporaries take about 50 bytes for each."""


@dataclass(frozen=True)
class PairsPlan:
    """Pairs and the ids outside, int32; see csrc/losses/ranked/params.h."""

    student_pair: Tensor
    teacher_pair: Tensor
    student_others: Tensor
    teacher_others: Tensor
    slot: Tensor

    def fields(self, memory: Memory) -> dict[str, Any]:
        """A `PairsPlan` of csrc."""
        tensors = {f.name: memory.input(getattr(self, f.name)) for f in fields(self)}
        student_rest, teacher_rest = len(self.student_others), len(self.teacher_others)
        counts = {"pairs": len(self.student_pair), "student_rest": student_rest, "teacher_rest": teacher_rest}
        return {**counts, **tensors}


_PLANS = Cached[PairsPlan]()


def plan_for(student_ids: Tensor, teacher_ids: Tensor, shape: tuple[int, int]) -> PairsPlan:
    """The layout of pairs. The first call waits for the device."""

    def make() -> PairsPlan:
        others = []
        for ids, size in zip((student_ids, teacher_ids), shape, strict=True):
            outside = torch.ones(size, dtype=torch.bool, device=ids.device)
            outside[ids] = False
            others.append(outside.nonzero()[:, 0].to(torch.int32))
        slot = torch.empty(shape[0], dtype=torch.int32, device=student_ids.device)
        slot[student_ids] = teacher_ids.to(torch.int32)
        slot[others[0].long()] = -1 - torch.arange(len(others[0]), dtype=torch.int32, device=slot.device)
        student_pair, teacher_pair = student_ids.to(torch.int32), teacher_ids.to(torch.int32)
        return PairsPlan(student_pair, teacher_pair, others[0], others[1], synchronized(slot))

    return _PLANS.of((student_ids, teacher_ids), make, shape)


def unpaired_plan(shape: tuple[int, int], device: torch.device) -> PairsPlan:
    """The layout without any pair."""
    none = torch.empty(0, dtype=torch.int32, device=device)
    student, teacher = (torch.arange(size, dtype=torch.int32, device=device) for size in shape)
    return PairsPlan(none, none, student, teacher, -1 - student)


def run(
    kernels: Kernels,
    problem: Problem[PreparedRanked | Unpaired],
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
) -> Tensor:
    """Kernels around torch's sort, a group of chunks at a time; see `SORTED_ELEMENTS`."""
    options = problem.options
    chunks, device = problem.chunks, problem.student.device
    shape = problem.student.shape[-1], problem.teacher.shape[-1]
    if isinstance(options, PreparedRanked):
        plan, reverse = plan_for(options.student_ids, options.teacher_ids, shape), options.reverse
    else:
        plan, reverse = unpaired_plan(shape, device), False
    rest = len(plan.student_others), len(plan.teacher_others)
    compared = min(options.uncommon_top_k, *rest) if isinstance(options, PreparedRanked) else max(rest)
    step = max(1, SORTED_ELEMENTS // max(1, sum(rest)))

    def launch(name: str, part: Chunks, part_scale: Tensor | None, **tensors: Tensor | None) -> None:
        with kernels.memory(device) as memory:
            backward = name == "ranked_backward"
            given = {
                **chunk_fields(memory, problem, part, student_grad if backward else None, part_scale, keep=True),
                "labels": label_fields(memory, labels if backward else None, keep=True),
                "temperature": options.temperature,
                "reverse": reverse,
                "plan": plan.fields(memory),
                "slope": memory.input(tensors.pop("slope", None)),
                **dict.fromkeys(("losses", "student_values", "teacher_values")),
                **{field: memory.output(tensor) for field, tensor in tensors.items()},
            }
            given["workspace"] = kernels.workspace(memory, name, given, memory.blocks)
            kernels.launch(memory, name, given)

    parts, values = [], torch.empty if chunks.mask is None else torch.zeros  # of chunks that do not count
    for first in range(0, len(chunks), step):
        part = _some(chunks, first, first + step)
        common = torch.empty(len(part), dtype=torch.float32, device=device)
        p, q = (values(len(part), size, dtype=torch.float32, device=device) for size in rest)
        launch("ranked_forward", part, None, losses=common, student_values=p, teacher_values=q)
        uncommon, slope = sorted_l1(p, q, compared)
        parts.append(common + uncommon * options.temperature**2)
        if student_grad is not None:
            launch("ranked_backward", part, None if scale is None else scale[first : first + step], slope=slope)
    if student_grad is not None:
        with kernels.memory(device) as memory:
            given = chunk_fields(memory, problem, chunks, student_grad, None, keep=True)
            given["labels"] = label_fields(memory, labels, keep=True)
            kernels.other_rows(memory, given, problem.student.shape[0] * problem.student.shape[1])
    elif labels is not None:
        kernels.cross_entropy(problem.student, labels)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32, device=device)


def _some(chunks: Chunks, first: int, last: int) -> Chunks:
    student, teacher = (
        Rows(rows.start[first:last], rows.count[first:last]) for rows in (chunks.student, chunks.teacher)
    )
    return Chunks(student, teacher, chunks.used[first:last])
