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
"""Lists that are read side by side, and entries of a longer list that are."""

T = TypeVar("T")


@dataclass(frozen=True)
class SlicedLists:
    """The places of lists and of their entries."""

    shared: int
    start: Tensor  # int32 [slices + 1]
    source: Tensor  # int64 [32 * start[slices]]: which entry is there, -1: none
    owner: Tensor  # int32 [count]: whose each list is

    @staticmethod
    def of(owners: NDArray[np.int64], begin: NDArray[np.int64], counts: NDArray[np.int64]) -> SlicedLists:
        """Lists of the entries begin[n] ... begin[n] + counts[n] - 1."""
        shared, start, source, place = _core.sliced_lists(begin, counts.astype(np.int32), WARP)
        ordered = np.empty(len(owners), np.int32)
        ordered[place] = owners
        return SlicedLists(shared, torch.from_numpy(start).int(), torch.from_numpy(source), torch.from_numpy(ordered))

    def put(self, values: Tensor, none: int) -> Tensor:
        """The values of the entries in their places, `none` where there is no entry."""
        return torch.cat([values, values.new_tensor([none])])[self.source]


def list_fields(lists: Any, memory: Any) -> dict[str, Any]:
    """What the structs of lists in csrc begin with, of something with `shared`, `start` and `owner`."""
    return {
        "slices": len(lists.start) - 1,
        "shared": lists.shared,
        "count": len(lists.owner),
        "start": memory.input(lists.start),
    }


def tensors_to(value: T, device: torch.device) -> T:
    """A dataclass with its tensors on a device."""
    tensors = {f.name: x for f in fields(value) if isinstance(x := getattr(value, f.name), Tensor)}  # type: ignore[arg-type]
    return replace(value, **{name: tensor.to(device) for name, tensor in tensors.items()})  # type: ignore[type-var]
