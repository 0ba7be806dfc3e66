"""The rows of logits that predict the chunks of an alignment, on any device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken.alignment.alignment import Alignment, ranges, to_device


@dataclass(frozen=True)
class Rows:
    """The rows of a logits matrix [N, V] that predict each chunk: ``start[k] ... start[k] + count[k] - 1``."""

    start: Tensor  # int64 [K]
    count: Tensor  # int64 [K], at least 1
    next_ids: Tensor | None = None
    """int64 [N]: the token that each row predicts, as realised in the text; -1 where there is none."""
    before: Tensor | None = None
    """int64 [K]: the last token of the chunk that ends where each begins, -1 if none does; with `next_ids`."""

    @property
    def realised(self) -> Tensor:
        """`next_ids`, of rows that were made with them."""
        assert self.next_ids is not None
        return self.next_ids

    def index(self) -> Tensor:
        """int64 [R]: the rows of all chunks, chunk by chunk."""
        return ranges(self.start, self.count)

    def owner(self) -> Tensor:
        """int64 [R]: the chunk of each row of `index`."""
        return torch.repeat_interleave(torch.arange(len(self.count), device=self.count.device), self.count)

    def chosen(self, chunks: Tensor | slice) -> Rows:
        """Some of the chunks, by index, mask or range."""
        before = None if self.before is None else self.before[chunks]
        return replace(self, start=self.start[chunks], count=self.count[chunks], before=before)

    def block(self, start: int, stop: int) -> tuple[Rows, Tensor]:
        """Chunks ``start ... stop - 1`` for a matrix of only their rows, and those rows' indices [R]."""
        part = self.chosen(slice(start, stop))
        index = part.index()
        next_ids = None if self.next_ids is None else self.next_ids[index]
        return Rows(part.count.cumsum(0) - part.count, part.count, next_ids, part.before), index

    def first(self) -> Rows:
        """Only the first row of each chunk."""
        return replace(self, count=self.count.clamp_max(1))

    def later(self) -> tuple[Tensor, Tensor]:
        """Rows of each chunk but its first, and the chunk of each: int64 [R - K] twice."""
        owner, index = self.owner(), self.index()
        keep = index != self.start[owner]
        return index[keep], owner[keep]

    def total(self, values: Tensor, owner: Tensor) -> Tensor:
        """Sum of ``values`` [R, ...] over the rows of each chunk: [K, ...]."""
        return values.new_zeros(len(self.count), *values.shape[1:]).index_add(0, owner, values)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` [R, V], one row for each of `index`, over each chunk: [K, V]."""
        if len(values) == len(self.count):
            return values
        return self.total(values, self.owner()) / self.count[:, None]


@dataclass(frozen=True)
class Chunks:
    """Predictor rows of the chunks that a loss uses."""

    student: Rows
    teacher: Rows
    used: Tensor  # int64 [K], the chunks' indices in the alignment
    mask: Tensor | None = None
    """bool [K]: the chunks that count, where only a device knows which; the others have row -1 and no count."""
    copy: Chunks | None = None
    """The same chunks on the CPU (without mask), for those on another device."""

    def __len__(self) -> int:
        return len(self.used)

    @property
    def host(self) -> Chunks:
        """The chunks on the CPU, as far as they are known without waiting for the device."""
        return self if self.copy is None else self.copy

    @property
    def number(self) -> int | Tensor:
        """How many chunks count: int64 [] on the device if there is a mask."""
        return len(self) if self.mask is None else self.mask.sum()

    def first(self) -> Chunks:
        """Only the first predictor row of each chunk, on both sides."""
        copy = None if self.copy is None else self.copy.first()
        return replace(self, student=self.student.first(), teacher=self.teacher.first(), copy=copy)

    def kept(self) -> tuple[Chunks, Tensor]:
        """Only the chunks that count, and their places among all: int64. Waits for the device if there is a mask."""
        if self.mask is None:
            return self, torch.arange(len(self), device=self.used.device)
        index = self.mask.nonzero()[:, 0]
        student, teacher = (side.chosen(index) for side in (self.student, self.teacher))
        return Chunks(student, teacher, self.used[index]), index

    def check_ids(self, sizes: tuple[int, int], several: bool = True) -> None:
        """Raises ValueError if a realised token is outside its vocabulary; looks at the copy on the CPU.

        Of chunks with `several` tokens on a side, where alone the realised ones decide what is compared; or of all.
        """
        host = self.host
        is_looked_at = (host.student.count > 1) | (host.teacher.count > 1) if several else host.student.count > 0
        for name, rows, size in zip(("student", "teacher"), (host.student, host.teacher), sizes, strict=True):
            assert rows.next_ids is not None
            ids = rows.next_ids[rows.chosen(is_looked_at).index()]
            bad = ids[(ids < 0) | (ids >= size)]
            if len(bad):
                raise ValueError(f"alignment: expected {name}_ids in 0 ... {size - 1} within chunks, got {int(bad[0])}")

    @staticmethod
    def of(
        alignment: Alignment,
        student_length: int,
        teacher_length: int,
        device: torch.device | str = "cpu",
        realised: bool = False,
    ) -> Chunks:
        """The chunks of an alignment that have a predictor: rows ``a - 1 ... b - 2`` for the tokens [a, b).

        Sample b begins at row b * T, T being the side's length. The indices go to `device`, and nothing waits for it.
        With `realised`, the realised tokens come from the alignment's ids too (for ``merge="chain"``).
        Raises ValueError if a chunk ends beyond the logits, or ids are needed and missing.
        """
        device, host = torch.device(device), alignment.host
        host.check()
        lengths = student_length, teacher_length
        for side, (name, length, ids) in enumerate(zip(("student", "teacher"), lengths, host._both_ids(), strict=True)):
            host.check_reach(side, length, f"{name}_logits", "row")
            if realised and ids is None:
                raise ValueError(f"alignment: the loss or its merge needs token ids, but {name}_ids is None")
        flat, placed = host._flatten(realised), alignment._flat
        count = (len(flat) - sum(one.numel() for one in host._both_ids() if realised and one is not None)) // 7
        chunks = _of_flat(flat, count, host, lengths, realised)
        if device.type != "cpu":
            if placed is None or placed.device != device:
                placed = to_device(flat, device)
            chunks = replace(_of_flat(placed, count, host, lengths, realised), copy=chunks)
        return chunks if alignment.mask is None else chunks.masked(alignment.mask)

    def masked(self, mask: Tensor) -> Chunks:
        """The same chunks, of which only those count that a mask of all the alignment's chunks names."""
        mask = mask.to(self.used.device)[self.used]
        student, teacher = (
            replace(side, start=torch.where(mask, side.start, -1), count=side.count * mask)
            for side in (self.student, self.teacher)
        )
        return Chunks(student, teacher, self.used, mask, self if self.copy is None else self.copy)

    @staticmethod
    def of_positions(rows: int, mask: Tensor | None = None, device: torch.device | str = "cpu") -> Chunks:
        """One chunk for each of so many rows, or those that `mask` names; the same on both sides.

        With a mask on a device all positions are chunks, masked by it, so that nothing waits.
        """
        device = torch.device(device)
        chunks, used = _rows_as_chunks(torch.arange(rows, device="cpu")), torch.arange(rows, device=device)
        if mask is not None and mask.device.type != "cpu":
            return replace(_rows_as_chunks(used).masked(mask.to(device).flatten()), copy=chunks)
        if mask is not None:
            chunks = _rows_as_chunks(mask.flatten().nonzero()[:, 0])
            used = to_device(chunks.used, device)
        return chunks if device.type == "cpu" else replace(_rows_as_chunks(used), copy=chunks)


def _rows_as_chunks(used: Tensor) -> Chunks:
    same = Rows(used, torch.ones_like(used))
    return Chunks(same, same, used)


def _of_flat(flat: Tensor, count: int, host: Alignment, lengths: tuple[int, int], realised: bool) -> Chunks:
    """So many chunks of an alignment from what `Alignment._flatten` made of it, on any device."""
    used, sample, *rows, follows = flat[: 7 * count].view(7, count).unbind()
    sides: list[Rows] = []
    rest = flat[7 * count :]
    for ids, length, first, number in zip(host._both_ids(), lengths, rows[::2], rows[1::2], strict=True):
        following = before = None
        if realised and ids is not None:
            ids, rest = rest[: ids.numel()].view(len(host), -1), rest[ids.numel() :]
            before = torch.where(follows > 0, ids[sample, first], -1)
            ids = ids[:, 1 : length + 1]
            following = torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=-1).flatten()
        sides.append(Rows(torch.add(first, sample, alpha=length), number, following, before))
    return Chunks(sides[0], sides[1], used)


def synchronized(values: Tensor) -> Tensor:
    """Waits until the values of a tensor are there, so that any stream may read them; for what is kept."""
    if values.device.type != "cpu":
        values.flatten()[:1].cpu()
    return values
