"""The exact alignment scheme against its definition, the whole table: equal move by move."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtoken._core import DpLimits, dp_moves, table_moves

pytestmark = pytest.mark.slow

GOLDEN = json.loads((Path(__file__).parent / "data/golden/dp_scores.json").read_text())


def limits(**values: int | bool) -> DpLimits:
    result = DpLimits()
    for name, value in values.items():
        setattr(result, name, value)
    return result


# Each forces a part of the scheme to do the work that others do by default.
LIMITS = {
    "default": limits(),
    "pruned": limits(plain_cells=0),
    "narrow": limits(plain_cells=0, first_slack=1, slack_growth=2),
    "gives up": limits(plain_cells=0, first_slack=1, plain_share=1000),
    "recomputed": limits(plain_cells=10**9, row_bytes=0),
    "pruned, recomputed": limits(plain_cells=0, first_slack=2, row_bytes=0),
    "pruned, rows dropped midway": limits(plain_cells=0, first_slack=8, row_bytes=200),
    "one edge a window": limits(window_edges=1),
}


@dataclass
class Case:
    student: list[bytes]
    teacher: list[bytes]
    student_special: list[bool]
    teacher_special: list[bool]

    @property
    def args(self) -> tuple:
        return self.student, self.teacher, self.student_special, self.teacher_special


def cut(text: bytes, longest: int, rng: np.random.Generator) -> list[bytes]:
    ends = np.cumsum(rng.integers(1, longest + 1, len(text)))
    return [piece for a, b in zip([0, *ends], ends, strict=False) if (piece := text[a:b])]


def random_text(length: int, letters: int, rng: np.random.Generator) -> bytes:
    return bytes(rng.integers(97, 97 + letters, length).astype(np.uint8))


def edited(text: bytes, letters: int, rng: np.random.Generator) -> bytes:
    for _ in range(rng.integers(1, 5)):
        a = int(rng.integers(0, len(text) + 1))
        b = a + int(rng.integers(0, 5))
        text = text[:a] + random_text(int(rng.integers(0, 5)), letters, rng) + text[b:]
    return text


def random_case(rng: np.random.Generator, longest_text: int) -> Case:
    """Few letters, so that everything matches in many ways; the same, edited, periodic or other text."""
    letters = int(rng.choice([1, 2, 3, 26]))
    text = random_text(int(rng.integers(0, longest_text + 1)), letters, rng)
    kind = rng.choice(["same", "edited", "unrelated", "periodic", "periodic and edited", "repeated"])
    if kind == "repeated":  # tokens and all
        text = text[:7]
    if kind.startswith("periodic"):
        period = random_text(int(rng.integers(1, 7)), letters, rng)
        text = period * (len(text) // len(period))
    other = text
    if kind.endswith("edited"):
        other = edited(text, letters, rng)
    if kind == "unrelated":
        other = random_text(int(rng.integers(0, longest_text + 1)), letters, rng)

    empty_rate, special_rate = rng.choice([0, 0, 0.1]), rng.choice([0, 0, 0.1])
    sides = []
    repeats = int(rng.integers(1, 8)) if kind == "repeated" else 1
    for side in (text, other):
        tokens, special = [], []
        for token in cut(side, int(rng.integers(1, 5)), rng) * repeats:
            if rng.random() < empty_rate:
                tokens.append(b"")
                special.append(False)
            if rng.random() < special_rate:
                tokens.append(b"a" * int(rng.integers(0, 3)))  # text to everyone but the kind
                special.append(True)
            tokens.append(token)
            special.append(False)
        sides.append((tokens, special))
    (student, student_special), (teacher, teacher_special) = sides
    return Case(student, teacher, student_special, teacher_special)


def check_moves(case: Case, moves: np.ndarray, score: float) -> None:
    """The moves are a legal alignment of this score."""
    i = j = 0
    total = 0.0
    for student, teacher, equal in moves.tolist():
        left, right = case.student[i : i + student], case.teacher[j : j + teacher]
        special = case.student_special[i : i + student] + case.teacher_special[j : j + teacher]
        if equal:
            assert b"".join(left) == b"".join(right)
            assert min(student, teacher) == 1
            assert max(student, teacher) <= 4
            assert not any(special) or (student == teacher == 1 and all(special))
            total += 1.5 * max(student, teacher, 2)
        else:
            assert (student, teacher) in [(1, 1), (1, 0), (0, 1)]
            assert (student, teacher) != (1, 1) or left != right or special[0] != special[1]
            total -= 3 if (student, teacher) == (1, 1) else 1.5
        i, j = i + student, j + teacher
    assert (i, j) == (len(case.student), len(case.teacher))
    assert total == score


def assert_equal_to_table(case: Case, dp_limits: DpLimits) -> None:
    moves, score, optimal, _ = dp_moves(*case.args, limits=dp_limits)
    expected_moves, expected_score = table_moves(*case.args)
    assert optimal
    assert score == expected_score, case
    assert moves.tolist() == expected_moves.tolist(), case


@pytest.mark.parametrize("method", [dp_moves, table_moves])
def test_golden_scores(method) -> None:
    assert len(GOLDEN) == 250
    for case in GOLDEN:
        student, teacher = ([token.encode() for token in case[side]] for side in ("student", "teacher"))
        assert method(student, teacher)[1] == case["score"]


@pytest.mark.parametrize(
    ("student", "teacher", "moves"),
    [
        ([], [], []),
        ([b"a"], [], [[1, 0, 0]]),
        ([b"a"], [b"b"], [[1, 1, 0]]),
        ([b"abcd"], [b"a", b"b", b"c", b"d"], [[1, 4, 1]]),
        ([b"", b"a"], [b"a"], [[2, 1, 1]]),
        ([b""], [b"", b""], [[1, 2, 1]]),
        # Shifted by one period: two gaps are as good as four combinations, and come first in the order of ties.
        (
            [b"ab", b"a", b"b"] * 2,
            [b"a", b"b", b"ab"] * 2,
            [[1, 0, 0], *[[1, 1, 1]] * 5, [0, 1, 0]],
        ),
        # Matching the first tokens at once is not optimal.
        ([b"b", b"ba"], [b"b", b"a"], [[1, 0, 0], [1, 2, 1]]),
        ([b"a", b"a", b"ab"], [b"a", b"aa", b"b"], [[0, 1, 0], [2, 1, 1], [1, 1, 0]]),
    ],
)
def test_small_cases_by_hand(student: list[bytes], teacher: list[bytes], moves: list[list[int]]) -> None:
    assert table_moves(student, teacher)[0].tolist() == moves
    assert dp_moves(student, teacher)[0].tolist() == moves


def test_five_tokens_are_no_combination() -> None:
    assert dp_moves([b"abcde"], [b"a", b"b", b"c", b"d", b"e"])[1] == 1.5 * -6


def test_special_tokens_are_atomic() -> None:
    case = Case([b"ab", b"<s>"], [b"a", b"b", b"<s>"], [True, True], [False, False, True])
    moves, score, _, _ = dp_moves(*case.args)
    check_moves(case, moves, score)
    assert [m for m in moves.tolist() if m[2]] == [[1, 1, 1]]


@pytest.mark.parametrize("name", LIMITS)
def test_small_random_cases(name: str) -> None:
    rng = np.random.default_rng(len(name))
    for _ in range(2500):
        assert_equal_to_table(random_case(rng, 14), LIMITS[name])


@pytest.mark.parametrize("name", LIMITS)
def test_larger_random_cases(name: str) -> None:
    rng = np.random.default_rng(len(name))
    for _ in range(100):
        assert_equal_to_table(random_case(rng, 200), LIMITS[name])


def test_long_cases() -> None:
    """Past every default limit: pruned regions, several widths of the band, the plain table as a fallback."""
    rng = np.random.default_rng(0)
    for letters in (1, 2, 3):
        text = random_text(1500, letters, rng)
        for other in (text, edited(text, letters, rng), random_text(1500, letters, rng)):
            case = Case(cut(text, 3, rng), cut(other, 3, rng), [], [])
            case.student_special = [False] * len(case.student)
            case.teacher_special = [False] * len(case.teacher)
            assert_equal_to_table(case, LIMITS["default"])
            assert_equal_to_table(case, limits(row_bytes=10_000))


tokens = st.lists(st.tuples(st.binary(max_size=3) | st.sampled_from([b"a", b"b", b"ab", b""]), st.booleans()))


@given(tokens, tokens, st.sampled_from(sorted(LIMITS)))
@settings(max_examples=500, deadline=None)
def test_any_tokens(student: list[tuple[bytes, bool]], teacher: list[tuple[bytes, bool]], name: str) -> None:
    case = Case(
        [token for token, _ in student],
        [token for token, _ in teacher],
        [special for _, special in student],
        [special for _, special in teacher],
    )
    assert_equal_to_table(case, LIMITS[name])
    check_moves(case, *dp_moves(*case.args, limits=LIMITS[name])[:2])


def test_budget_gives_valid_moves_and_says_so() -> None:
    rng = np.random.default_rng(3)
    cut_short = 0
    for _ in range(500):
        case = random_case(rng, 150)
        budget = limits(cell_budget=int(rng.integers(0, 2000)), window_edges=int(rng.integers(1, 40)))
        moves, score, optimal, _ = dp_moves(*case.args, limits=budget)
        check_moves(case, moves, score)
        expected_moves, expected_score = table_moves(*case.args)
        assert score <= expected_score
        if optimal:
            assert moves.tolist() == expected_moves.tolist()
        cut_short += not optimal
    assert cut_short > 20


def test_budget_bounds_hostile_input() -> None:
    rng = np.random.default_rng(4)
    case = [[bytes([c]) for c in random_text(5000, 2, rng)] for _ in range(2)]
    _, best, optimal, cells = dp_moves(*case)
    assert optimal
    assert cells > 5_000_000
    _, score, optimal, cells = dp_moves(*case, limits=limits(cell_budget=1_000_000))
    assert not optimal
    assert cells < 12_000_000  # the budget, and the windows, which are linear
    assert best * 0.8 < score <= best


def test_near_linear_on_similar_tokenizers() -> None:
    """A vocabulary of 5,000 words with a few very frequent ones; one token in ten is merged with the next."""
    rng = np.random.default_rng(5)
    words = [random_text(int(rng.integers(1, 9)), 26, rng) for _ in range(5000)]
    student = [words[int(x) % len(words)] for x in rng.zipf(1.3, 40_000)]
    teacher: list[bytes] = []
    for word in student:
        if teacher and rng.random() < 0.1:
            teacher[-1] += word
        else:
            teacher.append(word)
    moves, _, optimal, cells = dp_moves(student, teacher)
    assert optimal
    assert moves[:, 2].mean() > 0.999
    assert cells < 10 * (len(student) + len(teacher))


def test_any_tie_has_the_same_score() -> None:
    """Without `all_ties` the certificate is `>` instead of `>=`: as good, but not the table's choice.

    It is also the check that the random cases above are able to tell the two apart."""
    rng = np.random.default_rng(6)
    different = 0
    for _ in range(2000):
        case = random_case(rng, 30)
        moves, score, _, _ = dp_moves(*case.args, limits=limits(all_ties=False))
        expected_moves, expected_score = table_moves(*case.args)
        check_moves(case, moves, score)
        assert score == expected_score
        different += moves.tolist() != expected_moves.tolist()
    assert different > 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cell_budget", -1),
        ("window_edges", 0),
        ("plain_cells", -1),
        ("first_slack", 0),
        ("slack_growth", 1),
        ("plain_share", 0),
        ("row_bytes", -1),
    ],
)
def test_limits_are_checked(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"limits.{name}: expected at least"):
        dp_moves([b"a"], [b"a"], limits=limits(**{name: value}))


def test_flags_must_fit_the_tokens() -> None:
    with pytest.raises(ValueError, match="teacher_special: expected 1 flags, got 2"):
        dp_moves([b"a"], [b"a"], teacher_special=[True, False])
