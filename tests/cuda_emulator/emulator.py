"""Builds kernel sources for the emulator, and controls it: memory, orders."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import sysconfig
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
ORDERS = ("forward", "reverse", "random", "one_ahead")
ERRORS = ("none", "above", "below", "mixed")

COMMON_FLAGS = "-std=c++17 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas"
# The compiler's calls before each access are defined in checks.cpp. -fno-tree-sra: a vector load stays one access,
# whichever part of it is used. -ffp-contract=off: as the source says, on every machine. -Og takes g++ 0.6 of what -O1
# does, and the kernels run as fast.
KERNEL_FLAGS = (
    "-Og -fno-tree-sra -ffp-contract=off -x c++ -DXTOKEN_EMULATED"
    " -fsanitize=thread --param tsan-instrument-func-entry-exit=0"
)

UNCHECKED_STORE = re.compile(r"^ *((?:\*|MEM)[^=\n]*= [\w:.~]+ \(.*)$", re.MULTILINE)
"""In g++'s listing after it has put in the calls: a store of what a function returns, which gets none."""

NINJA = """\
rule compile
  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} -shared $in $libraries -o $out
"""


def cuda_headers() -> Path | None:
    """The folder with CUDA's headers: the toolkit's, or that of NVIDIA's packages for pip."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    folders += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"))
    needed = ("cuda_runtime_api.h", "cuda_bf16.h", "vector_functions.h")
    return next((f for f in folders if all((f / name).is_file() for name in needed)), None)


def why_not() -> str | None:
    """The reason why nothing can be built for the emulator here, or None."""
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)}"
    if not (ROOT / "csrc").is_dir():  # tests of an installed wheel
        return "needs the sources of the kernels"
    return None if cuda_headers() else "needs CUDA's headers: the toolkit, or the package nvidia-cuda-runtime"


def build(
    name: str, kernels: Sequence[Path], host: Sequence[Path] = (), *, python: bool = False, flags: str = ""
) -> Path:
    """A shared library of the emulator, `kernels` (instrumented) and `host` sources; rebuilds what has changed.

    `python` makes it an extension module, with pybind11's and Python's headers. `flags` go to these sources; the
    emulator's own are compiled once for all libraries. Of several processes of the tests one builds, and the others
    wait for it.
    """
    folder = ROOT / "build" / "emulated"
    (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(folder, name, kernels, host, python, flags)


def _build(folder: Path, name: str, kernels: Sequence[Path], host: Sequence[Path], python: bool, flags: str) -> Path:
    target = folder / name / f"{name}{sysconfig.get_config_var('EXT_SUFFIX') if python else '.so'}"
    common = f"{COMMON_FLAGS} -I{FOLDER} -I{ROOT / 'csrc'} -isystem {cuda_headers()}"
    if python:
        import pybind11

        flags += f" -I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    lines = [NINJA.format(compiler="g++")]
    objects = []
    for source in kernels:
        objects.append(f"{name}/{source.parent.name}_{source.stem}.o")
        own = f"{KERNEL_FLAGS} -fdump-tree-tsan={objects[-1]}.txt"
        lines += [f"build {objects[-1]}: compile {source}", f"  flags = {common} {flags} {own}"]
    if host:  # compiled together: pybind11's headers take longer than all that is in them
        together = folder / name / "host.cpp"
        text = "".join(f'#include "{source}"\n' for source in host)
        if not together.exists() or together.read_text() != text:
            together.write_text(text)
        objects.append(f"{name}/host.o")
        lines += [f"build {objects[-1]}: compile {together}", f"  flags = {common} {flags} -O0"]
    for source in sorted(FOLDER.glob("*.cpp")):
        objects.append(f"{source.stem}.o")
        lines += [f"build {objects[-1]}: compile {source}", f"  flags = {common} -O2"]
    lines += [f"build {target.relative_to(folder)}: link {' '.join(objects)}", "  libraries = -ldl", ""]
    (folder / f"{name}.ninja").write_text("\n".join(lines))
    command = ["ninja", "-C", str(folder), "-f", f"{name}.ninja", str(target.relative_to(folder))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"building {name} for the emulator failed:\n{done.stdout}{done.stderr}")
    for listing in sorted((folder / name).glob("*.o.txt")):
        if unseen := UNCHECKED_STORE.findall(listing.read_text()):
            raise RuntimeError(f"{listing.name}: the emulator would not see these stores: {unseen}")
    return target


class Emulator:
    """The emulator inside a library that `build` made: the order of threads, and memory."""

    def __init__(self, library: Path) -> None:
        self.functions = ctypes.CDLL(str(library))
        self.functions.xtoken_emulator_failure.restype = ctypes.c_char_p
        self.errors, self.order = "none", "forward"

    def call(self, function: str, *arguments: object) -> None:
        if getattr(self.functions, f"xtoken_emulator_{function}")(*arguments) != 0:
            raise RuntimeError(self.functions.xtoken_emulator_failure().decode())

    def set_order(self, order: str, seed: int = 0) -> None:
        """How threads and blocks take turns from now on: one of ORDERS."""
        self.call("set_order", ORDERS.index(order), ctypes.c_uint(seed))
        self.order = order

    def set_errors(self, errors: str) -> None:
        """Where results of approximate functions are within what CUDA documents, from now on: one of ERRORS."""
        self.call("set_errors", ERRORS.index(errors))
        self.errors = errors

    def set_multiprocessors(self, count: int) -> None:
        """The number of multiprocessors, each with one block at a time; 2 at first."""
        self.call("set_multiprocessors", count)

    def set_shared_limit(self, size: int = 227 << 10) -> None:
        """The bytes of shared memory a block that launchers see."""
        self.call("set_shared_limit", size)

    def set_machine(self, capability: int = 90, driver: int = 0) -> None:
        """The compute capability of the devices (90 for 9.0), and the driver's version; 0: that of the headers."""
        self.call("set_machine", capability, driver)

    def devices(self) -> tuple[int, int]:
        """The current device, and the one that the last launch ran on (-1: none yet)."""
        current, launched = ctypes.c_int(), ctypes.c_int()
        self.call("devices", ctypes.byref(current), ctypes.byref(launched))
        return current.value, launched.value

    def memory(self) -> Memory:
        """Device memory, freed after the `with` block."""
        return Memory(self)


@dataclass(frozen=True)
class Traffic:
    """What kernels have used of an allocation: bytes of all reads and of all writes, and of all sectors of 32 bytes."""

    read: int
    written: int
    different: int


class Memory:
    """Tensors in memory that kernels may use, with inaccessible surroundings: inside the `with` block, and for as long
    after it as there are tensors in it, which the report of an error shows."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.kept: list[Any] = []

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kept.clear()

    def empty(self, shape: Sequence[int], dtype: torch.dtype, name: str = "buffer") -> torch.Tensor:
        """A contiguous tensor of NaN patterns; reading it before a kernel has written it is reported."""
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        pointer = ctypes.c_void_p()
        self.emulator.call("allocate", name.encode(), ctypes.c_size_t(max(size, 1)), ctypes.byref(pointer))
        assert pointer.value is not None
        storage = (ctypes.c_char * size).from_address(pointer.value)
        weakref.finalize(storage, self.emulator.call, "free", pointer)
        self.kept.append(storage)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(storage, dtype=dtype, count=count).view(tuple(shape))

    def copy(self, tensor: torch.Tensor, name: str = "buffer") -> torch.Tensor:
        """A tensor with the same values and strides (gaps between rows count as unwritten)."""
        if tensor.numel() == 0:
            return tensor
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        flat = self.empty((extent,), tensor.dtype, name)
        copied = flat.as_strided(tensor.shape, tensor.stride())
        copied.copy_(tensor)
        values = None
        if not tensor.is_contiguous():
            values = torch.zeros(extent, dtype=torch.bool)
            values.as_strided(tensor.shape, tensor.stride()).fill_(True)
        self.mark_written(flat, values)
        return copied

    def mark_written(self, tensor: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """The host has written this contiguous tensor: all of it, or the elements `where` is true."""
        if where is None:
            mask = torch.ones(tensor.numel() * tensor.itemsize, dtype=torch.bool)
        else:
            mask = where.reshape(-1).repeat_interleave(tensor.itemsize)
        size = ctypes.c_size_t(mask.numel())
        self.emulator.call("set_written", ctypes.c_void_p(tensor.data_ptr()), size, ctypes.c_void_p(mask.data_ptr()))

    def unwritten(self, tensor: torch.Tensor) -> int:
        """How many bytes of a contiguous tensor nobody has written."""
        count = ctypes.c_size_t()
        size = ctypes.c_size_t(tensor.numel() * tensor.itemsize)
        self.emulator.call("unwritten", ctypes.c_void_p(tensor.data_ptr()), size, ctypes.byref(count))
        return count.value

    def traffic(self, tensor: torch.Tensor) -> Traffic:
        """Of the whole allocation that the tensor is in."""
        counts = [ctypes.c_uint64() for _ in range(3)]
        self.emulator.call("traffic", ctypes.c_void_p(tensor.data_ptr()), *map(ctypes.byref, counts))
        read, written, sectors = (count.value for count in counts)
        return Traffic(read, written, 32 * sectors)

    def result(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a contiguous tensor in ordinary memory; an error if a part of it was not written."""
        if tensor.numel() and (missing := self.unwritten(tensor)):
            raise RuntimeError(f"CUDA emulator: nobody wrote {missing} of {tensor.numel() * tensor.itemsize} bytes")
        return tensor.clone()
