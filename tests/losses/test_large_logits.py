"""Rows of one value, however large: in kernels every token has the same probability, as in a row of zeros."""

import pytest
import torch
from comparer import assert_close
from harness import CASES, OPERATIONS, PAIRS, Case, losses_and_grad

LARGEST = {torch.float32: 3e38, torch.bfloat16: 1e38, torch.float16: 65504.0}


@pytest.mark.parametrize("sides", ["student", "teacher", "both"])
@pytest.mark.parametrize(("operation", "backend"), [pair for pair in PAIRS if pair[1].startswith("cpu")])
def test_rows_of_one_large_value(operation: str, backend: str, sides: str) -> None:
    case = CASES["teacher_below"]()
    student, teacher = (side.bfloat16().half().double() for side in (case.student, case.teacher))

    def rows(value: float) -> Case:
        return Case(
            student if sides == "teacher" else torch.full_like(student, value),
            teacher if sides == "student" else torch.full_like(teacher, value),
            case.alignment,
            case.projection,
        )

    call = OPERATIONS[operation].public
    for dtype, value in LARGEST.items():
        want, got = (losses_and_grad(call, rows(x), dtype, reduction="none", backend=backend) for x in (0.0, value))
        for a, b, what in zip(got, want, ("losses", "gradient"), strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-5, what=f"{what} in {dtype}")


@pytest.mark.parametrize(("operation", "backend"), PAIRS)
def test_large_values_give_finite_gradients(operation: str, backend: str) -> None:
    case = CASES["teacher_below"]()
    large = Case(torch.full_like(case.student, 3e38), case.teacher, case.alignment, case.projection)
    call = OPERATIONS[operation].public
    losses, grad = losses_and_grad(call, large, torch.float32, reduction="none", backend=backend)
    assert bool(losses.isfinite().all())
    assert bool(grad.isfinite().all())
