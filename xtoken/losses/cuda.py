"""The backend "cuda": hands tensors to its kernels, on the current stream.

Nothing here waits for the device: not for the values of tensors, not for a kernel. Outputs and workspace come from
torch's allocator.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from xtoken.alignment import Chunks
from xtoken.losses import numerics
from xtoken.losses.backends import Backend, Kernel, Labels, Problem, kernels_of, register_backend
from xtoken.losses.cpu import DTYPES, ELEMENTS, Array, Fields, array, chunk_inputs, unit_stride, unsupported
from xtoken.projection import column_set


def why_not(capability: int, driver: int, architectures: str, toolkit: int) -> str | None:
    """Why kernels cannot run on a device of this compute capability (80 for 8.0), or None if they can.

    `architectures` is what they are built for, such as "80,90", with PTX of the first, which a driver translates for
    other devices; `driver` the newest CUDA that the driver supports, and `toolkit` that of the build: 12040 for 12.4.
    """
    built = [int(one) for one in architectures.split(",")]
    if capability < built[0]:
        return f"kernels are for compute capability {built[0] / 10} and later, and the device has {capability / 10}"
    if driver // 1000 < toolkit // 1000:
        return f"kernels need a driver for CUDA {toolkit // 1000}, and that here is for {version(driver)}"
    is_assembled = any(one // 10 == capability // 10 and one <= capability for one in built)
    if not is_assembled and driver < toolkit:
        return (
            f"there is no machine code for compute capability {capability / 10}, and a driver for CUDA "
            f"{version(driver)} cannot translate the PTX of {version(toolkit)}"
        )
    return None


def version(number: int) -> str:
    """Of CUDA, in words: "12.4" for 12040."""
    return f"{number // 1000}.{number % 1000 // 10}"


def number_of(device: torch.device) -> int:
    """The number of a device; of the current one, if it says none."""
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if device.type == "cuda" and torch.cuda.is_available() else 0


class Memory:
    """Where the kernels of one call find their tensors, and how they are launched.

    Here the device's own: tensors are used where they are, and live as long as the fields that name them.
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self.blocks: int = module.resident_blocks * multiprocessors  # of the grid of a large kernel
        self.threads = module.max_threads  # of a block
        self.stream = torch.cuda.current_stream(device).cuda_stream
        self.device, self.place = number_of(device), device

    def input(self, tensor: Tensor | None) -> Array | None:
        """A tensor's values for the kernels."""
        return array(tensor)

    def output(self, tensor: Tensor | None, keep: bool = False) -> Array | None:
        """A contiguous tensor that kernels fill, or (`keep`) change."""
        return array(tensor)

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, zero: bool = False) -> Tensor:
        """Memory for kernels only; uninitialised or zero."""
        make = torch.zeros if zero else torch.empty
        return make(shape, dtype=dtype, device=self.place)


@contextmanager
def device_memory(module: Any, device: torch.device) -> Iterator[Memory]:
    """The memory of a CUDA device, which is made the current one, for the launchers of a module."""
    with torch.cuda.device(device):
        yield Memory(module, device)


class Kernels:
    """The operations, on a module of launchers (`xtoken._cuda`) and the memory of a device, opened for one call."""

    def __init__(self, module: Any, memory: Callable[[torch.device], AbstractContextManager[Memory]]) -> None:
        self.module, self.memory = module, memory
        self.why_not = functools.cache(self._why_not)

    def _why_not(self, device: int) -> str | None:
        """Why the kernels cannot run on the device of that number, or None; asks the driver, once."""
        try:
            capability, driver = self.module.compute_capability(device), self.module.driver_version()
        except RuntimeError as error:
            return f"CUDA does not answer: {error}"
        return why_not(capability, driver, self.module.architectures, self.module.cuda_version)

    def launch(self, memory: Memory, name: str, fields: Fields, blocks: int | None = None) -> None:
        """Starts a kernel on so many blocks, at most."""
        blocks = memory.blocks if blocks is None else blocks
        self.module.launch(name, fields, blocks, memory.threads, memory.stream, memory.device)

    def workspace(self, memory: Memory, name: str, fields: Fields, blocks: int) -> Array | None:
        """The workspace of a kernel with these fields and so many blocks."""
        size = self.module.workspace(name, {**fields, "workspace": None}, memory.device)
        return memory.output(memory.scratch((blocks, size)))

    def queue(self, memory: Memory) -> Array | None:
        """Room for a kernel's queue of chunks, which its launch empties."""
        return memory.output(memory.scratch((), torch.int64))

    def cross_entropy(
        self, student: Tensor, labels: Labels, student_grad: Tensor | None = None, factor: Tensor | None = None
    ) -> None:
        """See `xtoken.losses.backends.CrossEntropy`. With a gradient and a scale of 0 there are no losses either."""
        with self.memory(student.device) as memory:
            fields = {
                "student": memory.input(unit_stride(student)),
                "grad": memory.output(student_grad, keep=True),
                "labels": label_fields(memory, labels, keep=True),
                "lowest": numerics.LOWEST_LOGIT,
                "add": student_grad is not None,
                "factor": float_field(memory, factor),
                "skip": None,
            }
            self.launch(memory, "cross_entropy", fields)

    def scale(self, grad: Tensor, factor: Tensor) -> None:
        """``grad *= factor`` for a contiguous gradient; reads and writes nothing for a factor of 1."""
        if grad.dtype not in ELEMENTS or not grad.is_contiguous():
            grad.mul_(factor)
            return
        with self.memory(grad.device) as memory:
            data = memory.output(grad, keep=True)
            fields = {"data": data, "type": DTYPES[grad.dtype], "size": grad.numel()}
            self.launch(memory, "scale", {**fields, "factor": float_field(memory, factor)})

    def other_rows(self, memory: Memory, fields: Fields, rows: int) -> None:
        """Of so many rows, those of no chunk: zeros, or the cross-entropy's gradient. `fields` are those of a loss."""
        covered = memory.output(memory.scratch((rows,), torch.uint8, zero=True))
        marked = {"rows": fields["student_rows"], "chunks": fields["chunks"], "covered": covered}
        self.launch(memory, "mark_rows", marked)
        shared = {name: fields[name] for name in ("student", "grad", "labels", "lowest")}
        self.launch(memory, "cross_entropy", {**shared, "add": False, "factor": None, "skip": covered})

    def run_chunks(
        self,
        memory: Memory,
        name: str,
        problem: Problem[Any],
        student_grad: Tensor | None,
        scale: Tensor | None,
        labels: Labels | None,
        fields: Fields,
        in_order: bool = False,
    ) -> Tensor:
        """The losses of all chunks [K], and all rows of the gradient, by a kernel with `XTOKEN_CHUNKS` and `fields`.

        `in_order`: which block computes which chunk does not depend on how fast the blocks are.
        """
        losses = torch.empty(len(problem.chunks), dtype=torch.float32, device=problem.student.device)
        given = {
            **chunk_fields(memory, problem, problem.chunks, student_grad, scale),
            "labels": label_fields(memory, labels),
            "losses": memory.output(losses),
            "queue": None if in_order else self.queue(memory),
            **fields,
        }
        grid = self.grid(memory, problem)
        if "workspace" in fields:
            given["workspace"] = self.workspace(memory, name, given, grid)
        self.launch(memory, name, given, grid)
        if student_grad is not None or labels is not None:
            self.other_rows(memory, given, problem.student.shape[0] * problem.student.shape[1])
        return losses

    def grid(self, memory: Memory, problem: Problem) -> int:
        """Blocks that share out the chunks."""
        return max(1, min(memory.blocks, len(problem.chunks)))


def chunk_fields(
    memory: Memory,
    problem: Problem[Any],
    chunks: Chunks,
    student_grad: Tensor | None,
    scale: Tensor | None,
    keep: bool = False,
) -> dict[str, Any]:
    """`XTOKEN_CHUNKS` for (some of) the chunks. `keep`: not all rows of the gradient are written."""
    return {
        **chunk_inputs(problem, chunks, memory.input),
        "grad": memory.output(student_grad, keep),
        "scale": float_field(memory, scale),
    }


def label_fields(memory: Memory, labels: Labels | None, keep: bool = False) -> Fields:
    if labels is None:
        return {"ids": None, "scale": None, "losses": None}
    ids, losses = memory.input(labels.ids.contiguous()), memory.output(labels.losses, keep)
    return {"ids": ids, "scale": memory.input(labels.scale), "losses": losses}


def float_field(memory: Memory, values: Tensor | None) -> Array | None:
    return memory.input(None if values is None else values.detach().float().contiguous())


def bits_of(flags: Tensor) -> Tensor:
    """Flags as a `BitRow` of csrc: for every eighth the int32 of the 32 from there on, the first in the lowest bit."""
    words = torch.nn.functional.pad(flags.to(torch.int64), (0, -len(flags) % 8 + 24)).unfold(0, 32, 8)
    return (words << torch.arange(32, device=flags.device)).sum(1).to(torch.int32)


def backend(name: str, kernels: Kernels, device_type: str) -> Backend:
    """The kernels as a backend for tensors of this type of device."""

    def missing(device: torch.device) -> str | None:
        if device.type != device_type:
            return f"it works on {device_type.upper()} tensors, got {device}"
        return kernels.why_not(number_of(device))

    def kernel(loss: str) -> Kernel | None:
        module = kernels_of(loss, "cuda")
        if module is None:
            return None
        return Kernel(functools.partial(module.run, kernels), fuses_labels=True, takes_mask=True)

    return Backend(name, kernel, missing, kernels.cross_entropy, column_set, unsupported, kernels.scale)


def register() -> None:
    """Adds the backend, if this build has kernels that load here."""
    try:
        module = importlib.import_module("xtoken._cuda")
    except ImportError:
        return
    register_backend(backend("cuda", Kernels(module, functools.partial(device_memory, module)), "cuda"))
