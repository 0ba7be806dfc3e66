"""GOLD: the options that it is tried with, and that only rows with a single weight 1 are pairs."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from comparer import assert_close
from harness import Case
from torch import Tensor

from xtoken import Alignment, ProjectionMatrix, Vocabulary, gold_loss, reference

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "reverse": {"reverse": True},
    "temperature": {"temperature": 2.5},
    "cut": {"uncommon_top_k": 5},
    "common part": {"uncommon_top_k": 0},
    "jensen-shannon": {"beta": 0.3},
    "skewed": {"skew": 0.1, "temperature": 2.5},
    "skewed reverse": {"skew": 0.25, "reverse": True},
}
FEW_VARIANTS: dict[str, dict[str, Any]] = {
    "cut": {"uncommon_top_k": 20},
    "reverse": {"reverse": True},
    "jensen-shannon": {"beta": 0.3, "uncommon_top_k": 20},
}


def truth(case: Case, z: Tensor, y: Tensor, chunks: Any, **options: Any) -> Tensor:
    pairs = reference.common_pairs(case.projection, 1.0)
    common, uncommon = reference.ranked(z, y, chunks, pairs, **options)
    return common + uncommon


def test_a_row_with_a_dominant_weight_is_compared_by_rank() -> None:
    W = ProjectionMatrix.from_topk([[0, -1], [1, 0]], [[1.0, 0.0], [0.9, 0.1]], 2)
    chunk = Alignment([[1, 2, 1, 2]])
    student, teacher = (torch.tensor([[p, 1 - p], [0.5, 0.5]]).log() for p in (0.3, 0.6))
    want = 0.6 * math.log(0.6 / 0.3) + abs(0.7 - 0.4)
    assert_close(gold_loss(student, teacher, chunk, W), torch.tensor(want), rtol=1e-6)


def test_the_token_that_is_written_is_the_common_one() -> None:
    """Not the byte token of the same text with a lower id, which is compared by rank."""
    student = Vocabulary([b"e", b"x", b"e"], kinds=["byte", "normal", "normal"])
    W = ProjectionMatrix.build(student, Vocabulary([b"e", b"x"]))
    p, q = torch.tensor([0.1, 0.3, 0.6]), torch.tensor([0.8, 0.2])
    want = 0.8 * math.log(0.8 / 0.6) + 0.2 * math.log(0.2 / 0.3)  # of the others the teacher has none
    student_logits, teacher_logits = (torch.stack([one, one]).log().requires_grad_() for one in (p, q))
    loss = gold_loss(student_logits, teacher_logits, Alignment([[1, 2, 1, 2]]), W)
    assert_close(loss, torch.tensor(want), rtol=1e-5)
    loss.backward()
    assert student_logits.grad is not None
    assert_close(student_logits.grad[0], p - torch.tensor([0.0, 0.2, 0.8]), rtol=1e-5, atol=1e-6)


def test_kinds_that_change_change_the_pairs() -> None:
    """Of a W with the same other parts, and in place, also where torch does not count it."""
    student = Vocabulary([b"e", b"x", b"e"], kinds=["byte", "normal", "normal"])
    W = ProjectionMatrix.build(student, Vocabulary([b"e", b"x"]))
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[2.0, 0.0]] * 2)
    alignment = Alignment([[1, 2, 1, 2]])

    def loss(matrix: Any) -> float:
        return gold_loss(*logits, alignment, matrix).item()

    before = loss(W)
    other = SimpleNamespace(row_ptr=W.row_ptr, col=W.col, weight=W.weight, shape=W.shape, kind=W.kind.flip(0))
    after = loss(other)
    assert after != before
    W.kind.data.copy_(other.kind)
    assert loss(W) == after
