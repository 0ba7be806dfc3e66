"""Logits that are not materialised: served or cached teachers, hidden states with their output layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks, Rows
from xtoken.losses.numerics import statistics_dtype
from xtoken.teacher_order import TeacherOrder
from xtoken.vocabulary import TokenizerLike

from .served import ROUNDING, as_tables, served_entries

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that logits may have."""

TAILS = ("uniform", "renormalize")

LEAST_TAIL = 2e-6
"""Probability that all other tokens have at least together: less is below the rounding error of the listed ones, whose
sum may be above 1; and without any the logarithms that a reverse KL takes would be those of 0."""

BLOCK_ELEMENTS = 2**25
"""Logits of one side that are computed at a time where they are not given."""


def autocasts(device_type: str) -> bool:
    """Whether we are inside of `torch.autocast` for this type of device."""
    # What torch.compile works for has it; the compiler of torch 2.6 cannot ask.
    is_available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return is_available and torch.is_autocast_enabled(device_type)


@dataclass(frozen=True)
class TopKLogits:
    """The largest log-probabilities of each row, in place of a row of logits: a cached or served teacher.

    Parameters
    ----------
    ids : int64 or int32 [B, T, k] or [T, k]
        Token ids, distinct within a row; -1 where a row has fewer than k. Losses check them on the CPU only, because
        they would have to wait for another device.
    logprobs : floating [B, T, k] or [T, k]
        Natural logarithms of their probabilities (temperature 1), as vLLM and others return them. Checked as the ids
        are: with a uniform tail none is above 0.
    tail : "uniform" or "renormalize"
        Where the rest of the mass goes: evenly to all other tokens, which have at least 2e-6 of it together (less is
        lost in rounding), or to the listed ones in proportion. Where a loss compares none of a row's listed tokens
        (``top_k``, shared tokens), those that it does compare are equally likely, with either tail: list more.
        `XTokenLoss` reports the share of such chunks as ``flat``.

    Raises
    ------
    ValueError, TypeError
        For shapes and types that do not fit together.
    """

    ids: Tensor
    logprobs: Tensor
    tail: str = "uniform"

    def __post_init__(self) -> None:
        if not isinstance(self.ids, Tensor) or self.ids.dtype not in (torch.int32, torch.int64):
            got = self.ids.dtype if isinstance(self.ids, Tensor) else type(self.ids).__name__
            raise TypeError(f"ids: expected an int64 or int32 tensor, got {got}")
        check_floating("logprobs", self.logprobs)
        if self.ids.dim() not in (2, 3) or self.ids.shape != self.logprobs.shape:
            raise ValueError(
                f"logprobs: expected the shape [B, T, k] or [T, k] of ids {list(self.ids.shape)}, "
                f"got {list(self.logprobs.shape)}"
            )
        if self.ids.device != self.logprobs.device:
            raise ValueError(f"logprobs: expected the device of ids ({self.ids.device}), got {self.logprobs.device}")
        if self.tail not in TAILS:
            raise ValueError(f"tail: expected one of {', '.join(map(repr, TAILS))}, got {self.tail!r}")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TopKLogits:
        """The same on a device."""
        ids, logprobs = (one.to(device, non_blocking=non_blocking) for one in (self.ids, self.logprobs))
        return TopKLogits(ids, logprobs, self.tail)

    @classmethod
    def from_vllm(cls, prompt_logprobs: Any, tail: str = "uniform", tokenizer: TokenizerLike = None) -> TopKLogits:
        """Log-probabilities as servers return them for a text: vLLM, SGLang, and the API of OpenAI.

        Parameters
        ----------
        prompt_logprobs : sequence, length T, or what holds it
            For each token of the text, what was predicted in its place; the first is None.

            * vLLM (``SamplingParams(prompt_logprobs=k)``): mappings of token id to log-probability, the latter a
              number, an object with ``logprob`` (`vllm.Logprob`), or a mapping with ``"logprob"`` and ids as strings
              (the server's JSON).
            * SGLang (``"meta_info"`` with ``"input_top_logprobs"``): lists of [log-probability, id, text].
            * OpenAI, completions (``choice.logprobs`` with ``top_logprobs``): mappings of a token's text, or
              ``"token_id:7"``, to log-probability; chats (``content``): tokens with ``logprob``, ``bytes`` and
              ``top_logprobs``.

            The token that stands there counts too where the answer says its log-probability, if it is none of the
            likeliest. Of a whole answer the first of ``choices`` counts.
        tail : "uniform" or "renormalize"
        tokenizer : optional
            The teacher's, for tokens that come as text. Texts that are none of its tokens count to the rest, which is
            logged.

        Returns
        -------
        TopKLogits
            [T, k], k the largest number of entries. Servers count from the token that is predicted, the rows here from
            the one that predicts, so entry t + 1 becomes row t; the last row, which no loss looks at, is empty.

        Raises
        ------
        ValueError
            For other forms, and what is no logarithm of a probability; if an entry other than the first is None; for
            texts without a tokenizer, or mostly not its tokens.
        """
        given = served_entries(prompt_logprobs, tokenizer)
        entries: list[dict[int, float]] = []
        for position, entry in enumerate([*given[1:], {}][: len(given)]):
            if entry is None:
                raise ValueError(f"prompt_logprobs: expected a mapping at position {position + 1}, got None")
            for token, value in entry.items():
                if not (0 <= token < 2**31 and value <= ROUNDING):  # which NaN is not
                    raise ValueError(
                        "prompt_logprobs: expected token ids and logarithms of probabilities, got "
                        f"{value} for token {token} at position {position + 1}"
                    )
            entries.append(entry)
        return cls(*as_tables(entries, max(map(len, entries), default=0)), tail)

    def __repr__(self) -> str:
        shape, dtype, device = list(self.ids.shape), self.logprobs.dtype, self.logprobs.device
        return f"TopKLogits({shape}, {dtype}, device={device}, tail={self.tail!r})"


def check_floating(name: str, value: Any) -> None:
    """Raises TypeError for anything but a tensor in memory of a type that losses know."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a floating-point tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a floating-point tensor in memory, got a sparse, packed or nested one")


@dataclass(frozen=True)
class LinearLogits:
    """Logits ``hidden @ weight.T + bias``, computed a block of rows at a time and never materialised.

    With `logit_scale` and `softcap` it is ``softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap)``.

    Parameters
    ----------
    hidden : floating [B, T, D] or [T, D]
    weight : floating [V, D]
        The output layer (``lm_head.weight``), in the type of ``hidden``. Inside `torch.autocast` all three are cast to
        its type, as a linear layer would do.
    bias : floating [V], optional
    softcap : float, optional
        Logits are kept within so much of 0 (``final_logit_softcapping`` of Gemma 2).
    logit_scale : float
        ``logit_scale`` of Cohere, 1 / ``logits_scaling`` of Granite. See `xtoken.train.linear_logits`.

    Raises
    ------
    ValueError, TypeError
        For shapes and types that do not fit together.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        names = ("hidden", "weight") if self.bias is None else ("hidden", "weight", "bias")
        for name in names:
            check_floating(name, getattr(self, name))
        kind = self.hidden.device.type
        for name in names if autocasts(kind) else ():
            value = getattr(self, name)
            if value.dtype != torch.float64:
                object.__setattr__(self, name, value.to(torch.get_autocast_dtype(kind)))
        if self.hidden.dim() not in (2, 3):
            raise ValueError(f"hidden: expected shape [B, T, D] or [T, D], got {list(self.hidden.shape)}")
        width = self.hidden.shape[-1]
        if self.weight.dim() != 2 or self.weight.shape[1] != width:
            raise ValueError(f"weight: expected shape [V, {width}] to go with hidden, got {list(self.weight.shape)}")
        if self.weight.dtype != self.hidden.dtype or self.weight.device != self.hidden.device:
            raise ValueError(
                f"weight: expected {self.hidden.dtype} on {self.hidden.device} as hidden, got {self.weight.dtype} on "
                f"{self.weight.device}"
            )
        if self.bias is not None and (self.bias.shape != self.weight.shape[:1] or self.bias.dtype != self.weight.dtype):
            raise ValueError(
                f"bias: expected {self.weight.dtype} [{self.weight.shape[0]}], got {self.bias.dtype} "
                f"{list(self.bias.shape)}"
            )
        for name in ("softcap", "logit_scale"):
            value = getattr(self, name)
            if not 0.0 < (1.0 if value is None and name == "softcap" else value) < float("inf"):
                raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")

    def __repr__(self) -> str:
        shape = [*self.hidden.shape[:-1], len(self.weight)]
        bias = "" if self.bias is None else ", bias"
        bias += "" if self.softcap is None else f", softcap={self.softcap:g}"
        bias += "" if self.logit_scale == 1.0 else f", logit_scale={self.logit_scale:g}"
        return f"LinearLogits({shape} of width {self.weight.shape[1]}{bias}, {self.hidden.dtype}, {self.hidden.device})"


@dataclass(frozen=True)
class OrderedLogits:
    """A teacher's logits whose columns are in a `TeacherOrder`, as an output layer of `ordered_layer` makes them.

    A statement that losses believe: only they, `Teacher` and `XTokenLoss` take it, and not inside of `torch.compile`;
    what else reads logits finds no tensor here. Of columns that are equally large `top_k` takes those that come first
    in the order.

    Parameters
    ----------
    logits : floating [B, T, >= V_teacher] or [T, >= V_teacher], or LinearLogits
        Columns beyond the order's tokens belong to none. `TopKLogits` name their tokens and are in no order.
    order : TeacherOrder

    Raises
    ------
    TypeError
        For anything else.
    """

    logits: Tensor | LinearLogits
    order: TeacherOrder

    def __post_init__(self) -> None:
        if isinstance(self.logits, TopKLogits):
            raise TypeError("logits: got TopKLogits, which name their tokens; give them to the loss as they are")
        if not isinstance(self.logits, (Tensor, LinearLogits)):
            raise TypeError(f"logits: expected a tensor or LinearLogits, got {type(self.logits).__name__}")
        if not isinstance(self.order, TeacherOrder):
            raise TypeError(f"order: expected a TeacherOrder, got {type(self.order).__name__}")

    def __repr__(self) -> str:
        logits = self.logits
        shown = f"{list(logits.shape)}, {logits.dtype}" if isinstance(logits, Tensor) else repr(logits)
        return f"OrderedLogits({shown}, {self.order})"


AnyLogits = Tensor | TopKLogits | LinearLogits | OrderedLogits


class Source(Protocol):
    """Rows of logits, [B, T] of them, ``size`` wide."""

    samples: int
    length: int
    size: int

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start ... stop - 1`` of all samples' rows, one after the other: [stop - start, size]."""
        ...

    def at(self, index: Tensor) -> Tensor:
        """Single rows of them: int64 [n] to [n, size]."""
        ...


def widened(logits: Tensor, size: int) -> Tensor:
    """Logits with -inf for the tokens that their model has no column for: it never produces them."""
    missing = size - logits.shape[-1]
    return logits if missing <= 0 else torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)


class DenseSource:
    """Logits in memory [B, T, V]; see `widened`."""

    def __init__(self, logits: Tensor, size: int) -> None:
        self.logits = logits if logits.shape[-1] == size else widened(logits[..., :size], size)
        self.samples, self.length, self.size = self.logits.shape

    def rows(self, start: int, stop: int) -> Tensor:
        return self.logits.flatten(0, 1)[start:stop]

    def at(self, index: Tensor) -> Tensor:
        return self.logits[index // self.length, index % self.length]


class TopKSource:
    """The rows of `TopKLogits`: ids and log-probabilities [B, T, k]."""

    def __init__(self, ids: Tensor, logprobs: Tensor, tail: str, size: int) -> None:
        self.samples, self.length = ids.shape[:2]
        self.size = size
        self.ids, self.logprobs, self.tail = ids.flatten(0, 1), logprobs.flatten(0, 1), tail
        self.checked = ids.device.type == "cpu"  # elsewhere checks would wait for the device
        low, high = (int(ids.min()), int(ids.max())) if self.checked and ids.numel() else (0, 0)
        if low < -1 or high >= size:
            raise ValueError(f"ids: expected token ids in 0 ... {size - 1}, or -1, got {low if low < -1 else high}")
        if self.checked and tail == "uniform" and ids.numel():  # the other one makes probabilities of any logits
            largest = float(logprobs.detach().masked_fill(ids < 0, -torch.inf).max())
            if largest > ROUNDING:
                raise ValueError(f"logprobs: expected logarithms of probabilities, none above 0, got {largest:g}")

    def rows(self, start: int, stop: int) -> Tensor:
        if self.checked:
            _check_distinct(self.ids[start:stop], start)
        return self._dense(slice(start, stop))

    def at(self, index: Tensor) -> Tensor:
        return self._dense(index)

    def _dense(self, rows: slice | Tensor) -> Tensor:
        ids = self.ids[rows].long()
        dtype = statistics_dtype(self.logprobs)
        logprobs = self.logprobs[rows].to(dtype).masked_fill(ids < 0, -torch.inf)
        if self.tail == "renormalize":
            logprobs = logprobs - logprobs.logsumexp(dim=1, keepdim=True)
            rest = torch.full_like(logprobs[:, 0], -torch.inf)
        else:
            others = (self.size - (ids >= 0).sum(dim=1)).clamp_min(1)
            rest = ((1.0 - logprobs.double().exp().sum(dim=1)).clamp_min(LEAST_TAIL) / others).log().to(dtype)
        dense = rest[:, None].repeat(1, self.size + 1)  # the last column is for entries without an id
        return dense.scatter_(1, torch.where(ids < 0, self.size, ids), logprobs)[:, : self.size]


def _check_distinct(ids: Tensor, start: int) -> None:
    ordered = ids.sort(dim=1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=1)
    if bool(twice.any()):
        row = start + int(twice.nonzero()[0])
        raise ValueError(f"ids: expected distinct token ids in a row, got one twice in row {row}")


def scaled_and_capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``softcap tanh(scale logits / softcap)``; ``scale logits`` for no softcap, which is None or 0."""
    if scale != 1.0:
        logits = logits * scale
    return (logits / softcap).tanh() * softcap if softcap else logits


class LinearSource:
    """The rows of `LinearLogits`: hidden states [B, T, D] and an output layer, cut to the vocabulary."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, size: int, scale: float = 1.0, softcap: float = 0.0
    ) -> None:
        self.scale, self.softcap = scale, softcap
        self.samples, self.length = hidden.shape[:2]
        self.size = size
        self.hidden = hidden.flatten(0, 1)
        self.weight = weight[:size]
        self.bias = None if bias is None else bias[:size]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.at(slice(start, stop))

    def at(self, index: slice | Tensor) -> Tensor:
        logits = torch.nn.functional.linear(self.hidden[index], self.weight, self.bias)
        return widened(scaled_and_capped(logits, self.scale, self.softcap), self.size)

    def of_product(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient of `hidden @ weight.T`, from that of rows of `logits`, in its place."""
        grad, logits = grad[:, : len(self.weight)], logits[:, : len(self.weight)]
        if self.softcap:
            grad.mul_(1.0 - (logits / self.softcap).square())
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


@dataclass(frozen=True)
class Parts:
    """Logits of any kind as tensors: logits; or hidden states with an output layer; or log-probabilities with ids."""

    rows: Tensor  # [B, T, V], [B, T, D] or [B, T, k]; or all without B
    head: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]
    top: Tensor | None = None  # int [B, T, k]
    tail: str = ""
    scale: float = 1.0  # of the product of hidden states and output layer
    softcap: float = 0.0  # 0: none

    @classmethod
    def of(cls, logits: AnyLogits) -> Parts:
        """The tensors as they were given."""
        if isinstance(logits, LinearLogits):
            softcap = logits.softcap or 0.0
            return cls(logits.hidden, logits.weight, logits.bias, scale=logits.logit_scale, softcap=softcap)
        if isinstance(logits, TopKLogits):
            return cls(logits.logprobs, top=logits.ids, tail=logits.tail)
        if isinstance(logits, OrderedLogits):
            raise TypeError("logits: expected columns in the tokenizer's order, got OrderedLogits")
        return cls(logits)

    @property
    def leading_shape(self) -> torch.Size:
        """[B, T] or [T]."""
        return self.rows.shape[:-1]

    @property
    def width(self) -> int | None:
        """Columns; None where that is not known."""
        if self.head is not None:
            return self.head.shape[0]
        return None if self.top is not None else self.rows.shape[-1]

    def batched(self) -> Parts:
        """The same with B."""
        if self.rows.dim() == 3:
            return self
        top = None if self.top is None else self.top[None]
        return Parts(self.rows[None], self.head, self.bias, top, self.tail, self.scale, self.softcap)

    def detached(self) -> Parts:
        """The same without gradients."""
        head, bias = (None if one is None else one.detach() for one in (self.head, self.bias))
        return Parts(self.rows.detach(), head, bias, self.top, self.tail, self.scale, self.softcap)

    def with_rows(self, rows: Tensor) -> Parts:
        return Parts(rows, self.head, self.bias, self.top, self.tail, self.scale, self.softcap)

    def source(self, size: int) -> DenseSource | LinearSource | TopKSource:
        """The rows, without columns that belong to no token."""
        if self.head is not None:
            return LinearSource(self.rows, self.head, self.bias, size, self.scale, self.softcap)
        if self.top is not None:
            return TopKSource(self.top, self.rows, self.tail, size)
        return DenseSource(self.rows, size)


class RowBlock(NamedTuple):
    """Consecutive chunks, and ranges of rows that hold them; `chunks` are numbered within those rows."""

    span: slice
    chunks: Chunks
    student: slice
    teacher: slice

    def rows(self, student: Source, teacher: Source) -> tuple[Tensor, Tensor]:
        """The rows themselves: [R_s, V_student] and [R_t, V_teacher]."""
        return student.rows(self.student.start, self.student.stop), teacher.rows(self.teacher.start, self.teacher.stop)


def materialised(logits: AnyLogits) -> Tensor:
    """All of the logits [B, T, V] or [T, V], in memory."""
    if isinstance(logits, Tensor):
        return logits
    parts = Parts.of(logits)
    if parts.width is None:
        raise ValueError("logits: expected some that say how many tokens there are, got TopKLogits")
    rows = parts.batched().source(parts.width).rows(0, parts.leading_shape.numel())
    return rows.view(*parts.leading_shape, parts.width)


def row_blocks(student: Source, teacher: Source, chunks: Chunks) -> Iterator[RowBlock]:
    """Cuts the chunks so that neither side has many more than `BLOCK_ELEMENTS` logits in a block.

    The student's ranges follow each other from the first row to the last; chunks come in the order of their rows. There
    is a block where there are no rows, too.
    """
    limits = [max(1, BLOCK_ELEMENTS // max(1, side.size)) for side in (student, teacher)]
    host = chunks.host
    sides = [(rows.start.tolist(), (rows.start + rows.count).tolist()) for rows in (host.student, host.teacher)]
    (student_starts, student_ends), (teacher_starts, teacher_ends) = sides
    total = student.samples * student.length
    row, first, count = 0, 0, len(chunks)
    while True:
        last, stop = first, min(total, row + limits[0])
        while last < count and (
            (last == first and student_starts[last] < stop)
            or (student_ends[last] <= stop and teacher_ends[last] - teacher_starts[first] <= limits[1])
        ):
            last += 1
        if last > first:  # a chunk longer than the limit is a block of its own
            stop = max(stop, student_ends[first])
        if last < count:
            stop = min(stop, student_starts[last])
        begin, end = (teacher_starts[first], teacher_ends[last - 1]) if last > first else (0, 0)
        part = slice(first, last), slice(row, stop), slice(begin, end)
        yield RowBlock(part[0], _part(chunks, *part), *part[1:])
        row, first = stop, last
        if row >= total and first >= count:
            return


def _part(chunks: Chunks, span: slice, student: slice, teacher: slice) -> Chunks:
    """Consecutive chunks, numbered within ranges of rows."""
    return Chunks(
        _shifted(chunks.student, span.start, span.stop, student.start, student.stop),
        _shifted(chunks.teacher, span.start, span.stop, teacher.start, teacher.stop),
        chunks.used[span],
        None if chunks.mask is None else chunks.mask[span],
        None if chunks.copy is None else _part(chunks.copy, span, student, teacher),
    )


def _shifted(rows: Rows, first: int, last: int, begin: int, end: int) -> Rows:
    next_ids = None if rows.next_ids is None else rows.next_ids[begin:end]
    before = None if rows.before is None else rows.before[first:last]
    return Rows(rows.start[first:last] - begin, rows.count[first:last], next_ids, before)
