"""What GOLD and H-KL of the backend "cuda" need beside their kernels: the layout of the pairs, and the sorted L1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SORTED_ELEMENTS = 2**23
"""Probabilities outside the pairs that are sorted at a time; temporaries take about 50 bytes for each."""


@dataclass(frozen=True)
class GoldPlan:
    """Common pairs and the ids outside, int32; see csrc/cuda/gold.h."""

    student_pair: Tensor
    teacher_pair: Tensor
    student_others: Tensor
    teacher_others: Tensor
    slot: Tensor


_PLANS = WeakTensorKeyDictionary()


def gold_plan_for(student_ids: Tensor, teacher_ids: Tensor, shape: tuple[int, int]) -> GoldPlan:
    """The layout of common pairs; kept for as long as the tensor `student_ids` lives. The first call waits for it."""
    kept = _PLANS.get(student_ids)
    if kept is None or kept[0] is not teacher_ids or kept[1] != shape:
        others = []
        for ids, size in zip((student_ids, teacher_ids), shape, strict=True):
            outside = torch.ones(size, dtype=torch.bool, device=ids.device)
            outside[ids] = False
            others.append(outside.nonzero()[:, 0].to(torch.int32))
        slot = torch.empty(shape[0], dtype=torch.int32, device=student_ids.device)
        slot[student_ids] = teacher_ids.to(torch.int32)
        slot[others[0].long()] = -1 - torch.arange(len(others[0]), dtype=torch.int32, device=slot.device)
        kept = (
            teacher_ids,
            shape,
            GoldPlan(student_ids.to(torch.int32), teacher_ids.to(torch.int32), others[0], others[1], slot),
        )
        _PLANS[student_ids] = kept
    plan: GoldPlan = kept[2]
    return plan


def sorted_l1(p: Tensor, q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of |P_i - Q_i| over the `count` first ranks, descending [K], and its slope in p [K, V].

    As in `xtoken.reference.gold`: equal probabilities share the mean of the signs at their ranks. Signs are whole
    numbers, so their sums do not depend on the order in which a device adds them.
    """
    ordered, token = p.sort(dim=1, descending=True)
    difference = ordered[:, :count] - q.sort(dim=1, descending=True).values[:, :count]
    sign = torch.nn.functional.pad(difference.sign(), (0, p.shape[1] - count))
    distinct = torch.ones_like(token)
    distinct[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = distinct.cumsum(1) - 1
    shared = torch.zeros_like(sign).scatter_reduce(1, group, sign, "mean", include_self=False)
    return difference.abs().sum(1), torch.zeros_like(sign).scatter(1, token, shared.gather(1, group))
