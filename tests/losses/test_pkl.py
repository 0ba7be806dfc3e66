"""P-KL."""

import doctest
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparer import assert_as_accurate, assert_close, assert_within
from harness import CASES, Case, backends_of, check, check_labels, check_slopes, make_case
from steps import Step, loss_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xtoken.losses.pkl
from xtoken import Teacher, XTokenLoss, pkl_loss, reference
from xtoken.alignment import Alignment
from xtoken.losses import numerics
from xtoken.losses.columns import reachable, select_columns
from xtoken.losses.logits import DenseSource
from xtoken.projection import ProjectionMatrix

MERGES = ("first", "mean", "chain")
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"top_k": 31},
    "subset": {"top_k": 17},
    "reverse": {"reverse": True, "top_k": 17},
    "temperature": {"temperature": 2.5},
    "cold": {"temperature": 0.1, "reverse": True},
    "all": {"top_k": None},
    "reachable": {"support": "reachable"},
    "jensen-shannon": {"beta": 0.3, "top_k": 31},
    "skewed": {"skew": 0.1, "temperature": 2.5},
    "skewed reverse": {"skew": 0.25, "reverse": True, "top_k": 17},
}
FEW_VARIANTS: dict[str, dict[str, Any]] = {
    "first": {"top_k": 31},
    "mean": {"merge": "mean", "top_k": None, "temperature": 1.5},
    "chain": {"merge": "chain", "reverse": True, "top_k": 31},
    "chain of all": {"merge": "chain", "top_k": None, "temperature": 2.5},
}
GOLDEN = {"merge": "mean"}  # NeMo-RL has no other
backends = pytest.mark.parametrize("backend", backends_of("pkl"))
merges = pytest.mark.parametrize("merge", MERGES)


def trainable(projection: ProjectionMatrix) -> Any:
    """The same matrix with float64 weights that require a gradient."""
    return SimpleNamespace(
        row_ptr=projection.row_ptr,
        col=projection.col,
        shape=projection.shape,
        weight=projection.weight.double().requires_grad_(),
    )


def truth(case: Case, z: Tensor, y: Tensor, chunks: Any, *, top_k: int | None = 8192, **options: Any) -> Tensor:
    columns = reference.column_set(y, top_k)
    if options.pop("support", "all") == "reachable":
        columns = columns[torch.isin(columns, case.projection.col.long())]
    return reference.pkl(z, y, chunks, reference.restrict(case.projection, columns), columns, **options)


@backends
@pytest.mark.parametrize("merge", ["mean", "chain"])
@pytest.mark.parametrize("name", CASES)
def test_hard_inputs_of_other_merges(name: str, merge: str, backend: str) -> None:
    check(backend, "pkl", CASES[name](), torch.float32, merge=merge, top_k=31)


@backends
@pytest.mark.parametrize("merge", ["mean", "chain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vectors_of_16_bits_of_other_merges(dtype: torch.dtype, merge: str, backend: str) -> None:
    check(backend, "pkl", CASES["vector_remainder"](), dtype, merge=merge, top_k=31)


@backends
@pytest.mark.parametrize("merge", ["mean", "chain"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_options(variant: str, merge: str, backend: str) -> None:
    check(backend, "pkl", make_case(), torch.float32, strided=True, merge=merge, **VARIANTS[variant])


@backends
@merges
@pytest.mark.parametrize("reverse", [False, True])
def test_infinite_logits_both_ways(merge: str, reverse: bool, backend: str) -> None:
    check(backend, "pkl", CASES["infinite"](), torch.float32, merge=merge, reverse=reverse, top_k=None)


@backends
@merges
@pytest.mark.parametrize(("top_k", "temperature"), [(None, 1.0), (31, 2.0)])
@pytest.mark.parametrize("name", ["none_finite", "near_lowest"])
def test_labels_where_the_lowest_logits_have_mass(
    name: str, top_k: int | None, temperature: float, merge: str, backend: str
) -> None:
    case = CASES[name]()
    labels = torch.randint(67, case.student.shape[:2], generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"merge": merge, "top_k": top_k, "temperature": temperature, "labels": labels}
    check_labels(
        lambda student, backend: pkl_loss(
            student, case.teacher.to(student.dtype), case.alignment, case.projection, backend=backend, **options
        ),
        case.student.float(),
        backend,
        f"{name}, {merge}",
    )


@merges
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(merge: str, reverse: bool) -> None:
    case = make_case(13, 11, samples=1, shapes=((1, 1), (2, 3), (1, 1), (3, 1)))
    projection = trainable(case.projection)

    def losses(student: Tensor, weight: Tensor) -> Tensor:
        projection.weight = weight
        options: dict[str, Any] = {"merge": merge, "reverse": reverse, "temperature": 1.5, "top_k": 8}
        return pkl_loss(
            student,
            case.teacher,
            case.alignment,
            projection,
            reduction="none",
            backend="reference",
            **options,
        )

    student, weight = case.student.requires_grad_(), projection.weight
    for inputs in ((student, weight), (student, weight.detach()), (student.detach(), weight)):
        assert torch.autograd.gradcheck(losses, inputs, fast_mode=True)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    projection = trainable(case.projection)
    student = case.student.requires_grad_()
    results = []
    for size in (2**22, 1):
        monkeypatch.setitem(numerics.TEMPORARY_ELEMENTS, "cpu", size)
        losses = pkl_loss(
            student,
            case.teacher,
            case.alignment,
            projection,
            merge="chain",
            reduction="none",
            backend="reference",
        )
        upstream = torch.arange(len(losses), dtype=losses.dtype)
        results.append([losses, *torch.autograd.grad(losses, [student, projection.weight], upstream)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction: str, backend: str) -> None:
    case = make_case()
    student = case.student.float().requires_grad_()

    def grad_of(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, student)[0]

    options: dict[str, Any] = {"backend": backend, "reduction": reduction}
    loss = pkl_loss(student, case.teacher.float(), case.alignment, case.projection, **options)
    options["reduction"] = "none"
    losses = pkl_loss(student, case.teacher.float(), case.alignment, case.projection, **options)
    used = case.alignment.predicted
    assert losses.shape == (case.alignment.num_chunks,)
    assert bool((losses[~used] == 0).all())
    assert bool((losses[used] != 0).all())
    want = {"mean": losses.sum() / used.sum(), "sum": losses.sum(), "none": losses}[reduction]
    assert_close(loss, want, rtol=1e-6)
    expected = grad_of(-3 * want.sum())
    assert_close(grad_of(-3 * loss.sum()), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_merges_agree_on_chunks_of_one_token() -> None:
    case = make_case(shapes=((1, 1),) * 5)
    losses = [
        pkl_loss(case.student, case.teacher, case.alignment, case.projection, merge=merge, reduction="none")
        for merge in MERGES
    ]
    assert_close(losses[1], losses[0], rtol=1e-12)
    assert_close(losses[2], losses[0], rtol=1e-12)


def test_columns_and_rows_by_hand() -> None:
    """One chunk of one token, three columns, written out with plain numbers."""
    projection = ProjectionMatrix.from_topk(
        torch.tensor([[0, 2], [1, -1], [3, -1]]), torch.tensor([[0.9, 0.1], [1.0, 0.0], [1.0, 0.0]]), 4
    )
    student = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log().expand(3, 3)
    teacher = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log().expand(3, 4)
    alignment = Alignment([[2, 3, 1, 2]])
    loss = pkl_loss(student, teacher, alignment, projection, top_k=3)
    m = torch.tensor([0.18, 0.3, 0.02], dtype=torch.float64) / 0.5
    q = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64) / 9
    assert_close(loss, (q * (q / m).log()).sum(), rtol=1e-7)
    reverse = pkl_loss(student, teacher, alignment, projection, top_k=3, reverse=True)
    assert_close(reverse, (m * (m / q).log()).sum(), rtol=1e-7)


def test_which_rows() -> None:
    """Only the predictor rows ``a - 1 ... b - 2`` of used chunks have a gradient."""
    case = make_case(samples=1, shapes=((2, 1), (3, 2), (1, 1)))
    rows = {"first": [1, 4], "mean": [1, 2, 3, 4], "chain": [1, 2, 3, 4]}
    for merge, want in rows.items():
        student = case.student.clone().requires_grad_()
        pkl_loss(student, case.teacher, case.alignment, case.projection, merge=merge).backward()
        assert student.grad is not None
        assert student.grad[0].abs().amax(1).nonzero()[:, 0].tolist() == want


def test_column_set_counts_every_row_and_prefers_low_ids() -> None:
    logits = torch.zeros(2, 3, 6)
    logits[1, 2, 4] = 5.0
    logits[0, 0, 5] = 1.0
    assert reference.column_set(logits, 4).tolist() == [0, 1, 4, 5]
    assert reference.column_set(logits, 6).tolist() == reference.column_set(logits, None).tolist()
    assert reference.column_set(torch.zeros(0, 6), 2).tolist() == [0, 1]


def test_explicit_columns() -> None:
    case = make_case()
    arguments = case.student, case.teacher, case.alignment, case.projection
    chosen = select_columns(DenseSource(case.teacher, case.projection.shape[1]), case.projection.shape[1], top_k=9)
    assert_within(pkl_loss(*arguments, columns=chosen.flip(0)), pkl_loss(*arguments, top_k=9), 0.0)
    projection = ProjectionMatrix.from_topk([[0], [2]], [[1.0], [1.0]], 4)
    assert reachable(torch.tensor([0, 1, 2]), projection)[0].tolist() == [0, 2]
    assert reachable(torch.arange(4), projection)[0].tolist() == [0, 2]


def test_one_sample_without_a_batch() -> None:
    case = make_case(samples=1)
    alignment = Alignment(case.alignment.spans)
    student = case.student[0].clone().requires_grad_()
    loss = pkl_loss(student, case.teacher[0], alignment, case.projection)
    loss.backward()
    batched = case.student.clone().requires_grad_()
    want = pkl_loss(batched, case.teacher, case.alignment, case.projection)
    want.backward()
    assert batched.grad is not None
    assert_within(loss, want, 0.0)
    assert_within(student.grad, batched.grad[0], 0.0)


def test_no_gradient_work_when_none_is_needed() -> None:
    case = make_case()
    arguments = case.alignment, case.projection
    teacher = case.teacher.clone().requires_grad_()
    plain = pkl_loss(case.student, teacher, *arguments)
    assert not plain.requires_grad
    student = case.student.clone().requires_grad_()
    with torch.no_grad():
        assert not pkl_loss(student, teacher, *arguments).requires_grad
    pkl_loss(student, teacher, *arguments).backward()
    assert teacher.grad is None


def test_mixed_types() -> None:
    case = make_case()
    student = case.student.bfloat16().requires_grad_()
    loss = pkl_loss(student, case.teacher.half(), case.alignment, case.projection)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16
    want = pkl_loss(student.detach().double(), case.teacher.half().double(), case.alignment, case.projection)
    assert_close(loss, want, rtol=1e-5)


class Sizes(TorchDispatchMode):
    """Records the largest tensor of each type that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.largest[tensor.dtype] = max(self.largest.get(tensor.dtype, 0), tensor.numel())
        return result


@backends
@merges
def test_no_single_precision_copy_of_the_batch(merge: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(numerics.TEMPORARY_ELEMENTS, "cpu", 4000)
    case = make_case(300, 200, samples=40)
    student = case.student.bfloat16().requires_grad_()
    teacher = case.teacher.bfloat16()
    with Sizes() as sizes:
        loss = pkl_loss(student, teacher, case.alignment, case.projection, merge=merge, backend=backend)
        loss.backward()
    assert sizes.largest[torch.float32] <= 10_000 < student.numel()


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"merge": "last"}, ValueError, "merge: expected one of 'first', 'mean', 'chain', got 'last'"),
        ({"support": "some"}, ValueError, "support: expected one of 'all', 'reachable', got 'some'"),
        ({"top_k": 0}, ValueError, "top_k: expected an integer of at least 1 or None, got 0"),
        ({"top_k": 2.0}, ValueError, "top_k: expected an integer"),
        ({"columns": [0, 0]}, ValueError, "columns: expected distinct ids"),
        ({"columns": [-1, 0]}, ValueError, r"columns: expected ids in 0 \.\.\. 58, got -1"),
        ({"columns": [0, 59]}, ValueError, r"columns: expected ids in 0 \.\.\. 58, got 59"),
        ({"columns": []}, ValueError, r"columns: expected teacher ids \[C\]"),
        ({"columns": [0.5]}, ValueError, r"columns: expected teacher ids \[C\], got torch.float32"),
        ({"backend": "fast"}, ValueError, "backend: expected one of 'auto'"),
        ({"projection": torch.eye(3)}, TypeError, "projection: expected an xtoken.ProjectionMatrix"),
    ],
)
def test_bad_options(options: dict[str, Any], exception: type[Exception], message: str) -> None:
    case = make_case()
    call = {"projection": case.projection, **options}
    with pytest.raises(exception, match=message):
        pkl_loss(case.student, case.teacher, case.alignment, **call)


def test_chain_needs_ids_of_the_vocabulary() -> None:
    case = make_case()
    arguments = case.student, case.teacher
    without = Alignment(case.alignment.spans, case.alignment.offsets)
    with pytest.raises(ValueError, match="alignment: the loss or its merge needs token ids, but student_ids is None"):
        pkl_loss(*arguments, without, case.projection, merge="chain")
    assert case.alignment.student_ids is not None
    ids = case.alignment.student_ids.clone()
    ids[0, 5] = 67
    outside = Alignment(case.alignment.spans, case.alignment.offsets, ids, case.alignment.teacher_ids)
    with pytest.raises(ValueError, match=r"expected student_ids in 0 \.\.\. 66 within chunks, got 67"):
        pkl_loss(*arguments, outside, case.projection, merge="chain")


def test_nothing_reachable() -> None:
    case = make_case()
    reached = case.projection.col.unique()
    columns = torch.tensor(sorted({*range(case.projection.shape[1])} - {*reached.tolist()}))
    assert len(columns) > 0
    with pytest.raises(ValueError, match="support: expected a column that the projection reaches, got none"):
        pkl_loss(case.student, case.teacher, case.alignment, case.projection, support="reachable", columns=columns)


def test_examples() -> None:
    result = doctest.testmod(xtoken.losses.pkl)
    assert result.attempted > 0
    assert result.failed == 0


@backends
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradient_of_the_weights(reverse: bool, merge: str, backend: str) -> None:
    case = make_case()
    grads = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        projection = SimpleNamespace(
            row_ptr=case.projection.row_ptr,
            col=case.projection.col,
            shape=case.projection.shape,
            weight=case.projection.weight.to(dtype).requires_grad_(),
        )
        logits = case.student.float().to(dtype), case.teacher.float().to(dtype)
        options: dict[str, Any] = {"merge": merge, "reverse": reverse, "top_k": 31, "backend": name}
        loss = pkl_loss(*logits, case.alignment, projection, **options)
        grads.append(torch.autograd.grad(loss, projection.weight)[0])
    floor = 4 * torch.finfo(torch.float32).eps * float(grads[2].abs().max())
    assert_as_accurate(grads[0], grads[1], grads[2], floor, "gradient of the weights")


def test_types_that_the_kernels_do_not_take() -> None:
    case = make_case()
    with pytest.raises(RuntimeError, match=r"'cpu' is not available: student_logits: expected one of .*float64"):
        pkl_loss(case.student, case.teacher, case.alignment, case.projection, backend="cpu")


@pytest.mark.parametrize("backend", [name for name in backends_of("pkl") if name.startswith("cpu")])
@pytest.mark.parametrize("top_k", [31, None])
@pytest.mark.parametrize("merge", ["first", "mean", "chain"])
def test_slopes_of_a_learnable_matrix(merge: str, top_k: int | None, backend: str) -> None:
    case = make_case(scale=1.5)
    student, teacher = case.student.float(), case.teacher.float()
    W = case.projection

    def value(weight: Tensor) -> Tensor:
        projection: Any = SimpleNamespace(row_ptr=W.row_ptr, col=W.col, shape=W.shape, weight=weight)
        options: dict[str, Any] = {"merge": merge, "top_k": top_k, "backend": backend, "reduction": "sum"}
        return pkl_loss(student, teacher, case.alignment, projection, **options).double()

    weight = (0.5 + 0.5 * W.weight).requires_grad_()
    (grad,) = torch.autograd.grad(value(weight), weight)
    check_slopes(lambda x: value(x).detach(), weight.detach(), grad, step=0.02)


def test_agreement_needs_ids() -> None:
    case = make_case()
    alignment = Alignment(case.alignment.spans, case.alignment.offsets)
    with pytest.raises(ValueError, match="alignment: the loss or its merge needs token ids, but student_ids is None"):
        pkl_loss(case.student, case.teacher, alignment, case.projection, agree=True)


def on_device(**options: Any) -> Callable[[Step], Any]:
    return lambda s: loss_of(s, "pkl", **options)


def learned(**options: Any) -> Callable[[Step], Tensor]:
    def call(s: Step) -> Tensor:
        W = s.case.projection
        with_weight: Any = SimpleNamespace(row_ptr=W.row_ptr, col=W.col, weight=s.constants.weight, shape=W.shape)
        return pkl_loss(s.student, s.teacher, s.alignment, with_weight, top_k=31, backend=s.backend, **options)

    return call


def with_diagnoses(s: Step) -> Tensor:
    teacher = Teacher(s.case.projection, "pkl", top_k=31, support="reachable")
    total, parts = XTokenLoss([teacher], backend=s.backend)(s.student, s.labels, s.teacher, s.alignment)
    return total + parts["scale"] + sum(parts[name].sum() for name in ("agreement", "mass", "outside"))


DEVICE_STEPS: dict[str, Callable[[Step], Any]] = {
    "all columns": on_device(top_k=None, merge="mean", temperature=2.0),
    "chain": on_device(merge="chain", reverse=True),
    "reachable": on_device(top_k=None, support="reachable"),
    "reachable of the largest": on_device(top_k=31, support="reachable"),
    "reachable, mean": on_device(top_k=31, support="reachable", merge="mean", reverse=True),
    "reachable of columns": lambda s: loss_of(
        s, "pkl", columns=s.constants.columns, support="reachable", merge="chain"
    ),
    "agree": on_device(agree=True, beta=0.5),
    "columns": lambda s: loss_of(s, "pkl", columns=s.constants.columns),
    "columns of the host": lambda s: loss_of(s, "pkl", columns=s.constants.host_columns),
    "learned": learned(),
    "learned, reachable": learned(support="reachable", merge="mean"),
    "diagnoses": with_diagnoses,
}
