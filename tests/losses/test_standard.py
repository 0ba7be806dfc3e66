"""What holds for every registered loss on every backend that has it: accuracy on hard inputs, options, bad inputs, the
same results each time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
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
    agreeing_alignments,
    backends_of,
    bad_call,
    check,
    check_labels,
    distinct_pairs,
    few_variants,
    golden,
    make_case,
    own_tests,
    variants,
)
from torch import Tensor

from xtoken import XTokenLoss
from xtoken.alignment import predictable
from xtoken.losses import Needs, registered
from xtoken.losses.backends import IGNORED

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


@pytest.mark.parametrize(("name", "backend"), [pair for pair in PAIRS if pair[1] != "reference"])
def test_labels_in_the_same_pass(name: str, backend: str) -> None:
    """As two losses of the reference, also in rows with no finite logit or no chunk, and without a gradient."""
    case, operation = make_case(67, 67), OPERATIONS[name]
    case.student[..., 1::3] = -math.inf
    case.student[:, ::4] = -math.inf
    labels = torch.randint(67, case.student.shape[:2], generator=torch.Generator().manual_seed(1))
    labels[:, 3] = IGNORED
    changed = {"temperature": 2.0, "reverse": True}.items()
    known = registered()[name].options()
    for options in ({}, operation.few(13), {one: value for one, value in changed if one in known}):

        def call(student: Tensor, backend: str, options: dict[str, Any] = options) -> Any:
            teacher = case.teacher.float().to(student.dtype)
            return operation.public(case, student, teacher, labels=labels, backend=backend, **options)

        check_labels(call, case.student, backend, f"{name}, {options}")


@pytest.mark.parametrize(("name", "backend"), distinct_pairs())
def test_results_are_the_same_each_time_and_with_any_number_of_threads(name: str, backend: str) -> None:
    """Bit by bit; also the gradient of weights of W that are trained."""
    on_cpu = backend.startswith("cpu")
    case = make_case(1000, 1200) if on_cpu else make_case()
    size, W = OPERATIONS[name].size(case), case.projection
    labels = torch.randint(size, case.student.shape[:2], generator=torch.Generator().manual_seed(1))
    for options in few_variants(name).values() if on_cpu else list(variants(name).values())[:1]:
        results = []
        for threads in (1, 1, 3, 2) if on_cpu else (1, 1):
            torch.set_num_threads(threads)
            student = case.student.float().requires_grad_()
            weight = W.weight.clone().requires_grad_(registered()[name].trains_projection)
            matrix: Any = SimpleNamespace(row_ptr=W.row_ptr, col=W.col, weight=weight, shape=W.shape)
            loss, ce = OPERATIONS[name].public(
                replace(case, projection=matrix),
                student,
                case.teacher.float(),
                labels=labels,
                backend=backend,
                **options,
            )
            leaves = [leaf for leaf in (student, weight) if leaf.requires_grad]
            results.append([loss.detach(), ce.detach(), *torch.autograd.grad(loss + ce, leaves)])
        torch.set_num_threads(1)
        for result in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True)), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "backend"), [pair for pair in PAIRS if "agree" in registered()[pair[0]].options()])
def test_chunks_that_begin_with_other_text_are_left_out(name: str, backend: str, dtype: torch.dtype) -> None:
    """As if they were not in the alignment; counted."""
    case = make_case()
    of, few = agreeing_alignments(case)
    for options in few_variants(name).values():
        results = []
        for alignment, agree in ((of, True), (few, False)):
            student = case.student.to(dtype).requires_grad_()
            call = OPERATIONS[name].bound(replace(case, alignment=alignment))
            given = {"agree": agree, "backend": backend, **options}
            loss = call(student, case.teacher.to(dtype), **given)
            each = call(student, case.teacher.to(dtype), reduction="none", **given)
            results.append((loss, each, *torch.autograd.grad(loss, student)))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want), options
    criterion = XTokenLoss([OPERATIONS[name].teacher(case, agree=True)], backend=backend)
    labels = torch.zeros(case.student.shape[:2], dtype=torch.int64)
    _, parts = criterion(case.student.to(dtype), labels, case.teacher.to(dtype), of)
    share = 1 - int(predictable(few).sum()) / int(predictable(of).sum())
    assert parts["left_out"].tolist() == pytest.approx([share])


@pytest.mark.parametrize("name", [name for name, loss in registered().items() if loss.reads_tokens])
def test_ids_of_another_vocabulary(name: str) -> None:
    case = make_case()
    assert case.alignment.student_ids is not None
    case.alignment.student_ids[:] = 67
    with pytest.raises(ValueError, match=r"alignment: expected student_ids in 0 ... 66 within chunks, got 67"):
        OPERATIONS[name].public(case, case.student, case.teacher)


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
