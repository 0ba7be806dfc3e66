"""Plans of W for the CPU kernels: kept from call to call, reweighted for a learnable W."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparer import assert_as_accurate
from harness import BACKENDS, Case, check, make_case
from torch import Tensor

from xtoken import ProjectionMatrix, _core, pkl_loss
from xtoken.losses.cpu import array

cpu = pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("cpu")])


class Builds:
    """Counts what is built anew; a plan that is like another shares its layout."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.matrices = self.plans = 0
        build = _core.build

        def counted(name: str, fields: Any) -> Any:
            self.matrices += name == "pkl_matrix"
            self.plans += name == "pkl_plan" and fields["like"] is None
            return build(name, fields)

        monkeypatch.setattr(_core, "build", counted)


def weighted(case: Case, weight: Tensor) -> SimpleNamespace:
    W = case.projection
    return SimpleNamespace(row_ptr=W.row_ptr, col=W.col, shape=W.shape, weight=weight)


def compare(case: Case, weight: Tensor, backend: str, top_k: int | None, merge: str = "first") -> None:
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        student, leaf = (x.float().to(dtype).requires_grad_() for x in (case.student, weight.detach()))
        options: dict[str, Any] = {"top_k": top_k, "merge": merge, "backend": name}
        teacher = case.teacher.float().to(dtype)
        loss = pkl_loss(student, teacher, case.alignment, weighted(case, leaf), **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, [student, leaf])))
    for got, plain, truth in zip(*results, strict=True):
        assert_as_accurate(got, plain, truth, 4 * torch.finfo(torch.float32).eps * float(truth.abs().max()))


@cpu
@pytest.mark.parametrize("top_k", [31, None])
def test_other_weights_use_the_same_layout(top_k: int | None, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    logits = torch.randn(len(case.projection.weight), generator=torch.Generator().manual_seed(0))
    row = torch.repeat_interleave(case.projection.row_ptr.diff())
    builds = Builds(monkeypatch)
    for step in range(4):
        shares = (logits * step).exp()
        weight = shares / torch.zeros(case.projection.shape[0]).index_add(0, row, shares)[row]
        compare(case, weight, backend, top_k)
    assert (builds.matrices, builds.plans) == (1, 1)


@cpu
@pytest.mark.parametrize("merge", ["first", "mean"])
@pytest.mark.parametrize("top_k", [31, None])
def test_weights_that_no_longer_are_one(top_k: int | None, merge: str, backend: str) -> None:
    """The layout reads past an entry that weighs 1 and is alone; it must not when the weight has changed."""
    case = make_case()
    ones = torch.ones_like(case.projection.weight)
    for weight in (case.projection.weight, ones, 0.75 * ones, ones, case.projection.weight * 0.5):
        compare(case, weight, backend, top_k, merge)


def paired_projection() -> ProjectionMatrix:
    """Rows whose columns follow each other, with and without gaps, and out of order; rows and columns that share."""
    columns: list[list[int]] = [[]]
    columns += [[s - 1] for s in range(1, 24)]  # the first row would be at column -1
    columns += [[s + 5] if s % 7 else [40 + s, 200] for s in range(24, 96)]  # runs with holes
    columns += [[s + 30] for s in range(96, 128)]  # whole runs
    columns += [[190 - s % 2] if s % 5 == 0 else [350 - s] for s in range(128, 170)]
    columns += [[s + 50] for s in range(170, 179)]  # up to the last column
    weights = [1 / len(row) for row in columns for _ in row]
    pointers = [0, *itertools.accumulate(len(row) for row in columns)]
    return ProjectionMatrix(pointers, [t for row in columns for t in row], weights, 229)


@cpu
@pytest.mark.parametrize("top_k", [180, None])
@pytest.mark.parametrize(
    "options", [{}, {"merge": "mean"}, {"merge": "mean", "reverse": True}, {"merge": "chain"}], ids=str
)
def test_pairs_in_every_order(options: dict[str, Any], top_k: int | None, backend: str) -> None:
    W = paired_projection()
    case = replace(make_case(*W.shape), projection=W)
    check(backend, "pkl", case, torch.float32, top_k=top_k, **options)
    if backend != "emulated":
        compare(case, W.weight, backend, top_k, options.get("merge", "first"))


def test_plans_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    builds = Builds(monkeypatch)
    logits = case.student.float(), case.teacher.float()

    def step(**options: Any) -> Tensor:
        return pkl_loss(*logits, case.alignment, case.projection, backend="cpu", **options)

    first = step(top_k=31), step(top_k=None)
    again = step(top_k=31), step(top_k=None)
    assert first == again
    assert (builds.matrices, builds.plans) == (1, 2)
    step(top_k=30)
    assert builds.plans == 3
    case.projection.weight.mul_(0.5)  # in place: the same tensor, another version
    changed = step(top_k=None)
    assert changed == pkl_loss(*logits, case.alignment, case.projection, top_k=None, backend="cpu")
    assert builds.matrices == 1


def test_sizes_that_do_not_fit() -> None:
    def matrix_of(col: list[int]) -> Any:
        row_ptr = torch.tensor([0, 1, 2])
        fields = {"row_ptr": array(row_ptr), "col": array(torch.tensor(col, dtype=torch.int32)), "teacher_size": 2}
        return _core.build("pkl_matrix", fields)

    def plan_of(weight: Tensor, like: Any) -> Any:
        fields = {"matrix": matrix, "weight": array(weight), "columns": None, "like": like}
        return _core.build("pkl_plan", fields)

    matrix, ones = matrix_of([0, 1]), torch.ones(2)
    plan = plan_of(ones, None)
    assert repr(plan_of(ones, plan)) == repr(plan) == "<pkl_plan>"
    with pytest.raises(ValueError, match=r"weight: expected 2 weights \(the matrix's entries\), got 1"):
        plan_of(ones[:1], None)
    with pytest.raises(ValueError, match=r"weight: expected 2 weights \(the matrix's entries\), got 0"):
        plan_of(ones[:0], plan)
    with pytest.raises(ValueError, match=r"col: expected ids below 2, got 2"):
        matrix_of([0, 2])
    with pytest.raises(ValueError, match=r"row_ptr: expected 0 \.\.\. 1 \(the number of entries of col\)"):
        matrix_of([0])


def test_what_was_built_for_something_else() -> None:
    """A plan takes a matrix, and no pairs."""
    ids = array(torch.tensor([0, 1]))
    pairs = _core.build("pairs_plan", {"student_ids": ids, "teacher_ids": ids, "students": 5, "teachers": 5})
    for wrong, got in ((None, "None"), (pairs, "a pairs_plan")):
        with pytest.raises(TypeError, match=rf"pkl_plan\.matrix: expected a pkl_matrix \(W\), got {got}"):
            _core.build("pkl_plan", {"matrix": wrong, "weight": None, "columns": None, "like": None})
