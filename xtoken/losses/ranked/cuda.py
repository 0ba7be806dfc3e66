"""The ranked losses of the backend "cuda": csrc/losses/ranked, the pairs' layout, and torch's sort for some chunks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from xtoken.alignment import Chunks, synchronized
from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cached import kept
from xtoken.losses.cuda import Kernels, Memory, bits_of, chunk_fields, label_fields
from xtoken.losses.numerics import sorted_l1
from xtoken.losses.ranked import PairedLoss, UnpairedLoss

WAVES = 2
"""Chunks of a group for each block that runs beside others. Those of one have enough to sort (37 million probabilities
on an H100); with two of them blocks need not end together."""
SORTED_BYTES = 50
"""Memory that a probability outside the pairs takes while it is sorted, at most; the sort's own workspace is in it."""


@dataclass(frozen=True)
class PairsPlan:
    """Pairs and the ids outside, int32, and a bit for each id in a pair; see csrc/losses/ranked/params.h."""

    student_pair: Tensor
    teacher_pair: Tensor
    student_others: Tensor
    teacher_others: Tensor
    slot: Tensor
    student_common: Tensor | None = None
    teacher_common: Tensor | None = None

    @property
    def rest(self) -> tuple[int, int]:
        """How many ids are outside."""
        return len(self.student_others), len(self.teacher_others)

    def fields(self, memory: Memory) -> dict[str, Any]:
        """A `PairsPlan` of csrc."""
        tensors = {f.name: memory.input(getattr(self, f.name)) for f in fields(self)}
        student_rest, teacher_rest = self.rest
        counts = {"pairs": len(self.student_pair), "student_rest": student_rest, "teacher_rest": teacher_rest}
        return {**counts, **tensors}


@kept
def plan_for(student_ids: Tensor, teacher_ids: Tensor, shape: tuple[int, int]) -> PairsPlan:
    """The layout of pairs. The first call waits for the device."""
    others, common = [], []
    for ids, size in zip((student_ids, teacher_ids), shape, strict=True):
        outside = torch.ones(size, dtype=torch.bool, device=ids.device)
        outside[ids] = False
        others.append(outside.nonzero()[:, 0].to(torch.int32))
        common.append(bits_of(~outside))
    slot = torch.empty(shape[0], dtype=torch.int32, device=student_ids.device)
    slot[student_ids] = teacher_ids.to(torch.int32)
    slot[others[0].long()] = -1 - torch.arange(len(others[0]), dtype=torch.int32, device=slot.device)
    student_pair, teacher_pair = student_ids.to(torch.int32), teacher_ids.to(torch.int32)
    return PairsPlan(student_pair, teacher_pair, others[0], others[1], synchronized(slot), common[0], common[1])


def unpaired_plan(shape: tuple[int, int], device: torch.device) -> PairsPlan:
    """The layout without any pair."""
    none = torch.empty(0, dtype=torch.int32, device=device)
    student, teacher = (torch.arange(size, dtype=torch.int32, device=device) for size in shape)
    return PairsPlan(none, none, student, teacher, -1 - student)


@dataclass(frozen=True)
class _Call:
    """What the launches for some of the chunks have in common."""

    kernels: Kernels
    problem: Problem[PairedLoss | UnpairedLoss]
    plan: PairsPlan
    ranks: int
    student_grad: Tensor | None
    labels: Labels | None

    @property
    def device(self) -> torch.device:
        return self.problem.student.device

    def launch(
        self, name: str, part: Chunks, scale: Tensor | None, backward: bool, out: dict[str, Tensor], **more: Any
    ) -> None:
        """Starts a kernel for some chunks: `more` are fields and inputs, `out` what it fills."""
        with self.kernels.memory(self.device) as memory:
            grad, labels = (self.student_grad, self.labels) if backward else (None, None)
            keep = self.problem.chunks.mask is not None  # what is there of chunks that do not count
            given = {
                **chunk_fields(memory, self.problem, part, grad, scale, keep=True),
                "labels": label_fields(memory, labels, keep=True),
                **self.problem.options.fields(),
                "plan": self.plan.fields(memory),
                **{field: memory.input(value) if isinstance(value, Tensor) else value for field, value in more.items()},
                **{field: memory.output(tensor, keep) for field, tensor in out.items()},
            }
            given["queue"] = self.kernels.queue(memory)
            blocks = max(1, min(memory.blocks, len(part)))
            given["workspace"] = self.kernels.workspace(memory, name, given, blocks)
            self.kernels.launch(memory, name, given, blocks)

    def by_steps(self, part: Chunks, scale: Tensor | None) -> Tensor:
        """The losses, and gradients, of chunks of one row of 16 bits on each side: one kernel."""
        losses = torch.empty(len(part), dtype=torch.float32, device=self.device)
        self.launch("ranked", part, scale, self.student_grad is not None, {"losses": losses}, ranks=self.ranks)
        return losses

    def by_sorting(self, part: Chunks, scale: Tensor | None) -> Tensor:
        """Those of any chunks: kernels around torch's sort."""
        common = torch.empty(len(part), dtype=torch.float32, device=self.device)
        make = torch.empty if self.problem.chunks.mask is None else torch.zeros  # of chunks that do not count
        values = {
            f"{side}_values": make(len(part), size, dtype=torch.float32, device=self.device)
            for side, size in zip(("student", "teacher"), self.plan.rest, strict=True)
        }
        self.launch("ranked_forward", part, None, False, {"losses": common, **values}, slope=None)
        uncommon, slope = sorted_l1(values["student_values"], values["teacher_values"], self.ranks)
        if self.student_grad is not None:
            none = dict.fromkeys(("losses", *values))
            self.launch("ranked_backward", part, scale, True, {}, slope=slope, **none)
        return common + uncommon * self.problem.options.temperature**2


def run(
    kernels: Kernels,
    problem: Problem[PairedLoss | UnpairedLoss],
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
) -> Tensor:
    """Chunks of one row of 16 bits on each side by one kernel; the others around torch's sort, group by group.

    Nothing waits for the device: how many chunks are of either kind is known to the host.
    """
    chunks, options, device = problem.chunks, problem.options, problem.student.device
    shape = problem.student.shape[-1], problem.teacher.shape[-1]
    if isinstance(options, PairedLoss):
        plan = plan_for(*options.pairs, shape)
        ranks = min(options.uncommon_top_k, *plan.rest)
    else:
        plan = unpaired_plan(shape, device)
        ranks = max(plan.rest)
    call = _Call(kernels, problem, plan, ranks, student_grad, labels)

    total = len(chunks)
    single = int(_are_single(problem, chunks.host).sum())
    order = slice(None) if single in (0, total) else _order(chunks).argsort(stable=True)
    ordered = _chosen(chunks, order)
    scales = None if scale is None else scale[order]
    with kernels.memory(device) as memory:
        step = group_size(memory.blocks, SORTED_BYTES * sum(plan.rest), _free_bytes(device))
    bounds = [0, *range(single, total, step), total]
    parts = []
    for first, last in itertools.pairwise(bounds):
        if first == last:
            continue
        compute = call.by_steps if last <= single else call.by_sorting
        part_scale = None if scales is None else scales[first:last]
        parts.append(compute(_chosen(ordered, slice(first, last)), part_scale))
    losses = torch.empty(total, dtype=torch.float32, device=device)
    if parts:
        losses[order] = torch.cat(parts)
    if student_grad is not None:
        with kernels.memory(device) as memory:
            given = chunk_fields(memory, problem, chunks, student_grad, None, keep=True)
            given["labels"] = label_fields(memory, labels, keep=True)
            kernels.other_rows(memory, given, problem.student.shape[0] * problem.student.shape[1])
    elif labels is not None:
        kernels.cross_entropy(problem.student, labels)
    return losses


def _are_single(problem: Problem[Any], chunks: Chunks) -> Tensor:
    """bool [K]: which chunks are one row of 16 bits on each side."""
    is_16_bit = problem.student.element_size() == 2 and problem.teacher.element_size() == 2
    return (chunks.student.count == 1) & (chunks.teacher.count == 1) & is_16_bit


def _order(chunks: Chunks) -> Tensor:
    """int64 [K]: 0 for chunks of one row on each side, 1 for those that do not count, 2 for the others."""
    several = (chunks.student.count > 1) | (chunks.teacher.count > 1)
    return 2 * several + (chunks.student.start < 0)


def _chosen(chunks: Chunks, index: Tensor | slice) -> Chunks:
    return Chunks(chunks.student.chosen(index), chunks.teacher.chosen(index), chunks.used[index])


def group_size(blocks: int, chunk_bytes: int, free_bytes: int | None) -> int:
    """How many chunks are sorted together: `WAVES` for each of the blocks that run side by side.

    In a quarter of the free memory (None: not known), and then of whole waves while one fits: in a part of one, blocks
    are idle.
    """
    if free_bytes is None:
        return WAVES * blocks
    fitting = free_bytes // (4 * max(1, chunk_bytes))
    return blocks * min(WAVES, fitting // blocks) or max(1, fitting)


def _free_bytes(device: torch.device) -> int | None:
    """Memory that torch can still take; None where that cannot be asked for."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
