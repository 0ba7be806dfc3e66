"""The backend "emulated": the sources of the CUDA kernels, run by tests/cuda_emulator, behind the code of "cuda".

Tensors of a call are copied into the emulator's memory, where every access of a kernel is checked, and results back.
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

from xtoken.losses._backends import Backend
from xtoken.losses._cuda import Kernels
from xtoken.losses._cuda import backend as cuda_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_emulator import emulator  # noqa: E402

MODULE = "xtoken_cuda_emulated"
SOURCES = Path(__file__).resolve().parents[2] / "csrc"
BLOCKS, THREADS = 2, 64
"""Of every launch: more than one of each, so that work is shared out, and few, because each is a fiber."""

why_not = emulator.why_not


@functools.cache
def load() -> tuple[Any, emulator.Emulator]:
    """The launchers, compiled for the emulator, and its controls."""
    library = emulator.build(
        MODULE,
        sorted((SOURCES / "cuda").glob("*.cu")),
        [SOURCES / "bindings" / "cuda.cpp"],
        python=True,
        flags=f"-DXTOKEN_CUDA_MODULE={MODULE}",
    )
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, emulator.Emulator(library)


class EmulatedMemory:
    """The emulator's memory for one call; see `xtoken.losses._cuda.Memory`."""

    launch = BLOCKS, THREADS, 0

    def __init__(self, memory: emulator.Memory) -> None:
        self.memory = memory
        self.inside: dict[int, Tensor] = {}  # by the address outside, or that of scratch memory itself
        self.results: list[tuple[Tensor, Tensor]] = []

    def input(self, tensor: Tensor | None) -> int:
        if tensor is None or tensor.numel() == 0:
            return 0
        known = self.inside.get(tensor.data_ptr())
        if known is None:
            known = self.inside[tensor.data_ptr()] = self.memory.copy(tensor.detach())
        return known.data_ptr()

    def output(self, tensor: Tensor | None, keep: bool = False) -> int:
        if tensor is None or tensor.numel() == 0:
            return 0
        known = self.inside.get(tensor.data_ptr())
        if known is not None and known.shape == tensor.shape:
            if known.data_ptr() != tensor.data_ptr():  # the gradient takes the place of the logits
                self.results.append((tensor, known))
            return known.data_ptr()
        assert tensor.is_contiguous()
        made = self.memory.copy(tensor) if keep else self.memory.empty(tensor.shape, tensor.dtype)
        self.results.append((tensor, made))
        return made.data_ptr()

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, zero: bool = False) -> Tensor:
        made = self.memory.copy(torch.zeros(shape, dtype=dtype)) if zero else self.memory.empty(shape, dtype)
        self.inside[made.data_ptr()] = made
        return made

    def give_back(self) -> None:
        for outside, inside in self.results:
            outside.copy_(self.memory.result(inside))


@contextmanager
def _memory(controls: emulator.Emulator, device: torch.device) -> Iterator[EmulatedMemory]:
    with controls.memory() as memory:
        call = EmulatedMemory(memory)
        yield call
        call.give_back()


def backend(name: str = "emulated") -> Backend:
    """The kernels on CPU tensors."""
    module, controls = load()
    return cuda_backend(name, Kernels(module, functools.partial(_memory, controls)), "cpu")


def set_order(order: str, seed: int = 0) -> None:
    """How the emulated threads take turns from now on."""
    load()[1].set_order(order, seed)
