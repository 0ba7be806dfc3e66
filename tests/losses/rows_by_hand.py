"""The rows of logits that predict each chunk, by plain loops: for the truth, which shares nothing with `Chunks`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.alignment import Alignment


@dataclass
class RowsByHand:
    """What formulas ask of `xtoken.alignment.Rows`."""

    rows: list[list[int]]  # of each chunk
    next_ids: Tensor | None  # [N]
    before: Tensor | None = None  # of each chunk

    @property
    def realised(self) -> Tensor:
        assert self.next_ids is not None
        return self.next_ids

    @property
    def start(self) -> Tensor:
        return torch.tensor([rows[0] for rows in self.rows], dtype=torch.int64)

    @property
    def count(self) -> Tensor:
        return torch.tensor([len(rows) for rows in self.rows], dtype=torch.int64)

    def index(self) -> Tensor:
        return torch.tensor([row for rows in self.rows for row in rows], dtype=torch.int64)

    def owner(self) -> Tensor:
        return torch.tensor([k for k, rows in enumerate(self.rows) for _ in rows], dtype=torch.int64)

    def chosen(self, chunks: Tensor) -> RowsByHand:
        before = None if self.before is None else self.before[chunks]
        return RowsByHand([self.rows[k] for k in chunks.tolist()], self.next_ids, before)

    def first(self) -> RowsByHand:
        return RowsByHand([rows[:1] for rows in self.rows], self.next_ids, self.before)

    def later(self) -> tuple[Tensor, Tensor]:
        pairs = [(row, k) for k, rows in enumerate(self.rows) for row in rows[1:]]
        index, owner = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
        return index, owner

    def total(self, values: Tensor, owner: Tensor) -> Tensor:
        sums = [values[owner == chunk].sum(0) for chunk in range(len(self.rows))]
        return torch.stack(sums) if sums else values

    def mean(self, values: Tensor) -> Tensor:
        parts = values.split([len(rows) for rows in self.rows])
        return torch.stack([part.sum(0) / len(part) for part in parts]) if parts else values


@dataclass
class ChunksByHand:
    """What formulas ask of `xtoken.alignment.Chunks`."""

    student: RowsByHand
    teacher: RowsByHand
    used: Tensor

    def __len__(self) -> int:
        return len(self.used)

    def first(self) -> ChunksByHand:
        return ChunksByHand(self.student.first(), self.teacher.first(), self.used)


def rows_by_hand(alignment: Alignment, *lengths: int) -> ChunksByHand:
    """The predicted chunks: token t of sample b is predicted by row ``b * length + t - 1``."""
    offsets, spans, predicted = alignment.offsets.tolist(), alignment.spans.tolist(), alignment.predicted.tolist()
    used = [k for k, (a, _, c, _) in enumerate(spans) if predicted[k] and a > 0 and c > 0]
    sample = [sum(k >= end for end in offsets[1:]) for k in used]
    sides = []
    for first, length, ids in zip((0, 2), lengths, (alignment.student_ids, alignment.teacher_ids), strict=True):
        rows = [[b * length + t - 1 for t in range(spans[k][first], spans[k][first + 1])]
                for k, b in zip(used, sample, strict=True)]  # fmt: skip
        following = before = None
        if ids is not None:
            whole = ids.reshape(len(alignment), -1).tolist()
            ends = [{(c[1], c[3]) for c in spans[i:j]} for i, j in itertools.pairwise(offsets)]
            follows = [(spans[k][0], spans[k][2]) in ends[b] for k, b in zip(used, sample, strict=True)]
            tokens = [whole[b][spans[k][first] - 1] for k, b in zip(used, sample, strict=True)]
            before = torch.tensor([t if f else -1 for t, f in zip(tokens, follows, strict=True)], dtype=torch.int64)
            texts = [row[1 : length + 1] for row in whole]
            following = torch.tensor([token for text in texts for token in (*text, *[-1] * (length - len(text)))])
        sides.append(RowsByHand(rows, following, before))
    return ChunksByHand(sides[0], sides[1], torch.tensor(used, dtype=torch.int64))
