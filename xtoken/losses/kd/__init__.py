"""The KL divergence for a teacher that shares the student's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses import diagnostics
from xtoken.losses.backends import Prepared
from xtoken.losses.call import DivergenceOptions, Losses, Unpack, check_count, check_logits, compute, public_loss
from xtoken.losses.columns import teacher_columns
from xtoken.losses.divergence import Divergence, HasDivergence
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits, Source
from xtoken.losses.loss import Needs
from xtoken.losses.numerics import scaled, statistics_dtype
from xtoken.losses.operator import Call, register


@register("kd", "KD", Needs.SAME_TOKENIZER)
@dataclass(frozen=True)
class KD(HasDivergence):
    """See `kd_loss`; `columns` are chosen by the teacher's logits of a call, None: all."""

    is_default: ClassVar[bool] = True

    temperature: float
    top_k: int | None
    reverse: bool
    beta: float
    skew: float
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.top_k, "top_k", optional=True)

    def prepare(self, call: Call, student: Source, teacher: Source) -> Prepared:
        chunks = call.chunks(self.realised)
        if call.spans is not None:
            _check_single(chunks.host)
        return Prepared(chunks, self.chosen(teacher, call.student.device, call.backend))

    def chosen(self, teacher: Source, device: torch.device, backend: str) -> KD:
        if self.columns is not None or self.top_k is None or self.top_k >= teacher.size:
            return self
        return replace(self, columns=teacher_columns(teacher, self.top_k, device, backend))

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        return kd(student, teacher, chunks, self.columns, **self.arguments())

    def diagnose(
        self, student: Source, teacher: Source, chunks: Chunks, projection: Any, device: torch.device, backend: str
    ) -> Tensor:
        columns = self.chosen(teacher, device, backend).columns
        if columns is None:
            columns = torch.arange(teacher.size, device=device)
        return diagnostics.in_columns(student, teacher, chunks, columns)


def _check_single(chunks: Chunks) -> None:
    bad = (chunks.student.count > 1) | (chunks.teacher.count > 1)
    if bool(bad.any()):
        k = int(bad.nonzero()[0])
        raise ValueError(
            f"alignment: expected chunks of one token on each side (a shared tokenizer), got chunk "
            f"{int(chunks.used[k])} with {int(chunks.student.count[k])} and {int(chunks.teacher.count[k])}"
        )


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    columns: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
) -> Tensor:
    """KL for one shared tokenizer: ``sum_C q (log q - log p)``, with p and q normalised over the columns C.

    The other divergences of p and q are those of `xtoken.losses.divergence`.

    Parameters
    ----------
    student_logits : [N_s, V]
    teacher_logits : [N_t, V]
    chunks : Chunks
        One row on each side.
    columns : int64 [C], optional
        Default: all.

    Returns
    -------
    Tensor
        [K]

    Source: Distilling the Knowledge in a Neural Network (arXiv 1503.02531).
    """
    dtype = statistics_dtype(student_logits, teacher_logits)
    z, y = student_logits[chunks.student.start], teacher_logits[chunks.teacher.start]
    if columns is not None:
        z, y = z.index_select(1, columns), y.index_select(1, columns)
    log_p = scaled(z, temperature, dtype).log_softmax(-1)
    log_q = scaled(y, temperature, dtype).log_softmax(-1)
    divergence = Divergence.of(reverse, beta, skew)
    return divergence(log_q.exp(), log_q, log_p.exp(), log_p) * temperature**2


class KDOptions(DivergenceOptions, total=False):
    """Keyword arguments of `kd_loss`, beside ``labels``."""

    mask: Any
    top_k: int | None
    vocab_size: int | None


@overload
def kd_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment | None = None, *,
    labels: None = None, **options: Unpack[KDOptions],
) -> Tensor: ...  # fmt: skip
@overload
def kd_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment | None = None, *,
    labels: Tensor, **options: Unpack[KDOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def kd_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment | None = None,
    *,
    mask: Any = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
    vocab_size: int | None = None,
    **call: Any,
) -> Losses:
    """KL(teacher || student) at each position, for one shared tokenizer.

    The formula is that of `xtoken.reference.kd`.

    Parameters
    ----------
    {student_logits}
    teacher_logits : floating [B, T, >= V] or [T, >= V]
        On the same device. Or `TopKLogits` (a cached or served teacher), or `LinearLogits`. Gets no gradient.
    alignment : Alignment, optional
        Chunks of one token on each side. Default: both models read the same tokens at the same positions.
    {labels}
    mask : bool [B, T] or [T], optional
        Without an alignment: the rows to use (row ``t`` predicts token ``t + 1``). Default: all.
    {temperature}
    top_k : int or None
        So many columns with the teacher's largest logits in any row (lower ids first among equals); both sides are
        normalised over them. None: all columns.
    {reverse, beta, skew}
    vocab_size : int, optional
        Columns that belong to tokens. Default: the smaller of the two widths (models of one family often pad
        their output layers differently). Needed with ``tp_group``, but for DTensors: widths alone do not tell whole
        rows on every rank from parts of a larger vocabulary.
    {reduction}
        Without an alignment [B, T] (or [T]), 0 at rows not used.
    {inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: Distilling the Knowledge in a Neural Network (arXiv 1503.02531).
    """
    check_logits(student_logits, teacher_logits)
    check_count(vocab_size, "vocab_size", optional=True)
    if alignment is not None and mask is not None:
        raise ValueError("mask: expected None together with an alignment, which already names the positions")
    loss = KD(temperature, top_k, reverse, beta, skew)
    return compute(loss, student_logits, teacher_logits, alignment, sizes=(vocab_size, vocab_size), mask=mask, **call)


linear_kd_loss = linear(kd_loss)
