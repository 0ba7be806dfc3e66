"""SimCT: its options, and values by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparer import assert_close

from xtoken import Alignment, PieceIndex, Vocabulary, simct_loss

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "reverse": {"reverse": True, "temperature": 2.5},
    "mixed": {"beta": 0.4},
}

PIECES = PieceIndex.build(Vocabulary([b"a", b"b", b"ab"]), Vocabulary([b"b", b"a", b"x"]))
STUDENT = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log().repeat(2, 1)
TEACHER = torch.tensor([[0.4, 0.5, 0.1], [0.6, 0.1, 0.3], [0.2, 0.2, 0.6]], dtype=torch.float64).log()


def kl(first: list[float], second: list[float]) -> float:
    first, second = ([x / sum(one) for x in one] for one in (first, second))
    return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_text_that_only_one_side_has_as_a_token(reverse: bool) -> None:
    """ "ab" is 0.5 to the student, and to the teacher the geometric mean of "a" and then "b"."""
    chunk = Alignment([[1, 2, 1, 3]], student_ids=[0, 2], teacher_ids=[0, 1, 0])
    p, q = [0.2, 0.3, 0.5], [0.5, 0.4, math.sqrt(0.5 * 0.6)]  # "a", "b", "ab"
    loss = simct_loss(STUDENT, TEACHER, chunk, PIECES, reverse=reverse)
    assert_close(loss, torch.tensor(kl(p, q) if reverse else kl(q, p), dtype=torch.float64), rtol=1e-12)


def test_a_shared_token_is_not_counted_twice() -> None:
    chunk = Alignment([[1, 2, 1, 2]], student_ids=[0, 1], teacher_ids=[0, 0])
    loss = simct_loss(STUDENT, TEACHER[:2], chunk, PIECES)
    assert_close(loss, torch.tensor(kl([0.5, 0.4], [0.2, 0.3]), dtype=torch.float64), rtol=1e-12)
