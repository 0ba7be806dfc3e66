"""The losses on a device with an index of its own: nothing waits for it, and a CUDA graph could hold the whole step.

The device is that of `fake_device`, so these tests need no GPU; those marked `cuda` are the same on one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import emulated
import pytest
import torch
from default_losses import DEFAULT
from fake_device import DEVICE, DeviceTensor, FakeDevice, fake_device
from harness import OPERATIONS, make_case, own_tests
from steps import Step, constants, loss_of, make_step, results, steps_of
from torch import Tensor

import xtoken
from xtoken import TopKLogits
from xtoken.alignment import Chunks, to_device
from xtoken.losses import Needs, select_backend
from xtoken.losses.backends import kernels_of

pytestmark = pytest.mark.slow

needs_emulator = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))


def _xtoken_loss(s: Step) -> Tensor:
    teachers = [xtoken.Teacher(s.case.projection, **OPERATIONS[PROJECTED].few(31)), xtoken.Teacher(top_k=None)]
    criterion = xtoken.XTokenLoss(teachers, backend=s.backend)
    total, parts = criterion(s.student, s.labels, [s.teacher, s.student.detach().flip(1)], [s.alignment, None])
    return total + parts["scale"] + sum(parts[name].sum() for name in ("agreement", "mass", "outside"))


def _xtoken_pieces(s: Step) -> Tensor:
    criterion = xtoken.XTokenLoss([xtoken.Teacher(pieces=s.case.pieces)], backend=s.backend)
    total, _ = criterion(s.student, s.labels, s.teacher, s.alignment)
    return total


def _fixed(s: Step) -> Tensor:
    criterion = xtoken.XTokenLoss([xtoken.Teacher()], "fixed", diagnostics=False, backend=s.backend)
    total, parts = criterion(s.student, s.labels, s.student.detach().flip(1))
    return total + parts["chunks"].sum() + parts["scale"]


def _trust_and_certainty(s: Step) -> Tensor:
    teachers = [
        xtoken.Teacher(s.case.projection, trust_top_k=20, **OPERATIONS[PROJECTED].few(31)),
        xtoken.Teacher(trust_top_k=20, top_k=None),
    ]
    criterion = xtoken.XTokenLoss(teachers, teacher_weighting="entropy", backend=s.backend)
    total, parts = criterion(s.student, s.labels, [s.teacher, s.student.detach().flip(1)], [s.alignment, None])
    return total + parts["distrusted"].sum() + parts["weights"].sum()


def _top_k_teacher(s: Step) -> Tensor:
    values, ids = s.teacher.log_softmax(-1).topk(5)
    return loss_of(replace(s, teacher=TopKLogits(ids, values)), PROJECTED, **OPERATIONS[PROJECTED].few(31))


PROJECTED = DEFAULT[Needs.PROJECTION]
KERNELS = [name for name in OPERATIONS if kernels_of(name, "cuda") is not None]
"""The others are their formulas, which wait."""
CALLS: dict[str, Callable[[Step], Any]] = {
    **{key: call for name in KERNELS for key, call in steps_of(name).items()},
    **{
        f"{name}, {key}": call for name in KERNELS for key, call in getattr(own_tests(name), "DEVICE_STEPS", {}).items()
    },
    "teacher of few": _top_k_teacher,
    "everything": _xtoken_loss,
    "everything, pieces": _xtoken_pieces,
    "everything, fixed": _fixed,
    "trust and certainty": _trust_and_certainty,
}


@needs_emulator
@pytest.mark.parametrize("name", CALLS)
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    """From the second step on: W and columns are looked at once. With the alignment there, nothing is copied either."""
    case = make_case()
    host = torch.device("cpu")
    want = results(CALLS[name], make_step(case, 1, host, False, constants(case, host), "emulated"))
    found = []
    with fake_device() as device:
        shared = constants(case, DEVICE)
        results(CALLS[name], make_step(case, 0, DEVICE, False, shared))
        for moved in (False, True):
            step = make_step(case, 1, DEVICE, moved, shared)
            device.waits.clear()
            device.copies.clear()
            found.append(results(CALLS[name], step))
            assert device.waits == []
        assert device.copies == []
    for got in found:
        for one, other in zip(got, want, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert isinstance(one, DeviceTensor)
                assert one.device == DEVICE
                assert torch.equal(one.values, other)


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
        loss, cross_entropy = loss_of(step, PROJECTED, labels=step.labels)
        assert bool(torch.isfinite(loss))
        assert bool(torch.isnan(cross_entropy))


def test_a_graph_takes_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="inside a CUDA graph losses take tensors on the device only"):
        to_device(torch.zeros(1), torch.device("cuda"))


def test_an_alignment_on_a_device_keeps_what_it_was_made_of() -> None:
    """A copy of its own: the original may be changed."""
    case = make_case()
    assert case.alignment.host is case.alignment
    moved, spans = case.alignment.to("meta"), case.alignment.spans.clone()
    assert moved.spans.device.type == "meta"
    case.alignment.spans[0] += 1
    assert torch.equal(moved.host.spans, spans)
    assert moved.to("cpu") is moved.host is moved.host


@pytest.mark.parametrize("moved", [False, True])
def test_labels_on_a_device_choose_chunks_there(moved: bool) -> None:
    """What the host then does not know comes along wherever the alignment goes."""
    case = make_case()
    labels = torch.where(torch.rand(case.student.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.3, -100, 1)
    want = case.alignment.supervised(labels)
    assert want.predicted.tolist() != case.alignment.predicted.tolist()
    with FakeDevice() as device:
        alignment = case.alignment.to(DEVICE) if moved else case.alignment
        on_device = labels.to(DEVICE, non_blocking=True)
        device.waits.clear()
        got = alignment.supervised(on_device)
        again = got.supervised(on_device, torch.zeros(case.teacher.shape[:2], dtype=torch.int64))
        assert device.waits == []
        for one in (got, again):
            assert one.spans.device == DEVICE
            back = one.to("cpu")
            for name in ("spans", "offsets", "predicted", "student_ids", "teacher_ids"):
                assert torch.equal(getattr(back, name), getattr(want, name)), name
        assert torch.equal(got.host.spans, case.alignment.spans)
        chunks = Chunks.of(got, case.student.shape[1], case.teacher.shape[1])
        assert int(chunks.number) == int(want.predicted.sum())


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
