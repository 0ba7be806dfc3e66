"""Calibration: events that two tokenizers confuse, since they cut the same text at other places, learned from text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from .alignment import Aligner, Ragged
from .vocabulary import Vocabulary

LEAST = 2
"""Chunks in which two events have to meet to be merged: one may be an accident of the text."""

BLOCK = 1 << 20
"""Bytes of text that are encoded at once."""

SHOWN = 20
"""Bytes of text on either side of the place in an example."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class MergedEvents:
    """Events that are one after calibration."""

    student: tuple[str, ...]
    """The student's first tokens of chunks where the teacher's had another event, the commonest first."""
    teacher: tuple[str, ...]
    """The teacher's, likewise."""
    count: int
    """Chunks of the sample that begin so."""
    example: str
    """Text around the first of them."""


@dataclass(frozen=True)
class MergeReport:
    """What `PieceIndex.build` has merged, and why; prints as a table."""

    texts: int = 0
    """Texts that were read; 0: the index is not calibrated."""
    bytes: int = 0
    chunks: int = 0
    """Chunks of these texts."""
    differing: int = 0
    """Of them, those whose first tokens had different events before."""
    left: int = 0
    """And those that still have: too rare to be merged."""
    groups: tuple[MergedEvents, ...] = ()
    """The merged events, the commonest first."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> MergeReport:
        """What `to_json` wrote; ValueError if it is something else."""
        try:
            facts = json.loads(text)
            groups = [
                MergedEvents(tuple(group["student"]), tuple(group["teacher"]), group["count"], group["example"])
                for group in facts.pop("groups")
            ]
            return cls(**facts, groups=tuple(groups))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"calibration: not what calibration has found: {error!r}") from error

    def __str__(self) -> str:
        if not self.texts:
            return "not calibrated: no text was read, so it is not known which events the tokenizers confuse"
        before, after = (100 * count / max(1, self.chunks) for count in (self.differing, self.left))
        lines = [
            f"{self.texts:,} texts of {self.bytes:,} bytes: {before:.2f} % of {self.chunks:,} chunks began with "
            f"different events, {after:.2f} % do after {len(self.groups):,} groups of events are merged"
        ]
        for group in self.groups:
            sides = (" ".join(map(repr, one[:4])) + (" ..." if len(one) > 4 else "")
                     for one in (group.student, group.teacher))  # fmt: skip
            lines.append(f"{group.count:9,}  {' | '.join(sides)}   as in {group.example!r}")
        return "\n".join(lines)


def calibrate(
    student: Vocabulary, teacher: Vocabulary, events: tuple[Ints, Ints], count: int, rootless: int, texts: Iterable[str]
) -> tuple[Ints, MergeReport]:
    """Which events become one, learned from texts that both tokenizers encode.

    Wherever the first tokens of `LEAST` chunks belong to two different events, these are merged: both tokenizers begin
    the same text so, and no model of one of them ever gives the other's event its probability.

    Parameters
    ----------
    events : int64 [V_student], [V_teacher]
        The event of each token, below `count`.
    rootless : int
        The event of tokens without a root, which have nothing in common and are not merged; `count` if there are none.

    Returns
    -------
    (int64 [count], MergeReport)
        The new event of each old one, numbered without gaps in their order.
    """
    aligner = Aligner(student, teacher, "bytes")
    met: Counter[tuple[int, int]] = Counter()  # first tokens of different events
    examples: dict[tuple[int, int], str] = {}
    number = size = chunks = 0
    for block in _blocks(texts):
        sides = [Ragged(ids.astype(np.int64), ptr) for ptr, ids in (v.encode_pieces(block) for v in (student, teacher))]
        alignment = aligner.align(*sides)
        sample, spans = alignment.sample_index.numpy(), alignment.spans.numpy()
        places = [side.offsets[sample] + spans[:, column] for side, column in zip(sides, (0, 2), strict=True)]
        first = [side.flat[place] for side, place in zip(sides, places, strict=True)]
        differs = events[0][first[0]] != events[1][first[1]]
        for place, *pair in zip(*(values[differs].tolist() for values in (places[0], *first)), strict=True):
            key = (pair[0], pair[1])
            met[key] += 1
            if key not in examples:
                before, after = (student.decode(ids) for ids in _around(sides[0], place))
                examples[key] = (before[-SHOWN:] + after[:SHOWN]).decode("utf-8", "replace")
        number, size, chunks = number + len(block), size + sum(map(len, block)), chunks + len(sample)
    root = _roots(met, events, count, rootless)
    groups: dict[int, list[tuple[int, int]]] = {}
    left = 0
    for s, t in sorted(met, key=lambda pair: (-met[pair], pair)):
        group = int(root[events[0][s]])
        if group == root[events[1][t]]:
            groups.setdefault(group, []).append((s, t))
        else:
            left += met[s, t]
    merged = []
    for pairs in groups.values():
        begins = [_shown(side, [pair[k] for pair in pairs]) for k, side in enumerate((student, teacher))]
        merged.append(MergedEvents(begins[0], begins[1], sum(met[pair] for pair in pairs), examples[pairs[0]]))
    merged.sort(key=lambda group: -group.count)
    report = MergeReport(number, size, chunks, met.total(), left, tuple(merged))
    return np.unique(root, return_inverse=True)[1].astype(np.int64), report


def _blocks(texts: Iterable[str]) -> Iterator[list[bytes]]:
    """The texts as UTF-8, about `BLOCK` bytes at a time."""
    block: list[bytes] = []
    size = 0
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts: expected strings, got {type(text).__name__}")
        block.append(text.encode("utf-8", "replace"))
        size += len(block[-1])
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _around(side: Ragged, place: int) -> tuple[Ints, Ints]:
    """Tokens before and from a place on, of its text."""
    row = int(np.searchsorted(side.offsets, place, side="right"))
    start, stop = max(int(side.offsets[row - 1]), place - SHOWN), min(int(side.offsets[row]), place + SHOWN)
    return side.flat[start:place], side.flat[place:stop]


def _roots(met: Counter[tuple[int, int]], events: tuple[Ints, Ints], count: int, rootless: int) -> Ints:
    """The lowest event that each event is merged with."""
    pairs: Counter[tuple[int, int]] = Counter()
    for (s, t), times in met.items():
        low, high = sorted((int(events[0][s]), int(events[1][t])))
        pairs[low, high] += times
    root = np.arange(count)

    def find(event: int) -> int:
        while root[event] != event:
            event = int(root[event])
        return event

    for (one, other), times in pairs.items():
        low, high = sorted((find(one), find(other)))
        if times >= LEAST and other != rootless:  # the last event, so always the higher
            root[high] = low
    for event in np.flatnonzero(root != np.arange(count)).tolist():  # in order: that of the lower one is final
        root[event] = root[root[event]]
    return root


def _shown(vocabulary: Vocabulary, ids: list[int]) -> tuple[str, ...]:
    """The texts of different tokens."""
    return tuple(vocabulary[i].decode("utf-8", "replace") for i in dict.fromkeys(ids))
