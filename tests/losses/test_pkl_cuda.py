"""The layouts of W for the CUDA kernels, and its columns on a device."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import emulated
import pytest
import torch
from comparer import assert_close
from fake_device import DEVICE, fake_device
from harness import Case, check, make_case
from steps import Step, constants, loss_of, make_step, results
from torch import Tensor

from xtoken import pkl_loss
from xtoken.losses.pkl import cuda as pkl_cuda
from xtoken.losses.pkl.cuda import plan_for
from xtoken.losses.sliced import WARP
from xtoken.projection import ProjectionMatrix

pytestmark = pytest.mark.slow

needs_emulator = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))


def long_case() -> Case:
    """More entries in a column, and in a row, than one lane of a warp reads."""
    case = make_case(151, 71, samples=1, shapes=((1, 1), (1, 1), (2, 2)))
    dense = torch.rand(66, 71, generator=torch.Generator().manual_seed(0))
    index = torch.arange(71).repeat(151, 1)
    weight = torch.zeros(151, 71)
    weight[:66] = dense / dense.sum(1, keepdim=True)
    weight[66:, 3] = 1.0
    return Case(case.student, case.teacher, case.alignment, ProjectionMatrix.from_topk(index, weight, 71))


@needs_emulator
@pytest.mark.parametrize("top_k", [None, 17])
def test_long_rows_and_columns(top_k: int | None) -> None:
    case = long_case()
    plan = plan_for(case.projection, torch.arange(71), False)
    assert plan.structure.column_lists.shared == 71
    assert plan.structure.row_lists.shared == 66
    for merge in ("first", "mean"):
        check("emulated", "pkl", case, torch.float32, merge=merge, top_k=top_k)


def test_the_layout_of_lists() -> None:
    """Every entry is in its list once, and what fills them up has no weight."""
    case = long_case()
    structure = plan_for(case.projection, torch.arange(71), False).structure
    weight = torch.cat([case.projection.weight, torch.zeros(1)])
    for lists, side, size in ((structure.column_lists, 0, 151), (structure.row_lists, 1, 71)):
        dense = torch.zeros(len(lists.owner), size)
        assert lists.part[0] == 0
        assert lists.part[-1] == len(lists.start) - 1
        assert bool((lists.part.diff() >= 0).all())
        behind, longs = WARP * int(lists.start[-1]), len(lists.owner) - lists.few
        for n in range(longs):
            piece = n if n < lists.shared else lists.shared + (n - lists.shared) // WARP
            block = slice(WARP * int(lists.start[piece]), WARP * int(lists.start[piece + 1]))
            lane = slice(None) if n < lists.shared else slice((n - lists.shared) % WARP, None, WARP)
            index, entry = (x[block].view(-1, WARP, 4)[:, lane].flatten() for x in (lists.index, lists.entry))
            dense[n].index_add_(0, index.long(), weight[entry])
        dense[longs:].scatter_add_(1, lists.index[behind:].view(-1, 4).long(), weight[lists.entry[behind:]].view(-1, 4))
        whole = _dense(case.projection)
        want = whole.T if side == 0 else whole
        assert torch.equal(dense, want[lists.owner.long()])


def _dense(projection: ProjectionMatrix) -> Tensor:
    dense = torch.zeros(projection.shape)
    row = torch.repeat_interleave(torch.arange(projection.shape[0]), projection.row_ptr.diff())
    dense[row, projection.col.long()] = projection.weight
    return dense


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
@pytest.mark.parametrize("merge", ["first", "mean", "chain"])
def test_reachable_columns_are_the_largest_first(merge: str) -> None:
    """As on the host: W may reach some of the largest columns, and on a device none of them, which is nan there."""
    case = make_case()
    odd = torch.stack([torch.arange(67) % 15 * 2 + 1, torch.arange(67) % 14 * 2 + 31], 1)
    case = replace(case, projection=ProjectionMatrix.from_topk(odd, torch.tensor([0.7, 0.3]).repeat(67, 1), 59))

    def call(s: Step) -> Tensor:
        return loss_of(s, "pkl", top_k=9, support="reachable", merge=merge)

    host = torch.device("cpu")

    def step(device: torch.device, raised: slice) -> Step:
        made = make_step(case, 0, device, True, constants(case, device), "auto" if device == DEVICE else "emulated")
        made.teacher[..., raised] += 100.0
        return made

    want = results(call, step(host, slice(0, 7)))[:2]
    with pytest.raises(ValueError, match="support: expected a column that the projection reaches, got none"):
        call(step(host, slice(0, None, 2)))
    with fake_device() as device:
        got = results(call, step(DEVICE, slice(0, 7)))[:2]
        assert all(torch.equal(one.values, other) for one, other in zip(got, want, strict=True))
        none = step(DEVICE, slice(0, None, 2))
        device.waits.clear()
        loss, grad = results(call, none)[:2]
        assert device.waits == []
        assert bool(torch.isnan(loss.values))
        assert merge == "chain" or bool((grad.values == 0).all())
