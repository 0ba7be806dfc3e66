"""ULD: L1 between sorted distributions, without any knowledge of the vocabularies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import Losses, Options, Unpack, check_count, compute, public_loss
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Needs
from xtoken.losses.numerics import statistics_dtype
from xtoken.losses.operator import register
from xtoken.losses.ranked import UnpairedLoss, chunk_log_probabilities, sorted_distance


@register("uld", "ULD", Needs.NOTHING, kernels="xtoken.losses.ranked")
@dataclass(frozen=True)
class ULD(UnpairedLoss):
    """See `uld_loss`."""

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        return uld(student, teacher, chunks, temperature=self.temperature)


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


class ULDOptions(Options, total=False):
    """Keyword arguments of `uld_loss`, beside ``labels``."""

    student_vocab_size: int | None
    teacher_vocab_size: int | None


@overload
def uld_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, *,
    labels: None = None, **options: Unpack[ULDOptions],
) -> Tensor: ...  # fmt: skip
@overload
def uld_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, *,
    labels: Tensor, **options: Unpack[ULDOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def uld_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    *,
    temperature: float = 1.0,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    **call: Any,
) -> Losses:
    """Universal logit distillation: L1 between the two descending-sorted distributions of each chunk.

    The formula is that of `xtoken.reference.uld`.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment, labels, temperature}
    student_vocab_size, teacher_vocab_size : int, optional
        Columns of the logits that belong to tokens. Default: all. Needed for `TopKLogits`.
    {reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss (arXiv 2402.12030).
    """
    check_count(student_vocab_size, "student_vocab_size", optional=True)
    check_count(teacher_vocab_size, "teacher_vocab_size", optional=True)
    sizes = student_vocab_size, teacher_vocab_size
    return compute(ULD(temperature), student_logits, teacher_logits, alignment, sizes=sizes, **call)


linear_uld_loss = linear(uld_loss)
