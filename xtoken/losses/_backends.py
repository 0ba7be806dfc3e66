"""Backends: who computes a loss. A table of operations with one signature, and the rule that picks one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from xtoken.reference import Chunks

BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Logits that the reference backend works on at a time, by device type; its temporaries are of that size."""


class Options(Protocol):
    """Everything about one call of a loss that is not a logit, a weight or a chunk; a frozen dataclass."""

    operation: ClassVar[str]

    def reference(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None) -> Tensor:
        """The loss of each chunk [K] by `xtoken.reference`; logits are matrices of rows."""
        ...


@dataclass(frozen=True)
class Problem:
    """One call of a loss.

    Parameters
    ----------
    student : [B, T_s, V_student]
        Vocabulary columns only; any strides. Row ``r`` of `chunks` is ``student[r // T_s, r % T_s]``.
    teacher : [B, T_t, V_teacher]
    chunks : Chunks
    options : Options
    weight : [E], optional
        Weights of W in the column set (P-KL).
    """

    student: Tensor
    teacher: Tensor
    chunks: Chunks
    options: Options
    weight: Tensor | None = None


class Operation(Protocol):
    """Computes the loss of every chunk and, into buffers of the caller, gradients.

    Parameters
    ----------
    problem : Problem
    student_grad : like ``problem.student``, zero, optional
        Receives ``sum_k scale_k d loss_k / d student``.
    weight_grad : like ``problem.weight``, zero, optional
        Receives ``sum_k scale_k d loss_k / d weight``.
    scale : [K], optional
        Default: ones.

    Returns
    -------
    Tensor
        [K], in the promoted type of the logits and float32.
    """

    def __call__(
        self,
        problem: Problem,
        student_grad: Tensor | None = None,
        weight_grad: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """A named table of operations.

    Parameters
    ----------
    name : str
    operations : mapping from an operation's name ("pkl", "gold", "uld", "kd") to an `Operation`
    missing : callable
        Why it cannot work on a device, or None if it can.
    """

    name: str
    operations: Mapping[str, Operation]
    missing: Callable[[torch.device], str | None]


class Block(NamedTuple):
    """Consecutive chunks with copies of their rows, numbered within those copies."""

    span: slice
    chunks: Chunks
    student_index: tuple[Tensor, Tensor]
    student: Tensor
    teacher: Tensor


def blocks(student: Tensor, teacher: Tensor, chunks: Chunks) -> Iterator[Block]:
    """The chunks in groups of about `BLOCK_ELEMENTS` logits; a group holds at least one whole chunk."""
    student_length, teacher_length = student.shape[1], teacher.shape[1]
    cost = chunks.student.count * student.shape[2] + chunks.teacher.count * teacher.shape[2]
    group = (cost.cumsum(0) - 1) // BLOCK_ELEMENTS.get(cost.device.type, BLOCK_ELEMENTS["cpu"])
    sizes = group.unique_consecutive(return_counts=True)[1].tolist()
    start = 0
    for size in sizes:
        stop = start + size
        student_rows, student_row = chunks.student.block(start, stop)
        teacher_rows, teacher_row = chunks.teacher.block(start, stop)
        student_index = student_row // student_length, student_row % student_length
        teacher_index = teacher_row // teacher_length, teacher_row % teacher_length
        yield Block(
            slice(start, stop),
            Chunks(student_rows, teacher_rows, chunks.used[start:stop]),
            student_index,
            student.detach()[student_index],
            teacher.detach()[teacher_index],
        )
        start = stop


def run_reference(
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The formulas of `xtoken.reference`, block by block, each block differentiated at once by autograd."""
    parts = []
    for block in blocks(problem.student, problem.teacher, problem.chunks):
        weight = problem.weight if problem.weight is None else problem.weight.detach()
        wanted = []
        if student_grad is not None:
            wanted.append(block.student.requires_grad_())
        if weight_grad is not None and weight is not None:
            wanted.append(weight.requires_grad_())
        with torch.set_grad_enabled(bool(wanted)):
            losses = problem.options.reference(block.student, block.teacher, block.chunks, weight)
        parts.append(losses.detach())
        if wanted:
            upstream = torch.ones_like(losses) if scale is None else scale[block.span].to(losses.dtype)
            grads = list(torch.autograd.grad(losses, wanted, upstream))
            if student_grad is not None:
                student_grad[block.student_index] = grads.pop(0)
            if weight_grad is not None:
                weight_grad += grads.pop(0)
    if parts:
        return torch.cat(parts)
    dtype = torch.promote_types(torch.promote_types(problem.student.dtype, problem.teacher.dtype), torch.float32)
    return problem.student.new_zeros(0, dtype=dtype)


_BACKENDS: dict[str, Backend] = {}
_NOT_BUILT = {
    "cpu": "this build of xtoken has no CPU kernels",
    "cuda": "this build of xtoken has no CUDA kernels",
}


def register_backend(backend: Backend) -> None:
    """Add a backend, or replace the one of the same name. ``"auto"`` prefers those that were added later."""
    if backend.name == "auto":
        raise ValueError("backend: the name 'auto' is reserved")
    _BACKENDS[backend.name] = backend


def unregister_backend(name: str) -> None:
    """Remove a backend."""
    del _BACKENDS[name]


def backend_names() -> tuple[str, ...]:
    """Backends of this build; ``"auto"`` prefers the later ones."""
    return tuple(_BACKENDS)


def select_backend(requested: str, device: torch.device | str, operation: str | None = None) -> str:
    """The name of the backend that computes a loss.

    Parameters
    ----------
    requested : str
        ``"auto"``, or a backend's name.
    device : torch.device
        Where the logits are.
    operation : str, optional
        ``"pkl"``, ``"gold"`` (H-KL too), ``"uld"`` or ``"kd"``; default: any.

    Returns
    -------
    str
        For ``"auto"`` the fastest backend that works on the device, ``"reference"`` if there is no other.

    Raises
    ------
    ValueError
        If there is no backend of that name at all.
    RuntimeError
        If the backend exists but cannot do this; the message says why.
    """
    device = torch.device(device)
    if requested == "auto":
        for name in reversed(_BACKENDS):
            if _reason(name, device, operation) is None:
                return name
        raise RuntimeError(f"backend: none has the operation {operation!r}")
    if requested not in _BACKENDS and requested not in _NOT_BUILT:
        known = ", ".join(repr(name) for name in dict.fromkeys(["auto", *_BACKENDS, *_NOT_BUILT]))
        raise ValueError(f"backend: expected one of {known}, got {requested!r}")
    reason = _reason(requested, device, operation)
    if reason is not None:
        raise RuntimeError(f"backend: {requested!r} is not available: {reason}")
    return requested


def operation_of(requested: str, device: torch.device, operation: str) -> Operation:
    """The operation of the selected backend."""
    return _BACKENDS[select_backend(requested, device, operation)].operations[operation]


def _reason(name: str, device: torch.device, operation: str | None) -> str | None:
    if name not in _BACKENDS:
        return _NOT_BUILT[name]
    backend = _BACKENDS[name]
    if operation is not None and operation not in backend.operations:
        return f"it has no operation {operation!r}"
    return backend.missing(device)


register_backend(Backend("reference", dict.fromkeys(("pkl", "gold", "uld", "kd"), run_reference), lambda device: None))
