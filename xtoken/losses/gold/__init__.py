"""GOLD and H-KL: KL on common tokens, sorted L1 on the others."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xtoken import reference
from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import (
    Losses,
    check_count,
    check_projection,
    compute,
    given_chunks,
    given_matrix,
)
from xtoken.losses.logits import AnyLogits, Source
from xtoken.losses.operator import PREPARE, Inputs, Prepared, Settings
from xtoken.projection import DOMINANT_WEIGHT, EXACT_WEIGHT

GOLD_MIN_WEIGHT, HKL_MIN_WEIGHT = EXACT_WEIGHT, DOMINANT_WEIGHT


@dataclass(frozen=True)
class GoldOptions:
    """The common pairs (student ids [P], teacher ids [P]), where GOLD and H-KL differ, and the switches."""

    operation: ClassVar[str] = "gold"
    student_ids: Tensor
    teacher_ids: Tensor
    uncommon_top_k: int
    temperature: float
    reverse: bool

    def reference(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None) -> Tensor:
        """See `xtoken.reference.gold`."""
        common, uncommon = reference.gold(
            student,
            teacher,
            chunks,
            (self.student_ids, self.teacher_ids),
            uncommon_top_k=self.uncommon_top_k,
            temperature=self.temperature,
            reverse=self.reverse,
        )
        return common + uncommon


def gold_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    projection: Any,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    uncommon_top_k: int = 8192,
    reverse: bool = False,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str = "auto",
) -> Losses:
    """GOLD: KL(teacher || student) on the tokens that both vocabularies have, L1 between the sorted others.

    The formulas are those of `xtoken.reference.gold`; common tokens are the rows of W with a single weight 1.
    Arguments, results, errors, gradients and memory are as for `pkl_loss`, except:

    Parameters
    ----------
    uncommon_top_k : int
        At most so many of the largest probabilities of uncommon tokens are compared.
    reverse : bool
        Reverses the KL of the common part.

    Source: Hugging Face TRL, ``trl.experimental.gold``.
    """
    return hkl_loss(
        student_logits,
        teacher_logits,
        alignment,
        projection,
        labels=labels,
        temperature=temperature,
        uncommon_top_k=uncommon_top_k,
        min_weight=GOLD_MIN_WEIGHT,
        reverse=reverse,
        reduction=reduction,
        inplace=inplace,
        backend=backend,
    )


def hkl_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    projection: Any,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    uncommon_top_k: int = 8192,
    min_weight: float = HKL_MIN_WEIGHT,
    reverse: bool = False,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str = "auto",
) -> Losses:
    """H-KL: as `gold_loss`, with the common tokens widened to the rows of W whose largest weight is dominant.

    Parameters
    ----------
    min_weight : float
        A row with at least this weight is common with the teacher token of that weight, in (0, 1].

    Source: X-Token (arXiv 2605.21699).
    """
    if not 0.0 < min_weight <= 1.0:
        raise ValueError(f"min_weight: expected a number in (0, 1], got {min_weight!r}")
    check_projection(projection)
    check_count(uncommon_top_k, "uncommon_top_k")
    return compute(
        "gold",
        student_logits,
        teacher_logits,
        alignment,
        sizes=tuple(projection.shape),
        projection=projection,
        labels=labels,
        reduction=reduction,
        backend=backend,
        inplace=inplace,
        temperature=temperature,
        reverse=reverse,
        min_weight=min_weight,
        uncommon_top_k=uncommon_top_k,
    )


def _prepare(inputs: Inputs, settings: Settings, student: Source, teacher: Source) -> Prepared:
    chunks = given_chunks(inputs, student, teacher)
    pairs = common_pairs(given_matrix(inputs, settings), settings.min_weight, inputs.student.device)
    return Prepared(chunks, GoldOptions(*pairs, settings.uncommon_top_k, settings.temperature, settings.reverse))


PREPARE["gold"] = _prepare


_Pairs = tuple[Tensor, Tensor]
_PAIRS: Any = WeakIdKeyDictionary()
"""By the tensor of W's column ids, which lives as long as W: {(min_weight, device): (weight, version, pairs)}."""


def common_pairs(projection: Any, min_weight: float, device: torch.device | str = "cpu") -> _Pairs:
    """The common tokens, as `xtoken.reference.common_pairs`, on `device`.

    Kept for as long as the projection lives and its weights stay as they are.
    """
    weight = projection.weight
    kept: dict[Any, tuple[Any, int, _Pairs]] = _PAIRS.setdefault(projection.col, {})
    key = min_weight, torch.device(device)
    if key in kept and kept[key][0]() is weight and kept[key][1] == weight._version:
        return kept[key][2]
    student, teacher = reference.common_pairs(projection, min_weight)
    pairs = student.to(device), teacher.to(device)
    kept[key] = weakref.ref(weight), weight._version, pairs
    return pairs
