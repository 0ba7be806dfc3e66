"""Distillation touches nothing that is not supervised: chunks with a token that is not labelled do not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparer import assert_close
from harness import OPERATIONS, Case, make_case
from torch import Tensor, nn

from xtoken import Alignment, Teacher, TopKLogits, XTokenLoss
from xtoken.losses import Needs, logits, registered

PROMPTS = (5, 0, 9)
"""Tokens of each sample before its completion; 5 is inside a chunk of three tokens."""


def make_labels(case: Case) -> Tensor:
    """Every token after the prompt, and in the last sample none but its last five."""
    labels = torch.ones(case.student.shape[:2], dtype=torch.int64)
    for sample, prompt in enumerate(PROMPTS):
        labels[sample, :prompt] = -100
    return labels


def by_hand(alignment: Alignment, labels: Tensor) -> Tensor:
    """bool [K]: a predictor on both sides, and no token without a label."""
    counted = []
    for sample in range(len(alignment)):
        one = alignment.slice(sample)
        for (a, b, c, _), seen in zip(one.spans.tolist(), one.predicted.tolist(), strict=True):
            counted.append(seen and a > 0 and c > 0 and -100 not in labels[sample, a:b].tolist())
    return torch.tensor(counted)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(samples=3)


@pytest.mark.parametrize("loss", registered())
def test_rows_that_predict_no_label_get_no_gradient(loss: str, case: Case) -> None:
    """And the loss is the mean over the chunks that are labelled, the first of each completion among them."""
    operation, labels = OPERATIONS[loss], make_labels(case)
    alignment, *pair = operation.arguments(case)
    counted = by_hand(alignment, labels)
    assert 0 < int(counted.sum()) < int(alignment.predicted.sum())
    predicts = nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    criterion = XTokenLoss([operation.teacher(case)], "fixed", ce_weight=0.0)
    for given in [alignment, *([None] if operation.needs is Needs.SAME_TOKENIZER else [])]:
        student = case.student.clone().requires_grad_()
        teacher = case.teacher if given is not None else case.student.roll(1, 0)
        total, parts = criterion(student, labels, teacher, given)
        total.backward()
        assert student.grad is not None
        touched = student.grad.abs().sum(-1) > 0
        assert not bool((touched & ~predicts).any())
        if given is None:
            assert bool((touched == predicts).all())
            assert (int(parts["chunks"]), int(parts["unsupervised"])) == (int(predicts.sum()), 0)
            continue
        each = operation.function()(case.student, case.teacher, given, *pair, **operation.sizes(case), reduction="none")
        assert_close(parts["kd"], each[counted].mean(), rtol=1e-12)
        teaching = counted & (each != 0)  # a chunk may have no term at all
        for sample, (a, b, _, _) in zip(
            given.sample_index[teaching].tolist(), given.spans[teaching].tolist(), strict=True
        ):
            assert bool(touched[sample, a - 1 : b - 1].any())
        numbers = int(counted.sum()), int(given.predicted.sum()) - int(counted.sum())
        assert (int(parts["chunks"]), int(parts["unsupervised"])) == numbers
        assert criterion.counts(labels, given)[1] == [numbers[0]]
        again = operation.function()(
            case.student, case.teacher, given.supervised(labels), *pair, **operation.sizes(case), reduction="none"
        )
        assert_close(again, torch.where(counted, each, 0.0), rtol=1e-12)


@pytest.mark.parametrize("loss", registered())
def test_logits_that_are_not_in_memory(loss: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in blocks, of hidden states, and of a teacher of few columns."""
    monkeypatch.setattr(logits, "BLOCK_ELEMENTS", 4 * case.student.shape[-1])
    operation, labels, generator = OPERATIONS[loss], make_labels(case), torch.Generator().manual_seed(0)
    alignment, *pair = operation.arguments(case)
    hidden = torch.randn(*case.student.shape[:2], 8, generator=generator, requires_grad=True)
    head = torch.randn(operation.size(case), 8, generator=generator)
    wide = case.student.roll(1, 0) if operation.needs is Needs.SAME_TOKENIZER else case.teacher
    width = operation.size(case) if operation.needs is Needs.SAME_TOKENIZER else wide.shape[-1]
    values, ids = wide[..., :width].float().log_softmax(-1).topk(9)
    teacher, sizes = TopKLogits(ids, values), operation.sizes(case)
    got = operation.function(linear=True)(hidden, head, teacher, alignment.supervised(labels), *pair, **sizes)
    got.backward()
    assert hidden.grad is not None
    touched = hidden.grad.abs().sum(-1) > 0
    assert bool(touched.any())
    assert not bool((touched & ~nn.functional.pad(labels[:, 1:] != -100, (0, 1))).any())
    counted = by_hand(alignment, labels)
    each = operation.function()(hidden.detach() @ head.T, teacher, alignment, *pair, **sizes, reduction="none")
    assert_close(got.detach(), each[counted].mean(), rtol=1e-5)


def test_one_sample_without_a_batch(case: Case) -> None:
    labels = make_labels(case)
    criterion = XTokenLoss([Teacher(case.projection, top_k=None)], "fixed")
    for alignment in (case.alignment.slice(0), Alignment(case.alignment.slice(0).spans)):
        _, parts = criterion(case.student[0], labels[0], case.teacher[0], alignment)
        one = criterion(case.student[:1], labels[:1], case.teacher[:1], case.alignment.slice(0))[1]
        assert_close(parts["kd"], one["kd"], rtol=1e-12)
        assert int(parts["unsupervised"]) > 0


def test_nothing_supervised_is_told(case: Case) -> None:
    student = case.student.clone().requires_grad_()
    alone = torch.full(case.student.shape[:2], -100)
    alone[:, 5] = 1  # inside a chunk: cross-entropy goes on
    for labels in (alone, torch.full_like(alone, -100)):
        with pytest.warns(UserWarning, match="labels: no chunk of the alignment has all of its tokens labelled"):
            total, parts = XTokenLoss([Teacher(case.projection)])(student, labels, case.teacher, case.alignment)
        assert float(parts["kd"]) == int(parts["chunks"]) == 0
        assert float(total.detach()) == float(parts["ce"])
    (gradient,) = torch.autograd.grad(total, student)
    assert bool((gradient == 0).all())


@pytest.mark.parametrize(
    ("alignment", "message"),
    [
        (
            Alignment([[1, 40, 1, 2]], [0, 1, 1, 1]),
            r"student_logits: expected a row .*ends at token 40",
        ),
        (
            Alignment([[1, 2, 1, 40]], [0, 1, 1, 1]),
            r"teacher_logits: expected a row .*ends at token 40",
        ),
        (Alignment([[1, 2, 1, 2]], [0, 1, 1]), r"alignment: expected 3 samples \(the batch of the logits\), got 2"),
    ],
)
def test_alignments_that_do_not_fit(alignment: Any, message: str, case: Case) -> None:
    with pytest.raises(ValueError, match=message):
        XTokenLoss([Teacher(case.projection)])(case.student, make_labels(case), case.teacher, alignment)
