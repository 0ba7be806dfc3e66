"""Tiny models and tokenizers: a student that packs digits, teachers that split them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import SMALL_TEXTS, make_tokenizer


@pytest.fixture(scope="session")
def student_tok() -> Any:
    return make_tokenizer(700, digits="{1,3}", bos="<s>")


@pytest.fixture(scope="session")
def teacher_tok() -> Any:
    return make_tokenizer(500, digits="", bos="<|begin|>")


@pytest.fixture
def texts() -> list[str]:
    return list(SMALL_TEXTS)


@pytest.fixture
def threads() -> Any:
    """One thread, so that results do not depend on how work is shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
