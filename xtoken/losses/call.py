"""What all losses share: argument checks, and the way from arguments to the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.backends import check_backend
from xtoken.losses.logits import AnyLogits, DenseSource, LinearLogits, LinearSource, Source, TopKLogits, TopKSource
from xtoken.losses.operator import Expected, Inputs, Settings, run

REDUCTIONS = ("mean", "sum", "none")

Losses = Tensor | tuple[Tensor, Tensor]
"""The loss, or with ``labels=`` (the loss, the cross-entropy)."""


def compute(
    operation: str,
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment | None,
    *,
    sizes: tuple[int | None, int | None],
    projection: Any = None,
    pieces: Tensor | None = None,
    mask: Tensor | None = None,
    columns: Any = None,
    labels: Tensor | Expected | None = None,
    reduction: str,
    backend: str,
    inplace: bool = False,
    **settings: Any,
) -> Losses:
    """Checks what every loss has, and calls the operator; `sizes` are the vocabularies (None: all columns)."""
    expected = None
    if isinstance(labels, Expected):
        expected, labels = labels, labels.labels
    check_logits(student_logits, teacher_logits)
    check_temperature(settings["temperature"])
    check_choice(reduction, "reduction", REDUCTIONS)
    check_backend(backend)
    if isinstance(student_logits, TopKLogits):
        raise TypeError("student_logits: expected logits or LinearLogits, which have a gradient, got TopKLogits")
    student_size = _vocabulary_size(student_logits, sizes[0], "student_logits")
    teacher_size = _vocabulary_size(teacher_logits, sizes[1], "teacher_logits")
    student, teacher = _tensors(student_logits), _tensors(teacher_logits)
    if alignment is not None:
        check_alignment(alignment, student.rows.shape[0])
    if labels is not None:
        labels = checked_labels(student_logits, labels)
        if reduction == "none":
            raise ValueError("labels: expected reduction='mean' or 'sum' with labels, got 'none'")
    if inplace:
        _check_inplace(student_logits, labels, projection)
    host = None if alignment is None else alignment.host
    realised = operation == "prefix" or settings.get("merge") == "chain"
    inputs = Inputs(
        student.rows,
        student.head,
        student.bias,
        teacher.rows.detach(),
        None if teacher.head is None else teacher.head.detach(),
        None if teacher.bias is None else teacher.bias.detach(),
        teacher.top,
        None if host is None else host.spans,
        None if host is None else host.offsets,
        mask if host is None else host.predicted,
        _batched(host.student_ids) if realised and host is not None else None,
        _batched(host.teacher_ids) if realised and host is not None else None,
        None if alignment is None else alignment._flat,
        None if projection is None else projection.row_ptr,
        None if projection is None else projection.col,
        None if projection is None else projection.weight,
        None if columns is None else torch.as_tensor(columns),
        pieces,
        labels,
    )
    tail = teacher_logits.tail if isinstance(teacher_logits, TopKLogits) else ""
    loss, cross_entropy = run(
        inputs,
        Settings(operation, backend, reduction, student_size, teacher_size, tail=tail, **settings),
        inplace,
        expected,
    )
    return loss if labels is None else (loss, cross_entropy)


class _Tensors(NamedTuple):
    rows: Tensor  # [B, T, ...]
    head: Tensor | None = None
    bias: Tensor | None = None
    top: Tensor | None = None


def _tensors(logits: AnyLogits) -> _Tensors:
    if isinstance(logits, LinearLogits):
        return _Tensors(_rows(logits.hidden), logits.weight, logits.bias)
    if isinstance(logits, TopKLogits):
        return _Tensors(_rows(logits.logprobs), top=_rows(logits.ids))
    return _Tensors(_rows(logits))


def _rows(values: Tensor) -> Tensor:
    return values if values.dim() == 3 else values[None]


def _batched(ids: Tensor | None) -> Tensor | None:
    return ids if ids is None or ids.dim() == 2 else ids[None]


def source(logits: AnyLogits, size: int) -> Source:
    """The rows of logits of any kind, without a gradient and without columns that belong to no token."""
    rows, head, bias, top = (None if part is None else part.detach() for part in _tensors(logits))
    assert rows is not None
    if head is not None:
        return LinearSource(rows, head, bias, size)
    if top is not None:
        assert isinstance(logits, TopKLogits)
        return TopKSource(top, rows, logits.tail, size)
    return DenseSource(rows, size)


def leading_shape(logits: AnyLogits) -> torch.Size:
    """[B, T] or [T]."""
    if isinstance(logits, LinearLogits):
        return logits.hidden.shape[:-1]
    if isinstance(logits, TopKLogits):
        return logits.ids.shape[:-1]
    return logits.shape[:-1]


def device_of(logits: AnyLogits) -> torch.device:
    """Where the logits are."""
    if isinstance(logits, LinearLogits):
        return logits.hidden.device
    return logits.logprobs.device if isinstance(logits, TopKLogits) else logits.device


def width_of(logits: AnyLogits) -> int | None:
    """Columns; None where that is not known."""
    if isinstance(logits, LinearLogits):
        return logits.weight.shape[0]
    return None if isinstance(logits, TopKLogits) else logits.shape[-1]


def check_logits(student_logits: AnyLogits, teacher_logits: AnyLogits) -> None:
    """Same device, same number of dimensions (2 or 3), same batch, floating point."""
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if isinstance(logits, (TopKLogits, LinearLogits)):
            continue
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        if logits.dim() not in (2, 3):
            raise ValueError(f"{name}: expected shape [B, T, V] or [T, V], got {list(logits.shape)}")
    if device_of(student_logits) != device_of(teacher_logits):
        raise ValueError(
            f"teacher_logits: expected the device of student_logits ({device_of(student_logits)}), "
            f"got {device_of(teacher_logits)}"
        )
    if leading_shape(student_logits)[:-1] != leading_shape(teacher_logits)[:-1]:
        raise ValueError(
            f"teacher_logits: expected the batch of student_logits {list(leading_shape(student_logits))}, "
            f"got {list(leading_shape(teacher_logits))}"
        )


def check_projection(projection: Any) -> None:
    """A matrix in compressed rows; by its attributes, so that a module with trainable weights is one too."""
    if not all(hasattr(projection, name) for name in ("row_ptr", "col", "weight", "shape")):
        raise TypeError(f"projection: expected an xtoken.ProjectionMatrix, got {type(projection).__name__}")


def check_alignment(alignment: Alignment, samples: int) -> None:
    """An alignment of so many samples."""
    if not isinstance(alignment, Alignment):
        raise TypeError(f"alignment: expected an xtoken.Alignment, got {type(alignment).__name__}")
    if len(alignment) != samples:
        raise ValueError(f"alignment: expected {samples} samples (the batch of the logits), got {len(alignment)}")


def checked_labels(student_logits: AnyLogits, labels: Tensor) -> Tensor:
    """Labels [B, T], one for each row of the logits."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected an integer tensor, got {got}")
    if labels.shape != leading_shape(student_logits):
        expected = list(leading_shape(student_logits))
        raise ValueError(f"labels: expected shape {expected} (that of the logits' rows), got {list(labels.shape)}")
    return labels if labels.dim() == 2 else labels[None]


def _check_inplace(student_logits: AnyLogits, labels: Tensor | None, projection: Any) -> None:
    if labels is not None:
        raise ValueError("inplace: expected False with labels, whose gradient needs the logits again")
    if projection is not None and projection.weight.requires_grad:
        raise ValueError("inplace: expected False for a projection whose weights need a gradient")
    if not isinstance(student_logits, Tensor) or not student_logits.is_contiguous():
        raise ValueError("inplace: expected contiguous logits in memory to write the gradient to")
    if student_logits.is_leaf and student_logits.requires_grad:
        raise ValueError("inplace: expected logits computed by a model, got a leaf, whose values you still own")


def _vocabulary_size(logits: AnyLogits, size: int | None, name: str) -> int:
    width = width_of(logits)
    if size is None:
        if width is None:
            raise ValueError(f"{name}: expected the size of the vocabulary to be given too, for TopKLogits")
        return width
    if width is not None and width < size:
        raise ValueError(
            f"{name}: expected at least {size} columns (the vocabulary), got {width} "
            f"in shape {[*leading_shape(logits), width]}"
        )
    return size


def given_chunks(inputs: Inputs, student: Source, teacher: Source, realised: bool = False) -> Chunks:
    """The chunks that the tensors of an alignment describe."""
    alignment = Alignment._trusted(
        spans=inputs.spans,
        offsets=inputs.offsets,
        batched=True,
        _ids={"student": inputs.student_ids, "teacher": inputs.teacher_ids},
        predicted=inputs.predicted,
        _flat=inputs.packed,
    )
    return Chunks.of(alignment, student.length, teacher.length, inputs.student.device, realised)


class Matrix(NamedTuple):
    """W in compressed rows."""

    row_ptr: Tensor
    col: Tensor
    weight: Tensor
    shape: tuple[int, int]


def given_matrix(inputs: Inputs, settings: Settings) -> Matrix:
    """The projection of a call."""
    assert inputs.row_ptr is not None
    assert inputs.col is not None
    assert inputs.weight is not None
    shape = settings.student_size, settings.teacher_size
    return Matrix(inputs.row_ptr, inputs.col, inputs.weight, shape)


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
