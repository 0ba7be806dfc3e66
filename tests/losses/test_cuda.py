"""The CUDA kernels: on the emulator in several orders of its threads, and on a GPU where there is one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch
from default_losses import default_loss
from harness import (
    CASES,
    OPERATIONS,
    Case,
    backends_of,
    check,
    distinct,
    few_variants_of,
    losses_and_grad,
    make_case,
)
from torch import Tensor

from xtoken.losses import Needs
from xtoken.losses.cpu import Array
from xtoken.losses.cuda import Kernels

pytestmark = pytest.mark.slow

needs_emulator = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
ORDERS = (("reverse", 0), ("one_ahead", 0), ("random", 1))
OPTIONS = few_variants_of(name for name in distinct() if "emulated" in backends_of(name))
projected_loss = default_loss(Needs.PROJECTION)


@pytest.fixture
def order() -> Iterator[Any]:
    """Sets the order of the emulated threads; the usual one comes back at the end."""
    yield emulated.set_order
    emulated.set_order("forward")


@needs_emulator
@pytest.mark.parametrize("name", OPTIONS)
def test_shared_memory_or_the_workspace(name: str, shared_limit: Any) -> None:
    """Where a block has no shared memory but the ring, the rest is in the workspace, and results are the same."""
    operation, options = OPTIONS[name]
    results = []
    for size in (227 << 10, 0):
        shared_limit(size)
        given = {"reduction": "none", "backend": "emulated", **options}
        results.append(losses_and_grad(OPERATIONS[operation].public, make_case(samples=1), torch.bfloat16, **given))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_emulator
@pytest.mark.parametrize("name", OPTIONS)
def test_the_order_of_threads_does_not_matter(name: str, order: Any) -> None:
    operation, options = OPTIONS[name]
    case = make_case(samples=1, scale=9.0)

    def results() -> tuple[Tensor, Tensor]:
        options_of_call = {"reduction": "none", "backend": "emulated", **options}
        return losses_and_grad(OPERATIONS[operation].public, case, torch.bfloat16, **options_of_call)

    want = results()
    for name_of_order, seed in ORDERS:
        order(name_of_order, seed)
        assert all(torch.equal(a, b) for a, b in zip(results(), want, strict=True))


@needs_emulator
@pytest.mark.parametrize("name", OPTIONS)
def test_the_queue_of_chunks_changes_nothing(name: str, order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against chunks that are dealt out in order; the block that starts late finds the queue empty."""
    operation, options = OPTIONS[name]
    case = make_case(samples=1, scale=9.0)
    call = functools.partial(losses_and_grad, OPERATIONS[operation].public, case, torch.bfloat16, reduction="none")
    order("one_ahead")
    got = call(backend="emulated", **options)
    monkeypatch.setattr(Kernels, "queue", lambda self, memory: None)
    order("forward")
    assert all(torch.equal(a, b) for a, b in zip(got, call(backend="emulated", **options), strict=True))


@pytest.fixture(params=["mixed", *(pytest.param(one, marks=pytest.mark.wide) for one in ("above", "below"))])
def errors(request: pytest.FixtureRequest) -> Iterator[str]:
    """Approximate functions are off by as much as CUDA says that they may be."""
    emulated.set_errors(request.param)
    yield request.param
    emulated.set_errors("none")


@needs_emulator
@pytest.mark.parametrize("name", OPTIONS)
def test_errors_of_approximate_functions(name: str, errors: str) -> None:
    """What is computed from rows of 16 bits is wider of the truth anyway, and of float16 as of bfloat16."""
    operation, options = OPTIONS[name]
    tried: dict[torch.dtype, tuple[str, ...]] = {
        torch.float32: ("teacher_below", "peaky", "infinite", "one_chunk"),
        torch.bfloat16: ("peaky", "infinite"),
    }
    if errors == "mixed":
        tried[torch.float16] = ("peaky",)
    for dtype, case in ((dtype, case) for dtype, cases in tried.items() for case in cases):
        check("emulated", operation, CASES[case](), dtype, **options)


@needs_emulator
def test_launches_that_no_kernel_is_compiled_for() -> None:
    module = emulated.load()[0]
    start, covered = Array(0, "int64", (0,), (1,)), Array(0, "uint8", (0,), (1,))
    fields = {"rows": {"start": start, "count": start, "next": None, "before": None}, "chunks": 1, "covered": covered}
    for blocks, threads in ((0, 32), (1, 33), (1, 2 * module.max_threads)):
        with pytest.raises(ValueError, match="launch: expected at least one block of a multiple of 32 threads"):
            module.launch("mark_rows", fields, blocks, threads, 0, 0)


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 5, 8, 70001])
def test_scale(size: int, dtype: torch.dtype) -> None:
    kernels = Kernels(emulated.load()[0], emulated.memory())
    values = torch.randn(size + 1, generator=torch.Generator().manual_seed(0)).to(dtype)[1:].contiguous()
    for factor in (1.0, -0.3):
        got = values.clone()
        kernels.scale(got, torch.tensor(factor))
        assert torch.equal(got, (values.float() * factor).to(dtype))


# What only a GPU can show; more in test_device.py. The semantic tests run there too, as the backend "on_gpu".


def on_gpu(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return case.student.to("cuda", dtype).requires_grad_(), case.teacher.to("cuda", dtype)


@pytest.mark.cuda
def test_auto_is_cuda_and_repeats_itself() -> None:
    case = make_case(1031, 907, samples=4)
    results = []
    for _ in range(2):
        student, teacher = on_gpu(case, torch.bfloat16)
        loss = projected_loss(student, teacher, case.alignment, case.projection, merge="mean", top_k=301)
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    student, teacher = on_gpu(case, torch.bfloat16)
    explicit = projected_loss(
        student, teacher, case.alignment, case.projection, merge="mean", top_k=301, backend="cuda"
    )
    assert torch.equal(explicit, results[0][0])
