"""Cached teachers in training: a dataset that adds log-probabilities, and the command ``xtoken cache-teacher``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from xtoken.losses import TopKLogits
from xtoken.teacher_cache import TeacherCache, cache_teacher

from .data import encoded, read_rows
from .encode import ExampleEncoder
from .teachers import load_model


class CachedExamples(Dataset[dict[str, Any]]):
    """Examples with the log-probabilities of teachers that were run before.

    Parameters
    ----------
    examples : dataset
        Of what ``ExampleEncoder(..., name_documents=True)`` makes.
    caches : sequence of TeacherCache or None
        One for each teacher; None for one that runs along.

    Raises ValueError if there are more or fewer caches than an example has teachers.
    """

    def __init__(self, examples: Dataset[dict[str, Any]], caches: Sequence[TeacherCache | None]) -> None:
        self.examples: Any = examples
        self.caches = list(caches)
        if len(self) and len(examples[0]["teachers"]) != len(self.caches):
            raise ValueError(f"caches: expected {len(examples[0]['teachers'])}, one a teacher, got {len(self.caches)}")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example, in which a cached teacher also has ``logits``, `TopKLogits` [T, k] of its tokens.

        Raises ValueError if the cache does not hold the example's document.
        """
        example = self.examples[index]
        pairs = zip(example["teachers"], self.caches, strict=True)
        found = [entry if cache is None else self._with_logits(entry, cache, example, index) for entry, cache in pairs]
        return {**example, "teachers": found}

    @staticmethod
    def _with_logits(entry: dict[str, Any], cache: TeacherCache, example: dict[str, Any], index: int) -> dict[str, Any]:
        document = cache.find(entry["document"])
        if document is None:
            raise ValueError(
                f"example {index}: not in the teacher cache {cache.path}, which was made from other text, or with "
                "another chat template"
            )
        ids = example["student_ids"] if entry["ids"] is None else entry["ids"]
        rows = slice(entry["first"], entry["first"] + len(ids))
        logits = TopKLogits(document.logits.ids[rows], document.logits.logprobs[rows], document.logits.tail)
        entry = {**entry, "logits": logits}
        if len(logits.ids) < len(ids):  # the cache holds only the beginning of the document
            if entry["ids"] is None:
                raise ValueError(
                    f"example {index}: the teacher cache {cache.path} was cut at {cache.max_length} tokens; expected "
                    f"max_length of at most that, got {len(ids)} tokens"
                )
            spans = np.asarray(entry["spans"])
            entry.update(ids=ids[: len(logits.ids)], spans=spans[spans[:, 3] <= len(logits.ids)])
        return entry


def teacher_documents(tokenizer: Any, rows: Iterator[dict[str, Any]], text_column: str = "text") -> Iterator[Any]:
    """What a teacher reads of each row, as token ids, whole: by its own chat template where there are messages."""
    for examples in encoded(rows, ExampleEncoder(tokenizer, [], text_column=text_column)):
        yield from (example["student_ids"] for example in examples)


def main(options: argparse.Namespace) -> str:
    """Runs ``xtoken cache-teacher``; returns a summary."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(
        options.teacher, dtype=options.dtype, device=device, trust_remote_code=options.trust_remote_code
    )
    documents = teacher_documents(tokenizer, read_rows(options.data, options.text_column), options.text_column)
    cache = cache_teacher(
        model.eval(), tokenizer, documents, options.output, top_k=options.logprobs, max_length=options.max_length,
        batch_tokens=options.batch_tokens, resume=options.resume,
    )  # fmt: skip
    return f"{options.output}: {len(cache)} documents, {cache.top_k} log-probabilities a token"
