"""The losses on a device with an index of its own: nothing waits for it, and a CUDA graph could hold the whole step.

The device is that of `fake_device`, so these tests need no GPU; those marked `cuda` are the same on one.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import emulated
import pytest
import torch
from fake_device import DEVICE, DeviceTensor, fake_device
from harness import Case, make_case
from torch import Tensor

import xtoken
from xtoken import Alignment, TopKLogits
from xtoken.alignment import to_device
from xtoken.losses import select_backend
from xtoken.projection import ProjectionMatrix

pytestmark = pytest.mark.slow

needs_emulator = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))


@dataclass
class Step:
    """What one step of training hands to a loss, all on one device but for W."""

    student: Tensor
    teacher: Tensor
    alignment: Alignment
    labels: Tensor
    mask: Tensor
    hidden: Tensor
    head: Tensor
    constants: types.SimpleNamespace
    case: Case
    backend: str = "auto"


def _xtoken_loss(s: Step) -> Tensor:
    teachers = [xtoken.Teacher(s.case.projection, top_k=31, support="reachable"), xtoken.Teacher(loss="kd", top_k=None)]
    criterion = xtoken.XTokenLoss(teachers, backend=s.backend)
    total, parts = criterion(s.student, s.labels, [s.teacher, s.student.detach().flip(1)], [s.alignment, None])
    return total + parts["scale"] + sum(parts[name].sum() for name in ("agreement", "mass", "outside"))


def _xtoken_prefix(s: Step) -> Tensor:
    criterion = xtoken.XTokenLoss([xtoken.Teacher(pieces=s.case.pieces)], backend=s.backend)
    total, _ = criterion(s.student, s.labels, s.teacher, s.alignment)
    return total


def _fixed(s: Step) -> Tensor:
    criterion = xtoken.XTokenLoss([xtoken.Teacher(loss="kd")], "fixed", diagnostics=False, backend=s.backend)
    total, parts = criterion(s.student, s.labels, s.student.detach().flip(1))
    return total + parts["chunks"].sum() + parts["scale"]


def _pkl(**options: Any) -> Callable[[Step], Any]:
    return lambda s: xtoken.pkl_loss(s.student, s.teacher, s.alignment, s.case.projection, backend=s.backend, **options)


def _prefix(**options: Any) -> Callable[[Step], Any]:
    return lambda s: xtoken.prefix_kl_loss(
        s.student, s.teacher, s.alignment, s.case.pieces, backend=s.backend, **options
    )


def _labelled(s: Step) -> Tensor:
    loss, cross_entropy = xtoken.pkl_loss(
        s.student, s.teacher, s.alignment, s.case.projection, labels=s.labels, backend=s.backend
    )
    return loss + 0.3 * cross_entropy


def _learned(**options: Any) -> Callable[[Step], Tensor]:
    def call(s: Step) -> Tensor:
        W = types.SimpleNamespace(
            row_ptr=s.case.projection.row_ptr, col=s.case.projection.col, weight=s.constants.weight,
            shape=s.case.projection.shape,
        )  # fmt: skip
        return xtoken.pkl_loss(s.student, s.teacher, s.alignment, W, top_k=31, backend=s.backend, **options)

    return call


def _top_k_teacher(s: Step) -> Tensor:
    values, ids = s.teacher.log_softmax(-1).topk(5)
    return xtoken.pkl_loss(
        s.student, TopKLogits(ids, values), s.alignment, s.case.projection, top_k=31, backend=s.backend
    )


def _linear(s: Step) -> Tensor:
    return xtoken.linear_pkl_loss(s.hidden, s.head, s.teacher, s.alignment, s.case.projection, backend=s.backend)


CALLS: dict[str, Callable[[Step], Any]] = {
    "pkl": _pkl(top_k=31),
    "pkl, all columns": _pkl(top_k=None, merge="mean", temperature=2.0),
    "pkl, chain": _pkl(merge="chain", reverse=True),
    "pkl, reachable": _pkl(top_k=None, support="reachable"),
    "pkl, reachable of the largest": _pkl(top_k=31, support="reachable"),
    "pkl, reachable, mean": _pkl(top_k=31, support="reachable", merge="mean", reverse=True),
    "pkl, reachable of columns": lambda s: _pkl(columns=s.constants.columns, support="reachable", merge="chain")(s),
    "pkl, columns": lambda s: _pkl(columns=s.constants.columns)(s),
    "pkl, columns of the host": lambda s: _pkl(columns=s.constants.host_columns)(s),
    "pkl, none": lambda s: _pkl(reduction="none")(s).square().sum(),
    "pkl, inplace": lambda s: xtoken.pkl_loss(
        s.student * 1.0, s.teacher, s.alignment, s.case.projection, inplace=True, backend=s.backend
    ),
    "pkl, labels": _labelled,
    "pkl, learned": _learned(),
    "pkl, learned, reachable": _learned(support="reachable", merge="mean"),
    "pkl, teacher of few": _top_k_teacher,
    "pkl, linear": _linear,
    "gold": lambda s: xtoken.gold_loss(s.student, s.teacher, s.alignment, s.case.projection, backend=s.backend),
    "hkl": lambda s: xtoken.hkl_loss(
        s.student, s.teacher, s.alignment, s.case.projection, uncommon_top_k=20, reduction="sum", backend=s.backend
    ),
    "uld": lambda s: xtoken.uld_loss(s.student, s.teacher, s.alignment, backend=s.backend),
    "kd": lambda s: xtoken.kd_loss(s.student, s.student.detach().flip(1), top_k=31, backend=s.backend),
    "kd, mask": lambda s: xtoken.kd_loss(s.student, s.student.detach().flip(1), mask=s.mask, backend=s.backend),
    "kd, alignment": lambda s: xtoken.kd_loss(
        s.student, s.student.detach().flip(1), s.constants.positions, labels=s.labels, backend=s.backend
    )[0],
    "prefix": _prefix(),
    "prefix, none": lambda s: _prefix(reduction="none", reverse=True, temperature=2.0)(s).square().sum(),
    "prefix, inplace": lambda s: xtoken.prefix_kl_loss(
        s.student * 1.0, s.teacher, s.alignment, s.case.pieces, inplace=True, backend=s.backend
    ),
    "prefix, labels": lambda s: sum(_prefix(labels=s.labels)(s)),
    "prefix, linear": lambda s: xtoken.linear_prefix_kl_loss(
        s.hidden, s.head, s.teacher, s.alignment, s.case.pieces, backend=s.backend
    ),
    "prefix, combined": _xtoken_prefix,
    "everything": _xtoken_loss,
    "everything, fixed": _fixed,
}  # fmt: skip


def constants(case: Case, device: torch.device) -> types.SimpleNamespace:
    """What stays the same from step to step."""
    columns = torch.randperm(case.projection.shape[1], generator=torch.Generator().manual_seed(0))[:23]
    start = torch.arange(1, 6)
    positions = Alignment(torch.stack([start, start + 1, start, start + 1], 1).repeat(2, 1), [0, 5, 10])
    return types.SimpleNamespace(
        columns=columns.to(device),
        host_columns=columns,
        weight=case.projection.weight.clone().to(device).requires_grad_(),
        positions=positions.to(device),
    )


def make_step(case: Case, seed: int, device: torch.device, moved: bool, shared: Any, backend: str = "auto") -> Step:
    """New logits, and an alignment of its own."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(0, case.student.shape[-1], case.student.shape[:2], generator=generator)
    labels[:, 3] = -100
    of = case.alignment
    alignment = Alignment(of.spans, of.offsets, of.student_ids, of.teacher_ids)
    return Step(
        (case.student.float() + noise(*case.student.shape)).to(device).requires_grad_(),
        (case.teacher.float() + noise(*case.teacher.shape)).to(device),
        alignment.to(device) if moved else alignment,
        labels.to(device),
        (labels != -100).to(device),
        noise(*case.student.shape[:2], 8).to(device).requires_grad_(),
        noise(case.student.shape[-1], 8).to(device).requires_grad_(),
        shared,
        case,
        backend,
    )


def results(call: Callable[[Step], Any], step: Step) -> list[Tensor | None]:
    """The loss, and the gradients of everything that may have one."""
    leaves = [step.student, step.hidden, step.head, step.constants.weight]
    for leaf in leaves:
        leaf.grad = None
    loss = call(step)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@needs_emulator
@pytest.mark.parametrize("moved", [False, True], ids=["alignment on the host", "alignment on the device"])
@pytest.mark.parametrize("name", CALLS)
def test_a_step_does_not_wait_for_the_device(name: str, moved: bool) -> None:
    """In the second step: W and columns are looked at once. With all inputs there, nothing is copied either."""
    case = make_case()
    host = torch.device("cpu")
    want = results(CALLS[name], make_step(case, 1, host, False, constants(case, host), "emulated"))
    with fake_device() as device:
        shared = constants(case, DEVICE)
        results(CALLS[name], make_step(case, 0, DEVICE, moved, shared))
        step = make_step(case, 1, DEVICE, moved, shared)
        device.waits.clear()
        device.copies.clear()
        got = results(CALLS[name], step)
        assert device.waits == []
        if moved:
            assert device.copies == []
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert isinstance(one, DeviceTensor)
            assert one.device == DEVICE
            assert torch.equal(one.values, other)


@needs_emulator
@pytest.mark.parametrize("merge", ["first", "mean", "chain"])
def test_reachable_columns_are_the_largest_first(merge: str) -> None:
    """As on the host: W may reach some of the largest columns, and on a device none of them, which is nan there."""
    case = make_case()
    odd = torch.stack([torch.arange(67) % 15 * 2 + 1, torch.arange(67) % 14 * 2 + 31], 1)
    case = replace(case, projection=ProjectionMatrix.from_topk(odd, torch.tensor([0.7, 0.3]).repeat(67, 1), 59))
    call = _pkl(top_k=9, support="reachable", merge=merge)
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


@needs_emulator
def test_what_waits_is_recorded() -> None:
    """The fake device sees the operations that wait on CUDA, and refuses to mix devices."""
    values, on_host = torch.arange(4.0), torch.ones(4)
    with fake_device() as device:
        assert select_backend("auto", DEVICE) == "fake"
        x = values.to(DEVICE, non_blocking=True)
        assert (device.waits, device.copies) == ([], ["_to_copy to lazy:1"])
        waiting: list[Callable[[], Any]] = [
            lambda: float(x.sum()),
            lambda: x[x > 1],
            lambda: x.nonzero(),
            lambda: x.cpu(),
            lambda: x.unique(),
            lambda: x.repeat_interleave(x.long()),
            lambda: on_host.to(DEVICE),
            lambda: bool((x > 1).any()),
        ]
        for number, wait in enumerate(waiting):
            device.waits.clear()
            wait()
            assert len(device.waits) > 0, number
        with pytest.raises(RuntimeError, match="add: expected all tensors to be on the same device"):
            x + on_host


@needs_emulator
def test_a_label_out_of_range_makes_the_cross_entropy_nan() -> None:
    """Where a check would wait for the device."""
    case = make_case()
    with fake_device():
        step = make_step(case, 0, DEVICE, False, constants(case, DEVICE))
        step.labels[1, 2] = 67
        loss, cross_entropy = xtoken.pkl_loss(
            step.student, step.teacher, step.alignment, case.projection, labels=step.labels
        )
        assert bool(torch.isfinite(loss))
        assert bool(torch.isnan(cross_entropy))


def test_a_graph_takes_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="inside a CUDA graph losses take tensors on the device only"):
        to_device(torch.zeros(1), torch.device("cuda"))


def test_an_alignment_on_a_device_keeps_the_original() -> None:
    case = make_case()
    assert case.alignment.host is case.alignment
    moved = case.alignment.to("meta")
    assert moved.spans.device.type == "meta"
    assert moved.host is case.alignment
    assert moved.to("cpu") is case.alignment


# On a GPU the same calls: no wait, whichever device is current, and as a CUDA graph.

GPUS = [pytest.param(index, marks=pytest.mark.cuda, id=f"cuda:{index}") for index in range(2)]


def gpu(index: int) -> torch.device:
    if index >= torch.cuda.device_count():
        pytest.skip(f"there is no cuda:{index}")
    return torch.device("cuda", index)


@pytest.mark.parametrize("moved", [False, True], ids=["alignment on the host", "alignment on the device"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("index", GPUS)
def test_a_step_does_not_wait_for_a_gpu(index: int, name: str, moved: bool) -> None:
    device, case = gpu(index), make_case()
    shared = constants(case, device)
    results(CALLS[name], make_step(case, 0, device, moved, shared))
    step = make_step(case, 1, device, moved, shared)
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = results(CALLS[name], step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(one is None or one.device == device for one in got)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("index", GPUS[:1])
def test_cuda_graph(index: int, name: str) -> None:
    """A captured step, replayed with other logits, gives what the step gives."""
    device, case = gpu(index), make_case()
    shared = constants(case, device)
    step = make_step(case, 0, device, True, shared)
    leaves = [step.student, step.hidden, step.head, shared.weight]

    def run() -> list[Tensor | None]:
        loss = CALLS[name](step)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    other = make_step(case, 1, device, True, shared)
    with torch.no_grad():
        for own, new in ((step.student, other.student), (step.teacher, other.teacher), (step.hidden, other.hidden)):
            own.copy_(new)
    graph.replay()
    torch.cuda.synchronize(device)
    for got, want in zip(captured, run(), strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert torch.equal(got, want)
