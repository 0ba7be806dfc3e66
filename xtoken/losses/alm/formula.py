"""The formula of ALM."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.alignment import Chunks, Rows
from xtoken.losses.numerics import scaled, statistics_dtype


def alm(
    student_logits: Tensor, teacher_logits: Tensor, chunks: Chunks, *, temperature: float = 1.0, reverse: bool = False
) -> Tensor:
    """Approximate likelihood matching: KL between (Q, 1 - Q) and (P, 1 - P), with the likelihoods of the chunk's text.

    With P and Q the products of the probabilities of the chunk's realised tokens under student and teacher, and
    ``p = P ** (1 / tau)``, ``q = Q ** (1 / tau)``::

        loss = q (log q - log p) + (1 - q) (log(1 - q) - log(1 - p))          reverse exchanges p and q

    A complement counts as at least the type's ``eps``, so that a certain text is finite.

    Parameters
    ----------
    student_logits : [N_s, V_student]
    teacher_logits : [N_t, V_teacher]
    chunks : Chunks
        With realised ids.

    Returns
    -------
    Tensor
        [K]

    Source: tokenkit; Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching (arXiv 2503.20083).
    """
    dtype = statistics_dtype(student_logits, teacher_logits)
    log_p = _log_likelihood(student_logits, chunks.student, dtype) / temperature
    log_q = _log_likelihood(teacher_logits, chunks.teacher, dtype) / temperature
    ahead, behind = (log_p, log_q) if reverse else (log_q, log_p)
    loss = ahead.exp() * (ahead - behind)
    ahead, behind = _log_complement(ahead), _log_complement(behind)
    return (loss + ahead.exp() * (ahead - behind)) * temperature**2


def _log_likelihood(logits: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """[K]: the sum of the log-probabilities of the tokens that the rows predict."""
    assert rows.next_ids is not None
    index = rows.index()
    log_p = scaled(logits[index], 1.0, dtype).log_softmax(-1)
    return rows.total(log_p.gather(1, rows.next_ids[index, None])[:, 0], rows.owner())


def _log_complement(log_p: Tensor) -> Tensor:
    """``log(1 - p)``, without cancellation near 0 and near 1."""
    log_p = log_p.clamp_max(-torch.finfo(log_p.dtype).eps)
    is_large = log_p > -0.6931
    near_one = (-torch.where(is_large, log_p, -1.0).expm1()).log()
    near_zero = (-torch.where(is_large, -1.0, log_p).exp()).log1p()
    return torch.where(is_large, near_one, near_zero)
