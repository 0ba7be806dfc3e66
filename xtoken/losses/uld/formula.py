"""The formula of ULD."""

from __future__ import annotations

from torch import Tensor

from xtoken.alignment.chunks import Chunks
from xtoken.losses.numerics import statistics_dtype
from xtoken.losses.ranked.formula import chunk_log_probabilities, sorted_distance


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
    dtype = statistics_dtype(student_logits, teacher_logits)
    p = chunk_log_probabilities(student_logits, chunks.student, temperature, dtype).exp()
    q = chunk_log_probabilities(teacher_logits, chunks.teacher, temperature, dtype).exp()
    return sorted_distance(p, q, max(p.shape[1], q.shape[1])) * temperature**2
