"""The CUDA kernels as backends for CPU tensors, so that every test of the losses runs on them.

"emulated" is their source on tests/cuda_emulator, where every access is checked; "on_gpu" is the real thing, where
there is a GPU. Both are the code of the backend "cuda", but for the memory: tensors of a call are copied in, and
results back.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtoken.losses.backends import Backend
from xtoken.losses.cpu import DTYPES, Array
from xtoken.losses.cuda import Kernels
from xtoken.losses.cuda import backend as cuda_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_emulator import emulator

MODULE = "xtoken_cuda_emulated"
SOURCES = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = "80,90"
"""That the kernels say they are built for."""
BLOCKS, THREADS = 2, 64
"""Of every launch: more than one of each, so that work is shared out, and few, because each is a fiber."""

why_not = emulator.why_not


@functools.cache
def load() -> tuple[Any, emulator.Emulator]:
    """The launchers, compiled for the emulator, and its controls."""
    library = emulator.build(
        MODULE,
        sorted(SOURCES.rglob("*.cu")),
        [
            SOURCES / "bindings" / "cuda_module.cpp",
            SOURCES / "bindings" / "launch.cpp",
            SOURCES / "launch" / "fields.cpp",
        ],
        python=True,
        flags=f'-DXTOKEN_CUDA_MODULE={MODULE} -DXTOKEN_CUDA_ARCHITECTURES=\\"{ARCHITECTURES}\\"',
    )
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, emulator.Emulator(library)


def _at(inside: Tensor, outside: Tensor) -> Array:
    return Array(inside.data_ptr(), DTYPES[outside.dtype], tuple(outside.shape), outside.stride(), inside)


def _nowhere(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else Array(0, DTYPES[tensor.dtype], tuple(tensor.shape), tensor.stride())


class CopiedMemory:
    """Other memory for the tensors of one call; see `xtoken.losses.cuda.Memory`."""

    blocks, threads, device = BLOCKS, THREADS, 0

    def __init__(self, memory: Any, stream: int = 0) -> None:
        self.memory, self.stream = memory, stream
        self.inside: dict[int, Tensor] = {}  # by the address outside, or that of scratch memory itself
        self.outside: list[Tensor] = []  # alive for the call, so that no other tensor gets its address
        self.results: list[tuple[Tensor, Tensor]] = []

    def input(self, tensor: Tensor | None) -> Array | None:
        if tensor is None or tensor.numel() == 0:
            return _nowhere(tensor)
        known = self.inside.get(tensor.data_ptr())
        if known is None:
            known = self.inside[tensor.data_ptr()] = self.memory.copy(tensor.detach())
            self.outside.append(tensor)
        return _at(known, tensor)

    def output(self, tensor: Tensor | None, keep: bool = False) -> Array | None:
        if tensor is None or tensor.numel() == 0:
            return _nowhere(tensor)
        known = self.inside.get(tensor.data_ptr())
        if known is not None and known.shape == tensor.shape:
            if known.data_ptr() != tensor.data_ptr():  # the gradient takes the place of the logits
                self.results.append((tensor, known))
            return _at(known, tensor)
        assert tensor.is_contiguous()
        made = self.memory.copy(tensor) if keep else self.memory.empty(tensor.shape, tensor.dtype)
        self.results.append((tensor, made))  # which keeps the memory, too
        return _at(made, tensor)

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, zero: bool = False) -> Tensor:
        made = self.memory.copy(torch.zeros(shape, dtype=dtype)) if zero else self.memory.empty(shape, dtype)
        self.inside[made.data_ptr()] = made
        return made

    def give_back(self) -> None:
        for outside, inside in self.results:
            outside.copy_(self.memory.result(inside))


class _Launchers:
    """The launchers, compiled when the first of them is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(load()[0], name)


@contextmanager
def _memory(device: torch.device) -> Iterator[CopiedMemory]:
    with load()[1].memory() as memory:
        call = CopiedMemory(memory)
        yield call
        call.give_back()


class GpuBuffers:
    """What `emulator.Memory` is for the emulator, on a GPU."""

    def empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def copy(self, tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)

    def result(self, tensor: Tensor) -> Tensor:
        return tensor.cpu()


@contextmanager
def _gpu_memory(device: torch.device) -> Iterator[CopiedMemory]:
    call = CopiedMemory(GpuBuffers(), torch.cuda.current_stream().cuda_stream)
    yield call
    call.give_back()


def memory() -> Any:
    """Opens the emulator's memory for a call of `Kernels`."""
    return _memory


def backend(name: str = "emulated") -> Backend:
    """The kernels on CPU tensors. Nothing is built before they are used."""
    return cuda_backend(name, Kernels(_Launchers(), memory()), "cpu")


def gpu_backend(name: str = "on_gpu") -> Backend:
    """The kernels of this build on a GPU, for CPU tensors."""
    from xtoken import _cuda

    return cuda_backend(name, Kernels(_cuda, _gpu_memory), "cpu")


def inexact(backend: str) -> bool:
    """Whether its functions have errors that CUDA documents."""
    return backend == "on_gpu" or (backend == "emulated" and load()[1].errors != "none")


def set_errors(errors: str) -> None:
    """Where results of approximate functions are from now on; see `Emulator.set_errors`."""
    load()[1].set_errors(errors)


def set_order(order: str, seed: int = 0) -> None:
    """How the emulated threads take turns from now on."""
    load()[1].set_order(order, seed)
