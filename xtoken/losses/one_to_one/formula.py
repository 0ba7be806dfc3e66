"""The formula of the strict one-to-one loss."""

from __future__ import annotations

from torch import Tensor

from xtoken.alignment import Chunks
from xtoken.losses.divergence import Divergence
from xtoken.losses.numerics import scaled, statistics_dtype
from xtoken.losses.on_pieces import Partners, are_partners


def one_to_one(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    shared: Partners,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    reverse: bool = True,
) -> Tensor:
    """Only where one token stands for one token that both vocabularies have, and only on such tokens.

    With P and Q the softmax of both sides over the shared tokens, or over the `top_k` of them that the student finds
    most probable::

        loss = sum P (log P - log Q)          reverse=False: sum Q (log Q - log P)

    and 0 for every other chunk. From the paper: the positions, both sets (16 in its second), that they are
    renormalised, and the reverse KL. This library's reading: a position counts if its two tokens are partners, so
    tokens of equal text or of equal role.

    Parameters
    ----------
    student_logits : [N_s, V_student]
    teacher_logits : [N_t, V_teacher]
    chunks : Chunks
        With realised ids.
    shared : Partners

    Returns
    -------
    Tensor
        [K]

    Source: arXiv 2610.08448.
    """
    dtype, used = statistics_dtype(student_logits, teacher_logits), are_partners(chunks, shared).nonzero()[:, 0]
    z = scaled(student_logits[chunks.student.start[used]].index_select(1, shared.student), temperature, dtype)
    y = scaled(teacher_logits[chunks.teacher.start[used]].index_select(1, shared.teacher), temperature, dtype)
    if top_k is not None and top_k < z.shape[1]:
        best = z.detach().topk(top_k, dim=1).indices
        z, y = z.gather(1, best), y.gather(1, best)
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    losses = Divergence.of(reverse)(log_q.exp(), log_q, log_p.exp(), log_p)
    return losses.new_zeros(len(chunks)).index_add(0, used, losses) * temperature**2
