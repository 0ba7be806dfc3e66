"""The divergences of two distributions, against torch's own KL."""

from typing import Any

import pytest
import torch
from comparer import assert_close
from torch import Tensor

from xtoken.losses.divergence import Divergence

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"reverse": True},
    {"beta": 1.0},
    {"beta": 0.3},
    {"skew": 0.1},
    {"skew": 0.25, "reverse": True},
    {"skew": 0.25, "beta": 1.0},
)


def kl(first: Tensor, second: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(second.log(), first.log(), log_target=True, reduction="none").sum(-1)


def by_torch(q: Tensor, p: Tensor, reverse: bool = False, beta: float = 0.0, skew: float = 0.0) -> Tensor:
    if 0 < beta < 1:
        mixture = beta * q + (1 - beta) * p
        return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)
    first, second = (p, q) if reverse or beta == 1 else (q, p)
    return kl(first, skew * first + (1 - skew) * second)


def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    return student, teacher


def divergence(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    return Divergence.of(**options)(log_q.exp(), log_q, log_p.exp(), log_p)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_what_torch_makes_of_its_kl(options: dict[str, Any]) -> None:
    student, teacher = logits()
    got = divergence(student, teacher, **options)
    assert_close(got, by_torch(teacher.softmax(-1), student.softmax(-1), **options), rtol=1e-12)
    assert bool((got > 0).all())
    assert divergence(teacher, teacher, **options).abs().max() < 1e-15
    assert torch.autograd.gradcheck(lambda z: divergence(z, teacher, **options), student.requires_grad_())


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_forward_and_reverse_are_limits(beta: float) -> None:
    """Of Jensen-Shannon, divided by what goes to 0; of the skewed KL."""
    end, small = divergence(*logits(), beta=beta), 1e-9
    near = divergence(*logits(), beta=abs(beta - small)) / small
    assert_close(near, end, rtol=1e-4)
    assert_close(divergence(*logits(), beta=beta, skew=small), end, rtol=1e-4)


def test_probabilities_of_zero() -> None:
    """The mixture keeps the divergence finite: at most log 2 for Jensen-Shannon, -log skew for a skewed KL."""
    student, teacher = torch.full((2, 1, 4), -1e4)
    student[0, 0] = teacher[0, 1] = 0.0
    assert_close(divergence(student, teacher, beta=0.5), torch.tensor(2.0).log()[None], rtol=1e-6)
    for reverse in (False, True):
        assert_close(divergence(student, teacher, skew=0.1, reverse=reverse), -torch.tensor([0.1]).log(), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, "beta: expected a number from 0 to 1, got -0.1"),
        ({"beta": float("nan")}, "beta: expected a number from 0 to 1, got nan"),
        ({"skew": 1.0}, "skew: expected a number from 0 to below 1, got 1.0"),
        ({"beta": 0.5, "reverse": True}, "beta: expected 0 or 1 with reverse, got 0.5"),
        ({"beta": 0.5, "skew": 0.1}, "beta: expected 0 or 1 with skew, got 0.5"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Divergence.of(**options)
