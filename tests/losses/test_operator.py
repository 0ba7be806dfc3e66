"""The operator behind the losses: torch.compile, opcheck, labels, other kinds of logits, in place, twice."""

import itertools
import math
import os
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparer import assert_as_accurate, assert_close
from default_losses import DEFAULT, default_loss
from harness import OPERATIONS, PAIRS, Case, distinct_pairs, few_variants, make_case, variants
from old_versions import needs_what_a_transform_says
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xtoken
from xtoken import LinearLogits, TopKLogits
from xtoken.losses import Needs, call, operator, registered
from xtoken.losses import logits as logits_module
from xtoken.losses.backends import IGNORED

projected_loss = default_loss(Needs.PROJECTION)


def small_case(dtype: torch.dtype = torch.float32) -> Case:
    case = make_case()
    return Case(case.student.to(dtype), case.teacher.to(dtype), case.alignment, case.projection)


def make_labels(case: Case, size: int = 67) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(size, case.student.shape[:2], generator=generator)
    labels[:, 3] = IGNORED
    return labels


def cross_entropy(student: Tensor, labels: Tensor, reduction: str, size: int) -> Tensor:
    rows = student[:, :-1, :size].flatten(0, 1)
    return torch.nn.functional.cross_entropy(rows, labels[:, 1:].flatten(), reduction=reduction)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of five rows, so that a small case has many."""
    monkeypatch.setattr(logits_module, "BLOCK_ELEMENTS", 5 * 67)


def call_loss(name: str, case: Case, student: Any, teacher: Any, **options: Any) -> Any:
    return OPERATIONS[name].public(case, student, teacher, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_labels(name: str, reduction: str, backend: str) -> None:
    case = small_case(torch.float64 if backend == "reference" else torch.float32)
    size = OPERATIONS[name].size(case)
    labels = make_labels(case, size)
    student = case.student.requires_grad_()
    options = {"reduction": reduction, "backend": backend}
    alone = call_loss(name, case, student, case.teacher, **options)
    want = cross_entropy(student, labels, reduction, size)
    for factors in ((1.0, 1.0), (2.0, 2.0), (0.5, 3.0), (0.0, 1.0), (1.0, 0.0)):
        loss, ce = call_loss(name, case, student, case.teacher, labels=labels, **options)
        assert_close(loss, alone.detach(), rtol=1e-5)
        assert_close(ce, want.detach(), rtol=1e-5)
        (grad,) = gradients(factors[0] * loss + factors[1] * ce, student)
        (expected,) = torch.autograd.grad(factors[0] * alone + factors[1] * want, student, retain_graph=True)
        assert_close(grad, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_labels_that_do_not_fit() -> None:
    case = small_case()
    labels = make_labels(case)

    def call(labels: Tensor, **options: Any) -> Any:
        return projected_loss(case.student, case.teacher, case.alignment, case.projection, labels=labels, **options)

    with pytest.raises(ValueError, match=r"labels: expected shape \[2, \d+\]"):
        call(labels[:, :-1])
    with pytest.raises(TypeError, match=r"labels: expected an integer tensor, got torch.float32"):
        call(labels.float())
    with pytest.raises(ValueError, match="labels: expected reduction='mean' or 'sum'"):
        call(labels, reduction="none")
    labels[0, 1] = 67
    with pytest.raises(ValueError, match=r"labels: expected token ids in 0 ... 66, or -100, got 67"):
        call(labels)


@pytest.mark.parametrize(
    ("name", "backend", "kind"),
    [(*pair, "loss") for pair in distinct_pairs()]
    + [(*pair, kind) for pair in distinct_pairs() if pair[1] == "cpu" for kind in ("labels", "inplace", "linear")],
)
def test_a_scaler_saves_small_gradients_of_float16(name: str, backend: str, kind: str) -> None:
    """Those of a mean over many chunks are below what float16 has, but not with the factor of a scaler."""
    chunks, share = (30, 2.0**-4) if backend == "emulated" else (300, 2.0**-8)
    case = make_case(19, 17, samples=1, shapes=((1, 1),) * chunks, scale=6.0)
    labels = make_labels(case, OPERATIONS[name].size(case)) if kind == "labels" else None
    student, teacher = case.student.half(), case.teacher.half()
    hidden, head = student / 4, 4 * torch.eye(19, dtype=torch.float16)
    smallest = 2.0**-24 * 2.0**16 * share * (4 if kind == "linear" else 1)  # float16's, times what comes in backward

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = (hidden if kind == "linear" else student).to(dtype).requires_grad_()
        logits: Any = LinearLogits(leaf, head.to(dtype)) if kind == "linear" else leaf * 1.0
        options: dict[str, Any] = {"inplace": True} if kind == "inplace" else {}
        if labels is not None:
            options["labels"] = labels
        where = backend if dtype == torch.float16 else "reference"
        results = call_loss(name, case, logits, teacher.to(dtype), backend=where, **options)
        total = results if isinstance(results, Tensor) else results[0] + results[1]
        return torch.autograd.grad(2.0**16 * total, leaf)[0]

    got, true = gradient(torch.float16).double(), gradient(torch.float64)
    assert_close(got, true, rtol=2e-2, atol=2e-4 * float(true.abs().max()))
    lost = (got == 0)[true.abs() > smallest].double().mean()
    assert lost < 1e-3


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_a_second_backward_computes_the_gradient_again(name: str, backend: str) -> None:
    case = small_case()
    student = case.student.requires_grad_()
    loss = call_loss(name, case, student, case.teacher, backend=backend)
    (first,) = torch.autograd.grad(3.0 * loss, student, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(3.0 * loss, student)
    assert_close(second, kept, rtol=1e-5, atol=1e-6 * float(kept.abs().max()))
    assert torch.equal(first, kept)
    with pytest.raises(RuntimeError, match="second time"):  # without retain_graph
        torch.autograd.grad(loss, student)


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_inplace(name: str, backend: str) -> None:
    case = small_case()
    leaf = case.student.clone().requires_grad_()
    want_loss = call_loss(name, case, leaf, case.teacher, backend=backend)
    (want,) = gradients(2.0 * want_loss, leaf)
    logits = leaf * 1.0
    address = logits.data_ptr()
    loss = call_loss(name, case, logits, case.teacher, backend=backend, inplace=True)
    (got,) = torch.autograd.grad(2.0 * loss, logits, retain_graph=True)
    assert torch.equal(loss, want_loss)
    assert torch.equal(got, want)
    assert got.data_ptr() == address
    with pytest.raises(RuntimeError, match="backward works once"):
        torch.autograd.grad(loss, logits)


def test_inplace_refuses_what_it_would_break() -> None:
    case = small_case()
    arguments = case.teacher, case.alignment, case.projection
    with pytest.raises(ValueError, match="inplace: expected logits computed by a model, got a leaf"):
        projected_loss(case.student.requires_grad_(), *arguments, inplace=True)
    computed = case.student.detach() * 1.0
    with pytest.raises(ValueError, match="inplace: expected contiguous logits"):
        projected_loss(computed.transpose(0, 1).contiguous().transpose(0, 1), *arguments, inplace=True)
    with pytest.raises(ValueError, match="inplace: expected False with labels"):
        projected_loss(computed, *arguments, inplace=True, labels=make_labels(case))
    with pytest.raises(ValueError, match="inplace: expected False with reduction='none'"):
        projected_loss(computed, *arguments, inplace=True, reduction="none")


def test_inplace_is_noticed_by_what_needs_the_values() -> None:
    case = small_case()
    logits = case.student.requires_grad_().exp()  # whose backward reads its result
    loss = projected_loss(logits, case.teacher, case.alignment, case.projection, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def top_k_of(logits: Tensor, k: int, size: int) -> tuple[Tensor, Tensor]:
    logprobs = logits[..., :size].log_softmax(-1)
    top = logprobs.topk(k, dim=-1)
    return top.indices, top.values


@pytest.mark.parametrize("tail", ["uniform", "renormalize"])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
@pytest.mark.usefixtures("small_blocks")
def test_top_k_teacher(name: str, backend: str, tail: str) -> None:
    """Equal to dense logits made from the same log-probabilities by hand."""
    case = small_case()
    size = case.projection.shape[1]
    ids, logprobs = top_k_of(case.teacher, 7, size)
    ids[..., -1] = -1  # fewer than k in every row
    listed = torch.zeros(*case.teacher.shape[:2], size)
    listed.scatter_(-1, ids[..., :-1], logprobs[..., :-1].exp())
    if tail == "uniform":
        rest = (1 - listed.sum(-1, keepdim=True)) / (size - 6)
        dense = torch.where(listed > 0, listed, rest).log()
    else:
        dense = (listed / listed.sum(-1, keepdim=True)).log()
    student = case.student.requires_grad_()
    options: dict[str, Any] = {"backend": backend}
    if "top_k" in registered()[name].options():
        options["top_k"] = 20
    want = call_loss(name, case, student, dense, **options)
    got = call_loss(name, case, student, TopKLogits(ids, logprobs, tail), **options)
    assert_close(got, want, rtol=1e-5)
    assert_close(*gradients(got, student), *gradients(want, student), rtol=1e-3, atol=1e-7)


def test_top_k_logits_that_do_not_fit() -> None:
    ids, logprobs = torch.tensor([[0, 1]]), torch.tensor([[-0.1, -3.0]])
    with pytest.raises(TypeError, match=r"ids: expected an int64 or int32 tensor, got torch.float32"):
        TopKLogits(ids.float(), logprobs)
    with pytest.raises(TypeError, match=r"logprobs: expected a floating-point tensor, got torch.int64"):
        TopKLogits(ids, ids)
    with pytest.raises(ValueError, match=r"logprobs: expected the shape .* of ids \[1, 2\], got \[1, 1\]"):
        TopKLogits(ids, logprobs[:, :1])
    with pytest.raises(ValueError, match="tail: expected one of 'uniform', 'renormalize', got 'zero'"):
        TopKLogits(ids, logprobs, "zero")
    case = small_case()
    shape = (*case.teacher.shape[:2], 2)
    arguments = case.alignment, case.projection
    logits = torch.arange(2).expand(shape), torch.tensor([3.0, -2.0]).expand(shape)  # of no softmax
    with pytest.raises(ValueError, match="logprobs: expected logarithms of probabilities, none above 0, got 3"):
        projected_loss(case.student, TopKLogits(*logits), *arguments)
    assert projected_loss(case.student, TopKLogits(*logits, "renormalize"), *arguments).isfinite()
    with pytest.raises(ValueError, match=r"ids: expected token ids in 0 ... 58, or -1, got 59"):
        projected_loss(case.student, TopKLogits(torch.full(shape, 59), torch.zeros(shape)), *arguments)
    with pytest.raises(ValueError, match="ids: expected distinct token ids in a row, got one twice in row 0"):
        projected_loss(case.student, TopKLogits(torch.full(shape, 3), torch.zeros(shape)), *arguments)
    with pytest.raises(TypeError, match="student_logits: expected logits or LinearLogits"):
        projected_loss(TopKLogits(ids[None].repeat(2, shape[1], 1), torch.zeros(shape)), case.teacher, *arguments)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("teacher_kind", ["dense", "linear"])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
@pytest.mark.usefixtures("small_blocks")
def test_linear(name: str, backend: str, teacher_kind: str, labelled: bool) -> None:
    """Hidden states and output layer: as the logits that they make, with the gradients of both; also capped."""
    case = small_case()
    generator = torch.Generator().manual_seed(3)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    operation = OPERATIONS[name]
    size = operation.size(case)
    hidden, head, bias = make(2, case.student.shape[1], 11), make(size + 3, 11), make(size + 3)
    teacher_hidden, teacher_head = make(2, case.teacher.shape[1], 9), make(case.projection.shape[1] + 2, 9)
    leaves = [value.requires_grad_() for value in (hidden, head, bias)]
    is_capped = labelled is (teacher_kind == "dense")
    capped: dict[str, Any] = {"softcap": 3.0, "logit_scale": 0.7} if is_capped else {}

    def cap(logits: Tensor) -> Tensor:
        return 3.0 * torch.tanh(0.7 * logits / 3.0) if is_capped else logits

    dense_teacher = cap(teacher_hidden @ teacher_head.T)
    teacher = dense_teacher if teacher_kind == "dense" else LinearLogits(teacher_hidden, teacher_head, **capped)
    options: dict[str, Any] = {"backend": backend}
    if labelled:
        options["labels"] = make_labels(case, size)
    want = operation.public(case, cap(hidden @ head.T + bias), dense_teacher, **options)
    got = operation.bound(case, linear=True)(hidden, head, teacher, bias=bias, **capped, **options)
    if labelled:
        want, got = 0.3 * want[0] + 2.0 * want[1], 0.3 * got[0] + 2.0 * got[1]
    assert_close(got, want, rtol=1e-4)
    for one, other in zip(gradients(got, *leaves), gradients(want, *leaves), strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(("name", "backend"), [pair for pair in PAIRS if registered()[pair[0]].trains_projection])
@pytest.mark.usefixtures("small_blocks")
def test_linear_adds_the_blocks_to_the_gradient_of_w(name: str, backend: str) -> None:
    case = small_case()
    generator = torch.Generator().manual_seed(3)
    hidden, head = (torch.randn(*n, generator=generator) for n in ((2, case.student.shape[1], 11), (67, 11)))
    W = case.projection
    weight = W.weight.clone().requires_grad_()
    learned: Any = types.SimpleNamespace(row_ptr=W.row_ptr, col=W.col, weight=weight, shape=W.shape)
    case = Case(case.student, case.teacher, case.alignment, learned)
    options = {**OPERATIONS[name].few(31), "backend": backend}
    got = OPERATIONS[name].bound(case, linear=True)(hidden, head, case.teacher, **options)
    want = OPERATIONS[name].public(case, hidden @ head.T, case.teacher, **options)
    for one, other in zip(gradients(got, weight), gradients(want, weight), strict=True):
        assert float(other.abs().max()) > 0
        assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def test_linear_adds_many_blocks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of an output layer in bfloat16 is about as near to the true one as one product makes it."""
    monkeypatch.setattr(logits_module, "BLOCK_ELEMENTS", 60)
    generator = torch.Generator().manual_seed(3)
    hidden, head, teacher = (torch.randn(*n, generator=generator) for n in ((1, 400, 8), (30, 8), (1, 400, 30)))
    loss = default_loss(Needs.SAME_TOKENIZER)
    found = []
    for dtype, kind in ((torch.float64, "dense"), (torch.bfloat16, "dense"), (torch.bfloat16, "linear")):
        z = hidden.bfloat16().to(dtype).requires_grad_()
        w = head.bfloat16().to(dtype).requires_grad_()
        student = LinearLogits(z, w) if kind == "linear" else z @ w.T
        found.append(torch.autograd.grad(loss(student, teacher.to(dtype)), [z, w]))
    for true, plain, got in zip(*found, strict=True):
        assert got.dtype == torch.bfloat16
        assert_as_accurate(got, plain, true, floor=1e-3 * float(true.abs().max()))


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("name", registered())
def test_linear_with_factors_that_are_known(name: str, is_frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward prepares the gradient of the loss and the cross-entropy together; factors that do not go with it make it
    nan. A frozen output layer has none."""
    case = small_case()
    generator = torch.Generator().manual_seed(3)
    operation = OPERATIONS[name]
    hidden = torch.randn(2, case.student.shape[1], 11, generator=generator).requires_grad_()
    head = torch.randn(operation.size(case), 11, generator=generator).requires_grad_(not is_frozen)
    leaves = [one for one in (hidden, head) if one.requires_grad]
    labels = make_labels(case, operation.size(case))
    made, results = call.run, []

    def found(factors: tuple[float, float], expected: tuple[float, float] | None) -> list[Tensor]:
        def run(loss: Any, given: Any, inplace: bool, _: None) -> Any:
            wanted = None if expected is None else operator.Expected(*map(torch.tensor, expected))
            results.append(made(loss, given, inplace, wanted))
            return results[-1]

        monkeypatch.setattr(call, "run", run)
        loss, ce = operation.bound(case, linear=True)(hidden, head, case.teacher, labels=labels)
        return list(torch.autograd.grad(factors[0] * loss + factors[1] * ce, leaves))

    for factors, expected in (((0.6, 2.0), (0.3, 1.0)), ((0.0, 2.0), (0.0, 1.0)), ((0.3, 0.0), (0.3, 0.0))):
        for got, want in zip(found(factors, expected), found(factors, None), strict=True):
            assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    assert all(bool(one.isnan().all()) for one in found((0.3, 2.0), (0.3, 1.0)))
    assert len(results) == 7


def test_linear_that_does_not_fit() -> None:
    hidden, head = torch.zeros(2, 5, 4), torch.zeros(9, 4)
    for bad in ({"softcap": 0.0}, {"softcap": math.inf}, {"logit_scale": -1.0}, {"logit_scale": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected a finite number above 0, got"):
            LinearLogits(hidden, head, **bad)
    with pytest.raises(ValueError, match=r"weight: expected shape \[V, 4\] to go with hidden, got \[9, 3\]"):
        LinearLogits(hidden, head[:, :3])
    with pytest.raises(ValueError, match=r"weight: expected torch.float32 on cpu as hidden"):
        LinearLogits(hidden, head.double())
    with pytest.raises(ValueError, match=r"bias: expected torch.float32 \[9\], got torch.float32 \[8\]"):
        LinearLogits(hidden, head, torch.zeros(8))
    with pytest.raises(ValueError, match=r"hidden: expected shape"):
        LinearLogits(hidden[0, 0], head)
    with pytest.raises(TypeError, match="hidden: expected a floating-point tensor, got list"):
        LinearLogits([[0.0]], head)


def test_row_blocks_cover_every_row_and_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(samples=3)
    student, teacher = (logits_module.DenseSource(logits, logits.shape[-1]) for logits in (case.student, case.teacher))
    chunks = xtoken.reference.Chunks.of(case.alignment, student.length, teacher.length)
    for rows in (1, 2, 3, 5, 8, 1000):
        monkeypatch.setattr(logits_module, "BLOCK_ELEMENTS", rows * 67)
        blocks = list(logits_module.row_blocks(student, teacher, chunks))
        assert blocks[0].student.start == 0
        assert blocks[-1].student.stop == student.samples * student.length
        assert all(a.student.stop == b.student.start for a, b in itertools.pairwise(blocks))
        assert torch.equal(torch.cat([block.chunks.used for block in blocks]), chunks.used)
        for block in blocks:
            for side, whole, one in (
                (block.student, chunks.student, block.chunks.student),
                (block.teacher, chunks.teacher, block.chunks.teacher),
            ):
                assert torch.equal(one.start + side.start, whole.start[block.span])
                assert bool((one.start + one.count <= side.stop - side.start).all())
        if rows == 1000:
            assert len(blocks) == 1


def steps_of(name: str, case: Case, head: Tensor) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Scalars of a loss from student, teacher and labels: its options, and what every loss has."""
    public, linear = OPERATIONS[name].bound(case), OPERATIONS[name].bound(case, linear=True)

    def with_options(options: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda z, y, labels: public(z, y, **options)

    kinds: dict[Any, dict[str, Any]] = {}
    for options in (*variants(name).values(), *few_variants(name).values()):
        # a number is an argument of the operator, whatever it is
        kind = {key: float if type(value) in (int, float) else value for key, value in options.items()}
        kinds.setdefault(frozenset(kind.items()), options)
    return {
        **{str(options): with_options(options) for options in kinds.values()},
        "sum": with_options({"reduction": "sum"}),
        "none": lambda z, y, labels: public(z, y, reduction="none").square().sum(),
        "labels": lambda z, y, labels: torch.stack(public(z, y, labels=labels)).sum(),
        "linear": lambda z, y, labels: linear(z, head, y),
    }


@pytest.mark.parametrize("name", registered())
@pytest.mark.slow
def test_compiled_into_one_graph(name: str) -> None:
    """All at once, each from logits of its own, so that gradients stay apart."""
    case = small_case()
    labels = make_labels(case, OPERATIONS[name].size(case))
    steps = steps_of(name, case, torch.eye(67))

    def step(students: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        found = [one(student * 1.5, teacher, labels) for one, student in zip(steps.values(), students, strict=True)]
        return torch.stack(found)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        students = case.student.repeat(len(steps), 1, 1, 1).requires_grad_()
        losses = function(students, case.teacher, labels)
        results.append((losses.detach(), *gradients(losses.sum(), students)))
    torch._dynamo.reset()
    for index, key in enumerate(steps):
        for got, want in zip(results[1], results[0], strict=True):
            assert_close(got[index], want[index], rtol=1e-5, atol=1e-8, what=key)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", registered())
@pytest.mark.slow
def test_opcheck(name: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(call, "run", lambda *arguments: calls.append(arguments) or operator.run(*arguments))
    case = small_case()
    call_loss(name, case, case.student.requires_grad_(), case.teacher, reduction=reduction)
    ((loss, given, *_),) = calls
    arguments = *given, *operator._LAYOUTS[name].flat(loss), reduction == "mean", False, False, None, None
    torch.library.opcheck(getattr(torch.ops.xtoken, name).default, arguments)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler, and there is none"
)
@pytest.mark.slow
def test_compiled_by_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # No trial compilations: half of the time. Old versions have no such setting.
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", True, raising=False)
    case = small_case()
    layer = torch.nn.Linear(67, 67)

    def step(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss, ce = projected_loss(
            layer(student).tanh() * 3, teacher, case.alignment, case.projection, top_k=30, labels=labels
        )
        return 2.0 * loss + ce

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        loss = function(case.student, case.teacher, make_labels(case))
        results.append((loss.detach(), *gradients(loss, layer.weight, layer.bias)))
    torch._dynamo.reset()
    for got, want in zip(results[1], results[0], strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_autocast_and_no_gradient(name: str, backend: str) -> None:
    case = small_case()
    layer = torch.nn.Linear(67, 67)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(case.student)
        assert logits.dtype == torch.bfloat16
        loss = call_loss(name, case, logits, case.teacher, backend=backend)
    loss.backward()
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.any())
    assert loss.dtype == torch.float32
    want = call_loss(name, case, logits.detach(), case.teacher, backend=backend)
    assert not want.requires_grad
    assert_close(loss, want, rtol=1e-6)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, _ in PAIRS if _ == "reference"])
def test_hidden_states_under_autocast(name: str, hidden_dtype: torch.dtype) -> None:
    """Float32 parameters, as mixed precision has them: the loss is that of what a linear layer computes there."""
    case, operation, generator = small_case(), OPERATIONS[name], torch.Generator().manual_seed(0)
    hidden = torch.randn(*case.student.shape[:2], 8, generator=generator).to(hidden_dtype).requires_grad_()
    head = torch.randn(operation.size(case), 8, generator=generator).requires_grad_()
    linear, dense = operation.bound(case, linear=True), operation.bound(case)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear(hidden, head, case.teacher)
        want = dense(torch.nn.functional.linear(hidden, head), case.teacher)
    assert_close(loss, want, rtol=1e-6)
    got, true = (torch.autograd.grad(one, [hidden, head]) for one in (loss, want))
    assert [one.dtype for one in got] == [hidden_dtype, torch.float32]
    for one, other in zip(got, true, strict=True):
        assert_close(one.float(), other.float(), rtol=0.02, atol=0.02 * float(other.abs().max()))


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_a_second_derivative_is_an_error(name: str, backend: str) -> None:
    case = small_case()
    student = case.student.requires_grad_()
    loss = call_loss(name, case, student, case.teacher, backend=backend)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):  # which goes only where the student is
        torch.autograd.grad(loss + grad.square().sum(), student, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_a_second_derivative_of_logits_given_up_is_an_error() -> None:
    case = small_case()
    leaf = case.student.requires_grad_()
    loss = projected_loss(leaf * 1.0, case.teacher, case.alignment, case.projection, inplace=True)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss + grad.square().sum(), leaf)


def test_a_derivative_in_forward_mode_is_an_error() -> None:
    case = small_case()

    def loss(student: Tensor) -> Tensor:
        return projected_loss(student, case.teacher, case.alignment, case.projection)

    with pytest.raises(RuntimeError, match="student: xtoken losses have no derivative in forward mode"):
        torch.func.jvp(loss, (case.student,), (torch.ones_like(case.student),))


@needs_what_a_transform_says
@pytest.mark.parametrize("inplace", [False, True])
def test_transforms_of_torch_func_are_an_error(inplace: bool) -> None:
    """Which says so, also within another one; not where nothing is to be differentiated."""
    case = small_case()

    def loss(student: Tensor) -> Tensor:
        return projected_loss(student * 1.0, case.teacher, case.alignment, case.projection, inplace=inplace)

    several = case.student[None]
    for derivative, student in (
        (torch.func.grad(loss), case.student),
        (torch.func.jacrev(loss), case.student),
        (torch.func.vmap(torch.func.grad(loss)), several),
        (torch.func.grad(lambda students: torch.func.vmap(loss)(students).sum()), several),
    ):
        with pytest.raises(RuntimeError, match=r"student: xtoken losses have no derivative by torch\.func \(grad, vjp"):
            derivative(student)
    detached, want = torch.func.grad(lambda student: student.sum() + loss(student.detach())), torch.ones(())
    assert torch.equal(detached(case.student), want.to(case.student).expand_as(case.student))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_a_loss_that_is_differentiated_outside_of_it() -> None:
    case = small_case()

    def loss(student: Tensor) -> Tensor:
        return projected_loss(student, case.teacher, case.alignment, case.projection)

    students = torch.stack([case.student, 2 * case.student]).requires_grad_()
    together, each = torch.func.vmap(loss)(students), torch.stack([loss(one) for one in students])
    assert torch.equal(together, each)
    assert torch.equal(*(gradients(losses.sum(), students)[0] for losses in (together, each)))


def test_a_graph_of_autograd_has_a_node_of_its_own() -> None:
    """That of the operator looks up the defaults of all of its arguments, which takes as long as the loss."""
    case = small_case()
    loss = projected_loss(case.student.requires_grad_(), case.teacher, case.alignment, case.projection)
    assert loss.grad_fn is not None
    assert loss.grad_fn.name() == f"xtoken_{DEFAULT[Needs.PROJECTION]}Backward"


class Operators(TorchDispatchMode):
    """The operators that are seen from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(function)
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_the_operator_and_not_what_it_does() -> None:
    case = small_case()
    student = case.student.requires_grad_()
    with Operators() as seen:
        projected_loss(student, case.teacher, case.alignment, case.projection)
    own = [one for one in seen.found if one.namespace == "xtoken"]
    assert own == [getattr(torch.ops.xtoken, DEFAULT[Needs.PROJECTION]).default]
    assert torch.ops.aten.sum.default not in seen.found  # of the losses


class Allocations(TorchDispatchMode):
    """Sizes of the tensors that operators give back, seen from outside of the losses, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor) and result.numel():
                self.sizes[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
        return results


@pytest.mark.parametrize(("name", "backend"), [pair for pair in PAIRS if pair[1] == "cpu"])
def test_one_gradient_and_nothing_else_of_its_size(name: str, backend: str) -> None:
    case = small_case()
    student = case.student.requires_grad_()
    given = {student.untyped_storage().data_ptr(), case.teacher.untyped_storage().data_ptr()}
    with Allocations() as seen:
        (2.0 * call_loss(name, case, student, case.teacher, backend=backend)).backward()
    assert student.grad is not None
    large = {address for address, size in seen.sizes.items() if size >= student.nbytes} - given
    assert large == {student.grad.untyped_storage().data_ptr()}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_in_inference_mode(reduction: str) -> None:
    case = small_case()
    with torch.inference_mode():
        teacher = case.teacher * 1.0
    grads: list[Tensor] = []
    for logits in (case.teacher, teacher):
        student = case.student.clone().requires_grad_()
        loss = projected_loss(student, logits, case.alignment, case.projection, reduction=reduction).sum()
        grads.append(*gradients(loss, student))
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("name", OPERATIONS)
def test_inside_inference_mode(name: str) -> None:
    case = small_case()
    want = OPERATIONS[name].public(case, case.student, case.teacher)
    with torch.inference_mode():
        logits = case.student * 1.0, case.teacher * 1.0
        assert torch.equal(OPERATIONS[name].public(case, *logits), want)
        criterion = xtoken.XTokenLoss([OPERATIONS[name].teacher(case)], "fixed")
        criterion(
            logits[0], make_labels(case, OPERATIONS[name].size(case)), logits[1], OPERATIONS[name].arguments(case)[0]
        )
    student = case.student.requires_grad_()
    OPERATIONS[name].public(case, student, case.teacher).backward()  # with what was made in there
    assert student.grad is not None


def test_a_matrix_changed_in_inference_mode_is_seen() -> None:
    case = small_case()
    with torch.inference_mode():
        W: Any = types.SimpleNamespace(
            row_ptr=case.projection.row_ptr.clone(), col=case.projection.col.clone(),
            weight=case.projection.weight.clone(), shape=case.projection.shape,
        )  # fmt: skip
    function = default_loss(Needs.PROJECTION)
    before = function(case.student, case.teacher, case.alignment, W)
    with torch.inference_mode():
        W.weight.copy_(W.weight.flip(0))
    assert not torch.equal(function(case.student, case.teacher, case.alignment, W), before)
