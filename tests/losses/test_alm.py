"""ALM: its options, and values by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparer import assert_close

from xtoken import Alignment, alm_loss

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "reverse": {"reverse": True},
    "temperature": {"temperature": 2.5},
    "cold": {"temperature": 0.4, "reverse": True},
}

# Student: one token "95" of probability 0.2; teacher: "9" of 0.6, then "5" of 0.5.
STUDENT = torch.tensor([[0.8, 0.2], [0.5, 0.5]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.4, 0.6], [0.5, 0.5], [0.3, 0.7]], dtype=torch.float64).log()
CHUNK = Alignment([[1, 2, 1, 3]], student_ids=[0, 1], teacher_ids=[0, 1, 0])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_by_hand(temperature: float, reverse: bool) -> None:
    p, q = 0.2 ** (1 / temperature), (0.6 * 0.5) ** (1 / temperature)
    if reverse:
        p, q = q, p
    want = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    loss = alm_loss(STUDENT, TEACHER, CHUNK, temperature=temperature, reverse=reverse)
    assert_close(loss, torch.tensor(want * temperature**2, dtype=torch.float64), rtol=1e-12)


def test_zero_where_the_likelihoods_agree_whatever_else_differs() -> None:
    student = torch.tensor([[0.7, 0.3], [0.9, 0.1]], dtype=torch.float64).log().requires_grad_()
    loss = alm_loss(student, TEACHER, CHUNK)
    (grad,) = torch.autograd.grad(loss, student)
    assert_close(loss.detach(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-15)
    assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-15)


def test_a_certain_text_is_finite() -> None:
    student = torch.tensor([[-math.inf, 0.0], [0.0, 0.0]]).requires_grad_()
    loss = alm_loss(student, torch.tensor([[-math.inf, 0.0], [0.0, -math.inf], [0.0, 0.0]]), CHUNK)
    (grad,) = torch.autograd.grad(loss, student)
    assert bool(loss.isfinite())
    assert bool(grad.isfinite().all())
