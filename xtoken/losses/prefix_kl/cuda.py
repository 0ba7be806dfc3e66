"""A piece index as the CUDA kernel of prefix KL reads it: a map of the pairs, and sorted lists of the other tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xtoken.alignment import Chunks, Rows, synchronized
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
from xtoken.losses.pkl.cuda import lists_of
from xtoken.pieces import Side, sides


@dataclass(frozen=True)
class TokenLists:
    """Lists of tokens in the layout of csrc/cuda/prefix.h."""

    shared: int
    start: Tensor  # int32 [slices + 1]
    tokens: Tensor  # int32 [32 * start[slices]]
    event: Tensor  # int32 [count]


@dataclass(frozen=True)
class PrefixPlan:
    """A piece index on a device; see csrc/cuda/prefix.h."""

    sides: tuple[Side, Side]
    slot: Tensor  # int32 [V_student]
    events: int
    student_lists: TokenLists
    teacher_lists: TokenLists
    most: int


def _token_lists(
    keys: NDArray[np.int64], event: NDArray[np.int64], number: NDArray[np.int64] | None
) -> tuple[TokenLists, NDArray[np.int64]]:
    """The lists of the tokens of each event in `keys`, and the numbers [events] that they have: given, or in order."""
    total = len(event)
    counts = np.bincount(event, minlength=int(keys.max(initial=-1)) + 1)
    tokens = np.argsort(event, kind="stable")
    made = lists_of(keys, counts[keys], (counts.cumsum() - counts)[keys], tokens, np.arange(total), total)
    owner = made.owner.long().numpy()
    if number is None:
        ordered = owner[owner != keys.max()]
        number = np.full(len(counts), len(ordered))
        number[ordered] = np.arange(len(ordered))
    padded = torch.where(made.entry == total, -1, made.index)
    return TokenLists(made.shared, made.start, padded, torch.from_numpy(number[owner].astype(np.int32))), number


def prefix_plan_of(pieces: Tensor, device: torch.device) -> PrefixPlan:
    """The plan of `PieceIndex.data`."""
    both = sides(pieces.cpu())
    student, teacher = (side.event.long().numpy() for side in both)
    events = int(pieces[2])
    students, teachers = (np.bincount(event, minlength=events) for event in (student, teacher))
    is_both = (students > 0) & (teachers > 0)
    is_pair = is_both & (students == 1) & (teachers == 1)
    listed = (is_both & ~is_pair).nonzero()[0]
    # Student tokens that the teacher has nothing for are one list more, perhaps an empty one.
    matched = np.where(is_both[student], student, events)
    student_lists, number = _token_lists(np.append(listed, events), matched, None)
    teacher_lists, _ = _token_lists(listed, teacher, number)
    partner = np.zeros(events, np.int64)
    partner[teacher] = np.arange(len(teacher))
    slot = np.where(is_pair[student], partner[student], -1 - number[matched])
    most = 0
    for side in both:
        begin, end, ids = side.ptr[:-1].numpy(), side.ptr[1:].numpy(), side.pieces.numpy()
        most = max(most, int(np.bincount(ids[begin[begin < end]], minlength=1).max()))

    def moved(lists: TokenLists) -> TokenLists:
        return TokenLists(lists.shared, *(x.to(device) for x in (lists.start, lists.tokens, lists.event)))

    return PrefixPlan(
        (Side(*(x.to(device) for x in both[0])), Side(*(x.to(device) for x in both[1]))),
        synchronized(torch.from_numpy(slot.astype(np.int32)).to(device)),
        len(listed),
        moved(student_lists),
        moved(teacher_lists),
        most,
    )


_PLANS: Any = WeakTensorKeyDictionary()
"""By the data of a piece index: (its version, {device: plan})."""


def prefix_plan_for(pieces: Tensor, device: torch.device) -> PrefixPlan:
    """The plan on a device; kept for as long as the index lives and does not change. The first call waits for it."""
    kept = _PLANS.get(pieces)
    if kept is None or kept[0] != pieces._version:
        kept = _PLANS[pieces] = pieces._version, {}
    plans: dict[torch.device, PrefixPlan] = kept[1]
    if device not in plans:
        plans[device] = prefix_plan_of(pieces, device)
    return plans[device]


def check_ids(chunks: Chunks, sizes: tuple[int, int]) -> None:
    """Raises ValueError, as the CPU kernel does, if a token of a chunk with several is outside the vocabulary.

    Of a copy on the CPU: nothing waits for a device.
    """
    host = chunks.host
    several = ((host.student.count > 1) | (host.teacher.count > 1)).nonzero()[:, 0]
    for name, rows, size in zip(("student", "teacher"), (host.student, host.teacher), sizes, strict=True):
        assert rows.next_ids is not None
        start, count = rows.start[several], rows.count[several]
        ids = rows.next_ids[Rows(start, count).index()]
        bad = ids[(ids < 0) | (ids >= size)]
        if len(bad):
            raise ValueError(f"alignment: expected {name}_ids in 0 ... {size - 1} within chunks, got {int(bad[0])}")


def run(
    kernels: Kernels,
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
) -> Tensor:
    """Prefix KL; the workspace is about 150 KB per block of the grid for vocabularies of 150,000."""
    options: Any = problem.options
    chunks = problem.chunks
    count, device = len(chunks), problem.student.device
    check_ids(chunks, (problem.student.shape[-1], problem.teacher.shape[-1]))
    plan = prefix_plan_for(options.pieces, device)
    losses = torch.empty(count, dtype=torch.float32, device=device)
    with kernels.memory(device) as memory:
        blocks, threads, stream = memory.launch
        student, grad = logits_argument(memory, problem.student), gradient_argument(memory, student_grad)
        arguments = _prefix_plan(memory, plan)
        grid = max(1, min(blocks, count))
        workspace = memory.scratch((grid, kernels.module.prefix_workspace(arguments)))
        student_rows = rows_argument(memory, chunks.student)
        label_arguments = labels_argument(memory, labels)
        kernels.module.prefix(
            arguments,
            student,
            logits_argument(memory, problem.teacher),
            grad,
            student_rows,
            rows_argument(memory, chunks.teacher),
            count,
            floats_argument(memory, scale),
            memory.output(losses),
            label_arguments,
            options.temperature,
            options.reverse,
            numerics.LOWEST_LOGIT,
            memory.output(workspace),
            (grid, threads, stream),
        )
        if student_grad is not None or labels is not None:
            kernels.other_rows(memory, student, grad, student_rows, chunks.student, label_arguments)
    return losses


def _prefix_plan(memory: Memory, plan: PrefixPlan) -> tuple[Any, ...]:
    def lists(one: TokenLists) -> tuple[int, ...]:
        tensors = one.start, one.tokens, one.event
        return len(one.start) - 1, one.shared, len(one.event), *(memory.input(tensor) for tensor in tensors)

    sides = [
        (len(side.event), *(memory.input(tensor) for tensor in (side.length, side.order, side.ptr, side.pieces)))
        for side in plan.sides
    ]
    return (
        *sides,
        memory.input(plan.slot),
        plan.events,
        lists(plan.student_lists),
        lists(plan.teacher_lists),
        plan.most,
    )
