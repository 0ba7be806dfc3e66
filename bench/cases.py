"""What benchmarks measure of the registered losses: each as it is, or in the variants that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import measure  # noqa: F401 - makes the package importable
import torch
from torch import Tensor

from xtoken import Alignment, PieceIndex, ProjectionMatrix
from xtoken.losses import plain
from xtoken.losses.backends import Kernel, Problem, register_backend, unregister_backend
from xtoken.losses.loss import Loss, Needs, registered

NUMBERS = "numbers"
"""How the name of a variant ends that is for chunks of several tokens, as texts full of numbers have."""


class Pair(NamedTuple):
    """What losses need of a pair of tokenizers."""

    projection: ProjectionMatrix | None
    pieces: PieceIndex | None


@dataclass(frozen=True)
class Case:
    """A loss with options, called as ``case(student, teacher, chunks, pair, **more)``."""

    name: str
    loss: type[Loss]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def same_tokenizer(self) -> bool:
        return self.loss.needs is Needs.SAME_TOKENIZER

    def __call__(self, student: Any, teacher: Any, chunks: Alignment, pair: Pair, **more: Any) -> Any:
        needed: dict[Needs, list[Any]] = {Needs.PROJECTION: [pair.projection], Needs.PIECES: [pair.pieces]}
        given = needed.get(self.loss.needs, [])
        return self.loss.function()(student, teacher, chunks, *given, **{**self.options, **more})


def cases() -> list[Case]:
    """Of every registered loss its variants, or the loss itself if it names none."""
    return [
        Case(f"{loss.title}{', ' if variant == NUMBERS else ' '}{variant}" if variant else loss.title, loss, options)
        for loss in registered().values()
        for variant, options in loss.variants.items()
    ]


def choices(loss: type[Loss]) -> dict[str, tuple[str, ...]]:
    """Options of a loss that take one of a few words, with these words; the default is the first."""
    hints = get_type_hints(loss.function())
    return {name: get_args(hints[name]) for name in loss.options() if get_origin(hints[name]) is Literal}


def one_to_one(rows: int) -> Alignment:
    """Chunks of one token on each side, so many."""
    start = torch.arange(1, rows + 1, dtype=torch.int32)
    nothing = torch.zeros(rows + 1, dtype=torch.int64)  # whatever token it is
    return Alignment(torch.stack([start, start + 1, start, start + 1], 1), None, nothing, nothing)


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
