"""Cross-entropy and one or several teachers as one training criterion."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xtoken.alignment import Alignment, Chunks, predictable, to_device
from xtoken.losses.backends import IGNORED, checked_ids, predicted_labels
from xtoken.losses.call import (
    SIDES,
    check_alignment,
    check_choice,
    check_count,
    check_logits,
    check_sequence,
    checked_labels,
    compute,
    has_dtensor,
    vocabulary_size,
)
from xtoken.losses.diagnostics import NAMES, nothing
from xtoken.losses.logits import BLOCK_ELEMENTS, AnyLogits, OrderedLogits, Parts, Source
from xtoken.losses.loss import Loss, Matrix, Needs, registered
from xtoken.losses.numerics import statistics_dtype
from xtoken.losses.operator import Expected, check_transformed, never_zero
from xtoken.losses.ordered import in_order, matrix_in
from xtoken.losses.trust import certainties, in_top, trusted
from xtoken.pieces import PieceIndex

SCALINGS = ("dynamic", "fixed")
WEIGHTINGS = ("fixed", "entropy")
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
    trust_top_k : int, optional
        Leave out chunks that the teacher itself would hardly have written: those with a token of its that is not among
        the so many most probable ones of the row that predicts it. They stay in what sums are divided by. Default:
        trust all. Not inside of ``torch.compile``.
    **options
        Options of the loss function, such as ``temperature``, with its defaults; attributes of the teacher too. Where
        columns are chosen by the teacher's logits of the call (``top_k``), a batch and its micro-batches do not see
        quite the same ones; with given columns, or all, they do.

    Raises
    ------
    ValueError
        If the loss does not go with the projection or the pieces, or does not train its weights, though they ask for a
        gradient; if the weight is negative, or `trust_top_k` not above 0.
    TypeError
        For an option that the loss does not have.
    """

    projection: Any
    loss: str
    weight: float
    pieces: PieceIndex | None
    trust_top_k: int | None
    options: dict[str, Any] = field(hash=False)

    def __init__(
        self,
        projection: Any = None,
        loss: str | None = None,
        weight: float = 1.0,
        *,
        pieces: PieceIndex | None = None,
        trust_top_k: int | None = None,
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
        is_trained = any(one.requires_grad for one in getattr(projection, "parameters", tuple)())
        if is_trained and not losses[loss].trains_projection:
            raise ValueError(
                f"projection: expected fixed weights for loss={loss!r}, which does not train them; those of a "
                "LearnableProjection are its projection()"
            )
        if (pieces is None) == (needs is Needs.PIECES):
            expected, got = ("a PieceIndex", "None") if pieces is None else ("None", "one")
            raise ValueError(f"pieces: expected {expected} for loss={loss!r}, got {got}")
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"weight: expected a finite number >= 0, got {weight!r}")
        check_count(trust_top_k, "trust_top_k", optional=True)
        known = losses[loss].options()
        if unknown := options.keys() - known.keys():
            raise TypeError(
                f"{', '.join(sorted(unknown))}: expected options of loss={loss!r}, which are {', '.join(known)}"
            )
        made = {"projection": projection, "loss": loss, "weight": weight, "pieces": pieces, "trust_top_k": trust_top_k}
        vars(self).update(made, options=options, _all_options={**known, **options})
        made_loss = self.make_loss()
        made_loss.check_switches()
        made_loss.check()

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

    ``scaling="dynamic"`` has ``s = min(CE / |KD|, max_scale)``, held constant in backward: both parts weigh the same,
    as in the paper, as long as KD is not small; s = 1 where there are no labels for CE. ``scaling="fixed"`` has s = 1.

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
        pieces say, or all columns if there is neither (with ``tp_group`` then needed).
    teacher_weighting : "fixed" or "entropy"
        "entropy" also multiplies each chunk's loss by how sure its teacher is beside the others that have a chunk which
        begins at the same student token: ``n exp(-h_m) / sum_j exp(-h_j)`` for n of them, with
        ``h_m = H_m log(V_student) / log(V_m)``, H_m the entropy (nats) of the teacher's row that predicts the chunk. So
        the mean over the n is 1, and for one vocabulary weights are as inverse perplexities. Cross-entropy then takes a
        pass of its own, and backward computes the gradient.
    diagnostics : bool
        Also report agreement and mass, of at most 256 chunks of a call. May be changed at any time. Not inside of
        ``torch.compile``.
    backend : str
        See `select_backend`.
    tp_group, cp_group, cp_layout
        Logits whose columns or positions lie on several ranks, as every loss takes them (docs/scale.md). Labels and
        alignments are those of the whole sequences; loss and parts are the same on all ranks, and diagnostics nan. Not
        with "entropy" or ``trust_top_k``, which look at whole rows.

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
        teacher_weighting: str = "fixed",
        diagnostics: bool = True,
        backend: str = "auto",
        tp_group: Any = None,
        cp_group: Any = None,
        cp_layout: str = "contiguous",
    ) -> None:
        super().__init__()
        check_sequence(teachers, "teachers", "Teacher")
        for k, teacher in enumerate(teachers):
            if not isinstance(teacher, Teacher):
                raise TypeError(f"teachers[{k}]: expected a Teacher, got {type(teacher).__name__}")
        check_choice(scaling, "scaling", SCALINGS)
        check_choice(teacher_weighting, "teacher_weighting", WEIGHTINGS)
        for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        if ce_weight == kd_weight == 0.0:
            raise ValueError("ce_weight, kd_weight: expected one above 0, got 0 for both, which trains nothing")
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
        self.teacher_weighting = teacher_weighting
        self.diagnostics = diagnostics
        self.backend = backend
        self.groups = {"tp_group": tp_group, "cp_group": cp_group, "cp_layout": cp_layout}
        projections = [teacher.projection for teacher in teachers]
        self.projections = nn.ModuleList(W for W in projections if isinstance(W, nn.Module))

    def extra_repr(self) -> str:
        losses = ", ".join(f"{teacher.weight:g} {teacher.loss}" for teacher in self.teachers)
        weights = f"ce_weight={self.ce_weight}, kd_weight={self.kd_weight}"
        bound = f", max_scale={self.max_scale:g}" if self.scaling == "dynamic" else ""
        return f"teachers=[{losses}], scaling={self.scaling!r}{bound}, {weights}"

    def forward(
        self,
        student_logits: AnyLogits,
        labels: Tensor,
        teacher_logits: AnyLogits | Sequence[AnyLogits | None],
        alignments: Alignment | Sequence[Alignment | None] | None = None,
        num_items: Count | None = None,
        num_chunks: Count | Sequence[Count] | None = None,
        scale: float | Tensor | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        ce_labels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss and its parts.

        Parameters
        ----------
        student_logits : floating [B, T, V] or [T, V], or LinearLogits
        labels : int64 [B, T] or [T]
            Token ids at their own positions, -100 where ignored; row ``t`` is compared with label ``t + 1``. Neither
            part of the loss touches a row that only ignored labels follow.
        teacher_logits : Tensor, TopKLogits, LinearLogits, OrderedLogits, or sequence of M
            One for each teacher. None for one whose alignment has no labelled chunk in this call: it adds nothing.
        alignments : Alignment or sequence of M, optional
            None for a teacher that shares the tokenizer: its positions are then those whose next label is not
            ignored. Of an alignment the chunks count whose student tokens are all labelled (see
            `Alignment.supervised`); with labels on the CPU these are picked there, else on their device.
        num_items, num_chunks : int (or tensor), optional
            What to divide the sums of CE and of each KD by. Default: the number of labels and of chunks in
            this call, giving means. With gradient accumulation or data parallelism pass the sums of `counts`
            over all micro-batches and ranks; the totals of the calls then add up to the loss of the whole
            batch, and so do "ce" and "kd". Where gradients are averaged over ranks (DDP), multiply the total by
            the number of ranks. With several teachers, ``num_chunks`` is a sequence. 0 counts as 1: where there is
            nothing in the whole batch, the loss is 0.
        scale : float or scalar tensor, optional
            The factor s. Default: 1 for ``scaling="fixed"``, this call's own ``min(CE / |KD|, max_scale)`` for
            "dynamic", which differs between micro-batches and ranks; to have one for them all, give it, or (for ranks)
            `reduce`.
        reduce : callable, optional
            Sums a small tensor over the ranks; "dynamic" then has the ratio of CE and KD of all ranks. Every rank
            must make the call.
        ce_labels : int64, shape of `labels`, optional
            Those of the cross-entropy, where they differ: it means nothing on text that the student has sampled itself,
            while a teacher has much to say about it. `labels` are then those of the distillation alone. Default:
            `labels`.

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
            "distrusted" : int64 [M], chunks left out (though counted) because of ``trust_top_k``; likewise.
            "weights" : [M], sum over the chunks of the weights of ``teacher_weighting``.
            "agreement" : [M], share of chunks where the student's largest projected column is the teacher's,
            at the first predictor row, among C (for a loss on events, their most probable event); nan where undefined
            or switched off.
            "mass" : [M], the teacher's mean probability inside C; nan likewise.
            "outside" : [M], the student's mean probability that W sends to no column of C; nan likewise.
            "flat" : [M], share of chunks whose teacher finds all of C equally likely, as `TopKLogits` do that list none
            of C: they teach the uniform distribution on C; nan likewise.
            "left_out" : [M], share of chunks that a loss leaves out (or their start), since the realised first tokens
            do not agree; nan likewise.
        """
        logits = _one_or_many(teacher_logits, len(self.teachers), "teacher_logits")
        aligned = _one_or_many(alignments, len(self.teachers), "alignments")
        divisors = _one_or_many(num_chunks, len(self.teachers), "num_chunks")
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            check_transformed(Parts.of(student_logits).rows, "student_logits")
        in_parts = self._is_in_parts(student_logits, logits)
        if not in_parts:  # else their shape is that of the whole sequences
            shape = Parts.of(student_logits).leading_shape
            checked_labels(shape, labels)
            if ce_labels is not None:
                checked_labels(shape, ce_labels, "ce_labels")
        targets = labels if ce_labels is None else ce_labels
        items = (predicted_labels(targets) != IGNORED).sum() if num_items is None else num_items
        items = never_zero(items)
        known = 1.0 if scale is None and self.scaling == "fixed" else scale
        # The factors of the sums of KD (but for the teacher's weight and divisor) and of CE, where they are known yet.
        exact_items = items.double() if isinstance(items, Tensor) else items
        factors = None if known is None else (self.kd_weight * known, self.ce_weight / exact_items)
        ce_sum: Tensor | None = None
        done = []
        ready = [
            self._ready(teacher, student_logits, one, alignment, labels, in_parts)
            for teacher, one, alignment in zip(self.teachers, logits, aligned, strict=True)
        ]
        weights: list[Tensor | None] = [None] * len(ready)
        if self.teacher_weighting == "entropy":
            device = Parts.of(student_logits).rows.device
            weights[:] = certainties(
                [None if one.sources is None else (*one.sources, one.used(device)) for one in ready]
            )
        for one, divisor, weight in zip(ready, divisors, weights, strict=True):
            # The first loss on all of its columns brings the cross-entropy along, from the same pass over the logits.
            wanted = targets if ce_sum is None and self._is_on_all_columns(one, student_logits) else None
            part = self._distil(one, student_logits, wanted, divisor, factors, weight)
            ce_sum = part.cross_entropy if ce_sum is None else ce_sum
            done.append(part)
        if ce_sum is None:
            ce_sum = self._cross_entropy(student_logits, targets, in_parts)
        weighted = [one.teacher.weight * part.loss for one, part in zip(ready, done, strict=True)]
        kd = sum(weighted[1:], weighted[0]) if weighted else ce_sum.new_zeros(())
        ce = ce_sum / items
        if scale is None:
            scale = self._ratio(ce.detach(), kd.detach(), reduce)
        total = self.ce_weight * ce + self.kd_weight * scale * kd
        ce, kd = ce.detach(), kd.detach()
        factor = scale.detach().to(kd) if isinstance(scale, Tensor) else kd.new_full((), scale)
        at_bound = factor >= self.max_scale if self.scaling == "dynamic" else torch.zeros_like(kd, dtype=torch.bool)
        diagnoses = torch.stack([part.diagnosis for part in done]) if done else ce.new_zeros(0, len(NAMES))
        parts = {
            "ce": ce,
            "kd": kd,
            "scale": factor,
            "unscaled": self.ce_weight * ce + self.kd_weight * kd,
            "bounded": at_bound & (kd != 0),
            "kd_per_teacher": torch.stack([part.loss.detach() for part in done]) if done else ce.new_zeros(0),
            "chunks": _numbers([one.chunks for one in ready], kd.device),
            "unsupervised": _numbers([one.unsupervised for one in ready], kd.device),
            "distrusted": _numbers([one.distrusted for one in ready], kd.device),
            "weights": torch.stack([part.weights for part in done]) if done else ce.new_zeros(0),
            **dict(zip(NAMES, diagnoses.unbind(1), strict=True)),
        }
        return total, parts

    def counts(
        self,
        labels: Tensor,
        alignments: Alignment | Sequence[Alignment | None] | None = None,
        ce_labels: Tensor | None = None,
    ) -> tuple[int, list[int]]:
        """Labels, and for each teacher chunks, of one call: what ``num_items`` and ``num_chunks`` add up."""
        positions = int((labels[..., 1:] != IGNORED).sum())
        items = positions if ce_labels is None else int((ce_labels[..., 1:] != IGNORED).sum())
        aligned = _one_or_many(alignments, len(self.teachers), "alignments")
        return items, [positions if one is None else int(predictable(one.supervised(labels)).sum()) for one in aligned]

    def _is_in_parts(self, student_logits: AnyLogits, teachers: Sequence[AnyLogits | None]) -> bool:
        """Whether logits lie on several ranks; raises ValueError where that does not go with an option."""
        given = [one for one in (student_logits, *teachers) if one is not None]
        if self.groups["tp_group"] is self.groups["cp_group"] is None and not has_dtensor(*given):
            return False
        if self.teacher_weighting == "entropy":
            raise ValueError("teacher_weighting: expected 'fixed' for logits in parts, got 'entropy'")
        for teacher in self.teachers:
            if teacher.trust_top_k is not None:
                raise ValueError(f"trust_top_k: expected None for logits in parts, got {teacher.trust_top_k}")
        return True

    def _ratio(self, ce: Tensor, kd: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> Tensor | float:
        if self.scaling == "fixed":
            return 1.0
        if reduce is not None:
            ce, kd = reduce(torch.stack([ce, kd.to(ce.dtype)]))
        return ratio(ce, kd, self.max_scale)

    def _is_on_all_columns(self, ready: _Ready, student_logits: AnyLogits) -> bool:
        """Whether a loss takes as many columns as cross-entropy does: not beside a narrower teacher."""
        width = Parts.of(student_logits).width
        return ready.sources is None or width is None or ready.sources[0].size >= min(width, self.vocab_size or width)

    def _cross_entropy(self, student_logits: AnyLogits, labels: Tensor, in_parts: bool) -> Tensor:
        """The sum; hidden states in blocks, whose logits backward computes again."""
        if in_parts:
            from xtoken.parallel.call import cross_entropy

            return cross_entropy(student_logits, labels, self.vocab_size, self.groups, self.backend)
        given = Parts.of(student_logits).batched()
        if given.width is None:
            raise TypeError("student_logits: expected logits or LinearLogits, which have a gradient, got TopKLogits")
        width = min(given.width, self.vocab_size or given.width)
        targets = checked_ids(labels, width)

        def block(start: int, stop: int) -> Tensor:
            logits = given.source(width).rows(start, stop)
            logits = logits.to(statistics_dtype(logits))
            wanted = to_device(targets[start:stop], logits.device)
            return nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")

        if given.head is None:
            return block(0, len(targets))
        step = max(1, BLOCK_ELEMENTS // width)
        starts = range(0, max(1, len(targets)), step)
        parts = [checkpoint(block, start, start + step, use_reentrant=False) for start in starts]
        return torch.stack(parts).sum()

    def _ready(
        self,
        teacher: Teacher,
        student_logits: AnyLogits,
        teacher_logits: AnyLogits | None,
        alignment: Alignment | None,
        labels: Tensor,
        in_parts: bool,
    ) -> _Ready:
        """The teacher's logits, and the chunks or positions that its loss takes."""
        loss, projection = teacher.make_loss(), teacher.projection
        if teacher_logits is None:
            if alignment is None or _count(predictable(alignment.supervised(labels))):
                raise TypeError("teacher_logits: expected a floating-point tensor, got None, for labelled chunks")
            unsupervised = _count(predictable(alignment))
            return _Ready(teacher, loss, projection, None, None, alignment, None, 0, unsupervised, 0)
        if in_parts:
            alignment, mask, number, unsupervised = _supervised(loss, alignment, labels)
            return _Ready(teacher, loss, None, teacher_logits, None, alignment, mask, number, unsupervised, 0)
        if isinstance(teacher_logits, OrderedLogits):
            if projection is not None:
                projection = matrix_in(teacher_logits.order, Matrix.of(projection))
            loss, teacher_logits, alignment = in_order(loss, teacher_logits, alignment)
        check_logits(student_logits, teacher_logits)
        sources = self._sources(teacher, loss, projection, student_logits, teacher_logits)
        if alignment is not None:
            check_alignment(alignment, sources[0].samples)
            for side in (0, 1):
                alignment.host.check_reach(side, sources[side].length, SIDES[side], "row")
        alignment, mask, number, unsupervised = _supervised(loss, alignment, labels)
        if not isinstance(number, Tensor) and number == 0 < unsupervised:
            warnings.warn(
                "labels: no chunk of the alignment has all of its tokens labelled, so this call distils nothing",
                stacklevel=2,
            )
        distrusted: Count = 0
        if teacher.trust_top_k is not None:
            device = Parts.of(student_logits).rows.device
            alignment, mask = _trusted(teacher.trust_top_k, sources[1], alignment, mask, labels, device)
            distrusted = number - _count(_chosen(alignment, mask))
        return _Ready(
            teacher, loss, projection, teacher_logits, sources, alignment, mask, number, unsupervised, distrusted
        )

    def _distil(
        self,
        ready: _Ready,
        student_logits: AnyLogits,
        targets: Tensor | None,
        divisor: Count | None,
        factors: tuple[float | Tensor, float | Tensor] | None,
        weights: Tensor | None,
    ) -> _Distilled:
        teacher, loss = ready.teacher, ready.loss
        device = Parts.of(student_logits).rows.device
        if ready.logits is None:
            zero = torch.zeros((), dtype=torch.float32, device=device)
            # Ranks add up the gradients of W: 0, not None.
            trained: Iterable[Tensor] = getattr(ready.projection, "parameters", tuple)()
            nowhere = sum((weight[:0].sum() for weight in trained if weight.requires_grad), zero)
            return _Distilled(nowhere, None, zero, nothing(device))
        divisor = never_zero(ready.chunks if divisor is None else divisor)
        expected: Expected | None = None
        diagnosed: tuple[Source, Source] | None = None
        sizes: tuple[int | None, int | None] = teacher.shape or (self.vocab_size, None)
        if ready.sources is not None:
            sizes = ready.sources[0].size, ready.sources[1].size
            if self.diagnostics and not torch.compiler.is_compiling():
                diagnosed, loss = ready.sources, loss.chosen(ready.sources[1], device, self.backend)
            if factors is not None and weights is None:
                of_loss, of_labels, divided = (_scalar(one, device, torch.float64) for one in (*factors, divisor))
                expected = Expected(of_loss * teacher.weight / divided, of_labels)
        elif loss.needs is Needs.SAME_TOKENIZER:
            sizes = self.vocab_size, self.vocab_size
        result = compute(
            loss, student_logits, ready.logits, ready.alignment, labels=targets if weights is None else None,
            sizes=sizes, mask=ready.mask, expected=expected, reduction="sum" if weights is None else "none",
            backend=self.backend, **self.groups,
        )  # fmt: skip
        total, cross_entropy = result if isinstance(result, tuple) else (result, None)
        weighted, diagnosis = _scalar(ready.chunks - ready.distrusted, device), nothing(device)
        if weights is not None or diagnosed is not None:
            chunks = ready.used(device, loss.realised)
            if weights is not None:
                total, weighted = (total.flatten()[chunks.used] * weights).sum(), weights.sum()
            if diagnosed is not None:
                diagnosis = loss.diagnose(*diagnosed, chunks, ready.projection, device, self.backend)
        return _Distilled(total / divisor, cross_entropy, weighted, diagnosis)

    def _sources(
        self, teacher: Teacher, loss: Loss, projection: Any, student_logits: AnyLogits, teacher_logits: AnyLogits
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
        if loss.needs is Needs.NOTHING and projection is not None:  # a W that only diagnoses
            W = Matrix.of(projection)

            def known_to(side: int) -> int:
                width, size = given[side].width, W.shape[side]
                return width if width is not None and width < size and W.may_lack(side, width) else size

            sizes = known_to(0), known_to(1)
        student, source = (one.source(vocabulary_size(loss, k, one, sizes[k])) for k, one in enumerate(given))
        return student, source


class _Ready(NamedTuple):
    """What a call has for one teacher; no logits if it has nothing to say, and no sources if they are in parts."""

    teacher: Teacher
    loss: Loss
    projection: Any
    logits: AnyLogits | None
    sources: tuple[Source, Source] | None  # of the student and the teacher
    alignment: Alignment | None
    mask: Tensor | None  # bool [B, T], without an alignment
    chunks: Count
    unsupervised: Count
    distrusted: Count

    def used(self, device: torch.device, realised: bool = False) -> Chunks:
        """The rows of the chunks that count, or of the positions."""
        assert self.sources is not None
        student, teacher = self.sources
        if self.alignment is None:
            return Chunks.of_positions(student.samples * student.length, self.mask, device)
        return Chunks.of(self.alignment, student.length, teacher.length, device, realised)


def _supervised(
    loss: Loss, alignment: Alignment | None, labels: Tensor
) -> tuple[Alignment | None, Tensor | None, Count, Count]:
    """The alignment by its labels, or the mask of positions; how many count, and how many chunks do not."""
    if alignment is not None:
        before, alignment = _count(predictable(alignment.host)), alignment.supervised(labels)
        number = _count(_chosen(alignment, None))
        return alignment, None, number, before - number
    if loss.needs is not Needs.SAME_TOKENIZER:
        raise ValueError(f"alignments: expected an Alignment for loss={loss.name!r}, got None")
    mask = predicted_labels(labels) != IGNORED
    number = _count(mask)
    return None, mask, number, 0 * number


class _Distilled(NamedTuple):
    loss: Tensor
    cross_entropy: Tensor | None
    weights: Tensor
    diagnosis: Tensor


def _trusted(
    top_k: int, teacher: Source, alignment: Alignment | None, mask: Tensor | None, labels: Tensor, device: torch.device
) -> tuple[Alignment | None, Tensor | None]:
    """The alignment, or the mask of positions, without what the teacher does not find probable."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "trust_top_k: expected None inside of torch.compile, whose graph must not depend on the chunks"
        )
    if alignment is None:
        assert mask is not None
        following = to_device(predicted_labels(labels), device)
        return None, to_device(mask, device) & in_top(teacher, following.flatten(), top_k).view(following.shape)
    if alignment.teacher_ids is None:
        raise ValueError("trust_top_k: expected an alignment with teacher_ids, to look for, got None")
    ids = to_device(alignment.teacher_ids, device)
    alignment.host.check_reach(1, ids.shape[-1], "teacher_ids", "token")
    return alignment.supervised(labels, trusted(teacher, ids.reshape(len(alignment), -1), top_k)), None


def _chosen(alignment: Alignment | None, mask: Tensor | None) -> Tensor:
    """bool: the chunks, or the positions, that count; on the device if only that knows."""
    if alignment is not None:
        return predictable(alignment if alignment.mask is not None else alignment.host)
    assert mask is not None
    return mask


def ratio(ce: Tensor, kd: Tensor, most: float) -> Tensor:
    """CE / |KD|, at most `most`; that where KD is 0, or 0 if it is infinite; 1 where CE is 0, as without labels."""
    bounded = torch.where(kd == 0, most if most < float("inf") else 0.0, (ce / kd.abs()).clamp_max(most))
    return torch.where(ce == 0, min(most, 1.0), bounded)


def _scalar(value: float | Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """[] on the device, without waiting for it."""
    if isinstance(value, Tensor):
        return to_device(value.detach().to(dtype), device)
    return torch.full((), value, dtype=dtype, device=device)


def _count(chosen: Tensor) -> Count:
    """How many: a number where it is known, int64 [] where only a device knows it, or `torch.compile` traces."""
    total = chosen.sum()
    return total if chosen.device.type != "cpu" or torch.compiler.is_compiling() else int(total)


def _numbers(values: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """int64 [M]; on the device if one of them is."""
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=torch.int64, device="cpu")
    return torch.stack([v.to(device) if isinstance(v, Tensor) else torch.full((), v, device=device) for v in values])


def _one_or_many(value: Any, count: int, name: str) -> list[Any]:
    """``value`` as one item for each teacher."""
    if value is None:
        return [None] * count
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(items) != count:
        raise ValueError(f"{name}: expected one for each of the {count} teachers, got {len(items)}")
    return items
