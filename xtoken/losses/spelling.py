"""How the tokens of one vocabulary begin with those of the other, byte by byte: from the text of a piece index."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtoken.alignment import Chunks, synchronized
from xtoken.losses.cached import kept
from xtoken.losses.loss import Loss
from xtoken.losses.on_pieces import OnTokens, Partners, partners
from xtoken.pieces import PieceIndex, check_text, sides


@dataclass(frozen=True)
class OnText(OnTokens):
    """A loss that looks at the bytes of tokens."""

    text: Tensor

    @classmethod
    def of(cls, projection: Any, pieces: Any, **options: Any) -> Loss:
        if isinstance(pieces, PieceIndex):
            if pieces.text is None:
                raise ValueError(
                    "pieces: expected an index with the text of its tokens, as PieceIndex.build and load make it, got "
                    "one of data alone"
                )
            options["text"] = pieces.text
        return super().of(projection, pieces, **options)

    def check_tables(self) -> None:
        super().check_tables()
        _check_text(self.text, self.pieces)


@kept
def _check_text(text: Tensor, pieces: Tensor) -> None:
    check_text(text.cpu(), pieces.cpu())


class Spelling(NamedTuple):
    """The teacher's tokens by their bytes. Token t has the places ``ptr[t] ... ptr[t + 1] - 1``, one a byte."""

    student_length: Tensor  # int64 [V_student], in bytes
    teacher_length: Tensor  # int64 [V_teacher]
    ptr: Tensor  # int64 [V_teacher + 1]
    longest: Tensor
    """int64 [places]: the longest student token that the rest of a token begins with, V_student if there is none."""
    order: Tensor  # int64 [V_teacher], by bytes
    first: Tensor  # int64 [places]
    last: Tensor
    """``order[first:last]`` are the tokens that begin with the bytes before a place, in which there may be none."""
    beginning: Tensor
    """int64 [V_teacher]: the longest student token that a token begins with; its partner, if it has no text."""


@kept
def spelling(pieces: Tensor, text: Tensor, device: torch.device) -> Spelling:
    """Of a piece index and its text, on a device. Some seconds for vocabularies of 150,000 tokens, once."""
    of_student, of_teacher = token_bytes(pieces, text)
    exact = partners(pieces, torch.device("cpu"))
    known, none = ids_by_text(of_student, exact), len(of_student)
    most = max(map(len, known), default=0)
    longest = []
    for token in of_teacher:
        for start in range(len(token)):
            found = none
            for end in range(min(len(token), start + most), start, -1):
                if token[start:end] in known:
                    found = known[token[start:end]]
                    break
            longest.append(found)
    lengths = [torch.tensor([len(token) for token in side], device="cpu") for side in (of_student, of_teacher)]
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), lengths[1].cumsum(0)])
    places = torch.tensor(longest, dtype=torch.int64, device="cpu")
    order, first, last = prefix_ranges(of_teacher, lengths[1], ptr)
    beginning = exact.of_teacher.clone()
    has_text = lengths[1] > 0
    beginning[has_text] = places[ptr[:-1][has_text]]
    tables = (*lengths, ptr, places, order, first, last, beginning)
    return Spelling(*(synchronized(one.to(device)) for one in tables))


def token_bytes(pieces: Tensor, text: Tensor) -> tuple[list[bytes], list[bytes]]:
    """The bytes of the tokens of both sides, none of those that are no text."""
    whole, start = text.cpu().numpy().tobytes(), 0
    found = []
    for side in sides(pieces.cpu()):
        ends = (start + side.length.long().cumsum(0)).tolist()
        found.append([whole[a:b] for a, b in itertools.pairwise([start, *ends])])
        start = ends[-1] if ends else start
    return found[0], found[1]


def ids_by_text(of_student: list[bytes], exact: Partners) -> dict[bytes, int]:
    """A student token for each text: the one that has a partner, else the first."""
    known: dict[bytes, int] = {}
    for token, text in enumerate(of_student):
        known.setdefault(text, token)
    known.update((of_student[token], token) for token in exact.student.tolist())
    known.pop(b"", None)
    return known


def prefix_ranges(
    tokens: Sequence[bytes] | Sequence[tuple[int, ...]], length: Tensor, ptr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens, sequences of this length, in ascending order, and ranges of it: token t has the places ``ptr[t]`` ...
    ``ptr[t + 1] - 1``, and each the first and the last (exclusive) of those that begin with what is before it."""
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    common = [0, *(_common(tokens[a], tokens[b]) for a, b in itertools.pairwise(order))]
    shared, ordered = torch.tensor(common, device="cpu"), torch.tensor(order, dtype=torch.int64, device="cpu")
    first, last = torch.zeros(2, int(ptr[-1]), dtype=torch.int64, device="cpu")
    last[ptr[:-1][length > 0]] = len(tokens)
    ranks = torch.arange(len(tokens), device="cpu")
    for depth in range(1, int(length.max()) if len(tokens) else 0):
        ranks = ranks[length[ordered[ranks]] >= depth]  # the others do not begin with so many bytes
        is_new = shared[ranks] < depth
        starts = is_new.nonzero()[:, 0]
        group = is_new.cumsum(0) - 1
        ends = torch.cat([starts[1:], torch.tensor([len(ranks)], device="cpu")]) - 1
        is_longer = length[ordered[ranks]] > depth
        place = ptr[ordered[ranks[is_longer]]] + depth
        first[place] = ranks[starts[group[is_longer]]]
        last[place] = ranks[ends[group[is_longer]]] + 1
    return ordered, first, last


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many elements two sequences have in common at their beginning."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])


class Groups(NamedTuple):
    """The teacher's tokens that go on behind the student's token that they begin with, grouped by common prefix.

    A group has the tokens with the same such token that begin with its shortest one; of the rest of that one, behind
    the student's token, it has the student's tokens that begin with it. Groups for which there are none are not here.
    """

    group: Tensor  # int64 [V_teacher], G where there is none
    ptr: Tensor  # int64 [V_student + 1]: token a has the groups ptr[a] ... ptr[a + 1] - 1
    order: Tensor  # int64 [V_student], by bytes
    first: Tensor  # int64 [G]: order[first:last] begin with the rest of the group
    last: Tensor
    shortest: Tensor  # int64 [G], teacher ids


@kept
def groups(pieces: Tensor, text: Tensor, device: torch.device) -> Groups:
    """Of a piece index and its text, on a device."""
    (of_student, of_teacher), host = token_bytes(pieces, text), torch.device("cpu")
    none, no_partner = len(of_student), partners(pieces, host).of_teacher == len(of_student)
    begins = spelling(pieces, text, host).beginning.tolist()
    order = sorted(range(none), key=of_student.__getitem__)
    ordered = [of_student[token] for token in order]
    alone = [
        (begins[token], of_teacher[token], token)
        for token in no_partner.nonzero()[:, 0].tolist()
        if begins[token] < none and len(of_student[begins[token]]) < len(of_teacher[token])
    ]
    found: list[tuple[int, ...]] = []  # student's token, range, shortest token
    members: list[tuple[int, int]] = []
    shortest: tuple[int, bytes] | None = None
    for begin, whole, token in sorted(alone):
        if shortest is None or shortest[0] != begin or not whole.startswith(shortest[1]):
            shortest, rest = (begin, whole), whole[len(of_student[begin]) :]
            ends = bisect.bisect_left(ordered, rest), bisect.bisect_left(ordered, _behind(rest))
            is_kept = ends[0] < ends[1]
            found += [(begin, *ends, token)] * is_kept
        if is_kept:
            members.append((token, len(found) - 1))
    group = torch.full((len(of_teacher),), len(found), device="cpu")
    if members:
        tokens, numbers = torch.tensor(members, device="cpu").unbind(1)
        group[tokens] = numbers
    begin_of, *rest_of = torch.tensor(found, dtype=torch.int64, device="cpu").reshape(-1, 4).unbind(1)
    counts = torch.bincount(begin_of, minlength=none)
    ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    made = group, ptr, torch.tensor(order, dtype=torch.int64, device="cpu"), *rest_of
    return Groups(*(synchronized(one.to(device)) for one in made))


def _behind(prefix: bytes) -> bytes:
    """A text that comes after all that begin with `prefix`, and before all others that come after it."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else b"\xff" * 1024


class Places(NamedTuple):
    """Where the student's rows are in the teacher's text: of each row of ``chunks.student.index()``."""

    teacher_row: Tensor  # int64 [R], predicts the token in which the student's begins, or with which
    offset: Tensor  # int64 [R], the bytes of that token that are out already
    is_known: Tensor  # bool [R]; else the two sides of the chunk have texts of different lengths


def places(chunks: Chunks, known: Spelling) -> Places:
    """Those of the rows of chunks with realised ids."""
    sides_of = []
    for rows, length in zip(
        (chunks.student, chunks.teacher), (known.student_length, known.teacher_length), strict=True
    ):
        index, owner = rows.index(), rows.owner()
        bytes_of = length[rows.realised[index]]
        before = bytes_of.cumsum(0) - bytes_of
        is_first = index == rows.start[owner]
        begin = before - before[is_first][owner]
        total = torch.zeros_like(rows.start).index_add(0, owner, bytes_of)
        sides_of.append((index, owner, begin, bytes_of, is_first, total))
    (_, owner, begin, _, is_first, total), (index, of, start, size, _, other) = sides_of
    apart = 1 + (int(torch.maximum(total, other).max()) if len(total) else 0)
    found = torch.searchsorted(of * apart + start, owner * apart + begin, right=True) - 1
    found = torch.where(is_first, torch.searchsorted(of, owner), found.clamp_min(0))
    offset = torch.where(is_first, 0, begin - start[found])
    is_known = is_first | ((total == other)[owner] & (offset < size[found]))
    return Places(index[found], offset, is_known)
