"""The layout of lists does not depend on what torch makes by default."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.losses.sliced import FOUR, PARTS, WARP, SlicedLists


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def layout(lists: SlicedLists) -> tuple[int, list[Tensor]]:
    return lists.shared, [lists.start, lists.part, lists.source, lists.owner]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("count", "length"), [(20000, 5), (1, 70000), (0, 0)])
def test_defaults_of_torch(dtype: torch.dtype, device: str, count: int, length: int) -> None:
    counts = np.full(count, length)
    given = np.arange(count), counts.cumsum() - counts, counts
    shared, tensors = layout(SlicedLists.of(*given))
    with defaults(dtype, device):
        other, others = layout(SlicedLists.of(*given))
    assert shared == other
    assert all(torch.equal(*pair) for pair in zip(tensors, others, strict=True))


@pytest.mark.parametrize("count", [1, 32, 33, 520, 20000, 70001])
def test_parts(count: int) -> None:
    """All slices are in one part each, in order, and parts have about as many entries."""
    counts = np.full(count, 5)
    lists = SlicedLists.of(np.arange(count), counts.cumsum() - counts, counts)
    assert len(lists.part) == PARTS + 1
    assert lists.part[0] == 0
    assert lists.part[-1] == len(lists.start) - 1
    assert bool((lists.part.diff() >= 0).all())
    entries = lists.start[lists.part.long()].diff()
    assert int(entries.max()) <= int(lists.start[-1]) / PARTS + 2 * FOUR
    assert int((lists.source >= 0).sum()) == counts.sum()
    assert len(lists.source) == WARP * int(lists.start[-1])
