"""W as the CUDA kernels read it: index-only gathers, and sorted lists for the rest, with no wait for the device.

What depends on W alone is built once with NumPy and moved to the device; a column set, which is usually chosen there
on every step, needs only a few small operations on the device.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xtoken.alignment import synchronized
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
from xtoken.losses.loss import Matrix

WARP = 32
"""Lists that are summed side by side, and entries of a longer list that are."""

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Lists:
    """Weighted sums in the layout of csrc/cuda/pkl.h; `owner` is the row or column of each."""

    shared: int
    start: Tensor  # int32 [slices + 1]
    index: Tensor  # int32 [32 * start[slices]]
    entry: Tensor  # int64, as index: entries of W; their number where there is none
    owner: Tensor  # int32 [count]


@dataclass(frozen=True)
class Structure:
    """What depends on W alone, on one device."""

    row_ptr: Tensor  # int64
    col: Tensor  # int32
    row: Tensor  # int64 [nnz]: the row of each entry
    most: _Ints  # [V_teacher + 1]: entries in that many columns, at most
    column_code: Tensor  # int32 [V_teacher]: a student id, V_student: nothing, V_student + 1 + n: list n
    row_code: Tensor  # int32 [V_student]: a teacher id, -1: nothing, -2 - n: list n
    column_lists: Lists
    row_lists: Lists


def lists_of(keys: _Ints, counts: _Ints, begin: _Ints, other: _Ints, entry: _Ints, total: int) -> Lists:
    """Lists of the owners `keys`: entries begin ... begin + count - 1 of `other` and `entry`."""
    order = np.argsort(-counts, kind="stable")
    keys, counts, begin = keys[order], counts[order], begin[order]
    shared = int((counts > WARP).sum())
    lengths = np.concatenate([-(-counts[:shared] // WARP), counts[shared::WARP]])
    start = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    number = np.repeat(np.arange(len(keys)), counts)
    offset = np.arange(len(number)) - np.repeat(counts.cumsum() - counts, counts)
    source = np.repeat(begin, counts) + offset
    alone = number < shared
    side = (number - shared) // WARP
    at = np.where(
        alone,
        WARP * start[np.where(alone, number, 0)] + offset,
        WARP * (start[np.where(alone, 0, shared + side)] + offset) + (number - shared) % WARP,
    )
    index = np.zeros(WARP * start[-1], np.int32)
    entries = np.full(WARP * start[-1], total, np.int64)
    index[at], entries[at] = other[source], entry[source]
    return Lists(
        shared,
        torch.from_numpy(start.astype(np.int32)),
        torch.from_numpy(index),
        torch.from_numpy(entries),
        torch.from_numpy(keys.astype(np.int32)),
    )


def _moved(value: Any, device: torch.device) -> Any:
    return type(value)(*(x.to(device) if isinstance(x, Tensor) else x for x in vars(value).values()))


def structure_of(projection: Matrix, device: torch.device, exact: bool) -> Structure:
    """The layouts of W. `exact`: entries of weight 1 become plain gathers; else the weights are not looked at."""
    students, teachers = projection.shape
    row_ptr, col = projection.row_ptr.detach().cpu().numpy(), projection.col.detach().cpu().numpy()
    total = len(col)
    ones = projection.weight.detach().cpu().float().numpy() == 1.0 if exact else np.zeros(total, bool)
    row_count = np.diff(row_ptr)
    row = np.repeat(np.arange(students), row_count)
    by_column = np.argsort(col, kind="stable")
    column_count = np.bincount(col, minlength=teachers).astype(np.int64)
    column_begin = column_count.cumsum() - column_count

    def codes(count: _Ints, begin: _Ints, order: _Ints, other: _Ints) -> tuple[_Ints, _Ints]:
        code = np.full(len(count), -1, np.int64)
        first = order[begin[count > 0]]
        single = np.zeros(len(count), bool)
        single[count > 0] = (count[count > 0] == 1) & ones[first]
        code[single] = other[order[begin[single]]]
        return code, ((count > 0) & ~single).nonzero()[0]

    identity = np.arange(total)
    column_code, many_columns = codes(column_count, column_begin, by_column, row)
    row_code, many_rows = codes(row_count, row_ptr[:-1], identity, col.astype(np.int64))
    column_lists = lists_of(
        many_columns, column_count[many_columns], column_begin[many_columns], row[by_column], by_column, total
    )
    row_lists = lists_of(many_rows, row_count[many_rows], row_ptr[:-1][many_rows], col, identity, total)
    column_code[column_code < 0] = students
    column_code[column_lists.owner.numpy()] = students + 1 + np.arange(len(many_columns))
    row_code[row_lists.owner.numpy()] = -2 - np.arange(len(many_rows))
    return Structure(
        projection.row_ptr.to(device, torch.int64),
        projection.col.to(device, torch.int32),
        torch.from_numpy(row).to(device),
        np.concatenate([[0], np.sort(column_count)[::-1].cumsum()]),
        torch.from_numpy(column_code.astype(np.int32)).to(device),
        torch.from_numpy(row_code.astype(np.int32)).to(device),
        _moved(column_lists, device),
        _moved(row_lists, device),
    )


@dataclass(frozen=True)
class Plan:
    """W in a column set, before `row_weight` is computed; see PklPlan in csrc/cuda/pkl.h."""

    structure: Structure
    weight: Tensor  # float32 [nnz]
    place: Tensor  # int32 [V_teacher]: place in the column set, -1: outside
    chosen: Tensor | None  # int32 [C]; None: all
    count: Tensor | None  # int32 []: how many of the chosen, from the first on, are the set; None: all
    column_slot: Tensor
    row_slot: Tensor
    column_wanted: Tensor | None  # uint8 [column lists]
    column_weight: Tensor
    row_index: Tensor
    row_weight: Tensor


def plan_of(structure: Structure, weight: Tensor, columns: Tensor, count: Tensor | None = None) -> Plan:
    """The plan for the first `count` of the columns [C], which are on the device of the structure."""
    teachers = len(structure.column_code)
    size = len(columns)
    everything = size == teachers
    number = torch.arange(size, dtype=torch.int32, device=columns.device)
    place = torch.full((teachers,), -1, dtype=torch.int32, device=columns.device)
    place[columns] = number if count is None else torch.where(number < count, number, -1)
    code = structure.row_code
    single = place[code.clamp_min(0).long()]
    row_slot = torch.where(code >= 0, torch.where(single >= 0, single, size), size - 1 - code)
    rows, lists = structure.row_lists, structure.column_lists
    padded = torch.cat([weight, weight.new_zeros(1)])
    row_place = place[rows.index.long()]
    return Plan(
        structure,
        weight,
        place,
        None if everything else columns.to(torch.int32),
        count,
        structure.column_code if everything else structure.column_code[columns],
        row_slot,
        None if everything else (place[lists.owner.long()] >= 0).to(torch.uint8),
        padded[lists.entry],
        torch.where(row_place >= 0, row_place, size),
        torch.where(row_place >= 0, padded[rows.entry], 0.0),
    )


@dataclass(frozen=True)
class Entries:
    """The entries of W in a column set, as many as there can be at most in one of its size, for gradients of W."""

    index: Tensor  # int64 [E]: of W; the number of its entries where there is none
    row: Tensor  # int64 [E]
    column: Tensor  # int64 [E]: place in the column set; its size where there is none

    def add(self, values: Tensor, weight_grad: Tensor) -> None:
        """Adds values [E] to a gradient [nnz]."""
        size = len(weight_grad)
        weight_grad += weight_grad.new_zeros(size + 1).index_copy_(0, self.index, values.to(weight_grad.dtype))[:size]


def entries_of(plan: Plan, columns: Tensor) -> Entries:
    """The entries in the columns of the plan; how many they are stays on the device."""
    structure = plan.structure
    total, size = len(structure.col), int(structure.most[len(columns)])
    place = plan.place[structure.col.long()].long()
    inside = place >= 0
    at = torch.where(inside, inside.cumsum(0) - 1, size)
    index = torch.full((size + 1,), total, device=at.device)
    index.scatter_(0, at, torch.arange(total, device=at.device))
    index = index[:size]
    given = index.clamp_max(max(total - 1, 0))  # where there is none, any will do: its value is dropped
    return Entries(index, structure.row[given], torch.where(place[given] >= 0, place[given], len(columns)))


@dataclass
class _Kept:
    """Of one W on one device: the layouts, and the plan for all columns."""

    weight: weakref.ref[Tensor]
    version: int
    exact: bool
    structure: Structure
    device_weight: Tensor | None = None
    everything: Plan | None = None


_KEPT: Any = WeakIdKeyDictionary()
"""By the tensor of W's column ids, which lives as long as W: {device: _Kept}."""


def plan_for(projection: Matrix, columns: Tensor, trained: bool, count: Tensor | None = None) -> Plan:
    """The plan of W in (the first `count` of) the columns, on their device.

    A W whose weights are being trained (`trained`) is not looked at, so that a step does not wait for the device; its
    layouts then treat no entry as exact. Layouts are kept for as long as W lives (and, if they depend on them, its
    weights stay as they are).
    """
    device, weight = columns.device, projection.weight
    kept: dict[torch.device, _Kept] = _KEPT.setdefault(projection.col, {})
    known = kept.get(device)
    same = known is not None and known.weight() is weight and known.version == weight._version
    if known is None or (known.exact and (trained or not same)):
        known = _Kept(weakref.ref(weight), weight._version, not trained, structure_of(projection, device, not trained))
        kept[device] = known
        same = not trained
    if not same or known.device_weight is None:
        known.weight, known.version, known.everything = weakref.ref(weight), weight._version, None
        known.device_weight = weight.detach().to(device, torch.float32).contiguous()
        if not trained:
            synchronized(known.device_weight)
    if len(columns) != projection.shape[1]:
        return plan_of(known.structure, known.device_weight, columns, count)
    if known.everything is None:
        known.everything = plan_of(known.structure, known.device_weight, columns)
        if not trained:
            synchronized(known.everything.row_weight)
    return known.everything


def run(
    kernels: Kernels,
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
) -> Tensor:
    """P-KL; the workspace is about a megabyte per block of the grid, whatever the number of rows."""
    options: Any = problem.options
    chunks = problem.chunks
    count, device = len(chunks), problem.student.device
    trained = problem.weight is not None or options.projection.weight.requires_grad
    plan = plan_for(options.projection, options.chosen, trained, options.count)
    losses = torch.empty(count, dtype=torch.float32, device=device)
    with kernels.memory(device) as memory:
        blocks, threads, stream = memory.launch
        student, grad = logits_argument(memory, problem.student), gradient_argument(memory, student_grad)
        entries = entries_of(plan, options.chosen) if weight_grad is not None else None
        arguments = _plan(kernels, memory, plan, entries)
        grid = max(1, min(blocks, count))
        sums = memory.scratch((grid, len(entries.index)), zero=True) if entries is not None else None
        workspace = memory.scratch((grid, kernels.module.pkl_workspace(arguments, options.merge)))
        student_rows = rows_argument(memory, chunks.student)
        label_arguments = labels_argument(memory, labels)
        kernels.module.pkl(
            arguments,
            student,
            logits_argument(memory, problem.teacher),
            grad,
            student_rows,
            rows_argument(memory, chunks.teacher),
            count,
            floats_argument(memory, scale),
            memory.output(losses),
            memory.output(sums),
            label_arguments,
            options.temperature,
            options.merge,
            options.reverse,
            numerics.LOWEST_LOGIT,
            numerics.EPSILON,
            memory.output(workspace),
            (grid, threads, stream),
        )
        if sums is not None:
            total = torch.empty(sums.shape[1], dtype=torch.float32, device=device)
            kernels.module.sum_blocks(
                memory.input(sums), grid, sums.shape[1], memory.output(total), (4 * blocks, threads, stream)
            )
        if student_grad is not None or labels is not None:
            kernels.other_rows(memory, student, grad, student_rows, chunks.student, label_arguments)
    if weight_grad is not None and entries is not None:
        entries.add(total, weight_grad)
    return losses


def _plan(kernels: Kernels, memory: Memory, plan: Plan, entries: Entries | None) -> tuple[Any, ...]:
    """The argument of `pkl`, with the sums of W's rows in the columns."""
    structure, students = plan.structure, len(plan.row_slot)
    row_weight = memory.scratch((students,))
    blocks, threads, stream = memory.launch
    kernels.module.row_weights(
        memory.input(structure.row_ptr),
        memory.input(structure.col),
        memory.input(plan.weight),
        memory.input(plan.place),
        students,
        memory.output(row_weight),
        (4 * blocks, threads, stream),
    )
    return (
        students,
        len(plan.column_slot),
        memory.input(plan.chosen),
        memory.input(plan.count),
        memory.input(plan.column_slot),
        memory.input(plan.row_slot),
        memory.input(row_weight),
        _lists(memory, structure.column_lists, structure.column_lists.index, plan.column_weight, plan.column_wanted),
        _lists(memory, structure.row_lists, plan.row_index, plan.row_weight, None),
        memory.input(None if entries is None else entries.row),
        memory.input(None if entries is None else entries.column),
        0 if entries is None else len(entries.index),
    )


def _lists(memory: Memory, lists: Lists, index: Tensor, weight: Tensor, wanted: Tensor | None) -> tuple[int, ...]:
    return (
        len(lists.start) - 1,
        lists.shared,
        len(lists.owner),
        memory.input(lists.start),
        memory.input(index),
        memory.input(weight),
        memory.input(wanted),
    )
