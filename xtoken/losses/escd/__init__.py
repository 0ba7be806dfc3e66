"""ESCD: byte-prefix mapping with a rest, and what the teacher's tokens go on with behind the student's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import Losses, Options, Unpack, compute, public_loss
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Needs
from xtoken.losses.numerics import log_sums, ranges, scaled, statistics_dtype
from xtoken.losses.operator import register
from xtoken.losses.spelling import OnText, groups, spelling
from xtoken.pieces import PieceIndex


@register("escd", "ESCD", Needs.PIECES)
@dataclass(frozen=True)
class ESCD(OnText):
    """ESCD: the teacher's tokens moved to the student's that they begin with, and what goes on behind them.

    With phi(t) the longest student token that is a byte prefix of the teacher's token t, at the first row of a chunk::

        Q[s] = sum of q over the t with phi(t) = s
        term = sum_s Q[s] (log Q[s] - log p[s]) + Q_rest (log Q_rest - log P_rest)

    over the s that are some phi(t), and the rest: the teacher's tokens without a phi, and the student's that are none.
    Teacher tokens without an exact partner form groups g, of which each has the common prefix y_g, its shortest token,
    and the mass M_g. In the row behind the student's realised first token a, if the chunk has one::

        term = - sum over the groups of a of M_g log(sum of p over the tokens u that begin with the rest of y_g)

    From the paper: the byte-prefix term with a rest, the groups, their mass and shortest token, and that tokens u which
    run past the end of y_g count. This library's reading: nothing is normalised; a group belongs to one a = phi(t) of
    all its tokens; a group for whose rest the student has no token u is left out; and the second term stands in the
    chunks that go on behind a, since else that row begins a chunk of its own, with the first term. That second term is
    a cross-entropy, whose least value is not 0.
    """

    temperature: float

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        known = spelling(self.pieces, self.text, student.device)
        grouped = groups(self.pieces, self.text, student.device)
        dtype, none = statistics_dtype(student, teacher), student.shape[1]
        start = chunks.student.start
        log_p = scaled(student[start], self.temperature, dtype).log_softmax(-1)
        q = scaled(teacher[chunks.teacher.start], self.temperature, dtype).softmax(-1)
        masses = q.new_zeros(len(q), none + 1).scatter_add(1, known.beginning.expand(len(q), -1), q)
        mass, rest = masses[:, :none], masses[:, none]
        loss = (torch.xlogy(mass, mass) - mass * log_p).sum(-1)
        is_image = torch.zeros(none + 1, dtype=torch.bool, device=log_p.device)
        is_image[known.beginning] = True
        if bool(is_image[none]) and not bool(is_image[:none].all()):
            others = log_p.masked_fill(is_image[:none], -torch.inf).logsumexp(-1)
            loss = loss + torch.xlogy(rest, rest) - rest * others

        longer = (chunks.student.count > 1).nonzero()[:, 0]
        token = chunks.student.realised[start[longer]]
        counts = grouped.ptr[token + 1] - grouped.ptr[token]
        chunk = torch.repeat_interleave(torch.arange(len(longer), device=counts.device), counts)
        group = ranges(grouped.ptr[token], counts)
        of_groups = q.new_zeros(len(longer), len(grouped.first) + 1)
        of_groups = of_groups.scatter_add(1, grouped.group.expand(len(longer), -1), q[longer])[chunk, group]
        counts = grouped.last[group] - grouped.first[group]
        owner = torch.repeat_interleave(torch.arange(len(group), device=counts.device), counts)
        follows = grouped.order[ranges(grouped.first[group], counts)]
        log_p = scaled(student[start[longer] + 1], self.temperature, dtype).log_softmax(-1)
        terms = -of_groups * log_sums(log_p[chunk[owner], follows], owner, len(group))
        return loss.index_add(0, longer[chunk], terms) * self.temperature**2


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

    The formula, and what of it is this library's reading, is in `xtoken.losses.escd.ESCD`. Plain PyTorch: per chunk
    a softmax of up to three rows, and sums over both vocabularies.

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
