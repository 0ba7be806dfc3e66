"""Calibration: events that two tokenizers confuse, since they cut the same text at other places, learned from text."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from .alignment import Aligner, Ragged
from .notebook import html_table
from .vocabulary import Vocabulary

WORTH = 60
"""Nats that a start with a common event is worth. A text tells less of two events that are one, so they are merged only
where the starts that this saves are worth more. On text that the sample does not have (bench/events.py), 40 leaves up
to 0.5 % of the starts apart and keeps 95.5 % of the information or more, 100 leaves up to 0.5 % and keeps 94.6 %."""

BLOCK = 1 << 20
"""Bytes of text that are encoded at once."""

MOST_LEFT = 0.02
"""More than this share of starts apart calls for a remedy."""

LISTED = 100
"""Groups that are printed."""

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
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"calibration: not what calibration has found: {error!r}") from error

    def summary(self) -> str:
        """In one sentence; and the remedy if many chunks still begin with different events."""
        if not self.texts:
            return "not calibrated: no text was read, so it is not known which events the tokenizers confuse"
        before, after = (count / max(1, self.chunks) for count in (self.differing, self.left))
        remedy = (
            "; they teach nothing there, build with your own text too: texts=[*sample_texts(student, teacher), *own]"
        )
        return (
            f"{self.texts:,} texts of {self.bytes:,} bytes: {100 * before:.2f} % of {self.chunks:,} chunks began with "
            f"different events, {100 * after:.2f} % do after {len(self.groups):,} groups of events are merged"
            + (remedy if after > MOST_LEFT else "")
        )

    def _repr_html_(self) -> str:
        rows = [(one.count, *(" ".join(side[:4]) + " ..." * (len(side) > 4) for side in (one.student, one.teacher)),
                 one.example) for one in self.groups]  # fmt: skip
        header = ("chunks", "the student begins with", "the teacher begins with", "as in")
        return html_table(self.summary(), header, rows)

    def __str__(self) -> str:
        lines = [self.summary()]
        for group in self.groups[:LISTED]:
            sides = (" ".join(map(repr, one[:4])) + (" ..." if len(one) > 4 else "")
                     for one in (group.student, group.teacher))  # fmt: skip
            lines.append(f"{group.count:9,}  {' | '.join(sides)}   as in {group.example!r}")
        more = len(self.groups) - LISTED
        return "\n".join([*lines, *([f"          and {more:,} more"] if more > 0 else [])])


def calibrate(
    student: Vocabulary, teacher: Vocabulary, events: tuple[Ints, Ints], count: int, rootless: int, texts: Iterable[str]
) -> tuple[Ints, MergeReport]:
    """Which events become one, learned from texts that both tokenizers encode.

    Where the first tokens of a chunk belong to two events, both tokenizers begin the same text so, and no model of one
    of them ever gives the other's event its probability. Runs of white space that meet so are merged, since what is
    around them tells which of them comes; others by what it is `WORTH`.

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
    mass = np.zeros(count)  # of each event, in chunks
    number = size = chunks = 0
    for block in _blocks(texts):
        sides = [Ragged(ids.astype(np.int64), ptr) for ptr, ids in (v.encode_pieces(block) for v in (student, teacher))]
        alignment = aligner.align(*sides)
        sample, spans = alignment.sample_index.numpy(), alignment.spans.numpy()
        places = [side.offsets[sample] + spans[:, column] for side, column in zip(sides, (0, 2), strict=True)]
        first = [side.flat[place] for side, place in zip(sides, places, strict=True)]
        begun = [of[ids] for of, ids in zip(events, first, strict=True)]
        mass += sum(np.bincount(one, minlength=count) for one in begun) / 2
        differs = begun[0] != begun[1]
        for place, *pair in zip(*(values[differs].tolist() for values in (places[0], *first)), strict=True):
            key = (pair[0], pair[1])
            met[key] += 1
            if key not in examples:
                before, after = (student.decode(ids) for ids in _around(sides[0], place))
                examples[key] = (before[-SHOWN:] + after[:SHOWN]).decode("utf-8", "replace")
        number, size, chunks = number + len(block), size + sum(map(len, block)), chunks + len(sample)
    between: Counter[tuple[int, int]] = Counter()
    for (s, t), times in met.items():
        low, high = sorted((int(events[0][s]), int(events[1][t])))
        if high != rootless:  # the last event, so always the higher
            between[low, high] += times
    tokens = (
        (side, of, {pair[k] for pair in met})
        for k, (side, of) in enumerate(zip((student, teacher), events, strict=True))
    )
    spaces = {int(of[i]) for side, of, ids in tokens for i in ids if side[i].isspace()}
    root = np.array(_roots(between, mass.tolist(), spaces))
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
        begins = [
            tuple(side[i].decode("utf-8", "replace") for i in dict.fromkeys(pair[k] for pair in pairs))
            for k, side in enumerate((student, teacher))
        ]
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


def _roots(met: Counter[tuple[int, int]], mass: list[float], spaces: set[int]) -> list[int]:
    """The lowest event that each is merged with, from how often two events met and how many chunks each has."""
    root = list(range(len(mass)))

    def find(event: int) -> int:
        while root[event] != event:
            root[event] = event = root[root[event]]
        return event

    def cost(low: int, high: int) -> float:
        """Nats that the text tells less when it does not tell which of the two it is."""
        both = mass[low] + mass[high]
        return both * math.log(both) - mass[low] * math.log(mass[low]) - mass[high] * math.log(mass[high])

    now, apart = met, 0
    while len(now) != apart:  # what is merged meets others more often, so that more may be worth it
        apart = len(now)
        for pair in sorted(now, key=lambda pair: (cost(*pair) / now[pair], pair)):
            low, high = sorted(map(find, pair))
            if low != high and (spaces.issuperset(pair) or cost(low, high) < WORTH * now[pair]):
                root[high] = low
                mass[low] += mass[high]
        now = Counter()
        for pair, times in met.items():
            low, high = sorted(map(find, pair))
            if low != high:
                now[low, high] += times
    return [find(event) for event in root]
