"""XTokenLoss: totals, scaling, several teachers, accumulation."""

import dataclasses
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparer import assert_close, assert_within
from default_losses import DEFAULT, OTHER, default_loss
from harness import OPERATIONS, Case, make_case, piece_index, variants
from torch import Tensor, nn

from xtoken import LinearLogits, PieceIndex, ProjectionMatrix, Teacher, TopKLogits, Vocabulary, XTokenLoss
from xtoken.alignment import Alignment
from xtoken.losses import Needs, diagnostics, operator, registered
from xtoken.losses.columns import select_columns
from xtoken.losses.criterion import ratio
from xtoken.losses.logits import TAILS, DenseSource
from xtoken.losses.on_pieces import OnPartners, partners

projected_loss, shared_loss = default_loss(Needs.PROJECTION), default_loss(Needs.SAME_TOKENIZER)
PROJECTED, PIECES, SHARED = (DEFAULT[needs] for needs in (Needs.PROJECTION, Needs.PIECES, Needs.SAME_TOKENIZER))


def make_labels(case: Case, seed: int = 0) -> Tensor:
    """Random labels, some ignored, more in the first sample than in the others."""
    generator = torch.Generator().manual_seed(seed)
    shape = case.student.shape[:2]
    labels = torch.randint(case.projection.shape[0], shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < torch.linspace(0.1, 0.5, shape[0]).flip(0)[:, None]
    return labels.masked_fill(ignored, -100)


def supervised(alignment: Alignment, labels: Tensor, teacher_labels: Tensor | None = None) -> Alignment:
    """By hand: a chunk counts if each of its tokens is labelled."""
    predicted, spans = [], alignment.spans.tolist()
    for sample, (first, last) in enumerate(pairwise(alignment.offsets.tolist())):
        for (a, b, c, d), seen in zip(spans[first:last], alignment.predicted.tolist()[first:last], strict=True):
            own = labels[sample].tolist()[a:b]
            theirs = [] if teacher_labels is None else teacher_labels[sample].tolist()[c:d]
            predicted.append(seen and all(one != -100 for one in own + theirs))
    ids = alignment.student_ids, alignment.teacher_ids
    return Alignment(alignment.spans, alignment.offsets, *ids, predicted=predicted)


def without_prompt(case: Case, labels: Tensor) -> Case:
    """The case with only the supervised chunks."""
    return Case(case.student, case.teacher, supervised(case.alignment, labels), case.projection)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Shifted cross-entropy as transformers computes it."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_fixed_total_and_parts() -> None:
    case, other = make_case(), make_case(67, 41, seed=1)
    labels = make_labels(case)
    teachers = [
        Teacher(case.projection, weight=0.5, top_k=11, merge="mean", temperature=2.0),
        Teacher(other.projection, loss=OTHER, weight=2.0, **OPERATIONS[OTHER].few(7)),
    ]
    criterion = XTokenLoss(teachers, scaling="fixed", ce_weight=0.3, kd_weight=0.7)
    total, parts = criterion(case.student, labels, [case.teacher, other.teacher], [case.alignment, other.alignment])
    ce = cross_entropy(case.student, labels)
    counted = supervised(case.alignment, labels)
    first = projected_loss(
        case.student, case.teacher, counted, case.projection, top_k=11, merge="mean", temperature=2.0
    )
    second = OPERATIONS[OTHER].public(
        without_prompt(other, labels), case.student, other.teacher, **OPERATIONS[OTHER].few(7)
    )
    kd = 0.5 * first + 2.0 * second
    assert_close(parts["ce"], ce, rtol=1e-12)
    assert_close(parts["kd"], kd, rtol=1e-12)
    assert_close(parts["kd_per_teacher"], torch.stack([first, second]), rtol=1e-12)
    assert_close(total, 0.3 * ce + 0.7 * kd, rtol=1e-12)
    counts = [[int(a.predicted.sum()) for a in (one, supervised(one, labels))]
              for one in (case.alignment, other.alignment)]  # fmt: skip
    assert parts["chunks"].tolist() == [count for _, count in counts]
    assert parts["unsupervised"].tolist() == [before - count for before, count in counts]
    assert min(counts[0]) > 0 < counts[0][0] - counts[0][1]
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("alone", [False, True])
def test_labels_of_cross_entropy_alone(alone: bool) -> None:
    """Both parts and their counts have their own; without any, what is left is KD."""
    case, shared = make_case(), make_case(59, 59)
    labels, targets = make_labels(shared), make_labels(shared, seed=1)
    targets = torch.full_like(targets, -100) if alone else targets
    student = case.student.requires_grad_()
    criterion = XTokenLoss([Teacher(case.projection), Teacher()], scaling="dynamic", max_scale=100.0)
    given = [case.teacher, shared.student], [case.alignment, None]
    total, parts = criterion(student, labels, *given, ce_labels=targets)
    kd = projected_loss(student, case.teacher, supervised(case.alignment, labels), case.projection)
    mask = nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    kd = kd + shared_loss(student, shared.student, mask=mask)
    ce = 0 * student.sum() if alone else cross_entropy(student, targets)
    assert_close(parts["ce"], ce.detach(), rtol=1e-12)
    assert_close(parts["kd"], kd.detach(), rtol=1e-12)
    scale = 1.0 if alone else (ce / kd).detach()
    wanted, got = (torch.autograd.grad(one, student, retain_graph=True)[0] for one in (ce + scale * kd, total))
    assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    items, counts = criterion.counts(labels, given[1], targets)
    assert [items, *counts] == [int((targets[:, 1:] != -100).sum()), *parts["chunks"].tolist()]
    with pytest.raises(ValueError, match=r"ce_labels: expected shape .* \(that of the logits' rows\), got"):
        criterion(student, labels, *given, ce_labels=targets[:, 1:])


def test_dynamic_scaling_is_constant_in_backward() -> None:
    case = make_case()
    labels = make_labels(case)
    student = case.student.requires_grad_()
    total, parts = XTokenLoss([Teacher(case.projection)])(student, labels, case.teacher, case.alignment)
    assert_close(total, 2 * parts["ce"], rtol=1e-12)
    (got,) = torch.autograd.grad(total, student)
    ce = cross_entropy(student, labels)
    kd = projected_loss(student, case.teacher, supervised(case.alignment, labels), case.projection)
    (want,) = torch.autograd.grad(ce + (ce / kd).detach() * kd, student)
    assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_the_ratio_is_bounded() -> None:
    """Also where KD is negative, or 0 since the student has reached its teacher. The paper's rule has no bound."""
    ce, kd = torch.tensor(6.0), torch.tensor([3.0, -3.0, 1e-9, -1e-9, 0.0])
    assert ratio(ce, kd, 4.0).tolist() == [2.0, 2.0, 4.0, 4.0, 4.0]
    assert ratio(ce, kd, math.inf).tolist() == [2.0, 2.0, pytest.approx(6e9), pytest.approx(6e9), 0.0]
    assert ratio(0 * ce, kd, 4.0).tolist() == [1.0] * 5  # no labels: what is left is KD as it is
    assert ratio(0 * ce, kd, 0.5).tolist() == [0.5] * 5


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.3])
def test_a_student_near_its_teacher_keeps_its_gradient(noise: float) -> None:
    """That of CE, plus at most `max_scale` times a small one; the loss to log shows KD."""
    case = make_case(59, 59)
    labels = make_labels(case).clamp_max(58)
    student = (case.student + noise * case.student.roll(1, 0)).requires_grad_()
    total, parts = XTokenLoss([Teacher()], max_scale=5.0, kd_weight=0.5)(student, labels, case.student)
    (got,) = torch.autograd.grad(total, student)
    ce = cross_entropy(student, labels)
    mask = nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    kd = shared_loss(student, case.student, mask=mask)
    assert float(ce.detach()) / 5 > float(kd.detach())
    assert float(parts["scale"]) == 5.0
    assert bool(parts["bounded"]) == (noise > 0)
    (want,) = torch.autograd.grad(ce + 0.5 * 5.0 * kd, student)
    assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert_close(parts["unscaled"], (ce + 0.5 * kd).detach(), rtol=1e-12)
    assert not any(part.requires_grad for part in parts.values())
    fixed = XTokenLoss([Teacher()], "fixed", kd_weight=0.5)(student, labels, case.student)
    assert_close(fixed[0].detach(), fixed[1]["unscaled"], rtol=1e-12)
    assert not bool(fixed[1]["bounded"])


def test_dynamic_scaling_without_distillation() -> None:
    case = make_case(shapes=())
    student = torch.randn(2, 4, 67).requires_grad_()
    labels = torch.zeros(2, 4, dtype=torch.int64)
    empty = Alignment([], [0, 0, 0])
    total, parts = XTokenLoss([Teacher(case.projection)])(student, labels, case.teacher, empty)
    total.backward()
    assert parts["kd"].item() == 0
    assert math.isnan(parts["agreement"])
    assert_close(total, cross_entropy(student, labels), rtol=1e-6)
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_everything_ignored_is_finite() -> None:
    case = make_case()
    student = case.student.requires_grad_()
    labels = torch.full(student.shape[:2], -100)
    with pytest.warns(UserWarning, match="labels: no chunk of the alignment has all of its tokens labelled"):
        total, parts = XTokenLoss([Teacher(case.projection)])(student, labels, case.teacher, case.alignment)
    total.backward()
    assert total.item() == 0 == parts["ce"].item() == parts["kd"].item()
    assert (int(parts["chunks"]), int(parts["unsupervised"])) == (0, int(case.alignment.predicted.sum()))
    assert student.grad is not None
    assert bool((student.grad == 0).all())


@pytest.mark.parametrize("teachers", [0, 1])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_without_positions(backend: str, layer: bool, teachers: int) -> None:
    hidden, head = torch.zeros(1, 0, 3), torch.ones(5, 3, requires_grad=True)
    logits = LinearLogits(hidden, head) if layer else hidden @ head.T
    criterion = XTokenLoss([Teacher()] * teachers, "fixed", backend=backend)
    total, parts = criterion(logits, torch.zeros(1, 0, dtype=torch.int64), [torch.zeros(1, 0, 5)] * teachers)
    total.backward()
    assert (total.item(), parts["ce"].item()) == (0.0, 0.0)
    assert head.grad is not None
    assert not bool(head.grad.any())


def test_no_teacher_is_cross_entropy() -> None:
    case = make_case()
    labels = make_labels(case)
    total, parts = XTokenLoss([])(case.student, labels, [])
    assert_close(total, cross_entropy(case.student, labels), rtol=1e-12)
    assert parts["kd_per_teacher"].shape == parts["chunks"].shape == (0,)


@pytest.mark.parametrize("loss", registered())
def test_every_loss(loss: str) -> None:
    case, operation = make_case(), OPERATIONS[loss]
    alignment, *pair = operation.arguments(case)
    labels = make_labels(case).clamp_max(operation.size(case) - 1)
    arguments = case.student, case.teacher, supervised(alignment, labels), *pair
    for options in ({}, *variants(loss).values()):
        criterion = XTokenLoss([operation.teacher(case, **options)])
        _, parts = criterion(case.student, labels, case.teacher, alignment)
        if operation.needs in (Needs.PIECES, Needs.PROJECTION):
            assert criterion.vocab_size == 67
        want = operation.function()(*arguments, **operation.sizes(case), **options)
        assert_close(parts["kd"], want, rtol=1e-12)
        if operation.needs is Needs.NOTHING:  # see the next test
            continue
        assert 0 <= float(parts["agreement"]) <= 1
        if not options and not isinstance(operation.teacher(case).make_loss(), OnPartners):
            assert_close(parts["mass"], torch.ones(1), rtol=1e-6)


def test_a_projection_may_be_there_for_its_diagnoses() -> None:
    case = make_case()
    names = [name for name, loss in registered().items() if loss.needs is Needs.NOTHING]
    for name in names:
        teacher = Teacher(case.projection, loss=name)
        _, parts = XTokenLoss([teacher])(case.student, make_labels(case), case.teacher, case.alignment)
        counted = without_prompt(case, make_labels(case))
        assert_close(parts["kd"], OPERATIONS[name].public(counted, case.student, case.teacher), rtol=1e-12)
        assert 0 <= float(parts["agreement"]) <= 1
        assert_close(parts["mass"], torch.ones(1), rtol=1e-6)


def test_shared_tokenizer_uses_the_labels_positions() -> None:
    case = make_case(59, 59)
    labels = make_labels(case)
    teacher_logits = case.student.roll(1, 0)
    criterion = XTokenLoss([Teacher(weight=2.0, top_k=10, reverse=True)], scaling="fixed")
    total, parts = criterion(case.student, labels, teacher_logits)
    mask = nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    want = shared_loss(case.student, teacher_logits, mask=mask, top_k=10, reverse=True)
    assert_close(parts["kd"], 2 * want, rtol=1e-12)
    assert parts["chunks"].tolist() == [int(mask.sum())]
    assert_close(total, cross_entropy(case.student, labels) + 2 * want, rtol=1e-12)
    assert 0 < parts["mass"].item() < 1
    same = XTokenLoss([Teacher()])(case.student, labels, case.student.clone())[1]
    assert same["agreement"].tolist() == [1.0]
    assert same["kd"].item() == 0


def test_shared_tokenizer_with_an_alignment_and_padded_heads() -> None:
    case = make_case(59, 59)
    labels = make_labels(case)
    alignment = Alignment([[1, 2, 2, 3], [3, 4, 3, 4]], [0, 1, 2])
    padded = nn.functional.pad(case.teacher, (0, 5), value=math.nan)
    labels[:, 1:] = 1
    labels[1, 3] = -100
    _, parts = XTokenLoss([Teacher()])(case.student, labels, padded, alignment)
    counted = supervised(alignment, labels)
    assert_close(parts["kd"], shared_loss(case.student, case.teacher, counted, top_k=8192), rtol=1e-12)
    assert (parts["chunks"].tolist(), parts["unsupervised"].tolist()) == ([1], [1])


@pytest.mark.parametrize("weighting", ["fixed", "entropy"])
def test_a_narrower_teacher_leaves_cross_entropy_all_columns(weighting: str) -> None:
    """Whichever teacher comes first."""
    case = make_case(59, 59)
    labels = make_labels(case)
    student = nn.functional.pad(case.student, (0, 5), value=1.5).requires_grad_()
    narrow, wide = (Teacher(), case.student.roll(1, 0)), (Teacher(), student.detach())
    for pairs in ([narrow], [narrow, wide], [wide, narrow]):
        teachers, logits = zip(*pairs, strict=True)
        criterion = XTokenLoss(teachers, "fixed", kd_weight=0.0, teacher_weighting=weighting)
        total, parts = criterion(student, labels, list(logits))
        want = cross_entropy(student, labels)
        assert_close(parts["ce"], want, rtol=1e-12)
        got, true = (torch.autograd.grad(one, student)[0] for one in (total, want))
        assert_close(got, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factors_are_known_to_the_last_bit_of_float64(dtype: torch.dtype) -> None:
    """Of an output layer, whose gradients of both parts nothing can tell apart; the teacher is in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden, head, teacher = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 7, 5), (11, 5), (2, 7, 11))
    )
    labels = torch.randint(11, (2, 7), generator=generator)
    leaves = [one.to(dtype).requires_grad_() for one in (hidden, head)]
    criterion = XTokenLoss([Teacher(weight=0.3)], "dynamic", 0.7, 0.9)
    for scale, items in ((1 / 3, None), (torch.tensor(1 / 3), torch.tensor(13))):
        total, _ = criterion(LinearLogits(*leaves), labels, teacher, scale=scale, num_items=items, num_chunks=[17])
        got = torch.autograd.grad(total / 3, leaves)
        logits = (leaves[0] @ leaves[1].T).double()[:, :-1].log_softmax(-1)
        kd = nn.functional.kl_div(logits, teacher[:, :-1].log_softmax(-1), reduction="sum", log_target=True) / 17
        ce = nn.functional.nll_loss(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / (items or 12)
        want = torch.autograd.grad((0.7 * ce + 0.9 * 0.3 * scale * kd) / 3, leaves)
        eps = torch.finfo(dtype).eps
        for one, true in zip(got, want, strict=True):
            assert_close(one, true, rtol=64 * eps, atol=64 * eps * float(true.abs().max()))


def test_agreement_and_mass_by_hand() -> None:
    case = make_case(samples=1, shapes=((1, 1),) * 6)
    top_k = 20
    criterion = XTokenLoss([Teacher(case.projection, top_k=top_k)])
    _, parts = criterion(case.student, make_labels(case), case.teacher, case.alignment)
    columns = select_columns(DenseSource(case.teacher, case.projection.shape[1]), case.projection.shape[1], top_k=top_k)
    dense = torch.zeros(case.projection.shape, dtype=torch.float64)
    for student_id in range(case.projection.shape[0]):
        ids, weights = case.projection.row(student_id)
        dense[student_id, ids.long()] = weights.double()
    used = case.alignment.spans[supervised(case.alignment, make_labels(case)).predicted].long()
    projected = (case.student[0, used[:, 0] - 1].softmax(-1) @ dense)[:, columns]
    q = case.teacher[0, used[:, 2] - 1].softmax(-1)[:, columns]
    agreement = (projected.argmax(1) == q.argmax(1)).double().mean()
    assert_close(parts["agreement"], agreement[None], rtol=1e-6)
    assert_close(parts["mass"], q.sum(1).mean()[None], rtol=1e-6)


def test_agreement_on_events_by_hand() -> None:
    case = make_case(samples=1, shapes=((1, 1), (2, 1), (1, 3)))
    pieces = piece_index(*case.projection.shape)
    criterion = XTokenLoss([Teacher(pieces=pieces)])
    used = case.alignment.spans[supervised(case.alignment, make_labels(case)).predicted].long()
    ids = case.alignment.student_ids, case.alignment.teacher_ids
    ids[1][0, used[0, 2]] = (pieces.teacher.event != pieces.student.event[ids[0][0, used[0, 0]]]).nonzero()[0]
    _, parts = criterion(case.student, make_labels(case), case.teacher, case.alignment)
    best, events = [], []
    for logits, own, start, side in zip(
        (case.student, case.teacher), ids, (used[:, 0], used[:, 2]), (pieces.student, pieces.teacher), strict=True
    ):
        events.append(side.event[own[0, start]])
        p = logits[0, start - 1, : len(side.event)].double().softmax(-1)
        masses = torch.zeros(len(p), pieces.events, dtype=torch.float64).index_add(1, side.event.long(), p)
        best.append(masses.argmax(1))
    assert parts["agreement"].tolist() == [float((best[0] == best[1]).double().mean())]
    assert (parts["mass"].tolist(), parts["outside"].tolist()) == ([1.0], [0.0])
    assert parts["left_out"].tolist() == [float((events[0] != events[1]).double().mean())] != [0.0]


def test_diagnostics_can_be_switched_off() -> None:
    case = make_case()
    criterion = XTokenLoss([Teacher(case.projection)], diagnostics=False)
    _, parts = criterion(case.student, make_labels(case), case.teacher, case.alignment)
    assert bool(parts["agreement"].isnan().all() & parts["mass"].isnan().all())


def halves(case: Case, labels: Tensor) -> list[tuple[Any, ...]]:
    """The batch as micro-batches of two samples."""
    return [
        (case.student[part], labels[part], case.teacher[part], case.alignment.slice(part.start, part.stop))
        for part in (slice(0, 2), slice(2, 4))
    ]


def uneven(case: Case) -> Case:
    """Samples with different numbers of chunks."""
    spans, offsets = case.alignment.spans, case.alignment.offsets
    keep = torch.ones(len(spans), dtype=torch.bool)
    keep[1:5] = False
    counts = [int(keep[a:b].sum()) for a, b in pairwise(offsets.tolist())]
    kept = Alignment(spans[keep], [0, *torch.tensor(counts).cumsum(0).tolist()])
    return Case(case.student, case.teacher, kept, case.projection)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_accumulation_equals_the_whole_batch(dtype: torch.dtype) -> None:
    """One batch of four equals two of two, with the global counts, though labels and chunks are uneven."""
    case = uneven(make_case(samples=4))
    case = Case(case.student.to(dtype), case.teacher.to(dtype), case.alignment, case.projection)
    labels = make_labels(case)
    # The column set is taken over the rows at hand, so it is left out of the comparison.
    criterion = XTokenLoss([Teacher(case.projection, top_k=None)], scaling="fixed", kd_weight=0.5)
    student = case.student.clone().requires_grad_()
    total, parts = criterion(student, labels, case.teacher, case.alignment)
    total.backward()

    counted = [criterion.counts(one[1], one[3]) for one in halves(case, labels)]
    items = sum(one[0] for one in counted)
    chunks = sum(one[1][0] for one in counted)
    assert (items, [chunks]) == criterion.counts(labels, case.alignment)
    assert counted[0][0] != counted[1][0]
    assert counted[0][1] != counted[1][1]
    accumulated = case.student.clone().requires_grad_()
    rest = Case(accumulated, case.teacher, case.alignment, case.projection)
    sums = torch.zeros(3, dtype=dtype)
    for micro in halves(rest, labels):
        loss, micro_parts = criterion(*micro, num_items=items, num_chunks=torch.tensor(chunks))
        loss.backward()
        sums += torch.stack([loss.detach(), micro_parts["ce"], micro_parts["kd"]])
    eps = 8 * torch.finfo(dtype).eps
    assert_close(sums, torch.stack([total.detach(), parts["ce"], parts["kd"]]), rtol=eps)
    assert student.grad is not None
    assert accumulated.grad is not None
    assert_close(accumulated.grad, student.grad, rtol=eps, atol=eps * float(student.grad.abs().max()))


@pytest.mark.parametrize("kd_weight", [0.7, 0.0])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backward_has_nothing_left_to_do_where_the_factors_are_known(
    kd_weight: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward has prepared the gradient with them; a further factor is one of the whole."""
    case = make_case()
    case = Case(case.student.float(), case.teacher.float(), case.alignment, case.projection)
    labels = make_labels(case)
    scaled, added = [], []
    scale, add = operator._scaled, operator._add_cross_entropy
    monkeypatch.setattr(operator, "_scaled", lambda grad, factor: scaled.append(float(factor)) or scale(grad, factor))
    monkeypatch.setattr(
        operator, "_add_cross_entropy", lambda *a: scaled.append(float(a[3])) or added.append(float(a[4])) or add(*a)
    )
    teachers = [Teacher(case.projection, weight=0.3, top_k=20), Teacher(case.projection, loss=OTHER)]
    for scaling, given in (("fixed", None), ("dynamic", 2.5), ("dynamic", torch.tensor(2.5)), ("dynamic", None)):
        criterion = XTokenLoss(teachers, scaling, ce_weight=0.9, kd_weight=kd_weight, backend=backend)
        for outer in (1.0, 1 / 3):
            student = case.student.clone().requires_grad_()
            scaled.clear()
            added.clear()
            total, parts = criterion(student, labels, [case.teacher] * 2, [case.alignment] * 2, scale=given)
            (got,) = torch.autograd.grad(outer * total, student)
            if (scaling, given) != ("dynamic", None):
                lacking = 0.0 if kd_weight else 0.9 * outer / int((labels[:, 1:] >= 0).sum())
                assert added == [pytest.approx(lacking, rel=1e-6, abs=0.0)]
                factor, exactly = outer if kd_weight else 0.0, 0.0 if outer == 1.0 else 1e-6
                assert scaled == pytest.approx([factor] * len(scaled), rel=exactly, abs=0.0)
            counted = without_prompt(case, labels)
            losses = 0.3 * projected_loss(student, case.teacher, counted.alignment, case.projection, top_k=20)
            losses = losses + OPERATIONS[OTHER].public(counted, student, case.teacher)
            want = 0.9 * cross_entropy(student, labels) + kd_weight * parts["scale"] * losses
            (true,) = torch.autograd.grad(outer * want, student)
            assert_close(got, true, rtol=1e-4, atol=1e-5 * float(true.abs().max()))


def test_padded_head_takes_no_part_in_cross_entropy() -> None:
    case = make_case()
    labels = make_labels(case)
    student = nn.functional.pad(case.student, (0, 5), value=30.0).requires_grad_()
    criterion = XTokenLoss([Teacher(case.projection)])
    total, _ = criterion(student, labels, case.teacher, case.alignment)
    total.backward()
    assert_close(total, criterion(case.student, labels, case.teacher, case.alignment)[0], rtol=1e-12)
    assert student.grad is not None
    assert bool((student.grad[..., 67:] == 0).all())


def test_half_precision() -> None:
    case = make_case()
    student = case.student.bfloat16().requires_grad_()
    labels = make_labels(case)
    criterion = XTokenLoss([Teacher(case.projection)])
    total, _ = criterion(student, labels, case.teacher.bfloat16(), case.alignment)
    total.backward()
    assert total.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16
    rounded = student.detach().double(), labels, case.teacher.bfloat16().double(), case.alignment
    assert_close(total, criterion(*rounded)[0], rtol=1e-5)


def test_transforms_of_torch_func_are_an_error() -> None:
    case = make_case()
    criterion, labels = XTokenLoss([Teacher(case.projection)]), make_labels(case)
    with pytest.raises(RuntimeError, match=r"student_logits: xtoken losses have no derivative by torch\.func"):
        torch.func.grad(lambda student: criterion(student, labels, case.teacher, case.alignment)[0])(case.student)


@pytest.mark.filterwarnings("ignore:labels. no chunk of the alignment has all of its tokens labelled")
@pytest.mark.parametrize("zero", [0, torch.tensor(0)], ids=["int", "tensor"])
@pytest.mark.parametrize("scaling", ["fixed", "dynamic"])
def test_a_step_without_labels(scaling: str, zero: int | Tensor) -> None:
    """Its counts, added up, are 0; so are its loss and gradients."""
    case = make_case()
    criterion, labels = XTokenLoss([Teacher(case.projection)], scaling), torch.full_like(make_labels(case), -100)
    assert criterion.counts(labels, case.alignment) == (0, [0])
    student = case.student.clone().requires_grad_()
    total, parts = criterion(student, labels, case.teacher, case.alignment, zero, zero)
    total.backward()
    assert total == parts["ce"] == parts["kd"] == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("half", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_counts_may_be_a_share(half: float | Tensor) -> None:
    """As of one token on two ranks, whose gradients are averaged."""
    case = make_case()
    criterion, labels = XTokenLoss([Teacher(case.projection)]), make_labels(case)
    whole, shared = (
        criterion(case.student, labels, case.teacher, case.alignment, one, one)[0] for one in (2 * half, half)
    )
    assert_close(shared, 2 * whole, rtol=1e-6)


@pytest.mark.parametrize("scaling", ["fixed", "dynamic"])
def test_a_scaler_saves_small_gradients_of_float16(scaling: str) -> None:
    """Those of a mean over many items are below what float16 has, but not with the factor of a scaler."""
    case = make_case()
    labels = make_labels(case)
    criterion = XTokenLoss([Teacher(case.projection)], scaling)

    def gradient(student: Tensor, teacher: Tensor) -> Tensor:
        leaf = student.clone().requires_grad_()
        total, _ = criterion(leaf, labels, teacher, case.alignment, num_items=10**6, num_chunks=10**6)
        return torch.autograd.grad(2.0**16 * total, leaf)[0]

    student, teacher = case.student.half(), case.teacher.half()
    got, true = gradient(student, teacher), gradient(student.double(), teacher.double())
    assert_close(got.double(), true, rtol=5e-3, atol=1e-3 * float(true.abs().max()))


def test_one_sample_without_a_batch() -> None:
    case = make_case(samples=1)
    labels = make_labels(case)
    criterion = XTokenLoss([Teacher(case.projection)])
    total, _ = criterion(case.student[0], labels[0], case.teacher[0], Alignment(case.alignment.spans))
    assert_within(total, criterion(case.student, labels, case.teacher, case.alignment)[0], 1e-12)


UNTRAINED = [
    name
    for name, one in registered().items()
    if one.needs in (Needs.NOTHING, Needs.PROJECTION) and not one.trains_projection
]


@pytest.mark.parametrize("name", UNTRAINED)
def test_weights_that_a_loss_does_not_train_are_refused(name: str) -> None:
    projection = make_case().projection.learnable()
    with pytest.raises(ValueError, match=f"projection: expected fixed weights for loss='{name}'"):
        Teacher(projection, name)
    assert Teacher(projection.requires_grad_(False), name).projection is projection


def test_a_trainable_projection_learns() -> None:
    case = make_case(scale=1.0)
    criterion = XTokenLoss([Teacher(case.projection.learnable())], scaling="fixed")
    assert len(list(criterion.parameters())) == 1
    optimizer = torch.optim.SGD(criterion.parameters(), lr=1.0)
    history = []
    for _ in range(5):
        optimizer.zero_grad()
        total, parts = criterion(case.student, make_labels(case), case.teacher, case.alignment)
        total.backward()
        optimizer.step()
        history.append(parts["kd"].item())
    assert history == sorted(history, reverse=True)
    assert history[-1] < history[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": "another", "projection": 1},
            f"loss: expected one of {', '.join(map(repr, registered()))}, got 'another'",
        ),
        ({"loss": PROJECTED}, f"projection: expected a projection matrix for loss='{PROJECTED}', got None"),
        ({"loss": OTHER}, f"projection: expected a projection matrix for loss='{OTHER}', got None"),
        ({"loss": SHARED, "projection": 1}, f"projection: expected None for loss='{SHARED}'"),
        ({"loss": PIECES, "projection": 1, "pieces": 1}, f"projection: expected None for loss='{PIECES}'"),
        ({"loss": PIECES}, f"pieces: expected a PieceIndex for loss='{PIECES}', got None"),
        ({"loss": PROJECTED, "projection": 1, "pieces": 1}, f"pieces: expected None for loss='{PROJECTED}', got one"),
        ({"weight": -1.0}, "weight: expected a finite number >= 0, got -1.0"),
        ({"weight": math.nan}, "weight: expected a finite number >= 0, got nan"),
    ],
)
def test_bad_teachers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "static"}, "scaling: expected one of 'dynamic', 'fixed', got 'static'"),
        ({"ce_weight": -1.0}, "ce_weight: expected a finite number >= 0, got -1.0"),
        ({"kd_weight": math.inf}, "kd_weight: expected a finite number >= 0, got inf"),
        ({"ce_weight": 0.0, "kd_weight": 0}, "ce_weight, kd_weight: expected one above 0, got 0 for both, which"),
        ({"max_scale": 0.0}, "max_scale: expected a number above 0, got 0.0"),
        ({"max_scale": math.nan}, "max_scale: expected a number above 0, got nan"),
        ({"vocab_size": 60}, r"teachers: expected one student vocabulary size, got \[60, 67\]"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XTokenLoss([Teacher(make_case().projection)], **options)


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"labels": torch.zeros(2, 3)}, TypeError, "labels: expected an integer tensor, got torch.float32"),
        ({"labels": [[1]]}, TypeError, "labels: expected an integer tensor, got list"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"labels: expected shape \[2, 14\]"),
        ({"alignments": None}, ValueError, f"alignments: expected an Alignment for loss='{PROJECTED}', got None"),
        ({"alignments": []}, ValueError, "alignments: expected one for each of the 1 teachers, got 0"),
        ({"teacher_logits": None}, TypeError, "teacher_logits: expected a floating-point tensor, got None"),
        ({"num_chunks": [1, 2]}, ValueError, "num_chunks: expected one for each of the 1 teachers, got 2"),
    ],
)
def test_bad_calls(changes: dict[str, Any], exception: type[Exception], message: str) -> None:
    case = make_case()
    call = SimpleNamespace(
        student_logits=case.student,
        labels=make_labels(case),
        teacher_logits=case.teacher,
        alignments=case.alignment,
    )
    vars(call).update(changes)
    with pytest.raises(exception, match=message):
        XTokenLoss([Teacher(case.projection)])(**vars(call))


@pytest.mark.parametrize("bad", [-1, -99, 23])
@pytest.mark.parametrize("layer", [False, True])
def test_labels_out_of_range(layer: bool, bad: int) -> None:
    """Of cross-entropy in a pass of its own; the vocabulary's size counts, not that of a padded output layer."""
    labels = torch.tensor([[bad, 4, 22, -100, bad]])  # the first predicts nothing
    hidden, head = torch.randn(1, 5, 3), torch.randn(29, 3)
    logits = LinearLogits(hidden, head) if layer else hidden @ head.T
    with pytest.raises(ValueError, match=rf"labels: expected token ids in 0 ... 22, or -100, got {bad}"):
        XTokenLoss([], vocab_size=23)(logits, labels, [])
    labels[0, 4] = 3
    total, _ = XTokenLoss([], vocab_size=23)(logits, labels, [])
    rows = (hidden @ head.T)[0, [0, 1, 3], :23]
    assert_close(total, -rows.log_softmax(-1)[range(3), [4, 22, 3]].mean(), rtol=1e-5)


def test_one_count_does_not_do_for_two_teachers() -> None:
    case = make_case()
    criterion = XTokenLoss([Teacher(case.projection)] * 2)
    with pytest.raises(ValueError, match="num_chunks: expected one for each of the 2 teachers, got 1"):
        criterion(case.student, make_labels(case), [case.teacher] * 2, [case.alignment] * 2, num_chunks=5)


def test_shows_its_settings() -> None:
    text = repr(XTokenLoss([Teacher(make_case().projection), Teacher(weight=0.5)]))
    assert f"teachers=[1 {PROJECTED}, 0.5 {SHARED}], scaling='dynamic'" in text


def test_a_given_factor_replaces_the_ratio() -> None:
    case = make_case()
    call = case.student, make_labels(case), case.teacher, case.alignment
    for scaling in ("dynamic", "fixed"):
        total, parts = XTokenLoss([Teacher(case.projection)], scaling)(*call, scale=3.0)
        assert_close(total, parts["ce"] + 3.0 * parts["kd"], rtol=1e-12)
        assert parts["scale"].item() == 3.0
    own = XTokenLoss([Teacher(case.projection)])(*call)[1]
    assert_close(own["scale"], own["ce"] / own["kd"], rtol=1e-12)
    assert XTokenLoss([Teacher(case.projection)], "fixed")(*call)[1]["scale"].item() == 1.0


def test_ratio_of_all_ranks() -> None:
    """`reduce` adds what the other ranks have: here 2 to CE and 3 to KD."""
    case = make_case()
    call = case.student, make_labels(case), case.teacher, case.alignment
    others = torch.tensor([2.0, 3.0], dtype=torch.float64)
    total, parts = XTokenLoss([Teacher(case.projection)])(*call, reduce=lambda sums: sums + others)
    assert_close(parts["scale"], (parts["ce"] + 2.0) / (parts["kd"] + 3.0), rtol=1e-12)
    assert_close(total, parts["ce"] + parts["scale"] * parts["kd"], rtol=1e-12)


def test_given_columns() -> None:
    """The same columns for a batch and its halves, whose sums then add up."""
    case = make_case(samples=4)
    labels = make_labels(case)
    columns = torch.arange(5, 25)
    criterion = XTokenLoss([Teacher(case.projection, columns=columns)], scaling="fixed")
    whole = criterion(case.student, labels, case.teacher, case.alignment)[1]
    counted = supervised(case.alignment, labels)
    want = projected_loss(case.student, case.teacher, counted, case.projection, columns=columns)
    assert_close(whole["kd"], want, rtol=1e-12)
    chunks = int(whole["chunks"])
    parts = [criterion(*half, num_chunks=chunks)[1]["kd"] for half in halves(case, labels)]
    assert_close(sum(parts), want, rtol=1e-12)


def test_projected_mass_outside_by_hand() -> None:
    case = make_case(samples=1, shapes=((1, 1),) * 6)
    columns = torch.arange(10, 30)
    criterion = XTokenLoss([Teacher(case.projection, columns=columns)])
    _, parts = criterion(case.student, make_labels(case), case.teacher, case.alignment)
    inside = torch.zeros(case.projection.shape[0], dtype=torch.float64)
    for student_id in range(case.projection.shape[0]):
        ids, weights = case.projection.row(student_id)
        inside[student_id] = weights[(ids >= 10) & (ids < 30)].double().sum()
    rows = case.alignment.spans[supervised(case.alignment, make_labels(case)).predicted].long()[:, 0] - 1
    want = 1 - (case.student[0, rows].softmax(-1) @ inside).mean()
    assert_close(parts["outside"], want[None], rtol=1e-6)
    twin = make_case(59, 59)
    logits = twin.student[0, :-1][make_labels(twin)[0, 1:] != -100]
    teacher = twin.student[:1].roll(3, 2)
    _, parts = XTokenLoss([Teacher(top_k=10)])(twin.student[:1], make_labels(twin)[:1], teacher)
    columns = select_columns(DenseSource(teacher, 59), twin.projection.shape[1], top_k=10)
    assert_close(parts["outside"], 1 - logits.softmax(-1)[:, columns].sum(1).mean()[None], rtol=1e-6)


ON_PARTNERS = [name for name, loss in registered().items() if issubclass(loss, OnPartners)]


@pytest.mark.parametrize("name", ON_PARTNERS)
def test_masses_and_agreement_on_shared_tokens_by_hand(name: str) -> None:
    """Of a loss that compares these alone; the mass was 1, and which of the events of all tokens is the best."""
    case = make_case(samples=1, shapes=((1, 1),) * 6)
    pieces = piece_index(*case.projection.shape)
    _, parts = XTokenLoss([Teacher(loss=name, pieces=pieces)])(
        case.student, make_labels(case), case.teacher, case.alignment
    )
    shared = partners(pieces.data, torch.device("cpu"))
    used = case.alignment.spans[supervised(case.alignment, make_labels(case)).predicted].long()
    p = case.student[0, used[:, 0] - 1, : pieces.shape[0]].double().softmax(-1)[:, shared.student]
    q = case.teacher[0, used[:, 2] - 1, : pieces.shape[1]].double().softmax(-1)[:, shared.teacher]
    assert_close(parts["mass"].double(), q.sum(1).mean()[None], rtol=1e-6)
    assert_close(parts["outside"].double(), 1 - p.sum(1).mean()[None], rtol=1e-6)
    assert parts["agreement"].tolist() == pytest.approx([float((p.argmax(1) == q.argmax(1)).double().mean())])
    assert 0.0 < float(parts["mass"]) < 0.99


@pytest.mark.parametrize("name", [PROJECTED, *ON_PARTNERS])
@pytest.mark.parametrize("tail", TAILS)
def test_rows_that_list_nothing_that_is_compared_are_counted(name: str, tail: str) -> None:
    """Every third of them; rows of logits in memory are flat where the teacher has ruled out all of these tokens."""
    case = make_case(samples=1, shapes=((1, 1),) * 9)
    pieces, size = piece_index(*case.projection.shape), case.projection.shape[1]
    columns, teacher = torch.arange(20), Teacher(case.projection, columns=torch.arange(20))
    if name in ON_PARTNERS:
        columns = partners(pieces.data, torch.device("cpu")).teacher
        teacher = Teacher(loss=name, pieces=pieces)
    others = torch.ones(size, dtype=torch.bool).index_fill(0, columns, False).nonzero()[:, 0]
    row = torch.arange(case.teacher.shape[1])
    ids = torch.where((row % 3 == 1)[:, None], others[:2], torch.stack([columns[0], others[0]]))[None]
    listed = TopKLogits(ids, torch.full(ids.shape, -1.0), tail)
    dense = torch.full((1, len(row), size), -torch.inf).scatter(2, ids, -1.0)
    labels = torch.zeros(case.student.shape[:2], dtype=torch.int64)
    want = case.alignment.spans[case.alignment.predicted][:, 2] % 3 == 2
    for logits in (listed, dense):
        _, parts = XTokenLoss([teacher])(case.student, labels, logits, case.alignment)
        assert parts["flat"].tolist() == pytest.approx([float(want.double().mean())])
    assert want.any()


def test_diagnostics_look_at_evenly_spaced_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same sample: every other chunk of twice as many gives the same, when they stand in pairs."""
    monkeypatch.setattr(diagnostics, "DIAGNOSED_CHUNKS", 6)
    case = make_case(samples=1, shapes=((1, 1),) * 7)  # 6 chunks with a predictor
    twice = Case(
        *(torch.repeat_interleave(x, 2, 1) for x in (case.student, case.teacher)), case.alignment, case.projection
    )
    spans = torch.arange(1, 13)
    pairs = Alignment(torch.stack([spans, spans + 1, spans, spans + 1], 1), [0, 12])
    few, shifted = (
        XTokenLoss([Teacher(case.projection, top_k=None)])(
            one.student, torch.zeros(one.student.shape[:2], dtype=torch.int64), one.teacher, alignment
        )[1]
        for one, alignment in ((case, case.alignment), (twice, pairs))
    )
    assert int(shifted["chunks"]) == 12
    for name in ("agreement", "mass", "outside"):
        assert not math.isnan(float(shifted[name]))
    assert float(shifted["agreement"]) == float(few["agreement"])


def test_a_teacher_is_replaced_like_any_dataclass() -> None:
    case = make_case()
    teacher = Teacher(case.projection, weight=0.5, temperature=2.0, reverse=True)
    other = dataclasses.replace(teacher, weight=2.0, temperature=3.0)
    assert (other.weight, other.temperature, other.reverse) == (2.0, 3.0, True)
    assert other.projection is case.projection
    assert (teacher.weight, teacher.temperature) == (0.5, 2.0)


@pytest.mark.parametrize(
    "name", [name for name, one in OPERATIONS.items() if one.needs in (Needs.PIECES, Needs.PROJECTION)]
)
def test_nothing_to_compare_is_refused(name: str) -> None:
    """Where the teacher is made, and by the function: no entry in W, no pair, no event that both sides have."""
    operation = OPERATIONS[name]
    if operation.needs is Needs.PIECES:
        pieces = PieceIndex.build(Vocabulary([b"a", b"aa"]), Vocabulary([b"b", b"bb", b"c"]))
        bad = [({"pieces": pieces}, "pieces: expected events that both sides have, got none")]
    else:
        empty = make_case(empty_projection=True).projection
        bad = [({"projection": empty}, "projection: expected a matrix with entries, got none")]
        if "min_weight" in {field.name for field in dataclasses.fields(registered()[name])}:
            spread = ProjectionMatrix.from_topk(torch.tensor([[0, 1]] * 67), torch.full((67, 2), 0.5), 59)
            bad.append(({"projection": spread}, "projection: expected pairs of common tokens, got none: no row"))
    for pair, message in bad:
        with pytest.raises(ValueError, match=message):
            Teacher(loss=name, **pair)
        case = make_case(*next(iter(pair.values())).shape, shapes=((1, 1),) * 3)
        with pytest.raises(ValueError, match=message):
            operation.function()(case.student, case.teacher, case.alignment, *pair.values())


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.7 makes no graph of it; others were not tried")
@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["dynamic", "fixed"])
def test_compiled_into_one_graph(scaling: str) -> None:
    """All but the diagnoses: the same bits, chunks that labels leave out, a teacher without an alignment."""
    case = make_case()
    case, labels = Case(case.student.float(), case.teacher.float(), case.alignment, case.projection), make_labels(case)
    teachers = [Teacher(case.projection), Teacher(pieces=case.pieces), Teacher(top_k=None)]
    criterion = XTokenLoss(teachers, scaling)

    def step(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = [teacher, teacher, student.detach().flip(1)]
        return criterion(student, labels, logits, [case.alignment, case.alignment, None])

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        student = case.student.clone().requires_grad_()
        total, parts = function(student, case.teacher)
        results.append({**parts, "total": total.detach(), "gradient": torch.autograd.grad(total, student)[0]})
    torch._dynamo.reset()
    want, got = results
    for name, value in want.items():
        assert torch.equal(got[name], value) or (name in diagnostics.NAMES and bool(got[name].isnan().all())), name
    assert int(want["unsupervised"].sum()) > 0


@pytest.mark.parametrize(
    ("teachers", "said"),
    [
        (Teacher(), "teachers: expected a sequence of Teacher, such as .one., got Teacher"),
        ([Teacher(), "none"], r"teachers\[1\]: expected a Teacher, got str"),
    ],
)
def test_teachers_that_are_none(teachers: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        XTokenLoss(teachers)
