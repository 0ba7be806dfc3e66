"""ESCD: its options, values by hand, and what a loop over byte strings finds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparer import assert_close
from harness import make_case, tokens

from xtoken import Alignment, PieceIndex, Vocabulary, escd_loss

VARIANTS: dict[str, dict[str, Any]] = {"default": {}, "temperature": {"temperature": 2.5}}

STUDENT = [b"9", b"5", b"57", b"575", b"x"]
TEACHER = [b"9", b"5", b"95", b"957", b"97"]
PIECES = PieceIndex.build(Vocabulary(STUDENT), Vocabulary(TEACHER))
P = [0.3, 0.1, 0.2, 0.25, 0.15]
Q = [0.1, 0.2, 0.3, 0.15, 0.25]


def rows(probabilities: list[float], count: int) -> torch.Tensor:
    return torch.tensor([probabilities] * count, dtype=torch.float64).log()


def test_by_hand() -> None:
    """ "95" and "957" are a group, whose rest "5" the student's "5", "57" and "575" begin with; no token has "7"."""
    chunk = Alignment([[1, 3, 1, 2]], student_ids=[0, 0, 1], teacher_ids=[0, 2])
    nine, five = 0.1 + 0.3 + 0.15 + 0.25, 0.2
    start = nine * math.log(nine / 0.3) + five * math.log(five / 0.1)
    behind = -(0.3 + 0.15) * math.log(0.1 + 0.2 + 0.25)
    loss = escd_loss(rows(P, 3), rows(Q, 2), chunk, PIECES)
    assert_close(loss, torch.tensor(start + behind, dtype=torch.float64), rtol=1e-12)


def test_a_chunk_that_ends_behind_the_first_token_has_the_first_term_alone() -> None:
    chunk = Alignment([[1, 2, 1, 2]], student_ids=[0, 0], teacher_ids=[0, 0])
    want = 0.8 * math.log(0.8 / 0.3) + 0.2 * math.log(0.2 / 0.1)
    loss = escd_loss(rows(P, 2), rows(Q, 2), chunk, PIECES)
    assert_close(loss, torch.tensor(want, dtype=torch.float64), rtol=1e-12)


def test_the_rest() -> None:
    """A token of the teacher that begins with none of the student's, against the student's that none begins with."""
    pieces = PieceIndex.build(Vocabulary([b"9", b"5", b"x"]), Vocabulary([b"9", b"5", b"z"]))
    chunk = Alignment([[1, 2, 1, 2]], student_ids=[0, 0], teacher_ids=[0, 0])
    p, q = [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]
    want = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    loss = escd_loss(rows(p, 2), rows(q, 2), chunk, pieces)
    assert_close(loss, torch.tensor(want, dtype=torch.float64), rtol=1e-12)


def by_bytes(case: Any, student: list[bytes], teacher: list[bytes]) -> list[float]:
    """The loss of each chunk, by loops over byte strings."""
    of, losses = case.alignment, []
    begins = {
        t: max((u for u, own in enumerate(student) if text.startswith(own)), key=lambda u: len(student[u]), default=-1)
        for t, text in enumerate(teacher)
    }
    for k, ((a, b, c, _), counts) in enumerate(zip(of.spans.tolist(), of.predicted.tolist(), strict=True)):
        if not counts or min(a, c) == 0:
            losses.append(0.0)
            continue
        sample = k // (len(of.spans) // len(of))
        q = case.teacher[sample, c - 1].softmax(0).tolist()
        log_p = case.student[sample, a - 1].log_softmax(0).tolist()
        mass = {u: sum(q[t] for t in begins if begins[t] == u) for u in set(begins.values())}
        total = sum(m * (math.log(m) - log_p[u]) for u, m in mass.items() if u >= 0)
        others = [math.exp(log_p[u]) for u in range(len(student)) if u not in mass]
        if others and -1 in mass:
            total += mass[-1] * math.log(mass[-1] / sum(others))
        if b - a > 1:
            first = int(of.student_ids[sample, a])
            p = case.student[sample, a].softmax(0).tolist()
            group = [t for t, text in enumerate(teacher) if begins[t] == first and text not in student]
            roots = [
                t
                for t in group
                if not any(teacher[t] != teacher[o] and teacher[t].startswith(teacher[o]) for o in group)
            ]
            for root in roots:
                rest = teacher[root][len(student[first]) :]
                follows = [p[u] for u, text in enumerate(student) if text.startswith(rest)]
                if follows:
                    total -= sum(q[t] for t in group if teacher[t].startswith(teacher[root])) * math.log(sum(follows))
        losses.append(total)
    return losses


@pytest.mark.parametrize("sizes", [(67, 59), (9, 101)])
def test_what_a_loop_over_bytes_finds(sizes: tuple[int, int]) -> None:
    case = make_case(*sizes, shapes=((1, 1), (1, 2), (3, 1), (2, 2), (2, 3), (2, 1), (1, 1), (4, 2)))
    got = escd_loss(case.student, case.teacher, case.alignment, case.pieces, reduction="none")
    want = by_bytes(case, tokens(sizes[0], 0), tokens(sizes[1], 1))
    assert sum(value > 0 for value in want) > 10
    assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)
