"""What tests of logits in parts share: the losses, their cases, an output layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from harness import OPERATIONS, Case, make_case
from torch import Tensor

from xtoken.losses import Needs, registered
from xtoken.losses.backends import kernels_of

IN_PARTS = [name for name, loss in registered().items() if not loss.whole_rows and kernels_of(name, "parallel")]
"""The losses that take logits in parts."""


@functools.cache
def case_of(name: str) -> Case:
    case = make_case()
    if OPERATIONS[name].needs is not Needs.SAME_TOKENIZER:
        return case
    size = OPERATIONS[name].size(case)
    return Case(case.student[..., :size], case.teacher[..., :size], case.alignment, case.projection)


def common_alone(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options without a part that is compared by rank."""
    return {**options, "uncommon_top_k": 0} if "uncommon_top_k" in registered()[name].options() else options


def leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


HEAD = torch.Generator().manual_seed(1)
HIDDEN, LAYER, BIAS = (
    torch.randn(size, generator=HEAD) for size in ((*case_of(IN_PARTS[0]).student.shape[:2], 8), (67, 8), (67,))
)
LABELS = torch.arange(HIDDEN.shape[0] * HIDDEN.shape[1]).reshape(HIDDEN.shape[:2]) % 59
LABELS[:, 3:5] = -100


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
