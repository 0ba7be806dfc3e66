"""What holds for every registered loss on every backend that has it: accuracy on hard inputs, options, bad inputs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from comparer import assert_close
from harness import (
    BAD_INPUTS,
    CASES,
    DTYPES,
    OPERATIONS,
    PAIRS,
    Case,
    Golden,
    backends_of,
    bad_call,
    check,
    distinct_pairs,
    golden,
    make_case,
    own_tests,
    variants,
)
from torch import Tensor

from xtoken.losses import Needs, registered

OF_ANOTHER_SIZE = ("teacher_above", "teacher_equal", "vector_remainder", "padded_head_large")


@pytest.mark.parametrize(
    ("case", "dtype", "name", "backend"),
    [
        (case, dtype, *pair)
        for case, dtype, pair in itertools.product(CASES, DTYPES, distinct_pairs())
        if case not in OF_ANOTHER_SIZE or pair[1] != "emulated" or dtype != torch.float16
    ],
    ids=str,
)
def test_hard_inputs(case: str, dtype: torch.dtype, name: str, backend: str) -> None:
    """Types decide how rows are read, options what is computed from them: all types with the first options. On the
    emulator rows of float16 are read as those of bfloat16, and cost as much as all others."""
    check(backend, name, CASES[case](), dtype, **next(iter(variants(name).values())))


@pytest.mark.parametrize(("name", "backend"), PAIRS)
@pytest.mark.parametrize("case", ["teacher_below", "infinite", "none_finite"])
def test_options(case: str, name: str, backend: str) -> None:
    for variant, options in list(variants(name).items())[1:]:
        try:
            check(backend, name, CASES[case](), torch.float32, strided=True, **options)
        except AssertionError as error:
            raise AssertionError(f"with {variant}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(("name", "backend"), distinct_pairs())
def test_logits_so_large_that_floats_skip_whole_temperatures(
    name: str, backend: str, side: str, dtype: torch.dtype
) -> None:
    case = make_case()
    getattr(case, side)[:, 2::3, 5] = 1e30
    check(backend, name, case, dtype, **next(iter(variants(name).values())))


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradcheck(name: str) -> None:
    operation = OPERATIONS[name]
    case = make_case(13, 11, samples=1, shapes=((1, 1), (2, 3), (1, 1), (3, 1)))
    for options in variants(name).values():

        def losses(student: Tensor, options: dict[str, Any] = options) -> Tensor:
            result: Tensor = operation.public(
                case, student, case.teacher, reduction="none", backend="reference", **options
            )
            return result

        assert torch.autograd.gradcheck(losses, case.student.clone().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if OPERATIONS[name].needs is not Needs.SAME_TOKENIZER])
@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_inputs(bad: str, name: str, never_run: str) -> None:
    call, exception, message = bad_call(bad, never_run)
    function, operation = registered()[name].function(), OPERATIONS[name]
    pair = {Needs.PROJECTION: {"projection": make_case().projection}, Needs.PIECES: {"pieces": make_case().pieces}}
    with pytest.raises(exception, match=message):
        function(**call, **pair.get(operation.needs, {}), **operation.sizes(make_case()))


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_spans_that_were_changed_after_the_check(name: str, backend: str) -> None:
    """They are a public tensor, and kernels go where it points."""
    for changed in (1_000_000, -5):
        case, operation = make_case(), OPERATIONS[name]
        alignment, *pair = operation.arguments(case)
        alignment.spans[2, 0] = changed
        with pytest.raises(ValueError, match=f"spans: chunk 2 = .{changed}, .* is empty, negative, or goes backwards"):
            operation.function()(case.student, case.teacher, alignment, *pair, **operation.sizes(case), backend=backend)


@pytest.mark.parametrize(
    ("name", "backend"), [pair for pair in PAIRS if OPERATIONS[pair[0]].needs is not Needs.SAME_TOKENIZER]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["no_chunk", "all_masked"])
def test_no_chunk_is_zero_and_connected(case: str, reduction: str, name: str, backend: str) -> None:
    empty: Case = CASES[case]()
    student = empty.student.float().requires_grad_()
    loss = OPERATIONS[name].public(empty, student, empty.teacher.float(), reduction=reduction, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.shape == ((empty.alignment.num_chunks,) if reduction == "none" else ())
    assert not bool(loss.any())
    assert not bool(grad.any())


@pytest.mark.parametrize(
    ("result", "backend"),
    [(result, backend) for name in OPERATIONS for result in golden(name) for backend in backends_of(name)],
    ids=lambda one: one if isinstance(one, str) else one.fields["file"],
)
def test_golden(result: Golden, backend: str) -> None:
    """As NeMo-RL's implementation has it."""
    case, fields = result.case(), result.fields
    name = fields["mode"]
    options = {option: fields[option] for option in registered()[name].options() if option in fields}
    student = case.student.clone().requires_grad_()
    options.update(getattr(own_tests(name), "GOLDEN", {}))
    loss = OPERATIONS[name].public(case, student, case.teacher, backend=backend, **options)
    (grad,) = torch.autograd.grad(loss, student)
    assert case.alignment.num_chunks == fields["num_chunks"]
    assert_close(loss, torch.tensor(fields["loss"]), rtol=1e-4, what="loss")
    want = result.tensors["student_grad"]
    assert_close(grad, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()), what="gradient")
