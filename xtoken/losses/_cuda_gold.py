"""What GOLD, H-KL and ULD of the backend "cuda" need beside their kernels: the pairs' layout, and the sorted L1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xtoken.losses._common import settled

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
        plan = GoldPlan(student_ids.to(torch.int32), teacher_ids.to(torch.int32), others[0], others[1], settled(slot))
        kept = _PLANS[student_ids] = teacher_ids, shape, plan
    made: GoldPlan = kept[2]
    return made


def unpaired_plan(shape: tuple[int, int], device: torch.device) -> GoldPlan:
    """The layout without any pair, which makes GOLD's kernels those of ULD."""
    none = torch.empty(0, dtype=torch.int32, device=device)
    student, teacher = (torch.arange(size, dtype=torch.int32, device=device) for size in shape)
    return GoldPlan(none, none, student, teacher, -1 - student)


def sorted_l1(p: Tensor, q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of |P_i - Q_i| over the `count` first ranks, descending, padded with zeros [K], and its slope in p [K, V].

    As in `xtoken.reference.uld`: equal probabilities share the mean of the signs at their ranks. Signs are whole
    numbers, so their sums do not depend on the order in which a device adds them.
    """
    ordered, token = p.sort(dim=1, descending=True)
    difference = _first(ordered, count) - _first(q.sort(dim=1, descending=True).values, count)
    sign = _first(difference.sign(), p.shape[1])
    distinct = torch.ones_like(token)
    distinct[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = distinct.cumsum(1) - 1
    shared = torch.zeros_like(sign).scatter_reduce(1, group, sign, "mean", include_self=False)
    return difference.abs().sum(1), torch.zeros_like(sign).scatter(1, token, shared.gather(1, group))


def _first(values: Tensor, count: int) -> Tensor:
    """The first `count` columns, zeros where there are fewer."""
    return torch.nn.functional.pad(values[:, :count], (0, max(0, count - values.shape[1])))
