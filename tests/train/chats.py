"""What the tests of chats share: real tokenizers with chat templates, and conversations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from small import make_tokenizer

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"

SPECIALS: dict[str, dict[str, str]] = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "gemma3": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
}


def with_template(name: str, tokenizer: Any) -> Any:
    """A copy of a tokenizer, as transformers wraps it, with the chat template of its model."""
    from transformers import PreTrainedTokenizerFast

    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    copy = PreTrainedTokenizerFast(tokenizer_object=type(backend).from_str(backend.to_str()), **SPECIALS.get(name, {}))
    if name == "qwen3":
        copy.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    template = TEMPLATES / f"{name}.jinja"
    copy.chat_template = template.read_text() if template.exists() else tokenizer.chat_template
    return copy


def small_chat(name: str, size: int, digits: str, *, added: tuple[str, ...] = ()) -> Any:
    """A small tokenizer with the special tokens and the chat template of a model."""
    tokens = {
        "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "gemma3": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "mistral": ["<s>", "</s>"],
    }[name]
    tokenizer = make_tokenizer(size, digits, bos="<unused>")
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens(tokens)
    copy = with_template(name, backend)
    copy.add_tokens(list(added))
    return copy


def cached(tokenizer: Callable[[str], Any]) -> Callable[[str], Any]:
    """`with_template` by name, one of each."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = with_template(name, tokenizer(name))
        return made[name]

    return get


def pieces_of(example: dict[str, Any], student: Any, teacher: Any, entry: int = 0) -> list[tuple[bytes, bytes]]:
    """The bytes of both sides of every chunk that is trained on; `student` and `teacher` are vocabularies."""
    part = example["teachers"][entry]
    return [
        (
            b"".join(student[i] for i in example["student_ids"][a:b].tolist()),
            b"".join(teacher[i] for i in part["ids"][c:d].tolist()),
        )
        for a, b, c, d in part["spans"].tolist()
        if all(example["labels"][a:b] != -100)
    ]


def joined(chunks: list[tuple[bytes, bytes]], side: int = 0) -> str:
    return b"".join(chunk[side] for chunk in chunks).decode()


def trained_text(example: dict[str, Any], student: Any) -> str:
    """The bytes of all labels."""
    return b"".join(student[i] for i in example["labels"].tolist() if i != -100).decode()
