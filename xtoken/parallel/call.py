"""The way from a public loss whose logits lie on several ranks to its formula."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from xtoken.alignment import Alignment
from xtoken.alignment.chunks import Chunks, to_device
from xtoken.losses.backends import IGNORED, Labels, Prepared, checked_ids, kernels_of
from xtoken.losses.call import SIDES, check_call, check_known, checked_labels, checked_mask, has_dtensor
from xtoken.losses.logits import BLOCK_ELEMENTS, AnyLogits, Parts, Source, row_blocks
from xtoken.losses.loss import Loss, Matrix, Needs, registered
from xtoken.losses.numerics import scaled, statistics_dtype
from xtoken.losses.operator import Call, Flags, Gradients, autocasts, chunk_scale, computed, never_zero, once_only
from xtoken.parallel.columns import Columns
from xtoken.parallel.ranks import Ranks, Report
from xtoken.parallel.sequence import Positions, Share, share
from xtoken.parallel.side import Side
from xtoken.projection import column_set


class Groups(NamedTuple):
    """Over what the logits of a call are spread."""

    tp_group: Any = None
    cp_group: Any = None
    cp_layout: str = "contiguous"


class Given(NamedTuple):
    """The other arguments of a call."""

    loss: Loss
    student_logits: AnyLogits
    teacher_logits: AnyLogits
    alignment: Alignment | None
    labels: Tensor | None
    sizes: tuple[int | None, int | None]
    mask: Any
    reduction: str
    inplace: bool
    backend: str


@torch.compiler.disable
def compute(given: Given, groups: Groups) -> Tensor | tuple[Tensor, Tensor]:
    """As `xtoken.losses.call.compute`; every rank of the groups must make the call.

    The parts that are told to be the same are compared first, and an error of one rank is raised on all.
    """
    tp, cp, is_sharded = Ranks(), Ranks(), Sharded(None, None)
    facts: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    error = None
    try:
        try:
            tp = Ranks(groups.tp_group, "tp_group")
        finally:  # whichever group there is hears of an error
            cp = Ranks(groups.cp_group, "cp_group")
        given, tp_group, is_sharded = _local(given, groups.tp_group)
        tp = Ranks(tp_group, "tp_group")
        _check_mesh(tp, cp)
        facts = _checked(given, groups, tp, is_sharded)
    except Exception as raised:  # that of any rank is raised on all
        error = raised
    loss, alignment, labels, reduction = given.loss, given.alignment, given.labels, given.reduction
    columns, lengths = _agreed(Report(*facts, error), loss, given.sizes, tp, cp, is_sharded)

    student, teacher = (Parts.of(logits).batched() for logits in (given.student_logits, given.teacher_logits))
    for side, of in enumerate(columns):
        if of.held is not None and of.held < of.size:
            check_known(side, of.held, labels, alignment)
    positions = Positions.of(lengths[0], groups.cp_layout), Positions.of(lengths[1], groups.cp_layout)
    samples, device = student.rows.shape[0], student.rows.device
    whole = torch.Size([*Parts.of(given.student_logits).leading_shape[:-1], len(positions[0].rank)])
    mask = None if given.mask is None else checked_mask(whole, given.mask, " (all positions)")
    call = Call.of(  # of whole sequences, without their logits
        loss, Parts(student.rows.new_empty(samples, sum(lengths[0]), 0)),
        Parts(teacher.rows.new_empty(samples, sum(lengths[1]), 0)), alignment,
        sizes=(columns[0].size, columns[1].size), mask=mask, labels=None, reduction=reduction, backend=given.backend,
    )  # fmt: skip
    source = _Teacher(teacher.detached().source(columns[1].width), columns[1], cp)
    prepared = loss.prepare(call, student.source(columns[0].width), source)
    chunks = prepared.chunks.kept()[0]
    own = share(chunks, positions, samples, cp)
    in_parts = None
    if max(one.ranks.size for one in columns) > 1 or len(own.split):
        in_parts = _formula(loss, prepared, columns, device, len(own.split))
    following = None
    if labels is not None:
        following = checked_ids(checked_labels(whole, labels, note="all positions"), columns[0].size)
    run = _Run(
        loss.name, prepared, in_parts, student.detached(), teacher.detached(), columns, tp, cp, chunks, own, positions,
        following, call.predicted.numel() if call.predicted is not None else whole.numel(), reduction,
        given.backend,
    )  # fmt: skip
    result, cross_entropy = _Loss.apply(run, student.rows, student.head, student.bias, loss.trained)
    if alignment is None and reduction == "none":
        result = result.view(whole)
    return result if labels is None else (result, cross_entropy)


class Sharded(NamedTuple):
    """Whether the columns of a side are parts, as a DTensor says; None: it is none, and widths have to tell."""

    student: bool | None
    teacher: bool | None


def _local(given: Given, tp_group: Any) -> tuple[Given, Any, Sharded]:
    """The same of the logits of this rank, the group over which their columns are sharded, and which are."""
    if not has_dtensor(given.student_logits, given.teacher_logits):
        return given, tp_group, Sharded(None, None)
    from xtoken.parallel.dtensor import local_part

    student, group, student_sharded = local_part(given.student_logits, SIDES[0], tp_group)
    teacher, other, teacher_sharded = local_part(given.teacher_logits, SIDES[1], tp_group)
    for name, one, sharded in zip(SIDES, (group, other), (student_sharded, teacher_sharded), strict=True):
        if sharded and tp_group is not None and one != tp_group:
            raise ValueError(f"{name}: expected columns sharded over tp_group, got another group of ranks")
    if student_sharded and teacher_sharded and group != other:
        raise ValueError("teacher_logits: expected columns sharded over the ranks of student_logits', got other ranks")
    if not student_sharded and (student_sharded is False or tp_group is None):
        if teacher_sharded or tp_group is not None:
            raise ValueError(
                "student_logits: expected sharded columns beside tp_group or a sharded teacher, got whole rows"
            )
        group, student_sharded, teacher_sharded = None, False, False
    elif not student_sharded:
        group = tp_group
    local = given._replace(student_logits=student, teacher_logits=teacher)
    return local, group, Sharded(student_sharded, teacher_sharded)


def _check_mesh(tp: Ranks, cp: Ranks) -> None:
    if tp.size > 1 and cp.size > 1:
        of_tp, of_cp = (dist.get_process_group_ranks(one.group) for one in (tp, cp))
        if len(set(of_tp) & set(of_cp)) > 1:
            raise ValueError(
                f"cp_group: expected no rank of tp_group but this one (rows and columns of a mesh), got ranks {of_cp} "
                f"and tp_group {of_tp}"
            )


def cross_entropy(
    student_logits: AnyLogits, labels: Tensor, size: int | None, groups: dict[str, Any], backend: str
) -> Tensor:
    """The student's next-token cross-entropy alone, summed over the labels: beside a loss that has no position."""
    kind = next(one for one in registered().values() if one.needs is Needs.SAME_TOKENIZER and one.is_default)
    given = Given(
        kind.of(None, None, **kind.options()), student_logits, student_logits, None, labels, (size, size),
        torch.zeros(labels.shape, dtype=torch.bool, device="cpu"), "sum", False, backend,
    )  # fmt: skip
    result: tuple[Tensor, Tensor] = compute(given, Groups(**groups))
    return result[1]


def _checked(given: Given, groups: Groups, tp: Ranks, is_sharded: Sharded) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a rank can see to by itself. What is to be the same on all ranks, and what is each rank's own."""
    loss, student_logits, teacher_logits, alignment, labels, _, mask, reduction, inplace, backend = given
    logits = check_call(loss, student_logits, teacher_logits, alignment, labels, reduction, backend, groups.cp_layout)
    if inplace:
        raise ValueError("inplace: expected False for logits in parts")
    if tp.size > 1 and backend not in ("auto", "reference"):
        raise ValueError(f"backend: expected 'auto' or 'reference' with tp_group, got {backend!r}")
    if tp.size > 1 and _module(loss) is None:
        raise ValueError(f"tp_group: expected whole rows for {loss.title}: {_reason(loss)}")
    loss.check_tables()
    loss.check()
    wanted = [
        one is not None and one.requires_grad for one in (logits[0].rows, logits[0].head, logits[0].bias, loss.trained)
    ]
    host = None if alignment is None else alignment.host
    same = {
        "loss": loss.title,
        **{one.name: _shown(getattr(loss, one.name)) for one in fields(loss)},
        "alignment": None if host is None else [_shown(getattr(host, name)) for name in _OF_ALIGNMENT],
        "student_logits": f"{_kind(logits[0], is_sharded.student)}, gradients {wanted}",
        "teacher_logits": _kind(logits[1], is_sharded.teacher),
        "labels": _shown(labels),
        "mask": _shown(mask),
        "reduction": reduction,
        "cp_layout": groups.cp_layout,
    }
    own: dict[str, Any] = {}
    for k in (0, 1):
        own[_COLUMNS[k]], own[_POSITIONS[k]] = logits[k].width, logits[k].leading_shape[-1]
    return same, own


_COLUMNS, _POSITIONS = ([f"{what} of {name}" for name in SIDES] for what in ("columns", "positions"))
_OF_ALIGNMENT = "spans", "offsets", "predicted", "student_ids", "teacher_ids"


def _kind(logits: Parts, is_sharded: bool | None) -> str:
    """All that has to be the same but values and widths."""
    name, more = "logits", "" if is_sharded is None else f", a DTensor {'in parts' if is_sharded else 'that is whole'}"
    if logits.head is not None:
        name, more = "LinearLogits", f"{more}, softcap {logits.softcap or None}, logit_scale {logits.scale}"
    elif logits.top is not None:
        name, more = "TopKLogits", f"{more}, tail {logits.tail!r}"
    rows, samples = logits.rows, list(logits.leading_shape[:-1])
    return f"{name} of {samples} samples, {rows.dtype} on {rows.device.type}{more}"


def _shown(value: Any) -> Any:
    """Of an argument what can be compared with that of other ranks at little cost: no values on a device, nor of W."""
    if isinstance(value, Matrix):
        return f"{list(value.shape)} with {len(value.col)} entries"
    if not isinstance(value, Tensor):
        return value
    shown = f"{value.dtype} {list(value.shape)}"
    if value.device.type == "cpu":
        shown += f" of checksum {zlib.crc32(value.detach().contiguous().numpy().tobytes()):08x}"
    return shown


def _agreed(
    report: Report, loss: Loss, sizes: tuple[int | None, int | None], tp: Ranks, cp: Ranks, is_sharded: Sharded
) -> tuple[tuple[Columns, Columns], list[list[int]]]:
    """The columns of both sides, and how many positions of each the ranks have; or an error, on all ranks."""
    of_tp, of_cp = report.told(tp, *_POSITIONS), report.told(cp, *_COLUMNS)
    columns = None
    if report.message is None:
        try:
            columns = _columns(loss, sizes, [[one[name] for one in of_tp] for name in _COLUMNS], tp, is_sharded)
        except ValueError as raised:
            report.fail(raised)
    if tp.size > 1 and cp.size > 1:  # what a row or column of the mesh has found, others do not know yet
        report.told(cp)
        report.told(tp)
    report.check()
    assert columns is not None
    return columns, [[one[name] for one in of_cp] for name in _POSITIONS]


def _columns(
    loss: Loss,
    sizes: tuple[int | None, int | None],
    widths: list[list[int | None]],
    tp: Ranks,
    is_sharded: Sharded,
) -> tuple[Columns, Columns]:
    """The columns of both sides, by how many the ranks have."""
    of_student, of_teacher = ([width or 0 for width in one] for one in widths)
    has_parts = [tp.size > 1, tp.size > 1 and is_sharded.teacher is not False and None not in widths[1]]
    if sizes == (None, None) and loss.needs is Needs.SAME_TOKENIZER:
        if has_parts[0] and None in is_sharded:
            raise ValueError(
                "vocab_size: expected the number of tokens with tp_group, since widths alone do not tell whole rows "
                f"from parts, got None and columns {of_student} and {of_teacher} on the ranks; a DTensor says it itself"
            )
        known = [sum(of) if parts else min(of) for of, parts in zip((of_student, of_teacher), has_parts, strict=True)]
        sizes = (min(known[: 2 - (None in widths[1])]),) * 2
    found = []
    for side, own in enumerate((of_student, of_teacher)):
        size, told = sizes[side], is_sharded[side]
        if size is None and None not in widths[side]:
            size = sum(own) if has_parts[side] else min(own)
        if size is None:
            raise ValueError(f"{SIDES[side]}: expected the size of the vocabulary to be given too, for TopKLogits")
        if has_parts[side] and told is None:
            has_parts[side] = _are_parts(side, own, size)
        held = None if None in widths[side] else sum(own) if has_parts[side] else min(own)
        if held is not None and held < size and not loss.may_lack(side, held):
            raise ValueError(
                f"{SIDES[side]}: expected at least {size} columns (the vocabulary) on all ranks together, got {held}"
            )
        columns = Columns.of(own, size, tp) if has_parts[side] else Columns((0, size), Ranks())
        found.append(columns._replace(held=held))
    return found[0], found[1]


def _are_parts(side: int, widths: Sequence[int], size: int) -> bool:
    """Whether these widths, of tensors that do not say it themselves, are those of parts, and not of whole rows.

    ValueError if they are neither: parts have each column of the vocabulary once. More columns are padding at the end
    if an output layer, padded a little, was cut as torch and Megatron cut it; with others two ranks may have the same,
    and with fewer some are missing at the end, or in between.
    """
    total, ranks = sum(widths), len(widths)
    if total == size:
        return True
    if side == 1 and min(widths) == max(widths) >= size:
        return False
    each = -(-total // ranks)
    is_even = list(widths) == [max(0, min(each, total - rank * each)) for rank in range(ranks)]
    # Layers have up to 3 % of columns without a token, and Megatron makes those of each rank a multiple of 128.
    if is_even and max(widths) < size < total < size + size // 32 + 128 * ranks:
        return True
    expected = f"each of the {size} columns of the vocabulary on one rank" + (
        ", or rows of all of them on every rank" if side == 1 else ""
    )
    ends = [min(size, end) for end in itertools.accumulate(widths)]
    own = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    hint = f" (of padding at the end leave {own})" if total > size > max(widths) else ""
    raise ValueError(
        f"{SIDES[side]}: expected {expected}, got {list(widths)} on the ranks of tp_group{hint}; a DTensor says itself "
        "which columns it has"
    )


def _module(loss: Loss) -> Any:
    """With the formula of logits in parts, None if there is none."""
    return None if loss.whole_rows else kernels_of(loss.name, "parallel")


def _reason(loss: Loss) -> str:
    return loss.whole_rows or "it has no formula for logits in parts"


def _formula(loss: Loss, prepared: Prepared, columns: tuple[Columns, Columns], device: torch.device, split: int) -> Any:
    module = _module(loss)
    if module is None:
        raise ValueError(
            f"cp_group: expected chunks that each lie on one rank for {loss.title}, got {split} on several: "
            f"{_reason(loss)}"
        )
    return module.InParts(prepared.options, *columns, device)


class _Teacher:
    """A teacher's logits in parts, of which columns are chosen."""

    def __init__(self, source: Source, columns: Columns, sequence: Ranks) -> None:
        self.source, self.columns, self.sequence = source, columns, sequence
        self.samples, self.length, self.size = source.samples, source.length, columns.size

    def rows(self, start: int, stop: int) -> Tensor:
        return self.source.rows(start, stop)

    def at(self, index: Tensor) -> Tensor:
        return self.source.at(index)

    def largest_columns(self, top_k: int | None) -> Tensor:
        """`xtoken.reference.column_set` of the rows of all ranks; the ranks exchange their candidates."""
        source, ranks = self.source, self.columns.ranks
        total, width = source.samples * source.length, self.columns.width
        none = source.rows(0, 0)
        if top_k is None or top_k >= self.size:
            return torch.arange(self.size, device=none.device)
        maxima = none.new_full((width,), -torch.inf, dtype=statistics_dtype(none))
        step = max(1, BLOCK_ELEMENTS // max(1, width))
        for first in range(0, total, step):
            maxima = torch.maximum(maxima, source.rows(first, min(total, first + step)).amax(0).to(maxima.dtype))
        maxima = self.sequence.largest(maxima)
        if ranks.size == 1:
            return column_set(maxima[None], top_k)
        bounds = self.columns.bounds
        count = min(top_k, max(last - first for first, last in itertools.pairwise(bounds)))
        best = maxima.sort(descending=True, stable=True).indices[:count].sort().values
        pad = (0, count - len(best))
        values = ranks.gathered(torch.nn.functional.pad(maxima[best], pad, value=-torch.inf)).flatten()
        ids = ranks.gathered(torch.nn.functional.pad(best + self.columns.first, pad, value=self.size)).flatten()
        values, ids = values[ids < self.size], ids[ids < self.size]  # ascending
        return ids[column_set(values[None], top_k)]


class _Extent(NamedTuple):
    """How large blocks may be, the same on all ranks."""

    samples: int
    length: int
    size: int


@dataclass
class _Run:
    """A call that is ready to be computed, with or without gradients."""

    name: str
    prepared: Prepared
    in_parts: Any
    student: Parts
    teacher: Parts
    columns: tuple[Columns, Columns]
    tp: Ranks
    cp: Ranks
    chunks: Chunks
    share: Share
    positions: tuple[Positions, Positions]
    following: Tensor | None
    total: int
    reduction: str
    backend: str

    def results(self) -> tuple[Tensor, Tensor]:
        """The loss and the cross-entropy."""
        losses, split, labels = self._computed(None, None, None, None)
        if self.reduction == "none":
            everything = losses.new_zeros(self.total).index_copy(0, self.share.own.used, losses)
            result = self.cp.total(everything).index_add(0, self.share.split.used, split)
        else:
            result = self.cp.total(losses.sum(dtype=torch.float64)) + split.sum(dtype=torch.float64)
            if self.reduction == "mean":
                result = result / never_zero(len(self.chunks))
        cross_entropy = losses.new_zeros(())
        if labels is not None:
            entropy = self.cp.total(labels.losses.sum(dtype=torch.float64)) / self._labelled()
            cross_entropy = entropy.to(labels.losses.dtype)
        return result.to(losses.dtype), cross_entropy

    def gradients(self, upstream: Tensor, label_upstream: Tensor, flags: Flags, weight: Tensor | None) -> Gradients:
        """Of what is wanted, on this rank's part of it."""
        rows = self.student.rows
        grads = Gradients(self.student, None if weight is None else weight.to(rows.device), flags, False)
        scale = chunk_scale(self.chunks, self.reduction, upstream, rows)
        self._computed(grads, scale, label_upstream, weight)
        if self.columns[0].ranks.size > 1:
            if grads.wanted and self.student.head is not None:
                hidden = grads.student.to(statistics_dtype(grads.student))
                grads.student = self.tp.total(hidden).to(grads.student.dtype)
            if grads.weight is not None:
                grads.weight = self.tp.total(grads.weight)
        return grads

    def _labelled(self) -> Tensor | int:
        assert self.following is not None
        return (self.following != IGNORED).sum().clamp_min(1) if self.reduction == "mean" else 1

    def _labels(self, upstream: Tensor | None) -> Labels | None:
        if self.following is None:
            return None
        rows, samples = self.student.rows, self.student.rows.shape[0]
        place = self.positions[0].rows(samples, self.cp.rank)
        here = (place >= 0).nonzero()[:, 0].to(self.following.device)
        local = place[place >= 0].to(self.following.device)
        ids = torch.full((len(here),), IGNORED, device=self.following.device).index_copy(0, local, self.following[here])
        scale = torch.ones((), dtype=torch.float64, device=rows.device) if upstream is None else upstream.double()
        losses = rows.new_zeros(len(ids), dtype=statistics_dtype(rows))
        return Labels(to_device(ids, rows.device), losses, scale / self._labelled())

    def _computed(
        self, grads: Gradients | None, scale: Tensor | None, label_upstream: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Labels | None]:
        """The losses of this rank's own chunks, those of chunks on several ranks, and the cross-entropy of its rows."""
        kind = self.student.rows.device.type
        labels, own = self._labels(label_upstream), self.share
        student, teacher = self.student.source(self.columns[0].width), self.teacher.source(self.columns[1].width)
        is_whole = max(one.ranks.size for one in self.columns) == 1
        with torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext():
            part = None if scale is None else scale[own.own_places]
            if is_whole:
                prepared = Prepared(own.own, self.prepared.options)
                sources = student, teacher
                losses = computed(self.name, sources, prepared, weight, self.backend, grads, part, labels)
            else:
                losses = self._own_in_parts(student, teacher, grads, part, labels, weight)
            split = losses.new_zeros(0)
            if len(own.split):
                part = None if scale is None else scale[own.split_places]
                split = self._split(student, teacher, grads, part, weight)
        return losses, split, labels

    def _own_in_parts(
        self, student: Any, teacher: Any, grads: Gradients | None, scale: Tensor | None, labels: Labels | None,
        weight: Tensor | None,
    ) -> Tensor:  # fmt: skip
        extents: Any = [
            _Extent(source.samples, source.length, -(-columns.size // columns.ranks.size))
            for source, columns in zip((student, teacher), self.columns, strict=True)
        ]
        parts = []
        for block in row_blocks(extents[0], extents[1], self.share.own):
            z, y = block.rows(student, teacher)
            part = None if labels is None else labels.part(block.student)
            sides = Side(z, self.columns[0], self.cp), Side(y, self.columns[1], self.cp)
            losses, grad = self._formula(
                sides, block.chunks, None if scale is None else scale[block.span], part, grads, weight
            )
            parts.append(losses)
            if grads is not None and grads.wanted:
                grad = z.new_zeros(z.shape) if grad is None else grad.to(z.dtype)
                grads.add(student, grad, z, block.student)
        return torch.cat(parts)

    def _split(
        self, student: Any, teacher: Any, grads: Gradients | None, scale: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        chunks, samples = self.share.split, self.student.rows.shape[0]
        sides, rows = [], []
        for source, of, columns, positions in zip(
            (student, teacher), (chunks.student, chunks.teacher), self.columns, self.positions, strict=True
        ):
            place = positions.rows(samples, self.cp.rank).to(chunks.used.device)
            index = of.index().unique()
            index = index[place[index] >= 0]
            number = torch.full_like(place, -1)
            number[index] = torch.arange(len(index), device=index.device)
            rows.append(place[index])
            sides.append(Side(source.at(place[index]), columns, self.cp, number))
        losses, grad = self._formula((sides[0], sides[1]), chunks, scale, None, grads, weight)
        if grads is not None and grad is not None:
            z = sides[0].logits
            grads.add(student, grad.to(z.dtype), z, rows[0])
        return losses

    def _formula(
        self, sides: tuple[Side, Side], chunks: Chunks, scale: Tensor | None, labels: Labels | None,
        grads: Gradients | None, weight: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The losses of some chunks, and the gradient of the student's rows; fills in the cross-entropy of the rows."""
        student, teacher = sides
        leaf = student.logits.detach().to(statistics_dtype(student.logits))
        weight = None if weight is None else weight.detach()
        wanted = []
        if grads is not None and grads.wanted:
            wanted.append(leaf.requires_grad_())
        if grads is not None and grads.weight is not None and weight is not None:
            wanted.append(weight.requires_grad_())
        student = Side(leaf, student.columns, student.sequence, student.place)
        with torch.set_grad_enabled(bool(wanted)):
            found = leaf.new_zeros(0, dtype=statistics_dtype(leaf, teacher.logits))
            if len(chunks):
                found = self.in_parts.losses(student, teacher, chunks, weight)
            entropies = None if labels is None else _cross_entropy(student, labels)
            if not wanted or (entropies is None and not len(chunks)):
                return found.detach(), None
            total = found.sum() if scale is None else (found * scale.to(found.dtype)).sum()
            if entropies is not None and labels is not None:
                total = total + (entropies.sum(dtype=torch.float64) * labels.scale).to(total.dtype)
        gradients = list(torch.autograd.grad(total, wanted, allow_unused=True))
        assert grads is not None
        of_rows = gradients.pop(0) if grads.wanted else None
        if gradients and gradients[0] is not None and grads.weight is not None:
            grads.weight += gradients[0]
        return found.detach(), of_rows


def _cross_entropy(student: Side, labels: Labels) -> Tensor:
    """[n]: of the labelled rows; fills in ``labels.losses``."""
    index = (labels.ids != IGNORED).nonzero()[:, 0]
    log_p = student.columns.ranks.log_softmax(scaled(student.logits[index], 1.0, labels.losses.dtype))
    losses = -student.columns.picked(log_p, labels.ids[index])
    labels.losses[index] = losses.detach()
    return losses


class _Loss(torch.autograd.Function):
    """Forward computes the results, backward computes them again with their gradients."""

    @staticmethod
    def forward(
        ctx: Any, run: _Run, student: Tensor, head: Tensor | None, bias: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.run, ctx.weight = run, None if weight is None else weight.detach()
        ctx.save_for_backward(student, head, bias, weight)  # so that a change of them is noticed
        return run.results()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, label_upstream: Tensor) -> tuple[Tensor | None, ...]:
        run, (_, *needed), origins = ctx.run, ctx.needs_input_grad, (*ctx.saved_tensors, upstream, label_upstream)
        head_wanted = needed[1] or needed[2]
        flags = Flags(needed[0] or head_wanted, head_wanted, needed[3], None, None)
        with torch.no_grad():
            grads = run.gradients(upstream, label_upstream, flags, ctx.weight if needed[3] else None)
            head, bias = grads.in_types()
            weight = None if grads.weight is None else grads.weight.to(ctx.weight.device)
        given: list[Tensor | None] = [grads.student, head, bias, weight]
        if torch.is_grad_enabled():
            given = [None if grad is None else once_only(grad, *origins) for grad in given]
        return None, *(grad if is_needed else None for grad, is_needed in zip(given, needed, strict=True))
