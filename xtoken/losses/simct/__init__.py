"""SimCT: the shared tokens and the text that is there, by mean log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import Losses, Options, Unpack, check_temperature, compute, documented
from xtoken.losses.divergence import Divergence
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Needs
from xtoken.losses.on_pieces import OnTokens, partners
from xtoken.losses.operator import register
from xtoken.losses.simct import formula
from xtoken.pieces import PieceIndex


@register("simct", "SimCT", Needs.PIECES)
@dataclass(frozen=True)
class SimCT(OnTokens):
    """See `simct_loss`."""

    temperature: float
    reverse: bool
    beta: float
    skew: float

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        Divergence.of(self.reverse, self.beta, self.skew)

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        shared = partners(self.pieces, student.device)
        return formula.simct(
            student, teacher, chunks, shared,
            temperature=self.temperature, reverse=self.reverse, beta=self.beta, skew=self.skew,
        )  # fmt: skip


class SimCTOptions(Options, total=False):
    """Keyword arguments of `simct_loss`, beside ``labels``."""

    reverse: bool
    beta: float
    skew: float


@overload
def simct_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: None = None, **options: Unpack[SimCTOptions],
) -> Tensor: ...  # fmt: skip
@overload
def simct_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: Tensor, **options: Unpack[SimCTOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@documented
def simct_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    pieces: PieceIndex,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str = "auto",
    tp_group: Any = None,
    cp_group: Any = None,
    cp_layout: str = "contiguous",
) -> Losses:
    """A divergence over the tokens that both vocabularies have and the chunk's own text, by mean log-probabilities.

    The formula, and what of it is this library's reading, is in `xtoken.losses.simct.formula.simct`.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment}
        With its token ids.
    pieces : PieceIndex
        Of the student's and the teacher's tokenizer.
    {labels, temperature}
    {reverse, beta, skew, reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: SimCT (arXiv 2605.07711).
    """
    loss = SimCT.of(None, pieces, temperature=temperature, reverse=reverse, beta=beta, skew=skew)
    return compute(
        loss, student_logits, teacher_logits, alignment,
        labels=labels, sizes=pieces.shape, reduction=reduction, inplace=inplace, backend=backend,
        groups=(tp_group, cp_group, cp_layout),
    )  # fmt: skip


linear_simct_loss = linear(simct_loss)
