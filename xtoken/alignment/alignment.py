"""Span alignment: which tokens of the student and of the teacher spell the same text."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken import _core, plot
from xtoken.alignment.pretty import in_chunks, shown_tokens, two_lines
from xtoken.notebook import MOST, html_table
from xtoken.vocabulary import TokenizerLike

IGNORED = -100
"""Label of a token that no loss looks at, as in PyTorch and transformers."""


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """As `torch.as_tensor`: a tensor where it is, anything else on the CPU, whatever the default device."""
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    return torch.as_tensor(value, dtype=dtype, device="cpu")


def int_tensor(value: Any, name: str, dtype: torch.dtype, allow_bool: bool = False) -> Tensor:
    """The value as a tensor of `dtype`; TypeError if it does not hold integers, ValueError if one does not fit."""
    try:
        tensor = as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        # torch says "Overflow" as a RuntimeError.
        is_value = isinstance(error, (ValueError, OverflowError)) or "verflow" in str(error)
        kind = ValueError if is_value else TypeError
        raise kind(f"{name}: expected integers of up to 64 bits: {error}") from error
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"{name}: expected integers in memory, got a tensor of another form")
    if tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and not allow_bool):
        if tensor.numel():
            raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
        tensor = tensor.long()
    if tensor.dtype in (dtype, torch.bool):
        return tensor.to(dtype)
    wide = tensor.long()
    is_unsigned = tensor.dtype == torch.uint64  # of which large ones become negative
    if dtype == torch.int64 and not is_unsigned:
        return wide
    result = wide.to(dtype)
    wrong = result != wide
    if is_unsigned:
        wrong |= wide < 0
    if bool(wrong.any()):
        got = int(wide[wrong][0]) % 2**64 if is_unsigned else int(wide[wrong][0])
        raise ValueError(f"{name}: expected numbers that fit in {dtype}, got {got}")
    return result


class Alignment:
    """The chunks of one sample or of a batch.

    A chunk is a token range of the student and one of the teacher that spell the same text. Positions count tokens
    of each sample's row, padding included, so they index logits ``[B, T, V]`` directly.

    Losses check and count chunks on the CPU, where `Aligner` leaves them, and copy the few numbers that kernels need to
    the logits' device without waiting for it. An alignment that is used several times, or in a CUDA graph, can be moved
    there before, with `to`; it keeps the original for the checks.

    Raises ValueError for wrong shapes, empty or negative ranges, and ranges that run backwards or overlap.

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
    """

    _host: Alignment | None = None  # the same on the CPU, for one on another device
    _flat: Tensor | None = None  # `_flatten` on another device
    _masked: bool = False  # whether `predicted`, on another device, leaves out chunks that `_host` still has

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
        self.spans = int_tensor(spans, "spans", torch.int32)
        if self.spans.numel() == 0:
            self.spans = self.spans.reshape(0, 4)
        if self.spans.dim() != 2 or self.spans.shape[1] != 4:
            raise ValueError(f"spans: expected shape [K, 4], got {list(self.spans.shape)}")
        count = self.num_chunks
        self.batched = offsets is not None
        offsets = [0, count] if offsets is None else offsets
        self.offsets = int_tensor(offsets, "offsets", torch.int64).to(self.spans.device)
        if self.offsets.dim() != 1 or self.offsets.numel() == 0:
            raise ValueError(f"offsets: expected shape [B + 1], got {list(self.offsets.shape)}")
        self._ids: dict[str, Tensor | list[NDArray[np.int64]] | None] = {
            side: None if ids is None else self._check_ids(ids, f"{side}_ids")
            for side, ids in (("student", student_ids), ("teacher", teacher_ids))
        }
        all_of_them = torch.ones(len(self), dtype=torch.bool, device="cpu")
        self.optimal = self._flags(all_of_them if optimal is None else optimal, "optimal", len(self))
        if predicted is None:
            predicted = (self.spans[:, 0] > 0) & (self.spans[:, 2] > 0)
        self.predicted = self._flags(predicted, "predicted", count)
        self.check()

    def check_form(self) -> None:
        """Raises ValueError for tensors of another type or shape than the constructor makes: they are public."""
        count = self.spans.shape[0] if isinstance(self.spans, Tensor) and self.spans.dim() else 0
        samples = self.offsets.numel() - 1 if isinstance(self.offsets, Tensor) and self.offsets.numel() else 0
        form = {"spans": (torch.int32, [count, 4]), "offsets": (torch.int64, [samples + 1])}
        for name, (dtype, shape) in {**form, "predicted": (torch.bool, [count])}.items():
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != dtype or list(value.shape) != shape:
                got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}: expected {dtype} {shape}, got {got}")
        for side, ids in self._ids.items():
            shape = [samples, -1] if self.batched else [-1]
            if isinstance(ids, Tensor) and (ids.dtype != torch.int64 or [*ids.shape[:-1], -1] != shape):
                raise ValueError(f"{side}_ids: expected int64 {shape}, got {ids.dtype} {list(ids.shape)}")

    def check(self) -> None:
        """Raises ValueError for tensors that do not describe chunks, as after a change in place, since kernels go where
        they point: a chunk that is empty, negative, or not behind the one before it."""
        self.check_form()
        bounds, count = self.offsets.tolist(), self.num_chunks
        if bounds[0] != 0 or bounds[-1] != count or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"offsets: expected a non-decreasing sequence from 0 to {count} chunks, got {bounds[:8]}")
        k = _core.wrong_chunk(_array(self.spans), np.array(bounds))
        if k >= 0:
            expected = "(student_start, student_end, teacher_start, teacher_end) in increasing order"
            chunk = f"chunk {k} = {self.spans[k].tolist()}"
            raise ValueError(f"spans: {chunk} is empty, negative, or goes backwards; expected {expected}")

    def _flags(self, value: Any, name: str, count: int) -> Tensor:
        flags = int_tensor(value, name, torch.int64, allow_bool=True).to(self.spans.device)
        if flags.shape != (count,):
            raise ValueError(f"{name}: expected shape [{count}], got {list(flags.shape)}")
        if bool(((flags != 0) & (flags != 1)).any()):
            raise ValueError(f"{name}: expected true or false (1 or 0), got other numbers")
        return flags.bool()

    def _check_ids(self, value: Any, name: str) -> Tensor:
        ids = int_tensor(value, name, torch.int64).to(self.spans.device)
        if ids.dim() != 1 + self.batched or (self.batched and ids.shape[0] != len(self)):
            shape = f"[{len(self)}, T]" if self.batched else "[T]"
            raise ValueError(f"{name}: expected shape {shape}, got {list(ids.shape)}")
        return ids

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

    def _both_ids(self) -> tuple[Tensor | None, Tensor | None]:
        return self.student_ids, self.teacher_ids

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
        return (self.spans[:, 1::2] - self.spans[:, 0::2] == 1).all(dim=1)

    @property
    def sample_index(self) -> Tensor:
        """int64 [K]: the sample of each chunk."""
        samples = torch.arange(len(self), device=self.spans.device)
        return torch.repeat_interleave(samples, self.offsets.diff(), output_size=self.num_chunks)

    def to(self, device: torch.device | str) -> Alignment:
        """The same alignment with its tensors on `device`; nothing waits, but for the way back to the CPU."""
        self.check_form()
        device = torch.device(device)
        on_host = device.type == "cpu"
        if on_host and self._host is not None and not self._masked:
            return self._host

        def moved(value: Tensor) -> Tensor:
            return value.to(device) if on_host else to_device(value, device)

        fields = {k: moved(v) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        ids = zip(("student", "teacher"), self._both_ids(), strict=True)
        fields["_ids"] = {side: one if one is None else moved(one) for side, one in ids}
        fields["_host"] = host = None if on_host else self.host._copied()
        fields["_flat"] = None if host is None else moved(host._flatten(ids=True))
        fields["_masked"] = self._masked and not on_host
        return Alignment._trusted(**fields)

    def _copied(self) -> Alignment:
        """The same with tensors of its own, which nobody changes: what is on a device must not differ from them."""
        fields = {k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        fields["_ids"] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self._ids.items()}
        return Alignment._trusted(**fields)

    def supervised(self, labels: Any, teacher_labels: Any = None) -> Alignment:
        """The same alignment, of which losses use only the chunks whose tokens are all labelled.

        A chunk that straddles prompt and completion counts as prompt: its first row would teach a token of the prompt.
        The first whole chunk of a completion counts, though its row stands in the prompt: row t predicts token t + 1.
        (Labels as masks of `Aligner.align` would lose it.) `XTokenLoss` does this itself with its labels.

        Parameters
        ----------
        labels : int [B, T] or [T]
            Of the student's tokens, at their own positions; -100 where a token is not supervised. The values do not
            matter otherwise.
        teacher_labels : int [B, T] or [T], optional
            Of the teacher's tokens, if these must be labelled too.

        Returns
        -------
        Alignment
            Chunks keep their numbers; the others are no longer `predicted`. On the device of the labels if that is not
            the CPU, since only the device knows which they are: nothing waits for it.

        Raises
        ------
        ValueError, TypeError
            For labels of another shape than the alignment's samples, too few, or that are no integers.
        """
        given = {"labels": (labels, 0), "teacher_labels": (teacher_labels, 1)}
        sides = [(name, int_tensor(value, name, torch.int64), side) for name, (value, side) in given.items()
                 if value is not None]  # fmt: skip
        device = next((value.device for _, value, _ in sides if value.device.type != "cpu"), torch.device("cpu"))
        placed = self if self.spans.device == device else self.to(device)
        labelled = [placed._labelled(name, to_device(value, device), side) for name, value, side in sides]
        supervised = copy.copy(placed)
        supervised.predicted = functools.reduce(torch.logical_and, labelled, placed.predicted)
        supervised._masked = device.type != "cpu"
        if supervised._masked:
            supervised._host = placed.host
        return supervised

    def _with_teacher_ids(self, renumber: Callable[[Tensor], Tensor]) -> Alignment:
        """The same with the teacher's tokens numbered anew."""
        ids = self.teacher_ids
        if ids is None:
            return self
        made = copy.copy(self)
        made._ids = {**self._ids, "teacher": renumber(ids)}
        made._host = None if self._host is None else self._host._with_teacher_ids(renumber)
        if self._flat is not None:  # ends with them
            made._flat = torch.cat([self._flat[: -ids.numel()], renumber(ids.flatten())])
        return made

    @property
    def mask(self) -> Tensor | None:
        """bool [K]: which chunks are `predicted`, if only another device than the CPU knows; else None."""
        return self.predicted if self._masked else None

    def _labelled(self, name: str, labels: Tensor, side: int) -> Tensor:
        """bool [K]: the chunks all of whose tokens on a side have a label."""
        rows = labels if labels.dim() == 2 else labels[None]
        if rows.dim() != 2 or len(rows) != len(self):
            expected = f"[{len(self)}, T]" if len(self) > 1 else "[T] or [1, T]"
            raise ValueError(f"{name}: expected shape {expected}, got {list(labels.shape)}")
        if not torch.compiler.is_compiling():
            self.host.check()
        self.host.check_reach(side, rows.shape[1], name, "label")
        before = torch.nn.functional.pad((rows == IGNORED).cumsum(1), (1, 0)).flatten()
        first, last = self.spans[:, 2 * side : 2 * side + 2].long().T + self.sample_index * (rows.shape[1] + 1)
        return before[last] == before[first]

    def check_reach(self, side: int, length: int, name: str, unit: str) -> None:
        """Raises ValueError if a chunk ends beyond so many rows or labels of a side (0: student, 1: teacher).

        Not inside of `torch.compile`, whose graph does not depend on values; the losses' operators look again.
        """
        if torch.compiler.is_compiling():
            return
        ends = self.spans[:, 2 * side + 1]
        if len(ends) and int(ends.max()) > length:
            chunk = f"chunk {int(ends.argmax())} ends at token {int(ends.max())}"
            expected = f"a {unit} for every token that the alignment names ({chunk})"
            raise ValueError(f"{name}: expected {expected}, got {length} {unit}s")

    @property
    def host(self) -> Alignment:
        """The same alignment on the CPU: itself, what `to` was called of, or a copy that is made once.

        It may have more chunks than one that was `supervised` on a device.
        """
        if self.spans.device.type == "cpu":
            return self
        if self._host is None:
            self._host = self.to("cpu")
        return self._host

    def _flatten(self, ids: bool) -> Tensor:
        """int64 [n]: what losses need on a device, as one tensor for one copy; of an alignment on the CPU.

        Of `predictable` chunks the number, sample, on both sides first predictor row and count of rows, and whether it
        begins where the chunk before ends [7, K]; then, if wanted, the ids that there are.
        """
        rows = _core.predictor_rows(*map(_array, (self.spans, self.offsets, self.predicted)))
        known = [one.flatten() for one in self._both_ids() if ids and one is not None]
        return torch.cat([torch.from_numpy(rows), *known]) if known else torch.from_numpy(rows)

    @staticmethod
    def _trusted(**fields: Any) -> Alignment:
        """An alignment of fields that are known to be right."""
        alignment = object.__new__(Alignment)
        vars(alignment).update(fields)
        return alignment

    def chunk_ids(self, side: str = "student", length: int | None = None) -> Tensor:
        """Chunk index of every token of ``"student"`` or ``"teacher"``, -1 where the token is in no chunk.

        int64 [B, length], or [length] for one sample. Indices count chunks of the whole batch, as `spans` does. Default
        `length`: the width of the stored ids, else the end of the last chunk.
        """
        if side not in ("student", "teacher"):
            raise ValueError(f"side: expected 'student' or 'teacher', got {side!r}")
        self.host.check()
        starts, ends = self.spans.long().T[:2] if side == "student" else self.spans.long().T[2:]
        ids = self._padded_ids(side)
        needed = int(ends.max()) if len(ends) else 0
        if length is None:
            length = needed if ids is None else ids.shape[-1]
        if length < needed:
            raise ValueError(f"length: chunks reach token {needed}, got {length}")
        lengths = ends - starts
        chunk = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        index = torch.full((len(self), length), -1, dtype=torch.int64, device=lengths.device)
        index[self.sample_index[chunk], ranges(starts, lengths)] = chunk
        return index if self.batched else index[0]

    def slice(self, start: int, stop: int | None = None) -> Alignment:
        """Samples `start` to `stop` - 1 (default: the one sample `start`) as a batch of their own."""
        stop = start + 1 if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"slice: expected 0 <= start <= stop <= {len(self)}, got {start} and {stop}")
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        ids = (one if one is None else one.reshape(len(self), -1)[start:stop] for one in self._both_ids())
        flags = {"optimal": self.optimal[start:stop], "predicted": self.predicted[first:last]}
        return Alignment(self.spans[first:last], self.offsets[start : stop + 1] - first, *ids, **flags)

    @staticmethod
    def cat(alignments: Sequence[Alignment]) -> Alignment:
        """One batch from several alignments, in order. Ids are padded with -1; kept only if all have them."""
        if not alignments:
            raise ValueError("alignments: expected at least one alignment")
        ids: list[Tensor | None] = []
        for given in zip(*(part._both_ids() for part in alignments), strict=True):
            rows = [one.reshape(len(part), -1) for one, part in zip(given, alignments, strict=True) if one is not None]
            ids.append(pad_rows(itertools.chain(*rows)) if len(rows) == len(given) else None)
        spans, optimal, predicted = (
            torch.cat([getattr(part, name) for part in alignments]) for name in ("spans", "optimal", "predicted")
        )
        counts = torch.cat([part.offsets.diff() for part in alignments])
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return Alignment(spans, offsets, *ids, optimal=optimal, predicted=predicted)

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

        Tokenizers are those that `Vocabulary.from_tokenizer` takes. `sample` is which one of the batch, `color` whether
        to colour the cells with ANSI codes, `width` the columns after which the two lines go on below. Raises
        ValueError if the alignment carries no token ids.
        """
        one = self.slice(sample)
        if one.student_ids is None or one.teacher_ids is None:
            raise ValueError("pretty: this alignment carries no token ids; give student_ids and teacher_ids")
        student = shown_tokens(student_tok, one.student_ids[0], "student_tok")
        teacher = shown_tokens(teacher_tok, one.teacher_ids[0], "teacher_tok")
        return two_lines(one.spans.tolist(), student, teacher, color, width)

    def plot(
        self,
        student_tok: TokenizerLike,
        teacher_tok: TokenizerLike,
        *,
        sample: int = 0,
        first: int = 0,
        chunks: int = plot.MOST_CHUNKS,
        axes: Any = None,
    ) -> Any:
        """Draws chunks of one sample: both tokenizations above each other, a colour a chunk, grey what is in none.

        Tokenizers and `sample` as for `pretty`; `first` is the first chunk that is drawn, `chunks` how many are at
        most. `axes` are matplotlib's (default: of a new figure), and are returned. Raises ValueError if the alignment
        carries no token ids or the sample no such chunk, ImportError without matplotlib.
        """
        one = self.slice(sample)
        if one.student_ids is None or one.teacher_ids is None:
            raise ValueError("plot: this alignment carries no token ids; give student_ids and teacher_ids")
        spans = one.spans.tolist()
        drawn = spans[first : first + chunks]
        if not spans:
            raise ValueError("plot: this sample has no chunks to draw")
        if first < 0 or not drawn:
            raise ValueError(f"first, chunks: expected chunks of {len(spans)}, got {chunks} from {first}")
        ends = [len(one.student_ids[0]), len(one.teacher_ids[0])]
        low = [drawn[0][0], drawn[0][2]] if first else [0, 0]
        high = [drawn[-1][1], drawn[-1][3]] if first + len(drawn) < len(spans) else ends
        student = shown_tokens(student_tok, one.student_ids[0, low[0] : high[0]], "student_tok")
        teacher = shown_tokens(teacher_tok, one.teacher_ids[0, low[1] : high[1]], "teacher_tok")
        moved = [[a - low[0], b - low[0], c - low[1], d - low[1]] for a, b, c, d in drawn]
        axes = plot.two_rows(axes, in_chunks(moved, student, teacher))
        axes.set_title(f"chunks {first} to {first + len(drawn) - 1} of {len(spans)}", fontsize="medium")
        return axes

    def _repr_html_(self) -> str:
        samples, spans = self.host.sample_index[:MOST].tolist(), self.host.spans[:MOST].tolist()
        rows = [(b, f"{i} to {j}", f"{k} to {m}") for b, (i, j, k, m) in zip(samples, spans, strict=True)]
        return html_table(repr(self), ("sample", "student tokens", "teacher tokens"), rows, self.num_chunks)

    def __repr__(self) -> str:
        exact = int(self.exact.sum())
        return f"Alignment(samples={len(self)}, chunks={self.num_chunks}, exact={exact}, device={self.spans.device})"


def _array(values: Tensor) -> NDArray[Any]:
    """The values on the CPU; a tensor that has shared its own memory with NumPy can no longer be resized."""
    return values.to("cpu", copy=True).numpy()


def predictable(alignment: Alignment) -> Tensor:
    """bool [K]: the chunks with a predictor row on both sides, which are those that losses use."""
    return alignment.predicted & (alignment.spans[:, ::2] > 0).all(1)


def ranges(first: Tensor, counts: Tensor) -> Tensor:
    """int64 [sum of counts]: first[0], first[0] + 1 ... as many as counts[0], then those of first[1] ..."""
    shift = torch.repeat_interleave(first - (counts.cumsum(0) - counts), counts)
    return shift + torch.arange(len(shift), device=shift.device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values of a tensor on a device, without waiting for it.

    Raises RuntimeError while a CUDA graph is captured, which would read the host's memory at every replay.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "inside a CUDA graph losses take tensors on the device only: move the alignment, labels and columns there"
        )
    return values.pin_memory().to(device, non_blocking=True)


class Ragged(NamedTuple):
    """Rows of different lengths, one after the other: row b is ``flat[offsets[b]:offsets[b + 1]]``.

    `Aligner` takes it wherever it takes a list of sequences.
    """

    flat: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @staticmethod
    def of(rows: Sequence[NDArray[np.int64]]) -> Ragged:
        """The rows, concatenated."""
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return Ragged(np.concatenate(rows) if rows else np.zeros(0, np.int64), offsets)

    def rows(self) -> list[NDArray[np.int64]]:
        """Each row, as a view."""
        return np.split(self.flat, self.offsets[1:-1]) if len(self.offsets) > 1 else []


def pad_rows(rows: Iterable[Tensor | NDArray[np.int64]], value: int = -1) -> Tensor:
    """Rows of different lengths as one matrix, padded on the right; int64 [0, 0] if there are none."""
    rows = list(rows)
    padded = torch.full((len(rows), max(map(len, rows), default=0)), value, device="cpu")
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = as_tensor(row)
    return padded
