"""The strict one-to-one loss: positions of one token on both sides, on tokens that both vocabularies have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import Losses, Options, Unpack, check_count, compute, public_loss
from xtoken.losses.divergence import Divergence
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Needs
from xtoken.losses.numerics import scaled, statistics_dtype
from xtoken.losses.on_pieces import OnPartners, are_partners, partners
from xtoken.losses.operator import register
from xtoken.pieces import PieceIndex


@register("one_to_one", "strict one-to-one", Needs.PIECES)
@dataclass(frozen=True)
class OneToOne(OnPartners):
    """Only where one token stands for one token that both vocabularies have, and only on such tokens.

    With P and Q the softmax of both sides over the shared tokens, or over the `top_k` of them that the student finds
    most probable::

        loss = sum P (log P - log Q)          reverse=False: sum Q (log Q - log P)

    and 0 for every other chunk. From the paper: the positions, both sets (16 in its second), that they are
    renormalised, and the reverse KL. This library's reading: a position counts if its two tokens are partners, so
    tokens of equal text or of equal role.
    """

    temperature: float
    top_k: int | None
    reverse: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.top_k, "top_k", optional=True)

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        dtype, shared = statistics_dtype(student, teacher), partners(self.pieces, student.device)
        used = are_partners(chunks, shared).nonzero()[:, 0]
        z = scaled(student[chunks.student.start[used]].index_select(1, shared.student), self.temperature, dtype)
        y = scaled(teacher[chunks.teacher.start[used]].index_select(1, shared.teacher), self.temperature, dtype)
        if self.top_k is not None and self.top_k < z.shape[1]:
            best = z.detach().topk(self.top_k, dim=1).indices
            z, y = z.gather(1, best), y.gather(1, best)
        log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
        losses = Divergence.of(self.reverse)(log_q.exp(), log_q, log_p.exp(), log_p)
        return losses.new_zeros(len(chunks)).index_add(0, used, losses) * self.temperature**2


class OneToOneOptions(Options, total=False):
    """Keyword arguments of `one_to_one_loss`, beside ``labels``."""

    top_k: int | None
    reverse: bool


@overload
def one_to_one_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: None = None, **options: Unpack[OneToOneOptions],
) -> Tensor: ...  # fmt: skip
@overload
def one_to_one_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: Tensor, **options: Unpack[OneToOneOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def one_to_one_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    pieces: PieceIndex,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    reverse: bool = True,
    **call: Any,
) -> Losses:
    """KL(student || teacher) where one token stands for the same one, on the tokens that both vocabularies have.

    The formula, and what of it is this library's reading, is in `xtoken.losses.one_to_one.OneToOne`. All other
    chunks have the loss 0, and count in the mean.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment}
        With its token ids.
    {pieces, labels, temperature}
    top_k : int, optional
        Only so many of the shared tokens, those that the student finds most probable (of equal ones any). Default: all.
    reverse : bool
        False: KL(teacher || student).
    {reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: arXiv 2610.08448.
    """
    loss = OneToOne.of(None, pieces, temperature=temperature, top_k=top_k, reverse=reverse)
    return compute(loss, student_logits, teacher_logits, alignment, sizes=pieces.shape, **call)


linear_one_to_one_loss = linear(one_to_one_loss)
