"""Cross-entropy and one or several teachers as one training criterion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xtoken import reference
from xtoken.alignment import Alignment
from xtoken.losses._backends import blocks
from xtoken.losses._common import aligned_chunks, check_choice, check_logits, vocabulary_columns
from xtoken.losses.gold import gold_loss, hkl_loss
from xtoken.losses.kd import kd_loss, position_chunks
from xtoken.losses.pkl import pkl_loss, select_columns
from xtoken.losses.uld import uld_loss
from xtoken.reference import Chunks

IGNORED = -100
"""Label of a token that no loss looks at, as in PyTorch and transformers."""

LOSSES = ("pkl", "hkl", "gold", "uld", "kd")
SCALINGS = ("dynamic", "fixed")

Count = int | Tensor


@dataclass(frozen=True)
class Teacher:
    """One teacher of an `XTokenLoss`.

    Parameters
    ----------
    projection : ProjectionMatrix or nn.Module, optional
        W of this student and teacher; a module's parameters become the criterion's. None: the teacher shares
        the student's tokenizer (or ``loss="uld"``, which needs no W).
    loss : "pkl", "hkl", "gold", "uld" or "kd", optional
        Default: "pkl" with a projection, "kd" without.
    weight : float
        Factor of this teacher's loss, >= 0.
    temperature, top_k, merge, reverse, support, uncommon_top_k
        As in the loss functions; each loss takes those that it knows.

    Raises
    ------
    ValueError
        If the loss does not go with the projection, or the weight is negative.
    """

    projection: Any = None
    loss: str | None = None
    weight: float = 1.0
    temperature: float = 1.0
    top_k: int | None = 8192
    merge: str = "first"
    reverse: bool = False
    support: str = "all"
    uncommon_top_k: int = 8192

    def __post_init__(self) -> None:
        if self.loss is None:
            object.__setattr__(self, "loss", "kd" if self.projection is None else "pkl")
        check_choice(str(self.loss), "loss", LOSSES)
        if self.projection is None and self.loss in ("pkl", "hkl", "gold"):
            raise ValueError(f"projection: expected a projection matrix for loss={self.loss!r}, got None")
        if self.projection is not None and self.loss == "kd":
            raise ValueError("projection: expected None for loss='kd' (a shared tokenizer), got one")
        if not 0.0 <= self.weight < float("inf"):
            raise ValueError(f"weight: expected a finite number >= 0, got {self.weight!r}")


class XTokenLoss(nn.Module):
    """Cross-entropy plus distillation: ``ce_weight CE + kd_weight s KD`` with ``KD = sum_m weight_m KD_m``.

    ``scaling="dynamic"`` has s = CE / |KD|, held constant in backward (0 where KD is 0), so that both parts
    weigh the same; ``scaling="fixed"`` has s = 1.

    Parameters
    ----------
    teachers : sequence of Teacher
    scaling : "dynamic" or "fixed"
    ce_weight, kd_weight : float
        >= 0. A part of weight 0 is still reported.
    vocab_size : int, optional
        Columns of the student's logits that belong to tokens. Default: the projections' number of rows, or
        all columns if there is no projection.
    diagnostics : bool
        Also report agreement and mass; costs a part of a forward pass.
    backend : str
        See `select_backend`.

    Source: X-Token (arXiv 2605.21699), training objective.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        scaling: str = "dynamic",
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        *,
        vocab_size: int | None = None,
        diagnostics: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice(scaling, "scaling", SCALINGS)
        for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        sizes = {teacher.projection.shape[0] for teacher in teachers if teacher.projection is not None}
        sizes |= set() if vocab_size is None else {vocab_size}
        if len(sizes) > 1:
            raise ValueError(f"teachers: expected one student vocabulary size, got {sorted(sizes)}")
        self.teachers = tuple(teachers)
        self.scaling = scaling
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.vocab_size = sizes.pop() if sizes else None
        self.diagnostics = diagnostics
        self.backend = backend
        projections = [teacher.projection for teacher in teachers]
        self.projections = nn.ModuleList(W for W in projections if isinstance(W, nn.Module))

    def extra_repr(self) -> str:
        losses = ", ".join(f"{teacher.weight:g} {teacher.loss}" for teacher in self.teachers)
        weights = f"ce_weight={self.ce_weight}, kd_weight={self.kd_weight}"
        return f"teachers=[{losses}], scaling={self.scaling!r}, {weights}"

    def forward(
        self,
        student_logits: Tensor,
        labels: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        alignments: Alignment | Sequence[Alignment | None] | None = None,
        num_items: Count | None = None,
        num_chunks: Count | Sequence[Count] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss and its parts.

        Parameters
        ----------
        student_logits : floating [B, T, V] or [T, V]
        labels : int64 [B, T] or [T]
            Token ids at their own positions, -100 where ignored; row ``t`` is compared with label ``t + 1``.
        teacher_logits : Tensor or sequence of M tensors
            One for each teacher.
        alignments : Alignment or sequence of M, optional
            None for a teacher with ``loss="kd"``: its positions are then those whose next label is not
            ignored.
        num_items, num_chunks : int (or tensor), optional
            What to divide the sums of CE and of each KD by. Default: the number of labels and of chunks in
            this call, giving means. With gradient accumulation or data parallelism pass the sums of `counts`
            over all micro-batches and ranks; the totals of the calls then add up to the loss of the whole
            batch (exactly with "fixed"; "dynamic" takes each call's own ratio). Where gradients are averaged
            over ranks (DDP), multiply the total by the number of ranks. With several teachers, ``num_chunks``
            is a sequence.

        Returns
        -------
        total : Tensor
            Scalar, at least float32.
        parts : dict of detached tensors
            "ce", "kd" : scalar, as they enter the total before scaling and weights.
            "kd_per_teacher" : [M]
            "chunks" : int64 [M], chunks (or positions) of this call.
            "agreement" : [M], share of chunks where the student's largest projected column is the teacher's,
            at the first predictor row, among C; nan where undefined or switched off.
            "mass" : [M], the teacher's mean probability inside C; nan likewise.
        """
        logits = _one_or_many(teacher_logits, len(self.teachers), "teacher_logits")
        aligned = _one_or_many(alignments, len(self.teachers), "alignments")
        divisors = _one_or_many(num_chunks, len(self.teachers), "num_chunks")
        next_labels = _next_labels(student_logits, labels)
        ce_sum, items = self._cross_entropy(student_logits, next_labels)
        ce = ce_sum / (items if num_items is None else num_items)
        kd = ce.new_zeros(())
        done = []
        for teacher, one, alignment, divisor in zip(self.teachers, logits, aligned, divisors, strict=True):
            check_logits(student_logits, one)
            part = self._distil(teacher, student_logits, one, alignment, next_labels != IGNORED, divisor)
            kd = kd + teacher.weight * part.loss
            done.append(part)
        total = self.ce_weight * ce + self.kd_weight * self._factor(ce.detach(), kd.detach()) * kd
        parts = {
            "ce": ce.detach(),
            "kd": kd.detach(),
            "kd_per_teacher": torch.stack([part.loss.detach() for part in done]) if done else ce.new_zeros(0),
            "chunks": torch.tensor([part.chunks for part in done], dtype=torch.int64),
            "agreement": torch.tensor([part.agreement for part in done]),
            "mass": torch.tensor([part.mass for part in done]),
        }
        return total, parts

    def counts(
        self, labels: Tensor, alignments: Alignment | Sequence[Alignment | None] | None = None
    ) -> tuple[int, list[int]]:
        """Labels, and for each teacher chunks, of one call: what ``num_items`` and ``num_chunks`` add up."""
        items = int((labels[..., 1:] != IGNORED).sum())
        aligned = _one_or_many(alignments, len(self.teachers), "alignments")
        return items, [items if one is None else int(reference.predictable(one).sum()) for one in aligned]

    def _factor(self, ce: Tensor, kd: Tensor) -> Tensor | float:
        if self.scaling == "fixed":
            return 1.0
        return torch.where(kd == 0, 0.0, ce / kd.abs())

    def _cross_entropy(self, student_logits: Tensor, next_labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = student_logits[..., : self.vocab_size]
        logits = logits.reshape(-1, logits.shape[-1])
        dtype = torch.promote_types(logits.dtype, torch.float32)
        targets = next_labels.flatten()
        loss = nn.functional.cross_entropy(logits.to(dtype), targets, ignore_index=IGNORED, reduction="sum")
        return loss, (targets != IGNORED).sum().clamp_min(1)

    def _distil(
        self,
        teacher: Teacher,
        student_logits: Tensor,
        teacher_logits: Tensor,
        alignment: Alignment | None,
        mask: Tensor,
        divisor: Count | None,
    ) -> _Distilled:
        student, teacher_part = self._vocabulary(teacher, student_logits, teacher_logits)
        if alignment is not None:
            chunks = aligned_chunks(alignment, student, teacher_part)
        elif teacher.loss == "kd":
            chunks = position_chunks(student_logits, teacher_logits, mask)
        else:
            raise ValueError(f"alignments: expected an Alignment for loss={teacher.loss!r}, got None")
        W, columns = teacher.projection, None
        if teacher.loss == "pkl" or (self.diagnostics and W is not None):
            columns = select_columns(teacher_part, W, top_k=teacher.top_k, support=teacher.support)
        elif self.diagnostics and teacher.loss == "kd":
            columns = reference.column_set(teacher_part, teacher.top_k)
        inputs: list[Any] = [student_logits, teacher_logits, alignment]
        shared: dict[str, Any] = {
            "temperature": teacher.temperature,
            "reduction": "sum",
            "backend": self.backend,
        }
        if teacher.loss == "kd":
            shared.update(reverse=teacher.reverse, top_k=teacher.top_k, vocab_size=student.shape[-1])
            loss = kd_loss(*inputs, mask=mask if alignment is None else None, **shared)
        elif teacher.loss == "uld":
            sizes = student.shape[-1], teacher_part.shape[-1]
            loss = uld_loss(*inputs, student_vocab_size=sizes[0], teacher_vocab_size=sizes[1], **shared)
        elif teacher.loss == "pkl":
            shared.update(reverse=teacher.reverse, merge=teacher.merge, columns=columns)
            inputs.append(W)
            loss = pkl_loss(*inputs, **shared)
        else:
            shared.update(reverse=teacher.reverse, uncommon_top_k=teacher.uncommon_top_k)
            inputs.append(W)
            loss = (hkl_loss if teacher.loss == "hkl" else gold_loss)(*inputs, **shared)
        loss = loss / (max(len(chunks), 1) if divisor is None else divisor)
        agreement = mass = math.nan
        if self.diagnostics and columns is not None and len(chunks):
            agreement, mass = _diagnose(student, teacher_part, chunks.first(), columns, W)
        return _Distilled(loss, len(chunks), agreement, mass)

    def _vocabulary(self, teacher: Teacher, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both logits as [B, T, V], without the columns that belong to no token."""
        sizes: tuple[int | None, int | None] = self.vocab_size, None
        if teacher.projection is not None:
            sizes = teacher.projection.shape
        elif teacher.loss == "kd":
            sizes = (self.vocab_size or min(student_logits.shape[-1], teacher_logits.shape[-1]),) * 2
        return (
            vocabulary_columns(student_logits, sizes[0], "student_logits"),
            vocabulary_columns(teacher_logits, sizes[1], "teacher_logits"),
        )


class _Distilled(NamedTuple):
    loss: Tensor
    chunks: int
    agreement: float
    mass: float


@torch.no_grad()
def _diagnose(
    student: Tensor, teacher: Tensor, chunks: Chunks, columns: Tensor, projection: Any
) -> tuple[float, float]:
    """Mean top-1 agreement and mass of C over the chunks, block by block."""
    entries = None if projection is None else reference.restrict(projection, columns)
    agreed, mass = 0.0, 0.0
    for block in blocks(student, teacher, chunks):
        rows = block.student, block.teacher
        agreed += float(reference.agreement(*rows, block.chunks, columns, entries).sum())
        mass += float(reference.column_mass(block.teacher, block.chunks.teacher, columns).sum())
    return agreed / len(chunks), mass / len(chunks)


def _next_labels(student_logits: Tensor, labels: Tensor) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected an integer tensor, got {got}")
    if labels.shape != student_logits.shape[:-1]:
        expected = list(student_logits.shape[:-1])
        raise ValueError(f"labels: expected shape {expected} (that of the logits' rows), got {list(labels.shape)}")
    return nn.functional.pad(labels[..., 1:].long(), (0, 1), value=IGNORED)


def _one_or_many(value: Any, count: int, name: str) -> list[Any]:
    """``value`` as one item for each teacher."""
    if value is None:
        return [None] * count
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(items) != count:
        raise ValueError(f"{name}: expected one for each of the {count} teachers, got {len(items)}")
    return items
