"""ESCD: byte-prefix mapping with a rest, and what the teacher's tokens go on with behind the student's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import Losses, Options, Unpack, compute, public_loss
from xtoken.losses.escd import formula
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Needs
from xtoken.losses.numerics import check_temperature
from xtoken.losses.operator import register
from xtoken.losses.spelling import OnText, groups, spelling
from xtoken.pieces import PieceIndex


@register("escd", "ESCD", Needs.PIECES)
@dataclass(frozen=True)
class ESCD(OnText):
    """See `escd_loss`."""

    temperature: float

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        known = spelling(self.pieces, self.text, student.device)
        grouped = groups(self.pieces, self.text, student.device)
        return formula.escd(student, teacher, chunks, known, grouped, temperature=self.temperature)


@overload
def escd_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: None = None, **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def escd_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: Tensor, **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def escd_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    pieces: PieceIndex,
    *,
    temperature: float = 1.0,
    **call: Any,
) -> Losses:
    """Byte-prefix mapping with a rest at the start of a chunk, and the teacher's longer tokens behind the first one.

    The formula, and what of it is this library's reading, is in `xtoken.losses.escd.formula.escd`. Plain PyTorch: per
    chunk a softmax of up to three rows, and sums over both vocabularies.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment}
        With its token ids.
    pieces : PieceIndex
        Of the student's and the teacher's tokenizer, with its text.
    {labels, temperature}
    {reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: ESCD (arXiv 2609.34738).
    """
    loss = ESCD.of(None, pieces, temperature=temperature)
    return compute(loss, student_logits, teacher_logits, alignment, sizes=pieces.shape, **call)


linear_escd_loss = linear(escd_loss)
