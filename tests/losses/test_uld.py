"""ULD."""

import itertools
from typing import Any

import pytest
import torch
from comparer import assert_close, assert_within
from harness import backends_of, make_case

from xtoken import TopKLogits, reference, uld_loss
from xtoken.alignment import Alignment
from xtoken.reference import Chunks, Rows

VARIANTS = {"default": {}, "temperature": {"temperature": 2.0}}


def test_by_hand() -> None:
    student = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log().expand(2, 3)
    teacher = torch.tensor([0.1, 0.6, 0.1, 0.2], dtype=torch.float64).log().expand(2, 4)
    loss = uld_loss(student, teacher, Alignment([[1, 2, 1, 2]]))
    assert_close(loss, torch.tensor(0.1 + 0.1 + 0.1 + 0.1), rtol=1e-7)


@pytest.mark.slow
def test_ties_share_their_gradient() -> None:
    """The gradient at a tie is the mean over all orders of the tied tokens, wherever the tie is cut or padded."""
    tied = torch.tensor([0.3, 0.1, 0.3, 0.05, 0.1, 0.15], dtype=torch.float64).log()
    teacher = torch.tensor([0.31, 0.2, 0.18, 0.11, 0.09, 0.06, 0.05], dtype=torch.float64).log()
    chunks = Chunks(
        Rows(torch.tensor([0]), torch.tensor([1])), Rows(torch.tensor([0]), torch.tensor([1])), torch.arange(1)
    )
    pairs = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    losses: list[Any] = [
        lambda z, k=k: sum(reference.ranked(z, teacher[None], chunks, pairs, uncommon_top_k=k)) for k in (1, 3, 4)
    ]
    for loss in [lambda z: reference.uld(z, teacher[None], chunks), *losses]:
        gradients = []
        for order in itertools.permutations(range(6)):
            student = (tied + 1e-12 * torch.tensor(order)).requires_grad_()
            gradients.append(torch.autograd.grad(loss(student[None]).sum(), student)[0])
        student = tied.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(student[None]).sum(), student)
        assert_close(grad, torch.stack(gradients).mean(0), rtol=1e-9, atol=1e-11)
        assert grad[0] == grad[2]


def test_width_defaults_to_the_logits() -> None:
    case = make_case()
    arguments = case.student, case.teacher, case.alignment
    whole = uld_loss(*arguments)
    assert_close(uld_loss(*arguments, student_vocab_size=67, teacher_vocab_size=59), whole, rtol=0.0)
    assert bool(uld_loss(*arguments, student_vocab_size=40) != whole)


@pytest.mark.parametrize("name", ["student_vocab_size", "teacher_vocab_size"])
def test_bad_size(name: str) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=f"{name}: expected an integer of at least 1 or None, got 0"):
        uld_loss(case.student, case.teacher, case.alignment, **{name: 0})


def test_is_what_compares_ranks_when_no_token_is_common() -> None:
    case = make_case(64, 64)
    chunks = Chunks.of(case.alignment, case.student.shape[1], case.teacher.shape[1])
    none = torch.empty(0, dtype=torch.int64)
    logits = case.student.flatten(0, 1), case.teacher.flatten(0, 1)
    common, uncommon = reference.ranked(*logits, chunks, (none, none))
    assert not bool(common.any())
    assert_close(reference.uld(*logits, chunks), uncommon, rtol=1e-12)


def test_a_teacher_of_few_tokens_needs_the_size_of_the_vocabulary() -> None:
    case = make_case()
    shape = (*case.teacher.shape[:2], 2)
    few = TopKLogits(torch.tensor([0, 1]).expand(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match="the function's vocab_size or teacher_vocab_size, or by a Teacher with"):
        uld_loss(case.student, few, case.alignment)


@pytest.mark.parametrize("backend", backends_of("uld"))
def test_equal_logits_cost_nothing(backend: str) -> None:
    case = make_case(300, 300, samples=1)
    student = case.student[:, :7].float().requires_grad_()
    loss = uld_loss(student, student.detach().clone(), Alignment([[1, 2, 1, 2], [2, 3, 2, 3]]), backend=backend)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss == 0
    assert not grad.any()


def test_pads_the_shorter_side() -> None:
    case = make_case(7, 11, samples=1, shapes=((1, 1), (1, 1)))
    chunks = Chunks.of(case.alignment, case.student.shape[1], case.teacher.shape[1])
    p = case.student[0, 0].softmax(-1).sort(descending=True).values
    q = case.teacher[0, 0].softmax(-1).sort(descending=True).values
    want = (p - q[:7]).abs().sum() + q[7:].sum()
    assert_close(reference.uld(case.student[0], case.teacher[0], chunks), want[None], rtol=1e-12)


def test_infinite_logits_are_probability_zero() -> None:
    case = make_case(6, 6, samples=1, shapes=((1, 1), (1, 1)))
    chunks = Chunks.of(case.alignment, case.student.shape[1], case.teacher.shape[1])
    student, teacher = case.student[0].clone(), case.teacher[0].clone()
    student[:, 2] = teacher[:, 2] = -torch.inf
    rest = torch.tensor([0, 1, 3, 4, 5])
    got = reference.uld(student, teacher, chunks)
    assert_within(got, reference.uld(student[:, rest], teacher[:, rest], chunks), 1e-12)


@pytest.mark.parametrize("backend", [name for name in backends_of("uld") if name.startswith("cpu")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_16_bits_beside_one_that_is_no_number(dtype: torch.dtype, backend: str) -> None:
    """The values of a row are counted in memory that the next one finds empty."""
    case = make_case(1024, 1100, samples=1, shapes=((1, 1),) * 6)
    chunks = Alignment([[i, i + 1, i, i + 1] for i in range(1, 5)])
    results = []
    for bad in (0.0, float("nan"), float("inf")):
        student, teacher = case.student[:, :6].to(dtype), case.teacher[:, :6].to(dtype)
        student[0, 1, 5] = teacher[0, 2, 7] = bad
        student.requires_grad_()
        losses = uld_loss(student, teacher, chunks, backend=backend, reduction="none").flatten()
        results.append((losses.detach(), torch.autograd.grad(losses.sum(), student)[0][0]))
    for losses, grad in results[1:]:
        assert losses.isnan().tolist() == [False, True, True, False]
        assert torch.equal(losses[::3], results[0][0][::3])
        assert torch.equal(grad[:4:3], results[0][1][:4:3])
        assert bool(grad[:4:3].any())
