"""Memory of large gradients, kept from call to call: when it is used again, and what is the same as without it."""

from __future__ import annotations

import copy
import errno
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from xtoken.losses import Needs, gradient_memory, registered

pytestmark = pytest.mark.skipif(not gradient_memory.AVAILABLE, reason="memory is kept on Linux")

LARGE = torch.empty(gradient_memory.SMALLEST // 256, 128, dtype=torch.bfloat16)
LARGER = torch.empty(gradient_memory.SMALLEST // 256 + 1, 128, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    gradient_memory.release()
    yield
    gradient_memory.release()


def test_memory_is_used_again_when_all_that_share_it_have_ended() -> None:
    gradient = gradient_memory.empty_like(LARGE)
    assert (gradient.shape, gradient.dtype, gradient.is_contiguous()) == (LARGE.shape, LARGE.dtype, True)
    assert not gradient._is_view()
    address, part = gradient.data_ptr(), gradient[3:]
    del gradient
    other = gradient_memory.empty_like(LARGE)
    assert other.data_ptr() != address
    del part
    assert gradient_memory.empty_like(LARGE).data_ptr() == address
    del other
    gradient_memory.release()
    assert not gradient_memory._idle


def test_of_another_type_or_shape() -> None:
    address = gradient_memory.empty_like(LARGER).data_ptr()
    other = gradient_memory.empty_like(LARGE.view(torch.float32).flatten().t())
    assert (other.data_ptr(), other.shape, other.dtype) == (address, (LARGE.nbytes // 4,), torch.float32)
    assert other.untyped_storage().nbytes() == other.nbytes


def test_blocks_that_are_too_small_are_not_kept() -> None:
    held = gradient_memory.empty_like(LARGE), gradient_memory.empty_like(LARGE)
    del held
    larger = gradient_memory.empty_like(LARGER)
    assert not gradient_memory._idle
    assert gradient_memory._returned.empty()
    del larger


@pytest.mark.parametrize("other", [LARGE[1:], LARGE.to("meta"), torch.nn.Parameter(LARGE, requires_grad=False)])
def test_all_else_is_left_to_torch(other: torch.Tensor) -> None:
    result = gradient_memory.empty_like(other)
    assert (result.shape, result.device) == (other.shape, other.device)
    del result
    assert gradient_memory._returned.empty()


def test_no_memory_is_an_error_of_torch() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        gradient_memory.empty_like(torch.empty(1, dtype=torch.bfloat16).expand(2**46))


def test_the_system_may_take_what_is_kept() -> None:
    large, before = LARGE.repeat(4, 1), held_bytes()
    gradient = gradient_memory.empty_like(large).fill_(1)
    assert held_bytes() - before > 0.75 * large.nbytes
    del gradient
    assert held_bytes() - before < 0.25 * large.nbytes


def held_bytes() -> int:
    """Of this process, without what the system may take without asking."""
    fields = [line.split() for line in Path("/proc/self/smaps").read_text().splitlines()]
    total = {name: sum(int(field[1]) for field in fields if field[0] == name) for name in ("Rss:", "LazyFree:")}
    return 1024 * (total["Rss:"] - total["LazyFree:"])


def test_of_a_forked_process_is_its_own() -> None:
    gradient = gradient_memory.empty_like(LARGE).fill_(1)
    child = os.fork()
    if child == 0:
        gradient.view(-1)[:8] = 2
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert bool((gradient == 1).all())


def test_a_process_may_fork_while_another_thread_has_the_lock() -> None:
    has = threading.Event()

    def hold() -> None:
        with gradient_memory._lock:
            has.set()
            time.sleep(0.1)

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait()
    child = os.fork()
    if child == 0:
        os._exit(not gradient_memory._lock.acquire(blocking=False))
    assert os.waitpid(child, 0)[1] == 0
    thread.join()


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_nothing_is_kept_where_addresses_are_limited(kind: int) -> None:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (2**50, before[1]))
    try:
        assert not gradient_memory._is_available()
    finally:
        resource.setrlimit(kind, before)
    assert gradient_memory._is_available()


def test_memory_that_the_system_refuses_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> None:
        raise OSError(errno.EINVAL, "madvise", size)

    monkeypatch.setattr(gradient_memory, "_new", refuse)
    assert gradient_memory.empty_like(LARGE).shape == LARGE.shape
    assert gradient_memory._returned.empty()


def test_is_like_other_memory() -> None:
    gradient = gradient_memory.empty_like(LARGE).fill_(1)
    assert torch.equal(copy.deepcopy(gradient), gradient)
    assert torch.equal(gradient.clone().share_memory_(), gradient)
    assert gradient.view(torch.int16).numpy().sum(dtype="int64") == gradient.numel() * 0x3F80


def test_of_threads() -> None:
    wrong = []

    def use(value: int) -> None:
        for _ in range(20):
            gradient = gradient_memory.empty_like(LARGE)
            gradient[0] = value
            if not bool((gradient[0] == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=use, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_of_a_loss_do_not_share_memory_that_is_in_use() -> None:
    loss = next(one for one in registered().values() if one.needs is Needs.SAME_TOKENIZER)
    torch.manual_seed(0)
    size, rows = 60_000, 1 + gradient_memory.SMALLEST // 240_000
    student, teacher = torch.randn(1, rows, size), torch.randn(1, rows, size)

    def gradient() -> torch.Tensor:
        leaf = student.clone().requires_grad_()
        loss.function()(leaf, teacher).backward()
        assert leaf.grad is not None
        return leaf.grad

    first = gradient()
    kept = first.clone()
    second = gradient()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)
    assert torch.equal(second, kept)
    address = second.data_ptr()
    del second
    third = gradient()
    assert third.data_ptr() == address
    assert torch.equal(third, kept)
