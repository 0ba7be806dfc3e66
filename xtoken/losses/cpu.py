"""The backend "cpu": the kernels of csrc/cpu, and tensors as they take them: addresses, types, shapes and strides.

The kernels of a loss are called by the module `cpu` of its own folder.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xtoken import _core
from xtoken.alignment import Rows
from xtoken.losses import numerics, plain
from xtoken.losses.backends import Backend, Kernel, Labels, Problem, kernels_of
from xtoken.projection import column_set as plain_column_set

ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Types of logits that the kernels take."""

_T = TypeVar("_T")


class Layouts(Generic[_T]):
    """What is made of tensors, each kept for as long as the first of its tensors lives."""

    def __init__(self) -> None:
        self._kept: Any = WeakIdKeyDictionary()

    def of(self, tensors: tuple[Tensor, ...], make: Callable[[], _T], *others: Any) -> _T:
        """`make()`, or its last result for the first tensor, if all are the same, unchanged, and `others` equal."""
        key = [tensor._version for tensor in tensors], others
        kept = self._kept.get(tensors[0])
        if kept is None or kept[0] != key or any(ref() is not t for ref, t in zip(kept[1], tensors, strict=True)):
            kept = self._kept[tensors[0]] = key, [weakref.ref(tensor) for tensor in tensors], make()
        made: _T = kept[2]
        return made


_Logits = tuple[int, str, int, int, int, int, int]
_Rows = tuple[int, int, int]


def unit_stride(logits: Tensor) -> Tensor:
    """The logits, copied if their columns do not follow each other in memory."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def logits_argument(logits: Tensor | None) -> _Logits:
    """(address, type, B, T, V, stride of a sample, stride of a row) of logits [B, T, V]."""
    return 0 if logits is None else logits.data_ptr(), *logits_layout(logits)


def logits_layout(logits: Tensor | None) -> tuple[str, int, int, int, int, int]:
    """`logits_argument` without the address."""
    if logits is None:
        return "float32", 0, 1, 0, 0, 0
    samples, length, width = logits.shape
    sample_stride, row_stride, _ = logits.stride()
    return ELEMENTS[logits.dtype], samples, max(length, 1), width, sample_stride, row_stride


def rows_argument(rows: Rows) -> tuple[_Rows, list[Tensor]]:
    """Addresses of (start, count, realised ids or 0), and the tensors to keep alive during the call."""
    kept = [rows.start.contiguous(), rows.count.contiguous()]
    if rows.next_ids is not None:
        kept.append(rows.next_ids.contiguous())
    addresses = [tensor.data_ptr() for tensor in kept] + [0] * (3 - len(kept))
    return (addresses[0], addresses[1], addresses[2]), kept


class ChunkArguments:
    """What the kernels over chunks have in common: logits, predictor rows, factors, and room for the losses."""

    argument: tuple[_Logits, _Logits, _Logits, _Rows, _Rows, int, int, int]

    def __init__(self, problem: Problem, student_grad: Tensor | None, scale: Tensor | None) -> None:
        student, teacher = unit_stride(problem.student), unit_stride(problem.teacher)
        student_rows, kept_student = rows_argument(problem.chunks.student)
        teacher_rows, kept_teacher = rows_argument(problem.chunks.teacher)
        factors = None if scale is None else scale.detach().double().contiguous()
        self._kept = student, teacher, student_grad, factors, kept_student, kept_teacher  # alive during the call
        self._losses = torch.empty(len(problem.chunks), dtype=torch.float64)
        self.argument = (
            logits_argument(student),
            logits_argument(teacher),
            logits_argument(student_grad),
            student_rows,
            teacher_rows,
            len(problem.chunks),
            0 if factors is None else factors.data_ptr(),
            self._losses.data_ptr(),
        )

    def losses(self) -> Tensor:
        """float32 [K]: what the kernel has written."""
        return self._losses.float()


class LabelBuffers:
    """Labels as a kernel takes them, if there are any, with room for its results in double precision."""

    argument: tuple[int, float, int] = 0, 0.0, 0

    def __init__(self, labels: Labels | None = None) -> None:
        self._labels = labels
        if labels is not None:
            self._ids = labels.ids.contiguous()
            self._losses = torch.empty(self._ids.shape, dtype=torch.float64)
            self.argument = self._ids.data_ptr(), float(labels.scale), self._losses.data_ptr()

    def finish(self) -> None:
        """Hands the results over."""
        if self._labels is not None:
            self._labels.losses.copy_(self._losses)


def unsupported(problem: Problem) -> str | None:
    """Why the kernels cannot take a problem, or None."""
    for name, logits in (("student_logits", problem.student), ("teacher_logits", problem.teacher)):
        if logits.dtype not in ELEMENTS:
            known = ", ".join(map(str, ELEMENTS))
            return f"{name}: expected one of {known}, got {logits.dtype}"
    return None


def run_cross_entropy(
    student: Tensor,
    labels: Labels,
    student_grad: Tensor | None = None,
    factor: Tensor | None = None,
    *,
    level: str = "",
) -> None:
    """See `CrossEntropy`; logits of types that the kernels do not take are left to plain PyTorch."""
    if student.dtype not in ELEMENTS:
        return plain.cross_entropy(student, labels, student_grad, factor)
    if student_grad is not None and factor is not None and float(factor) != 1.0:
        student_grad.mul_(factor)
    student = unit_stride(student)
    buffers = LabelBuffers(labels)
    _core.cpu_cross_entropy(
        logits_argument(student),
        logits_argument(student_grad),
        buffers.argument,
        numerics.LOWEST_LOGIT,
        level,
        torch.get_num_threads(),
    )
    return buffers.finish()


def column_set(logits: Tensor, top_k: int | None, *, level: str = "") -> Tensor:
    """`xtoken.reference.column_set` for logits [B, T, V], without a sort."""
    width = logits.shape[-1]
    if top_k is None or top_k >= width or logits.numel() == 0 or logits.dtype not in ELEMENTS:
        return plain_column_set(logits, top_k)
    logits = unit_stride(logits.detach())
    ids = torch.empty(top_k, dtype=torch.int64)
    _core.cpu_largest_columns(logits_argument(logits), top_k, ids.data_ptr(), level, torch.get_num_threads())
    return ids


def backend(name: str = "cpu", level: str = "") -> Backend:
    """The kernels of one level ("avx512", "avx2", "portable"; "": the default) as a backend."""

    def missing(device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"it works on CPU tensors, got {device}"

    def kernel(loss: str) -> Kernel | None:
        module = kernels_of(loss, "cpu")
        if module is None:
            return None
        return Kernel(functools.partial(module.run, level=level), getattr(module, "FUSES_LABELS", True))

    return Backend(
        name,
        kernel,
        missing,
        functools.partial(run_cross_entropy, level=level),
        functools.partial(column_set, level=level),
        unsupported,
    )
