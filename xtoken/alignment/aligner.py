"""The aligner: token sequences of two tokenizers in, their chunks out."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken import _core
from xtoken.alignment.alignment import Alignment, Ragged, int_tensor
from xtoken.vocabulary import TokenizerLike, Vocabulary

METHODS: tuple[str, ...] = tuple(method.name for method in _core.AlignMethod)
"""Methods of `Aligner`."""


class Aligner:
    """Aligns token sequences of a student and a teacher that read the same text.

    Raises ValueError for an unknown method, a negative budget or fewer than one thread.

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
        for name, number, least in (("num_threads", num_threads, 1), ("cell_budget", cell_budget, 0)):
            if number is not None and int_tensor(number, name, torch.int64).item() < least:
                raise ValueError(f"{name}: expected at least {least}, got {number}")
        self.student = Vocabulary.from_tokenizer(student_tok)
        self.teacher = Vocabulary.from_tokenizer(teacher_tok)
        self.method = method
        self.cell_budget = _core.default_cell_budget if cell_budget is None else cell_budget
        self.num_threads = num_threads or _core.available_processors()
        self.fold_space_punctuation = fold_space_punctuation
        self._core = _core.Aligner(self.student._core, self.teacher._core, fold_space_punctuation)

    def __reduce__(self) -> tuple[Any, ...]:
        settings = {name: getattr(self, name) for name in ("fold_space_punctuation", "cell_budget", "num_threads")}
        return functools.partial(Aligner, self.student, self.teacher, self.method, **settings), ()

    def __repr__(self) -> str:
        fold = ", fold_space_punctuation=True" if self.fold_space_punctuation else ""
        sizes = f"{len(self.student)} to {len(self.teacher)} tokens"
        return f"Aligner({sizes}, method={self.method!r}{fold}, num_threads={self.num_threads})"

    def align(
        self, student_ids: Any, teacher_ids: Any, student_mask: Any = None, teacher_mask: Any = None
    ) -> Alignment:
        """Aligns one sample or a batch.

        Releases the GIL; samples are spread over `num_threads` threads; the result does not depend on their number.
        Raises ValueError if a token id is outside the vocabulary, or the numbers of samples or the shapes of the masks
        differ; TypeError if ids are not integers.

        Parameters
        ----------
        student_ids, teacher_ids : int [T], int [B, T], or a list of B sequences
            Token ids as lists, arrays or tensors, or what a tokenizer returns: a ``BatchEncoding``, or the ``Encoding``
            of `tokenizers` or a list of them. Both sides must have the same number of samples.
        student_mask, teacher_mask : same shape as the ids, optional
            0 or False leaves a token out (attention masks). Default: those of encodings. Without a mask, runs of the
            pad token at either end of a sample are left out; where the pad token is also the end token, the first one
            after the text is kept.

        Returns
        -------
        Alignment
            On the CPU. Positions count masked tokens too. A chunk never contains a masked token.
        """
        return self._align(student_ids, teacher_ids, student_mask, teacher_mask)[0]

    def _align(
        self, student_ids: Any, teacher_ids: Any, student_mask: Any, teacher_mask: Any
    ) -> tuple[Alignment, _Batch, _Batch]:
        student = _Batch(student_ids, student_mask, "student")
        teacher = _Batch(teacher_ids, teacher_mask, "teacher")
        if student.is_batch != teacher.is_batch:
            raise ValueError("teacher_ids: expected one sample or a batch, as student_ids is, got the other")
        spans, offsets, predicted, optimal = self._core.align(
            student.rows, student.masks, teacher.rows, teacher.masks,
            _core.AlignMethod[self.method], self.cell_budget, self.num_threads,
        )  # fmt: skip
        arrays = {"spans": spans, "offsets": offsets, "optimal": optimal, "predicted": predicted}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        ids = {"student": student.ids, "teacher": teacher.ids}
        return Alignment._trusted(**tensors, batched=student.is_batch, _ids=ids), student, teacher

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

        A sample that fits is left whole. A longer one is cut, on both sides, after the last chunk that ends within
        both limits, so that neither model reads text that the other never saw.

        Parameters
        ----------
        max_student_length, max_teacher_length : int
            Most tokens of a sample, counted from position 0; ValueError if negative. All else is as for `align`.

        Returns
        -------
        Alignment
            Its `student_ids` and `teacher_ids` are the cut ids, padded with -1 to the longest sample that is left. A
            sample without a chunk within the limits is left empty.
        """
        given = (max_student_length, max_teacher_length)
        limits = int_tensor(given, "max_student_length, max_teacher_length", torch.int64)
        if int(limits.min()) < 0:
            raise ValueError(f"max_student_length, max_teacher_length: expected at least 0, got {given}")
        whole, *batches = self._align(student_ids, teacher_ids, student_mask, teacher_mask)
        lengths = torch.tensor([[len(row) for row in side.rows] for side in batches], dtype=torch.int64, device="cpu").T
        fits = (lengths <= limits).all(dim=1)
        sample, ends = whole.sample_index, whole.spans[:, 1::2].long()
        kept = fits[sample] | (ends <= limits).all(dim=1)
        cuts = torch.zeros_like(lengths).scatter_reduce(0, sample[kept, None].expand(-1, 2), ends[kept], "amax")
        cuts = torch.where(fits[:, None], lengths, cuts)
        ids: dict[str, Any] = {}
        for name, side, cut in zip(("student", "teacher"), batches, cuts.T.tolist(), strict=True):
            rows = [row[:n] for row, n in zip(side.rows, cut, strict=True)]
            ids[name] = rows if whole.batched else torch.from_numpy(rows[0])
        counts = torch.bincount(sample[kept], minlength=len(whole))
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        chunks = {"spans": whole.spans[kept], "predicted": whole.predicted[kept], "offsets": offsets}
        return Alignment._trusted(**chunks, batched=whole.batched, _ids=ids, optimal=whole.optimal)


class _Batch:
    """The ids and the masks of one side, one array a sample; they view the caller's memory where it allows."""

    def __init__(self, ids: Any, mask: Any, side: str) -> None:
        ids, own = _encoded(ids)
        mask = own if mask is None else mask
        self.rows, whole = _rows(ids, f"{side}_ids", torch.int64)
        self.is_batch = whole is None or whole.dim() == 2
        self.ids: Tensor | list[NDArray[np.int64]] = self.rows if whole is None else whole
        self.masks = None if mask is None else _rows(mask, f"{side}_mask", torch.uint8)[0]


def _encoded(value: Any) -> tuple[Any, Any]:
    """The ids of what a tokenizer returns, and its mask; other values as they are."""
    if isinstance(value, Mapping):
        if "input_ids" not in value:
            raise ValueError(f"ids: expected a mapping with input_ids, got {', '.join(map(str, value)) or 'nothing'}")
        return value["input_ids"], value.get("attention_mask")
    several = isinstance(value, (list, tuple)) and len(value) > 0
    if hasattr(value[0] if several else value, "attention_mask"):
        parts = [(one.ids, one.attention_mask) for one in (value if several else [value])]
        ids, masks = ([part[k] for part in parts] for k in (0, 1))
        return (ids, masks) if several else (ids[0], masks[0])
    return value, None


def _rows(value: Any, name: str, dtype: torch.dtype) -> tuple[list[NDArray[Any]], Tensor | None]:
    """The samples of `value`, each a contiguous array, and the tensor [T] or [B, T] that they view, if there is one."""
    if isinstance(value, Ragged):
        return value.rows(), None
    is_mask = dtype == torch.uint8

    def tensor_of(row: Any) -> Tensor:
        wide = int_tensor(row, name, torch.int64, allow_bool=is_mask).cpu()
        return (wide != 0).to(dtype) if is_mask else wide

    def array(row: Any) -> NDArray[Any]:
        if type(row) is np.ndarray and row.dtype == (np.uint8 if is_mask else np.int64):
            return np.ascontiguousarray(row)
        return tensor_of(row).contiguous().numpy()

    if isinstance(value, (list, tuple)) and len(value) > 0 and np.ndim(value[0]) > 0:
        rows = [array(row) for row in value]
        if any(row.ndim != 1 for row in rows):
            raise ValueError(f"{name}: expected one dimension a sample")
        return rows, None
    tensor = tensor_of(value).contiguous()
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{name}: expected shape [T] or [B, T], got {list(tensor.shape)}")
    return list(tensor.reshape(1, -1).numpy() if tensor.dim() == 1 else tensor.numpy()), tensor
