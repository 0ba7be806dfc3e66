"""Losses that compare common tokens pair by pair and the others by rank: what they share, and their kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from xtoken.alignment import Chunks, Rows
from xtoken.losses import diagnostics
from xtoken.losses.backends import Prepared
from xtoken.losses.cached import Cached
from xtoken.losses.call import DivergenceOptions, check_count
from xtoken.losses.columns import agreeing, agrees
from xtoken.losses.divergence import Divergence, HasDivergence
from xtoken.losses.logits import Source
from xtoken.losses.loss import Loss, Matrix
from xtoken.losses.numerics import check_number, scaled, sorted_l1, statistics_dtype
from xtoken.losses.operator import Call
from xtoken.projection.entries import common_pairs

DEFAULT_UNCOMMON_TOP_K = 8192


class RankedOptions(DivergenceOptions, total=False):
    """Keyword arguments of a loss on pairs and ranks, beside ``labels``."""

    uncommon_top_k: int
    agree: bool


@dataclass(frozen=True)
class PairedLoss(HasDivergence):
    """KL on the common tokens, which rows of W with a dominant weight name, and L1 between the sorted others. Kernels
    and formula get one with their ids."""

    by_rank: ClassVar[bool] = True

    W: Matrix
    temperature: float
    uncommon_top_k: int
    reverse: bool
    beta: float
    skew: float
    agree: bool
    min_weight: float
    common_students: Tensor | None = None  # int64 [P]
    common_teachers: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.uncommon_top_k, "uncommon_top_k", least=0)
        check_number(self.min_weight, "min_weight")
        if not 0.0 < self.min_weight <= 1.0:
            raise ValueError(f"min_weight: expected a number in (0, 1], got {self.min_weight!r}")

    @property
    def realised(self) -> bool:
        return self.agree

    def check(self) -> None:
        super().check()
        pairs_of(self.W, self.min_weight, self.W.col.device)

    def prepare(self, call: Call, student: Source, teacher: Source) -> Prepared:
        students, teachers = pairs_of(self.W, self.min_weight, call.student.device)
        chunks = agreeing(call, self.W) if self.agree else call.chunks(self.realised)
        return Prepared(chunks, replace(self, common_students=students, common_teachers=teachers))

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Student ids and teacher ids, int64 [P], of the common tokens."""
        assert self.common_students is not None
        assert self.common_teachers is not None
        return self.common_students, self.common_teachers

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        options = {"uncommon_top_k": self.uncommon_top_k, **self.arguments()}
        common, uncommon = ranked(student, teacher, chunks, self.pairs, **options)
        return common + uncommon

    def diagnose(
        self, student: Source, teacher: Source, chunks: Chunks, projection: Any, device: torch.device, backend: str
    ) -> Tensor:
        left_out = ~agrees(chunks, self.W) if self.agree else None
        return diagnostics.by_projection(student, teacher, chunks, projection, device, backend, left_out)


_PAIRS = Cached[tuple[Tensor, Tensor]]()


def pairs_of(W: Matrix, min_weight: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """`xtoken.reference.common_pairs` on a device; kept while W lives and stays as it is."""

    def find() -> tuple[Tensor, Tensor]:
        student, teacher = common_pairs(W, min_weight)
        if not len(student):
            raise ValueError(
                f"projection: expected pairs of common tokens, got none: no row of W has a weight of {min_weight:g} or "
                "more, so all tokens would be compared by rank"
            )
        return student.to(device), teacher.to(device)

    parts = tuple(part for part in (W.col, W.row_ptr, W.weight, W.kind) if part is not None)
    return _PAIRS.of(parts, find, min_weight, device)


def ranked(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chunks: Chunks,
    pairs: tuple[Tensor, Tensor],
    *,
    uncommon_top_k: int = 8192,
    temperature: float = 1.0,
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """KL on common pairs, sorted L1 on the rest; losses differ in the pairs (see `common_pairs`).

    With ``lp``, ``lq`` the log_softmax over the whole vocabulary, averaged over the chunk's predictor rows::

        common = sum over pairs of exp(lq) (lq - lp)             reverse: exp(lp) (lp - lq)
        uncommon = sum_i |P_i - Q_i|

    where P, Q are the largest probabilities outside the pairs, descending, ``min(uncommon_top_k, |P|, |Q|)``
    of them. Equal probabilities of the student share their gradient. Other divergences of the common part are those of
    `xtoken.losses.divergence`.

    Parameters
    ----------
    student_logits : [N_s, V_student]
    teacher_logits : [N_t, V_teacher]
    chunks : Chunks
    pairs : (int64 [P], int64 [P])
        Student ids and teacher ids.

    Returns
    -------
    common, uncommon : [K]
        The loss is their sum.

    Source: Hugging Face TRL; X-Token (arXiv 2605.21699).
    """
    dtype = statistics_dtype(student_logits, teacher_logits)
    lp = chunk_log_probabilities(student_logits, chunks.student, temperature, dtype)
    lq = chunk_log_probabilities(teacher_logits, chunks.teacher, temperature, dtype)
    lp_common, lq_common = lp.index_select(1, pairs[0]), lq.index_select(1, pairs[1])
    common = Divergence.of(reverse, beta, skew)(lq_common.exp(), lq_common, lp_common.exp(), lp_common)
    p = lp.index_select(1, _others(pairs[0], lp.shape[1])).exp()
    q = lq.index_select(1, _others(pairs[1], lq.shape[1])).exp()
    uncommon = sorted_distance(p, q, min(uncommon_top_k, p.shape[1], q.shape[1]))
    return common * temperature**2, uncommon * temperature**2


def chunk_log_probabilities(logits: Tensor, rows: Rows, temperature: float, dtype: torch.dtype) -> Tensor:
    """Mean over the rows of log_softmax, with the logits averaged by themselves: equal sums stay equal."""
    z = scaled(logits[rows.index()], 1.0, dtype)
    z = z - z.detach().amax(-1, keepdim=True)
    normaliser = (z / temperature).exp().sum(-1, keepdim=True).log()
    return rows.mean(z) / temperature - rows.mean(normaliser)


def sorted_distance(p: Tensor, q: Tensor, count: int) -> Tensor:
    """`sorted_l1` for autograd: [K], whose derivative in p is its slope."""
    distance, slope = sorted_l1(p.detach(), q, count)
    return distance + (slope * (p - p.detach())).sum(-1)


def _others(ids: Tensor, size: int) -> Tensor:
    rest = torch.ones(size, dtype=torch.bool, device=ids.device)
    rest[ids] = False
    return rest.nonzero()[:, 0]


@dataclass(frozen=True)
class UnpairedLoss(Loss):
    """L1 between all tokens, sorted."""

    by_rank: ClassVar[bool] = True
    whole_rows: ClassVar[str] = "it sorts the probabilities of the whole vocabulary"

    temperature: float

    def fields(self) -> dict[str, Any]:
        """What kernels are told of it."""
        return {"temperature": self.temperature, **Divergence.of().fields()}
