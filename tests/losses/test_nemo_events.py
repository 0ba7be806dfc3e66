"""NeMo v6: its options, values by hand, and what a loop over all tokens finds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparer import assert_close
from harness import make_case

from xtoken import Alignment, PieceIndex, Vocabulary, nemo_events_loss

VARIANTS: dict[str, dict[str, Any]] = {"default": {}, "reverse": {"reverse": True, "temperature": 2.5}}

STUDENT = [b"9", b"5", b"95", b"99", b"995", b"x"]
TEACHER = [b"9", b"5", b"z"]
PIECES = PieceIndex.build(Vocabulary(STUDENT), Vocabulary(TEACHER))
P = [0.1, 0.15, 0.3, 0.2, 0.05, 0.2]
Q = [[0.5, 0.3, 0.2], [0.4, 0.5, 0.1], [0.3, 0.3, 0.4]]


def rows(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor([*probabilities, probabilities[-1]], dtype=torch.float64).log()


def kl(q: list[float], p: list[float]) -> float:
    """With the rest of both as one more event."""
    return sum(a * math.log(a / b) for a, b in zip([*q, 1 - sum(q)], [*p, 1 - sum(p)], strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("alignment", "q", "p"),
    [
        # One token each: "9" and "5" are the pairs.
        (Alignment([[1, 2, 1, 2]], student_ids=[0, 0], teacher_ids=[0, 0]), [0.5, 0.3], [0.1, 0.15]),
        # "95" against "9", "5": what the teacher spells with "9" and one more is "95" and "99", not "995".
        (Alignment([[1, 2, 1, 3]], student_ids=[0, 2], teacher_ids=[0, 0, 1]), [0.5 * 0.5, 0.5 * 0.4], [0.3, 0.2]),
    ],
    ids=["one to one", "one to two"],
)
def test_by_hand(alignment: Alignment, q: list[float], p: list[float], reverse: bool) -> None:
    loss = nemo_events_loss(rows(P), rows(*Q[:2]), alignment, PIECES, reverse=reverse)
    assert_close(loss, torch.tensor(kl(p, q) if reverse else kl(q, p), dtype=torch.float64), rtol=1e-12)


def test_several_to_one() -> None:
    """The same with the sides exchanged."""
    pieces = PieceIndex.build(Vocabulary(TEACHER), Vocabulary(STUDENT))
    chunk = Alignment([[1, 3, 1, 2]], student_ids=[0, 0, 1], teacher_ids=[0, 2])
    loss = nemo_events_loss(rows(*Q[:2]), rows(P), chunk, pieces)
    assert_close(loss, torch.tensor(kl([0.3, 0.2], [0.5 * 0.5, 0.5 * 0.4]), dtype=torch.float64), rtol=1e-12)


def test_fewer_than_two_events_are_none() -> None:
    """ "995" is the only token that begins with "9", "9" and has one more."""
    chunk = Alignment([[1, 2, 1, 4]], student_ids=[0, 4], teacher_ids=[0, 0, 0, 1])
    student = rows(P).requires_grad_()
    loss = nemo_events_loss(student, rows(*Q), chunk, PIECES)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) == 0
    assert not bool(gradient.any())


def test_several_on_both_sides_are_compared_by_their_text() -> None:
    """ "x", "9" against "9", "5" stands for any text that no other chunk boundary cuts."""
    chunk = Alignment([[1, 3, 1, 3]], student_ids=[0, 5, 0], teacher_ids=[0, 0, 1])
    loss = nemo_events_loss(rows(P, P), rows(*Q[:2]), chunk, PIECES)
    assert_close(loss, torch.tensor(kl([0.5 * 0.5], [0.2 * 0.1]), dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("sizes", [(101, 37), (37, 101)])
def test_what_a_loop_over_tokens_finds(sizes: tuple[int, int]) -> None:
    case = make_case(*sizes, shapes=((1, 1), (1, 2), (3, 1), (2, 1), (1, 3), (1, 2), (2, 1)), samples=9)
    of, index = case.alignment, case.pieces
    assert of.student_ids is not None
    assert of.teacher_ids is not None
    spelled = [
        [side.pieces[a:b].tolist() for a, b in zip(side.ptr[:-1].tolist(), side.ptr[1:].tolist(), strict=True)]
        for side in (index.student, index.teacher)
    ]
    losses = []
    for k, ((a, b, c, d), counts) in enumerate(zip(of.spans.tolist(), of.predicted.tolist(), strict=True)):
        sample = k // (len(of.spans) // len(of))
        ids = of.student_ids[sample, a:b].tolist(), of.teacher_ids[sample, c:d].tolist()
        if not counts or min(a, c) == 0 or b - a == d - c:
            losses.append(math.nan)
            continue
        log_p = case.student[sample, a - 1 : b - 1].log_softmax(-1), case.teacher[sample, c - 1 : d - 1].log_softmax(-1)
        whole = int(len(ids[1]) == 1)
        part, size = 1 - whole, len(ids[1 - whole])
        events: list[list[float]] = [[], []]
        for token, pieces in enumerate(spelled[whole]):
            is_like = spelled[whole][ids[whole][0]][: size - 1] == ids[part][:-1]
            if is_like and len(pieces) == size and pieces[:-1] == ids[part][:-1] and pieces[-1] < sizes[part]:
                events[whole].append(math.exp(log_p[whole][0, token]))
                known = sum(float(log_p[part][i, piece]) for i, piece in enumerate(pieces))
                events[part].append(math.exp(known))
        losses.append(kl(events[1], events[0]) if len(events[0]) > 1 else 0.0)
    want = torch.tensor(losses, dtype=torch.float64)
    assert int((want > 0).sum()) > 3
    got = nemo_events_loss(case.student, case.teacher, of, index, reduction="none")
    assert_close(got[~want.isnan()], want[~want.isnan()], rtol=1e-9, atol=1e-12)
