"""Which chunks the diagnostics look at, and that they do not wait for a device; their values: test_combined.py."""

from __future__ import annotations

import emulated
import pytest
import torch
from fake_device import DEVICE, DeviceTensor, fake_device
from harness import make_case

from xtoken import Teacher
from xtoken.losses import diagnostics
from xtoken.losses.columns import reachable
from xtoken.losses.logits import DenseSource
from xtoken.projection import ProjectionMatrix
from xtoken.reference import Chunks, Rows


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("most", [1, 7, 100])
def test_chunks_that_count_are_the_same_with_a_mask_as_by_themselves(share: float, most: int) -> None:
    """Only a device has chunks with a mask; of those of the CPU the others are left out."""
    mask = torch.rand(100, generator=torch.Generator().manual_seed(0)) < share
    rows = torch.arange(100)
    sides = Rows(torch.where(mask, rows, -1), mask.long())
    index, counts = diagnostics._sample(Chunks(sides, sides, rows, mask), most)
    few = Chunks.of_positions(100, mask)
    want = few.used
    if len(few):
        places, taken = diagnostics._sample(few, min(most, len(few)))
        assert bool(taken.all())
        want = few.used[places]
    assert rows[index][counts].tolist() == want.tolist()


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
def test_events_do_not_wait_for_the_device() -> None:
    """From the second call on; the result stays there."""
    case = make_case()
    logits = case.student.float(), case.teacher.float()
    lengths = case.student.shape[1], case.teacher.shape[1]

    def diagnosed(device: torch.device) -> torch.Tensor:
        sources = [DenseSource(x.to(device), n) for x, n in zip(logits, case.pieces.shape, strict=True)]
        chunks = Chunks.of(case.alignment, *lengths, device, realised=True)
        loss = Teacher(pieces=case.pieces).make_loss()
        return loss.diagnose(*sources, chunks, None, device, "auto")

    want = diagnosed(torch.device("cpu"))
    with fake_device() as device:
        diagnosed(DEVICE)
        device.waits.clear()
        got = diagnosed(DEVICE)
        assert device.waits == ["_to_copy to lazy:1"] * 2  # of the logits, by this test
    assert isinstance(got, DeviceTensor)
    assert torch.equal(got.values, want)


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
def test_reachable_columns_of_a_device_have_the_values_of_the_host() -> None:
    """There the set is the first of the columns, and only the device knows of how many."""
    case = make_case()
    odd = torch.stack([torch.arange(67) % 15 * 2 + 1, torch.arange(67) % 14 * 2 + 31], 1)
    W = ProjectionMatrix.from_topk(odd, torch.tensor([0.7, 0.3]).repeat(67, 1), 59)
    logits = case.student.float(), case.teacher.float()
    lengths = case.student.shape[1], case.teacher.shape[1]
    columns = torch.arange(20)

    def diagnosed(device: torch.device) -> torch.Tensor:
        sources = [DenseSource(x.to(device), n) for x, n in zip(logits, W.shape, strict=True)]
        chosen, count = reachable(columns.to(device), W)
        assert (count is None) == (device.type == "cpu")
        chunks = Chunks.of(case.alignment, *lengths, device)
        return diagnostics.in_columns(*sources, chunks, chosen, W, count)

    want = diagnosed(torch.device("cpu"))
    assert 0.0 < float(want[1]) < 1.0
    with fake_device():
        got = diagnosed(DEVICE)
    torch.testing.assert_close(got.values, want)
