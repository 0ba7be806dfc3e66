"""The backend "cuda": hands tensors to the kernels of csrc/cuda, on the current stream.

Nothing here waits for the device: not for the values of tensors, not for a kernel. Outputs and workspace come from
torch's allocator.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from xtoken import reference
from xtoken.losses._backends import SCALE, Backend, Labels, Problem, register_backend
from xtoken.losses._cpu_arguments import ELEMENTS, logits_layout, unit_stride
from xtoken.losses._cuda_gold import SORTED_ELEMENTS, GoldPlan, gold_plan_for, sorted_l1, unpaired_plan
from xtoken.losses._cuda_plan import Entries, Lists, Plan, entries_of, plan_for
from xtoken.losses._cuda_prefix import PrefixPlan, TokenLists, check_ids, prefix_plan_for
from xtoken.reference import Rows


def _built() -> Any:
    """The launchers of this build, None if it has none that load here."""
    try:
        return importlib.import_module("xtoken._cuda")
    except ImportError:
        return None


class Memory(Protocol):
    """Where the kernels of one call find their tensors."""

    launch: tuple[int, int, int]  # blocks of the large kernels, threads of a block, stream

    def input(self, tensor: Tensor | None) -> int:
        """The address of a tensor's values for the kernels, 0 for None."""
        ...

    def output(self, tensor: Tensor | None, keep: bool = False) -> int:
        """The address of a contiguous tensor that kernels fill, or (`keep`) change."""
        ...

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, zero: bool = False) -> Tensor:
        """Memory for kernels only; uninitialised or zero."""
        ...


class DeviceMemory:
    """The device's own: tensors are used where they are, and kept until the kernels are launched."""

    threads = 512

    def __init__(self, device: torch.device) -> None:
        blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self.launch = blocks, self.threads, torch.cuda.current_stream(device).cuda_stream
        self.device = device
        self.kept: list[Tensor] = []

    def input(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self.kept.append(tensor)
        return tensor.data_ptr()

    def output(self, tensor: Tensor | None, keep: bool = False) -> int:
        return self.input(tensor)

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, zero: bool = False) -> Tensor:
        make = torch.zeros if zero else torch.empty
        return make(shape, dtype=dtype, device=self.device)


@contextmanager
def device_memory(device: torch.device) -> Iterator[Memory]:
    """The memory of a CUDA device, which is the current one meanwhile."""
    with torch.cuda.device(device):
        yield DeviceMemory(device)


_Logits = tuple[int, str, int, int, int, int, int]


class Kernels:
    """The operations, on a module of launchers and the memory that it works on.

    Parameters
    ----------
    module : xtoken._cuda, or a module with the same functions
    memory : callable
        Opens the memory of a device for one call.
    """

    def __init__(self, module: Any, memory: Callable[[torch.device], AbstractContextManager[Memory]]) -> None:
        self.module, self.memory = module, memory

    def pkl(
        self,
        problem: Problem,
        student_grad: Tensor | None = None,
        weight_grad: Tensor | None = None,
        scale: Tensor | None = None,
        *labels: Labels,
    ) -> Tensor:
        """P-KL; the workspace is about a megabyte per block of the grid, whatever the number of rows."""
        options: Any = problem.options
        chunks = problem.chunks
        count, device = len(chunks), problem.student.device
        trained = problem.weight is not None or options.projection.weight.requires_grad
        plan = plan_for(options.projection, options.chosen, trained, options.count)
        wanted = labels[0] if labels else None
        losses = torch.empty(count, dtype=torch.float32, device=device)
        with self.memory(device) as memory:
            blocks, threads, stream = memory.launch
            student, grad = _logits(memory, problem.student), _gradient(memory, student_grad)
            entries = entries_of(plan, options.chosen) if weight_grad is not None else None
            arguments = self._plan(memory, plan, entries)
            grid = max(1, min(blocks, count))
            sums = memory.scratch((grid, len(entries.index)), zero=True) if entries is not None else None
            workspace = memory.scratch((grid, self.module.pkl_workspace(arguments, options.merge)))
            student_rows = _rows(memory, chunks.student)
            label_arguments = _labels(memory, wanted)
            self.module.pkl(
                arguments,
                student,
                _logits(memory, problem.teacher),
                grad,
                student_rows,
                _rows(memory, chunks.teacher),
                count,
                _floats(memory, scale),
                memory.output(losses),
                memory.output(sums),
                label_arguments,
                options.temperature,
                options.merge,
                options.reverse,
                reference.LOWEST_LOGIT,
                reference.EPSILON,
                memory.output(workspace),
                (grid, threads, stream),
            )
            if sums is not None:
                total = torch.empty(sums.shape[1], dtype=torch.float32, device=device)
                self.module.sum_blocks(
                    memory.input(sums), grid, sums.shape[1], memory.output(total), (4 * blocks, threads, stream)
                )
            if student_grad is not None or wanted is not None:
                self._other_rows(memory, student, grad, student_rows, chunks.student, label_arguments)
        if weight_grad is not None and entries is not None:
            entries.add(total, weight_grad)
        return losses

    def kd(
        self,
        problem: Problem,
        student_grad: Tensor | None = None,
        weight_grad: Tensor | None = None,
        scale: Tensor | None = None,
        *labels: Labels,
    ) -> Tensor:
        """KL for one shared tokenizer."""
        options: Any = problem.options
        chunks, device = problem.chunks, problem.student.device
        losses = torch.empty(len(chunks), dtype=torch.float32, device=device)
        columns, place = options.columns, None
        width = problem.student.shape[-1]
        if columns is not None:
            place = torch.full((width,), -1, dtype=torch.int32, device=device)
            place[columns] = torch.arange(len(columns), dtype=torch.int32, device=device)
        wanted = labels[0] if labels else None
        with self.memory(device) as memory:
            student, grad = _logits(memory, problem.student), _gradient(memory, student_grad)
            student_rows = _rows(memory, chunks.student)
            label_arguments = _labels(memory, wanted)
            self.module.kd(
                student,
                _logits(memory, problem.teacher),
                grad,
                student_rows[0],
                _rows(memory, chunks.teacher)[0],
                len(chunks),
                memory.input(None if columns is None else columns.to(torch.int32)),
                memory.input(place),
                width if columns is None else len(columns),
                _floats(memory, scale),
                memory.output(losses),
                label_arguments,
                options.temperature,
                options.reverse,
                reference.LOWEST_LOGIT,
                memory.launch,
            )
            if student_grad is not None or wanted is not None:
                self._other_rows(memory, student, grad, student_rows, chunks.student, label_arguments)
        return losses

    def gold(
        self,
        problem: Problem,
        student_grad: Tensor | None = None,
        weight_grad: Tensor | None = None,
        scale: Tensor | None = None,
        *labels: Labels,
    ) -> Tensor:
        """GOLD, H-KL and ULD: kernels around torch's sort, a group of chunks at a time; see `SORTED_ELEMENTS`."""
        options: Any = problem.options
        chunks, device = problem.chunks, problem.student.device
        shape = problem.student.shape[-1], problem.teacher.shape[-1]
        paired = options.operation == "gold"
        if paired:
            plan = gold_plan_for(options.student_ids, options.teacher_ids, shape)
        else:
            plan = unpaired_plan(shape, device)
        rest = len(plan.student_others), len(plan.teacher_others)
        compared = min(options.uncommon_top_k, *rest) if paired else max(rest)
        reverse = paired and options.reverse
        wanted = labels[0] if labels else None
        step = max(1, SORTED_ELEMENTS // max(1, sum(rest)))
        parts = []
        for first in range(0, len(chunks), step):
            last = min(len(chunks), first + step)
            count = last - first
            common = torch.empty(count, dtype=torch.float32, device=device)
            p, q = (torch.empty(count, size, dtype=torch.float32, device=device) for size in rest)
            with self.memory(device) as memory:
                given = self._gold(memory, problem, plan, first, last)
                outputs = [memory.output(tensor) for tensor in (common, p, q)]
                self.module.gold_forward(
                    *given[:5],
                    count,
                    options.temperature,
                    reverse,
                    reference.LOWEST_LOGIT,
                    given[5],
                    *outputs,
                    memory.launch,
                )
            uncommon, slope = sorted_l1(p, q, compared)
            parts.append(common + uncommon * options.temperature**2)
            if student_grad is None:
                continue
            with self.memory(device) as memory:
                given = self._gold(memory, problem, plan, first, last)
                self.module.gold_backward(
                    *given[:3],
                    _gradient(memory, student_grad, keep=True),
                    *given[3:5],
                    count,
                    _floats(memory, None if scale is None else scale[first:last]),
                    _labels(memory, wanted, keep=True),
                    options.temperature,
                    reverse,
                    reference.LOWEST_LOGIT,
                    given[5],
                    memory.input(slope),
                    memory.launch,
                )
        if student_grad is not None:
            with self.memory(device) as memory:
                student, grad = _logits(memory, problem.student), _gradient(memory, student_grad, keep=True)
                rows = _rows(memory, chunks.student)
                others = _labels(memory, wanted, keep=True)
                self._other_rows(memory, student, grad, rows, chunks.student, others)
        elif wanted is not None:
            self.cross_entropy(problem.student, wanted)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32, device=device)

    def _gold(self, memory: Memory, problem: Problem, plan: GoldPlan, first: int, last: int) -> tuple[Any, ...]:
        """Plan, logits, rows and workspace of a group of chunks."""
        widths = problem.student.shape[-1], problem.teacher.shape[-1]
        sides = [
            Rows(rows.start[first:last], rows.count[first:last])
            for rows in (problem.chunks.student, problem.chunks.teacher)
        ]
        pairs, rest = len(plan.student_pair), (len(plan.student_others), len(plan.teacher_others))
        return (
            (pairs, *rest, *(memory.input(tensor) for tensor in vars(plan).values())),
            _logits(memory, problem.student),
            _logits(memory, problem.teacher),
            *(_rows(memory, rows) for rows in sides),
            memory.output(memory.scratch((memory.launch[0], self.module.gold_workspace(*widths)))),
        )

    def prefix(
        self,
        problem: Problem,
        student_grad: Tensor | None = None,
        weight_grad: Tensor | None = None,
        scale: Tensor | None = None,
        *labels: Labels,
    ) -> Tensor:
        """Prefix KL; the workspace is about 150 KB per block of the grid for vocabularies of 150,000."""
        options: Any = problem.options
        chunks = problem.chunks
        count, device = len(chunks), problem.student.device
        check_ids(chunks, (problem.student.shape[-1], problem.teacher.shape[-1]))
        plan = prefix_plan_for(options.pieces, device)
        wanted = labels[0] if labels else None
        losses = torch.empty(count, dtype=torch.float32, device=device)
        with self.memory(device) as memory:
            blocks, threads, stream = memory.launch
            student, grad = _logits(memory, problem.student), _gradient(memory, student_grad)
            arguments = _prefix_plan(memory, plan)
            grid = max(1, min(blocks, count))
            workspace = memory.scratch((grid, self.module.prefix_workspace(arguments)))
            student_rows = _rows(memory, chunks.student)
            label_arguments = _labels(memory, wanted)
            self.module.prefix(
                arguments,
                student,
                _logits(memory, problem.teacher),
                grad,
                student_rows,
                _rows(memory, chunks.teacher),
                count,
                _floats(memory, scale),
                memory.output(losses),
                label_arguments,
                options.temperature,
                options.reverse,
                reference.LOWEST_LOGIT,
                memory.output(workspace),
                (grid, threads, stream),
            )
            if student_grad is not None or wanted is not None:
                self._other_rows(memory, student, grad, student_rows, chunks.student, label_arguments)
        return losses

    def cross_entropy(
        self, student: Tensor, labels: Labels, student_grad: Tensor | None = None, factor: Tensor | None = None
    ) -> None:
        """See `xtoken.losses._backends.CrossEntropy`. With a gradient and a scale of 0 there are no losses either."""
        with self.memory(student.device) as memory:
            self.module.cross_entropy(
                _logits(memory, student),
                _gradient(memory, student_grad, keep=True),
                _labels(memory, labels, keep=True),
                reference.LOWEST_LOGIT,
                student_grad is not None,
                _floats(memory, factor),
                0,
                memory.launch,
            )

    def scale(self, grad: Tensor, factor: Tensor) -> None:
        """``grad *= factor`` for a contiguous gradient; reads and writes nothing for a factor of 1."""
        if grad.dtype not in ELEMENTS or not grad.is_contiguous():
            grad.mul_(factor)
            return
        with self.memory(grad.device) as memory:
            address = memory.output(grad, keep=True)
            self.module.scale(
                address, ELEMENTS[grad.dtype], grad.numel(), memory.input(factor.detach().float()), memory.launch
            )

    def _other_rows(
        self, memory: Memory, student: _Logits, grad: _Logits, rows: tuple[int, int, int], chunks: Rows, labels: Any
    ) -> None:
        """Rows of no chunk: zeros, or the cross-entropy's gradient."""
        covered = memory.scratch((student[2] * student[3],), torch.uint8, zero=True)
        address = memory.output(covered)
        self.module.mark_rows(rows[0], rows[1], len(chunks.start), address, memory.launch)
        self.module.cross_entropy(student, grad, labels, reference.LOWEST_LOGIT, False, 0, address, memory.launch)

    def _plan(self, memory: Memory, plan: Plan, entries: Entries | None) -> tuple[Any, ...]:
        """The argument of `pkl`, with the sums of W's rows in the columns."""
        structure, students = plan.structure, len(plan.row_slot)
        row_weight = memory.scratch((students,))
        blocks, threads, stream = memory.launch
        self.module.row_weights(
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
            _lists(
                memory, structure.column_lists, structure.column_lists.index, plan.column_weight, plan.column_wanted
            ),
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


def _logits(memory: Memory, logits: Tensor) -> _Logits:
    given = unit_stride(logits)
    return memory.input(given), *logits_layout(given)


def _gradient(memory: Memory, grad: Tensor | None, keep: bool = False) -> _Logits:
    return memory.output(grad, keep), *logits_layout(grad)


def _rows(memory: Memory, rows: Rows) -> tuple[int, int, int]:
    next_ids = None if rows.next_ids is None else rows.next_ids.contiguous()
    return memory.input(rows.start.contiguous()), memory.input(rows.count.contiguous()), memory.input(next_ids)


def _labels(memory: Memory, labels: Labels | None, keep: bool = False) -> tuple[int, int, int]:
    if labels is None:
        return 0, 0, 0
    return memory.input(labels.ids.contiguous()), memory.input(labels.scale), memory.output(labels.losses, keep)


def _floats(memory: Memory, values: Tensor | None) -> int:
    return memory.input(None if values is None else values.detach().float().contiguous())


def unsupported(problem: Problem) -> str | None:
    """Why the kernels cannot take a problem, or None."""
    for name, logits in (("student_logits", problem.student), ("teacher_logits", problem.teacher)):
        if logits.dtype not in ELEMENTS:
            known = ", ".join(map(str, ELEMENTS))
            return f"{name}: expected one of {known}, got {logits.dtype}"
    return None


def backend(name: str, kernels: Kernels, device_type: str) -> Backend:
    """The kernels as a backend for tensors of this type of device."""

    def missing(device: torch.device) -> str | None:
        return None if device.type == device_type else f"it works on {device_type.upper()} tensors, got {device}"

    operations: dict[str, Any] = {
        "pkl": kernels.pkl, "kd": kernels.kd, "gold": kernels.gold, "uld": kernels.gold, "prefix": kernels.prefix,
    }  # fmt: skip
    return Backend(
        name,
        operations,
        missing,
        unsupported,
        kernels.cross_entropy,
        fused_labels=frozenset(operations),
        masked=frozenset(["kd"]),
    )


if (_module := _built()) is not None:
    _kernels = Kernels(_module, device_memory)
    register_backend(backend("cuda", _kernels, "cuda"))
    SCALE["cuda"] = _kernels.scale
