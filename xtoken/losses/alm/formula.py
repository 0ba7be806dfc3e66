"""The formula of ALM."""

from __future__ import annotations

from torch import Tensor

from xtoken.alignment import Chunks
from xtoken.losses.numerics import log_complement, log_likelihood, statistics_dtype


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
    log_p = log_likelihood(student_logits, chunks.student, dtype) / temperature
    log_q = log_likelihood(teacher_logits, chunks.teacher, dtype) / temperature
    ahead, behind = (log_p, log_q) if reverse else (log_q, log_p)
    loss = ahead.exp() * (ahead - behind)
    ahead, behind = log_complement(ahead), log_complement(behind)
    return (loss + ahead.exp() * (ahead - behind)) * temperature**2
