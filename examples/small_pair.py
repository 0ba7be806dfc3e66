"""What the examples need to run anywhere: two small tokenizers, texts, and a transformer; none of it distributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn

import xtoken

TEXTS = [
    f"In {1900 + 7 * k}, {13 * k + 100} readers paid ${k}.50 for {'a book' if k % 3 else 'two books'}, and read."
    for k in range(16)
]


def tokenizer(size: int, digits: str) -> tokenizers.Tokenizer:
    """A byte-level BPE; `digits` is how many make one piece."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(rf"\d{digits}| ?[^\s\d]+|\s+"), "isolated")
    bytes_of = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_of])
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return made


@dataclass
class Batch:
    """Texts as both models read them, padded with 0 to the lengths that are wanted."""

    student_ids: Tensor  # int64 [B, T]
    teacher_ids: Tensor  # int64 [B, S]
    labels: Tensor  # int64 [B, T], -100 at padding
    alignment: xtoken.Alignment


class Pair:
    """A student's and a teacher's tokenizer, with W between them."""

    def __init__(self) -> None:
        self.student, self.teacher = tokenizer(340, "{1,3}"), tokenizer(301, "")
        self.sizes = self.student.get_vocab_size(), self.teacher.get_vocab_size()
        self.W = xtoken.ProjectionMatrix.build(self.student, self.teacher)
        self._aligner = xtoken.Aligner(self.student, self.teacher)

    def batch(self, texts: Sequence[str], length: int = 64) -> Batch:
        """A batch; texts are cut at `length` tokens."""
        sides = [[one.ids[:length] for one in side.encode_batch(list(texts))] for side in (self.student, self.teacher)]
        alignment = self._aligner.align(*sides)
        ids = [torch.tensor([row + [0] * (length - len(row)) for row in side]) for side in sides]
        is_text = torch.tensor([[k < len(row) for k in range(length)] for row in sides[0]])
        labels = ids[0].masked_fill(~is_text, -100)
        return Batch(ids[0], ids[1], labels, xtoken.Alignment(alignment.spans, alignment.offsets, *ids))


class Attention(nn.Module):
    """Causal, with heads of `size`; a rank may have some of the heads."""

    def __init__(self, width: int, size: int = 8) -> None:
        super().__init__()
        self.size = size
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width)
        self.w1, self.w2 = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.w2(nn.functional.silu(self.w1(self.mlp_norm(x))))
        return out


class Transformer(nn.Module):
    """A small decoder: ids [B, T] to logits [B, T, V]."""

    def __init__(self, vocabulary: int, width: int, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Any:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))
