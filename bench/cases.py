"""What benchmarks measure of the registered losses: each as it is, or in the variants that it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import measure  # noqa: F401 - makes the package importable
import torch
from torch import Tensor

from xtoken import Alignment
from xtoken.losses import plain
from xtoken.losses.backends import Kernel, Problem, register_backend, unregister_backend
from xtoken.losses.cases import Case as Case
from xtoken.losses.cases import Pair as Pair
from xtoken.losses.cases import choices as choices
from xtoken.losses.cases import one_to_one as one_to_one
from xtoken.losses.loss import registered

NUMBERS = "numbers"
"""How the name of a variant ends that is for chunks of several tokens, as texts full of numbers have."""


def cases() -> list[Case]:
    """Of every registered loss its variants, or the loss itself if it names none."""
    return [
        Case(f"{loss.title}{', ' if variant == NUMBERS else ' '}{variant}" if variant else loss.title, loss, options)
        for loss in registered().values()
        for variant, options in loss.variants.items()
    ]


def forward_backward(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], None]:
    """A step that computes the loss of the logits and its gradient."""

    def run() -> None:
        loss(logits.detach().requires_grad_()).backward()

    return run


def problem_of(case: Case, student: Tensor, teacher: Tensor, chunks: Alignment, pair: Pair) -> Problem[Any]:
    """What a backend gets to see of a call: logits, chunks, and the formula with everything that it needs."""
    found: list[Problem[Any]] = []

    def record(
        problem: Problem[Any], student_grad: Any = None, weight_grad: Any = None, scale: Any = None, labels: Any = None
    ) -> Tensor:
        found.append(problem)
        return torch.zeros(len(problem.chunks), dtype=problem.dtype, device=problem.student.device)

    register_backend(replace(plain.backend("recorded"), kernel=lambda loss: Kernel(record)))
    try:
        case(student, teacher, chunks, pair, backend="recorded")
    finally:
        unregister_backend("recorded")
    return found[0]
