"""The formula of SimCT."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.alignment import Chunks, Rows
from xtoken.losses.divergence import Divergence
from xtoken.losses.numerics import scaled, statistics_dtype
from xtoken.losses.on_pieces import Partners, are_partners


def simct(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    shared: Partners,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
) -> Tensor:
    """SimCT: a divergence over the shared tokens and the text that is there, each with its mean log-probability.

    With ``score(u)`` the mean of the log-probabilities of the tokens that spell u on a side: of a shared token that of
    the chunk's first row, and of the chunk's own text, if it is no shared token, that of its realised tokens::

        P = softmax of the student's scores, Q of the teacher's
        loss = sum Q (log Q - log P), or another divergence of P and Q (see `xtoken.losses.divergence`)

    From the paper: the candidates (shared tokens and minimal aligned units), the mean as the score, the softmax, and
    that the divergence is whatever is used for one tokenizer. This library's reading: of the units only the realised
    one of a chunk is a candidate, beside all shared tokens; and log-probabilities are those of softmax(z / tau).

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

    Source: SimCT (arXiv 2605.07711).
    """
    dtype = statistics_dtype(student_logits, teacher_logits)
    is_shared = are_partners(chunks, shared)
    is_absent = torch.zeros(len(chunks), len(shared.student) + 1, dtype=torch.bool, device=is_shared.device)
    is_absent[:, -1] = is_shared
    distributions: list[Tensor] = []
    for logits, rows, columns in (
        (teacher_logits, chunks.teacher, shared.teacher),
        (student_logits, chunks.student, shared.student),
    ):
        scores = _scores(logits, rows, columns, temperature, dtype).masked_fill(is_absent, -torch.inf)
        log_p = scores.log_softmax(-1)
        distributions += [log_p.exp(), log_p.masked_fill(is_absent, 0)]
    return Divergence.of(reverse, beta, skew)(*distributions) * temperature**2


def _scores(logits: Tensor, rows: Rows, columns: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """[K, C + 1]: of the columns in the first rows, and of the realised tokens."""
    index, owner = rows.index(), rows.owner()
    log_p = scaled(logits[index], temperature, dtype).log_softmax(-1)
    realised = rows.total(log_p.gather(1, rows.realised[index, None])[:, 0], owner) / rows.count
    first = (index == rows.start[owner]).nonzero()[:, 0]
    return torch.cat([log_p[first].index_select(1, columns), realised[:, None]], 1)
