"""Cross-entropy and one or several teachers as one training criterion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xtoken.alignment import Alignment, Chunks, predictable, to_device
from xtoken.losses.backends import IGNORED
from xtoken.losses.call import (
    check_alignment,
    check_choice,
    check_logits,
    checked_labels,
    device_of,
    source,
    width_of,
)
from xtoken.losses.diagnostics import NAMES, diagnose, diagnose_events, nothing
from xtoken.losses.gold import gold_loss, hkl_loss
from xtoken.losses.kd import kd_loss, position_chunks
from xtoken.losses.logits import AnyLogits, Source
from xtoken.losses.operator import Expected, at_least_one
from xtoken.losses.pkl import pkl_loss, reachable, select_columns, teacher_columns
from xtoken.losses.prefix_kl import prefix_kl_loss
from xtoken.losses.uld import uld_loss
from xtoken.pieces import PieceIndex

LOSSES = ("pkl", "hkl", "gold", "uld", "kd", "prefix")
SCALINGS = ("dynamic", "fixed")

Count = int | Tensor


@dataclass(frozen=True)
class Teacher:
    """One teacher of an `XTokenLoss`.

    Parameters
    ----------
    projection : ProjectionMatrix or nn.Module, optional
        W of this student and teacher; a module's parameters become the criterion's. None: the teacher shares
        the student's tokenizer (or has a loss that needs no W: "uld", "prefix").
    loss : "pkl", "hkl", "gold", "uld", "kd" or "prefix", optional
        Default: "pkl" with a projection, "prefix" with pieces, else "kd".
    weight : float
        Factor of this teacher's loss, >= 0.
    temperature, top_k, merge, reverse, support, columns, uncommon_top_k
        As in the loss functions; each loss takes those that it knows. With ``top_k`` P-KL chooses its columns by
        the teacher's logits of the call, so a batch and its micro-batches do not see quite the same ones; with
        ``columns``, or ``top_k=None``, they do.
    pieces : PieceIndex, optional
        Of this student and teacher, for ``loss="prefix"``.

    Raises
    ------
    ValueError
        If the loss does not go with the projection or the pieces, or the weight is negative.
    """

    projection: Any = None
    loss: str | None = None
    weight: float = 1.0
    temperature: float = 1.0
    top_k: int | None = 8192
    merge: str = "first"
    reverse: bool = False
    support: str = "all"
    columns: Tensor | None = None
    uncommon_top_k: int = 8192
    pieces: PieceIndex | None = None

    def __post_init__(self) -> None:
        if self.loss is None:
            default = "prefix" if self.pieces is not None else "kd"
            object.__setattr__(self, "loss", default if self.projection is None else "pkl")
        check_choice(str(self.loss), "loss", LOSSES)
        if self.projection is None and self.loss in ("pkl", "hkl", "gold"):
            raise ValueError(f"projection: expected a projection matrix for loss={self.loss!r}, got None")
        if self.projection is not None and self.loss == "kd":
            raise ValueError("projection: expected None for loss='kd' (a shared tokenizer), got one")
        if self.projection is not None and self.loss == "prefix":
            raise ValueError("projection: expected None for loss='prefix', which needs no weights, got one")
        if (self.pieces is None) == (self.loss == "prefix"):
            expected, got = ("a PieceIndex", "None") if self.pieces is None else ("None", "one")
            raise ValueError(f"pieces: expected {expected} for loss={self.loss!r}, got {got}")
        if not 0.0 <= self.weight < float("inf"):
            raise ValueError(f"weight: expected a finite number >= 0, got {self.weight!r}")

    @property
    def shape(self) -> tuple[int, int] | None:
        """Sizes of the student's and the teacher's vocabulary, where W or the pieces tell."""
        known = self.pieces if self.projection is None else self.projection
        return None if known is None else known.shape


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
        Columns of the student's logits that belong to tokens. Default: as the projections and
        pieces say, or all columns if there is neither.
    diagnostics : bool
        Also report agreement and mass, of at most 256 chunks of a call. May be changed at any time.
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
        sizes = {teacher.shape[0] for teacher in teachers if teacher.shape is not None}
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
        teacher_logits: AnyLogits | Sequence[AnyLogits],
        alignments: Alignment | Sequence[Alignment | None] | None = None,
        num_items: Count | None = None,
        num_chunks: Count | Sequence[Count] | None = None,
        scale: float | Tensor | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
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
            batch, and so do "ce" and "kd". Where gradients are averaged over ranks (DDP), multiply the total by
            the number of ranks. With several teachers, ``num_chunks`` is a sequence.
        scale : float or scalar tensor, optional
            The factor s. Default: 1 for ``scaling="fixed"``, this call's own CE / |KD| for "dynamic", which
            differs between micro-batches and ranks; to have one for them all, give it, or (for ranks) `reduce`.
        reduce : callable, optional
            Sums a small tensor over the ranks; "dynamic" then has the ratio of CE and KD of all ranks. Every rank
            must make the call.

        Returns
        -------
        total : Tensor
            Scalar, at least float32.
        parts : dict of detached tensors
            On the device of the logits; nothing here waits for their values.
            "ce", "kd" : scalar, as they enter the total before scaling and weights.
            "scale" : scalar, the factor s of KD.
            "kd_per_teacher" : [M]
            "chunks" : int64 [M], chunks (or positions) of this call; on the CPU, unless only a device knows them.
            "agreement" : [M], share of chunks where the student's largest projected column is the teacher's,
            at the first predictor row, among C; for "prefix" their most probable event; nan where undefined or
            switched off.
            "mass" : [M], the teacher's mean probability inside C; nan likewise.
            "outside" : [M], the student's mean probability that W sends to no column of C; nan likewise.
        """
        logits = _one_or_many(teacher_logits, len(self.teachers), "teacher_logits")
        aligned = _one_or_many(alignments, len(self.teachers), "alignments")
        divisors = _one_or_many(num_chunks, len(self.teachers), "num_chunks")
        checked_labels(student_logits, labels)
        mask = _following(labels) != IGNORED
        items = mask.sum().clamp_min(1) if num_items is None else num_items
        known = 1.0 if scale is None and self.scaling == "fixed" else scale
        # The factors of the sums of KD (but for the teacher's weight and divisor) and of CE, where they are known yet.
        factors = None if known is None else (self.kd_weight * known, self.ce_weight / items)
        ce_sum: Tensor | None = None
        kd: Tensor | None = None
        done = []
        for teacher, one, alignment, divisor in zip(self.teachers, logits, aligned, divisors, strict=True):
            check_logits(student_logits, one)
            # The first teacher's loss brings the cross-entropy along, from the same pass over the student's logits.
            wanted = labels if ce_sum is None else None
            part = self._distil(teacher, student_logits, one, alignment, mask, divisor, wanted, factors)
            ce_sum = part.cross_entropy if ce_sum is None else ce_sum
            kd = teacher.weight * part.loss if kd is None else kd + teacher.weight * part.loss
            done.append(part)
        if ce_sum is None or kd is None:
            ce_sum = self._cross_entropy(student_logits, labels)
            kd = ce_sum.new_zeros(())
        ce = ce_sum / items
        if scale is None:
            scale = self._ratio(ce.detach(), kd.detach(), reduce)
        total = self.ce_weight * ce + self.kd_weight * scale * kd
        diagnoses = torch.stack([part.diagnosis for part in done]) if done else ce.new_zeros(0, len(NAMES))
        parts = {
            "ce": ce.detach(),
            "kd": kd.detach(),
            "scale": scale.detach().to(kd) if isinstance(scale, Tensor) else kd.new_full((), scale),
            "kd_per_teacher": torch.stack([part.loss.detach() for part in done]) if done else ce.new_zeros(0),
            "chunks": _numbers([part.chunks for part in done], kd.device),
            **dict(zip(NAMES, diagnoses.unbind(1), strict=True)),
        }
        return total, parts

    def counts(
        self, labels: Tensor, alignments: Alignment | Sequence[Alignment | None] | None = None
    ) -> tuple[int, list[int]]:
        """Labels, and for each teacher chunks, of one call: what ``num_items`` and ``num_chunks`` add up."""
        items = int((labels[..., 1:] != IGNORED).sum())
        aligned = _one_or_many(alignments, len(self.teachers), "alignments")
        return items, [items if one is None else int(predictable(one).sum()) for one in aligned]

    def _ratio(self, ce: Tensor, kd: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> Tensor | float:
        if self.scaling == "fixed":
            return 1.0
        if reduce is not None:
            ce, kd = reduce(torch.stack([ce, kd.to(ce.dtype)]))
        return torch.where(kd == 0, 0.0, ce / kd.abs())

    def _cross_entropy(self, student_logits: Tensor, labels: Tensor) -> Tensor:
        logits = student_logits[..., : self.vocab_size].flatten(0, -2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = _following(labels).flatten()
        return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    def _distil(
        self,
        teacher: Teacher,
        student_logits: AnyLogits,
        teacher_logits: AnyLogits,
        alignment: Alignment | None,
        mask: Tensor,
        divisor: Count | None,
        labels: Tensor | None,
        factors: tuple[float | Tensor, float | Tensor] | None,
    ) -> _Distilled:
        student, teacher_source = self._sources(teacher, student_logits, teacher_logits)
        device = device_of(student_logits)
        if alignment is not None:
            check_alignment(alignment, student.samples)
            chunks = Chunks.of(alignment, student.length, teacher_source.length, device)
        elif teacher.loss == "kd":
            chunks = position_chunks(mask.numel(), mask, device)
        else:
            raise ValueError(f"alignments: expected an Alignment for loss={teacher.loss!r}, got None")
        W, columns = teacher.projection, None
        if teacher.loss == "pkl" or (self.diagnostics and W is not None):
            columns = select_columns(
                teacher_source,
                W,
                top_k=teacher.top_k,
                columns=teacher.columns,
                device=device,
                backend=self.backend,
            )
        elif self.diagnostics and teacher.loss == "kd":
            columns = teacher_columns(teacher_source, teacher.top_k, device, self.backend)
        divisor = at_least_one(chunks.number) if divisor is None else divisor
        inputs: list[Any] = [student_logits, teacher_logits, alignment]
        shared: dict[str, Any] = {
            "temperature": teacher.temperature,
            "reduction": "sum",
            "backend": self.backend,
            "labels": labels,
        }
        if factors is not None:
            of_loss = _scalar(factors[0] * teacher.weight / divisor, device)
            of_loss = torch.where(of_loss == 0, 1.0, of_loss)
            shared["labels"] = Expected(labels, of_loss, _scalar(factors[1], device))
        if teacher.loss == "kd":
            shared.update(reverse=teacher.reverse, top_k=teacher.top_k, vocab_size=student.size)
            result = kd_loss(*inputs, mask=mask if alignment is None else None, **shared)
        elif teacher.loss == "uld":
            sizes = student.size, teacher_source.size
            result = uld_loss(*inputs, student_vocab_size=sizes[0], teacher_vocab_size=sizes[1], **shared)
        elif teacher.loss == "prefix":
            assert teacher.pieces is not None
            shared.update(reverse=teacher.reverse)
            inputs.append(teacher.pieces)
            result = prefix_kl_loss(*inputs, **shared)
        elif teacher.loss == "pkl":
            shared.update(reverse=teacher.reverse, merge=teacher.merge, columns=columns, support=teacher.support)
            inputs.append(W)
            result = pkl_loss(*inputs, **shared)
        else:
            shared.update(reverse=teacher.reverse, uncommon_top_k=teacher.uncommon_top_k)
            inputs.append(W)
            result = (hkl_loss if teacher.loss == "hkl" else gold_loss)(*inputs, **shared)
        loss, cross_entropy = result if isinstance(result, tuple) else (result, None)
        loss = loss / divisor
        diagnosis = nothing(device)
        if self.diagnostics and teacher.pieces is not None:
            diagnosis = diagnose_events(student, teacher_source, chunks, teacher.pieces)
        elif self.diagnostics and columns is not None:
            reached = W is not None and teacher.support == "reachable"
            chosen, count = reachable(columns, W) if reached else (columns, None)
            diagnosis = diagnose(student, teacher_source, chunks, chosen, count, W)
        return _Distilled(loss, cross_entropy, chunks.number, diagnosis)

    def _sources(self, teacher: Teacher, student_logits: AnyLogits, teacher_logits: AnyLogits) -> tuple[Source, Source]:
        """Both logits without the columns that belong to no token."""
        widths = width_of(student_logits), width_of(teacher_logits)
        sizes: tuple[int | None, int | None] = self.vocab_size or widths[0], widths[1]
        if teacher.shape is not None:
            sizes = teacher.shape
        elif teacher.loss == "kd":
            sizes = (self.vocab_size or min(width for width in widths if width is not None),) * 2
        for name, width, size in zip(("student_logits", "teacher_logits"), widths, sizes, strict=True):
            if size is None:
                raise ValueError(f"{name}: expected logits or LinearLogits for loss={teacher.loss!r}, got TopKLogits")
            if width is not None and width < size:
                raise ValueError(f"{name}: expected at least {size} columns (the vocabulary), got {width}")
        assert sizes[0] is not None
        assert sizes[1] is not None
        return source(student_logits, sizes[0]), source(teacher_logits, sizes[1])


class _Distilled(NamedTuple):
    loss: Tensor
    cross_entropy: Tensor | None
    chunks: int | Tensor
    diagnosis: Tensor


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """float32 [] on the device, which is not waited for."""
    if isinstance(value, Tensor):
        return to_device(value.detach().float(), device)
    return torch.full((), value, dtype=torch.float32, device=device)


def _numbers(values: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """int64 [M]; on the device if one of them is."""
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=torch.int64)
    return torch.stack([v if isinstance(v, Tensor) else torch.full((), v, device=device) for v in values])


def _following(labels: Tensor) -> Tensor:
    """The label that each row predicts."""
    return nn.functional.pad(labels[..., 1:].long(), (0, 1), value=IGNORED)


def _one_or_many(value: Any, count: int, name: str) -> list[Any]:
    """``value`` as one item for each teacher."""
    if value is None:
        return [None] * count
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(items) != count:
        raise ValueError(f"{name}: expected one for each of the {count} teachers, got {len(items)}")
    return items
