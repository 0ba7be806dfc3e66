"""Span alignment: which tokens of the student and of the teacher spell the same text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _core
from .vocabulary import TokenizerLike, Vocabulary

METHODS: tuple[str, ...] = tuple(method.name for method in _core.AlignMethod)
"""Methods of `Aligner`."""


def _int_tensor(value: Any, name: str, dtype: torch.dtype, allow_bool: bool = False) -> Tensor:
    tensor = torch.as_tensor(value)
    if tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and not allow_bool):
        if tensor.numel():
            raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
        tensor = tensor.long()
    return tensor.to(dtype)


class Alignment:
    """The chunks of one sample or of a batch.

    A chunk is a token range of the student and one of the teacher that spell the same text. Positions count tokens
    of each sample's row, padding included, so they index logits ``[B, T, V]`` directly.

    Parameters
    ----------
    spans : int32 [K, 4]
        ``(student_start, student_end, teacher_start, teacher_end)`` of every chunk, half-open, all samples one after
        the other. Within a sample both sides strictly increase.
    offsets : int64 [B + 1], optional
        Chunks of sample ``b`` are ``spans[offsets[b]:offsets[b + 1]]``. Default: all chunks belong to one sample.
    student_ids, teacher_ids : int64 [B, T] or [T], optional
        The token ids, padded to the right; needed by ``merge="chain"`` and by `pretty`.
    optimal : bool [B], optional
        Whether the sample's alignment is proven best (False only where the dynamic program's budget ran out).
    predicted : bool [K], optional
        Whether on both sides a real token stands before the chunk, so that a row of logits predicts it. Default:
        true unless the chunk begins at position 0 on either side. Losses leave the other chunks out.

    Notes
    -----
    Losses check and count chunks on the CPU, where `Aligner` leaves them, and copy the few numbers that kernels need to
    the logits' device without waiting for it. An alignment that is used several times, or in a CUDA graph, can be moved
    there before, with `to`; it keeps the original for the checks.

    Raises
    ------
    ValueError
        For wrong shapes, empty or negative ranges, and ranges that run backwards or overlap.
    """

    _host: Alignment | None = None  # the same on the CPU, for one on another device
    _packed: Tensor | None = None  # `packed` on another device

    def __init__(
        self,
        spans: Any,
        offsets: Any = None,
        student_ids: Any = None,
        teacher_ids: Any = None,
        *,
        optimal: Any = None,
        predicted: Any = None,
    ) -> None:
        self.spans = _int_tensor(spans, "spans", torch.int32)
        if self.spans.numel() == 0:
            self.spans = self.spans.reshape(0, 4)
        if self.spans.dim() != 2 or self.spans.shape[1] != 4:
            raise ValueError(f"spans: expected shape [K, 4], got {list(self.spans.shape)}")
        device = self.spans.device
        count = self.spans.shape[0]
        self.batched = offsets is not None
        if offsets is None:
            offsets = torch.tensor([0, count], device=device)
        self.offsets = _int_tensor(offsets, "offsets", torch.int64).to(device)
        if self.offsets.dim() != 1 or self.offsets.numel() == 0:
            raise ValueError(f"offsets: expected shape [B + 1], got {list(self.offsets.shape)}")
        bounds = self.offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != count or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"offsets: expected a non-decreasing sequence from 0 to {count} chunks, got {bounds[:8]}")
        self._check_order()
        self._ids: dict[str, Tensor | list[NDArray[np.int64]] | None] = {
            "student": self._check_ids(student_ids, "student_ids"),
            "teacher": self._check_ids(teacher_ids, "teacher_ids"),
        }
        self.optimal = self._flags(optimal, "optimal", len(self))
        if predicted is None:
            predicted = (self.spans[:, 0] > 0) & (self.spans[:, 2] > 0)
        self.predicted = self._flags(predicted, "predicted", count)

    def _flags(self, value: Any, name: str, count: int) -> Tensor:
        if value is None:
            return torch.ones(count, dtype=torch.bool, device=self.spans.device)
        flags = torch.as_tensor(value, dtype=torch.bool, device=self.spans.device)
        if flags.shape != (count,):
            raise ValueError(f"{name}: expected shape [{count}], got {list(flags.shape)}")
        return flags

    def _check_ids(self, value: Any, name: str) -> Tensor | None:
        if value is None:
            return None
        ids = _int_tensor(value, name, torch.int64).to(self.spans.device)
        expected = 2 if self.batched else 1
        if ids.dim() != expected or (self.batched and ids.shape[0] != len(self)):
            shape = f"[{len(self)}, T]" if self.batched else "[T]"
            raise ValueError(f"{name}: expected shape {shape}, got {list(ids.shape)}")
        return ids

    def _check_order(self) -> None:
        spans = self.spans.long()
        starts, ends = spans[:, 0::2], spans[:, 1::2]
        bad = ((starts < 0) | (ends <= starts)).any(dim=1)
        if len(spans) > 1:
            same_sample = self.sample_index[1:] == self.sample_index[:-1]
            bad[1:] |= same_sample & (starts[1:] < ends[:-1]).any(dim=1)
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            raise ValueError(
                f"spans: chunk {k} = {spans[k].tolist()} is empty, negative, or goes backwards; expected "
                "(student_start, student_end, teacher_start, teacher_end) in increasing order"
            )

    @property
    def student_ids(self) -> Tensor | None:
        """int64 [B, T] or [T]: the student's token ids, padded with -1; None if they were not given."""
        return self._padded_ids("student")

    @property
    def teacher_ids(self) -> Tensor | None:
        """int64 [B, T] or [T]: the teacher's token ids, padded with -1; None if they were not given."""
        return self._padded_ids("teacher")

    def _padded_ids(self, side: str) -> Tensor | None:
        ids = self._ids[side]
        if isinstance(ids, list):  # padded when first asked for: corpora never ask
            ids = self._ids[side] = pad_rows(ids)
        return ids

    def ragged_ids(self, side: str) -> Ragged | None:
        """Token ids of ``"student"`` or ``"teacher"`` without padding; None unless they came, or were cut, as rows."""
        ids = self._ids[side]
        return Ragged.of(ids) if isinstance(ids, list) else None

    def __len__(self) -> int:
        """Number of samples."""
        return self.offsets.numel() - 1

    @property
    def num_chunks(self) -> int:
        """Number of chunks of all samples."""
        return self.spans.shape[0]

    @property
    def exact(self) -> Tensor:
        """bool [K]: the chunk is one student token and one teacher token (so both have the same text or role)."""
        lengths = self.spans[:, 1::2] - self.spans[:, 0::2]
        return (lengths == 1).all(dim=1)

    @property
    def sample_index(self) -> Tensor:
        """int64 [K]: the sample of each chunk."""
        counts = self.offsets[1:] - self.offsets[:-1]
        return torch.repeat_interleave(torch.arange(len(self), device=self.spans.device), counts)

    def to(self, device: torch.device | str) -> Alignment:
        """The same alignment with its tensors on `device`."""
        device = torch.device(device)
        if device.type == "cpu" and self._host is not None:
            return self._host
        fields = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        padded = {side: self._padded_ids(side) for side in self._ids}
        fields["_ids"] = {side: ids if ids is None else ids.to(device) for side, ids in padded.items()}
        fields["_host"] = fields["_packed"] = None
        if device.type != "cpu":
            fields["_host"] = self.host
            fields["_packed"] = self.host.packed(ids=True).to(device)
        return Alignment._trusted(**fields)

    @property
    def host(self) -> Alignment:
        """The same alignment on the CPU: itself, what `to` was called of, or a copy that is made once."""
        if self.spans.device.type == "cpu":
            return self
        if self._host is None:
            self._host = self.to("cpu")
        return self._host

    def packed(self, ids: bool) -> Tensor:
        """int64 [n]: what losses need on a device, as one tensor for one copy; of an alignment on the CPU.

        Of each chunk that `predictable` names its number, its sample and its span [6, K]; then, if wanted, the ids of
        both sides, as far as there are any.
        """
        used = predictable(self).nonzero()[:, 0]
        parts = [used, self.sample_index[used], self.spans[used].long().T.flatten()]
        if ids:
            parts += [part.flatten() for part in (self.student_ids, self.teacher_ids) if part is not None]
        return torch.cat(parts)

    @staticmethod
    def _trusted(**fields: Any) -> Alignment:
        """An alignment of fields that are known to be right."""
        alignment = object.__new__(Alignment)
        vars(alignment).update(fields)
        return alignment

    def chunk_ids(self, side: str = "student", length: int | None = None) -> Tensor:
        """Chunk index of every token, -1 where the token is in no chunk.

        Parameters
        ----------
        side : "student" or "teacher"
        length : int, optional
            Tokens in a row. Default: the width of the stored ids, else the end of the last chunk.

        Returns
        -------
        Tensor
            int64 [B, length], or [length] for one sample. Indices count chunks of the whole batch, as `spans` does.
        """
        first = {"student": 0, "teacher": 2}.get(side)
        if first is None:
            raise ValueError(f"side: expected 'student' or 'teacher', got {side!r}")
        starts, ends = self.spans[:, first].long(), self.spans[:, first + 1].long()
        ids = self.student_ids if side == "student" else self.teacher_ids
        needed = int(ends.max()) if len(ends) else 0
        if length is None:
            length = ids.shape[-1] if ids is not None else needed
        if length < needed:
            raise ValueError(f"length: chunks reach token {needed}, got {length}")
        lengths = ends - starts
        chunk = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        within = torch.arange(len(chunk), device=lengths.device) - (lengths.cumsum(0) - lengths)[chunk]
        index = torch.full((len(self), length), -1, dtype=torch.int64, device=lengths.device)
        index[self.sample_index[chunk], starts[chunk] + within] = chunk
        return index if self.batched else index[0]

    def slice(self, start: int, stop: int | None = None) -> Alignment:
        """Samples ``start .. stop - 1`` (default: the one sample `start`) as a batch of their own."""
        stop = start + 1 if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"slice: expected 0 <= start <= stop <= {len(self)}, got {start} and {stop}")
        first, last = int(self.offsets[start]), int(self.offsets[stop])

        def rows(ids: Tensor | None) -> Tensor | None:
            return ids if ids is None else ids.reshape(len(self), -1)[start:stop]

        return Alignment(
            self.spans[first:last],
            self.offsets[start : stop + 1] - first,
            rows(self.student_ids),
            rows(self.teacher_ids),
            optimal=self.optimal[start:stop],
            predicted=self.predicted[first:last],
        )

    @staticmethod
    def cat(alignments: Sequence[Alignment]) -> Alignment:
        """One batch from several alignments, in order. Ids are padded with -1; kept only if all have them."""
        if not alignments:
            raise ValueError("alignments: expected at least one alignment")
        shift = 0
        offsets = [torch.zeros(1, dtype=torch.int64, device=alignments[0].spans.device)]
        for part in alignments:
            offsets.append(part.offsets[1:] + shift)
            shift += part.num_chunks

        def rows(name: str) -> Tensor | None:
            given = [getattr(part, name) for part in alignments]
            if any(ids is None for ids in given):
                return None
            return pad_rows(
                [row for ids, part in zip(given, alignments, strict=True) for row in ids.reshape(len(part), -1)]
            )

        return Alignment(
            torch.cat([part.spans for part in alignments]),
            torch.cat(offsets),
            rows("student_ids"),
            rows("teacher_ids"),
            optimal=torch.cat([part.optimal for part in alignments]),
            predicted=torch.cat([part.predicted for part in alignments]),
        )

    def pretty(
        self,
        student_tok: TokenizerLike,
        teacher_tok: TokenizerLike,
        *,
        sample: int = 0,
        color: bool = True,
        width: int = 110,
    ) -> str:
        """The chunks of one sample as two lines of cells, student above teacher, for printing.

        A space shows as ``·``, a bar ``|`` separates the tokens of a chunk, and a token that is in no chunk stands in
        parentheses. Bytes that are not UTF-8 show as ``\\xHH``.

        Parameters
        ----------
        student_tok, teacher_tok
            Tokenizers, as for `Vocabulary.from_tokenizer`.
        sample : int
            Which sample of the batch.
        color : bool
            Whether to colour the cells with ANSI codes.
        width : int
            Columns after which the two lines go on below.

        Raises
        ------
        ValueError
            If the alignment carries no token ids.
        """
        if self.student_ids is None or self.teacher_ids is None:
            raise ValueError("pretty: this alignment carries no token ids; give student_ids and teacher_ids")
        one = self.slice(sample)
        sides = []
        for tokenizer, ids in ((student_tok, one.student_ids), (teacher_tok, one.teacher_ids)):
            vocabulary = Vocabulary.from_tokenizer(tokenizer)
            assert ids is not None
            pad = vocabulary.roles.get("pad", -1)
            sides.append([_shown(vocabulary[i]) if i not in (-1, pad) else "" for i in ids[0].tolist()])
        return _two_lines(one.spans.tolist(), sides[0], sides[1], color, width)

    def __repr__(self) -> str:
        exact = int(self.exact.sum())
        return f"Alignment(samples={len(self)}, chunks={self.num_chunks}, exact={exact}, device={self.spans.device})"


def predictable(alignment: Alignment) -> Tensor:
    """bool [K]: the chunks with a predictor row on both sides, which are those that losses use."""
    return alignment.predicted & (alignment.spans[:, 0] > 0) & (alignment.spans[:, 2] > 0)


class Ragged(NamedTuple):
    """Rows of different lengths, one after the other: row b is ``flat[offsets[b]:offsets[b + 1]]``.

    `Aligner` takes it wherever it takes a list of sequences.
    """

    flat: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @staticmethod
    def of(rows: Sequence[NDArray[np.int64]]) -> Ragged:
        """The rows, copied one behind the other."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return Ragged(np.concatenate(rows) if rows else np.zeros(0, np.int64), offsets)

    def rows(self) -> list[NDArray[np.int64]]:
        """Each row, as a view."""
        return np.split(self.flat, self.offsets[1:-1]) if len(self.offsets) > 1 else []


def pad_rows(rows: Iterable[Tensor | NDArray[np.int64]], value: int = -1) -> Tensor:
    """Rows of different lengths as one matrix, padded on the right; int64 [0, 0] if there are none."""
    rows = list(rows)
    padded = torch.full((len(rows), max(map(len, rows), default=0)), value)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = torch.as_tensor(row)
    return padded


class Aligner:
    """Aligns token sequences of a student and a teacher that read the same text.

    Parameters
    ----------
    student_tok, teacher_tok
        Tokenizers, as for `Vocabulary.from_tokenizer`.
    method : str
        ``"bytes"``: where both sides spell the same bytes, the text is cut at every token boundary that both share, in
        linear time. Special tokens pair by role or stay alone. Where the sides disagree (an edit, a one-sided special
        token, a dummy space, an early end), the tokens up to the next agreement stay unaligned.
        ``"auto"``: the same, but where the sides disagree the dynamic program aligns what it can.
        ``"dp"``: the dynamic program of the paper over the whole sample, exact. It knows matches of one token, and one
        token against two to four; other chunks are gaps to it.
    fold_space_punctuation : bool
        Whether a space and punctuation (``" ,"``) equal the punctuation alone.
    cell_budget : int, optional
        Table cells that one dynamic program may compute. Past it the sample's alignment is still valid, but
        `Alignment.optimal` is False. Default: 2e8, about a tenth of a second.
    num_threads : int, optional
        Threads for a batch. Default: all processors of this process.

    Raises
    ------
    ValueError
        For an unknown method, a negative budget or fewer than one thread.

    Examples
    --------
    >>> student = Vocabulary([b"<s>", b" 2024", b"In"], roles={"bos": 0})
    >>> teacher = Vocabulary([b"In", b" ", b"20", b"24"])
    >>> Aligner(student, teacher).align([0, 2, 1], [0, 1, 2, 3]).spans.tolist()
    [[1, 2, 0, 1], [2, 3, 1, 4]]
    """

    def __init__(
        self,
        student_tok: TokenizerLike,
        teacher_tok: TokenizerLike,
        method: str = "auto",
        *,
        fold_space_punctuation: bool = False,
        cell_budget: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads: expected at least 1, got {num_threads}")
        self.student = Vocabulary.from_tokenizer(student_tok)
        self.teacher = Vocabulary.from_tokenizer(teacher_tok)
        self.method = method
        self.cell_budget = _core.default_cell_budget if cell_budget is None else cell_budget
        if self.cell_budget < 0:
            raise ValueError(f"cell_budget: expected at least 0, got {cell_budget}")
        self.num_threads = num_threads or _core.available_processors()
        self._core = _core.Aligner(self.student._core, self.teacher._core, fold_space_punctuation)

    def align(
        self, student_ids: Any, teacher_ids: Any, student_mask: Any = None, teacher_mask: Any = None
    ) -> Alignment:
        """Aligns one sample or a batch.

        Parameters
        ----------
        student_ids, teacher_ids : int [T], int [B, T], or a list of B sequences
            Token ids as lists, arrays or tensors. Both sides must have the same number of samples.
        student_mask, teacher_mask : same shape as the ids, optional
            0 or False leaves a token out (attention masks). Without a mask, runs of the pad token at either end of a
            sample are left out; where the pad token is also the end token, the first one behind the text is kept.

        Returns
        -------
        Alignment
            On the CPU. Positions count masked tokens too. A chunk never contains a masked token.

        Raises
        ------
        ValueError
            If a token id is outside the vocabulary, or the numbers of samples or the shapes of the masks differ.
        TypeError
            If ids are not integers.

        Notes
        -----
        Releases the GIL; samples are spread over `num_threads` threads; the result does not depend on their number.
        """
        student = _Batch(student_ids, student_mask, "student")
        teacher = _Batch(teacher_ids, teacher_mask, "teacher")
        return self._align(student, teacher)

    def _align(self, student: _Batch, teacher: _Batch) -> Alignment:
        if student.is_batch != teacher.is_batch:
            raise ValueError("teacher_ids: expected one sample or a batch, as student_ids is, got the other")
        spans, offsets, predicted, optimal = self._core.align(
            student.rows, student.masks, teacher.rows, teacher.masks,
            _core.AlignMethod[self.method], self.cell_budget, self.num_threads,
        )  # fmt: skip
        return Alignment._trusted(
            spans=torch.from_numpy(spans),
            offsets=torch.from_numpy(offsets),
            batched=student.is_batch,
            _ids={"student": student.ids, "teacher": teacher.ids},
            optimal=torch.from_numpy(optimal),
            predicted=torch.from_numpy(predicted),
        )

    def truncate(
        self,
        student_ids: Any,
        teacher_ids: Any,
        max_student_length: int,
        max_teacher_length: int,
        student_mask: Any = None,
        teacher_mask: Any = None,
    ) -> Alignment:
        """Aligns, and cuts each sample so that both models read the same text within both length limits.

        A sample that fits is left whole. A longer one is cut, on both sides, behind the last chunk that ends within
        both limits, so that neither model reads text that the other never saw.

        Parameters
        ----------
        student_ids, teacher_ids, student_mask, teacher_mask
            As for `align`.
        max_student_length, max_teacher_length : int
            Most tokens of a sample, counted from position 0.

        Returns
        -------
        Alignment
            Its `student_ids` and `teacher_ids` are the cut ids, padded with -1 to the longest sample that is left. A
            sample without a chunk within the limits is left empty.

        Raises
        ------
        ValueError
            For negative limits, and as `align`.
        """
        limits = (max_student_length, max_teacher_length)
        if min(limits) < 0:
            raise ValueError(f"max_student_length, max_teacher_length: expected at least 0, got {limits}")
        student = _Batch(student_ids, student_mask, "student")
        teacher = _Batch(teacher_ids, teacher_mask, "teacher")
        whole = self._align(student, teacher)
        sizes = [[len(row) for row in side.rows] for side in (student, teacher)]
        lengths = torch.tensor(sizes, dtype=torch.int64).T
        fits = (lengths <= torch.tensor(limits)).all(dim=1)
        sample = whole.sample_index
        kept = fits[sample] | (whole.spans[:, 1::2] <= torch.tensor(limits)).all(dim=1)
        ends = torch.zeros_like(lengths)
        place = sample[kept, None].expand(-1, 2)
        ends.scatter_reduce_(0, place, whole.spans[kept][:, 1::2].long(), "amax")
        ends = torch.where(fits[:, None], lengths, ends)
        sides: list[Tensor | list[NDArray[np.int64]]] = []
        for batch, cut in ((student, ends[:, 0]), (teacher, ends[:, 1])):
            rows = [row[:n] for row, n in zip(batch.rows, cut.tolist(), strict=True)]
            sides.append(rows if whole.batched else torch.from_numpy(rows[0]))
        counts = torch.bincount(sample[kept], minlength=len(whole))
        return Alignment._trusted(
            spans=whole.spans[kept],
            offsets=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
            batched=whole.batched,
            _ids={"student": sides[0], "teacher": sides[1]},
            optimal=whole.optimal,
            predicted=whole.predicted[kept],
        )


class _Batch:
    """The ids and the masks of one side, one array a sample; they view the caller's memory where it allows."""

    def __init__(self, ids: Any, mask: Any, side: str) -> None:
        name = f"{side}_ids"
        self.rows: list[NDArray[np.int64]]
        self.rows, whole = _rows(ids, name, torch.int64)
        self.is_batch = whole is None or whole.dim() == 2
        self.ids: Tensor | list[NDArray[np.int64]] = self.rows if whole is None else whole
        self.masks: list[NDArray[np.uint8]] | None = None
        if mask is not None:
            self.masks, _ = _rows(mask, f"{side}_mask", torch.uint8)


def _rows(value: Any, name: str, dtype: torch.dtype) -> tuple[list[NDArray[Any]], Tensor | None]:
    """The samples of `value`, each a contiguous array, and the tensor [T] or [B, T] that they view, if there is one."""
    if isinstance(value, Ragged):
        return value.rows(), None
    allow_bool = dtype == torch.uint8
    if isinstance(value, (list, tuple)) and len(value) > 0 and np.ndim(value[0]) > 0:
        wanted = np.dtype(np.uint8 if allow_bool else np.int64)
        rows = [
            np.ascontiguousarray(row)
            if type(row) is np.ndarray and row.dtype == wanted
            else _int_tensor(row, name, dtype, allow_bool).cpu().contiguous().numpy()
            for row in value
        ]
        if any(row.ndim != 1 for row in rows):
            raise ValueError(f"{name}: expected one dimension a sample")
        return rows, None
    tensor = _int_tensor(value, name, dtype, allow_bool).cpu().contiguous()
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{name}: expected shape [T] or [B, T], got {list(tensor.shape)}")
    return list(tensor.reshape(1, -1).numpy() if tensor.dim() == 1 else tensor.numpy()), tensor


def _shown(token: bytes) -> str:
    """A token on one line: control characters and bytes that are not UTF-8 escaped, spaces visible."""
    text = token.decode("utf-8", "backslashreplace").replace(" ", "·")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) or "∅"


def _two_lines(spans: list[list[int]], student: list[str], teacher: list[str], color: bool, width: int) -> str:
    """Cells of equal width, one a chunk; tokens between chunks in cells of their own; padding (empty) left out."""
    cells: list[tuple[str, str, bool]] = []
    i = j = 0
    for a, b, c, d in [*spans, [len(student), len(student), len(teacher), len(teacher)]]:
        alone = ["(" + "|".join(filter(None, side)) + ")" for side in (student[i:a], teacher[j:c])]
        if alone != ["()", "()"]:
            cells.append((alone[0].replace("()", ""), alone[1].replace("()", ""), False))
        if b > a:
            cells.append(("|".join(student[a:b]), "|".join(teacher[c:d]), True))
        i, j = b, d
    lines: list[str] = []
    upper: list[str] = []
    lower: list[str] = []
    used = 0
    for k, (above, below, aligned) in enumerate(cells):
        size = max(len(above), len(below))
        if used and used + size + 1 > width:
            lines += [" ".join(upper), " ".join(lower), ""]
            upper, lower, used = [], [], 0
        used += size + 1
        start, end = (f"\x1b[4{2 + k % 5}m\x1b[30m" if aligned else "\x1b[2m", "\x1b[0m") if color else ("", "")
        upper.append(start + above.ljust(size) + end)
        lower.append(start + below.ljust(size) + end)
    return "\n".join([*lines, " ".join(upper), " ".join(lower)])
