"""The rows of logits that predict the chunks of an alignment, on any device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken.alignment.alignment import Alignment, predictable


@dataclass(frozen=True)
class Rows:
    """The rows of a logits matrix [N, V] that predict each chunk: ``start[k] ... start[k] + count[k] - 1``.

    Parameters
    ----------
    start, count : int64 [K]
        ``count`` is at least 1.
    next_ids : int64 [N], optional
        The token that each row predicts, as realised in the text; -1 where there is none.
    """

    start: Tensor
    count: Tensor
    next_ids: Tensor | None = None

    def index(self) -> Tensor:
        """int64 [R]: the rows of all chunks, chunk by chunk."""
        before = self.count.cumsum(0) - self.count
        first = torch.repeat_interleave(self.start - before, self.count)
        return first + torch.arange(len(first), device=first.device)

    def owner(self) -> Tensor:
        """int64 [R]: the chunk of each row of `index`."""
        return torch.repeat_interleave(torch.arange(len(self.count), device=self.count.device), self.count)

    def block(self, start: int, stop: int) -> tuple[Rows, Tensor]:
        """Chunks ``start ... stop - 1`` for a matrix of only their rows, and those rows' indices [R]."""
        part = Rows(self.start[start:stop], self.count[start:stop])
        index = part.index()
        next_ids = None if self.next_ids is None else self.next_ids[index]
        return Rows(part.count.cumsum(0) - part.count, part.count, next_ids), index

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
    """Predictor rows of the chunks that a loss uses.

    Parameters
    ----------
    student, teacher : Rows
    used : int64 [K]
        The chunks' indices in the alignment.
    mask : bool [K], optional
        The chunks that count, where only a device knows which; the others have row -1 and no count. Default: all.
    copy : Chunks, optional
        The same chunks on the CPU (without mask), for those on another device.
    """

    student: Rows
    teacher: Rows
    used: Tensor
    mask: Tensor | None = None
    copy: Chunks | None = None

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
        student, teacher = (replace(side, start=side.start[index], count=side.count[index])
                            for side in (self.student, self.teacher))  # fmt: skip
        return Chunks(student, teacher, self.used[index]), index

    def check_ids(self, sizes: tuple[int, int], several: bool = True) -> None:
        """Raises ValueError if a realised token is outside its vocabulary; looks at the copy on the CPU.

        Of chunks with `several` tokens on a side, where alone the realised ones decide what is compared; or of all.
        """
        host = self.host
        is_looked_at = (host.student.count > 1) | (host.teacher.count > 1) if several else host.student.count > 0
        for name, rows, size in zip(("student", "teacher"), (host.student, host.teacher), sizes, strict=True):
            assert rows.next_ids is not None
            ids = rows.next_ids[Rows(rows.start[is_looked_at], rows.count[is_looked_at]).index()]
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

        Parameters
        ----------
        alignment : Alignment
        student_length, teacher_length : int
            Rows ``T`` of one sample's logits, so that sample ``b`` begins at row ``b * T``.
        device : torch.device
            Where the indices go; nothing waits for it.
        realised : bool
            Also take the realised tokens from the alignment's ids (for ``merge="chain"``).

        Raises
        ------
        ValueError
            If a chunk ends beyond the logits, or ids are needed and missing.
        """
        device, host = torch.device(device), alignment.host
        lengths = student_length, teacher_length
        for name, column, length, ids in zip(("student", "teacher"), (1, 3), lengths, host._both_ids(), strict=True):
            end = host.spans[:, column]
            if len(end) and int(end.max()) > length:
                raise ValueError(
                    f"{name}_logits: expected a row for every token that the alignment names (chunk "
                    f"{int(end.argmax())} ends at token {int(end.max())}), got {length} rows"
                )
            if realised and ids is None:
                raise ValueError(f"alignment: the loss or its merge needs token ids, but {name}_ids is None")
        flat = host._flatten(realised)
        chunks = _of_flat(flat, host, lengths, realised)
        if device.type == "cpu":
            return chunks
        placed = alignment._flat
        if placed is None or placed.device != device:
            placed = to_device(flat, device)
        return replace(_of_flat(placed, host, lengths, realised), copy=chunks)

    @staticmethod
    def of_positions(rows: int, mask: Tensor | None = None, device: torch.device | str = "cpu") -> Chunks:
        """One chunk for each of so many rows, or those that `mask` names; the same on both sides.

        Of a mask on a device, which is not waited for, all, with a mask of their own.
        """
        device = torch.device(device)
        if mask is None:
            chunks, used = _rows_as_chunks(torch.arange(rows)), torch.arange(rows, device=device)
        elif mask.device.type == "cpu":
            chunks = _rows_as_chunks(mask.flatten().nonzero()[:, 0])
            used = to_device(chunks.used, device)
        else:
            used, chosen = torch.arange(rows, device=device), mask.to(device).flatten()
            same = Rows(torch.where(chosen, used, -1), chosen.long())
            return Chunks(same, same, used, chosen, _rows_as_chunks(torch.arange(rows)))
        return chunks if device.type == "cpu" else replace(_rows_as_chunks(used), copy=chunks)


def _rows_as_chunks(used: Tensor) -> Chunks:
    same = Rows(used, torch.ones_like(used))
    return Chunks(same, same, used)


def _of_flat(flat: Tensor, host: Alignment, lengths: tuple[int, int], realised: bool) -> Chunks:
    """The chunks of an alignment from what `Alignment._flatten` made of it, on any device."""
    count = int(predictable(host).sum())
    used, sample, a, b, c, d = flat[: 6 * count].view(6, count).unbind()
    ids, first = [], 6 * count
    for part, length in zip(host._both_ids(), lengths, strict=True):
        size = 0 if part is None else part.numel()
        ids.append(_next_ids(flat[first : first + size], len(host), length) if realised else None)
        first += size
    student = Rows(sample * lengths[0] + a - 1, b - a, ids[0])
    return Chunks(student, Rows(sample * lengths[1] + c - 1, d - c, ids[1]), used)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values of a tensor on a device, without waiting for it.

    Raises
    ------
    RuntimeError
        While a CUDA graph is captured, which would read the host's memory at every replay.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "inside a CUDA graph losses take tensors on the device only: move the alignment, labels and columns there"
        )
    return values.pin_memory().to(device, non_blocking=True)


def synchronized(values: Tensor) -> Tensor:
    """Waits until the values of a tensor are there, so that any stream may read them; for what is kept."""
    if values.device.type != "cpu":
        values.flatten()[:1].cpu()
    return values


def _next_ids(ids: Tensor, samples: int, length: int) -> Tensor:
    ids = ids.view(samples, -1)[:, 1 : length + 1]
    return torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=-1).flatten()
