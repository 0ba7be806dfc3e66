"""P-KL: the projected KL divergence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args, overload

import torch
from torch import Tensor

from xtoken.alignment import Alignment, Chunks, Rows
from xtoken.alignment.alignment import as_tensor
from xtoken.losses import diagnostics
from xtoken.losses.backends import Prepared
from xtoken.losses.call import DivergenceOptions, Losses, Unpack, check_choice, check_count, compute, public_loss
from xtoken.losses.columns import DEFAULT_TOP_K, agreeing, agrees, reachable, select_columns
from xtoken.losses.divergence import Divergence, HasDivergence
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits, Source
from xtoken.losses.loss import Matrix, Needs
from xtoken.losses.numerics import EPSILON, scaled, statistics_dtype
from xtoken.losses.operator import Call, register
from xtoken.projection.entries import Entries, project, restrict

Merge = Literal["first", "mean", "chain"]
Support = Literal["all", "reachable"]
MERGES: tuple[str, ...] = get_args(Merge)
SUPPORTS: tuple[str, ...] = get_args(Support)


@register("pkl", "P-KL", Needs.PROJECTION)
@dataclass(frozen=True)
class PKL(HasDivergence):
    """See `pkl_loss`. Kernels and formula get one with `columns`; the first `count` of them, which may be known on the
    device only, are the column set, or all."""

    teacher_ids: ClassVar[tuple[str, ...]] = ("columns",)
    trains_projection: ClassVar[bool] = True
    is_default: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {"all columns": {"top_k": None}, "8192 columns": {}, "all columns, numbers": {"top_k": None, "merge": "mean"}}
    )

    W: Matrix
    columns: Tensor | None
    temperature: float
    top_k: int | None
    merge: str
    reverse: bool
    beta: float
    skew: float
    support: str
    agree: bool
    count: Tensor | None = None  # int32 []

    def __post_init__(self) -> None:
        if self.columns is not None:
            object.__setattr__(self, "columns", as_tensor(self.columns))
        super().__post_init__()
        check_count(self.top_k, "top_k", optional=True)
        check_choice(self.merge, "merge", MERGES)
        check_choice(self.support, "support", SUPPORTS)

    @property
    def realised(self) -> bool:
        return self.merge == "chain" or self.agree

    def prepare(self, call: Call, student: Source, teacher: Source) -> Prepared:
        chunks = agreeing(call, self.W) if self.agree else call.chunks(self.realised)
        if self.realised and not self.agree:
            chunks.check_ids(self.W.shape)
        if self.merge == "first":
            chunks = chunks.first()
        columns = self._columns(teacher, call.student.device, call.backend)
        chosen, count = reachable(columns, self.W) if self.support == "reachable" else (columns, None)
        return Prepared(chunks, replace(self, columns=chosen, count=count))

    def _columns(self, teacher: Source, device: torch.device, backend: str) -> Tensor:
        return select_columns(
            teacher, self.W.shape[1], top_k=self.top_k, columns=self.columns, device=device, backend=backend
        )

    def chosen(self, teacher: Source, device: torch.device, backend: str) -> PKL:
        return replace(self, columns=self._columns(teacher, device, backend))

    @cached_property
    def column_set(self) -> Tensor:
        """int64 [C]: the column set, ascending; waits for the device if it has to count."""
        assert self.columns is not None
        return self.columns if self.count is None else self.columns[: int(self.count)]

    @cached_property
    def entry_index(self) -> Tensor:
        """int64 [E]: the entries of W in the columns."""
        chosen = torch.zeros(self.W.shape[1], dtype=torch.bool, device=self.column_set.device)
        chosen[self.column_set] = True
        return chosen[self.W.col.to(chosen.device)].nonzero()[:, 0]

    @cached_property
    def entries(self) -> Entries:
        """The entries of W in the columns."""
        return restrict(self.W._replace(weight=self.W.weight.detach()), self.column_set)

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        entries = self.entries if weight is None else replace(self.entries, weight=weight[self.entry_index])
        return pkl(student, teacher, chunks, entries, self.column_set, merge=self.merge, **self.arguments())

    def diagnose(
        self, student: Source, teacher: Source, chunks: Chunks, projection: Any, device: torch.device, backend: str
    ) -> Tensor:
        columns = self._columns(teacher, device, backend)
        chosen, count = reachable(columns, self.W) if self.support == "reachable" else (columns, None)
        left_out = ~agrees(chunks, self.W) if self.agree else None
        return diagnostics.in_columns(student, teacher, chunks, chosen, self.W, count, left_out)


def pkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    entries: Entries,
    columns: Tensor,
    *,
    temperature: float = 1.0,
    merge: str = "first",
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
) -> Tensor:
    """Projected KL: the teacher against the student moved to the teacher's vocabulary by W, on the columns C.

    With ``x = W^T p``, for each chunk::

        merge="first"   m = x / (sum_C x + eps)                        first predictor row
                        log q = log_softmax over C of y / tau          first predictor row
                        loss = sum_C q (log q - log(m + eps))
        merge="mean"    as "first", with p and log q averaged over the predictor rows
                        (q is not normalised again)
        merge="chain"   loss = c_T (KL_first + log c_T - log c_S), where c is the product of the
                        probabilities of the realised later tokens of the chunk

    ``reverse=True`` gives ``sum_C m (log(m + eps) - log q)``; with "chain" ``c_S (KL_first + log c_S - log
    c_T)``. The mixed divergences of `xtoken.losses.divergence` are those of q and m, with m + eps in logarithms and
    mixtures; with "chain" those of c_T q and c_S m.

    Parameters
    ----------
    student_logits : [N_s, V_student]
    teacher_logits : [N_t, V_teacher]
    chunks : Chunks
        With realised ids for ``merge="chain"``.
    entries : Entries
        W in the columns; a ``weight`` that requires a gradient gets one.
    columns : int64 [C]
        Teacher ids.

    Returns
    -------
    Tensor
        [K]

    Source: X-Token (arXiv 2605.21699), section on P-KL; ``merge="mean"`` is NeMo-RL's implementation.
    """
    dtype = statistics_dtype(student_logits, teacher_logits)
    merged = chunks if merge == "mean" else chunks.first()
    p = merged.student.mean(scaled(student_logits[merged.student.index()], temperature, dtype).softmax(-1))
    x = project(p, entries, len(columns))
    m = x / (x.sum(-1, keepdim=True) + EPSILON)
    log_m = (m + EPSILON).log()
    y = teacher_logits[merged.teacher.index()].index_select(1, columns)
    log_q = merged.teacher.mean(scaled(y, temperature, dtype).log_softmax(-1))
    divergence = Divergence.of(reverse, beta, skew)
    q = log_q.exp()
    if merge != "chain":
        return divergence(q, log_q, m, log_m) * temperature**2
    log_c_student = _later_log_probability(student_logits, chunks.student, temperature, dtype)
    log_c_teacher = _later_log_probability(teacher_logits, chunks.teacher, temperature, dtype)
    if divergence.is_mixed:
        c_s, c_t = log_c_student[:, None], log_c_teacher[:, None]
        loss = divergence(c_t.exp() * q, c_t + log_q, c_s.exp() * m, c_s + log_m)
    elif divergence.reverse:
        loss = log_c_student.exp() * (divergence(q, log_q, m, log_m) + log_c_student - log_c_teacher)
    else:
        loss = log_c_teacher.exp() * (divergence(q, log_q, m, log_m) + log_c_teacher - log_c_student)
    return loss * temperature**2


def _later_log_probability(logits: Tensor, rows: Rows, temperature: float, dtype: torch.dtype) -> Tensor:
    if rows.next_ids is None:
        raise ValueError("chunks: merge='chain' needs the realised ids, see Chunks.of(realised=True)")
    index, owner = rows.later()
    log_p = scaled(logits[index], temperature, dtype).log_softmax(-1)
    return rows.total(log_p.gather(1, rows.next_ids[index, None])[:, 0], owner)


class PKLOptions(DivergenceOptions, total=False):
    """Keyword arguments of `pkl_loss`, beside ``labels``."""

    top_k: int | None
    merge: Merge
    support: Support
    agree: bool
    columns: Tensor | None


@overload
def pkl_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, projection: Any, *,
    labels: None = None, **options: Unpack[PKLOptions],
) -> Tensor: ...  # fmt: skip
@overload
def pkl_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, projection: Any, *,
    labels: Tensor, **options: Unpack[PKLOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def pkl_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    projection: Any,
    *,
    temperature: float = 1.0,
    top_k: int | None = DEFAULT_TOP_K,
    merge: Merge = "first",
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
    support: Support = "all",
    agree: bool = False,
    columns: Tensor | None = None,
    **call: Any,
) -> Losses:
    """Projected KL: KL(teacher || W^T student) on the teacher's columns C, for each chunk of aligned text.

    The formulas are those of `xtoken.reference.pkl`; a divergence is taken of both sides as they stand there, with a
    floor of 1e-10 under the student's masses, and with "mean" a teacher's that need not sum to 1.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment, projection}
        If ``weight`` requires a gradient, it gets one.
    {labels}
    temperature : float
        Divides all logits, so before the projection; the loss is multiplied by its square.
    top_k : int or None
        C is the ``top_k`` teacher columns with the largest logit in any row of ``teacher_logits`` (lower ids
        first among equals). None: all.
    merge : "first", "mean" or "chain"
        Chunks of several tokens: first predictor rows; mean over the rows; or "first" multiplied by the
        probabilities of the realised later tokens (needs the alignment's ids). The default was the best of the three in
        ``bench/reproduce.py``, where support made no difference.
    {reverse, beta, skew}
    support : "all" or "reachable"
        "reachable" removes from C the columns that no student token reaches under W. If none is left, that is a
        ValueError on the CPU; elsewhere, with ``top_k`` or ``columns``, a check would wait for the device, and the loss
        is nan.
    agree : bool
        Leaves out the chunks that the two tokenizers begin with other text: those where W has no entry for the first
        token of both (needs the alignment's ids). By default they count, as in NeMo-RL.
    columns : int64 [C], optional
        Teacher ids, distinct; replaces ``top_k``. A tensor is checked when it is first used.
    {reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    On CUDA the reference backend adds with atomics.

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
    W = Matrix.of(projection)
    loss = PKL(W, columns, temperature, top_k, merge, reverse, beta, skew, support, agree)
    return compute(loss, student_logits, teacher_logits, alignment, sizes=W.shape, **call)


linear_pkl_loss = linear(pkl_loss)
