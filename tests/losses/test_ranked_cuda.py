"""The CUDA kernels of pairs and ranks: rows of 16 bits as step functions, and torch's sort for the others."""

import functools
import math
import weakref
from dataclasses import replace
from typing import Any

import emulated
import pytest
import torch
from comparer import assert_close
from harness import OPERATIONS, Case, check, losses_and_grad, make_case
from test_ranked import PAIRED, RANKED
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from xtoken import ProjectionMatrix
from xtoken.losses.numerics import sorted_l1
from xtoken.losses.ranked import cuda as ranked_cuda

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not())),
]
SINGLE = ((1, 1),) * 9
USED = (0, 1, 3, 4, 5, 7, 8, 9)
"""Rows that predict these chunks."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were started."""
    names: list[str] = []
    launch = ranked_cuda._Call.launch

    def record(call: Any, name: str, *arguments: Any, **more: Any) -> None:
        names.append(name)
        launch(call, name, *arguments, **more)

    monkeypatch.setattr(ranked_cuda._Call, "launch", record)
    return names


@functools.cache
def hard_rows(students: int, teachers: int) -> Case:
    case = make_case(students, teachers, samples=1, shapes=SINGLE)
    student, teacher = case.student.clone(), case.teacher.clone()
    one_value, far_below, far_above, lowest, near_zero, peaked, few_values, _ = USED
    student[:, one_value], teacher[:, one_value] = 0.25, -3.0
    student[:, far_below] -= 60
    teacher[:, far_below] -= 300
    student[:, far_above] += 5e3
    teacher[:, far_above] += 3e4
    student[:, lowest], teacher[:, lowest] = -math.inf, -2e4
    student[:, near_zero] *= 1e-3
    student[:, near_zero, ::2] = 0.0
    student[:, near_zero, ::4] = -0.0
    student[:, peaked, 3] = 80.0
    teacher[:, peaked, 1::2] = -math.inf
    student[:, few_values] = (4 * student[:, few_values]).round() / 4
    return replace(case, student=student, teacher=teacher)


@pytest.mark.parametrize(
    ("temperature", "dtype"),
    [(t, dtype) for t in (0.05, 1.0, 1000.0) for dtype in (torch.bfloat16, torch.float16)] + [(7.0, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("operation", RANKED)
def test_hard_rows(operation: str, temperature: float, dtype: torch.dtype, launched: list[str]) -> None:
    """float16, whose steps are eight times as many, is another instance of the kernel; what the temperature changes is
    values, so that shapes are tried at 1."""
    of_all = temperature == 1.0
    for shape in ((67, 59), (7, 7), (40, 300)) if of_all and dtype == torch.bfloat16 else ((67, 59),):
        for options in ({}, OPERATIONS[operation].few(5)) if of_all or dtype == torch.bfloat16 else ({},):
            check("emulated", operation, hard_rows(*shape), dtype, temperature=temperature, **options)
    assert set(launched) == {"ranked"}


@pytest.mark.parametrize("operation", RANKED)
def test_a_real_size(operation: str) -> None:
    students, teachers = 151936, 128256
    small = make_case(7, 7, samples=1, shapes=((1, 1),) * 2)
    partner = torch.where(torch.arange(students) % 3 < 2, torch.arange(students) * 3 // 4, -1)[:, None]
    W = ProjectionMatrix.from_topk(partner, torch.ones(students, 1), teachers)
    generator = torch.Generator().manual_seed(1)
    sides = [2.5 * torch.randn(1, 3, n, generator=generator, dtype=torch.float64) for n in (students, teachers)]
    check("emulated", operation, Case(sides[0], sides[1], small.alignment, W), torch.bfloat16)


@pytest.mark.parametrize("operation", RANKED)
def test_is_what_the_sort_finds(operation: str, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """Ties, too, share what they share after a sort: of the chunks of several rows, and of one."""
    results = []
    for is_16_bit in (torch.Tensor.element_size, lambda logits: 4):
        monkeypatch.setattr(torch.Tensor, "element_size", is_16_bit)
        case = make_case(301, 283, scale=0.5)
        options = {"reduction": "none", "backend": "emulated", **OPERATIONS[operation].few(50)}
        results.append(losses_and_grad(OPERATIONS[operation].public, case, torch.bfloat16, **options))
    assert set(launched) == {"ranked", "ranked_forward", "ranked_backward"}
    (losses, grad), (sorted_losses, sorted_grad) = results
    assert_close(losses, sorted_losses, rtol=1e-5)
    assert_close(grad.float(), sorted_grad.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", [RANKED[-1], next(iter(PAIRED))])
def test_little_shared_memory(operation: str, dtype: torch.dtype, shared_limit: Any) -> None:
    """Of bfloat16 with pairs: the larger ring, the smaller one, the counts in the workspace, where those of float16
    are at 99 kB too."""
    results = []
    for kilobytes in (227, 99, 48) if dtype == torch.bfloat16 else (227, 48):
        shared_limit(kilobytes << 10)
        options = {"reduction": "none", "backend": "emulated"}
        results.append(losses_and_grad(OPERATIONS[operation].public, hard_rows(67, 59), dtype, **options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("operation", RANKED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_shows(bad: float, operation: str) -> None:
    case = make_case(67, 59, samples=1, shapes=SINGLE)
    for side in ("student", "teacher"):
        logits = getattr(case, side).clone()
        logits[0, USED[1], 5] = bad
        changed = replace(case, **{side: logits})
        options = {"reduction": "none", "backend": "emulated"}
        losses, grad = losses_and_grad(OPERATIONS[operation].public, changed, torch.bfloat16, **options)
        assert losses.isnan().nonzero().tolist() == [[2]]
        assert grad.isnan().any(-1)[0].nonzero().tolist() == [[USED[1]]]


@pytest.mark.parametrize("name", PAIRED)
def test_groups_of_chunks_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two for each emulated block, and of one where memory is short."""
    case, sizes, totals, results = make_case(samples=1), [], [], []
    launch = ranked_cuda._Call.launch

    def record(call: Any, name: str, part: Any, *arguments: Any, **more: Any) -> None:
        sizes.append(len(part))
        launch(call, name, part, *arguments, **more)

    monkeypatch.setattr(ranked_cuda._Call, "launch", record)
    for free, most in ((None, ranked_cuda.WAVES * emulated.BLOCKS), (0, 1)):
        monkeypatch.setattr(ranked_cuda, "_free_bytes", lambda device, free=free: free)
        sizes.clear()
        student = case.student.float().requires_grad_()
        loss = OPERATIONS[name].public(case, student, case.teacher.float(), backend="emulated")
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
        assert max(sizes) == most
        totals.append(sum(sizes))
    assert totals[0] == totals[1] > 2 * ranked_cuda.WAVES * emulated.BLOCKS
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


CHUNK = ranked_cuda.SORTED_BYTES * (128256 + 151936)


@pytest.mark.parametrize(
    ("blocks", "free", "chunks"),
    [
        (132, None, 264),
        (132, 60 * 10**9, 264),  # an H100
        (132, 4 * CHUNK * 263, 132),
        (132, 4 * CHUNK * 131, 131),
        (58, 20 * 10**9, 116),  # an L4
        (58, 0, 1),
    ],
)
def test_groups_fit_the_device(blocks: int, free: int | None, chunks: int) -> None:
    assert ranked_cuda.group_size(blocks, CHUNK, free) == chunks


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        known = {one.untyped_storage().data_ptr() for one in tree_flatten(args)[0] if isinstance(one, torch.Tensor)}
        for one in tree_flatten(made)[0]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in known:
                self.now += one.nbytes
                weakref.finalize(one.untyped_storage(), self.free, one.nbytes)
        self.peak = max(self.peak, self.now)
        return made

    def free(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize(("students", "teachers"), [(5000, 6000), (6000, 5000)])
@pytest.mark.parametrize("ranks", [5000, 300])
def test_what_a_sort_takes(students: int, teachers: int, ranks: int) -> None:
    """With what a radix sort needs beside its input and output, as much as these: keys of 4 bytes, indices of 8."""
    sides = [torch.rand(3, size).softmax(-1) for size in (students, teachers)]
    with Allocated() as allocated:
        sorted_l1(*sides, ranks)
    tensors = allocated.peak / 3 + 4 * (students + teachers)
    assert allocated.peak > 3 * 4 * ranks
    assert tensors + 12 * max(students, teachers) <= ranked_cuda.SORTED_BYTES * (students + teachers)
