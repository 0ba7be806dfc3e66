"""Lists of unequal length side by side, as the warps of the CUDA kernels read them: see csrc/core/sliced.h."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken import _core

WARP = 32
"""Lists that are read side by side, or entries of one long list."""
LONGEST = 64
"""Entries that one lane of a warp reads; a longer list is read by all of them."""
FOUR = 4
"""Entries of a list that are read together."""
PARTS = 16
"""Of the slices: `list_parts` of csrc/launch/arguments.h."""

T = TypeVar("T")


@dataclass(frozen=True)
class SlicedLists:
    """The places of lists and of their entries."""

    shared: int
    start: Tensor  # int32 [slices + 1], multiples of four
    part: Tensor  # int32 [PARTS + 1]: the first slice of each part, which have about as many entries
    source: Tensor  # int64 [32 * start[slices]]: which entry is there, -1: none
    owner: Tensor  # int32 [count]: whose each list is

    @staticmethod
    def of(owners: NDArray[np.int64], begin: NDArray[np.int64], counts: NDArray[np.int64]) -> SlicedLists:
        """Lists of the entries begin[n] ... begin[n] + counts[n] - 1."""
        shared, start, source, place = _core.sliced_lists(begin, counts.astype(np.int32), WARP, LONGEST)
        ordered = np.empty(len(owners), np.int32)
        ordered[place] = owners
        by_four, put = _by_four(start, source)
        part = np.searchsorted(by_four, -(-by_four[-1] * np.arange(PARTS + 1) // PARTS)).astype(np.int32)
        return SlicedLists(shared, *map(torch.from_numpy, (by_four.astype(np.int32), part, put, ordered)))

    def put(self, values: Tensor, none: int) -> Tensor:
        """The values of the entries in their places, `none` where there is no entry."""
        return torch.cat([values, values.new_tensor([none])])[self.source]


def _by_four(start: NDArray[np.int64], source: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each slice starts if its lanes have four entries side by side, and the entries; no slice is empty."""
    lengths = np.diff(start)
    padded = np.concatenate([start[:1], (-(-np.maximum(lengths, 1) // FOUR) * FOUR).cumsum()])
    row = np.arange(len(source) // WARP) + np.repeat(padded[:-1] - start[:-1], lengths)
    put = np.full((padded[-1], WARP), -1)
    put[row] = source.reshape(-1, WARP)
    return padded, put.reshape(-1, FOUR, WARP).swapaxes(1, 2).reshape(-1)


def list_fields(lists: Any, memory: Any) -> dict[str, Any]:
    """What the structs of lists in csrc begin with, of something with `shared`, `start`, `part` and `owner`."""
    return {
        "slices": len(lists.start) - 1,
        "shared": lists.shared,
        "count": len(lists.owner),
        "start": memory.input(lists.start),
        "part": memory.input(lists.part),
    }


def tensors_to(value: T, device: torch.device) -> T:
    """A dataclass with its tensors on a device."""
    tensors = {f.name: x for f in fields(value) if isinstance(x := getattr(value, f.name), Tensor)}  # type: ignore[arg-type]
    return replace(value, **{name: tensor.to(device) for name, tensor in tensors.items()})  # type: ignore[type-var]
