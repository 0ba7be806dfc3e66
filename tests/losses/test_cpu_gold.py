"""The sorted L1 of the CPU kernels: ties, cuts, many bins, threads, and the layouts of pairs."""

import pytest
import torch
from harness import BACKENDS, check, make_case

from xtoken import hkl_loss, uld_loss
from xtoken.alignment import Alignment
from xtoken.losses.ranked.cpu import plan_for

CPU = [name for name in BACKENDS if name.startswith("cpu")]
cpu = pytest.mark.parametrize("backend", CPU)
operations = pytest.mark.parametrize("operation", ["hkl", "uld"])


@cpu
@operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 0.02, 2.0])
def test_wide_rows_with_and_without_ties(scale: float, dtype: torch.dtype, operation: str, backend: str) -> None:
    """Thousands of values in few bins are sorted by radix; scale 0 ties all, and the cut falls inside a tie."""
    case = make_case(2501, 3203, samples=1, scale=scale, shapes=((1, 1), (1, 1), (2, 3)))
    check(backend, operation, case, dtype, **({"uncommon_top_k": 700} if operation == "hkl" else {}))


@cpu
def test_equal_logits_cost_nothing(backend: str) -> None:
    case = make_case(300, 300, samples=1)
    student = case.student[:, :7].float().requires_grad_()
    loss = uld_loss(student, student.detach().clone(), Alignment([[1, 2, 1, 2], [2, 3, 2, 3]]), backend=backend)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss == 0
    assert not grad.any()


@cpu
@operations
def test_threads_do_not_change_the_result(operation: str, backend: str) -> None:
    case = make_case(1000, 1200)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        student = case.student.float().requires_grad_()
        arguments = student, case.teacher.float(), case.alignment
        if operation == "uld":
            loss = uld_loss(*arguments, backend=backend)
        else:
            loss = hkl_loss(*arguments, case.projection, backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    torch.set_num_threads(1)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([0, 3], [0, 1], r"student_ids: expected ids in 0 ... 2, got 3"),
        ([0, 1], [0, -1], r"teacher_ids: expected ids in 0 ... 3, got -1"),
        ([1, 1], [0, 1], r"student_ids: expected distinct ids, got 1 twice"),
        ([0, 1], [2, 2], r"teacher_ids: expected distinct ids, got 2 twice"),
        ([0], [1, 2], r"teacher_ids: expected 1 ids \(as student_ids\), got 2"),
    ],
)
def test_bad_pairs(student: list[int], teacher: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_for(torch.tensor(student), torch.tensor(teacher), (3, 4))
