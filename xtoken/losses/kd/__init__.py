"""The KL divergence for a teacher that shares the student's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from xtoken import reference
from xtoken.alignment import Alignment, Chunks, Rows, to_device
from xtoken.losses.call import Losses, check_count, check_logits, compute, given_chunks, leading_shape, width_of
from xtoken.losses.logits import AnyLogits, Source
from xtoken.losses.operator import PREPARE, Inputs, Prepared, Settings
from xtoken.losses.pkl import teacher_columns


@dataclass(frozen=True)
class KdOptions:
    """The column set [C], or None for all, and the switches."""

    operation: ClassVar[str] = "kd"
    columns: Tensor | None
    temperature: float
    reverse: bool

    def reference(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None) -> Tensor:
        """See `xtoken.reference.kd`."""
        return reference.kd(student, teacher, chunks, self.columns, temperature=self.temperature, reverse=self.reverse)


def kd_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment | None = None,
    *,
    labels: Tensor | None = None,
    mask: Any = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    reverse: bool = False,
    reduction: str = "mean",
    vocab_size: int | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> Losses:
    """KL(teacher || student) at each position, for one shared tokenizer.

    The formula is that of `xtoken.reference.kd`. Arguments, results, errors, gradients and memory are as for
    `pkl_loss`, except:

    Parameters
    ----------
    alignment : Alignment, optional
        Chunks of one token on each side. Default: both models read the same tokens at the same positions.
    mask : bool [B, T] or [T], optional
        Without an alignment: the rows to use (row ``t`` predicts token ``t + 1``). Default: all.
    top_k : int or None
        Columns with the teacher's largest logits, chosen as in `pkl_loss`; both sides are normalised over
        them. None: all columns.
    vocab_size : int, optional
        Columns that belong to tokens. Default: the smaller of the two widths (models of one family often pad
        their output layers differently).

    Returns
    -------
    Tensor
        Scalar; for ``reduction="none"`` [K], or [B, T] (or [T]) without an alignment, 0 at rows not used.

    Source: Distilling the Knowledge in a Neural Network (arXiv 1503.02531).
    """
    check_logits(student_logits, teacher_logits)
    check_count(top_k, "top_k", optional=True)
    check_count(vocab_size, "vocab_size", optional=True)
    if vocab_size is None:
        widths = [width for width in (width_of(student_logits), width_of(teacher_logits)) if width is not None]
        vocab_size = min(widths, default=None)
    if alignment is None:
        mask = _checked_mask(student_logits, teacher_logits, mask)
    elif mask is not None:
        raise ValueError("mask: expected None together with an alignment, which already names the positions")
    result = compute(
        "kd",
        student_logits,
        teacher_logits,
        alignment,
        sizes=(vocab_size, vocab_size),
        mask=mask,
        labels=labels,
        reduction=reduction,
        backend=backend,
        inplace=inplace,
        temperature=temperature,
        reverse=reverse,
        top_k=top_k,
    )
    if alignment is None and reduction == "none":
        assert isinstance(result, Tensor)
        return result.view(leading_shape(student_logits))
    return result


def _prepare(inputs: Inputs, settings: Settings, student: Source, teacher: Source) -> Prepared:
    if inputs.spans is None:
        chunks = position_chunks(student.samples * student.length, inputs.predicted, inputs.student.device)
    else:
        chunks = given_chunks(inputs, student, teacher)
        _check_single(chunks.host)
    columns = None
    if settings.top_k is not None and settings.top_k < settings.teacher_size:
        columns = teacher_columns(teacher, settings.top_k, inputs.student.device, settings.backend)
    return Prepared(chunks, KdOptions(columns, settings.temperature, settings.reverse))


PREPARE["kd"] = _prepare


def _checked_mask(student_logits: AnyLogits, teacher_logits: AnyLogits, mask: Any) -> Tensor | None:
    shape = leading_shape(student_logits)
    if leading_shape(teacher_logits) != shape:
        raise ValueError(
            f"teacher_logits: expected the positions of student_logits {list(shape)}, got "
            f"{list(leading_shape(teacher_logits))}; pass an alignment if they differ"
        )
    if mask is None:
        return None
    given: Tensor = torch.as_tensor(mask)
    if given.dtype != torch.bool or given.shape != shape:
        raise ValueError(f"mask: expected bool {list(shape)}, got {given.dtype} {list(given.shape)}")
    return given


def position_chunks(rows: int, mask: Tensor | None, device: torch.device | str) -> Chunks:
    """One chunk for each of so many rows that `mask` names, the same on both sides; of a mask on a device for all."""
    device = torch.device(device)
    if mask is None:
        chunks, used = _rows_as_chunks(torch.arange(rows)), torch.arange(rows, device=device)
    elif mask.device.type == "cpu":
        chunks = _rows_as_chunks(mask.flatten().nonzero()[:, 0])
        used = to_device(chunks.used, device)
    else:
        used, chosen = torch.arange(rows, device=device), mask.to(device).flatten()
        same = Rows(torch.where(chosen, used, -1), chosen.long())
        return Chunks(same, same, used, chosen, _rows_as_chunks(torch.arange(rows)))
    return chunks if device.type == "cpu" else replace(_rows_as_chunks(used), copy=chunks)


def _rows_as_chunks(used: Tensor) -> Chunks:
    same = Rows(used, torch.ones_like(used))
    return Chunks(same, same, used)


def _check_single(chunks: Chunks) -> None:
    bad = (chunks.student.count > 1) | (chunks.teacher.count > 1)
    if bool(bad.any()):
        k = int(bad.nonzero()[0])
        raise ValueError(
            f"alignment: expected chunks of one token on each side (a shared tokenizer), got chunk "
            f"{int(chunks.used[k])} with {int(chunks.student.count[k])} and {int(chunks.teacher.count[k])}"
        )
