"""The losses from hidden states and the output layer: the student's logits never exist as a whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xtoken.alignment import Alignment
from xtoken.losses.call import Losses
from xtoken.losses.gold import gold_loss, hkl_loss
from xtoken.losses.kd import kd_loss
from xtoken.losses.logits import AnyLogits, LinearLogits
from xtoken.losses.pkl import pkl_loss
from xtoken.losses.prefix_kl import prefix_kl_loss
from xtoken.pieces import PieceIndex


def linear_pkl_loss(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    projection: Any,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Losses:
    """``pkl_loss(student_hidden @ lm_head_weight.T + bias, ...)`` a block of rows at a time.

    Logits of one block are computed, turned into their gradient, and taken on to the gradients of hidden states and
    output layer, so that memory beyond those does not grow with the number of tokens. Each block's part is added to
    the gradient of the output layer in that layer's type.

    Parameters
    ----------
    student_hidden : floating [B, T_s, D] or [T_s, D]
        What the output layer reads (after the last norm).
    lm_head_weight : floating [>= V_student, D]
        In the same type; may be tied to the embedding.
    teacher_logits : Tensor, TopKLogits or LinearLogits
        As for `pkl_loss`; `LinearLogits` gives the teacher's hidden states and output layer.
    alignment, projection
        As for `pkl_loss`.
    bias : floating [>= V_student], optional
    **options
        As for `pkl_loss`, but for ``inplace``. With ``labels`` (or ``reduction="none"``) backward computes the
        logits again.

    Returns
    -------
    Tensor, or with ``labels`` a pair (loss, cross-entropy)
    """
    return pkl_loss(
        LinearLogits(student_hidden, lm_head_weight, bias), teacher_logits, alignment, projection, **options
    )


def linear_gold_loss(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    projection: Any,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Losses:
    """`gold_loss` from hidden states; see `linear_pkl_loss`."""
    return gold_loss(
        LinearLogits(student_hidden, lm_head_weight, bias), teacher_logits, alignment, projection, **options
    )


def linear_hkl_loss(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    projection: Any,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Losses:
    """`hkl_loss` from hidden states; see `linear_pkl_loss`."""
    return hkl_loss(
        LinearLogits(student_hidden, lm_head_weight, bias), teacher_logits, alignment, projection, **options
    )


def linear_prefix_kl_loss(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    pieces: PieceIndex,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Losses:
    """`prefix_kl_loss` from hidden states; see `linear_pkl_loss`."""
    return prefix_kl_loss(
        LinearLogits(student_hidden, lm_head_weight, bias), teacher_logits, alignment, pieces, **options
    )


def linear_kd_loss(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_logits: AnyLogits,
    alignment: Alignment | None = None,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Losses:
    """`kd_loss` from hidden states; see `linear_pkl_loss`."""
    return kd_loss(LinearLogits(student_hidden, lm_head_weight, bias), teacher_logits, alignment, **options)
