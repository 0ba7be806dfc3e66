"""Keeps torch from starting threads for tiny tensors; a backend for calls that must fail before they reach one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from xtoken.losses.backends import Backend, register_backend, unregister_backend

torch.set_num_threads(1)


@pytest.fixture
def never_run() -> Iterator[str]:
    """The name of a backend that must not be reached: what is wrong with a call is found before."""

    def run(*arguments: Any) -> Any:
        pytest.fail("the call reached the backend")

    register_backend(Backend("never_run", lambda loss: run, lambda device: None))
    yield "never_run"
    unregister_backend("never_run")
