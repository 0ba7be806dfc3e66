"""XTokenCollator: encoded examples to a batch, one a row or several packed into one row."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xtoken.alignment import Alignment, pad_rows
from xtoken.losses import TopKLogits
from xtoken.losses.backends import IGNORED
from xtoken.losses.call import check_sequence
from xtoken.vocabulary import TokenizerLike, Vocabulary
from xtoken.vocabulary.roles import filler

from .routing import is_routed, label_spans


def pack(examples: Sequence[Mapping[str, Any]], max_length: int) -> list[list[int]]:
    """Examples that share a row: best fit, longest first.

    Numbers of the examples of each row, in increasing order; the rows in the order of their first example.

    Parameters
    ----------
    examples : sequence of encoded examples
        As `xtoken.train.ExampleEncoder` makes them.
    max_length : int
        Most student tokens of a row; one longer example has a row of its own.
    """
    lengths = [len(example["student_ids"]) for example in examples]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        fit = bisect.bisect_left(room, (lengths[k], -1))
        if fit < len(room):
            free, row = room.pop(fit)
            rows[row].append(k)
        else:
            free, row = max_length, len(rows)
            rows.append([k])
        bisect.insort(room, (free - lengths[k], row))
    return sorted(sorted(row) for row in rows)


class XTokenCollator:
    """Puts encoded examples together to a batch.

    Parameters
    ----------
    student_tok : tokenizer
        As for `Vocabulary.from_tokenizer`. Its pad token, else its end token, fills the rows.
    teacher_toks : sequence of tokenizers
        One for each teacher, likewise.
    packed : bool
        Whether to put several examples of a batch into one row, of at most `max_length` student tokens.
    max_length : int, optional
        Required with `packed`.

    Raises ValueError if a tokenizer has neither a pad nor an end token, saying which; for `packed` without
    `max_length`, or with torch before 2.6, where transformers does not keep the examples of a row apart.

    Examples
    --------
    >>> vocabulary = Vocabulary([b"<pad>", b"a", b"b"], roles={"pad": 0})
    >>> one = {"student_ids": [1, 2], "labels": [-100, 2], "teachers": [{"ids": [1, 2], "spans": [[1, 2, 1, 2]]}]}
    >>> two = {"student_ids": [2], "labels": [-100], "teachers": [{"ids": [2], "spans": []}]}
    >>> batch = XTokenCollator(vocabulary, [vocabulary])([one, two])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["teachers"][0]["alignment"].offsets.tolist()
    ([[1, 2], [2, 0]], [[-100, 2], [-100, -100]], [0, 1, 1])
    """

    def __init__(
        self,
        student_tok: TokenizerLike,
        teacher_toks: Sequence[TokenizerLike] = (),
        *,
        packed: bool = False,
        max_length: int | None = None,
    ) -> None:
        if packed and max_length is None:
            raise ValueError("max_length: expected the most tokens of a packed row, got None")
        check_sequence(teacher_toks, "teacher_toks", "tokenizers")
        self.packed = packed
        self.max_length = max_length
        self.student_pad_id = _pad_id(student_tok, "student_tok")
        self.teacher_pad_ids = [_pad_id(tok, f"teacher_toks[{k}]") for k, tok in enumerate(teacher_toks)]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of B rows.

        ``input_ids`` and ``labels`` int64 [B, T], padded on the right; ``attention_mask`` int64 [B, T], 1 for tokens;
        ``teachers``: for each a dict of ``input_ids``, ``attention_mask`` and ``alignment``, or of ``alignment`` None
        if it reads the student's ids; and of ``logits``, `TopKLogits` [B, T, k], if it is cached. Examples that are not
        routed to a teacher are in none of its chunks; one that reads the student's ids then has an ``alignment`` too.
        Where an example has them, also ``ce_labels`` int64 [B, T], those of the cross-entropy; of the others they are
        the labels.

        With `packed`, ``position_ids`` int64 [B, T], which begin again at 0 with each example (and with the padding),
        in place of ``attention_mask``: that is how the models of transformers know that examples must not see each
        other. No chunk or label is at the first token of an example.

        Raises ValueError if there are no examples, or if one has more or fewer teachers than the others.
        """
        if not examples:
            raise ValueError("examples: expected at least one")
        if missing := {"student_ids", "labels", "teachers"} - examples[0].keys():
            raise ValueError(
                f"examples: expected what ExampleEncoder makes of a row (EncodedDataset), got {sorted(examples[0])} "
                f"without {', '.join(sorted(missing))}"
            )
        if self.packed and self.max_length is not None:
            rows = [[examples[k] for k in row] for row in pack(examples, self.max_length)]
        else:
            rows = [[example] for example in examples]
        counts = {len(example["teachers"]) for example in examples}
        if counts != {len(self.teacher_pad_ids)}:
            raise ValueError(f"examples: expected {len(self.teacher_pad_ids)} teachers each, got {sorted(counts)}")
        batch = self._side([[example["student_ids"] for example in row] for row in rows], self.student_pad_id)
        batch["labels"] = self._labels([[example["labels"] for example in row] for row in rows], batch)
        if any("ce_labels" in example for example in examples):
            own = [[example.get("ce_labels", example["labels"]) for example in row] for row in rows]
            batch["ce_labels"] = self._labels(own, batch)
        batch["teachers"] = [self._teacher(rows, m, batch) for m in range(len(self.teacher_pad_ids))]
        return batch

    def _side(self, rows: Sequence[Sequence[Any]], pad_id: int) -> dict[str, Any]:
        ids = [np.concatenate([np.asarray(one, np.int64) for one in row]) for row in rows]
        side: dict[str, Any] = {"input_ids": pad_rows(ids, pad_id)}
        if not self.packed:
            side["attention_mask"] = pad_rows([np.ones_like(row) for row in ids], 0)
            return side
        width = side["input_ids"].shape[1]
        sizes = [[*map(len, row), width - len(flat)] for row, flat in zip(rows, ids, strict=True)]
        positions = [[torch.arange(size, device="cpu") for size in row] for row in sizes]
        side["position_ids"] = torch.stack([torch.cat(row) for row in positions])
        return side

    def _labels(self, rows: Sequence[Sequence[Any]], batch: Mapping[str, Tensor]) -> Tensor:
        labels = pad_rows([np.concatenate([np.asarray(one, np.int64) for one in row]) for row in rows], IGNORED)
        labels[batch["position_ids"] == 0 if self.packed else np.s_[:, :1]] = IGNORED  # which nothing predicts
        return labels

    def _teacher(self, rows: Sequence[Sequence[Mapping[str, Any]]], m: int, batch: Mapping[str, Any]) -> dict[str, Any]:
        entries = [[example["teachers"][m] for example in row] for row in rows]
        direct = [entry["ids"] is None for row in entries for entry in row]
        side: dict[str, Any] = {"alignment": None}
        if any("logits" in entry for row in entries for entry in row):
            side["logits"] = collate_logits([[entry["logits"] for entry in row] for row in entries])
        if any(direct) and not all(direct):
            raise ValueError(f"examples: expected ids of teacher {m} in all or in none, got {len(direct)} mixed")
        if all(direct) and all(is_routed(example, m) for row in rows for example in row):
            return side
        if not any(direct):
            side.update(self._side([[entry["ids"] for entry in row] for row in entries], self.teacher_pad_ids[m]))

        def part(example: Mapping[str, Any]) -> tuple[Any, int, int]:
            entry, own = example["teachers"][m], example["student_ids"]
            spans = label_spans(example["labels"]) if any(direct) else entry["spans"]
            return spans if is_routed(example, m) else [], len(own), len(own if any(direct) else entry["ids"])

        parts = [[part(example) for example in row] for row in rows]
        alignment = row_alignment(parts, batch["input_ids"], side.get("input_ids", batch["input_ids"]))
        return {**side, "alignment": alignment.supervised(batch["labels"])}


def row_alignment(
    rows: Sequence[Sequence[tuple[Any, int, int]]], student_ids: Tensor, teacher_ids: Tensor
) -> Alignment:
    """Of rows of examples, one behind the other: of each its spans [K, 4], and its tokens on both sides. Nothing
    predicts a chunk at the first token of an example."""
    spans, predicted = [], []
    for row in rows:
        shift = np.zeros(4, np.int64)
        for given, *sizes in row:
            part = np.asarray(given, np.int64).reshape(-1, 4)
            spans.append(part + shift)
            predicted.append((part[:, ::2] > 0).all(axis=1))
            shift += np.repeat(sizes, 2)
    ends = np.cumsum([0, *map(len, rows)])
    offsets = np.cumsum([0, *map(len, spans)])[ends]
    return Alignment(np.concatenate(spans), offsets, student_ids, teacher_ids, predicted=np.concatenate(predicted))


def collate_logits(rows: Sequence[Sequence[TopKLogits]]) -> TopKLogits:
    """Log-probabilities [B, T, k] of rows, each of one or several examples; padded with ids of -1."""
    ids = pad_sequence([torch.cat([one.ids for one in row]) for row in rows], True, -1)
    logprobs = pad_sequence([torch.cat([one.logprobs for one in row]) for row in rows], True, -torch.inf)
    return TopKLogits(ids, logprobs, rows[0][0].tail)


@dataclass
class OnHost:
    """A batch as its collator made it. Nothing moves it to a device, so what reads it there waits for nothing."""

    batch: Mapping[str, Any]
    examples: Sequence[Mapping[str, Any]] | None = None
    """Those that it was made of, where they are kept."""


def keep_host(collator: Any, examples: Any, keeps_examples: bool = False) -> dict[str, Any]:
    """A collator's batch that brings itself along as ``"host"``, an `OnHost`; alignments are there alone."""
    batch = collator(examples)
    entries = [{key: one for key, one in entry.items() if key != "alignment"} for entry in batch["teachers"]]
    return {**batch, "teachers": entries, "host": OnHost(batch, examples if keeps_examples else None)}


def _pad_id(tokenizer: TokenizerLike, name: str) -> int:
    pad = filler(Vocabulary.from_tokenizer(tokenizer).roles)
    if pad is None:
        raise ValueError(f"{name}: expected a pad or an end token to fill rows with, got neither; set its pad_token")
    return pad
