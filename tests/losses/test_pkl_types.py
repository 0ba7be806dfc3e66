"""What P-KL gives back has one type without labels and another with them: read by mypy, which no test runs."""

# mypy: enable-error-code="arg-type, call-arg, call-overload, union-attr, misc, index"

from __future__ import annotations

import torch
from harness import make_case
from torch import Tensor

from xtoken import pkl_loss


def test_a_loss() -> None:
    case = make_case()
    student = case.student.requires_grad_()
    loss: Tensor = pkl_loss(student, case.teacher, case.alignment, case.projection)
    pkl_loss(student, case.teacher, case.alignment, case.projection, temperature=2.0).backward()
    assert student.grad is not None
    assert loss.shape == ()


def test_a_loss_and_a_cross_entropy() -> None:
    case = make_case()
    labels = torch.zeros(case.student.shape[:2], dtype=torch.int64)
    loss, ce = pkl_loss(case.student, case.teacher, case.alignment, case.projection, labels=labels)
    total: Tensor = loss + ce
    assert total.item() == loss.item() + ce.item()
