"""The strict one-to-one loss: its options, and values by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparer import assert_close

from xtoken import Alignment, PieceIndex, Vocabulary, one_to_one_loss

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "forward": {"reverse": False, "temperature": 2.5},
    "best": {"top_k": 7},
}

PIECES = PieceIndex.build(Vocabulary([b"a", b"b", b"ab", b"c"]), Vocabulary([b"c", b"a", b"x", b"b"]))
STUDENT = torch.tensor([0.1, 0.2, 0.4, 0.3], dtype=torch.float64).log().repeat(4, 1)
TEACHER = torch.tensor([0.2, 0.1, 0.3, 0.4], dtype=torch.float64).log().repeat(4, 1)
P, Q = {"a": 0.1, "b": 0.2, "c": 0.3}, {"a": 0.1, "b": 0.4, "c": 0.2}


def kl(first: dict[str, float], second: dict[str, float], tokens: str) -> float:
    sums = [sum(one[token] for token in tokens) for one in (first, second)]
    return sum(first[t] / sums[0] * math.log(first[t] / sums[0] / (second[t] / sums[1])) for t in tokens)


@pytest.mark.parametrize(
    ("options", "want"),
    [({}, kl(P, Q, "abc")), ({"reverse": False}, kl(Q, P, "abc")), ({"top_k": 2}, kl(P, Q, "bc")), ({"top_k": 1}, 0.0)],
)
def test_by_hand(options: dict[str, Any], want: float) -> None:
    chunk = Alignment([[1, 2, 1, 2]], student_ids=[0, 3], teacher_ids=[0, 0])
    loss = one_to_one_loss(STUDENT, TEACHER, chunk, PIECES, **options)
    assert_close(loss, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_other_chunks_have_none() -> None:
    """ "ab" against "a", "b"; "ab" against one token that is another; "b" against itself."""
    chunks = Alignment(
        [[1, 2, 1, 3], [2, 3, 3, 4], [3, 4, 4, 5]], student_ids=[0, 2, 2, 1], teacher_ids=[0, 1, 3, 2, 3]
    )
    teacher = torch.cat([TEACHER, TEACHER[:1]])
    losses = one_to_one_loss(STUDENT, teacher, chunks, PIECES, reduction="none")
    assert_close(losses, torch.tensor([0.0, 0.0, kl(P, Q, "abc")], dtype=torch.float64), rtol=1e-12)
