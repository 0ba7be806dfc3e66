"""The backend "cuda": hands tensors to the kernels of csrc/cuda, on the current stream.

Nothing here waits for the device: not for the values of tensors, not for a kernel. Outputs and workspace come from
torch's allocator.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from xtoken.alignment import Rows
from xtoken.losses import numerics
from xtoken.losses.backends import Backend, Kernel, Labels, Problem, kernels_of, register_backend
from xtoken.losses.cpu import ELEMENTS, logits_layout, unit_stride
from xtoken.projection import column_set


def _built() -> Any:
    """The launchers of this build, None if it has none that load here."""
    try:
        return importlib.import_module("xtoken._cuda")
    except ImportError:
        return None


class Memory(Protocol):
    """Where the kernels of one call find their tensors."""

    launch: tuple[int, int, int]  # blocks of the large kernels, threads of a block, stream

    def input(self, tensor: Tensor | None) -> int:
        """The address of a tensor's values for the kernels, 0 for None."""
        ...

    def output(self, tensor: Tensor | None, keep: bool = False) -> int:
        """The address of a contiguous tensor that kernels fill, or (`keep`) change."""
        ...

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, zero: bool = False) -> Tensor:
        """Memory for kernels only; uninitialised or zero."""
        ...


class DeviceMemory:
    """The device's own: tensors are used where they are, and kept until the kernels are launched."""

    threads = 512

    def __init__(self, device: torch.device) -> None:
        blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self.launch = blocks, self.threads, torch.cuda.current_stream(device).cuda_stream
        self.device = device
        self.kept: list[Tensor] = []

    def input(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self.kept.append(tensor)
        return tensor.data_ptr()

    def output(self, tensor: Tensor | None, keep: bool = False) -> int:
        return self.input(tensor)

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, zero: bool = False) -> Tensor:
        make = torch.zeros if zero else torch.empty
        return make(shape, dtype=dtype, device=self.device)


@contextmanager
def device_memory(device: torch.device) -> Iterator[Memory]:
    """The memory of a CUDA device, which is the current one meanwhile."""
    with torch.cuda.device(device):
        yield DeviceMemory(device)


_Logits = tuple[int, str, int, int, int, int, int]


class Kernels:
    """The operations, on a module of launchers and the memory that it works on.

    Parameters
    ----------
    module : xtoken._cuda, or a module with the same functions
    memory : callable
        Opens the memory of a device for one call.
    """

    def __init__(self, module: Any, memory: Callable[[torch.device], AbstractContextManager[Memory]]) -> None:
        self.module, self.memory = module, memory

    def cross_entropy(
        self, student: Tensor, labels: Labels, student_grad: Tensor | None = None, factor: Tensor | None = None
    ) -> None:
        """See `xtoken.losses.backends.CrossEntropy`. With a gradient and a scale of 0 there are no losses either."""
        with self.memory(student.device) as memory:
            self.module.cross_entropy(
                logits_argument(memory, student),
                gradient_argument(memory, student_grad, keep=True),
                labels_argument(memory, labels, keep=True),
                numerics.LOWEST_LOGIT,
                student_grad is not None,
                floats_argument(memory, factor),
                0,
                memory.launch,
            )

    def scale(self, grad: Tensor, factor: Tensor) -> None:
        """``grad *= factor`` for a contiguous gradient; reads and writes nothing for a factor of 1."""
        if grad.dtype not in ELEMENTS or not grad.is_contiguous():
            grad.mul_(factor)
            return
        with self.memory(grad.device) as memory:
            address = memory.output(grad, keep=True)
            self.module.scale(
                address, ELEMENTS[grad.dtype], grad.numel(), memory.input(factor.detach().float()), memory.launch
            )

    def other_rows(
        self, memory: Memory, student: _Logits, grad: _Logits, rows: tuple[int, int, int], chunks: Rows, labels: Any
    ) -> None:
        """Rows of no chunk: zeros, or the cross-entropy's gradient."""
        covered = memory.scratch((student[2] * student[3],), torch.uint8, zero=True)
        address = memory.output(covered)
        self.module.mark_rows(rows[0], rows[1], len(chunks.start), address, memory.launch)
        self.module.cross_entropy(student, grad, labels, numerics.LOWEST_LOGIT, False, 0, address, memory.launch)


def logits_argument(memory: Memory, logits: Tensor) -> _Logits:
    given = unit_stride(logits)
    return memory.input(given), *logits_layout(given)


def gradient_argument(memory: Memory, grad: Tensor | None, keep: bool = False) -> _Logits:
    return memory.output(grad, keep), *logits_layout(grad)


def rows_argument(memory: Memory, rows: Rows) -> tuple[int, int, int]:
    next_ids = None if rows.next_ids is None else rows.next_ids.contiguous()
    return memory.input(rows.start.contiguous()), memory.input(rows.count.contiguous()), memory.input(next_ids)


def labels_argument(memory: Memory, labels: Labels | None, keep: bool = False) -> tuple[int, int, int]:
    if labels is None:
        return 0, 0, 0
    return memory.input(labels.ids.contiguous()), memory.input(labels.scale), memory.output(labels.losses, keep)


def floats_argument(memory: Memory, values: Tensor | None) -> int:
    return memory.input(None if values is None else values.detach().float().contiguous())


def unsupported(problem: Problem) -> str | None:
    """Why the kernels cannot take a problem, or None."""
    for name, logits in (("student_logits", problem.student), ("teacher_logits", problem.teacher)):
        if logits.dtype not in ELEMENTS:
            known = ", ".join(map(str, ELEMENTS))
            return f"{name}: expected one of {known}, got {logits.dtype}"
    return None


def backend(name: str, kernels: Kernels, device_type: str) -> Backend:
    """The kernels as a backend for tensors of this type of device."""

    def missing(device: torch.device) -> str | None:
        return None if device.type == device_type else f"it works on {device_type.upper()} tensors, got {device}"

    def kernel(loss: str) -> Kernel | None:
        module = kernels_of(loss, "cuda")
        if module is None:
            return None
        return Kernel(functools.partial(module.run, kernels), True, getattr(module, "TAKES_MASK", False))

    return Backend(name, kernel, missing, kernels.cross_entropy, column_set, unsupported, kernels.scale)


def register() -> None:
    """Adds the backend, if this build has kernels."""
    module = _built()
    if module is not None:
        register_backend(backend("cuda", Kernels(module, device_memory), "cuda"))
