"""Fixtures of all tests: real tokenizers and their vocabularies, one of each a session; tests that need a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from real_tokenizers import LOADERS

from xtoken import Vocabulary


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` run wherever there is a GPU; those of the losses' backend "on_gpu" are marked here."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value == "on_gpu" for value in parameters):
            item.add_marker(pytest.mark.cuda)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A tokenizer by its name in LOADERS."""
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            loaded[name] = LOADERS[name](tmp_path_factory.mktemp(name))
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Callable[[str], Any]) -> Callable[[str], Vocabulary]:
    """A vocabulary by its name in LOADERS."""
    parsed: dict[str, Vocabulary] = {}

    def get(name: str) -> Vocabulary:
        if name not in parsed:
            parsed[name] = Vocabulary.from_tokenizer(tokenizer(name))
        return parsed[name]

    return get
