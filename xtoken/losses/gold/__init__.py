"""GOLD: KL on common tokens, sorted L1 on the others."""

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
from xtoken.projection.entries import EXACT_WEIGHT


@register("gold", "GOLD", Needs.PROJECTION, kernels="xtoken.losses.ranked")
@dataclass(frozen=True)
class GOLD(PairedLoss):
    """See `gold_loss`."""

    min_weight: float = EXACT_WEIGHT


@overload
def gold_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, projection: Any, *,
    labels: None = None, **options: Unpack[RankedOptions],
) -> Tensor: ...  # fmt: skip
@overload
def gold_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, projection: Any, *,
    labels: Tensor, **options: Unpack[RankedOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def gold_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    projection: Any,
    *,
    temperature: float = 1.0,
    uncommon_top_k: int = DEFAULT_UNCOMMON_TOP_K,
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
    agree: bool = False,
    **call: Any,
) -> Losses:
    """GOLD: KL(teacher || student) on the tokens that both vocabularies have, L1 between the sorted others.

    The formulas are those of `xtoken.reference.gold`; common tokens are the rows of W with a single weight 1.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment, projection, labels, temperature, uncommon_top_k}
    reverse : bool
        Reverses the KL of the common part, to which the next two apply as well.
    {beta, skew, agree, reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: Hugging Face TRL, ``trl.experimental.gold``.
    """
    W = Matrix.of(projection)
    loss = GOLD(W, temperature, uncommon_top_k, reverse, beta, skew, agree)
    return compute(loss, student_logits, teacher_logits, alignment, sizes=W.shape, **call)


linear_gold_loss = linear(gold_loss)
