"""ALM: approximate likelihood matching, on the probabilities of the realised text alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, overload

from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import Losses, Options, Unpack, check_count, compute, public_loss
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Loss, Needs
from xtoken.losses.numerics import log_complement, log_likelihood, statistics_dtype
from xtoken.losses.operator import register


@register("alm", "ALM", Needs.NOTHING)
@dataclass(frozen=True)
class ALM(Loss):
    """Approximate likelihood matching: KL between (Q, 1 - Q) and (P, 1 - P), with the likelihoods of the chunk's text.

    With P and Q the products of the probabilities of the chunk's realised tokens under student and teacher, and
    ``p = P ** (1 / tau)``, ``q = Q ** (1 / tau)``::

        loss = q (log q - log p) + (1 - q) (log(1 - q) - log(1 - p))          reverse exchanges p and q

    A complement counts as at least the type's ``eps``, so that a certain text is finite.
    """

    reads_tokens: ClassVar[bool] = True

    temperature: float
    reverse: bool

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        dtype = statistics_dtype(student, teacher)
        log_p = log_likelihood(student, chunks.student, dtype) / self.temperature
        log_q = log_likelihood(teacher, chunks.teacher, dtype) / self.temperature
        ahead, behind = (log_p, log_q) if self.reverse else (log_q, log_p)
        loss = ahead.exp() * (ahead - behind)
        ahead, behind = log_complement(ahead), log_complement(behind)
        return (loss + ahead.exp() * (ahead - behind)) * self.temperature**2


class ALMOptions(Options, total=False):
    """Keyword arguments of `alm_loss`, beside ``labels``."""

    reverse: bool
    student_vocab_size: int | None
    teacher_vocab_size: int | None


@overload
def alm_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, *,
    labels: None = None, **options: Unpack[ALMOptions],
) -> Tensor: ...  # fmt: skip
@overload
def alm_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, *,
    labels: Tensor, **options: Unpack[ALMOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def alm_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    **call: Any,
) -> Losses:
    """Approximate likelihood matching: the KL of "this text or another", teacher against student, for each chunk.

    The formula is that of `xtoken.losses.alm.ALM`. It needs to know nothing of the vocabularies, and looks only at the
    probabilities of the chunk's own tokens, not at what else could have stood there.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment}
        With its token ids.
    {labels}
    temperature : float
        Likelihoods are raised to the power of its inverse; the loss is multiplied by its square.
    reverse : bool
        KL(student || teacher).
    student_vocab_size, teacher_vocab_size : int, optional
        Columns of the logits that belong to tokens. Default: all. Needed for `TopKLogits`.
    {reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: tokenkit; Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching (arXiv 2503.20083).
    """
    check_count(student_vocab_size, "student_vocab_size", optional=True)
    check_count(teacher_vocab_size, "teacher_vocab_size", optional=True)
    sizes = student_vocab_size, teacher_vocab_size
    return compute(ALM(temperature, reverse), student_logits, teacher_logits, alignment, sizes=sizes, **call)


linear_alm_loss = linear(alm_loss)
