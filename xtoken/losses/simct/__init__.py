"""SimCT: the shared tokens and the text that is there, by mean log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import DivergenceOptions, Losses, Unpack, compute, public_loss
from xtoken.losses.divergence import HasDivergence
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Needs
from xtoken.losses.on_pieces import OnTokens, partners
from xtoken.losses.operator import register
from xtoken.losses.simct import formula
from xtoken.pieces import PieceIndex


@register("simct", "SimCT", Needs.PIECES)
@dataclass(frozen=True)
class SimCT(HasDivergence, OnTokens):
    """See `simct_loss`."""

    temperature: float
    reverse: bool
    beta: float
    skew: float

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        return formula.simct(student, teacher, chunks, partners(self.pieces, student.device), **self.arguments())


@overload
def simct_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: None = None, **options: Unpack[DivergenceOptions],
) -> Tensor: ...  # fmt: skip
@overload
def simct_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: Tensor, **options: Unpack[DivergenceOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def simct_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    pieces: PieceIndex,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
    **call: Any,
) -> Losses:
    """A divergence over the tokens that both vocabularies have and the chunk's own text, by mean log-probabilities.

    The formula, and what of it is this library's reading, is in `xtoken.losses.simct.formula.simct`.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment}
        With its token ids.
    {pieces, labels, temperature}
    {reverse, beta, skew, reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: SimCT (arXiv 2605.07711).
    """
    loss = SimCT.of(None, pieces, temperature=temperature, reverse=reverse, beta=beta, skew=skew)
    return compute(loss, student_logits, teacher_logits, alignment, sizes=pieces.shape, **call)


linear_simct_loss = linear(simct_loss)
