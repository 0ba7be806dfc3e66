"""Cross-entropy and one or several teachers as one training criterion."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xtoken.alignment import Alignment, Chunks, predictable, to_device
from xtoken.losses.backends import IGNORED
from xtoken.losses.call import check_alignment, check_choice, check_logits, checked_labels, compute, vocabulary_size
from xtoken.losses.diagnostics import NAMES, nothing
from xtoken.losses.logits import AnyLogits, Parts, Source
from xtoken.losses.loss import Loss, Needs, registered
from xtoken.losses.operator import Expected, at_least_one
from xtoken.pieces import PieceIndex

SCALINGS = ("dynamic", "fixed")
DEFAULT_MAX_SCALE = 4.0
"""Of ``scaling="dynamic"``; where KD is near zero CE / |KD| knows no limit."""

Count = int | Tensor


@dataclass(frozen=True, init=False)
class Teacher:
    """One teacher of an `XTokenLoss`.

    Parameters
    ----------
    projection : ProjectionMatrix or nn.Module, optional
        W of this student and teacher; a module's parameters become the criterion's. None: the teacher shares
        the student's tokenizer, or has a loss that needs no W.
    loss : str, optional
        The name of a registered loss, as in ``xtoken train --loss``. Default: by what is given, a projection, pieces or
        nothing (a shared tokenizer); see `Loss.is_default`.
    weight : float
        Factor of this teacher's loss, >= 0.
    pieces : PieceIndex, optional
        Of this student and teacher, for a loss that needs it.
    **options
        Options of the loss function, such as ``temperature``, with its defaults; attributes of the teacher too. Where
        columns are chosen by the teacher's logits of the call (``top_k``), a batch and its micro-batches do not see
        quite the same ones; with given columns, or all, they do.

    Raises
    ------
    ValueError
        If the loss does not go with the projection or the pieces, or the weight is negative.
    TypeError
        For an option that the loss does not have.
    """

    projection: Any
    loss: str
    weight: float
    pieces: PieceIndex | None
    options: dict[str, Any] = field(hash=False)

    def __init__(
        self,
        projection: Any = None,
        loss: str | None = None,
        weight: float = 1.0,
        *,
        pieces: PieceIndex | None = None,
        **options: Any,
    ) -> None:
        options = {**options.pop("options", {}), **options}  # as dataclasses.replace gives them, and changes
        losses = registered()
        if loss is None:
            need = Needs.PIECES if pieces is not None else Needs.SAME_TOKENIZER
            need = need if projection is None else Needs.PROJECTION
            loss = next(name for name, one in losses.items() if one.needs is need and one.is_default)
        check_choice(loss, "loss", tuple(losses))
        needs = losses[loss].needs
        if projection is None and needs is Needs.PROJECTION:
            raise ValueError(f"projection: expected a projection matrix for loss={loss!r}, got None")
        if projection is not None and needs in (Needs.SAME_TOKENIZER, Needs.PIECES):
            raise ValueError(f"projection: expected None for loss={loss!r}, which needs {needs.value}, got one")
        if (pieces is None) == (needs is Needs.PIECES):
            expected, got = ("a PieceIndex", "None") if pieces is None else ("None", "one")
            raise ValueError(f"pieces: expected {expected} for loss={loss!r}, got {got}")
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"weight: expected a finite number >= 0, got {weight!r}")
        known = losses[loss].options()
        if unknown := options.keys() - known.keys():
            raise TypeError(
                f"{', '.join(sorted(unknown))}: expected options of loss={loss!r}, which are {', '.join(known)}"
            )
        made = {"projection": projection, "loss": loss, "weight": weight, "pieces": pieces, "options": options}
        for name, value in {**made, "_all_options": {**known, **options}}.items():
            object.__setattr__(self, name, value)
        self.make_loss().check()

    def make_loss(self) -> Loss:
        """The loss with this teacher's options."""
        return registered()[self.loss].of(self.projection, self.pieces, **self._all_options)

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("_all_options", {})
        if name in options:
            return options[name]
        raise AttributeError(f"{type(self).__name__} with loss={self.__dict__.get('loss')!r} has no {name!r}")

    @property
    def shape(self) -> tuple[int, int] | None:
        """Sizes of the student's and the teacher's vocabulary, where W or the pieces tell."""
        known = self.pieces if self.projection is None else self.projection
        return None if known is None else known.shape


class XTokenLoss(nn.Module):
    """Cross-entropy plus distillation: ``ce_weight CE + kd_weight s KD`` with ``KD = sum_m weight_m KD_m``.

    ``scaling="dynamic"`` has s = min(CE / |KD|, `max_scale`), held constant in backward: both parts weigh the same, as
    in the paper, as long as KD is not small. ``scaling="fixed"`` has s = 1.

    Parameters
    ----------
    teachers : sequence of Teacher
    scaling : "dynamic" or "fixed"
    ce_weight, kd_weight : float
        >= 0. A part of weight 0 is still reported.
    max_scale : float
        Bound of the dynamic factor, > 0. A student that comes near its teacher, or a loss that passes through zero on
        its way below (of a part of both vocabularies), would else be torn by a factor of thousands; and a loss that its
        teacher lets go to zero would outweigh the text. ``inf`` is the paper's rule, and has s = 0 where KD is 0.
    vocab_size : int, optional
        Columns of the student's logits that belong to tokens. Default: as the projections and
        pieces say, or all columns if there is neither.
    diagnostics : bool
        Also report agreement and mass, of at most 256 chunks of a call. May be changed at any time. Not inside of
        ``torch.compile``.
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
        max_scale: float = DEFAULT_MAX_SCALE,
        vocab_size: int | None = None,
        diagnostics: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice(scaling, "scaling", SCALINGS)
        for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        if not max_scale > 0.0:
            raise ValueError(f"max_scale: expected a number above 0, got {max_scale!r}")
        sizes = {teacher.shape[0] for teacher in teachers if teacher.shape is not None}
        sizes |= set() if vocab_size is None else {vocab_size}
        if len(sizes) > 1:
            raise ValueError(f"teachers: expected one student vocabulary size, got {sorted(sizes)}")
        self.teachers = tuple(teachers)
        self.scaling = scaling
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.max_scale = max_scale
        self.vocab_size = sizes.pop() if sizes else None
        self.diagnostics = diagnostics
        self.backend = backend
        projections = [teacher.projection for teacher in teachers]
        self.projections = nn.ModuleList(W for W in projections if isinstance(W, nn.Module))

    def extra_repr(self) -> str:
        losses = ", ".join(f"{teacher.weight:g} {teacher.loss}" for teacher in self.teachers)
        weights = f"ce_weight={self.ce_weight}, kd_weight={self.kd_weight}"
        bound = f", max_scale={self.max_scale:g}" if self.scaling == "dynamic" else ""
        return f"teachers=[{losses}], scaling={self.scaling!r}{bound}, {weights}"

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
            Token ids at their own positions, -100 where ignored; row ``t`` is compared with label ``t + 1``. Neither
            part of the loss touches a row that only ignored labels follow.
        teacher_logits : Tensor or sequence of M tensors
            One for each teacher.
        alignments : Alignment or sequence of M, optional
            None for a teacher that shares the tokenizer: its positions are then those whose next label is not
            ignored. Of an alignment the chunks count whose student tokens are all labelled (see
            `Alignment.supervised`); with labels on the CPU these are picked there, else on their device.
        num_items, num_chunks : int (or tensor), optional
            What to divide the sums of CE and of each KD by. Default: the number of labels and of chunks in
            this call, giving means. With gradient accumulation or data parallelism pass the sums of `counts`
            over all micro-batches and ranks; the totals of the calls then add up to the loss of the whole
            batch, and so do "ce" and "kd". Where gradients are averaged over ranks (DDP), multiply the total by
            the number of ranks. With several teachers, ``num_chunks`` is a sequence.
        scale : float or scalar tensor, optional
            The factor s. Default: 1 for ``scaling="fixed"``, this call's own min(CE / |KD|, max_scale) for "dynamic",
            which differs between micro-batches and ranks; to have one for them all, give it, or (for ranks) `reduce`.
        reduce : callable, optional
            Sums a small tensor over the ranks; "dynamic" then has the ratio of CE and KD of all ranks. Every rank
            must make the call.

        Returns
        -------
        total : Tensor
            Scalar, at least float32: what is differentiated. Under "dynamic" its value says little, for s KD is CE (or
            -CE, where KD is negative) until s is bounded: look at ``parts["unscaled"]``.
        parts : dict of detached tensors
            On the device of the logits; nothing here waits for their values.
            "ce", "kd" : scalar, as they enter the total before scaling and weights.
            "scale" : scalar, the factor s of KD.
            "unscaled" : scalar, the total with s = 1, ``ce_weight CE + kd_weight KD``: a loss to log; KD shows in it.
            "bounded" : bool scalar, whether ``max_scale`` is what s is.
            "kd_per_teacher" : [M]
            "chunks" : int64 [M], chunks (or positions) of this call; on the CPU, unless only a device knows them.
            "unsupervised" : int64 [M], chunks left out because a token of theirs is not labelled; likewise.
            "agreement" : [M], share of chunks where the student's largest projected column is the teacher's,
            at the first predictor row, among C (for a loss on events, their most probable event); nan where undefined
            or switched off.
            "mass" : [M], the teacher's mean probability inside C; nan likewise.
            "outside" : [M], the student's mean probability that W sends to no column of C; nan likewise.
            "left_out" : [M], share of chunks that a loss leaves out (or their start), since the realised first tokens
            do not agree; nan likewise.
        """
        logits = _one_or_many(teacher_logits, len(self.teachers), "teacher_logits")
        aligned = _one_or_many(alignments, len(self.teachers), "alignments")
        divisors = _one_or_many(num_chunks, len(self.teachers), "num_chunks")
        checked_labels(Parts.of(student_logits), labels)
        items = (_following(labels) != IGNORED).sum().clamp_min(1) if num_items is None else num_items
        known = 1.0 if scale is None and self.scaling == "fixed" else scale
        # The factors of the sums of KD (but for the teacher's weight and divisor) and of CE, where they are known yet.
        factors = None if known is None else (self.kd_weight * known, self.ce_weight / items)
        ce_sum: Tensor | None = None
        kd: Tensor | None = None
        done = []
        for teacher, one, alignment, divisor in zip(self.teachers, logits, aligned, divisors, strict=True):
            check_logits(student_logits, one)
            # The first teacher's loss brings the cross-entropy along, from the same pass over the student's logits.
            part = self._distil(teacher, student_logits, one, alignment, labels, divisor, ce_sum is None, factors)
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
        factor = scale.detach().to(kd) if isinstance(scale, Tensor) else kd.new_full((), scale)
        at_bound = factor >= self.max_scale if self.scaling == "dynamic" else torch.zeros_like(kd, dtype=torch.bool)
        diagnoses = torch.stack([part.diagnosis for part in done]) if done else ce.new_zeros(0, len(NAMES))
        parts = {
            "ce": ce.detach(),
            "kd": kd.detach(),
            "scale": factor,
            "unscaled": (self.ce_weight * ce + self.kd_weight * kd).detach(),
            "bounded": at_bound & (kd.detach() != 0),
            "kd_per_teacher": torch.stack([part.loss.detach() for part in done]) if done else ce.new_zeros(0),
            "chunks": _numbers([part.chunks for part in done], kd.device),
            "unsupervised": _numbers([part.unsupervised for part in done], kd.device),
            **dict(zip(NAMES, diagnoses.unbind(1), strict=True)),
        }
        return total, parts

    def counts(
        self, labels: Tensor, alignments: Alignment | Sequence[Alignment | None] | None = None
    ) -> tuple[int, list[int]]:
        """Labels, and for each teacher chunks, of one call: what ``num_items`` and ``num_chunks`` add up."""
        items = int((labels[..., 1:] != IGNORED).sum())
        aligned = _one_or_many(alignments, len(self.teachers), "alignments")
        return items, [items if one is None else int(predictable(one.supervised(labels)).sum()) for one in aligned]

    def _ratio(self, ce: Tensor, kd: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> Tensor | float:
        if self.scaling == "fixed":
            return 1.0
        if reduce is not None:
            ce, kd = reduce(torch.stack([ce, kd.to(ce.dtype)]))
        return ratio(ce, kd, self.max_scale)

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
        labels: Tensor,
        divisor: Count | None,
        with_cross_entropy: bool,
        factors: tuple[float | Tensor, float | Tensor] | None,
    ) -> _Distilled:
        loss = teacher.make_loss()
        student, teacher_source = self._sources(teacher, loss, student_logits, teacher_logits)
        device = Parts.of(student_logits).rows.device
        mask: Tensor | None = None
        if alignment is not None:
            check_alignment(alignment, student.samples)
            for side, (name, source) in enumerate((("student_logits", student), ("teacher_logits", teacher_source))):
                alignment.host.check_reach(side, source.length, name, "row")
            before, alignment = _count(predictable(alignment.host)), alignment.supervised(labels)
            number = _count(predictable(alignment if alignment.mask is not None else alignment.host))
        elif loss.needs is Needs.SAME_TOKENIZER:
            mask = _following(labels) != IGNORED
            number = before = _count(mask)
        else:
            raise ValueError(f"alignments: expected an Alignment for loss={teacher.loss!r}, got None")
        if not isinstance(number, Tensor) and number == 0 < before:
            warnings.warn(
                "labels: no chunk of the alignment has all of its tokens labelled, so this call distils nothing",
                stacklevel=2,
            )
        is_diagnosed = self.diagnostics and not torch.compiler.is_compiling()
        if is_diagnosed:
            loss = loss.chosen(teacher_source, device, self.backend)
        divisor = at_least_one(number) if divisor is None else divisor
        targets = labels if with_cross_entropy else None
        wanted: Tensor | Expected | None = targets
        if factors is not None:
            of_loss = _scalar(factors[0] * teacher.weight / divisor, device)
            of_loss = torch.where(of_loss == 0, 1.0, of_loss)
            wanted = Expected(targets, of_loss, _scalar(factors[1], device))
        result = compute(
            loss,
            student_logits,
            teacher_logits,
            alignment,
            sizes=(student.size, teacher_source.size),
            mask=mask,
            labels=wanted,
            reduction="sum",
            backend=self.backend,
        )
        total, cross_entropy = result if isinstance(result, tuple) else (result, None)
        diagnosis = nothing(device)
        if is_diagnosed:
            if alignment is None:
                chunks = Chunks.of_positions(student.samples * student.length, mask, device)
            else:
                chunks = Chunks.of(alignment, student.length, teacher_source.length, device, loss.realised)
            diagnosis = loss.diagnose(student, teacher_source, chunks, teacher.projection, device, self.backend)
        return _Distilled(total / divisor, cross_entropy, number, before - number, diagnosis)

    def _sources(
        self, teacher: Teacher, loss: Loss, student_logits: AnyLogits, teacher_logits: AnyLogits
    ) -> tuple[Source, Source]:
        """Both logits without the columns that belong to no token."""
        given = Parts.of(student_logits).batched().detached(), Parts.of(teacher_logits).batched().detached()
        known = [] if self.vocab_size is None else [self.vocab_size]
        # A teacher with W or pieces sees to it that columns which are missing belong to no token of text.
        is_seen_to = any(one.shape is not None for one in self.teachers)

        def common(*parts: Parts) -> int | None:
            widths = [one.width for one in parts if one.width is not None]
            return known[0] if known and not is_seen_to else min(known + widths, default=None)

        sizes = teacher.shape or (common(given[0]), given[1].width)
        if loss.needs is Needs.SAME_TOKENIZER:
            sizes = (common(*given),) * 2
        student, other = (one.source(vocabulary_size(loss, k, one, sizes[k])) for k, one in enumerate(given))
        return student, other


class _Distilled(NamedTuple):
    loss: Tensor
    cross_entropy: Tensor | None
    chunks: int | Tensor
    unsupervised: int | Tensor
    diagnosis: Tensor


def ratio(ce: Tensor, kd: Tensor, most: float) -> Tensor:
    """CE / |KD|, at most `most`; that where KD is 0, or 0 if it is infinite."""
    return torch.where(kd == 0, most if most < float("inf") else 0.0, (ce / kd.abs()).clamp_max(most))


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """float32 [] on the device, without waiting for it."""
    if isinstance(value, Tensor):
        return to_device(value.detach().float(), device)
    return torch.full((), value, dtype=torch.float32, device=device)


def _count(chosen: Tensor) -> Count:
    """How many: a number where it is known, int64 [] where only a device knows it, or `torch.compile` traces."""
    total = chosen.sum()
    return total if chosen.device.type != "cpu" or torch.compiler.is_compiling() else int(total)


def _numbers(values: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """int64 [M]; on the device if one of them is."""
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=torch.int64)
    return torch.stack([v.to(device) if isinstance(v, Tensor) else torch.full((), v, device=device) for v in values])


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
