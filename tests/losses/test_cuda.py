"""The CUDA kernels: on the emulator in several orders of its threads, and on a GPU where there is one."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch
from comparer import assert_close
from harness import CASES, DTYPES, OPERATIONS, Case, check, losses_and_grad, make_case, piece_index
from torch import Tensor

from xtoken import gold_loss, pkl_loss
from xtoken.losses.cpu import Array
from xtoken.losses.cuda import Kernels
from xtoken.losses.pkl import cuda as pkl_cuda
from xtoken.losses.pkl.cuda import plan_for
from xtoken.losses.prefix_kl.cuda import prefix_plan_for
from xtoken.losses.ranked import cuda as ranked_cuda
from xtoken.losses.sliced import WARP
from xtoken.projection import ProjectionMatrix

pytestmark = pytest.mark.slow

needs_emulator = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
ORDERS = (("reverse", 0), ("one_ahead", 0), ("random", 1))
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "first": ("pkl", {"top_k": 31}),
    "mean": ("pkl", {"merge": "mean", "top_k": None}),
    "chain": ("pkl", {"merge": "chain", "reverse": True, "temperature": 2.5}),
    "hkl": ("hkl", {"uncommon_top_k": 20}),
    "gold": ("gold", {"reverse": True}),
    "kd": ("kd", {"top_k": 13}),
    "kd, reverse": ("kd", {"reverse": True}),
    "prefix": ("prefix", {"temperature": 1.5}),
    "prefix, reverse": ("prefix", {"reverse": True}),
}


@pytest.fixture
def order() -> Iterator[Any]:
    """Sets the order of the emulated threads; the usual one comes back at the end."""
    yield emulated.set_order
    emulated.set_order("forward")


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


@pytest.fixture(params=["above", "below", "mixed"])
def errors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Approximate functions are off by as much as CUDA says that they may be."""
    emulated.set_errors(request.param)
    yield
    emulated.set_errors("none")


@needs_emulator
@pytest.mark.usefixtures("errors")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_errors_of_approximate_functions(name: str, dtype: torch.dtype) -> None:
    operation, options = OPTIONS[name]
    for case in ("teacher_below", "peaky", "infinite", "one_chunk"):
        check("emulated", operation, CASES[case](), dtype, **options)


def long_case() -> Case:
    """More entries in a column than a warp has lanes, and rows longer than a warp."""
    case = make_case(151, 41, samples=1, shapes=((1, 1), (1, 1), (2, 2)))
    dense = torch.rand(40, 41, generator=torch.Generator().manual_seed(0))
    index = torch.arange(41).repeat(151, 1)
    weight = torch.zeros(151, 41)
    weight[:40] = dense / dense.sum(1, keepdim=True)
    weight[40:, 3] = 1.0
    return Case(case.student, case.teacher, case.alignment, ProjectionMatrix.from_topk(index, weight, 41))


@needs_emulator
@pytest.mark.parametrize("top_k", [None, 17])
def test_long_rows_and_columns(top_k: int | None) -> None:
    case = long_case()
    plan = plan_for(case.projection, torch.arange(41), False)
    assert plan.structure.column_lists.shared == 41
    assert plan.structure.row_lists.shared == 40
    for merge in ("first", "mean"):
        check("emulated", "pkl", case, torch.float32, merge=merge, top_k=top_k)


def test_the_layout_of_lists() -> None:
    """Every entry is in its list once, and what fills them up has no weight."""
    case = long_case()
    structure = plan_for(case.projection, torch.arange(41), False).structure
    weight = torch.cat([case.projection.weight, torch.zeros(1)])
    for lists, side, size in ((structure.column_lists, 0, 151), (structure.row_lists, 1, 41)):
        dense = torch.zeros(len(lists.owner), size)
        for n in range(len(lists.owner)):
            piece = n if n < lists.shared else lists.shared + (n - lists.shared) // WARP
            block = slice(WARP * int(lists.start[piece]), WARP * int(lists.start[piece + 1]))
            lane = slice(None) if n < lists.shared else slice((n - lists.shared) % WARP, None, WARP)
            index, entry = lists.index[block][lane].long(), lists.entry[block][lane]
            dense[n].index_add_(0, index, weight[entry])
        whole = _dense(case.projection)
        want = whole.T if side == 0 else whole
        assert torch.equal(dense, want[lists.owner.long()])


def _dense(projection: ProjectionMatrix) -> Tensor:
    dense = torch.zeros(projection.shape)
    row = torch.repeat_interleave(torch.arange(projection.shape[0]), projection.row_ptr.diff())
    dense[row, projection.col.long()] = projection.weight
    return dense


@pytest.mark.parametrize("sizes", [(67, 59), (1203, 1101)])
def test_the_plan_of_a_piece_index(sizes: tuple[int, int]) -> None:
    """Every token is in a pair or in the list of its event, once; the plan is kept until the index changes."""
    pieces = piece_index(*sizes)
    data = pieces.data.clone()
    plan = prefix_plan_for(data, data.device)
    paired = (plan.slot >= 0).nonzero()[:, 0]
    partner = plan.slot[paired].long()
    assert torch.equal(pieces.student.event[paired], pieces.teacher.event[partner])
    events = []
    sides = zip(
        (plan.student_lists, plan.teacher_lists), (pieces.student, pieces.teacher), (paired, partner), strict=True
    )
    for lists, side, pairs in sides:
        found = []
        of_number = torch.full((plan.events + 1,), -1)
        for n, number in enumerate(lists.event.tolist()):
            piece = n if n < lists.shared else lists.shared + (n - lists.shared) // WARP
            block = lists.tokens[WARP * int(lists.start[piece]) : WARP * int(lists.start[piece + 1])]
            tokens = block if n < lists.shared else block[(n - lists.shared) % WARP :: WARP]
            tokens = tokens[tokens >= 0].long()
            found.append(tokens)
            if number < plan.events:
                (of_number[number],) = side.event[tokens].unique()
            if side is pieces.student:
                assert (plan.slot[tokens] == -1 - number).all()
        assert torch.equal(torch.cat([pairs, *found]).sort().values, torch.arange(len(side.event)))
        events.append(of_number[:-1])
    assert torch.equal(*events)
    assert prefix_plan_for(data, data.device) is plan
    data.add_(0)
    assert prefix_plan_for(data, data.device) is not plan


@needs_emulator
def test_weights_that_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts of a trained W are built once, from its structure, and follow its weights."""
    case = make_case(samples=1)
    built = []
    structure_of = pkl_cuda.plan_for.__globals__["structure_of"]
    monkeypatch.setitem(pkl_cuda.plan_for.__globals__, "structure_of", lambda *a: built.append(a) or structure_of(*a))
    student = case.student.float()
    for factor in (1.0, 0.5):
        weight = (case.projection.weight * factor).requires_grad_()
        projection: Any = types.SimpleNamespace(
            row_ptr=case.projection.row_ptr, col=case.projection.col, shape=case.projection.shape, weight=weight
        )
        grads = [
            torch.autograd.grad(
                pkl_loss(student, case.teacher.float(), case.alignment, projection, merge="mean", backend=backend),
                weight,
            )[0]
            for backend in ("emulated", "reference")
        ]
        assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6 * float(grads[1].abs().max()))
    assert len(built) == 1


@needs_emulator
def test_groups_of_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    results = []
    for elements in (ranked_cuda.SORTED_ELEMENTS, 1):
        monkeypatch.setattr(ranked_cuda, "SORTED_ELEMENTS", elements)
        student = case.student.float().requires_grad_()
        loss = gold_loss(student, case.teacher.float(), case.alignment, case.projection, backend="emulated")
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_emulator
def test_launches_that_no_kernel_is_compiled_for() -> None:
    module = emulated.load()[0]
    start, covered = Array(0, "int64", (0,), (1,)), Array(0, "uint8", (0,), (1,))
    fields = {"rows": {"start": start, "count": start, "next": None}, "chunks": 1, "covered": covered}
    for blocks, threads in ((0, 32), (1, 33), (1, 2 * module.max_threads)):
        with pytest.raises(ValueError, match="launch: expected at least one block of a multiple of 32 threads"):
            module.launch("mark_rows", fields, blocks, threads, 0)


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
        loss = pkl_loss(student, teacher, case.alignment, case.projection, merge="mean", top_k=301)
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    student, teacher = on_gpu(case, torch.bfloat16)
    explicit = pkl_loss(student, teacher, case.alignment, case.projection, merge="mean", top_k=301, backend="cuda")
    assert torch.equal(explicit, results[0][0])
