"""BPM: byte-prefix mapping, the teacher's tokens moved to the longest of the student's that they begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import Losses, Options, Unpack, check_choice, compute, public_loss
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Needs
from xtoken.losses.numerics import ranges, scaled, statistics_dtype
from xtoken.losses.operator import register
from xtoken.losses.spelling import OnText, Spelling, places, spelling
from xtoken.pieces import PieceIndex

Rows = Literal["agreeing", "all"]
ROWS: tuple[str, ...] = get_args(Rows)


@register("bpm", "BPM", Needs.PIECES)
@dataclass(frozen=True)
class BPM(OnText):
    """Byte-prefix mapping: KL(teacher || student) at every row of the student, the teacher's tokens moved to its own.

    With phi(t) the longest student token that is a byte prefix of the teacher's token t::

        Q[s] = sum of q over the t with phi(t) = s, divided by the mass of all t that have a phi
        term = sum_s Q[s] (log Q[s] - log p[s])

    where both sides start a token. Where the student starts one inside a teacher's token of which the bytes c are out,
    q is that of the row that predicts this token, phi that of the rest, and t are the tokens that go on behind c. The
    loss of a chunk is the sum of its terms.

    From the paper: phi, Q, and the same inside a token over those with c as a prefix, divided by their mass. It masks
    3.5 % of its rows against what it calls white-space collapse. This library's reading: the direction of the KL; that
    a token which ends with c takes no part, since what follows it is in another row; and that the rows to be masked are
    those where the text itself goes another way than phi, that is where phi of the teacher's realised token is not the
    student's realised token (``rows="agreeing"``; "all" masks none).
    """

    temperature: float
    rows: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.rows, "rows", ROWS)

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        known = spelling(self.pieces, self.text, student.device)
        dtype, none = statistics_dtype(student, teacher), student.shape[1]
        at, index, owner = places(chunks, known), chunks.student.index(), chunks.student.owner()
        token = chunks.teacher.realised[at.teacher_row]
        is_used = at.is_known
        if self.rows == "agreeing":
            is_used = is_used & (_following(known, token, at.offset) == chunks.student.realised[index])
        chosen = is_used.nonzero()[:, 0]
        target = torch.zeros(len(chosen), none, dtype=dtype, device=index.device)
        teacher_row, token, offset = (one[chosen] for one in (at.teacher_row, token, at.offset))

        starts = (offset == 0).nonzero()[:, 0]
        y = scaled(teacher[teacher_row[starts]], self.temperature, dtype)
        q = y.masked_fill(known.beginning == none, -torch.inf).softmax(-1)
        target[starts] = q.new_zeros(len(q), none + 1).scatter_add(1, known.beginning.expand(len(q), -1), q)[:, :none]

        inner = (offset > 0).nonzero()[:, 0]
        place = known.ptr[token[inner]] + offset[inner]
        counts = known.last[place] - known.first[place]
        row = torch.repeat_interleave(inner, counts)
        other = known.order[ranges(known.first[place], counts)]
        following = _following(known, other, offset[row])
        row, other, following = (one[following < none] for one in (row, other, following))
        y = scaled(teacher[teacher_row[row], other], self.temperature, dtype)
        top = y.new_full((len(chosen),), -torch.inf).scatter_reduce(0, row, y, "amax")
        target.view(-1).index_add_(0, row * none + following, (y - top[row]).exp())
        target /= target.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)

        log_p = scaled(student[index[chosen]], self.temperature, dtype).log_softmax(-1)
        terms = (torch.xlogy(target, target) - target * log_p).sum(-1)
        return chunks.student.total(terms, owner[chosen]) * self.temperature**2


def _following(known: Spelling, token: Tensor, offset: Tensor) -> Tensor:
    """int64 [n]: the longest student token that the rest of a teacher's token from a byte on begins with, or none."""
    is_inside = offset < known.teacher_length[token]
    place = (known.ptr[token] + offset).clamp_max(max(0, len(known.longest) - 1))
    rest = known.longest[place] if len(known.longest) else torch.zeros_like(token)
    inside = torch.where(is_inside, rest, len(known.student_length))
    return torch.where(offset == 0, known.beginning[token], inside)


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

    The formula, and what of it is this library's reading, is in `xtoken.losses.bpm.BPM`. Plain PyTorch: per row a
    softmax of both sides, and a sum over the teacher's vocabulary where a chunk starts.

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
