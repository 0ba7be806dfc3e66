"""Choosing a backend, registering one, and its errors."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from default_losses import DEFAULT, default_loss
from harness import OPERATIONS, Case, check, make_case
from torch import Tensor

from xtoken import select_backend
from xtoken.alignment import Chunks
from xtoken.losses import Needs, plain, registered
from xtoken.losses.backends import (
    Backend,
    Kernel,
    Problem,
    register_backend,
    unregister_backend,
)
from xtoken.projection import column_set


def make_backend(name: str, run: Callable[..., Tensor], missing: str | None = None) -> Backend:
    kernel = Kernel(run)
    return Backend(
        name,
        lambda loss: kernel if loss in registered() else None,
        lambda device: missing,
        plain.cross_entropy,
        column_set,
    )


def wrong(change: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[..., Tensor]:
    """The reference with a change to the losses (returned) or the gradient (in place)."""

    def run(problem: Problem, student_grad: Tensor | None = None, *rest: Any) -> Tensor:
        return change(plain.run(problem, student_grad, *rest), student_grad)

    return run


def shift_loss(losses: Tensor, grad: Tensor | None) -> Tensor:
    return losses * 1.001


def scale_gradient(losses: Tensor, grad: Tensor | None) -> Tensor:
    if grad is not None:
        grad *= 1.001
    return losses


def one_row_off(losses: Tensor, grad: Tensor | None) -> Tensor:
    if grad is not None:
        grad.copy_(grad.roll(1, dims=1))
    return losses


def nan_gradient(losses: Tensor, grad: Tensor | None) -> Tensor:
    if grad is not None:
        grad[0, 0, 0] = torch.nan
    return losses


def nan_loss(losses: Tensor, grad: Tensor | None) -> Tensor:
    return torch.where(torch.arange(len(losses)) == 0, torch.nan, losses)


@pytest.fixture
def registering() -> Iterator[Callable[..., None]]:
    names = []

    def register(name: str, run: Callable[..., Tensor], missing: str | None = None) -> None:
        register_backend(make_backend(name, run, missing))
        names.append(name)

    yield register
    for name in names:
        unregister_backend(name)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("change", [shift_loss, scale_gradient, one_row_off, nan_gradient, nan_loss])
def test_the_harness_can_fail(change: Callable[..., Tensor], operation: str, registering: Callable[..., None]) -> None:
    registering("wrong", wrong(change))
    with pytest.raises(AssertionError, match="differ; worst at"):
        check("wrong", operation, make_case(), torch.float32)


def test_the_harness_passes_what_is_right(registering: Callable[..., None]) -> None:
    registering("right", wrong(lambda losses, grad: losses))
    for operation in OPERATIONS:
        check("right", operation, make_case(), torch.float32)


def one_row_early(chunks: Chunks) -> Chunks:
    chunks.student.start[-1] -= 1
    return chunks


def one_row_late(chunks: Chunks) -> Chunks:
    chunks.teacher.start[0] += 1
    return chunks


def chunks_exchanged(chunks: Chunks) -> Chunks:
    return replace(chunks, used=chunks.used.flip(0))


def last_chunk_left_out(chunks: Chunks) -> Chunks:
    sides = (side.chosen(slice(-1)) for side in (chunks.student, chunks.teacher))
    return Chunks(*sides, chunks.used[:-1])


def last_rows_left_out(chunks: Chunks) -> Chunks:
    return replace(chunks, student=chunks.student.first())


def tokens_one_off(chunks: Chunks) -> Chunks:
    ids = chunks.teacher.next_ids
    return replace(chunks, teacher=replace(chunks.teacher, next_ids=ids if ids is None else ids.clamp_min(0).roll(1)))


ENDS = (1, 1), (1, 1), (3, 1), (1, 2), (2, 3), (1, 1)
"""Chunks of which the first and the last with a predictor are one token each, which every loss compares."""


def check_with_wrong_rows(
    fault: Callable[[Chunks], Chunks], operation: str, monkeypatch: pytest.MonkeyPatch, case: Case | None = None
) -> None:
    """`check` while the library takes wrong rows; those of the harness are its own."""
    right = Chunks.of
    with monkeypatch.context() as patch:
        patch.setattr(Chunks, "of", staticmethod(lambda *args, **options: fault(right(*args, **options))))
        check("reference", operation, case or make_case(), torch.float32)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", [one_row_early, one_row_late, chunks_exchanged, last_chunk_left_out])
def test_the_harness_knows_the_rows(
    fault: Callable[[Chunks], Chunks], operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="differ; worst at"):
        check_with_wrong_rows(fault, operation, monkeypatch, make_case(shapes=ENDS))


@pytest.mark.parametrize("fault", [last_rows_left_out, tokens_one_off])
def test_the_harness_knows_later_rows(fault: Callable[[Chunks], Chunks], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the losses that read them."""
    failed = []
    for operation in OPERATIONS:
        try:
            check_with_wrong_rows(fault, operation, monkeypatch)
        except AssertionError:
            failed.append(operation)
    assert failed


def test_auto_uses_the_reference_where_nothing_else_works() -> None:
    for device in ("mps", "meta", "xpu"):
        assert select_backend("auto", device) == "reference"
    assert select_backend("reference", "cpu") == "reference"


def test_auto_prefers_what_was_added_later(registering: Callable[..., None]) -> None:
    registering("broken", plain.run, missing="it is broken")
    assert select_backend("auto", "mps") == "reference"
    with pytest.raises(RuntimeError, match="backend: 'broken' is not available: it is broken"):
        select_backend("broken", "cpu")
    registering("better", plain.run)
    assert select_backend("auto", "mps") == "better"
    assert select_backend("auto", "mps", DEFAULT[Needs.PROJECTION]) == "better"
    with pytest.raises(RuntimeError, match="backend: none has the operation 'another'"):
        select_backend("auto", "mps", "another")
    with pytest.raises(RuntimeError, match="it has no operation 'another'"):
        select_backend("better", "cpu", "another")


def test_unknown_and_reserved_names() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of 'auto', 'reference'.*got 'fast'"):
        select_backend("fast", "cpu")
    with pytest.raises(ValueError, match="reserved"):
        register_backend(make_backend("auto", plain.run))


@pytest.mark.parametrize(
    ("losses", "got"),
    [(lambda n: torch.zeros(n + 1), r"torch.float32 \[15\]"), (lambda n: torch.zeros(()), r"torch.float32 \[\]"),
     (lambda n: torch.zeros(n).double(), r"torch.float64 \[14\]"), (lambda n: None, "NoneType")],
)  # fmt: skip
def test_what_a_backend_returns_is_looked_at(
    losses: Callable[[int], Any], got: str, registering: Callable[..., None]
) -> None:
    registering("odd", lambda problem, *rest: losses(len(problem.chunks)))
    case, name = make_case(shapes=[(1, 1)] * 8), DEFAULT[Needs.PROJECTION]
    message = rf"{name}: expected torch.float32 \[14\], a loss for each chunk, of backend 'odd', got {got}"
    with pytest.raises(RuntimeError, match=message):
        OPERATIONS[name].public(case, case.student.float(), case.teacher.float(), backend="odd")


def test_a_loss_uses_the_backend_that_it_was_given(registering: Callable[..., None]) -> None:
    registering("zero", lambda problem, *rest: problem.student.new_zeros(len(problem.chunks)))
    case = make_case()
    loss = default_loss(Needs.PROJECTION)
    assert loss(case.student, case.teacher, case.alignment, case.projection, backend="zero") == 0
    assert loss(case.student, case.teacher, case.alignment, case.projection, backend="reference") > 0
