"""P-KL: the projected KL divergence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xtoken import reference
from xtoken.alignment import Alignment, Chunks, synchronized, to_device
from xtoken.losses.backends import select
from xtoken.losses.call import (
    Losses,
    Matrix,
    check_choice,
    check_count,
    check_projection,
    compute,
    given_chunks,
    given_matrix,
)
from xtoken.losses.logits import BLOCK_ELEMENTS, AnyLogits, DenseSource, Source
from xtoken.losses.operator import PREPARE, Inputs, Prepared, Settings
from xtoken.projection import Entries, restrict

MERGES = ("first", "mean", "chain")
SUPPORTS = ("all", "reachable")


@dataclass(frozen=True)
class PklOptions:
    """W, the teacher's columns, and the switches.

    The column set is the first `count` of `chosen` [N] (distinct teacher ids), or all of them: how many they are may be
    known on the device only.
    """

    operation: ClassVar[str] = "pkl"
    projection: Matrix
    chosen: Tensor
    count: Tensor | None  # int32 []
    temperature: float
    merge: str
    reverse: bool

    @cached_property
    def columns(self) -> Tensor:
        """int64 [C]: the column set, ascending; waits for the device if it has to count."""
        return self.chosen if self.count is None else self.chosen[: int(self.count)]

    @cached_property
    def entry_index(self) -> Tensor:
        """int64 [E]: the entries of W in the columns."""
        chosen = torch.zeros(self.projection.shape[1], dtype=torch.bool, device=self.columns.device)
        chosen[self.columns] = True
        return chosen[self.projection.col.to(chosen.device)].nonzero()[:, 0]

    @cached_property
    def entries(self) -> Entries:
        """The entries of W in the columns."""
        return restrict(self.projection._replace(weight=self.projection.weight.detach()), self.columns)

    def reference(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None) -> Tensor:
        """See `xtoken.reference.pkl`; `weight` replaces the weights of W."""
        return reference.pkl(
            student,
            teacher,
            chunks,
            self.entries if weight is None else replace(self.entries, weight=weight[self.entry_index]),
            self.columns,
            temperature=self.temperature,
            merge=self.merge,
            reverse=self.reverse,
        )


def pkl_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    projection: Any,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = 8192,
    merge: str = "first",
    reverse: bool = False,
    reduction: str = "mean",
    support: str = "all",
    columns: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> Losses:
    """Projected KL: KL(teacher || W^T student) on the teacher's columns C, for each chunk of aligned text.

    The formulas are those of `xtoken.reference.pkl`. Forward computes the gradient at once, in the student
    logits' type and size; other temporaries are bounded by a block of chunks. Backward only scales it (with
    ``reduction="none"`` it computes it, and so does a second backward through the same graph). The teacher's
    logits get no gradient. Second derivatives raise RuntimeError. Works inside ``torch.compile``.

    Parameters
    ----------
    student_logits : float16, bfloat16, float32 or float64 [B, T_s, >= V_student], or [T_s, >= V_student]
        Row ``t`` predicts token ``t + 1``. Columns beyond the vocabulary take no part and get zero gradient. Or
        `LinearLogits`: hidden states and output layer, see `linear_pkl_loss`.
    teacher_logits : floating [B, T_t, >= V_teacher], or [T_t, >= V_teacher]
        On the same device. Or `TopKLogits` (a cached or served teacher), or `LinearLogits`.
    alignment : Alignment
        Of the same batch. Chunks without a predictor on either side are left out.
    projection : ProjectionMatrix
        W [V_student, V_teacher]; or any object with ``row_ptr``, ``col``, ``weight`` and ``shape``. If
        ``weight`` requires a gradient, it gets one.
    labels : int64 [B, T_s] or [T_s], optional
        Token ids at their own positions, -100 where ignored. Also returns the student's next-token
        cross-entropy, from the same pass over the logits. Ids that do not fit raise ValueError on the CPU; elsewhere
        a check would wait for the device, and they make the cross-entropy nan.
    temperature : float
        Divides all logits; the loss is multiplied by its square.
    top_k : int or None
        C is the ``top_k`` teacher columns with the largest logit in any row of ``teacher_logits`` (lower ids
        first among equals). None: all.
    merge : "first", "mean" or "chain"
        Chunks of several tokens: first predictor rows; mean over the rows; or "first" multiplied by the
        probabilities of the realised later tokens (needs the alignment's ids). The default was the best of the three in
        ``bench/reproduce.py``, where support made no difference.
    reverse : bool
        KL(W^T student || teacher).
    reduction : "mean", "sum" or "none"
        "mean" is over the chunks used; no chunk gives 0. "none" gives the losses of all chunks of the
        alignment [K], 0 where a chunk has no predictor.
    support : "all" or "reachable"
        "reachable" removes from C the columns that no student token reaches under W. If none is left, that is a
        ValueError on the CPU; elsewhere, with ``top_k`` or ``columns``, a check would wait for the device, and the loss
        is nan.
    columns : int64 [C], optional
        Teacher ids, distinct; replaces ``top_k``. A tensor is checked when it is first used.
    inplace : bool
        The gradient overwrites ``student_logits``, whose values are lost. Only for contiguous logits that a
        model computed, without labels, outside ``torch.compile``.
    backend : "auto", "reference", ...
        See `select_backend`.

    Returns
    -------
    Tensor, or with ``labels`` a pair (loss, cross-entropy)
        Scalar, or [K] for ``reduction="none"`` (not with labels); float32, or float64 if an input is. The
        cross-entropy is a mean over labels, or for ``reduction="sum"`` their sum. Deterministic on the CPU; on
        CUDA the reference backend adds with atomics.

    Raises
    ------
    ValueError, TypeError
        For shapes, types or options that do not fit; the message names the argument.
    RuntimeError
        If the backend cannot do it.

    Source: X-Token (arXiv 2605.21699); ``merge="mean"`` follows NVIDIA NeMo-RL.

    Examples
    --------
    >>> import torch, xtoken
    >>> W = xtoken.ProjectionMatrix.from_topk([[0], [1], [2]], [[1.0], [1.0], [1.0]], teacher_vocab_size=3)
    >>> same = xtoken.Alignment([[1, 2, 1, 2], [2, 3, 2, 3]])
    >>> student = torch.zeros(3, 3, requires_grad=True)
    >>> loss = xtoken.pkl_loss(student, torch.zeros(3, 3), same, W)
    >>> f"{loss.item():.4f}"
    '0.0000'
    """
    check_projection(projection)
    check_count(top_k, "top_k", optional=True)
    check_choice(merge, "merge", MERGES)
    check_choice(support, "support", SUPPORTS)
    return compute(
        "pkl",
        student_logits,
        teacher_logits,
        alignment,
        sizes=tuple(projection.shape),
        projection=projection,
        columns=columns,
        labels=labels,
        reduction=reduction,
        backend=backend,
        inplace=inplace,
        temperature=temperature,
        reverse=reverse,
        merge=merge,
        support=support,
        top_k=top_k,
    )


def _prepare(inputs: Inputs, settings: Settings, student: Source, teacher: Source) -> Prepared:
    W = given_matrix(inputs, settings)
    chunks = given_chunks(inputs, student, teacher, realised=settings.merge == "chain")
    if settings.merge == "first":
        chunks = chunks.first()
    if settings.merge == "chain":
        _check_realised(chunks.host, W.shape)
    columns = select_columns(
        teacher, W, top_k=settings.top_k, columns=inputs.columns, device=inputs.student.device, backend=settings.backend
    )
    chosen, count = reachable(columns, W) if settings.support == "reachable" else (columns, None)
    return Prepared(chunks, PklOptions(W, chosen, count, settings.temperature, settings.merge, settings.reverse))


PREPARE["pkl"] = _prepare


def select_columns(
    teacher: Source,
    projection: Any,
    *,
    top_k: int | None = 8192,
    columns: Tensor | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """The column set C that `pkl_loss` uses with ``support="all"``: int64 [C], ascending, on ``device``."""
    width = projection.shape[1]
    if columns is None:
        columns = teacher_columns(teacher, top_k, device, backend)
    else:
        columns = _checked_columns(columns, width, torch.device(device))
    if columns.device.type != "cpu":
        _COLUMNS[columns] = _Columns(columns._version, width, {columns.device: columns})
    return columns


def reachable(columns: Tensor, projection: Any) -> tuple[Tensor, Tensor | None]:
    """Those of the columns that W reaches, and None.

    On a device, where their number would have to be waited for: all columns, those that W reaches first, and the number
    (int32 []).
    """
    known = _reached(projection, columns.device)
    if len(columns) == projection.shape[1]:
        ids, count = known.ids, None
    else:
        outside = ~known.mask[columns]
        if columns.device.type == "cpu":
            ids, count = columns[~outside], None
        else:
            ids = columns[outside.to(torch.uint8).argsort(stable=True)]
            count = (len(columns) - outside.sum()).to(torch.int32)
    if ids.numel() == 0 or known.ids.numel() == 0:
        raise ValueError("support: expected a column that the projection reaches, got none; use support='all'")
    return ids, count


class _Reached(NamedTuple):
    """The teacher ids that W reaches, on one device."""

    ids: Tensor  # int64, ascending
    mask: Tensor  # bool [V_teacher]


def _reached(projection: Any, device: torch.device) -> _Reached:
    """Looked at once, and kept for as long as W lives."""
    kept: dict[Any, _Reached] = _REACHED.setdefault(projection.col, {})
    key = device, projection.shape[1], projection.col._version
    if key not in kept:
        mask = torch.zeros(projection.shape[1], dtype=torch.bool, device=device)
        mask[projection.col.to(device).long()] = True
        kept[key] = _Reached(synchronized(mask.nonzero()[:, 0]), mask)
    return kept[key]


def teacher_columns(teacher: Source, top_k: int | None, device: torch.device | str, backend: str = "auto") -> Tensor:
    """`xtoken.reference.column_set` for logits of any kind, by a backend."""
    column_set = select(backend, torch.device(device)).column_set
    if isinstance(teacher, DenseSource):
        return column_set(teacher.logits, top_k)
    total = teacher.samples * teacher.length
    if top_k is None or top_k >= teacher.size or total == 0:
        return torch.arange(teacher.size if top_k is None else min(top_k, teacher.size), device=device)
    step = max(1, BLOCK_ELEMENTS // teacher.size)
    maxima = [teacher.rows(first, min(total, first + step)).amax(0) for first in range(0, total, step)]
    return column_set(torch.stack(maxima)[None], top_k)


class _Columns(NamedTuple):
    """Given columns that are known to be right, ascending, by device."""

    version: int
    width: int
    ordered: dict[torch.device, Tensor]


_COLUMNS: Any = WeakIdKeyDictionary()
"""By the tensor that was given: `_Columns`. On a device it is looked at once, and not again at every step."""

_REACHED: Any = WeakIdKeyDictionary()
"""By the tensor of W's column ids: {(device, V_teacher, version): _Reached}."""


def _checked_columns(given: Any, width: int, device: torch.device) -> Tensor:
    if not isinstance(given, Tensor):
        return to_device(_ordered_columns(torch.as_tensor(given), width), device)
    known: _Columns | None = _COLUMNS.get(given)
    if known is None or known.version != given._version or known.width != width:
        ordered = _ordered_columns(given, width)
        known = _COLUMNS[given] = _Columns(given._version, width, {ordered.device: ordered})
    if device not in known.ordered:
        known.ordered[device] = next(iter(known.ordered.values())).to(device)
    return known.ordered[device]


def _ordered_columns(ids: Tensor, width: int) -> Tensor:
    if ids.dim() != 1 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"columns: expected teacher ids [C], got {ids.dtype} of shape {list(ids.shape)}")
    ordered: Tensor = ids.long().sort().values
    low, high = int(ordered[0]), int(ordered[-1])
    if low < 0 or high >= width:
        raise ValueError(f"columns: expected ids in 0 ... {width - 1}, got {low if low < 0 else high}")
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise ValueError("columns: expected distinct ids, got one twice")
    return ordered


def _check_realised(chunks: Chunks, shape: tuple[int, int]) -> None:
    for name, rows, size in (("student", chunks.student, shape[0]), ("teacher", chunks.teacher, shape[1])):
        if rows.next_ids is None:
            continue
        ids = rows.next_ids[rows.later()[0]]
        bad = (ids < 0) | (ids >= size)
        if bool(bad.any()):
            raise ValueError(
                f"alignment: expected {name}_ids in 0 ... {size - 1} within chunks, got {int(ids[bad][0])}"
            )
