"""Keeps torch from starting threads for tiny tensors; a backend for calls that must fail before they reach one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from xtoken.losses import plain
from xtoken.losses.backends import Kernel, register_backend, unregister_backend

torch.set_num_threads(1)


@pytest.fixture
def never_run() -> Iterator[str]:
    """The name of a backend that must not be reached: what is wrong with a call is found before."""

    def run(*arguments: Any) -> Any:
        pytest.fail("the call reached the backend")

    register_backend(replace(plain.backend("never_run"), kernel=lambda loss: Kernel(run)))
    yield "never_run"
    unregister_backend("never_run")
