"""The backend "cpu": fields of the kernels' launchers, and the kernels that belong to no loss.

The kernels of a loss are called by the module `cpu` of its own folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtoken import _core
from xtoken.alignment import Chunks, Rows
from xtoken.losses import numerics, plain
from xtoken.losses.backends import Backend, Kernel, Labels, Problem, kernels_of
from xtoken.projection import column_set as plain_column_set

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)
"""Types of logits that the kernels take."""

DTYPES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (*ELEMENTS, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8)
}


class Array(NamedTuple):
    """A tensor as a field of a launcher takes it."""

    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    owner: object = None
    """Kept alive with the fields: a tensor, where nobody else has it."""


Fields = Mapping[str, Any]
"""Values by the names of a parameter struct in csrc: numbers, names, arrays, fields, or what `_core.build` made."""


def array(tensor: Tensor | None) -> Array | None:
    """A tensor's memory."""
    if tensor is None:
        return None
    return Array(tensor.data_ptr(), DTYPES[tensor.dtype], tuple(tensor.shape), tensor.stride(), tensor)


def unit_stride(logits: Tensor) -> Tensor:
    """The logits, copied if their rows are not contiguous."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def chunk_inputs(
    problem: Problem[Any], chunks: Chunks, make: Callable[[Tensor | None], Array | None]
) -> dict[str, Any]:
    """What `XTOKEN_CHUNKS` reads of a problem, for (some of) its chunks; `make` makes fields of tensors."""

    def rows_fields(rows: Rows) -> Fields:
        given = {"start": rows.start, "count": rows.count, "next": rows.next_ids, "before": rows.before}
        return {name: make(None if values is None else values.contiguous()) for name, values in given.items()}

    return {
        "student": make(unit_stride(problem.student)),
        "teacher": make(unit_stride(problem.teacher)),
        "student_rows": rows_fields(chunks.student),
        "teacher_rows": rows_fields(chunks.teacher),
        "chunks": len(chunks),
        "lowest": numerics.LOWEST_LOGIT,
    }


def run_chunks(
    name: str, problem: Problem[Any], student_grad: Tensor | None, scale: Tensor | None, level: str, fields: Fields
) -> Tensor:
    """The losses of all chunks, float32 [K], by a launcher with `XTOKEN_CHUNKS` and `fields`."""
    losses = torch.empty(len(problem.chunks), dtype=torch.float64, device="cpu")
    scales = array(None if scale is None else scale.detach().double().contiguous())
    common = {"grad": array(student_grad), "scale": scales, "losses": array(losses)}
    given = {**chunk_inputs(problem, problem.chunks, array), **common, **fields}
    _core.launch(name, given, level, torch.get_num_threads())
    return losses.float()


@contextmanager
def label_fields(labels: Labels | None) -> Iterator[Fields]:
    """Labels as fields, if there are any; their losses, in double precision until then, are handed over at the end."""
    if labels is None:
        yield {"ids": None, "scale": None, "losses": None}
        return
    ids = labels.ids.contiguous()
    losses = torch.empty(ids.shape, dtype=torch.float64, device="cpu")
    yield {"ids": array(ids), "scale": array(labels.scale.double()), "losses": array(losses)}
    labels.losses.copy_(losses)


def unsupported(problem: Problem[Any]) -> str | None:
    """Why the kernels, of either backend, cannot take a problem, or None."""
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
        plain.cross_entropy(student, labels, student_grad, factor)
        return
    if student_grad is not None and factor is not None and float(factor) != 1.0:
        student_grad.mul_(factor)
    logits = {"student": array(unit_stride(student)), "grad": array(student_grad), "lowest": numerics.LOWEST_LOGIT}
    with label_fields(labels) as given:
        _core.launch("cross_entropy", {**logits, "labels": given, "add": True}, level, torch.get_num_threads())


def column_set(logits: Tensor, top_k: int | None, *, level: str = "") -> Tensor:
    """`xtoken.reference.column_set` for logits [B, T, V], without a sort."""
    width = logits.shape[-1]
    if top_k is None or top_k >= width or logits.numel() == 0 or logits.dtype not in ELEMENTS:
        return plain_column_set(logits, top_k)
    ids = torch.empty(top_k, dtype=torch.int64, device="cpu")
    fields = {"logits": array(unit_stride(logits.detach())), "count": top_k, "ids": array(ids)}
    _core.launch("largest_columns", fields, level, torch.get_num_threads())
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
