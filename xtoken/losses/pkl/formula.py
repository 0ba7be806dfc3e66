"""The formula of P-KL."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks, Rows
from xtoken.losses.divergence import Divergence
from xtoken.losses.numerics import EPSILON, scaled, statistics_dtype
from xtoken.projection.entries import Entries, project


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
    beta: float = 0.0,
    skew: float = 0.0,
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
    c_T)``. The mixed divergences of `xtoken.losses.divergence` are those of q and m, with m + eps in logarithms and
    mixtures; with "chain" those of c_T q and c_S m.

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
    dtype = statistics_dtype(student_logits, teacher_logits)
    merged = chunks if merge == "mean" else chunks.first()
    p = merged.student.mean(scaled(student_logits[merged.student.index()], temperature, dtype).softmax(-1))
    x = project(p, entries, len(columns))
    m = x / (x.sum(-1, keepdim=True) + EPSILON)
    log_m = (m + EPSILON).log()
    y = teacher_logits[merged.teacher.index()].index_select(1, columns)
    log_q = merged.teacher.mean(scaled(y, temperature, dtype).log_softmax(-1))
    divergence = Divergence.of(reverse, beta, skew)
    q = log_q.exp()
    if merge != "chain":
        return divergence(q, log_q, m, log_m) * temperature**2
    log_c_student = _later_log_probability(student_logits, chunks.student, temperature, dtype)
    log_c_teacher = _later_log_probability(teacher_logits, chunks.teacher, temperature, dtype)
    if divergence.is_mixed:
        c_s, c_t = log_c_student[:, None], log_c_teacher[:, None]
        loss = divergence(c_t.exp() * q, c_t + log_q, c_s.exp() * m, c_s + log_m)
    elif divergence.reverse:
        loss = log_c_student.exp() * (divergence(q, log_q, m, log_m) + log_c_student - log_c_teacher)
    else:
        loss = log_c_teacher.exp() * (divergence(q, log_q, m, log_m) + log_c_teacher - log_c_student)
    return loss * temperature**2


def _later_log_probability(logits: Tensor, rows: Rows, temperature: float, dtype: torch.dtype) -> Tensor:
    if rows.next_ids is None:
        raise ValueError("chunks: merge='chain' needs the realised ids, see Chunks.of(realised=True)")
    index, owner = rows.later()
    log_p = scaled(logits[index], temperature, dtype).log_softmax(-1)
    return rows.total(log_p.gather(1, rows.next_ids[index, None])[:, 0], owner)
