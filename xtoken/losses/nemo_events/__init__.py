"""NeMo v6: a KL over events that both sides can write, and all the rest as one more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from xtoken.alignment import Alignment, Chunks, Rows, synchronized
from xtoken.losses.cached import kept
from xtoken.losses.call import Losses, Options, Unpack, compute, public_loss
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Needs
from xtoken.losses.numerics import (
    log_complement,
    log_likelihood,
    log_sums,
    ranges,
    scaled,
    statistics_dtype,
)
from xtoken.losses.on_pieces import OnTokens, partners
from xtoken.losses.operator import register
from xtoken.losses.spelling import prefix_ranges
from xtoken.pieces import PieceIndex, sides


class Spelled(NamedTuple):
    """The tokens of one side by the tokens of the other that spell them, as `PieceIndex` has these."""

    ptr: Tensor  # int64 [V + 1]: token t has pieces[ptr[t] : ptr[t + 1]]
    pieces: Tensor  # int64
    order: Tensor  # int64 [V]
    first: Tensor  # int64 [pieces]: order[first:last] have the pieces of t before this one
    last: Tensor


@kept
def spelled(pieces: Tensor, device: torch.device) -> tuple[Spelled, Spelled]:
    """The student's tokens and the teacher's, on a device. A second or so for 150,000 tokens, once."""
    found = []
    for side in sides(pieces.cpu()):
        ptr, flat = side.ptr.long(), side.pieces.tolist()
        tokens = [tuple(flat[a:b]) for a, b in zip(side.ptr[:-1].tolist(), side.ptr[1:].tolist(), strict=True)]
        tables = ptr, side.pieces.long(), *prefix_ranges(tokens, ptr.diff(), ptr)
        found.append(Spelled(*(synchronized(one.to(device)) for one in tables)))
    return found[0], found[1]


@register("nemo_events", "NeMo v6", Needs.PIECES)
@dataclass(frozen=True)
class NeMoEvents(OnTokens):
    """NeMo v6: a KL over some events and all the rest as one more, nothing renormalised.

    With P[e] and Q[e] the probabilities of event e under student and teacher::

        loss = sum_e Q[e] (log Q[e] - log P[e]) + (1 - sum Q) (log(1 - sum Q) - log(1 - sum P))

    ``reverse`` exchanges the two. The events of a chunk are, if it has

    * one token on both sides: all pairs of tokens that both vocabularies have;
    * one student token and N > 1 of the teacher: the student tokens that the teacher spells t_1 ... t_{N-1}, which are
      realised, and any last piece x, with Q = q(t_1) ... q(t_{N-1}) q(x). With fewer than two the loss is 0;
    * M > 1 and one: the same with the sides exchanged;
    * several on both sides: its text, with the products of the realised tokens' probabilities.

    From the draft: all of that. This library's reading: how a token is spelled is what `PieceIndex` says, and a chunk
    whose one token is spelled otherwise than the text has it has no events; if a side has no token outside of the pairs
    of the first case, there is no rest; and elsewhere 1 - sum counts as at least the type's ``eps``.
    """

    temperature: float
    reverse: bool

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        shared, both = partners(self.pieces, student.device), spelled(self.pieces, student.device)
        dtype = statistics_dtype(student, teacher)
        logits, rows = (student, teacher), (chunks.student, chunks.teacher)
        several = chunks.student.count > 1, chunks.teacher.count > 1
        losses = torch.zeros(len(chunks), dtype=dtype, device=student.device)

        def log_softmax(side: int, index: Tensor) -> Tensor:
            return scaled(logits[side][index], self.temperature, dtype).log_softmax(-1)

        def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
            ahead, behind = (log_p, log_q) if self.reverse else (log_q, log_p)
            return ahead.exp() * (ahead - behind)

        def rest(log_p: Tensor, log_q: Tensor) -> Tensor:
            return divergence(log_complement(log_p), log_complement(log_q))

        single = (~several[0] & ~several[1]).nonzero()[:, 0]
        log_p, log_q = (log_softmax(side, rows[side].start[single]) for side in (0, 1))
        terms = divergence(log_p.index_select(1, shared.student), log_q.index_select(1, shared.teacher)).sum(-1)
        if len(shared.student) < min(log_p.shape[1], log_q.shape[1]):
            outside = (
                x.index_fill(1, columns, -torch.inf).logsumexp(-1)
                for x, columns in ((log_p, shared.student), (log_q, shared.teacher))
            )
            terms = terms + divergence(*outside)
        losses = losses.index_add(0, single, terms)

        for whole, part in ((0, 1), (1, 0)):
            index = (~several[whole] & several[part]).nonzero()[:, 0]
            of_whole, of_part = (rows[side].chosen(index) for side in (whole, part))
            token, owner, piece = _events(of_whole, of_part, both[whole], len(both[part].order))
            as_one = log_softmax(whole, of_whole.start)[owner, token]
            as_several = _spelled_log_mass(log_softmax, part, of_part, owner, piece)
            log_p, log_q = (as_one, as_several) if whole == 0 else (as_several, as_one)
            sums = (log_sums(x, owner, len(index)) for x in (log_p, log_q))
            there = torch.bincount(owner, minlength=len(index)) > 0
            terms = rest(*(torch.where(there, x, -1.0) for x in sums)).masked_fill(~there, 0)
            losses = losses.index_add(0, index, terms.index_add(0, owner, divergence(log_p, log_q)))

        index = (several[0] & several[1]).nonzero()[:, 0]
        log_p, log_q = (
            log_likelihood(logits[side], rows[side].chosen(index), dtype, self.temperature) for side in (0, 1)
        )
        losses = losses.index_add(0, index, divergence(log_p, log_q) + rest(log_p, log_q))
        return losses * self.temperature**2


def _events(whole: Rows, part: Rows, known: Spelled, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of `whole` spelled as the realised tokens of `part` but the last and any last one; of each event the
    token, the chunk, and the last piece, below `size`. int64 [n] three times."""
    realised, count = whole.realised[whole.start], part.count
    length, index, owner = known.ptr[realised + 1] - known.ptr[realised], part.index(), part.owner()
    depth = index - part.start[owner]
    piece = known.pieces[(known.ptr[realised[owner]] + depth).clamp_max(len(known.pieces) - 1)]
    is_other = (depth < count[owner] - 1) & ((depth >= length[owner]) | (piece != part.realised[index]))
    fits = (torch.zeros_like(count).index_add(0, owner, is_other.long()) == 0) & (length >= count)
    place = (known.ptr[realised] + count - 1).clamp_max(len(known.pieces) - 1)
    counts = (known.last[place] - known.first[place]) * fits
    owner = torch.repeat_interleave(torch.arange(len(count), device=count.device), counts)
    token = known.order[ranges(known.first[place], counts)]
    end = known.ptr[token + 1]
    piece = known.pieces[(end - 1).clamp_min(0)]
    is_event = (end - known.ptr[token] == count[owner]) & (piece < size)
    token, owner, piece = token[is_event], owner[is_event], piece[is_event]
    is_several = torch.bincount(owner, minlength=len(count))[owner] > 1
    return token[is_several], owner[is_several], piece[is_several]


def _spelled_log_mass(
    log_softmax: Callable[[int, Tensor], Tensor], side: int, rows: Rows, owner: Tensor, piece: Tensor
) -> Tensor:
    """[n]: the log-probability of the realised tokens but the last, and of a last one."""
    index, of = rows.index(), rows.owner()
    is_last = index == (rows.start + rows.count - 1)[of]
    known, chunk = index[~is_last], of[~is_last]
    realised = log_softmax(side, known).gather(1, rows.realised[known, None])[:, 0]
    last = log_softmax(side, index[is_last])
    return last.new_zeros(len(rows.start)).index_add(0, chunk, realised)[owner] + last[owner, piece]


class NeMoEventsOptions(Options, total=False):
    """Keyword arguments of `nemo_events_loss`, beside ``labels``."""

    reverse: bool


@overload
def nemo_events_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: None = None, **options: Unpack[NeMoEventsOptions],
) -> Tensor: ...  # fmt: skip
@overload
def nemo_events_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: Tensor, **options: Unpack[NeMoEventsOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def nemo_events_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    pieces: PieceIndex,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    **call: Any,
) -> Losses:
    """KL over events that both sides can write, and all the rest as one more event, nothing renormalised.

    The formula, and what of it is this library's reading, is in `xtoken.losses.nemo_events.NeMoEvents`.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment}
        With its token ids.
    {pieces, labels, temperature}
    {reverse, reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: draft of NVIDIA NeMo-RL, pull request 4177.
    """
    loss = NeMoEvents.of(None, pieces, temperature=temperature, reverse=reverse)
    return compute(loss, student_logits, teacher_logits, alignment, sizes=pieces.shape, **call)


linear_nemo_events_loss = linear(nemo_events_loss)
