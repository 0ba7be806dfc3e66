"""Calls that exercise every registered loss: its options in turn, a pair of vocabularies, chunks of text.

What checks a build (`xtoken.check`) and benchmarks share; both read the register, and name no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from xtoken.alignment import Alignment
from xtoken.losses.loss import Loss, Needs
from xtoken.pieces import PieceIndex
from xtoken.projection import ProjectionMatrix
from xtoken.vocabulary import Vocabulary


class Pair(NamedTuple):
    """What losses need of a pair of tokenizers."""

    projection: Any
    """A `ProjectionMatrix`, or what a loss takes in its place."""
    pieces: PieceIndex | None


@dataclass(frozen=True)
class Case:
    """A loss with options, called as ``case(student, teacher, chunks, pair, **more)``."""

    name: str
    loss: type[Loss]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def same_tokenizer(self) -> bool:
        return self.loss.needs is Needs.SAME_TOKENIZER

    def __call__(self, student: Any, teacher: Any, chunks: Alignment, pair: Pair, **more: Any) -> Any:
        needed: dict[Needs, list[Any]] = {Needs.PROJECTION: [pair.projection], Needs.PIECES: [pair.pieces]}
        given = needed.get(self.loss.needs, [])
        return self.loss.function()(student, teacher, chunks, *given, **{**self.options, **more})


# ---- options

CHANGED: dict[str, tuple[Any, ...]] = {
    "temperature": (2.0,),
    "beta": (0.5,),
    "skew": (0.1,),
    "min_weight": (0.7,),
    "top_k": (None, 100),
    "uncommon_top_k": (100,),
    "columns": (torch.arange(3, 300, 2, device="cpu").flip(0),),
}
"""Other values of options that are no words or switches."""


def choices(loss: type[Loss]) -> dict[str, tuple[str, ...]]:
    """Options of a loss that take one of a few words, with these words; the default is the first."""
    hints = get_type_hints(loss.function())
    return {name: get_args(hints[name]) for name in loss.options() if get_origin(hints.get(name)) is Literal}


def changes(loss: type[Loss]) -> dict[str, tuple[Any, ...]]:
    """The options of a loss, each with values that are not its default."""
    words, kinds, found = choices(loss), loss.kinds(), {}
    for name, default in loss.options().items():
        values = (
            words[name] if name in words else (not default,) if isinstance(default, bool) else CHANGED.get(name, ())
        )
        allowed = [value for value in values if value is not None or NoneType in kinds[name]]
        found[name] = tuple(value for value in allowed if isinstance(value, Tensor) or value != default)
    return found


def forms(loss: type[Loss]) -> Iterator[Case]:
    """A loss with its defaults, and with each other value of each option in turn."""
    yield Case("", loss)
    for name, values in changes(loss).items():
        for value in values:
            shown = f"{len(value)} given" if isinstance(value, Tensor) else value
            yield Case(f"{name}={shown}", loss, {name: value})


# ---- a pair of vocabularies

REAL = (128256, 151669)
"""Sizes of the vocabularies of Llama 3 and Qwen3."""


def made_up_pair(students: int, teachers: int) -> Pair:
    """Of vocabularies much like Llama 3's and Qwen3's: four tokens in five of the smaller one are tokens of the other
    too; the others are two or three of these, of which some begin many."""
    partners = int(0.8 * min(students, teachers))
    letters = str.maketrans("0123456789", "abcdefghij")
    words = [f"{i} ".translate(letters).encode() for i in range(partners)]  # of which none begins another
    vocabularies = []
    for size, step in ((students, 7919), (teachers, 10007)):
        longer, others = [], size - partners
        for k in range(others):
            parts = [k * k // others // 4 % partners, k * step % partners]
            parts += [k // partners] if k >= partners else [(5 * k + 1) % partners] if k % 3 == 0 else []
            longer.append(b"".join(words[part] for part in parts))
        vocabularies.append(Vocabulary([*words, *longer]))
    student, teacher = vocabularies
    return Pair(ProjectionMatrix.build(student, teacher), PieceIndex.build(student, teacher))


# ---- chunks


def one_to_one(rows: int) -> Alignment:
    """Chunks of one token on each side, so many."""
    start = torch.arange(1, rows + 1, dtype=torch.int32, device="cpu")
    nothing = torch.zeros(rows + 1, dtype=torch.int64, device="cpu")  # whatever token it is
    return Alignment(torch.stack([start, start + 1, start, start + 1], 1), None, nothing, nothing)


def text_of(pair: Pair, sizes: tuple[int, int], rows: int, seed: int = 0) -> Alignment:
    """Chunks of a text in random tokens, of which no side has more than so many rows.

    Most are of one token on both sides; some of one against its pieces, either way; between some of them are tokens of
    no chunk. Without a piece index the pieces are what W says of the student's tokens; without either there are none.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(candidates: Tensor | int) -> int:
        size = candidates if isinstance(candidates, int) else len(candidates)
        place = int(torch.randint(size, (), generator=generator, device="cpu"))
        return place if isinstance(candidates, int) else int(candidates[place])

    spellings = [one for one in _spellings(pair) if len(one.single) and len(one.several)]
    ids: tuple[list[int], list[int]] = ([0], [0])
    spans, turn = [], 0
    while True:
        side, kind = turn // 4 % 2, turn % 4
        turn += 1
        if not spellings:
            chunk = [draw(sizes[0])], [draw(sizes[1])]
        elif kind == 3 and side < len(spellings):
            token = draw(spellings[side].several)
            chunk = ([token], spellings[side].of(token)) if side == 0 else (spellings[side].of(token), [token])
        else:
            token = draw(spellings[0].single)
            chunk = [token], spellings[0].of(token)
        gap = turn % 7 == 6
        if max(len(own) + len(new) + gap for own, new in zip(ids, chunk, strict=True)) > rows:
            break
        begin = [len(own) for own in ids]
        for own, new in zip(ids, chunk, strict=True):
            own.extend(new)
        spans.append([begin[0], len(ids[0]), begin[1], len(ids[1])])
        if gap:
            for own, size in zip(ids, sizes, strict=True):
                own.append(draw(size))
    return Alignment(torch.tensor(spans, dtype=torch.int32, device="cpu").reshape(-1, 4), None, *ids)


class _Spelling(NamedTuple):
    """The tokens of a vocabulary in tokens of the other."""

    ptr: Tensor
    pieces: Tensor
    single: Tensor
    """Those of one piece."""
    several: Tensor
    """Those of two to four."""

    def of(self, token: int) -> list[int]:
        return [int(one) for one in self.pieces[int(self.ptr[token]) : int(self.ptr[token + 1])]]


def _spellings(pair: Pair) -> list[_Spelling]:
    """Of the student's tokens and, where it is known, of the teacher's."""
    if pair.pieces is not None:
        students, teachers = pair.pieces.shape
        known = [(pair.pieces.student, teachers), (pair.pieces.teacher, students)]
        tables = [(side.ptr.long(), side.pieces.long(), size) for side, size in known]
    elif pair.projection is not None:
        tables = [(pair.projection.row_ptr.cpu(), pair.projection.col.cpu().long(), pair.projection.shape[1])]
    else:
        return []
    found = []
    for ptr, pieces, size in tables:
        counts = ptr.diff()
        token = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
        whole = torch.ones(len(counts), dtype=torch.bool, device="cpu")
        whole[token[pieces >= size]] = False  # with a rest that the other side cannot spell
        single, several = (counts == 1) & whole, (counts > 1) & (counts <= 4) & whole
        found.append(_Spelling(ptr, pieces, single.nonzero()[:, 0], several.nonzero()[:, 0]))
    return found
