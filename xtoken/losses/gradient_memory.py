"""Memory for the gradients of large logits on the CPU, kept from call to call.

PyTorch gives memory of this size back to the system when a tensor ends, and for the next one the system has to clear
pages again: for logits of 16 bits an eighth of the time of a loss. What is kept here the system may take whenever it is
short of memory (MADV_FREE); until then it counts as the process's.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from queue import SimpleQueue

import torch
from torch import Tensor

SMALLEST = 32 << 20
"""Bytes from which on memory is kept. What is smaller glibc keeps by itself."""


def _new(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    block.madvise(mmap.MADV_FREE)  # refused where all memory of the process is locked
    return block


def _is_available() -> bool:
    try:
        import resource

        _new(mmap.PAGESIZE)
    except (ImportError, AttributeError, OSError):  # another system, or a Linux without them
        return False
    # Where addresses are limited (ulimit -v, -d), others would lack those of what is kept.
    limits = (resource.getrlimit(one)[0] for one in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return all(limit == resource.RLIM_INFINITY for limit in limits)


AVAILABLE = _is_available()

_lock = threading.RLock()  # a handler of a signal may fork while its own thread has it
if AVAILABLE:  # else a process forked while another thread has the lock would wait for ever
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_idle: list[mmap.mmap] = []
_returned: SimpleQueue[mmap.mmap] = SimpleQueue()
"""Blocks whose tensors have ended, which may be at any moment, also while somebody holds the lock."""


def empty_like(logits: Tensor) -> Tensor:
    """A contiguous tensor of the type and shape of logits, whose values are not set. Where its memory is kept it cannot
    be resized to more."""
    is_kept = AVAILABLE and type(logits) is Tensor and logits.device.type == "cpu" and logits.nbytes >= SMALLEST
    block = _take(logits.nbytes) if is_kept else None
    if block is None:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    # The tensor keeps the view, which ends with its memory and with that of all that share it.
    view = memoryview(block)
    weakref.finalize(view, _give_back, block).atexit = False
    storage = torch.frombuffer(view, dtype=logits.dtype, count=logits.numel()).untyped_storage()
    # not a view of another tensor
    return torch.empty(0, dtype=logits.dtype, device="cpu").set_(storage).resize_(logits.shape)


def release() -> None:
    """Gives what is kept, and not in use, back to the system."""
    with _lock:
        _collect()
        _idle.clear()


def _collect() -> None:
    while not _returned.empty():
        _idle.append(_returned.get_nowait())


def _take(size: int) -> mmap.mmap | None:
    """The smallest block that is large enough. If there is none, those that are there are given back to the system, and
    it is a new one; None where the system refuses that, which torch says in its own words."""
    with _lock:
        _collect()
        fitting = [block for block in _idle if len(block) >= size]
        if fitting:
            block = min(fitting, key=len)
            _idle.remove(block)
            return block
        _idle.clear()
    try:
        return _new(size)
    except OSError:
        return None


def _give_back(block: mmap.mmap) -> None:
    block.madvise(mmap.MADV_FREE)
    _returned.put(block)
