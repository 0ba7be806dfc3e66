"""A device that is none: tensors on "lazy:1" whose values are on the CPU, and a record of every wait for the device.

Under `FakeDevice` torch works with such tensors as with those of a GPU: what is computed from them is on the device,
tensors of the CPU do not mix with them, and operations that wait on CUDA until the device is done, or copy from the
CPU, are written down. The losses run on it through the backend "fake", the CUDA kernels on the emulator. ("lazy" is the
type of device that a build of torch for the CPU lets autograd work with.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import emulated
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

from xtoken.losses import operator
from xtoken.losses.backends import register_backend, unregister_backend
from xtoken.losses.cpu import Array
from xtoken.losses.cuda import Kernels, Memory
from xtoken.losses.cuda import backend as cuda_backend

DEVICE = torch.device("lazy", 1)

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "unique_consecutive",
    "unique_dim", "_unique", "_unique2",
}  # fmt: skip
"""Operations whose result, or its size, is known only when the device is done."""


class DeviceTensor(Tensor):
    """A tensor that says that it is on `DEVICE`."""

    values: Tensor  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=device,
        )  # fmt: skip
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{function} outside of FakeDevice")


OPERATORS = {
    **{getattr(torch.ops.xtoken, name).default: one._init_fn for name, one in operator.OPERATORS.items()},
    torch.ops.xtoken.add_cross_entropy_.default: operator.add_cross_entropy_._init_fn,
}
"""The operators of xtoken, which do their own work on a device."""


class FakeDevice(TorchDispatchMode):
    """Computes with tensors on `DEVICE`; `waits` and `copies` are what was done since they were last emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in OPERATORS:
            with self:
                return OPERATORS[function](*args, **kwargs)
        values = [*args, *kwargs.values()]
        flat = [one for value in values for one in (value if isinstance(value, (list, tuple)) else (value,))]
        given = [value for value in flat if isinstance(value, Tensor)]
        on_device = [value for value in given if isinstance(value, DeviceTensor)]
        if not on_device and all(value.type == "cpu" for value in flat if isinstance(value, torch.device)):
            return function(*args, **kwargs)
        # Inside an operator, operations that consist of others come here as a whole.
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:
                return function.decompose(*args, **kwargs)
        target = on_device[0].device if on_device else torch.device("cpu")
        wanted = kwargs.get("device")
        if wanted is not None:
            target = torch.device(wanted)
            kwargs = {**kwargs, "device": torch.device("cpu")}
        self._record(function, args, kwargs, given, target)
        if function is torch.ops.aten.copy_.default and not isinstance(args[0], DeviceTensor):
            target = torch.device("cpu")
        result = function(*map(_values, args), **{name: _values(value) for name, value in kwargs.items()})
        if target.type == "cpu":
            return result
        made = tree_map(lambda value: DeviceTensor(value, target) if isinstance(value, Tensor) else value, result)
        return return_and_correct_aliasing(function, args, kwargs, made) if on_device else made

    def _record(self, function: Any, args: Any, kwargs: Any, given: list[Tensor], target: torch.device) -> None:
        name = function.overloadpacket.__name__
        host = [value for value in given if not isinstance(value, DeviceTensor)]
        on_device = len(host) < len(given)
        if name in {"_to_copy", "copy_"}:
            source = args[0] if name == "_to_copy" else args[1]
            aim = target if name == "_to_copy" else args[0].device
            if aim.type == source.device.type:
                return
            blocking = kwargs.get("non_blocking", len(args) > 2 and args[2]) is not True
            if aim.type == "cpu" or blocking:
                self.waits.append(f"{name} to {aim}")
            self.copies.append(f"{name} to {aim}")
            return
        if not on_device:
            return
        if any(value.dim() for value in host):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found some on the CPU")
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.waits.append(name)
        if name in {"index", "index_put", "index_put_"}:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            filled = name != "index" and len(args[1]) == 1 and args[2].numel() == 1
            if masks and not filled:
                self.waits.append(f"{name} by a mask")


def _values(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_values(one) for one in value]
    return value.values if isinstance(value, DeviceTensor) else value


class DeviceMemory(emulated.CopiedMemory):
    """The emulator's memory for tensors that must be on the device."""

    device = DEVICE.index

    def input(self, tensor: Tensor | None) -> Array | None:
        return super().input(self._inside(tensor))

    def output(self, tensor: Tensor | None, keep: bool = False) -> Array | None:
        return super().output(self._inside(tensor), keep)

    def _inside(self, tensor: Tensor | None) -> Tensor | None:
        if isinstance(tensor, DeviceTensor):
            assert tensor.device == DEVICE
            return tensor.values
        assert tensor is None or tensor.data_ptr() in self.inside, "expected a tensor on the device"
        return tensor


@contextmanager
def memory(device: torch.device) -> Iterator[Memory]:
    """The emulator's memory for a call of `Kernels`."""
    assert device == DEVICE
    with emulated.load()[1].memory() as inside:
        call = DeviceMemory(inside)
        yield call
        call.give_back()


@contextmanager
def fake_device() -> Iterator[FakeDevice]:
    """The fake device, with the backend "fake" for it."""
    kernels = Kernels(emulated.load()[0], memory)
    register_backend(cuda_backend("fake", kernels, DEVICE.type))
    try:
        with FakeDevice() as device:
            yield device
    finally:
        unregister_backend("fake")
