"""SimCT: the shared tokens and the text that is there, by mean log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from xtoken.alignment import Alignment, Chunks, Rows
from xtoken.losses.call import DivergenceOptions, Losses, Unpack, compute, public_loss
from xtoken.losses.divergence import HasDivergence
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Needs
from xtoken.losses.numerics import scaled, statistics_dtype
from xtoken.losses.on_pieces import OnPartners, are_partners, partners
from xtoken.losses.operator import register
from xtoken.pieces import PieceIndex


@register("simct", "SimCT", Needs.PIECES)
@dataclass(frozen=True)
class SimCT(HasDivergence, OnPartners):
    """SimCT: a divergence over the shared tokens and the text that is there, each with its mean log-probability.

    With ``score(u)`` the mean of the log-probabilities of the tokens that spell u on a side: of a shared token that of
    the chunk's first row, and of the chunk's own text, if its tokens are no such pair, that of its realised tokens::

        P = softmax of the student's scores, Q of the teacher's
        loss = sum Q (log Q - log P), or another divergence of P and Q (see `xtoken.losses.divergence`)

    From the paper: the candidates (shared tokens and minimal aligned units), the mean as the score, the softmax, and
    that the divergence is whatever is used for one tokenizer. This library's reading: of the units only the realised
    one of a chunk is a candidate, beside all shared tokens; and log-probabilities are those of softmax(z / tau).
    """

    temperature: float
    reverse: bool
    beta: float
    skew: float

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        shared = partners(self.pieces, student.device)
        dtype = statistics_dtype(student, teacher)
        is_shared = are_partners(chunks, shared)
        is_absent = torch.zeros(len(chunks), len(shared.student) + 1, dtype=torch.bool, device=is_shared.device)
        is_absent[:, -1] = is_shared
        distributions: list[Tensor] = []
        for logits, rows, columns in (
            (teacher, chunks.teacher, shared.teacher),
            (student, chunks.student, shared.student),
        ):
            scores = _scores(logits, rows, columns, self.temperature, dtype).masked_fill(is_absent, -torch.inf)
            log_p = scores.log_softmax(-1)
            distributions += [log_p.exp(), log_p.masked_fill(is_absent, 0)]
        return self.divergence(*distributions) * self.temperature**2


def _scores(logits: Tensor, rows: Rows, columns: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """[K, C + 1]: of the columns in the first rows, and of the realised tokens."""
    index, owner = rows.index(), rows.owner()
    log_p = scaled(logits[index], temperature, dtype).log_softmax(-1)
    realised = rows.total(log_p.gather(1, rows.realised[index, None])[:, 0], owner) / rows.count
    first = (index == rows.start[owner]).nonzero()[:, 0]
    return torch.cat([log_p[first].index_select(1, columns), realised[:, None]], 1)


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

    The formula, and what of it is this library's reading, is in `xtoken.losses.simct.SimCT`.

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
