"""The backend "reference": the formulas in plain PyTorch, block by block, on any device.

The only file that touches torch's private dispatcher: autograd has to record inside an operator, where torch has
switched that off. Tested with the versions of torch that the README names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtoken.alignment import Chunks
from xtoken.losses.backends import IGNORED, Backend, Kernel, Labels, Problem
from xtoken.losses.loss import REGISTER
from xtoken.losses.numerics import scaled, temporary_elements
from xtoken.projection import column_set


class Block(NamedTuple):
    """Consecutive chunks with copies of their rows, numbered within those copies."""

    span: slice
    chunks: Chunks
    student_index: tuple[Tensor, Tensor]
    student: Tensor
    teacher: Tensor


def blocks(student: Tensor, teacher: Tensor, chunks: Chunks) -> Iterator[Block]:
    """The chunks in groups of about `TEMPORARY_ELEMENTS` logits; a group holds at least one whole chunk."""
    student_length, teacher_length = student.shape[1], teacher.shape[1]
    cost = chunks.student.count * student.shape[2] + chunks.teacher.count * teacher.shape[2]
    group = (cost.cumsum(0) - 1) // temporary_elements(cost.device)
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


_AUTOGRAD_KEYS = [
    key
    for name in ("AutogradFunctionality", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutogradOther")
    if (key := getattr(torch._C.DispatchKey, name, None)) is not None
]


@contextmanager
def _autograd_recording(wanted: bool) -> Iterator[None]:
    """Records operations for autograd, also inside an operator."""
    if not wanted:
        with torch.no_grad():
            yield
        return
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def run(
    problem: Problem[Any],
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
) -> Tensor:
    """Any loss by its formula; each block is differentiated at once by autograd."""
    parts = []
    for block in blocks(problem.student, problem.teacher, problem.chunks):
        weight = problem.weight if problem.weight is None else problem.weight.detach()
        wanted = []
        if student_grad is not None:
            wanted.append(block.student.requires_grad_())
        if weight_grad is not None and weight is not None:
            wanted.append(weight.requires_grad_())
        given = () if weight is None else (weight,)
        with _autograd_recording(bool(wanted)):
            losses = problem.options.losses(block.student, block.teacher, block.chunks, *given)
        parts.append(losses.detach())
        if wanted:
            upstream = torch.ones_like(losses) if scale is None else scale[block.span].to(losses.dtype)
            grads = list(torch.autograd.grad(losses, wanted, upstream))
            if student_grad is not None:
                student_grad[..., : problem.student.shape[2]][block.student_index] = grads.pop(0)
            if weight_grad is not None:
                weight_grad += grads.pop(0)
    if student_grad is not None:  # last, so that the gradient may take the place of the logits
        unused = torch.ones(student_grad.shape[:2], dtype=torch.bool, device=student_grad.device)
        unused.view(-1)[problem.chunks.student.index()] = False
        student_grad[unused] = 0
        student_grad[..., problem.student.shape[2] :] = 0
    return torch.cat(parts) if parts else problem.student.new_zeros(0, dtype=problem.dtype)


def cross_entropy(
    student: Tensor, labels: Labels, student_grad: Tensor | None = None, factor: Tensor | None = None
) -> None:
    """Cross-entropy in plain PyTorch, block by block; see `xtoken.losses.backends.CrossEntropy`."""
    if student_grad is not None and factor is not None:
        student_grad.mul_(factor)
    rows = labels.ids.numel()
    labels.losses.zero_()
    labelled = (labels.ids != IGNORED).nonzero()[:, 0]
    length = student.shape[1]
    step = max(1, temporary_elements(student.device) // max(1, student.shape[2]))
    flat = None if student_grad is None else student_grad.view(rows, student_grad.shape[2])[:, : student.shape[2]]
    for index in labelled.split(step):
        logits = scaled(student[index // length, index % length], 1.0, labels.losses.dtype)
        label = labels.ids[index, None]
        log_p = logits.log_softmax(-1)
        labels.losses[index] = -log_p.gather(1, label)[:, 0]
        if flat is not None:
            grad = log_p.exp_().scatter_add_(1, label, -torch.ones_like(label, dtype=log_p.dtype)).mul_(labels.scale)
            flat[index] = (flat[index] + grad).to(flat.dtype)


def backend(name: str = "reference") -> Backend:
    """The formulas as a backend for every device."""
    kernel = Kernel(run)
    return Backend(
        name, lambda loss: kernel if loss in REGISTER else None, lambda device: None, cross_entropy, column_set
    )
