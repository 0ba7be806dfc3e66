"""Tiny models and tokenizers: a student that packs digits, teachers that split them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))  # the fake device
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))  # processes

import pytest
import torch
from chats import cached, small_chat
from small import SMALL_TEXTS, make_model, make_tokenizer


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


@pytest.fixture(scope="session")
def chat_tok(tokenizer: Any) -> Any:
    """A real tokenizer with the chat template of its model, by its name in LOADERS."""
    return cached(tokenizer)


@pytest.fixture(scope="session")
def small_chat_tok() -> Any:
    """A small tokenizer with the special tokens and the chat template of a model, by name."""
    sizes = {"llama3": (700, "{1,3}"), "qwen3": (500, ""), "gemma3": (450, ""), "mistral": (600, "{1,2}")}
    made = {name: small_chat(name, *size) for name, size in sizes.items()}
    made["qwen3x"] = small_chat("qwen3", 650, "{1,2}")
    return made.__getitem__


@pytest.fixture(scope="module")
def folders(student_tok, teacher_tok, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for name, tok, seed in (("student", student_tok, 0), ("teacher", teacher_tok, 1), ("twin", student_tok, 2)):
        make_model(len(tok), seed).save_pretrained(root / name)
        tok.save_pretrained(root / name)
    lines = [json.dumps({"text": text}) for text in SMALL_TEXTS]
    (root / "train.jsonl").write_text("\n".join(lines[:16]) + "\n")
    (root / "test.jsonl").write_text("\n".join(lines[16:]) + "\n")
    return {path.stem: str(path) for path in root.iterdir()}
