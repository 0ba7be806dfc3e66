"""The layout of lists."""

import numpy as np
import pytest

from xtoken.losses.sliced import FOUR, PARTS, WARP, SlicedLists


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
