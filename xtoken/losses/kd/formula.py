"""The formula of KL for one shared tokenizer."""

from __future__ import annotations

from torch import Tensor

from xtoken.alignment.chunks import Chunks
from xtoken.losses.numerics import scaled, statistics_dtype


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
    dtype = statistics_dtype(student_logits, teacher_logits)
    z, y = student_logits[chunks.student.start], teacher_logits[chunks.teacher.start]
    if columns is not None:
        z, y = z.index_select(1, columns), y.index_select(1, columns)
    log_p = scaled(z, temperature, dtype).log_softmax(-1)
    log_q = scaled(y, temperature, dtype).log_softmax(-1)
    if reverse:
        loss = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        loss = (log_q.exp() * (log_q - log_p)).sum(-1)
    return loss * temperature**2
