"""KL between chunk distributions on common pairs, L1 between the sorted others."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks, Rows
from xtoken.losses.divergence import Divergence
from xtoken.losses.numerics import scaled, sorted_l1, statistics_dtype


def ranked(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    pairs: tuple[Tensor, Tensor],
    *,
    uncommon_top_k: int = 8192,
    temperature: float = 1.0,
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """KL on common pairs, sorted L1 on the rest; losses differ in the pairs (see `common_pairs`).

    With ``lp``, ``lq`` the log_softmax over the whole vocabulary, averaged over the chunk's predictor rows::

        common = sum over pairs of exp(lq) (lq - lp)             reverse: exp(lp) (lp - lq)
        uncommon = sum_i |P_i - Q_i|

    where P, Q are the largest probabilities outside the pairs, descending, ``min(uncommon_top_k, |P|, |Q|)``
    of them. Equal probabilities of the student share their gradient. Other divergences of the common part are those of
    `xtoken.losses.divergence`.

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

    Source: Hugging Face TRL; X-Token (arXiv 2605.21699).
    """
    dtype = statistics_dtype(student_logits, teacher_logits)
    lp = chunk_log_probabilities(student_logits, chunks.student, temperature, dtype)
    lq = chunk_log_probabilities(teacher_logits, chunks.teacher, temperature, dtype)
    lp_common, lq_common = lp.index_select(1, pairs[0]), lq.index_select(1, pairs[1])
    common = Divergence.of(reverse, beta, skew)(lq_common.exp(), lq_common, lp_common.exp(), lp_common)
    p = lp.index_select(1, _others(pairs[0], lp.shape[1])).exp()
    q = lq.index_select(1, _others(pairs[1], lq.shape[1])).exp()
    uncommon = sorted_distance(p, q, min(uncommon_top_k, p.shape[1], q.shape[1]))
    return common * temperature**2, uncommon * temperature**2


def chunk_log_probabilities(logits: Tensor, rows: Rows, temperature: float, dtype: torch.dtype) -> Tensor:
    """Mean over the rows of log_softmax, with the logits averaged by themselves: equal sums stay equal."""
    z = scaled(logits[rows.index()], 1.0, dtype)
    z = z - z.detach().amax(-1, keepdim=True)
    normaliser = (z / temperature).exp().sum(-1, keepdim=True).log()
    return rows.mean(z) / temperature - rows.mean(normaliser)


def sorted_distance(p: Tensor, q: Tensor, count: int) -> Tensor:
    """`sorted_l1` for autograd: [K], whose derivative in p is its slope."""
    distance, slope = sorted_l1(p.detach(), q, count)
    return distance + (slope * (p - p.detach())).sum(-1)


def _others(ids: Tensor, size: int) -> Tensor:
    rest = torch.ones(size, dtype=torch.bool, device=ids.device)
    rest[ids] = False
    return rest.nonzero()[:, 0]
