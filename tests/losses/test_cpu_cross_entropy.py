"""Cross-entropy of the kernels: every kind of label, and threads."""

import math
from collections.abc import Callable

import pytest
import torch
from comparer import assert_as_accurate
from harness import BACKENDS, DTYPES, make_case
from torch import Tensor

from xtoken.losses import Needs, backends
from xtoken.losses.backends import IGNORED, Labels
from xtoken.losses.plain import cross_entropy as plain_cross_entropy

CPU = [name for name in BACKENDS if name.startswith("cpu")]
PROJECTED = Needs.PROJECTION
ONE = torch.ones((), dtype=torch.float64)
cpu = pytest.mark.parametrize("backend", CPU)
kernels = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def cross_entropy_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with -inf and a padded head, labels of which some have that logit, and a gradient to add to."""
    generator = torch.Generator().manual_seed(0)
    student = 4 * torch.randn(3, 7, 83, generator=generator, dtype=torch.float64)
    student[..., 1::3] = -math.inf
    student[0, 0] = -math.inf
    labels = torch.randint(83, (21,), generator=generator)
    labels[3::5] = IGNORED
    grad = torch.nn.functional.pad(torch.randn(3, 7, 83, generator=generator, dtype=torch.float64), (0, 7))
    return student.to(dtype), labels, grad.to(dtype)


@kernels
@dtypes
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_cross_entropy(factor: float, strided: bool, dtype: torch.dtype, backend: str) -> None:
    """Added to `factor` times a gradient."""
    given, ids, before = cross_entropy_inputs(dtype)
    if strided:
        given = torch.nn.functional.pad(given, (2, 3, 1, 1), value=math.nan)[:, 1:-1, 2:-3]

    def run(function: Callable[..., None], to: torch.dtype) -> tuple[Tensor, Tensor]:
        losses = torch.full((21,), math.nan, dtype=torch.promote_types(to, torch.float32))
        grad = before.to(to, copy=True)
        labels = Labels(ids, losses, torch.tensor(0.37).double())
        function(given.to(to) if to != dtype else given, labels, grad, torch.tensor(factor))
        only = torch.empty_like(losses)
        function(given.to(to), Labels(ids, only, ONE))
        assert torch.equal(only, losses)
        assert grad[..., 83:].count_nonzero() == 0
        return losses, grad

    kernel = backends.select(backend, torch.device("cpu")).cross_entropy
    losses, grad = run(kernel, dtype)
    plain, plain_grad = run(plain_cross_entropy, dtype)
    true, true_grad = run(plain_cross_entropy, torch.float64)
    assert_as_accurate(losses, plain, true, 4 * torch.finfo(torch.float32).eps * float(true.max()), "losses")
    floor = torch.finfo(dtype).eps * float(true_grad.abs().max())
    assert_as_accurate(grad, plain_grad, true_grad, floor, "gradient")
    unlabelled = (ids == IGNORED).reshape(3, 7)
    assert torch.equal(grad[unlabelled], factor * before[unlabelled])
    scaled = before.clone()
    kernel(given, Labels(ids, torch.empty_like(losses), 0 * ONE), scaled, torch.tensor(factor))
    assert torch.equal(scaled, factor * before)
    assert losses[ids == IGNORED].count_nonzero() == 0


@cpu
def test_cross_entropy_of_other_types_is_the_reference(backend: str) -> None:
    given, ids, before = cross_entropy_inputs(torch.float64)
    results = []
    for function in (backends.select(backend, torch.device("cpu")).cross_entropy, plain_cross_entropy):
        losses, grad = torch.empty(21, dtype=torch.float64), before.clone()
        function(given, Labels(ids, losses, ONE), grad)
        results.append((losses, grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@cpu
def test_threads_do_not_change_the_result(backend: str) -> None:
    case = make_case(1000, 1000)
    labels = torch.randint(1000, case.student.shape[:2], generator=torch.Generator().manual_seed(1))
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        losses, grad = torch.empty(labels.numel()), torch.zeros_like(case.student, dtype=torch.float32)
        function = backends.select(backend, torch.device("cpu")).cross_entropy
        function(case.student.float(), Labels(labels.flatten(), losses, ONE), grad)
        results.append([losses, grad])
    torch.set_num_threads(1)
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other)
