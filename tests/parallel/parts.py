"""What tests of logits in parts share: the losses, their cases, an output layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
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


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of the tensors that this rank gives to collectives."""
    found: list[int] = []

    def counting(function: Callable[..., Any], argument: int) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            found.append(arguments[argument].numel() * arguments[argument].element_size())
            return function(*arguments, **options)

        return count

    with ExitStack() as stack:
        for name, argument in (("all_reduce", 0), ("all_gather", 1), ("all_to_all_single", 1)):
            stack.enter_context(mock.patch.object(dist, name, counting(getattr(dist, name), argument)))
        yield found


@contextmanager
def kept(module: Any, name: str) -> Iterator[list[Any]]:
    """What a function of a module returns."""
    found: list[Any] = []
    function = getattr(module, name)

    def keep(*arguments: Any) -> Any:
        found.append(function(*arguments))
        return found[-1]

    with mock.patch.object(module, name, keep):
        yield found
