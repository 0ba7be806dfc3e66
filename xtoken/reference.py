"""The losses as plain, unfused PyTorch, written from their formulas: the truth for every fast backend.

All functions work on matrices of logits, one row per token position (``[B, T, V]`` becomes
``logits.flatten(0, 1)``), run on any device, are differentiable by autograd, and compute in the widest type
of their inputs, at least float32. They hold whole ``[rows, V]`` temporaries: call `xtoken.pkl_loss` and its
siblings to train.

Conventions
-----------
``z`` is a student row, ``y`` a teacher row, ``tau`` the temperature, ``p = softmax(z / tau)`` and
``q = softmax(y / tau)``. Row ``t`` predicts token ``t + 1``. Logits are read as ``max(logit, LOWEST_LOGIT)``:
a logit of -inf is a probability of exactly zero, and everything stays finite (0 log 0 = 0). Every function
returns one loss per chunk, multiplied by ``tau ** 2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken import _core
from xtoken.alignment import Chunks as Chunks
from xtoken.alignment import Rows as Rows
from xtoken.alignment import predictable as predictable
from xtoken.pieces import Side
from xtoken.pieces import sides as piece_sides
from xtoken.projection import Entries, project
from xtoken.projection import column_set as column_set
from xtoken.projection import common_pairs as common_pairs
from xtoken.projection import restrict as restrict

EPSILON = 1e-10
"""Added to projected masses before a division or a logarithm."""

LOWEST_LOGIT = -1e4
"""Smaller logits count as this one; its probability is zero in every type."""


def pkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    entries: Entries,
    columns: Tensor,
    *,
    temperature: float = 1.0,
    merge: str = "first",
    reverse: bool = False,
) -> Tensor:
    """Projected KL: the teacher against the student moved to the teacher's vocabulary by W, on the columns C.

    With ``x = W^T p``, for each chunk::

        merge="first"   m = x / (sum_C x + eps)                        first predictor row
                        log q = log_softmax over C of y / tau          first predictor row
                        loss = sum_C q (log q - log(m + eps))
        merge="mean"    as "first", with p and log q averaged over the predictor rows
                        (q is not normalised again)
        merge="chain"   loss = c_T (KL_first + log c_T - log c_S), where c is the product of the
                        probabilities of the realised later tokens of the chunk

    ``reverse=True`` gives ``sum_C m (log(m + eps) - log q)``; with "chain" ``c_S (KL_first + log c_S - log
    c_T)``.

    Parameters
    ----------
    student_logits : [N_s, V_student]
    teacher_logits : [N_t, V_teacher]
    chunks : Chunks
        With realised ids for ``merge="chain"``.
    entries : Entries
        W in the columns; a ``weight`` that requires a gradient gets one.
    columns : int64 [C]
        Teacher ids.

    Returns
    -------
    Tensor
        [K]

    Source: X-Token (arXiv 2605.21699), section on P-KL; ``merge="mean"`` is NeMo-RL's implementation.
    """
    dtype = _statistics_dtype(student_logits, teacher_logits)
    merged = chunks if merge == "mean" else chunks.first()
    p = merged.student.mean(_scaled(student_logits[merged.student.index()], temperature, dtype).softmax(-1))
    x = project(p, entries, len(columns))
    m = x / (x.sum(-1, keepdim=True) + EPSILON)
    log_m = (m + EPSILON).log()
    y = teacher_logits[merged.teacher.index()].index_select(1, columns)
    log_q = merged.teacher.mean(_scaled(y, temperature, dtype).log_softmax(-1))
    if reverse:
        loss = (m * (log_m - log_q)).sum(-1)
    else:
        loss = (log_q.exp() * (log_q - log_m)).sum(-1)
    if merge == "chain":
        log_c_student = _later_log_probability(student_logits, chunks.student, temperature, dtype)
        log_c_teacher = _later_log_probability(teacher_logits, chunks.teacher, temperature, dtype)
        if reverse:
            loss = log_c_student.exp() * (loss + log_c_student - log_c_teacher)
        else:
            loss = log_c_teacher.exp() * (loss + log_c_teacher - log_c_student)
    return loss * temperature**2


def gold(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    pairs: tuple[Tensor, Tensor],
    *,
    uncommon_top_k: int = 8192,
    temperature: float = 1.0,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """GOLD and H-KL: KL on common pairs, sorted L1 on the rest; they differ in the pairs (see
    `common_pairs`).

    With ``lp``, ``lq`` the log_softmax over the whole vocabulary, averaged over the chunk's predictor rows::

        common = sum over pairs of exp(lq) (lq - lp)             reverse: exp(lp) (lp - lq)
        uncommon = sum_i |P_i - Q_i|

    where P, Q are the largest probabilities outside the pairs, descending, ``min(uncommon_top_k, |P|, |Q|)``
    of them. Equal probabilities of the student share their gradient (see `uld`).

    Parameters
    ----------
    student_logits : [N_s, V_student]
    teacher_logits : [N_t, V_teacher]
    chunks : Chunks
    pairs : (int64 [P], int64 [P])
        Student ids and teacher ids.

    Returns
    -------
    common, uncommon : [K]
        The loss is their sum.

    Source: Hugging Face TRL, ``trl.experimental.gold``; X-Token (arXiv 2605.21699) for H-KL.
    """
    dtype = _statistics_dtype(student_logits, teacher_logits)
    lp = _chunk_log_probabilities(student_logits, chunks.student, temperature, dtype)
    lq = _chunk_log_probabilities(teacher_logits, chunks.teacher, temperature, dtype)
    lp_common, lq_common = lp.index_select(1, pairs[0]), lq.index_select(1, pairs[1])
    if reverse:
        common = (lp_common.exp() * (lp_common - lq_common)).sum(-1)
    else:
        common = (lq_common.exp() * (lq_common - lp_common)).sum(-1)
    p = lp.index_select(1, _others(pairs[0], lp.shape[1])).exp()
    q = lq.index_select(1, _others(pairs[1], lq.shape[1])).exp()
    uncommon = _sorted_l1(p, q, min(uncommon_top_k, p.shape[1], q.shape[1]))
    return common * temperature**2, uncommon * temperature**2


def prefix(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    pieces: Tensor,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """Prefix KL: the exact chain rule over the boundaries of a chunk, on events that both vocabularies know.

    At each boundary the tokens of both sides are cut into the same events e, and with P[e] and Q[e] the probability
    of e under student and teacher, divided by its sum over the events::

        term = sum_e Q[e] (log Q[e] - log P[e])         reverse: sum_e P[e] (log P[e] - log Q[e])
        loss = sum of the terms of the chunk's boundaries

    *The start of the chunk.* The event of a token is its root: the token itself if the other vocabulary has it too,
    else the root of its first piece under the other tokenizer. Every token has one event.

    *Inside*, where one side ("part") starts a token within a token of the other ("whole") whose pieces begin with the
    d tokens of "part" since then. Of "whole" the tokens whose pieces begin with these d are counted, at the row that
    predicts the token that goes on; their event is the next piece, or "ends" if there is none. Of "part" all tokens
    are counted, at the row that predicts the token that starts; the event of a token is itself if it is such a next
    piece, else "ends".

    An event that has no token on one side is left out on both. Inner boundaries that no such d tokens lead to, as where
    tokens of both sides overlap without a common start, have no term.

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
    dtype = _statistics_dtype(student_logits, teacher_logits)
    logits, sides, device = (student_logits, teacher_logits), piece_sides(pieces), student_logits.device

    def terms(rows: tuple[Tensor, Tensor], events: tuple[Tensor, Tensor], count: int) -> Tensor:
        log_p, log_q = (
            _event_log_mass(_scaled(z[row], temperature, dtype), event, count)
            for z, row, event in zip(logits, rows, events, strict=True)
        )
        missing = log_p.isinf() | log_q.isinf()
        log_p, log_q = (
            x.masked_fill(missing, -torch.inf).log_softmax(-1).masked_fill(missing, 0) for x in (log_p, log_q)
        )
        ahead, behind = (log_p, log_q) if reverse else (log_q, log_p)
        return (ahead.exp().masked_fill(missing, 0) * (ahead - behind)).sum(-1)

    student_roots, teacher_roots = (side.event.to(device).long().expand(len(chunks), -1) for side in sides)
    loss = terms((chunks.student.start, chunks.teacher.start), (student_roots, teacher_roots), int(pieces[2]))
    boundaries = _inner_boundaries(chunks, pieces).to(device)
    for whole in (0, 1):
        chunk, _, whole_row, part_row, depth, first, last = boundaries[boundaries[:, 1] == whole].unbind(1)
        if len(chunk) == 0:
            continue
        whole_events, part_events, count = _next_pieces(sides[whole], sides[1 - whole], depth, first, last)
        if whole == 0:
            inner = terms((whole_row, part_row), (whole_events, part_events), count)
        else:
            inner = terms((part_row, whole_row), (part_events, whole_events), count)
        loss = loss.index_add(0, chunk, inner)
    return loss * temperature**2


def _inner_boundaries(chunks: Chunks, pieces: Tensor) -> Tensor:
    """int64 [n, 7]: the `InnerBoundary` of ``csrc/core/piece_index.h``, on the CPU."""
    if chunks.student.next_ids is None or chunks.teacher.next_ids is None:
        raise ValueError("chunks: prefix KL needs the realised ids, see Chunks.of(realised=True)")
    arrays = [
        values.cpu().contiguous().numpy()
        for rows in (chunks.student, chunks.teacher)
        for values in (rows.start, rows.count, rows.next_ids)
        if values is not None
    ]
    return torch.from_numpy(_core.inner_boundaries(pieces.cpu().numpy(), *arrays))


def _next_pieces(whole: Side, part: Side, depth: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, int]:
    """The events inside a token: of the whole side [n, V_whole], of the part side [n, V_part], and their number.

    0 is "ends"; a token of the whole side that takes no part has the number of events.
    """
    device = depth.device
    order, ptr, pieces = (values.to(device).long() for values in (whole.order, whole.ptr, whole.pieces))
    sizes = last - first
    boundary = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
    rank = torch.arange(len(boundary), device=device) - (sizes.cumsum(0) - sizes - first)[boundary]
    token = order[rank]
    at = ptr[token] + depth[boundary]
    piece = torch.where(at < ptr[token + 1], pieces[at.clamp_max(len(pieces) - 1)], -1)
    is_new = piece >= 0
    is_new[1:] &= (piece[1:] != piece[:-1]) | (boundary[1:] != boundary[:-1])
    counts = torch.zeros_like(sizes).index_add(0, boundary, is_new.long())
    event = torch.where(piece < 0, 0, is_new.cumsum(0) - (counts.cumsum(0) - counts)[boundary])
    count = 1 + int(counts.max())
    whole_events = torch.full((len(sizes), len(order)), count, device=device)
    whole_events[boundary, token] = event
    part_events = torch.zeros(len(sizes), len(part.event), dtype=torch.int64, device=device)
    is_token = (piece >= 0) & (piece < len(part.event))
    part_events[boundary[is_token], piece[is_token]] = event[is_token]
    return whole_events, part_events, count


def _event_log_mass(logits: Tensor, events: Tensor, count: int) -> Tensor:
    """[n, count]: logsumexp of the logits [n, V] over the tokens of each event [n, V] below count; -inf for none."""
    top = logits.new_zeros(len(logits), count + 1).scatter_reduce(
        1, events, logits.detach(), "amax", include_self=False
    )
    mass = torch.zeros_like(top).scatter_add(1, events, (logits - top.gather(1, events)).exp())
    return (mass.masked_fill(mass == 0, 1).log() + top).masked_fill(mass == 0, -torch.inf)[:, :count]


def uld(student_logits: Tensor, teacher_logits: Tensor, chunks: Chunks, *, temperature: float = 1.0) -> Tensor:
    """Universal logit distillation: ``sum_i |P_i - Q_i|`` between the two descending-sorted distributions.

    P and Q are ``exp`` of the log_softmax averaged over the chunk's predictor rows; the shorter is padded
    with zeros. The gradient with respect to a student's probability is ``sign(P_i - Q_i)`` at its rank ``i``.
    Equal probabilities have no order among themselves: each gets the mean of the signs at the ranks that they
    share, which is the mean over all their orders. (An order by id would raise low ids and lower high ones;
    in bfloat16 most of a vocabulary is tied.)

    Parameters
    ----------
    student_logits : [N_s, V_student]
    teacher_logits : [N_t, V_teacher]
    chunks : Chunks

    Returns
    -------
    Tensor
        [K]

    Source: Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss (arXiv 2402.12030).
    """
    dtype = _statistics_dtype(student_logits, teacher_logits)
    p = _chunk_log_probabilities(student_logits, chunks.student, temperature, dtype).exp()
    q = _chunk_log_probabilities(teacher_logits, chunks.teacher, temperature, dtype).exp()
    return _sorted_l1(p, q, max(p.shape[1], q.shape[1])) * temperature**2


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    columns: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """KL for one shared tokenizer: ``sum_C q (log q - log p)``, with p and q normalised over the columns C.

    Parameters
    ----------
    student_logits : [N_s, V]
    teacher_logits : [N_t, V]
    chunks : Chunks
        One row on each side.
    columns : int64 [C], optional
        Default: all.

    Returns
    -------
    Tensor
        [K]

    Source: Distilling the Knowledge in a Neural Network (arXiv 1503.02531).
    """
    dtype = _statistics_dtype(student_logits, teacher_logits)
    z, y = student_logits[chunks.student.start], teacher_logits[chunks.teacher.start]
    if columns is not None:
        z, y = z.index_select(1, columns), y.index_select(1, columns)
    log_p = _scaled(z, temperature, dtype).log_softmax(-1)
    log_q = _scaled(y, temperature, dtype).log_softmax(-1)
    if reverse:
        loss = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        loss = (log_q.exp() * (log_q - log_p)).sum(-1)
    return loss * temperature**2


@torch.no_grad()
def diagnosis(
    student_logits: Tensor,
    teacher_logits: Tensor,
    columns: Tensor,
    entries: Entries | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """[K, 3]: how far the student, projected, is the teacher inside the columns C, for each pair of rows.

    Whether both have the same largest column (1 or 0); the teacher's probability inside C; the student's probability
    that W sends to no column of C.

    Parameters
    ----------
    student_logits : [K, V_student]
    teacher_logits : [K, V_teacher]
    columns : int64 [C]
    entries : Entries, optional
        W in the columns. Default: the tokenizer is the same.
    count : int32 [], optional
        So many of the columns, from the first on, are C, and no entry is in the others. Default: all are.
    """
    dtype = _statistics_dtype(student_logits, teacher_logits)
    p, q = (_scaled(logits, 1.0, dtype).softmax(-1) for logits in (student_logits, teacher_logits))
    x = p.index_select(1, columns) if entries is None else project(p, entries, len(columns))
    y = q.index_select(1, columns)
    if count is not None:
        y = y.masked_fill(torch.arange(len(columns), device=y.device) >= count, 0.0)
    return torch.stack([(x.argmax(-1) == y.argmax(-1)).to(dtype), y.sum(-1), 1 - x.sum(-1)], 1)


@torch.no_grad()
def event_agreement(
    student_logits: Tensor, teacher_logits: Tensor, events: tuple[Tensor, Tensor], count: int
) -> Tensor:
    """bool [K]: of prefix KL's ``count`` events the same is the most probable, for each pair of rows.

    Parameters
    ----------
    student_logits : [K, V_student]
    teacher_logits : [K, V_teacher]
    events : int64 [V_student], [V_teacher]
        The event of each token.
    """
    dtype = _statistics_dtype(student_logits, teacher_logits)
    best = []
    for logits, event in zip((student_logits, teacher_logits), events, strict=True):
        z = _scaled(logits[:, : len(event)], 1.0, dtype)
        best.append(_event_log_mass(z, event.expand(len(z), -1), count).argmax(-1))
    return best[0] == best[1]


def _statistics_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _scaled(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = logits.to(dtype).clamp_min(LOWEST_LOGIT)
    return logits if temperature == 1.0 else logits / temperature


def _chunk_log_probabilities(logits: Tensor, rows: Rows, temperature: float, dtype: torch.dtype) -> Tensor:
    """Mean over the rows of log_softmax, with the logits averaged by themselves: equal sums stay equal."""
    z = _scaled(logits[rows.index()], 1.0, dtype)
    z = z - z.detach().amax(-1, keepdim=True)
    normaliser = (z / temperature).exp().sum(-1, keepdim=True).log()
    return rows.mean(z) / temperature - rows.mean(normaliser)


def _sorted_l1(p: Tensor, q: Tensor, count: int) -> Tensor:
    """Sum of |P_i - Q_i| over the `count` first ranks, descending, padded with zeros; see `uld` for ties."""
    ordered, token = p.detach().sort(descending=True)
    difference = _first(ordered, count) - _first(q.sort(descending=True).values, count)
    sign = _first(difference.detach().sign(), p.shape[1])
    distinct = torch.ones_like(token)
    distinct[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = distinct.cumsum(1) - 1
    shared = torch.zeros_like(sign).scatter_reduce(1, group, sign, "mean", include_self=False)
    slope = torch.zeros_like(sign).scatter(1, token, shared.gather(1, group))
    return difference.abs().sum(-1) + (slope * (p - p.detach())).sum(-1)


def _first(values: Tensor, count: int) -> Tensor:
    """The first `count` columns, zeros where there are fewer."""
    return torch.nn.functional.pad(values[:, :count], (0, max(0, count - values.shape[1])))


def _later_log_probability(logits: Tensor, rows: Rows, temperature: float, dtype: torch.dtype) -> Tensor:
    if rows.next_ids is None:
        raise ValueError("chunks: merge='chain' needs the realised ids, see Chunks.of(realised=True)")
    index, owner = rows.later()
    log_p = _scaled(logits[index], temperature, dtype).log_softmax(-1)
    return rows.total(log_p.gather(1, rows.next_ids[index, None])[:, 0], owner)


def _others(ids: Tensor, size: int) -> Tensor:
    rest = torch.ones(size, dtype=torch.bool, device=ids.device)
    rest[ids] = False
    return rest.nonzero()[:, 0]
