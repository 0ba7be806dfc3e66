"""W as the CUDA kernels read it: index-only gathers, and sorted lists for the rest, with no wait for the device.

What depends on W alone is built once with NumPy and moved to the device; a column set, which is usually chosen there
on every step, needs only a few small operations on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.alignment import synchronized
from xtoken.losses import numerics
from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cached import Cached
from xtoken.losses.cuda import Kernels, Memory, bits_of
from xtoken.losses.loss import Matrix
from xtoken.losses.pkl import PKL
from xtoken.losses.sliced import FOUR, SlicedLists, list_fields, tensors_to

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Lists:
    """Weighted sums, as `SumLists` of csrc/losses/pkl/params.h; `owner` is the row or column of each."""

    shared: int
    few: int
    start: Tensor  # int32 [slices + 1]
    part: Tensor  # int32
    index: Tensor  # int32 [32 * start[slices] + 4 * few]
    entry: Tensor  # int64, as index: entries of W; their number where there is none
    owner: Tensor  # int32 [count]

    @staticmethod
    def of(keys: _Ints, counts: _Ints, begin: _Ints, other: _Ints, entry: _Ints) -> Lists:
        """Lists of the owners `keys`: entries begin ... begin + count - 1 of `other` and `entry`."""
        few = counts <= FOUR
        lists = SlicedLists.of(keys[~few], begin[~few], counts[~few])
        source = np.where(np.arange(FOUR) < counts[few, None], begin[few, None] + np.arange(FOUR), -1)
        places = torch.cat([lists.source, torch.from_numpy(source).flatten()])
        owner = torch.cat([lists.owner, torch.from_numpy(keys[few].astype(np.int32))])
        index = torch.from_numpy(np.append(other, 0).astype(np.int32))[places]
        entries = torch.from_numpy(np.append(entry, len(entry)))[places]
        return Lists(lists.shared, int(few.sum()), lists.start, lists.part, index, entries, owner)

    def fields(self, memory: Memory, index: Tensor, weight: Tensor, wanted: Tensor | None) -> dict[str, Any]:
        """A `SumLists` of csrc."""
        tensors = {"index": index, "weight": weight, "wanted": wanted}
        named = {name: memory.input(tensor) for name, tensor in tensors.items()}
        return {**list_fields(self, memory), "few": self.few, **named}


@dataclass(frozen=True)
class Structure:
    """What depends on W alone, on one device."""

    col: Tensor  # int32
    row: Tensor  # int64 [nnz]: the row of each entry
    most: _Ints  # [V_teacher + 1]: entries in that many columns, at most
    column_code: Tensor  # int32 [V_teacher]: the student of a pair, V_student: nothing, V_student + 1 + n: list n
    row_code: Tensor  # int32 [V_student]: a teacher id, -1: nothing, -2 - n: list n
    paired: Tensor | None  # uint8 [V_student]: rows of pairs; None: there are none
    unpaired: Tensor  # int32: the other students
    unpaired_place: Tensor  # int32 [V_student]: where they are in it
    column_lists: Lists
    row_lists: Lists


def structure_of(projection: Matrix, device: torch.device, exact: bool) -> Structure:
    """The layouts of W. `exact`: entries of weight 1 become plain gathers; else the weights are not looked at."""
    students, teachers = projection.shape
    row_ptr, col = projection.row_ptr.detach().cpu().numpy(), projection.col.detach().cpu().numpy().astype(np.int64)
    total = len(col)
    ones = projection.weight.detach().cpu().float().numpy() == 1.0 if exact else np.zeros(total, bool)
    row_count = np.diff(row_ptr)
    row = np.repeat(np.arange(students), row_count)
    by_column = np.argsort(col, kind="stable")
    column_count = np.bincount(col, minlength=teachers).astype(np.int64)
    column_begin = column_count.cumsum() - column_count
    single = ones & (row_count[row] == 1)  # entries whose row is an element of u
    pair = single & (column_count[col] == 1)  # whose column is one of e, too
    column_code, row_code = np.full(teachers, students), np.full(students, -1)
    column_code[col[pair]], row_code[row[single]] = row[pair], col[single]
    many_columns = ((column_code == students) & (column_count > 0)).nonzero()[0]
    many_rows = ((row_code < 0) & (row_count > 0)).nonzero()[0]
    column_lists = Lists.of(
        many_columns, column_count[many_columns], column_begin[many_columns], row[by_column], by_column
    )
    row_lists = Lists.of(many_rows, row_count[many_rows], row_ptr[:-1][many_rows], col, np.arange(total))
    column_code[column_lists.owner.numpy()] = students + 1 + np.arange(len(many_columns))
    row_code[row_lists.owner.numpy()] = -2 - np.arange(len(many_rows))
    paired = np.zeros(students, np.uint8)
    paired[row[pair]] = 1
    unpaired = 1 - paired.astype(np.int64)
    return Structure(
        torch.from_numpy(col.astype(np.int32)).to(device),
        torch.from_numpy(row).to(device),
        np.concatenate([[0], np.sort(column_count)[::-1].cumsum()]),
        torch.from_numpy(column_code.astype(np.int32)).to(device),
        torch.from_numpy(row_code.astype(np.int32)).to(device),
        torch.from_numpy(paired).to(device) if pair.any() else None,
        torch.from_numpy(unpaired.nonzero()[0].astype(np.int32)).to(device),
        torch.from_numpy((unpaired.cumsum() - unpaired).astype(np.int32)).to(device),
        tensors_to(column_lists, device),
        tensors_to(row_lists, device),
    )


@dataclass(frozen=True)
class Plan:
    """W in a column set; see PklPlan in csrc/losses/pkl/params.h."""

    structure: Structure
    place: Tensor  # int32 [V_teacher]: which of the stored columns it is, -1: none
    stored: Tensor  # int32 [N]: the columns whose x and u are stored
    count: Tensor | None  # int32 []: how many of them, from the first on, are the set; None: all, or C has all columns
    column_slot: Tensor  # int32 [N]
    row_slot: Tensor  # int32 [V_student]
    paired: Tensor | None  # int32: bits of the students
    unpaired: Tensor | None  # int32: the other students
    empty: Tensor | None  # int32: bits of the teacher's columns; None: C is what is stored
    column_wanted: Tensor | None  # uint8 [column lists]
    column_index: Tensor
    column_weight: Tensor
    row_index: Tensor
    row_weight: Tensor


def plan_of(structure: Structure, weight: Tensor, columns: Tensor, count: Tensor | None = None) -> Plan:
    """The plan for the first `count` of the columns [C], which are on the device of the structure.

    With all columns, what a pair needs is computed in the order of the rows, and only the other columns are stored.
    """
    teachers, students = len(structure.column_code), len(structure.row_code)
    rows, lists, code = structure.row_lists, structure.column_lists, structure.row_code
    everything = len(columns) == teachers
    stored = lists.owner if everything else columns.to(torch.int32)
    size = len(stored)
    number = torch.arange(size, dtype=torch.int32, device=columns.device)
    place = torch.full((teachers,), -1, dtype=torch.int32, device=columns.device)
    place[stored.long()] = number if count is None else torch.where(number < count, number, -1)
    single = place[code.clamp_min(0).long()]
    slot = torch.where(code >= 0, torch.where(single >= 0, single, size), size - 1 - code)
    paired = structure.paired if everything else None
    padded = torch.cat([weight, weight.new_zeros(1)])
    row_place = place[rows.index.long()]
    return Plan(
        structure,
        place,
        stored,
        count,
        structure.column_code[stored.long()],
        -1 - slot if paired is None else torch.where(paired > 0, code, -1 - slot),
        None if paired is None else bits_of(paired),
        None if paired is None else structure.unpaired,
        bits_of(structure.column_code == students) if everything else None,
        None if everything else (place[lists.owner.long()] >= 0).to(torch.uint8),
        lists.index if paired is None else structure.unpaired_place[lists.index.long()],
        padded[lists.entry],
        -1 - torch.where(row_place >= 0, row_place, size),
        torch.where(row_place >= 0, padded[rows.entry], 0.0),
    )


@dataclass(frozen=True)
class Entries:
    """The entries of W in a column set, as many as there can be at most in one of its size, for gradients of W."""

    index: Tensor  # int64 [E]: of W; the number of its entries where there is none
    row: Tensor  # int64 [E]
    column: Tensor  # int64 [E]: which of the stored columns; their number where there is none

    def add(self, values: Tensor, weight_grad: Tensor) -> None:
        """Adds values [E] to a gradient [nnz]."""
        size = len(weight_grad)
        weight_grad += weight_grad.new_zeros(size + 1).index_copy_(0, self.index, values.to(weight_grad.dtype))[:size]


def entries_of(plan: Plan, columns: Tensor) -> Entries:
    """The entries in the columns of the plan, which has no pairs; how many they are stays on the device."""
    structure, stored = plan.structure, len(plan.stored)
    total, size = len(structure.col), int(structure.most[len(columns)])
    place = plan.place[structure.col.long()].long()
    inside = place >= 0
    at = torch.where(inside, inside.cumsum(0) - 1, size)
    index = torch.full((size + 1,), total, device=at.device)
    index.scatter_(0, at, torch.arange(total, device=at.device))
    index = index[:size]
    given = index.clamp_max(max(total - 1, 0))  # where there is none, any will do: its value is dropped
    return Entries(index, structure.row[given], torch.where(place[given] >= 0, place[given], stored))


_STRUCTURES = Cached[Structure]()
_WEIGHTS = Cached[Tensor]()
_PLANS = Cached[Plan]()
"""For all columns."""


def plan_for(projection: Matrix, columns: Tensor, trained: bool, count: Tensor | None = None) -> Plan:
    """The plan of W in (the first `count` of) the columns, on their device.

    A W whose weights are being trained (`trained`) is not looked at, so that a step does not wait for the device; its
    layouts then treat no entry as exact. Layouts are kept for as long as W lives (and, if they depend on them, its
    weights stay as they are).
    """
    device, weight = columns.device, projection.weight
    places = projection.col, projection.row_ptr
    looked_at = places if trained else (*places, weight)
    structure = _STRUCTURES.of(looked_at, lambda: structure_of(projection, device, not trained), device, trained)

    def ready(tensor: Tensor) -> Tensor:
        return tensor if trained else synchronized(tensor)

    def weights() -> Tensor:
        return ready(weight.detach().to(device, torch.float32).contiguous())

    def everything() -> Plan:
        plan = plan_of(structure, device_weight, columns)
        ready(plan.row_weight)
        return plan

    device_weight = _WEIGHTS.of((weight,), weights, device)
    if len(columns) != projection.shape[1]:
        return plan_of(structure, device_weight, columns, count)
    return _PLANS.of((weight, *places), everything, device, trained)


def run(
    kernels: Kernels,
    problem: Problem[PKL],
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
) -> Tensor:
    """P-KL; the workspace is a block's of the grid, whatever the number of rows."""
    options, columns = problem.options, problem.options.columns
    assert columns is not None
    trained = problem.weight is not None or options.W.weight.requires_grad
    plan = plan_for(options.W, columns, trained, options.count)
    entries = entries_of(plan, columns) if weight_grad is not None else None
    with kernels.memory(problem.student.device) as memory:
        grid = kernels.grid(memory, problem)
        sums = memory.scratch((grid, len(entries.index)), zero=True) if entries is not None else None
        fields = {
            **options.fields(),
            "merge": options.merge,
            "epsilon": numerics.EPSILON,
            "weight_sums": memory.output(sums),
            "workspace": None,
            "plan": _plan_fields(memory, plan, entries),
        }
        # the gradient of W depends on which block adds what
        in_order = sums is not None
        losses = kernels.run_chunks(memory, "pkl", problem, student_grad, scale, labels, fields, in_order)
        if sums is not None:
            total = torch.empty(sums.shape[1], dtype=torch.float32, device=problem.student.device)
            parts = {"sums": memory.input(sums), "blocks": grid, "entries": sums.shape[1]}
            kernels.launch(memory, "sum_blocks", {**parts, "out": memory.output(total)}, 4 * memory.blocks)
    if weight_grad is not None and entries is not None:
        entries.add(total, weight_grad)
    return losses


def _plan_fields(memory: Memory, plan: Plan, entries: Entries | None) -> dict[str, Any]:
    """A `PklPlan` of csrc."""
    structure = plan.structure
    columns, rows = structure.column_lists, structure.row_lists
    names = ("stored", "count", "column_slot", "row_slot", "paired", "unpaired", "empty")
    return {
        "students": len(plan.row_slot),
        "teachers": len(plan.place),
        "columns": len(plan.stored),
        "rest": 0 if plan.unpaired is None else len(plan.unpaired),
        **{name: memory.input(getattr(plan, name)) for name in names},
        "column_lists": columns.fields(memory, plan.column_index, plan.column_weight, plan.column_wanted),
        "row_lists": rows.fields(memory, plan.row_index, plan.row_weight, None),
        "entry_row": memory.input(None if entries is None else entries.row),
        "entry_column": memory.input(None if entries is None else entries.column),
        "entries": 0 if entries is None else len(entries.index),
    }
