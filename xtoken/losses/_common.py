"""What all losses share: argument checks, the autograd function, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xtoken.alignment import Alignment
from xtoken.losses._backends import Operation, Problem, operation_of
from xtoken.reference import Chunks, Rows

SCALED_ROWS = 256
"""Rows that backward scales at a time; bounds the float32 copies that torch makes of half-precision rows."""


class ChunkLoss(torch.autograd.Function):
    """Losses of all chunks [K]; forward also computes the gradient of the student's logits, backward scales
    it.

    A row of the student belongs to at most one chunk, so scaling each row by its chunk's upstream gradient is
    exact. Weights of W are shared by all chunks: if they need a gradient, it is computed in backward, from
    the saved inputs.
    """

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, weight: Tensor | None, problem: Problem, run: Operation) -> Tensor:
        ctx.problem, ctx.run = problem, run
        ctx.needs_student, ctx.needs_weight = ctx.needs_input_grad[:2]
        if ctx.needs_weight:
            ctx.save_for_backward(student_logits, problem.teacher, weight)
            return run(problem)
        grad = student_logits.new_zeros(student_logits.shape)
        losses = run(problem, _vocabulary_part(grad, problem))
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _weight_backward(ctx, upstream) if ctx.needs_weight else _student_backward(ctx, upstream)
        if torch.is_grad_enabled():
            grads = [grad if grad is None else _OnceOnly.apply(grad.requires_grad_()) for grad in grads]
        return *grads, None, None


class _OnceOnly(torch.autograd.Function):
    """Identity that cannot be differentiated, so that a second derivative is an error, not a zero."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        raise RuntimeError(
            "xtoken losses have no second derivative: the gradient is computed in forward; "
            "differentiate the formulas in xtoken.reference instead"
        )


def _student_backward(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    (grad,) = ctx.saved_tensors
    scaled = torch.empty_like(grad)
    rows = _row_scale(ctx.problem.chunks.student, upstream, grad.shape[:-1].numel())
    flat = (grad.flatten(0, -2), rows[:, None], scaled.flatten(0, -2))
    for part, scale, out in zip(*(tensor.split(SCALED_ROWS) for tensor in flat), strict=True):
        torch.mul(part, scale, out=out)
    return [scaled, None]


def _weight_backward(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    student_logits, _, weight = ctx.saved_tensors
    student_grad = student_logits.new_zeros(student_logits.shape) if ctx.needs_student else None
    weight_grad = torch.zeros_like(weight)
    part = None if student_grad is None else _vocabulary_part(student_grad, ctx.problem)
    ctx.run(ctx.problem, part, weight_grad, upstream)
    return [student_grad, weight_grad]


def _vocabulary_part(grad: Tensor, problem: Problem) -> Tensor:
    return grad.view(problem.student.shape[:2] + grad.shape[-1:])[..., : problem.student.shape[2]]


def _row_scale(rows: Rows, scale: Tensor, count: int) -> Tensor:
    scales = scale.new_zeros(count)
    scales[rows.index()] = scale[rows.owner()]
    return scales


def chunk_losses(student_logits: Tensor, problem: Problem, weight: Tensor | None, backend: str) -> Tensor:
    """Loss of each chunk [K], connected to ``student_logits`` and ``weight`` where they need a gradient."""
    run = operation_of(backend, student_logits.device, problem.options.operation)
    needed = student_logits.requires_grad or (weight is not None and weight.requires_grad)
    if torch.is_grad_enabled() and needed:
        losses: Tensor = ChunkLoss.apply(student_logits, weight, problem, run)
        return losses
    return run(problem)


def reduce(losses: Tensor, chunks: Chunks, total: int, reduction: str) -> Tensor:
    """``"mean"`` over the chunks used, ``"sum"``, or ``"none"``: [total], zero where a chunk was not used."""
    if reduction == "none":
        return losses.new_zeros(total).index_copy(0, chunks.used, losses)
    return losses.sum() / max(len(losses), 1) if reduction == "mean" else losses.sum()


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Same device, same number of dimensions (2 or 3), same batch, floating point."""
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        if logits.dim() not in (2, 3):
            raise ValueError(f"{name}: expected shape [B, T, V] or [T, V], got {list(logits.shape)}")
    if student_logits.device != teacher_logits.device:
        raise ValueError(
            f"teacher_logits: expected the device of student_logits ({student_logits.device}), "
            f"got {teacher_logits.device}"
        )
    if student_logits.shape[:-2] != teacher_logits.shape[:-2]:
        raise ValueError(
            f"teacher_logits: expected the batch of student_logits {list(student_logits.shape)}, "
            f"got {list(teacher_logits.shape)}"
        )


def check_projection(projection: Any) -> None:
    """A matrix in compressed rows; by its attributes, so that a module with trainable weights is one too."""
    if not all(hasattr(projection, name) for name in ("row_ptr", "col", "weight", "shape")):
        raise TypeError(f"projection: expected an xtoken.ProjectionMatrix, got {type(projection).__name__}")


def vocabulary_columns(logits: Tensor, size: int | None, name: str) -> Tensor:
    """``logits`` as detached [B, T, size]: a view without the extra columns of a padded output layer."""
    logits = logits.detach()
    logits = logits if logits.dim() == 3 else logits[None]
    if size is None:
        return logits
    if logits.shape[-1] < size:
        raise ValueError(
            f"{name}: expected at least {size} columns (the vocabulary), got {logits.shape[-1]} "
            f"in shape {list(logits.shape)}"
        )
    return logits[..., :size]


def aligned_chunks(alignment: Alignment, student: Tensor, teacher: Tensor, realised: bool = False) -> Chunks:
    """The chunks of an alignment that fits the logits [B, T, V]."""
    if not isinstance(alignment, Alignment):
        raise TypeError(f"alignment: expected an xtoken.Alignment, got {type(alignment).__name__}")
    if len(alignment) != student.shape[0]:
        raise ValueError(
            f"alignment: expected {student.shape[0]} samples (the batch of the logits), got {len(alignment)}"
        )
    return Chunks.of(alignment, student.shape[1], teacher.shape[1], student.device, realised)


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_temperature(value: float) -> None:
    """Positive and finite."""
    if not 0.0 < value < float("inf"):
        raise ValueError(f"temperature: expected a positive finite number, got {value!r}")


def check_count(value: int | None, name: str, optional: bool = False) -> None:
    """An integer of at least 1, or None where that is allowed."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1{' or None' if optional else ''}, got {value!r}")


REDUCTIONS = ("mean", "sum", "none")
