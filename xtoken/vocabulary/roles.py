"""Roles of special tokens, by which those of two tokenizers match whatever their text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

ROLES: dict[str, tuple[str, ...]] = {
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "end_of_turn": ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<turn|>", "<|end|>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "start_of_turn": ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|turn>", "<|start|>"),
    "end_of_header": ("<|end_header_id|>", "<|message|>"),
    "unk": ("<unk>", "[UNK]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>"),
}
"""Roles in order of precedence, each with well-known names, used where the tokenizer itself names no token."""

_ATTRIBUTES = {"eos": "eos_token_id", "bos": "bos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}

RESERVED = re.compile(r"(unused|reserved)[a-z_ ]*\d+", re.IGNORECASE)
"""In the names of special tokens that no text ever holds."""


MARK = re.compile(r"<.+>|\[.+\]")
"""Names of tokens that stand for no text, where nothing else says so."""


def find_roles(tokenizer: Any, special: Mapping[str, int]) -> dict[str, int]:
    """Roles from the tokenizer's attributes, then from well-known names among `special`."""
    roles: dict[str, int] = {}
    for role, names in ROLES.items():
        token_id = getattr(tokenizer, _ATTRIBUTES[role], None) if role in _ATTRIBUTES else None
        found = [special[name] for name in names if name in special] if token_id is None else [token_id]
        if found:
            roles[role] = found[0]
    return roles


def filler(roles: Mapping[str, int]) -> int | None:
    """What fills rows: the token for padding, else the end token; None if there is neither."""
    return roles.get("pad", roles.get("eos"))
