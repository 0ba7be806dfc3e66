"""Gradients of the CPU kernels against central differences of their own losses, in random directions."""

import pytest
import torch
from harness import BACKENDS, OPERATIONS, Case, backends_of, check_slopes, few_variants_of, make_case
from torch import Tensor

cpu = pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("cpu")])

CALLS = few_variants_of(name for name in OPERATIONS if "cpu" in backends_of(name))


def labels_of(case: Case, size: int) -> Tensor:
    labels = torch.randint(size, case.student.shape[:2], generator=torch.Generator().manual_seed(1))
    labels[:, 3] = -100
    return labels


@cpu
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_logits(name: str, labelled: bool, backend: str) -> None:
    case = make_case(scale=1.5)
    operation, options = CALLS[name]
    size = OPERATIONS[operation].size(case)
    if labelled:
        options = {**options, "labels": labels_of(case, size)}
    teacher = case.teacher.float()

    def value(student: Tensor) -> Tensor:
        result = OPERATIONS[operation].public(case, student, teacher, backend=backend, reduction="sum", **options)
        return result[0].double() + 0.3 * result[1].double() if labelled else result.double()

    student = case.student.float().requires_grad_()
    (grad,) = torch.autograd.grad(value(student), student)
    check_slopes(lambda x: value(x).detach(), student.detach(), grad, step=0.02)
