"""BPM: its options, values by hand, and what a loop over byte strings finds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparer import assert_close
from harness import make_case, tokens
from torch import Tensor

from xtoken import Alignment, PieceIndex, Vocabulary, bpm_loss

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "all": {"rows": "all"},
    "temperature": {"temperature": 2.5, "rows": "all"},
}

STUDENT = [b"9", b"95", b"5", b"x"]
TEACHER = [b"9", b"5", b"957", b"955"]
PIECES = PieceIndex.build(Vocabulary(STUDENT), Vocabulary(TEACHER))
ROW = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def test_where_both_start() -> None:
    """ "957" and "955" begin with "95"; "9" and "5" are tokens of both."""
    chunk = Alignment([[1, 2, 1, 2]], student_ids=[0, 0], teacher_ids=[0, 0])
    p, q = {"9": 0.1, "95": 0.2, "5": 0.3}, {"9": 0.4, "95": 0.3 + 0.1, "5": 0.2}
    want = sum(q[s] * math.log(q[s] / p[s]) for s in q)
    teacher = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64).log().repeat(2, 1)
    loss = bpm_loss(ROW.log().repeat(2, 1), teacher, chunk, PIECES)
    assert_close(loss, torch.tensor(want, dtype=torch.float64), rtol=1e-12)


def test_inside_a_token_of_the_teacher() -> None:
    """The student writes "95", "5"; behind "95" the teacher goes on with "5" or "7", for which the student has none."""
    chunk = Alignment([[1, 3, 1, 2]], student_ids=[0, 1, 2], teacher_ids=[0, 3])
    teacher = torch.tensor([[0.4, 0.2, 0.3, 0.1]] * 2, dtype=torch.float64).log()
    start = 0.4 * math.log(0.4 / 0.1) + 0.4 * math.log(0.4 / 0.2) + 0.2 * math.log(0.2 / 0.3)
    inside = math.log(1 / 0.3)  # all on "5"
    loss = bpm_loss(ROW.log().repeat(3, 1), teacher, chunk, PIECES)
    assert_close(loss, torch.tensor(start + inside, dtype=torch.float64), rtol=1e-12)


def test_rows_in_which_the_text_goes_another_way() -> None:
    """The student writes "9", "5", "5" where the longest would be "95": two rows are left out, but not the last."""
    chunk = Alignment([[1, 4, 1, 2]], student_ids=[0, 0, 2, 2], teacher_ids=[0, 3])
    teacher = torch.tensor([[0.4, 0.2, 0.3, 0.1]] * 2, dtype=torch.float64).log()
    student = torch.stack([ROW, ROW.flip(0), ROW.roll(1), ROW]).log().requires_grad_()
    loss = bpm_loss(student, teacher, chunk, PIECES)
    assert_close(loss.detach(), torch.tensor(-math.log(0.2) - math.log(0.2), dtype=torch.float64), rtol=1e-12)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().sum(1).gt(0).tolist() == [False, True, True, False]


def by_bytes(
    z: Tensor, y: Tensor, case: Any, vocabularies: tuple[list[bytes], list[bytes]], is_all: bool
) -> list[float]:
    """The loss of each chunk, by a loop over the student's tokens, and over all of the teacher's for each."""
    student, teacher = vocabularies
    of = case.alignment
    losses = []
    for k, ((a, b, c, d), counts) in enumerate(zip(of.spans.tolist(), of.predicted.tolist(), strict=True)):
        sample = k // (len(of.spans) // len(of))
        own, theirs = of.student_ids[sample, a:b].tolist(), of.teacher_ids[sample, c:d].tolist()
        same = sum(len(student[s]) for s in own) == sum(len(teacher[t]) for t in theirs)
        total, out = 0.0, 0
        for i, s in enumerate(own if counts and min(a, c) > 0 else []):
            if i and not same:
                break
            j = max(j for j in range(len(theirs)) if sum(len(teacher[t]) for t in theirs[:j]) <= out)
            offset = out - sum(len(teacher[t]) for t in theirs[:j])
            known, log_q, log_p = teacher[theirs[j]][:offset], y[sample, c - 1 + j], z[sample, a - 1 + i].log_softmax(0)
            mass: dict[int, float] = {}
            of_text = -1
            for t, text in enumerate(teacher):
                rest = text[offset:]
                fitting = [u for u, own_text in enumerate(student) if rest.startswith(own_text)]
                if not text.startswith(known) or not rest or not fitting:
                    continue
                best = max(fitting, key=lambda u: len(student[u]))
                mass[best] = mass.get(best, 0.0) + math.exp(float(log_q[t]))
                of_text = best if t == theirs[j] else of_text
            whole = sum(mass.values())
            if is_all or of_text == s:
                total += sum(q / whole * (math.log(q / whole) - float(log_p[u])) for u, q in mass.items())
            out += len(student[s])
        losses.append(total)
    return losses


@pytest.mark.parametrize("rows", ["all", "agreeing"])
@pytest.mark.parametrize("sizes", [(67, 59), (37, 101)])
def test_what_a_loop_over_bytes_finds(sizes: tuple[int, int], rows: Any) -> None:
    case = make_case(*sizes, shapes=((1, 1), (1, 2), (3, 1), (2, 2), (2, 3), (2, 1), (1, 1), (4, 2)))
    got = bpm_loss(case.student, case.teacher, case.alignment, case.pieces, rows=rows, reduction="none")
    want = by_bytes(case.student, case.teacher, case, (tokens(sizes[0], 0), tokens(sizes[1], 1)), rows == "all")
    assert sum(value > 0 for value in want) > 5
    assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_an_index_without_text() -> None:
    pieces = PieceIndex(PIECES.data)
    chunk = Alignment([[1, 2, 1, 2]], student_ids=[0, 0], teacher_ids=[0, 0])
    with pytest.raises(ValueError, match="pieces: expected an index with the text of its tokens"):
        bpm_loss(ROW.log().repeat(2, 1), ROW.log().repeat(2, 1), chunk, pieces)
