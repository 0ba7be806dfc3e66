"""Tensors as the kernels of csrc/cpu take them: addresses, types, shapes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.losses._backends import Labels
from xtoken.reference import Rows

ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Types of logits that the kernels take."""


def unit_stride(logits: Tensor) -> Tensor:
    """The logits, copied if their columns do not follow each other in memory."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def logits_argument(logits: Tensor | None) -> tuple[int, str, int, int, int, int, int]:
    """(address, type, B, T, V, stride of a sample, stride of a row) of logits [B, T, V]."""
    return 0 if logits is None else logits.data_ptr(), *logits_layout(logits)


def logits_layout(logits: Tensor | None) -> tuple[str, int, int, int, int, int]:
    """`logits_argument` without the address."""
    if logits is None:
        return "float32", 0, 1, 0, 0, 0
    samples, length, width = logits.shape
    sample_stride, row_stride, _ = logits.stride()
    return ELEMENTS[logits.dtype], samples, max(length, 1), width, sample_stride, row_stride


def rows_argument(rows: Rows) -> tuple[tuple[int, int, int], list[Tensor]]:
    """Addresses of (start, count, realised ids or 0), and the tensors to keep alive during the call."""
    kept = [rows.start.contiguous(), rows.count.contiguous()]
    if rows.next_ids is not None:
        kept.append(rows.next_ids.contiguous())
    addresses = [tensor.data_ptr() for tensor in kept] + [0] * (3 - len(kept))
    return (addresses[0], addresses[1], addresses[2]), kept


class LabelBuffers:
    """Labels as a kernel takes them, if there are any, with room for its results in double precision."""

    argument: tuple[int, float, int] = 0, 0.0, 0

    def __init__(self, labels: Labels | None = None) -> None:
        self._labels = labels
        if labels is not None:
            self._ids = labels.ids.contiguous()
            self._losses = torch.empty(self._ids.shape, dtype=torch.float64)
            self.argument = self._ids.data_ptr(), float(labels.scale), self._losses.data_ptr()

    def finish(self) -> None:
        """Hands the results over."""
        if self._labels is not None:
            self._labels.losses.copy_(self._losses)
