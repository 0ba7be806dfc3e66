"""BPM: byte-prefix mapping, the teacher's tokens moved to the longest of the student's that they begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.bpm import formula
from xtoken.losses.call import Losses, Options, Unpack, check_choice, compute, public_loss
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Needs
from xtoken.losses.numerics import check_temperature
from xtoken.losses.operator import register
from xtoken.losses.spelling import OnText, spelling
from xtoken.pieces import PieceIndex

Rows = Literal["agreeing", "all"]


@register("bpm", "BPM", Needs.PIECES)
@dataclass(frozen=True)
class BPM(OnText):
    """See `bpm_loss`."""

    temperature: float
    rows: str

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_choice(self.rows, "rows", get_args(Rows))

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        known = spelling(self.pieces, self.text, student.device)
        return formula.bpm(student, teacher, chunks, known, temperature=self.temperature, rows=self.rows)


class BPMOptions(Options, total=False):
    """Keyword arguments of `bpm_loss`, beside ``labels``."""

    rows: Rows


@overload
def bpm_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: None = None, **options: Unpack[BPMOptions],
) -> Tensor: ...  # fmt: skip
@overload
def bpm_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: Tensor, **options: Unpack[BPMOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def bpm_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    pieces: PieceIndex,
    *,
    temperature: float = 1.0,
    rows: Rows = "agreeing",
    **call: Any,
) -> Losses:
    """Byte-prefix mapping: KL(teacher || student) at every row of the student, on the student's own tokens.

    The formula, and what of it is this library's reading, is in `xtoken.losses.bpm.formula.bpm`. Plain PyTorch: per row
    a softmax of both sides, and a sum over the teacher's vocabulary where a chunk starts.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment}
        With its token ids.
    pieces : PieceIndex
        Of the student's and the teacher's tokenizer, with its text.
    {labels, temperature}
    rows : "agreeing" or "all"
        "agreeing" leaves out the rows of which the mapped realised token of the teacher is not the student's.
    {reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: BPM (arXiv 2607.22334).
    """
    loss = BPM.of(None, pieces, temperature=temperature, rows=rows)
    return compute(loss, student_logits, teacher_logits, alignment, sizes=pieces.shape, **call)


linear_bpm_loss = linear(bpm_loss)
