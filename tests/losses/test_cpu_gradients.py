"""Gradients of the CPU kernels against central differences of their own losses, in random directions."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import BACKENDS, OPERATIONS, Case, make_case
from torch import Tensor

cpu = pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("cpu")])

LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "pkl": ("pkl", {"top_k": None}),
    "pkl mean": ("pkl", {"top_k": None, "merge": "mean", "temperature": 1.5}),
    "pkl chain": ("pkl", {"top_k": 31, "merge": "chain"}),
    "pkl reverse": ("pkl", {"top_k": 31, "reverse": True}),
    "gold": ("gold", {"uncommon_top_k": 20}),
    "hkl reverse": ("hkl", {"reverse": True}),
    "uld": ("uld", {}),
    "kd": ("kd", {}),
    "kd subset": ("kd", {"top_k": 31, "temperature": 1.5}),
    "kd reverse": ("kd", {"reverse": True}),
    "prefix": ("prefix", {}),
    "prefix temperature": ("prefix", {"temperature": 1.5}),
    "prefix reverse": ("prefix", {"reverse": True}),
}


def labels_of(case: Case, size: int) -> Tensor:
    labels = torch.randint(size, case.student.shape[:2], generator=torch.Generator().manual_seed(1))
    labels[:, 3] = -100
    return labels


def check_slopes(value: Callable[[Tensor], Tensor], at: Tensor, grad: Tensor, step: float) -> None:
    """The slope along a direction is the gradient's share of it; the step is found in float32, where it is exact.

    A loss in float32 is wrong by some 1e-7 of itself, its difference quotient by that over the step; the step's own
    error goes with its square.
    """
    generator = torch.Generator().manual_seed(5)
    directions = [grad / grad.norm()]
    directions += [torch.randn(at.shape, generator=generator) for _ in range(4)]
    for direction in directions:
        direction = direction / direction.norm()
        above, below = at + step * direction, at - step * direction
        want = ((above.double() - below.double()) * grad.double()).sum()
        got = value(above) - value(below)
        noise = 4 * torch.finfo(torch.float32).eps * float(value(at).abs())
        tolerance = noise + 2e-3 * step * float(grad.norm())
        assert math.isfinite(got)
        assert abs(float(got - want)) <= tolerance, (float(got), float(want), tolerance)
    along = value(at + step * directions[0]) - value(at - step * directions[0])
    assert along > 1.9 * step * grad.norm()  # the first direction is not lost in the noise


@cpu
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_logits(name: str, labelled: bool, backend: str) -> None:
    case = make_case(scale=1.5)
    operation, options = LOSSES[name]
    size = min(case.projection.shape) if operation == "kd" else case.projection.shape[0]
    if labelled:
        options = {**options, "labels": labels_of(case, size)}
    teacher = case.teacher.float()

    def value(student: Tensor) -> Tensor:
        result = OPERATIONS[operation].public(case, student, teacher, backend=backend, reduction="sum", **options)
        return result[0].double() + 0.3 * result[1].double() if labelled else result.double()

    student = case.student.float().requires_grad_()
    (grad,) = torch.autograd.grad(value(student), student)
    check_slopes(lambda x: value(x).detach(), student.detach(), grad, step=0.02)


@cpu
@pytest.mark.parametrize("top_k", [31, None])
@pytest.mark.parametrize("merge", ["first", "mean", "chain"])
def test_weights_of_a_learnable_matrix(merge: str, top_k: int | None, backend: str) -> None:
    case = make_case(scale=1.5)
    student, teacher = case.student.float(), case.teacher.float()
    W = case.projection

    def value(weight: Tensor) -> Tensor:
        projection = SimpleNamespace(row_ptr=W.row_ptr, col=W.col, shape=W.shape, weight=weight)
        moved = Case(student, teacher, case.alignment, projection)
        options: dict[str, Any] = {"merge": merge, "top_k": top_k, "backend": backend, "reduction": "sum"}
        return OPERATIONS["pkl"].public(moved, student, teacher, **options).double()

    weight = (0.5 + 0.5 * W.weight).requires_grad_()
    (grad,) = torch.autograd.grad(value(weight), weight)
    check_slopes(lambda x: value(x).detach(), weight.detach(), grad, step=0.02)
