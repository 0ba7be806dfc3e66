"""The truth test in short: does a loss leave a student alone that already knows the truth? See bench/truth.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from xtoken import PieceIndex, ProjectionMatrix, Vocabulary
from xtoken.losses import Needs

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
cases, exact, truth = map(importlib.import_module, ("cases", "exact", "truth"))

ALL = [case for case in truth.forms() if not case.same_tokenizer]
ON_EVENTS = next(case for case in ALL if case.loss.needs is Needs.PIECES)

TEACHER = [b"=", b"\n", b"1", b"2", b"3"]
STUDENT = [*TEACHER, *(b"%d%d" % (i, j) for i in (1, 2, 3) for j in (1, 2, 3))]
NUMBERS = [f"={n}\n" for n in (1, 1, 2, 3, 12, 12, 12, 13, 21, 31, 32, 33)]
"""Two thirds have two digits, which are one token to the student and two to the teacher."""

SPACES = [b"=", b"  ", b"   ", b" b", b" c", b"b", b"c", b"d"]


def whole(student: Vocabulary, teacher: Vocabulary) -> Any:
    return exact.Whole(cases.Pair(ProjectionMatrix.build(student, teacher), PieceIndex.build(student, teacher)))


def numbers(
    student: list[bytes] = STUDENT, teacher: list[bytes] = TEACHER, ids: bool = True, rows: tuple[int, int] = (1, 0)
) -> Any:
    """The row after "=" is free, or more rows."""
    pair = Vocabulary(student), Vocabulary(teacher)
    world = exact.World.of(*pair, NUMBERS)
    everything = exact.Vocabularies(list(range(len(student))), list(range(len(teacher))))
    return exact.Problem(world, world.contexts(*rows), whole(*pair), None if ids else everything)


def bias(problem: Any, case: Any) -> float:
    """How far from the truth the loss leads."""
    return float(truth.distance(truth.lead(problem, case, problem.truth).end, problem.truth)[0])


def test_the_truth_is_a_count():
    problem = numbers()
    tokens = {STUDENT[i]: p for i, p in zip(problem.ids.student, problem.truth[0].exp().tolist(), strict=True)}
    counts = {b"1": 2, b"2": 1, b"3": 1, b"12": 3, b"13": 1, b"21": 1, b"31": 1, b"32": 1, b"33": 1}
    for token, p in tokens.items():
        assert p == pytest.approx(counts.get(token, 0) / 12, abs=1e-6)
    first = problem.teacher[0, 0].exp()
    assert first.tolist() == pytest.approx([0, 0, 6 / 12, 2 / 12, 4 / 12], abs=1e-6)
    second = {use.teacher_ids: row[1].exp() for use, row in zip(problem.contexts[0].uses, problem.teacher, strict=True)}
    assert second[2, 3].tolist() == pytest.approx([0, 2 / 6, 0, 3 / 6, 1 / 6], abs=1e-6)


@pytest.mark.parametrize("case", truth.forms(), ids=lambda case: case.name)
def test_with_one_tokenizer_every_loss_leaves_the_truth_alone(case):
    problem = numbers(STUDENT, STUDENT)
    found = truth.lead(problem, case, problem.truth)
    assert float(found.loss.abs().max()) < 1e-5
    assert bias(problem, case) < 1e-4


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_the_tokens_left_out_do_not_matter(case, monkeypatch):
    monkeypatch.setattr(exact, "FLOOR", -40.0)
    more = [b"4", b"44", b"11=", b"1=2", b"x", b"xy"]
    student, teacher = [*STUDENT, *more], [*more, b"23", b"y", *TEACHER]
    part, all_tokens = numbers(student, teacher), numbers(student, teacher, ids=False)
    assert len(part.ids.student) < len(all_tokens.ids.student)
    losses = [problem.losses(case, problem.truth, backend="reference") for problem in (part, all_tokens)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-7)


def test_numbers():
    """A KL on what both can say has its minimum at the truth; one that compares by rank takes all from two digits."""
    problem = numbers()
    for case in ALL:
        found = truth.lead(problem, case, problem.truth)
        if case.loss is ON_EVENTS.loss:
            assert float(found.push) < 1e-5
            assert bias(problem, case) < 1e-5
    by_rank = [case for case in ALL if "uncommon_top_k" in case.loss.options()]
    assert by_rank
    for case in by_rank:
        assert bias(problem, case) == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("student", "teacher"), [(STUDENT, TEACHER), (TEACHER, STUDENT)])
def test_after_a_number_that_could_have_gone_on(student, teacher, backend):
    """Only who packs digits knows after "1" that the number is over; the others' digits are no reason to write some.

    And inner boundaries teach which digits follow one another: who knows nothing learns the truth.
    """
    problem = numbers(student, teacher, rows=(4, 4))
    case = cases.Case(backend, ON_EVENTS.loss, {"backend": backend})
    assert float(problem.event_distance().max()) > 0.3
    for start, most in ((problem.truth, 1e-4), (truth.ignorance(problem.truth), 1e-3)):
        end = truth.lead(problem, case, start).end
        assert float(truth.distance(end, problem.truth).max()) < most


def test_it_can_fail():
    """With "12" and "13" counted as texts that begin with "2"."""
    problem = numbers()
    pieces = problem.pair.pieces
    column = {STUDENT[i]: k for k, i in enumerate(problem.ids.student)}
    data = pieces.data.clone()
    event = PieceIndex(data).student.event
    for token in (b"12", b"13"):
        event[column[token]] = int(event[column[b"2"]])
    problem.pair = problem.pair._replace(pieces=PieceIndex(data))
    # The student gives "1" 2/12 and "2" 6/12, the teacher 6/12 and 2/12.
    assert float(problem.event_distance()) == pytest.approx(4 / 12, abs=1e-6)
    assert bias(problem, ON_EVENTS) > 0.2


def test_the_same_text_cut_at_other_places():
    """ "  " " b" against "   " "b" in half of the texts: both first tokens are in both vocabularies."""
    pair = Vocabulary(SPACES), Vocabulary(SPACES)
    cut = [[[0, 1, 3]] * 2 + [[0, 1, 4]] + [[0, 7]] * 3, [[0, 2, 5]] * 2 + [[0, 2, 6]] + [[0, 7]] * 3]
    world = exact.World(*pair, cut)
    problem = exact.Problem(world, world.contexts(1, 0), whole(*pair))
    assert float(problem.event_distance()) == pytest.approx(1 / 2, abs=1e-6)
    assert bias(problem, ON_EVENTS) == pytest.approx(1 / 2, abs=0.01)


def test_real_tokenizers(vocabulary):
    pair = vocabulary("llama3"), vocabulary("qwen3")
    world = exact.World.of(*pair, [f"x={n}\n" for n in (1, 7, *range(10, 200, 19), *range(200, 1000, 83))])
    problem = exact.Problem(world, world.contexts(1, 0), whole(*pair))
    assert len(problem.ids.student) < 500
    found = {case.name: bias(problem, case) for case in ALL}
    assert all(found[case.name] < 1e-4 for case in ALL if case.loss is ON_EVENTS.loss)
    assert max(found[case.name] for case in ALL if case.loss.needs is Needs.PROJECTION) > 0.5
