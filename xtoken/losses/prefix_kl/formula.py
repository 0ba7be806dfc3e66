"""The formula of prefix KL."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks
from xtoken.losses.divergence import Divergence
from xtoken.losses.numerics import ranges, scaled, statistics_dtype
from xtoken.losses.on_pieces import event_log_mass
from xtoken.pieces import Side
from xtoken.pieces import sides as piece_sides


def prefix(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    pieces: Tensor,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
    weighting: str = "none",
) -> Tensor:
    """Prefix KL: the exact chain rule over the boundaries of a chunk, on events that both vocabularies know.

    At each boundary the tokens of both sides are cut into the same events e, and with P[e] and Q[e] the probability
    of e under student and teacher to the power of 1 / temperature, divided by its sum over the events::

        term = sum_e Q[e] (log Q[e] - log P[e]), or another divergence of P and Q (see `xtoken.losses.divergence`)
        loss = sum of the terms of the chunk's boundaries, each times its weight

    *The start of the chunk.* The event of a token is its root: the token itself if the other vocabulary has it too,
    else the root of its first piece under the other tokenizer. Every token has one event. Where the realised first
    tokens of the two sides have different events, the tokenizers cut this text in different ways: each would have to
    give its mass to an event that it never writes here. Such a start has no term.

    A tokenizer that has "1" and "12" writes "1" only where no "2" follows, so after "1" its model knows more of what
    comes than one whose digits stand alone. The events of a shared token (or of one whose root is a part of a
    character) that together with the token before the chunk is a token of the one side, and likewise not of the other,
    are left out on both, as if they had no tokens. An event that calibration has merged is left out even if both sides
    have such a token, since they may know it of different parts of the event.

    *Inside*, where one side ("part") starts a token within a token of the other ("whole") whose pieces begin with the
    d tokens of "part" since then. Of "whole" the tokens whose pieces begin with these d are counted, at the row that
    predicts the token that continues; their event is that of the next piece, or "ends" if there is none. Of "part" all
    tokens are counted, at the row that predicts the token that starts; the event of a token is as above if a next piece
    has it, else "ends". Where the first of the d belongs to a merged event, "ends" is left out: the other tokens of
    this event end there for reasons that "whole" does not share.

    An event that has no token on one side is left out on both. An inner boundary has no term if no such d tokens exist,
    for example where tokens of both sides overlap without a common start.

    *Weights.* With ``weighting="teacher"`` an inner boundary has the weight Q(prefix), the teacher's probability of
    what is realised before it in the chunk: the product over the earlier boundaries, in the order of the text and with
    the start, of Q[event of the teacher's realised token]; 0 if that event has no token on one side. So the loss is
    that part of the KL of the whole chunk which lies along the realised text. All weights are constants. With "none"
    they are 1; that of the start is.

    Parameters
    ----------
    student_logits : [N_s, V_student]
    teacher_logits : [N_t, V_teacher]
    chunks : Chunks
        With realised ids.
    pieces : int32 [n]
        `PieceIndex.data`.

    Returns
    -------
    Tensor
        [K]
    """
    dtype, divergence = statistics_dtype(student_logits, teacher_logits), Divergence.of(reverse, beta, skew)
    logits, sides, device = (student_logits, teacher_logits), piece_sides(pieces), student_logits.device
    boundaries = inner_boundaries(chunks, pieces).to(device)
    next_ids = chunks.student.realised, chunks.teacher.realised

    def compare(
        rows: Sequence[Tensor], events: Sequence[Tensor], count: int, left_out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The terms of boundaries, and the teacher's probabilities of what it realises there."""
        log_p, log_q = (
            event_log_mass(scaled(z[row], 1.0, dtype), event, count)
            for z, row, event in zip(logits, rows, events, strict=True)
        )
        missing = log_p.isinf() | log_q.isinf() | left_out
        log_p, log_q = (
            (x.masked_fill(missing, -torch.inf) / temperature).log_softmax(-1).masked_fill(missing, 0)
            for x in (log_p, log_q)
        )
        p, q = (x.exp().masked_fill(missing, 0) for x in (log_p, log_q))
        realised = events[1].gather(1, next_ids[1][rows[1], None])
        return divergence(q, log_q, p, log_p), q.detach().gather(1, realised)[:, 0]

    roots = sides[0].event.to(device).long(), sides[1].event.to(device).long()
    starts = chunks.student.start, chunks.teacher.start
    events = roots[0].expand(len(chunks), -1), roots[1].expand(len(chunks), -1)
    realised = first_events(chunks, roots)
    merged = merged_events(sides, int(pieces[2])).to(device)
    left_out = cannot_follow(chunks, sides, merged)
    loss, probability = compare(starts, events, int(pieces[2]), left_out)
    loss = loss.masked_fill(realised[0] != realised[1], 0)

    inner, inner_probability = loss.new_zeros(len(boundaries)), probability.new_zeros(len(boundaries))
    for one in insides(chunks, boundaries, sides, roots, merged):
        terms, probabilities = compare(one.rows, one.events, one.number, one.left_out)
        inner = inner.index_copy(0, one.place, terms)
        inner_probability[one.place] = probabilities
    if weighting == "teacher":
        inner = inner * of_prefixes(probability, inner_probability, boundaries)
    return loss.index_add(0, boundaries[:, 0], inner) * temperature**2


def merged_events(sides: tuple[Side, Side], count: int) -> Tensor:
    """bool [count]: the events in which tokens of one side have different partners."""
    student, size = sides[0], len(sides[1].event)
    single = (student.ptr.diff() == 1).nonzero()[:, 0]
    partner = student.pieces[student.ptr[single].long()]
    pairs = (student.event[single].long() * size + partner)[partner < size].unique()  # pairs of numbers sort slowly
    return torch.bincount(pairs // size, minlength=count) > 1


def first_events(chunks: Chunks, roots: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """int64 [K] twice: the events of the realised first tokens, by those of all tokens [V_student], [V_teacher]."""
    student, teacher = (
        root[rows.realised[rows.start.clamp_min(0)].clamp(0, len(root) - 1)]  # in range wherever a chunk counts
        for rows, root in zip((chunks.student, chunks.teacher), roots, strict=True)
    )
    return student, teacher


def cannot_follow(chunks: Chunks, sides: tuple[Side, Side], merged: Tensor) -> Tensor:
    """bool [K, count]: the events of which only one tokenizer knows that they do not start the chunk, see `prefix`."""
    known = []
    for rows, side in zip((chunks.student, chunks.teacher), sides, strict=True):
        assert rows.before is not None
        device = rows.before.device
        event, ptr, joined = (x.to(device).long() for x in (side.event, side.joined_ptr, side.joined))
        is_token = (rows.before >= 0) & (rows.before < len(event))
        token = rows.before.where(is_token, 0)
        counts = (ptr[token + 1] - ptr[token]) * is_token
        owner = torch.repeat_interleave(torch.arange(len(token), device=device), counts)
        known.append(torch.zeros(len(token), len(merged), dtype=torch.bool, device=device))
        known[-1][owner, event[joined[ranges(ptr[token], counts)]]] = True
    return (known[0] ^ known[1]) | (known[0] & known[1] & merged)


def of_prefixes(start: Tensor, inner: Tensor, boundaries: Tensor) -> Tensor:
    """[n]: the product of the probabilities before each inner boundary of a chunk, from those at the starts [K] and at
    the boundaries [n], whose student rows have the order of the text."""
    chunk, whole, whole_row, part_row = boundaries[:, :4].unbind(1)
    order = torch.where(whole == 0, whole_row, part_row).argsort(stable=True)
    order = order[chunk[order].argsort(stable=True)]
    counts = chunk.bincount(minlength=len(start))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[chunk[order]]
    table = start.new_ones(len(start), 2 + int(place.max()) if len(place) else 1)
    table[:, 0] = start
    table[chunk, 1 + place] = inner
    return table.cumprod(1)[chunk, place]


def inner_boundaries(chunks: Chunks, pieces: Tensor) -> Tensor:
    """int64 [n, 7]: the boundaries inside chunks that have a term, see `prefix`; on the CPU.

    Chunk; side of "whole" (0: the student); the row that predicts its token; the row that predicts the token of "part"
    that starts; d; first and last, so that ``order[first:last]`` of "whole" are the tokens that begin with these d.
    """
    if chunks.student.next_ids is None or chunks.teacher.next_ids is None:
        raise ValueError("chunks: prefix KL needs the realised ids, see Chunks.of(realised=True)")
    sides = piece_sides(pieces.cpu())
    lengths = [side.length.tolist() for side in sides]
    starts, counts = ([getattr(rows, name).tolist() for rows in (chunks.student, chunks.teacher)]
                      for name in ("start", "count"))  # fmt: skip
    next_ids = chunks.student.next_ids.tolist(), chunks.teacher.next_ids.tolist()
    found = []
    for chunk in range(len(starts[0])):
        rows = [range(starts[side][chunk], starts[side][chunk] + counts[side][chunk]) for side in (0, 1)]
        tokens = [_tokens(rows[side], next_ids[side], len(lengths[side]), side) for side in (0, 1)]
        if len(rows[0]) == len(rows[1]) == 1:
            continue
        places = [
            list(itertools.accumulate((lengths[side][token] for token in tokens[side]), initial=0)) for side in (0, 1)
        ]
        if places[0][-1] != places[1][-1]:
            continue
        for whole, part in ((0, 1), (1, 0)):
            for i, first, j in _inside(sides[whole], tokens[whole], tokens[part], places[whole], places[part]):
                known = tokens[part][first:j]
                ranks = _ranks(sides[whole], sides[part], known)
                found.append([chunk, whole, rows[whole][i], rows[part][j], j - first, *ranks])
    return torch.tensor(found, dtype=torch.int64, device="cpu").reshape(-1, 7)


def _tokens(rows: range, next_ids: list[int], size: int, side: int) -> list[int]:
    """The tokens that the rows predict."""
    tokens = [next_ids[row] if 0 <= row < len(next_ids) else -1 for row in rows]
    for token in tokens:
        if not 0 <= token < size:
            name = ("student_ids", "teacher_ids")[side]
            raise ValueError(f"alignment: expected {name} in 0 ... {size - 1} within chunks, got {token}")
    return tokens


def _inside(
    side: Side, whole: list[int], part: list[int], whole_places: list[int], part_places: list[int]
) -> Iterator[tuple[int, int, int]]:
    """The tokens part[j] that start within whole[i], which begins with the pieces part[first:j]; as (i, first, j)."""
    for i, token in enumerate(whole):
        begin, end = whole_places[i : i + 2]
        together = [j for j in range(len(part)) if part_places[j] == begin]
        for earlier in range(i):  # tokens without text that stand on both sides of the place
            is_there = whole_places[earlier] == whole_places[earlier + 1] == begin
            if is_there and together and _pieces_of(side, whole[earlier])[:1] == [part[together[0]]]:
                del together[0]
        if not together:
            continue
        first, pieces = together[0], _pieces_of(side, token)
        for j in range(first + 1, len(part)):
            if part_places[j] < end and pieces[: j - first] == part[first:j]:
                yield i, first, j


def _pieces_of(side: Side, token: int) -> list[int]:
    return side.pieces[side.ptr[token] : side.ptr[token + 1]].tolist()


def _ranks(side: Side, other: Side, known: list[int]) -> tuple[int, int]:
    """The part of `order` whose tokens begin with the known pieces: a range, since it is sorted by pieces."""

    def in_order(pieces: list[int]) -> list[tuple[float, int]]:
        return [(int(other.event[piece]) if piece < len(other.event) else math.inf, piece) for piece in pieces]

    def begin_of(rank: int) -> list[tuple[float, int]]:
        return in_order(_pieces_of(side, int(side.order[rank]))[: len(known)])

    ranks, wanted = range(len(side.order)), in_order(known)
    return bisect.bisect_left(ranks, wanted, key=begin_of), bisect.bisect_right(ranks, wanted, key=begin_of)


class Inside(NamedTuple):
    """Boundaries inside chunks; rows and events of the student first."""

    place: Tensor  # int64 [n]: among all of them
    rows: Sequence[Tensor]  # int64 [n] twice
    events: Sequence[Tensor]  # int64 [n, V_student] and [n, V_teacher]
    number: int  # of events
    left_out: Tensor  # bool [n, number]: "ends", where that is no event


def insides(
    chunks: Chunks, boundaries: Tensor, sides: tuple[Side, Side], roots: Sequence[Tensor], merged: Tensor
) -> Iterator[Inside]:
    """The boundaries inside the chunks, by the side whose token goes on there."""
    next_ids = chunks.student.realised, chunks.teacher.realised
    for whole in (0, 1):
        index = (boundaries[:, 1] == whole).nonzero()[:, 0]
        if len(index) == 0:
            continue
        _, _, whole_row, part_row, depth, *tokens = boundaries[index].unbind(1)
        *events, number = next_pieces(sides[whole], sides[1 - whole], depth, *tokens)
        left_out = torch.zeros(len(index), number, dtype=torch.bool, device=index.device)
        left_out[:, 0] = merged[roots[1 - whole][next_ids[1 - whole][part_row - depth]]]
        order = slice(None, None, -1 if whole else 1)
        yield Inside(index, [whole_row, part_row][order], events[order], number, left_out)


def next_pieces(whole: Side, part: Side, depth: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, int]:
    """The events inside a token: of the whole side [n, V_whole], of the part side [n, V_part], and their number.

    0 is "ends"; a token of the whole side that takes no part has the number of events.
    """
    device = depth.device
    order, ptr, pieces, part_event = (
        values.to(device).long() for values in (whole.order, whole.ptr, whole.pieces, part.event)
    )
    part_count = int(part_event.max()) + 1
    sizes = last - first
    boundary = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
    token = order[ranges(first, sizes)]
    at = ptr[token] + depth[boundary]
    piece = pieces[at.clamp_max(len(pieces) - 1)]
    following = torch.cat([part_event, part_event.new_tensor([part_count])])[piece]
    following = torch.where(at < ptr[token + 1], following, -1)
    is_new = following >= 0
    is_new[1:] &= (following[1:] != following[:-1]) | (boundary[1:] != boundary[:-1])
    counts = torch.zeros_like(sizes).index_add(0, boundary, is_new.long())
    event = torch.where(following < 0, 0, is_new.cumsum(0) - (counts.cumsum(0) - counts)[boundary])
    count = 1 + int(counts.max())
    whole_events = torch.full((len(sizes), len(order)), count, device=device)
    whole_events[boundary, token] = event
    of_part = torch.zeros(len(sizes), part_count + 1, dtype=torch.int64, device=device)
    of_part[boundary[following >= 0], following[following >= 0]] = event[following >= 0]
    return whole_events, of_part[:, part_event], count
