"""The formula of KL for one shared tokenizer."""

from __future__ import annotations

from torch import Tensor

from xtoken.alignment.chunks import Chunks
from xtoken.losses.divergence import Divergence
from xtoken.losses.numerics import scaled, statistics_dtype


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    columns: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
) -> Tensor:
    """KL for one shared tokenizer: ``sum_C q (log q - log p)``, with p and q normalised over the columns C.

    The other divergences of p and q are those of `xtoken.losses.divergence`.

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
    divergence = Divergence.of(reverse, beta, skew)
    return divergence(log_q.exp(), log_q, log_p.exp(), log_p) * temperature**2
