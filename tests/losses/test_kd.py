"""Same-tokenizer KL."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparer import assert_close, assert_within
from default_losses import default_loss
from harness import DTYPES, Case, backends_of, check, make_case
from steps import Step, loss_of
from torch import Tensor

from xtoken import TopKLogits, kd_loss, reference
from xtoken.alignment import Alignment
from xtoken.losses import Needs
from xtoken.projection import ProjectionMatrix

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "subset": {"top_k": 13},
    "reverse": {"reverse": True, "top_k": 13},
    "temperature": {"temperature": 2.5},
    "jensen-shannon": {"beta": 0.3, "temperature": 1.5},
    "skewed": {"skew": 0.1, "top_k": 13},
    "skewed reverse": {"skew": 0.25, "reverse": True},
}
FEW_VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "subset": {"top_k": 31, "temperature": 1.5},
    "reverse": {"reverse": True},
    "mixed": {"beta": 0.5},
}
cpu = pytest.mark.parametrize("backend", [name for name in backends_of("kd") if name.startswith("cpu")])


def truth(case: Case, z: Tensor, y: Tensor, chunks: Any, *, top_k: int | None = None, **options: Any) -> Tensor:
    return reference.kd(z, y, chunks, reference.column_set(y, top_k), **options)


def logits(samples: int = 2, length: int = 5, width: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = 2, samples, length, width
    student, teacher = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return student, teacher


@pytest.mark.parametrize("reverse", [False, True])
def test_is_the_kl_divergence(reverse: bool) -> None:
    student, teacher = logits()
    log_p, log_q = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    pair = (log_q, log_p) if reverse else (log_p, log_q)
    want = 4 * torch.nn.functional.kl_div(*pair, log_target=True, reduction="none").sum(-1)
    assert_close(kd_loss(student, teacher, temperature=2.0, reverse=reverse), want.mean(), rtol=1e-12)
    each = kd_loss(student, teacher, temperature=2.0, reverse=reverse, reduction="none")
    assert_close(each, want, rtol=1e-9)


def test_is_the_generalised_jensen_shannon_divergence() -> None:
    student, teacher = logits()
    p, q = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    mixture = 0.3 * q + 0.7 * p
    want = 4 * (0.3 * q * (q / mixture).log() + 0.7 * p * (p / mixture).log()).sum(-1)
    assert_close(kd_loss(student, teacher, temperature=2.0, beta=0.3), want.mean(), rtol=1e-12)


@pytest.mark.parametrize("top_k", [7, None])
def test_is_the_projected_loss_with_the_identity(top_k: int | None) -> None:
    student, teacher = logits()
    identity = ProjectionMatrix.from_topk(torch.arange(23)[:, None], torch.ones(23, 1), 23)
    spans = torch.tensor([[t, t + 1] * 2 for t in range(1, 5)] * 2)
    alignment = Alignment(spans, [0, 4, 8])
    loss = kd_loss(student, teacher, alignment, top_k=top_k)
    projected = default_loss(Needs.PROJECTION)(student, teacher, alignment, identity, top_k=top_k)
    assert_close(loss, projected, rtol=1e-6)


def test_mask() -> None:
    student, teacher = logits()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1] = mask[1, 3] = True
    student.requires_grad_()
    each = kd_loss(student, teacher, reduction="none")
    masked = kd_loss(student, teacher, mask=mask, reduction="none")
    assert_within(masked, torch.where(mask, each, 0.0), 0.0)
    loss = kd_loss(student, teacher, mask=mask)
    assert_close(loss, each[mask].mean(), rtol=1e-12)
    (grad,) = torch.autograd.grad(loss, student)
    assert bool((grad.abs().amax(-1) > 0).eq(mask).all())
    nothing = kd_loss(student, teacher, mask=torch.zeros_like(mask))
    assert nothing.item() == 0
    assert bool((torch.autograd.grad(nothing, student)[0] == 0).all())


def test_one_sample() -> None:
    student, teacher = logits(samples=1)
    each = kd_loss(student[0], teacher[0], reduction="none")
    assert each.shape == (5,)
    assert_close(each, kd_loss(student, teacher, reduction="none")[0], rtol=1e-12)


def test_heads_padded_differently() -> None:
    student, teacher = logits()
    want = kd_loss(student, teacher)
    padded = torch.nn.functional.pad(teacher, (0, 4), value=math.nan)
    assert_within(kd_loss(student, padded), want, 0.0)
    both = torch.nn.functional.pad(student, (0, 9), value=math.nan)
    assert_within(kd_loss(both, padded, vocab_size=23), want, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 24}, "student_logits: expected at least 24 columns"),
        ({"vocab_size": 0}, "vocab_size: expected an integer of at least 1 or None, got 0"),
        ({"top_k": 0}, "top_k: expected an integer of at least 1 or None, got 0"),
        ({"temperature": -1.0}, "temperature: expected a positive finite number, got -1.0"),
        ({"beta": 1.5}, "beta: expected a number from 0 to 1, got 1.5"),
        ({"reduction": "batchmean"}, "reduction: expected one of"),
        ({"mask": torch.ones(2, 5)}, r"mask: expected bool \[2, 5\], got torch.float32"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"mask: expected bool \[2, 5\], got torch.bool \[5\]"),
        (
            {"alignment": Alignment([[1, 2, 1, 2]], [0, 0, 1]), "mask": torch.ones(2, 5, dtype=torch.bool)},
            "mask: expected None together with an alignment",
        ),
        (
            {"alignment": Alignment([[0, 1, 0, 1], [1, 3, 1, 2]], [0, 2, 2])},
            "alignment: expected chunks of one token on each side .*got chunk 1 with 2 and 1",
        ),
        ({"alignment": Alignment([[1, 2, 1, 2]])}, "alignment: expected 2 samples"),
        ({"alignment": Alignment([[1, 2, 5, 6]], [0, 0, 1])}, "teacher_logits: expected a row for every"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kd_loss(*logits(), **options)


def test_other_positions_need_an_alignment() -> None:
    student, teacher = logits()
    with pytest.raises(ValueError, match=r"teacher_logits: expected the positions of student_logits \[2, 5\]"):
        kd_loss(student, teacher[:, :4])


@functools.cache
def wide_case() -> Case:
    case = make_case(5003, 5003, samples=1, shapes=((1, 1),) * 3)
    case.student[:, 1, 4990:] += 100.0
    case.teacher[:, 2, 4985:] += 100.0
    return case


@cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"top_k": 1000, "temperature": 3.0}], ids=str)
@pytest.mark.slow
def test_wide_rows(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """The largest logits come after the first 4096, so the unit of the exponentials is found twice."""
    check(backend, "kd", wide_case(), dtype, strided=True, **options)


@pytest.mark.skipif(torch.__version__ < "2.5", reason="the compiler of torch 2.4 has no graph for it")
@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [23, None])
def test_compiled_without_an_alignment(vocab_size: int | None) -> None:
    student, teacher = logits()

    def step(student: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(student * 1.5, teacher.flip(1), top_k=20, vocab_size=vocab_size)

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = student.float().requires_grad_()
        loss = function(leaf, teacher.float())
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch._dynamo.reset()
    for got, want in zip(results[1], results[0], strict=True):
        assert_close(got, want, rtol=1e-5, atol=1e-8)


def test_infinite_logits_are_probability_zero() -> None:
    case = make_case(6, 6, samples=1, shapes=((1, 1), (1, 1)))
    chunks = reference.Chunks.of(case.alignment, case.student.shape[1], case.teacher.shape[1])
    student, teacher = case.student[0].clone(), case.teacher[0].clone()
    student[:, 2] = teacher[:, 2] = -torch.inf
    rest = torch.tensor([0, 1, 3, 4, 5])
    for reverse in (False, True):
        got = reference.kd(student, teacher, chunks, reverse=reverse)
        assert_close(got, reference.kd(student, teacher, chunks, rest, reverse=reverse), rtol=1e-12)


DEVICE_STEPS: dict[str, Callable[[Step], Any]] = {
    "mask": lambda s: loss_of(s, "kd", mask=s.mask),
    "alignment": lambda s: loss_of(s, "kd", alignment=s.constants.positions, labels=s.labels)[0],
}


@pytest.mark.parametrize("listed", [[0.0, -30.0], [1e-7, -12.0], [-2e-6, -30.0]])
def test_a_tail_lost_in_rounding_does_not_decide_a_reverse_kl(listed: list[float]) -> None:
    """A server's log-probabilities of a sure row may sum to 1 or more; the other tokens are not impossible by that."""
    teacher = TopKLogits(torch.tensor([[3, 0]]), torch.tensor([listed]))
    loss = kd_loss(torch.zeros(1, 10), teacher, reverse=True, vocab_size=10)
    dense = torch.full((10,), math.log(2e-6 / 8)).index_copy(0, torch.tensor([3, 0]), torch.tensor(listed))
    assert_close(loss, (-math.log(10) - dense).mean(), rtol=1e-5, atol=0)
