"""Tests of prefix KL: the formula against an enumeration of all tokens, its optimum, and hand-made chunks."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from comparer import assert_as_accurate, assert_close, assert_within
from default_losses import default_loss
from harness import DTYPES, Case, backends_of, check, make_case, tokens
from real_tokenizers import encode
from rows_by_hand import rows_by_hand
from steps import Step, loss_of
from torch import Tensor

from xtoken import (
    Aligner,
    Alignment,
    PieceIndex,
    ProjectionMatrix,
    Vocabulary,
    _core,
    linear_prefix_kl_loss,
    prefix_kl_loss,
    reference,
)
from xtoken.losses import Needs, on_pieces
from xtoken.losses.prefix_kl import PrefixKL, formula

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "reverse": {"reverse": True},
    "temperature": {"temperature": 2.5},
    "weighted": {"weighting": "teacher", "reverse": True, "temperature": 0.6},
    "beta": {"beta": 0.3},
    "skew": {"skew": 0.2, "reverse": True, "temperature": 1.7, "weighting": "teacher"},
}
backends = pytest.mark.parametrize("backend", backends_of("prefix"))

# Two vocabularies over one alphabet; neither contains the other.
STUDENT = [b"a", b"b", b"c", b"ab", b"ac", b"abc", b"cab", b"bb", b"abb", b"ca"]
TEACHER = [b"c", b"a", b"b", b"ab", b"bc", b"aa", b"abca", b"cc", b"bb"]


def cut(text: bytes, tokens: list[bytes]) -> list[int]:
    """Ids of the longest tokens that fit next."""
    ids = []
    while text:
        token = max((t for t in tokens if text.startswith(t)), key=len)
        ids.append(tokens.index(token))
        text = text[len(token) :]
    return ids


def root(token: bytes, own: list[bytes], other: list[bytes]) -> bytes:
    """The token itself if both sides have it, else the root of its first piece."""
    return token if token in other else root(other[cut(token, other)[0]], other, own)


def shares(p: dict[Any, float], other: dict[Any, float], tau: float) -> dict[Any, float]:
    """The events of both, to the power of 1 / tau and divided by their sum."""
    powers = {e: p[e] ** (1 / tau) for e in p if e in other}
    return {e: power / math.fsum(powers.values()) for e, power in powers.items()}


def divergence(p: dict[Any, float], q: dict[Any, float]) -> float:
    """KL(q || p)."""
    return math.fsum(q[e] * math.log(q[e] / p[e]) for e in q if q[e] > 0)


def masses(events: list[Any], probabilities: list[float]) -> dict[Any, float]:
    """Probability of each event, given that of each token; None takes no part."""
    total: dict[Any, float] = {}
    for event, probability in zip(events, probabilities, strict=True):
        if event is not None:
            total[event] = total.get(event, 0.0) + probability
    return total


Group = frozenset[bytes]


def enumerated(
    student: list[bytes],
    teacher: list[bytes],
    s_ids: list[int],
    t_ids: list[int],
    p: Any,
    q: Any,
    tau: float = 1.0,
    reverse: bool = False,
    weighting: str = "none",
    before: tuple[bytes, bytes] = (b"", b""),
    group: Group = frozenset(),
) -> tuple[float, bool, int]:
    """The loss of one chunk after some tokens, whether its start has a term, and how many inner ones there are, from
    the rows of probabilities p and q, where the texts of a group are one event."""
    terms: list[tuple[int, float, float]] = []  # place, value, the teacher's probability of its realised event

    def compare(place: int, mine: dict[Any, float], theirs: dict[Any, float], realised: Any, counts: bool) -> None:
        p, q = shares(mine, theirs, tau), shares(theirs, mine, tau)
        value = divergence(q, p) if reverse else divergence(p, q)
        terms.append((place, value if counts else 0.0, q.get(realised, 0.0)))

    def event(token: bytes, own: list[bytes], other: list[bytes]) -> Any:
        found = root(token, own, other)
        return group if found in group else found

    roots = [event(t, student, teacher) for t in student], [event(t, teacher, student) for t in teacher]
    realised = roots[0][s_ids[0]], roots[1][t_ids[0]]
    known = [
        {event(t, own, other) for t in own if t in other and w and w + t in own}
        for w, own, other in zip(before, (student, teacher), (teacher, student), strict=True)
    ]
    left_out = known[0] ^ known[1] | (known[0] | known[1]) & {group}
    starts = [
        masses([None if e in left_out else e for e in events], rows[0])
        for events, rows in zip(roots, (p, q), strict=True)
    ]
    agrees = realised[0] == realised[1]
    compare(0, *starts, realised[1], agrees)
    places = [
        list(itertools.accumulate((len(v[i]) for i in ids), initial=0))
        for v, ids in ((student, s_ids), (teacher, t_ids))
    ]
    for whole in (0, 1):
        own, other = ((student, teacher), (teacher, student))[whole]
        own_ids, other_ids = ((s_ids, t_ids), (t_ids, s_ids))[whole]
        own_rows, other_rows = ((p, q), (q, p))[whole]
        pieces = [[other.index(t)] if t in other else cut(t, other) for t in own]
        for i, token in enumerate(own_ids):
            for j, start in enumerate(places[1 - whole][:-1]):
                begin, end = places[whole][i : i + 2]
                if not begin < start < end or begin not in places[1 - whole]:
                    continue
                since = other_ids[places[1 - whole].index(begin) : j]
                if pieces[token][: len(since)] != since:
                    continue
                going = [sequence[: len(since)] == since for sequence in pieces]
                ends = "ends" if roots[1 - whole][since[0]] != group else None
                following = [
                    (roots[1 - whole][s[len(since)]] if len(s) > len(since) else ends) if g else None
                    for s, g in zip(pieces, going, strict=True)
                ]
                events = [e if e in following else ends for e in roots[1 - whole]]
                whole_mass, part_mass = masses(following, own_rows[i]), masses(events, other_rows[j])
                if whole == 0:
                    compare(start, whole_mass, part_mass, events[other_ids[j]], True)
                else:
                    compare(start, part_mass, whole_mass, following[token], True)
    terms.sort()
    products = itertools.accumulate((q for _, _, q in terms[:-1]), operator.mul, initial=1.0)
    weights = products if weighting == "teacher" else itertools.repeat(1.0)
    return math.fsum(w * value for w, (_, value, _) in zip(weights, terms, strict=False)), agrees, len(terms) - 1


# Text of a chunk as each side cuts it, and the boundaries that have a term.
CHUNKS: dict[str, tuple[list[bytes], list[bytes], int]] = {
    "1 to 1, shared": ([b"ab"], [b"ab"], 1),
    "1 to 2": ([b"abc"], [b"ab", b"c"], 2),
    "1 to 2, another cut": ([b"abc"], [b"a", b"bc"], 0),
    "2 to 1": ([b"b", b"c"], [b"bc"], 2),
    "2 to 1, pieces": ([b"abc", b"a"], [b"abca"], 2),
    "3 to 1": ([b"ab", b"c", b"a"], [b"abca"], 1),
    "2 to 2, crossing": ([b"abc", b"a"], [b"ab", b"c", b"a"], 2),
    "2 to 2, overlapping": ([b"ab", b"c"], [b"a", b"bc"], 0),
    "3 to 2": ([b"cab", b"b", b"c"], [b"c", b"ab", b"bc"], 3),
    "3 to 3": ([b"b", b"c", b"cab"], [b"bc", b"c", b"ab"], 3),
    "4 to 3, another cut first": ([b"ab", b"c", b"b", b"c"], [b"a", b"bc", b"bc"], 1),
    "1 to 3": ([b"cab"], [b"c", b"a", b"b"], 2),
    "2 to 3": ([b"ca", b"b"], [b"c", b"a", b"b"], 2),
}


def logits_for(seed: int, rows: int, size: int) -> Tensor:
    return 2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GROUPS: dict[str, Group] = {
    "none": frozenset(), "a is ab": frozenset([b"a", b"ab"]), "a is b is ab": frozenset([b"a", b"b", b"ab"])
}  # fmt: skip
groups = pytest.mark.parametrize("group", GROUPS)


def index_of(student: list[bytes], teacher: list[bytes], group: Group) -> PieceIndex:
    """With the texts of a group, which both sides have, as one event."""
    pieces = PieceIndex.build(Vocabulary(student), Vocabulary(teacher))
    events = [int(pieces.student.event[student.index(text)]) for text in group]
    event_of = [min(events) if event in events else event for event in range(pieces.events)]
    numbers = np.unique(event_of, return_inverse=True)[1].astype(np.int32)
    return PieceIndex(_core.merge_events(pieces.data.numpy(), numbers))


def chunk_of(name: str, group: str = "none") -> tuple[PieceIndex, Alignment, list[int], list[int]]:
    s_texts, t_texts, _ = CHUNKS[name]
    s_ids, t_ids = [STUDENT.index(t) for t in s_texts], [TEACHER.index(t) for t in t_texts]
    alignment = Alignment([[0, 1, 0, 1], [1, 1 + len(s_ids), 1, 1 + len(t_ids)]], None, [0, *s_ids], [0, *t_ids])
    return index_of(STUDENT, TEACHER, GROUPS[group]), alignment, s_ids, t_ids


@pytest.mark.parametrize("weighting", ["none", "teacher"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CHUNKS)
@groups
def test_formula_against_enumeration(group: str, name: str, reverse: bool, weighting: str) -> None:
    pieces, alignment, s_ids, t_ids = chunk_of(name, group)
    z, y = logits_for(1, len(s_ids) + 1, len(STUDENT)), logits_for(2, len(t_ids) + 1, len(TEACHER))
    p, q = z.softmax(-1).tolist(), y.softmax(-1).tolist()
    before = STUDENT[0], TEACHER[0]
    want, *terms = enumerated(STUDENT, TEACHER, s_ids, t_ids, p, q, 1.3, reverse, weighting, before, GROUPS[group])
    if group == "none":
        assert sum(terms) == CHUNKS[name][2]
    chunks: Any = rows_by_hand(alignment, len(z), len(y))
    options = {"temperature": 1.3, "reverse": reverse, "weighting": weighting}
    got = reference.prefix(z, y, chunks, pieces.data, **options)
    assert_close(got, torch.tensor([want * 1.3**2], dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_formula_over_a_batch(reverse: bool, merged: bool) -> None:
    """Every chunk of two samples, boundaries of both kinds among them."""
    case = make_case(31, 29)
    student, teacher = tokens(31, 0), tokens(29, 1)
    group = frozenset(text for text in student if merged and text in teacher and text[:1] == b"a")
    assert len(group) > 3 or not merged
    pieces = index_of(student, teacher, group)
    got = prefix_kl_loss(case.student, case.teacher, case.alignment, pieces, reverse=reverse, reduction="none")
    used = reference.predictable(case.alignment)
    s_all, t_all = case.alignment.student_ids, case.alignment.teacher_ids
    assert s_all is not None
    assert t_all is not None
    inner = 0
    for k in used.nonzero()[:, 0].tolist():
        sample = int(case.alignment.sample_index[k])
        a, b, c, d = case.alignment.spans[k].tolist()
        p, q = case.student[sample, a - 1 : b - 1].softmax(-1), case.teacher[sample, c - 1 : d - 1].softmax(-1)
        ids = s_all[sample, a:b].tolist(), t_all[sample, c:d].tolist()
        assert b"".join(student[i] for i in ids[0]) == b"".join(teacher[i] for i in ids[1])
        follows = k > case.alignment.offsets[sample] and case.alignment.spans[k - 1, 1::2].tolist() == [a, c]
        before = (student[s_all[sample, a - 1]], teacher[t_all[sample, c - 1]]) if follows else (b"", b"")
        rows = p.tolist(), q.tolist()
        want, _, count = enumerated(student, teacher, *ids, *rows, reverse=reverse, before=before, group=group)
        inner += count
        assert_close(got[k], torch.tensor(want, dtype=torch.float64), rtol=1e-10)
    assert inner >= 5
    assert not got[~used].any()


@pytest.mark.parametrize(
    "options", [{}, {"reverse": True, "temperature": 1.4, "weighting": "teacher"}, {"beta": 0.4}], ids=str
)
@pytest.mark.parametrize("name", CHUNKS)
def test_gradcheck(name: str, options: dict[str, Any]) -> None:
    pieces, alignment, s_ids, t_ids = chunk_of(name)
    student = logits_for(3, len(s_ids) + 1, len(STUDENT)).requires_grad_()
    teacher = logits_for(4, len(t_ids) + 1, len(TEACHER))

    def loss(student: Tensor) -> Tensor:
        return prefix_kl_loss(student, teacher, alignment, pieces, backend="reference", **options)

    assert torch.autograd.gradcheck(loss, student, fast_mode=True)


# The teacher writes digits; the student also has every pair of digits.
DIGITS = [b"0", b"1", b"2", b"."]
NUMBERS = [*DIGITS, *(a + b for a in DIGITS[:3] for b in DIGITS[:3])]


def numbers() -> tuple[PieceIndex, Alignment, Tensor, Tensor]:
    """The chunk "21", the teacher's two rows, and the student's probabilities that agree with them."""
    q = torch.tensor([[0.2, 0.1, 0.6, 0.1], [0.3, 0.5, 0.1, 0.1]], dtype=torch.float64)
    single = torch.cat([q[0, :3] * q[1, 3], q[0, 3:]])  # a digit that ends there, and the full stop
    p = torch.cat([single, (q[0, :3, None] * q[1, None, :3]).flatten()])
    pieces = PieceIndex.build(Vocabulary(NUMBERS), Vocabulary(DIGITS))
    alignment = Alignment([[1, 2, 1, 3]], None, [3, NUMBERS.index(b"21")], [3, 2, 1])
    return pieces, alignment, p, q


def loss_and_grad(p: Tensor, loss: Any) -> tuple[float, Tensor]:
    logits = p.log()[None].requires_grad_()
    value = loss(logits.expand(2, -1))
    return float(value.detach()), torch.autograd.grad(value, logits)[0][0]


def test_zero_exactly_where_the_events_agree() -> None:
    """Mass may move between tokens of the same events, and nowhere else."""
    pieces, alignment, p, q = numbers()
    teacher = torch.cat([q, q[:1]]).log()

    def loss(logits: Tensor) -> Tensor:
        return prefix_kl_loss(logits, teacher, alignment, pieces)

    value, grad = loss_and_grad(p, loss)
    assert abs(value) < 1e-14
    assert_within(grad, torch.zeros_like(grad), 1e-14)
    for a, b in itertools.permutations(range(len(NUMBERS)), 2):
        moved = p.clone()
        moved[a] -= 0.5 * p[a]
        moved[b] += 0.5 * p[a]
        # Behind a "2" the chunk also tells what comes next; behind other digits it does not.
        same_events = NUMBERS[a][:1] == NUMBERS[b][:1] != b"2"
        value, grad = loss_and_grad(moved, loss)
        if same_events:
            assert abs(value) < 1e-14, (NUMBERS[a], NUMBERS[b])
            assert_within(grad, torch.zeros_like(grad), 1e-14)
        else:
            assert value > 1e-5, (NUMBERS[a], NUMBERS[b])
            assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("gamma", [0.1, 0.0])
def test_projected_kl_is_biased(gamma: float) -> None:
    """At the student that agrees with the teacher, the projected loss still pulls towards pairs of equal digits."""
    pieces, alignment, p, q = numbers()
    teacher = torch.cat([q, q[:1]]).log()
    W = ProjectionMatrix.build(Vocabulary(NUMBERS), Vocabulary(DIGITS), gamma=gamma)
    value, grad = loss_and_grad(p, lambda logits: default_loss(Needs.PROJECTION)(logits, teacher, alignment, W))
    _, ours = loss_and_grad(p, lambda logits: prefix_kl_loss(logits, teacher, alignment, pieces))
    assert ours.abs().max() < 1e-14
    if gamma == 0.0:  # a piece is all that W sees: no bias at the first row, and nothing known of the second
        assert abs(value) < 1e-8
        return
    assert value > 1e-3
    assert grad.abs().max() > 5e-3
    # Descent adds d log p = -grad / p: more for "22" than for "20" and "21", as "99" over "95".
    pull = -grad / p
    twos = {text: float(pull[NUMBERS.index(text)]) for text in (b"20", b"21", b"22")}
    assert twos[b"22"] > max(twos[b"20"], twos[b"21"]) + 0.01


def test_one_tokenizer_is_per_position_kl() -> None:
    vocabulary = Vocabulary(STUDENT)
    pieces = PieceIndex.build(vocabulary, vocabulary)
    assert pieces.events == len(STUDENT)
    student, teacher = logits_for(5, 6, len(STUDENT)), logits_for(6, 6, len(STUDENT))
    alignment = Alignment([[t, t + 1] * 2 for t in range(1, 6)], None, [0] * 6, [0] * 6)
    for reverse in (False, True):
        want = default_loss(Needs.SAME_TOKENIZER)(student, teacher, alignment, temperature=1.5, reverse=reverse)
        got = prefix_kl_loss(student, teacher, alignment, pieces, temperature=1.5, reverse=reverse)
        assert_close(got, want, rtol=1e-12)


def test_nothing_is_left_out() -> None:
    """At the start of a chunk the events of each side sum to 1."""
    pieces, *_ = chunk_of("1 to 2")
    for side, size in ((pieces.student, len(STUDENT)), (pieces.teacher, len(TEACHER))):
        log_p = logits_for(7, 4, size).log_softmax(-1)
        mass = on_pieces.event_log_mass(log_p, side.event.long().expand(4, -1), pieces.events).exp()
        assert mass.shape == (4, pieces.events)
        assert_close(mass.sum(-1), torch.ones(4, dtype=torch.float64), rtol=1e-12)


def test_an_event_that_one_side_lacks_is_left_out_on_both() -> None:
    student = Vocabulary([b"a", b"b"])
    teacher = Vocabulary([b"a", b"b", b"<tool>"], kinds=["normal", "normal", "special"])
    pieces = PieceIndex.build(student, teacher)
    assert pieces.events == 3
    assert pieces.teacher.event.tolist() == [0, 1, 2]
    alignment = Alignment([[1, 2, 1, 2]], None, [0, 1], [0, 1])
    z, y = logits_for(8, 2, 2), logits_for(9, 2, 3)
    assert_close(
        prefix_kl_loss(z, y, alignment, pieces), default_loss(Needs.SAME_TOKENIZER)(z, y[:, :2], alignment), rtol=1e-12
    )


@backends
@pytest.mark.parametrize("variant", [{}, {"reverse": True}, {"beta": 0.3}, {"temperature": 2.0}])
@pytest.mark.parametrize("height", [50.0, 300.0, 3000.0])
def test_what_is_left_out_may_outweigh_all_else(backend: str, variant: dict[str, Any], height: float) -> None:
    """The student has "12", so behind its "1" no "2" follows; the teacher is sure of it, which is left out."""
    pieces = PieceIndex.build(Vocabulary([b"1", b"2", b"12", b"3"]), Vocabulary([b"1", b"2", b"3"]))
    alignment = Alignment([[0, 1, 0, 1], [1, 2, 1, 2]], None, [0, 3], [0, 2])
    z, y = torch.tensor([[0.5, 1.0, -40.0, 0.0]] * 2), torch.tensor([[1.0, 0.0, -1.0]] * 2)
    want = prefix_kl_loss(z.double(), y.double(), alignment, pieces, backend="reference", **variant)
    for side, row in (("student", z), ("teacher", y)):
        above = row.clone()
        above[:, 1] = height
        rows = ((above if side == "student" else z).requires_grad_(), above if side == "teacher" else y)
        loss = prefix_kl_loss(*rows, alignment, pieces, backend=backend, **variant)
        assert_close(loss, want, rtol=1e-5, what=side)
        (gradient,) = torch.autograd.grad(loss, rows[0])
        assert bool(gradient.isfinite().all())


def test_chunks_of_different_lengths_have_no_inner_boundary() -> None:
    """Where the bytes of the two sides differ (a chunk of one's own making), only its start is compared."""
    pieces, _, s_ids, t_ids = chunk_of("1 to 2")
    z, y = logits_for(1, 2, len(STUDENT)), logits_for(2, 4, len(TEACHER))
    longer = Alignment([[1, 2, 1, 4]], None, [0, *s_ids], [0, *t_ids, 0])
    shorter = Alignment([[1, 2, 1, 2]], None, [0, *s_ids], [0, *t_ids, 0])
    assert_close(prefix_kl_loss(z, y, longer, pieces), prefix_kl_loss(z, y, shorter, pieces), rtol=1e-12)


def test_hidden_states() -> None:
    case = make_case(31, 29, samples=1)
    hidden, head = logits_for(1, case.student.shape[1], 8)[None], logits_for(2, 31, 8)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    dense = prefix_kl_loss(hidden @ head.T, case.teacher, case.alignment, case.pieces)
    got = linear_prefix_kl_loss(*leaves, case.teacher, case.alignment, case.pieces)
    assert isinstance(got, Tensor)
    assert isinstance(dense, Tensor)
    assert_close(got, dense, rtol=1e-12)
    for one, other in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(dense, leaves), strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-14)


kernels = pytest.mark.parametrize("backend", [name for name in backends_of("prefix") if name != "reference"])
cpu = pytest.mark.parametrize("backend", [name for name in backends_of("prefix") if name.startswith("cpu")])


@functools.cache
def wide_case(students: int, teachers: int) -> Case:
    case = make_case(students, teachers, samples=1)
    case.student[:, 1, -13:] += 100.0
    case.teacher[:, 2, -16:] += 100.0
    return case


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"reverse": True, "temperature": 2.0, "weighting": "teacher"}, {"beta": 0.7}], ids=str
)
@pytest.mark.slow
def test_wide_rows(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Events of hundreds of tokens; the largest logits come after the first 4096, so units are found twice."""
    sizes = (1203, 1101) if backend == "emulated" else (5003, 4801)
    check(backend, "prefix", wide_case(*sizes), dtype, strided=True, **options)


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_near_the_lowest_logit(dtype: torch.dtype, backend: str) -> None:
    """Where the largest logit is hardly above the lowest one, logits below count as that, and have mass."""
    case = make_case(samples=1, scale=60.0)
    case.student.sub_(1e4)
    case.teacher.sub_(1e4)
    check(backend, "prefix", case, dtype)


@backends
def test_bad_pieces_and_ids(backend: str) -> None:
    pieces, alignment, s_ids, t_ids = chunk_of("1 to 2")
    z, y = logits_for(1, 2, len(STUDENT)).float(), logits_for(2, 3, len(TEACHER)).float()
    with pytest.raises(TypeError, match=r"pieces: expected an xtoken.PieceIndex, got Tensor"):
        prefix_kl_loss(z, y, alignment, pieces.data, backend=backend)
    spans = alignment.spans
    with pytest.raises(ValueError, match="alignment: the loss or its merge needs token ids, but student_ids is None"):
        prefix_kl_loss(z, y, Alignment(spans), pieces, backend=backend)
    with pytest.raises(ValueError, match=r"alignment: expected student_ids in 0 \.\.\. 9 within chunks, got 10"):
        prefix_kl_loss(z, y, Alignment(spans, None, [0, 10], [0, *t_ids]), pieces, backend=backend)
    with pytest.raises(ValueError, match=r"alignment: expected teacher_ids in 0 \.\.\. 8 within chunks, got -1"):
        prefix_kl_loss(z, y, Alignment(spans, None, [0, *s_ids], [0, t_ids[0], -1]), pieces, backend=backend)
    with pytest.raises(ValueError, match=r"alignment: expected teacher_ids in 0 \.\.\. 8 within chunks, got 9"):
        prefix_kl_loss(z, y, Alignment([[1, 2, 1, 2]], None, [0, *s_ids], [0, 9]), pieces, backend=backend)
    with pytest.raises(ValueError, match="weighting: expected one of 'none', 'teacher', got 'both'"):
        prefix_kl_loss(z, y, alignment, pieces, weighting="both", backend=backend)


def test_chunks_without_ids() -> None:
    pieces, alignment, *_ = chunk_of("1 to 2")
    z, y = logits_for(1, 2, len(STUDENT)), logits_for(2, 3, len(TEACHER))
    chunks = reference.Chunks.of(alignment, 2, 3)
    with pytest.raises(ValueError, match="chunks: prefix KL needs the realised ids"):
        reference.prefix(z, y, chunks, pieces.data)


MARKS = (b"<s>", b"</s>", b"<x>")


def random_vocabulary(random: Random) -> Vocabulary:
    """Texts over two letters, and some tokens without text, which have partners by role or by name."""
    texts = {b"a", b"b", *(bytes(random.choices(b"ab", k=random.randint(2, 5))) for _ in range(random.randint(0, 12)))}
    found = [*random.sample(sorted(texts), len(texts)), *random.sample(MARKS, random.randint(0, 3))]
    roles = {role: found.index(mark) for role, mark in (("bos", b"<s>"), ("eos", b"</s>")) if mark in found}
    return Vocabulary(found, roles=roles, kinds=["special" if token in MARKS else "normal" for token in found])


def marks(vocabulary: Vocabulary, share: float, random: Random) -> list[int]:
    """Some of the tokens without text."""
    return [i for i in range(len(vocabulary)) if vocabulary[i] in MARKS and random.random() < share]


def random_tokens(text: bytes, vocabulary: Vocabulary, random: Random) -> list[int]:
    """Tokens that spell the text, cut at random; now and then one without text among them, or others altogether."""
    ids = marks(vocabulary, 0.4, random)
    while text:
        ids.append(random.choice([i for i in range(len(vocabulary)) if text.startswith(vocabulary[i])]))
        text = text[len(vocabulary[ids[-1]]) :]
        ids += marks(vocabulary, 0.05, random)
    if random.random() < 0.05:
        return random.choices(range(len(vocabulary)), k=random.randint(1, 5))
    if random.random() < 0.02:
        ids[random.randrange(len(ids))] = random.choice([-1, len(vocabulary), 10**9])
    return ids


def random_rows(texts: list[list[bytes]], vocabulary: Vocabulary, random: Random) -> reference.Rows:
    """The rows of one chunk for each list of texts, with rows of no chunk between them."""
    ids: list[int] = []
    start, count = [], []
    for chunk in texts:
        ids += random.choices((-1, 0, 1), k=random.randint(0, 2))
        start.append(len(ids))
        ids += [token for text in chunk for token in random_tokens(text, vocabulary, random)]
        count.append(len(ids) - start[-1])
    return reference.Rows(torch.tensor(start), torch.tensor(count), torch.tensor(ids))


@pytest.mark.slow
def test_inner_boundaries() -> None:
    """Those of the formula, found by their definition, are those of the core, which finds them in one walk."""
    found = refused = 0
    for seed in range(1000):
        random = Random(seed)
        vocabularies = random_vocabulary(random), random_vocabulary(random)
        pieces = PieceIndex.build(*vocabularies).data
        texts = [
            [bytes(random.choices(b"ab", k=random.randint(1, 9))) for _ in range(random.randint(1, 3))]
            for _ in range(random.randint(1, 4))
        ]
        sides = [random_rows(texts, vocabulary, random) for vocabulary in vocabularies]
        chunks = reference.Chunks(*sides, torch.arange(len(texts)))
        arrays = [getattr(rows, name).numpy() for rows in sides for name in ("start", "count", "next_ids")]
        try:
            want = _core.inner_boundaries(pieces.numpy(), *arrays)
        except ValueError as error:
            refused += 1
            with pytest.raises(ValueError, match=re.escape(str(error))):
                formula.inner_boundaries(chunks, pieces)
        else:
            found += len(want)
            assert formula.inner_boundaries(chunks, pieces).tolist() == want.tolist(), f"seed {seed}"
    assert found > 1500
    assert refused > 100


def compare(
    backends: str | Sequence[str],
    student: Tensor,
    teacher: Tensor,
    alignment: Alignment,
    pieces: PieceIndex,
    labels: Tensor,
    **options: Any,
) -> None:
    """On one backend, or on each: both losses of float32 logits and the gradient of their sum are as accurate as the
    reference's."""

    def results(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaf = student.float().to(dtype).requires_grad_()
        loss, ce = prefix_kl_loss(
            leaf, teacher.float().to(dtype), alignment, pieces, labels=labels, backend=name, **options
        )
        return [loss.detach(), ce.detach(), *torch.autograd.grad(loss + 0.7 * ce, leaf)]

    plain, truth = results("reference", torch.float32), results("reference", torch.float64)
    for backend in [backends] if isinstance(backends, str) else backends:
        for got, one, true in zip(results(backend, torch.float32), plain, truth, strict=True):
            floor = 4 * torch.finfo(torch.float32).eps * float(true.abs().max())
            assert_as_accurate(got, one, true, floor, f"prefix on {backend}")


@kernels
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("name", CHUNKS)
def test_boundaries_on_every_kernel(name: str, options: str, backend: str) -> None:
    pieces, alignment, s_ids, t_ids = chunk_of(name)
    z, y = logits_for(1, len(s_ids) + 1, len(STUDENT)), logits_for(2, len(t_ids) + 1, len(TEACHER))
    compare(backend, z, y, alignment, pieces, torch.tensor([0, *s_ids]), **VARIANTS[options])


@kernels
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("first", [b"a", b"b"])
def test_merged_events_on_every_kernel(first: bytes, options: str, backend: str) -> None:
    """Half of the shared texts are one event."""
    case = make_case(31, 29)
    student, teacher = tokens(31, 0), tokens(29, 1)
    pieces = index_of(student, teacher, frozenset(t for t in student if t in teacher and t[:1] == first))
    labels = torch.arange(case.student[..., 0].numel()).reshape(case.student.shape[:2]) % 31
    compare(backend, case.student, case.teacher, case.alignment, pieces, labels, **VARIANTS[options])


# The tokens of one side, and those of two bytes that the other side has as "5", "9".
SPELLED = {
    "every token may go on": ([b"5", b"9", b"55", b"59"], [b"59"]),
    "a rest that nobody spells": ([b"5", b"9", b"59", b"5x9", b"x"], [b"59"]),
    "nothing but such a rest": ([b"9", b"5x"], [b"5x"]),
    "such a rest, and more": ([b"9", b"5x", b"59", b"55"], [b"5x", b"59"]),
}


def spelled(name: str, swapped: bool) -> tuple[list[list[bytes]], list[list[int]]]:
    """Both vocabularies, and the realised tokens of both sides."""
    texts, own = SPELLED[name]
    sides, ids = [texts, [b"5", b"9"]], [[texts.index(token) for token in own], [0, 1] * len(own)]
    return (sides[::-1], ids[::-1]) if swapped else (sides, ids)


@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_is_likely_behind_what_one_side_lacks(reverse: bool) -> None:
    """The teacher goes on with a piece that no student token has: its share of the common events is 0."""
    sides, ids = spelled("such a rest, and more", True)
    pieces = PieceIndex.build(*map(Vocabulary, sides))
    z, y = logits_for(1, len(ids[0]) + 1, len(sides[0])), logits_for(2, len(ids[1]) + 1, len(sides[1]))
    losses = {}
    for weighting, count in itertools.product(("none", "teacher"), (1, 2)):
        spans = [[1, 1 + 2 * count, 1, 1 + count]]
        alignment = Alignment(spans, None, [0, *ids[0]], [0, *ids[1]])
        losses[weighting, count] = prefix_kl_loss(z, y, alignment, pieces, reverse=reverse, weighting=weighting)
    assert losses["none", 2] != losses["none", 1]
    assert losses["teacher", 2] == losses["teacher", 1]


@kernels
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", SPELLED)
def test_boundaries_with_few_events(name: str, swapped: bool, backend: str) -> None:
    sides, ids = spelled(name, swapped)
    pieces = PieceIndex.build(Vocabulary(sides[0]), Vocabulary(sides[1]))
    alignment = Alignment([[1, 1 + len(ids[0]), 1, 1 + len(ids[1])]], None, [0, *ids[0]], [0, *ids[1]])
    z, y = logits_for(1, len(ids[0]) + 1, len(sides[0])), logits_for(2, len(ids[1]) + 1, len(sides[1]))
    for options in VARIANTS.values():
        compare(backend, z, y, alignment, pieces, torch.tensor([0, *ids[0]]), **options)


@kernels
@pytest.mark.parametrize("largest", [0.0, 300.0])
@pytest.mark.parametrize("special", [(70, 0), (1, 0), (0, 70)], ids=str)
def test_tokens_that_the_other_side_lacks(special: tuple[int, int], largest: float, backend: str) -> None:
    """They have no part in the loss, whatever their logits are, but in the cross-entropy."""
    sides = []
    for count in special:
        texts = [b"a", b"b", b"aa", *(f"<{i}>".encode() for i in range(count))]
        sides.append(Vocabulary(texts, ["normal"] * 3 + ["special"] * count))
    pieces = PieceIndex.build(*sides)
    z, y = (logits_for(seed, 3, 3 + count) for seed, count in enumerate(special))
    z[0, -1] += largest
    y[1, -1] += largest
    alignment = Alignment([[1, 2, 1, 2], [2, 3, 2, 3]], None, [0, 1, 0], [0, 1, 0])
    compare(backend, z, y, alignment, pieces, torch.tensor([0, 1, 2 + special[0]]))


@kernels
def test_no_common_event(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused; a kernel that meets it does nothing."""
    data = PieceIndex.build(Vocabulary([b"a", b"b"]), Vocabulary([b"c", b"d", b"e"])).data.clone()
    data[2] = 2
    PieceIndex(data).teacher.event.fill_(1)
    pieces = PieceIndex(data)
    alignment = Alignment([[1, 2, 1, 2]], None, [0, 0], [0, 0])
    student, teacher = logits_for(1, 2, 2).float().requires_grad_(), logits_for(2, 2, 3).float()
    with pytest.raises(ValueError, match="pieces: expected events that both sides have"):
        prefix_kl_loss(student, teacher, alignment, pieces, backend=backend)
    monkeypatch.setattr(PrefixKL, "check", lambda self: None)
    for reverse in (False, True):
        loss = prefix_kl_loss(student, teacher, alignment, pieces, reverse=reverse, backend=backend)
        assert isinstance(loss, Tensor)
        assert loss == 0
        assert not torch.autograd.grad(loss, student)[0].any()


@kernels
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize(("students", "teachers"), [(67, 15), (55, 5)])
def test_chunks_whose_events_are_all_left_out(students: int, teachers: int, options: str, backend: str) -> None:
    """Only small vocabularies have them: their start says nothing, and has no gradient."""
    case = make_case(students, teachers)
    rows = rows_by_hand(case.alignment, case.student.shape[1], case.teacher.shape[1])
    sides = formula.piece_sides(case.pieces.data)
    merged = formula.merged_events(sides, int(case.pieces.data[2]))
    assert bool(formula.cannot_follow(rows, sides, merged).all(1).any())
    check(backend, "prefix", case, torch.float32, **VARIANTS[options])
    labels = torch.randint(students, case.student.shape[:2], generator=torch.Generator().manual_seed(1))
    compare(backend, case.student, case.teacher, case.alignment, case.pieces, labels, **VARIANTS[options])


@kernels
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize(
    "options", [{}, {"reverse": True}, {"temperature": 0.05}, {"temperature": 20.0}, {"beta": 0.4}], ids=str
)
def test_logits_far_apart(options: dict[str, Any], side: int, backend: str) -> None:
    """Nearly all mass on tokens that only this side has; its events too rare for sums of floats; none that counts."""
    sizes = 401, 373
    texts = [tokens(size, s) for s, size in enumerate(sizes)]
    kinds = [["normal"] * size for size in sizes]
    texts[side], kinds[side] = [*texts[side], *(b"<%d>" % i for i in range(5))], kinds[side] + ["special"] * 5
    pieces = PieceIndex.build(*(Vocabulary(t, kinds=k) for t, k in zip(texts, kinds, strict=True)))
    events = pieces.student.event.long(), pieces.teacher.event.long()
    counts = [event.bincount(minlength=pieces.events) for event in events]
    assert counts[1 - side][-1] == 0
    lists = (counts[0] > 0) & (counts[1] > 0) & (counts[0] + counts[1] > 2)
    assert lists.sum() > 16
    rare = lists & (torch.arange(pieces.events) % 2 == 0)
    logits = logits_for(0, 5, len(texts[0])), logits_for(1, 5, len(texts[1]))
    logits[side][1, -5:] += 100.0
    logits[side][2] -= 80.0 * rare[events[side]]
    logits[side][3, 1:] = -math.inf
    alignment = Alignment([[t, t + 1] * 2 for t in range(1, 5)], None, [0] * 5, [0] * 5)
    compare(backend, *logits, alignment, pieces, torch.arange(5) * 50, **options)


@pytest.fixture(scope="module")
def real_pair(tokenizer: Any, vocabulary: Any) -> tuple[Alignment, PieceIndex]:
    """Llama 3 and Qwen3: numbers go on in a token of the student, other words in one of the teacher."""
    names = "llama3", "qwen3"
    ids = [encode(tokenizer(name), "12.50 学习新中国") for name in names]
    student, teacher = map(vocabulary, names)
    return Aligner(student, teacher).align(*ids), PieceIndex.build(student, teacher, texts=())


@pytest.mark.parametrize("reverse", [False, True])
def test_a_real_pair(reverse: bool, real_pair: tuple[Alignment, PieceIndex]) -> None:
    """On every kernel, of which the emulated one takes long."""
    alignment, pieces = real_pair
    assert alignment.student_ids is not None
    assert alignment.teacher_ids is not None
    lengths = len(alignment.student_ids), len(alignment.teacher_ids)
    chunks = reference.Chunks.of(alignment, *lengths, realised=True)
    assert set(formula.inner_boundaries(chunks, pieces.data)[:, 1].tolist()) == {0, 1}
    sizes = len(pieces.student.event), len(pieces.teacher.event)
    logits = logits_for(0, lengths[0], sizes[0]), logits_for(1, lengths[1], sizes[1])
    backends = [name for name in backends_of("prefix")[1:] if name != "emulated" or reverse]
    compare(backends, *logits, alignment, pieces, alignment.student_ids, reverse=reverse)


DEVICE_STEPS: dict[str, Callable[[Step], Any]] = {
    "reverse": lambda s: loss_of(s, "prefix", reduction="none", reverse=True, temperature=2.0).square().sum(),
}
