"""Tests of prefix KL: the formula against an enumeration of all tokens, its optimum, and hand-made chunks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from comparer import assert_close
from torch import Tensor

from xtoken import Alignment, PieceIndex, Vocabulary, reference

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


def divergence(p: dict[Any, float], q: dict[Any, float]) -> float:
    """KL(q || p) over the events of both, each divided by its sum."""
    events = p.keys() & q.keys()
    p_sum, q_sum = (math.fsum(side[e] for e in events) for side in (p, q))
    return math.fsum(q[e] / q_sum * math.log(q[e] / q_sum / (p[e] / p_sum)) for e in events if q[e] > 0)


def masses(events: list[Any], probabilities: list[float]) -> dict[Any, float]:
    """Probability of each event, given that of each token; None takes no part."""
    total: dict[Any, float] = {}
    for event, probability in zip(events, probabilities, strict=True):
        if event is not None:
            total[event] = total.get(event, 0.0) + probability
    return total


def enumerated(
    student: list[bytes],
    teacher: list[bytes],
    s_ids: list[int],
    t_ids: list[int],
    p: Any,
    q: Any,
    reverse: bool = False,
) -> tuple[float, int]:
    """The loss of one chunk, and its number of boundaries, from the rows of probabilities p and q."""

    def term(mine: dict[Any, float], theirs: dict[Any, float]) -> float:
        return divergence(theirs, mine) if reverse else divergence(mine, theirs)

    loss = term(
        masses([root(t, student, teacher) for t in student], p[0]),
        masses([root(t, teacher, student) for t in teacher], q[0]),
    )
    count = 1
    ends = [
        list(itertools.accumulate((len(v[i]) for i in ids), initial=0))
        for v, ids in ((student, s_ids), (teacher, t_ids))
    ]
    for whole in (0, 1):
        own, other = ((student, teacher), (teacher, student))[whole]
        own_ids, other_ids = ((s_ids, t_ids), (t_ids, s_ids))[whole]
        own_rows, other_rows = ((p, q), (q, p))[whole]
        pieces = [[other.index(t)] if t in other else cut(t, other) for t in own]
        for i, token in enumerate(own_ids):
            for j, start in enumerate(ends[1 - whole][:-1]):
                if not ends[whole][i] < start < ends[whole][i + 1] or ends[whole][i] not in ends[1 - whole]:
                    continue
                since = other_ids[ends[1 - whole].index(ends[whole][i]) : j]
                if pieces[token][: len(since)] != since:
                    continue
                going = [sequence[: len(since)] == since for sequence in pieces]
                following = [
                    (s[len(since)] if len(s) > len(since) else "ends") if g else None
                    for s, g in zip(pieces, going, strict=True)
                ]
                whole_mass = masses(following, own_rows[i])
                part_mass = masses([t if t in following else "ends" for t in range(len(other))], other_rows[j])
                loss += term(*((whole_mass, part_mass) if whole == 0 else (part_mass, whole_mass)))
                count += 1
    return loss, count


# Text of a chunk as each side cuts it, and the boundaries that have a term.
CHUNKS: dict[str, tuple[list[bytes], list[bytes], int]] = {
    "1 to 1, shared": ([b"ab"], [b"ab"], 1),
    "1 to 2": ([b"abc"], [b"ab", b"c"], 2),
    "1 to 2, another cut": ([b"abc"], [b"a", b"bc"], 1),
    "2 to 1": ([b"b", b"c"], [b"bc"], 2),
    "2 to 1, pieces": ([b"abc", b"a"], [b"abca"], 2),
    "3 to 1": ([b"ab", b"c", b"a"], [b"abca"], 1),
    "2 to 2, crossing": ([b"abc", b"a"], [b"ab", b"c", b"a"], 2),
    "2 to 2, overlapping": ([b"ab", b"c"], [b"a", b"bc"], 1),
    "3 to 2": ([b"cab", b"b", b"c"], [b"c", b"ab", b"bc"], 3),
    "1 to 3": ([b"cab"], [b"c", b"a", b"b"], 2),
    "2 to 3": ([b"ca", b"b"], [b"c", b"a", b"b"], 2),
}


def logits_for(seed: int, rows: int, size: int) -> Tensor:
    return 2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chunk_of(
    name: str, student: list[bytes] = STUDENT, teacher: list[bytes] = TEACHER
) -> tuple[PieceIndex, Alignment, list[int], list[int]]:
    s_texts, t_texts, _ = CHUNKS[name]
    s_ids, t_ids = [student.index(t) for t in s_texts], [teacher.index(t) for t in t_texts]
    alignment = Alignment([[1, 1 + len(s_ids), 1, 1 + len(t_ids)]], None, [0, *s_ids], [0, *t_ids])
    return PieceIndex.build(Vocabulary(student), Vocabulary(teacher)), alignment, s_ids, t_ids


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CHUNKS)
def test_formula_against_enumeration(name: str, reverse: bool) -> None:
    pieces, alignment, s_ids, t_ids = chunk_of(name)
    z, y = logits_for(1, len(s_ids) + 1, len(STUDENT)), logits_for(2, len(t_ids) + 1, len(TEACHER))
    tau = 1.3
    p, q = (z / tau).softmax(-1).tolist(), (y / tau).softmax(-1).tolist()
    want, boundaries = enumerated(STUDENT, TEACHER, s_ids, t_ids, p, q, reverse)
    assert boundaries == CHUNKS[name][2]
    chunks = reference.Chunks.of(alignment, len(z), len(y), realised=True)
    got = reference.prefix(z, y, chunks, pieces.data, temperature=tau, reverse=reverse)
    assert_close(got, torch.tensor([want * tau**2], dtype=torch.float64), rtol=1e-12)
