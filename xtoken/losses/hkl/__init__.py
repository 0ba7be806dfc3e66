"""H-KL: KL on the tokens with a dominant partner, sorted L1 on the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

from xtoken.alignment import Alignment
from xtoken.losses.call import Losses, Unpack, compute, public_loss
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Matrix, Needs
from xtoken.losses.operator import register
from xtoken.losses.ranked import DEFAULT_UNCOMMON_TOP_K, PairedLoss, RankedOptions
from xtoken.projection.entries import DOMINANT_WEIGHT


@register("hkl", "H-KL", Needs.PROJECTION, kernels="xtoken.losses.ranked")
@dataclass(frozen=True)
class HKL(PairedLoss):
    """See `hkl_loss`."""


class HKLOptions(RankedOptions, total=False):
    """Keyword arguments of `hkl_loss`, beside ``labels``."""

    min_weight: float


@overload
def hkl_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, projection: Any, *,
    labels: None = None, **options: Unpack[HKLOptions],
) -> Tensor: ...  # fmt: skip
@overload
def hkl_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, projection: Any, *,
    labels: Tensor, **options: Unpack[HKLOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def hkl_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    projection: Any,
    *,
    temperature: float = 1.0,
    uncommon_top_k: int = DEFAULT_UNCOMMON_TOP_K,
    min_weight: float = DOMINANT_WEIGHT,
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
    agree: bool = False,
    **call: Any,
) -> Losses:
    """H-KL: KL(teacher || student) on the tokens with a dominant partner in W, L1 between the sorted others.

    The formulas are those of `xtoken.reference.ranked`; the common tokens are widened from those that both vocabularies
    have to the rows of W whose largest weight is dominant.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment, projection, labels, temperature, uncommon_top_k}
    min_weight : float
        A row with at least this weight is common with the teacher token of that weight, in (0, 1].
    reverse : bool
        Reverses the KL of the common part, to which the next two apply as well.
    {beta, skew, agree, reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: X-Token (arXiv 2605.21699).
    """
    W = Matrix.of(projection)
    loss = HKL(W, temperature, uncommon_top_k, reverse, beta, skew, agree, min_weight)
    return compute(loss, student_logits, teacher_logits, alignment, sizes=W.shape, **call)


linear_hkl_loss = linear(hkl_loss)
