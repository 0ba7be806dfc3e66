"""Chunks that the teacher would not have written, and weights by how sure teachers are: by hand, for every loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparer import assert_close
from default_losses import DEFAULT
from harness import OPERATIONS, Case, make_case
from old_versions import needs_what_a_graph_says
from torch import Tensor

from xtoken import Alignment, LinearLogits, Teacher, TopKLogits, XTokenLoss
from xtoken.losses import Needs, registered

SHARED = DEFAULT[Needs.SAME_TOKENIZER]
OF_CHUNKS = [name for name in registered() if name != SHARED]


def worst_ranks(logits: Tensor, of: Alignment) -> list[int]:
    """By hand, one logit after the other: how many are above a token of the chunk at most; -1 without a predictor."""
    assert of.teacher_ids is not None
    found = []
    for (_, _, c, d), sample in zip(of.spans.tolist(), of.sample_index.tolist(), strict=True):
        ranks = [-1]
        for t in range(c, d) if c else ():
            row, token = logits[sample, t - 1].tolist(), int(of.teacher_ids[sample, t])
            ranks.append(sum(one > row[token] for one in row))
        found.append(max(ranks))
    return found


def kept_by_hand(of: Alignment, logits: Tensor) -> tuple[Alignment, int]:
    """The chunks that pass, and a bound that one of the others has reached exactly."""
    worst = worst_ranks(logits, of)
    top_k = sorted(worst)[len(worst) // 2]
    predicted = of.predicted & torch.tensor([one < top_k for one in worst])
    assert 0 < int(predicted.sum()) < int(of.predicted.sum())
    return Alignment(of.spans, of.offsets, of.student_ids, of.teacher_ids, predicted=predicted), top_k


def all_labels(case: Case) -> Tensor:
    return torch.zeros(case.student.shape[:2], dtype=torch.int64)


def dense_of(top: TopKLogits, size: int) -> Tensor:
    """Rows in which what is not listed is less than what is."""
    return torch.full((*top.ids.shape[:2], size), -1e3, dtype=torch.float64).scatter(2, top.ids, top.logprobs)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "dense") for name in OF_CHUNKS),
        *((DEFAULT[needs], kind) for needs in (Needs.PROJECTION, Needs.PIECES) for kind in ("listed", "linear")),
    ],
)
def test_distrusted_chunks_teach_nothing_in_any_loss(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is that of the chunks whose tokens all are among the most probable, over all chunks."""
    monkeypatch.setattr("xtoken.losses.trust.temporary_elements", lambda device: 200)  # several blocks
    case, operation = make_case(), OPERATIONS[name]
    given: Any = case.teacher
    logits = case.teacher
    if kind == "listed":
        logprobs, ids = case.teacher.log_softmax(-1).topk(50)
        given = TopKLogits(ids, logprobs)
        logits = dense_of(given, case.teacher.shape[-1])
    if kind == "linear":
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(*case.teacher.shape[:2], 4, generator=generator, dtype=torch.float64)
        given = LinearLogits(hidden, torch.randn(case.teacher.shape[-1], 4, generator=generator, dtype=torch.float64))
        logits = given.hidden @ given.weight.T
    kept, top_k = kept_by_hand(case.alignment, logits)
    student = case.student.clone().requires_grad_()
    total, parts = XTokenLoss([operation.teacher(case, trust_top_k=top_k)], "fixed", ce_weight=0.0)(
        student, all_labels(case), given, case.alignment
    )
    (grad,) = torch.autograd.grad(total, student)
    student = case.student.clone().requires_grad_()
    by_hand = operation.public(
        Case(case.student, case.teacher, kept, case.projection), student, given, reduction="sum"
    ) / int(case.alignment.predicted.sum())
    assert_close(parts["kd"], by_hand.detach(), rtol=1e-9)
    assert_close(grad, torch.autograd.grad(by_hand, student)[0], rtol=1e-6, atol=1e-12)
    assert parts["chunks"].tolist() == [int(case.alignment.predicted.sum())]
    assert parts["distrusted"].tolist() == [int(case.alignment.predicted.sum() - kept.predicted.sum())]
    assert parts["weights"].tolist() == [int(kept.predicted.sum())]


def test_positions_of_one_tokenizer() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(9, (2, 6), generator=generator)
    labels[0, 3] = -100
    total, parts = XTokenLoss([Teacher(trust_top_k=4)], "fixed", 0.0)(student, labels, teacher)
    want, counted, trusted = 0.0, 0, 0
    for b in range(2):
        for t in range(5):
            if (token := int(labels[b, t + 1])) == -100:
                continue
            counted += 1
            if int((teacher[b, t] > teacher[b, t, token]).sum()) < 4:
                p, q = teacher[b, t].softmax(0), student[b, t].log_softmax(0)
                want, trusted = want + float((p * (p.log() - q)).sum()), trusted + 1
    assert 0 < trusted < counted == 9
    assert_close(total, torch.tensor(want / counted, dtype=torch.float64), rtol=1e-9)
    assert parts["distrusted"].tolist() == [counted - trusted]


def test_what_cannot_be_told_is_refused() -> None:
    case = make_case()
    logprobs, ids = case.teacher.log_softmax(-1).topk(5)
    criterion = XTokenLoss([Teacher(case.projection, trust_top_k=6)])
    with pytest.raises(ValueError, match="trust_top_k: expected at most 5, the log-probabilities that a cached or"):
        criterion(case.student, all_labels(case), TopKLogits(ids, logprobs), case.alignment)
    without = Alignment(case.alignment.spans, case.alignment.offsets)
    with pytest.raises(ValueError, match="trust_top_k: expected an alignment with teacher_ids, to look for, got None"):
        criterion(case.student, all_labels(case), case.teacher, without)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="trust_top_k: expected an integer of at least 1 or None"):
            Teacher(case.projection, trust_top_k=wrong)
    whole = case.teacher.log_softmax(-1).topk(case.teacher.shape[-1])
    _, parts = XTokenLoss([Teacher(case.projection, trust_top_k=10**6)])(
        case.student, all_labels(case), TopKLogits(whole.indices, whole.values), case.alignment
    )
    assert parts["distrusted"].tolist() == [0]


@needs_what_a_graph_says
def test_trust_is_refused_in_a_graph() -> None:
    case = make_case()
    compiled = torch.compile(XTokenLoss([Teacher(case.projection, trust_top_k=6)]), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"trust_top_k: expected None inside of torch\.compile"):
        compiled(case.student, all_labels(case), case.teacher, case.alignment)
    torch.compiler.reset()


def test_a_teacher_without_chunks_needs_no_logits() -> None:
    """It adds nothing, whichever it is; cross-entropy is there all the same."""
    case = make_case()
    none = Alignment([], [0] * (len(case.alignment) + 1))
    one = XTokenLoss([Teacher(case.projection)])(case.student, all_labels(case), case.teacher, case.alignment)
    for order in (slice(None), slice(None, None, -1)):
        teachers = [Teacher(case.projection), Teacher(case.projection, weight=3.0)]
        given, aligned = [case.teacher, None][order], [case.alignment, none][order]
        total, parts = XTokenLoss(teachers[order])(case.student, all_labels(case), given, aligned)
        assert_close(total, one[0], rtol=1e-12)
        assert_close(parts["ce"], one[1]["ce"], rtol=1e-12)
        assert sorted(parts["chunks"].tolist()) == [0, int(case.alignment.predicted.sum())]
    total, parts = XTokenLoss([Teacher(case.projection)])(case.student, all_labels(case), None, none)
    assert_close(total, one[1]["ce"], rtol=1e-12)
    for given_one in (None, case.alignment):
        with pytest.raises(TypeError, match="teacher_logits: expected a floating-point tensor, got None, for labelled"):
            XTokenLoss([Teacher(case.projection)])(case.student, all_labels(case), None, given_one)


def entropy(logits: Tensor) -> float:
    p = logits.double().softmax(-1)
    return float(-(p * p.log()).sum())


@pytest.mark.parametrize("name", [*OF_CHUNKS, SHARED])
def test_weights_by_entropy(name: str) -> None:
    """Each chunk's loss times n exp(-h) over the sum of exp(-h) of the teachers with a chunk there."""
    case, other = make_case(), make_case(67, 41, seed=1, shapes=((1, 1), (1, 2), (2, 2), (2, 1), (1, 1)))
    size = case.student.shape[-1]
    twin = 2.0 * torch.randn(case.student.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = all_labels(case)
    labels[1, 4] = -100
    operation, third = OPERATIONS[name], OPERATIONS[OF_CHUNKS[0]]
    of_shared = name == SHARED
    teachers = [Teacher(weight=0.5) if of_shared else operation.teacher(case, weight=0.5), third.teacher(other)]
    logits: list[Any] = [twin if of_shared else case.teacher, other.teacher]
    alignments = [None if of_shared else case.alignment, other.alignment]
    chunks: list[dict[tuple[int, int], tuple[int, float]]] = []  # of each teacher, by sample and student token
    for row, one in zip(logits, alignments, strict=True):
        scale = math.log(size) / math.log(row.shape[-1])
        spans = [(a, b, c) for a, b, c, _ in one.spans.tolist()] if one is not None else []
        samples = one.sample_index.tolist() if one is not None else []
        if one is None:
            places = [(b, t) for b in range(2) for t in range(1, labels.shape[1])]
            spans, samples = [(t, t + 1, t) for _, t in places], [b for b, _ in places]
        chunks.append({
            (sample, a): (k, scale * entropy(row[sample, c - 1]))
            for k, ((a, b, c), sample) in enumerate(zip(spans, samples, strict=True))
            if a > 0 and c > 0 and bool((labels[sample, a:b] != -100).all())
        })  # fmt: skip
    student = case.student.clone().requires_grad_()
    total, parts = XTokenLoss(teachers, "fixed", 0.0, teacher_weighting="entropy")(student, labels, logits, alignments)
    (grad,) = torch.autograd.grad(total, student)
    student = case.student.clone().requires_grad_()
    want, weights = student.new_zeros(()), []
    for m, teacher in enumerate(teachers):
        if m == 0 and of_shared:
            mask = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
            alone = operation.function()(student, twin, mask=mask, reduction="none")[:, :-1].flatten()
        else:
            of, its = ((case, operation), (other, third))[m]
            alone = its.public(of, student, logits[m], reduction="none")
        sums = 0.0
        for place, (k, h) in chunks[m].items():
            there = [one[place][1] for one in chunks if place in one]
            weight = len(there) * math.exp(-h) / sum(math.exp(-each) for each in there)
            want = want + teacher.weight * weight * alone[k] / len(chunks[m])
            sums += weight
        weights.append(sums)
    assert any(place in chunks[1] for place in chunks[0])
    assert any(place not in chunks[1] for place in chunks[0])
    assert_close(parts["weights"], torch.tensor(weights), rtol=1e-5)
    assert_close(total, want.detach(), rtol=1e-5)
    assert_close(grad, torch.autograd.grad(want, student)[0], rtol=1e-5, atol=1e-9)
    alone = XTokenLoss(teachers[1:], "fixed", teacher_weighting="entropy")
    plain = XTokenLoss(teachers[1:], "fixed")
    for one, same in zip(*(each(case.student, labels, other.teacher, other.alignment) for each in (alone, plain)),
                         strict=True):  # fmt: skip
        if isinstance(one, Tensor):
            assert_close(one, same, rtol=1e-9)
        else:
            assert_close(one["ce"], same["ce"], rtol=1e-9)
