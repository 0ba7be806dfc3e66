"""The formula of ESCD."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.alignment import Chunks
from xtoken.losses.numerics import log_sums, ranges, scaled, statistics_dtype
from xtoken.losses.spelling import Groups, Spelling


def escd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    known: Spelling,
    grouped: Groups,
    *,
    temperature: float = 1.0,
) -> Tensor:
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

    Parameters
    ----------
    student_logits : [N_s, V_student]
    teacher_logits : [N_t, V_teacher]
    chunks : Chunks
        With realised ids.
    known : Spelling
    grouped : Groups

    Returns
    -------
    Tensor
        [K]

    Source: ESCD (arXiv 2609.34738).
    """
    dtype, none = statistics_dtype(student_logits, teacher_logits), student_logits.shape[1]
    start = chunks.student.start
    log_p = scaled(student_logits[start], temperature, dtype).log_softmax(-1)
    q = scaled(teacher_logits[chunks.teacher.start], temperature, dtype).softmax(-1)
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
    log_p = scaled(student_logits[start[longer] + 1], temperature, dtype).log_softmax(-1)
    terms = -of_groups * log_sums(log_p[chunk[owner], follows], owner, len(group))
    return loss.index_add(0, longer[chunk], terms) * temperature**2
