"""Keeps torch from starting threads for tiny tensors; a backend for calls that must fail before they reach one, and
little shared memory for the CUDA kernels."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import emulated
import pytest
import torch

from xtoken.losses import plain
from xtoken.losses.backends import Kernel, register_backend, unregister_backend

torch.set_num_threads(1)


@pytest.fixture
def shared_limit() -> Iterator[Any]:
    """Sets what shared memory a block of the emulated multiprocessors may have."""
    controls = emulated.load()[1]
    yield controls.set_shared_limit
    controls.set_shared_limit()


@pytest.fixture
def never_run() -> Iterator[str]:
    """The name of a backend that must not be reached: what is wrong with a call is found before."""

    def run(*arguments: Any) -> Any:
        pytest.fail("the call reached the backend")

    register_backend(replace(plain.backend("never_run"), kernel=lambda loss: Kernel(run)))
    yield "never_run"
    unregister_backend("never_run")
