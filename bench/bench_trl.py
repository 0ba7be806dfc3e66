"""Our losses beside those of TRL's GOLDTrainer, on the same logits and text: seconds, memory, and values.

One text full of numbers, tokenized by Llama 3 (student) and Qwen3 (teacher), with random float32 logits; forward and
backward, in seconds that all threads computed, whoever else does: the median of the runs after a first, or the first
where that takes long. TRL compares whole completions, so the first token, which no row predicts, is the prompt.
Its loss is "sorted" or "hybrid" (tokens of both vocabularies by name, the others sorted), and gathers a chunk's rows as
"observed" (its default) or "bayesian". Values agree where the definitions do: sorted and bayesian, on text whose chunks
are one token on both sides (the run stops if they differ there). Else they do not: "observed" reads the row *at* a
token, not the one that predicts it; TRL multiplies one row by the probabilities of a chunk's other tokens, where ours
averages; and its hybrid weighs both parts by their share of the vocabulary. Needs ``pip install trl``. Results go to
bench/results/trl.json.

    python bench/bench_trl.py [--words 70] [--repeat 5] [--threads 2]
"""

from __future__ import annotations

import math
import os
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from bench_losses import numbers_text
from cases import Pair as Needed
from cases import cases
from measure import Row, load_tokenizers, machine, median_seconds, parser, peak_growth, table, timed, write_rows
from real_tokenizers import encode
from torch import Tensor

import xtoken
from xtoken import Vocabulary
from xtoken.losses.loss import Needs

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
LONG = 5.0
"""CPU seconds of a first run after which there is no other."""

CONFIG = {
    "uld_crossentropy_weight": 0.0, "uld_distillation_weight": 1.0, "uld_student_temperature": 1.0,
    "uld_teacher_temperature": 1.0, "uld_skip_student_eos": False, "uld_skip_teacher_eos": False,
    "use_extended_uld": True, "uld_hybrid_matched_weight": None, "uld_hybrid_unmatched_weight": None, "beta": 0.0,
}  # fmt: skip


class Inputs:
    """Two vocabularies, and random logits for what both make of a text."""

    def __init__(self, vocabularies: Sequence[Vocabulary], ids: Sequence[Sequence[int]], seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.vocabularies = vocabularies
        self.ids = [torch.tensor([one]) for one in ids]
        self.logits = [
            torch.randn(1, len(one), len(vocabulary), generator=draw)
            for one, vocabulary in zip(ids, vocabularies, strict=True)
        ]
        self.alignment = xtoken.Aligner(*vocabularies).align(*self.ids)

    def trl(self, strategy: str, hybrid: bool) -> Callable[[Tensor], Tensor]:
        """TRL's loss of the student's logits."""
        from trl.experimental.gold.gold_trainer import ULDLoss

        config = SimpleNamespace(**CONFIG, uld_token_merge_strategy=strategy, uld_use_hybrid_loss=hybrid)
        loss = ULDLoss(config, *(vocabulary.tokenizer for vocabulary in self.vocabularies))
        labels = [torch.where(torch.arange(ids.shape[1]) > 0, ids, -100) for ids in self.ids]
        offsets = [
            byte_offsets(vocabulary, ids[0].tolist())
            for vocabulary, ids in zip(self.vocabularies, self.ids, strict=True)
        ]
        return lambda z: loss(z, self.logits[1], *labels, *self.ids, *offsets)


def byte_offsets(vocabulary: Vocabulary, ids: Sequence[int]) -> Tensor:
    """int64 [1, T, 2]: where each token's text begins and ends."""
    lengths = torch.tensor([len(vocabulary[token]) for token in ids])
    return torch.stack([lengths.cumsum(0) - lengths, lengths.cumsum(0)], -1)[None]


def step(loss: Callable[[Tensor], Any], logits: Tensor) -> float:
    """Forward and backward; the loss."""
    z = logits.clone().requires_grad_()
    value = loss(z)
    value.backward()
    return float(value.detach())


def same_values(vocabularies: Sequence[Vocabulary]) -> Row:
    """The sorted losses of both where every chunk is one token on both sides."""
    text = "the and of to in is that for it as was with be by on not he"
    pair = Inputs(vocabularies, [encode(vocabulary.tokenizer, text) for vocabulary in vocabularies])
    assert pair.ids[0].shape == pair.ids[1].shape == (1, 17), "every word is a token of both"
    ours = next(case for case in cases() if case.loss.needs is Needs.NOTHING and case.loss.kernels.endswith(".ranked"))
    row = {
        "TRL": step(pair.trl("bayesian", False), pair.logits[0]),
        "ours": step(lambda z: ours(z, pair.logits[1], pair.alignment, Needed(None, None)), pair.logits[0]),
    }
    if not math.isclose(row["TRL"], row["ours"], rel_tol=1e-5):
        raise SystemExit(f"the losses differ where their definitions agree: {row}")
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "trl.json")
    for name, value in {"words": 70, "repeat": 5, "threads": 2}.items():
        options.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    given: Namespace = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    vocabularies = [Vocabulary.from_tokenizer(one) for one in load_tokenizers("llama3", "qwen3")]
    values = same_values(vocabularies)
    text = numbers_text(0, given.words)
    pair = Inputs(vocabularies, [encode(vocabulary.tokenizer, text) for vocabulary in vocabularies])
    needed = Needed(xtoken.ProjectionMatrix.build(*vocabularies), xtoken.PieceIndex.build(*vocabularies))
    losses: dict[str, Callable[[Tensor], Any]] = {
        f"TRL, {compared}, {strategy}": pair.trl(strategy, hybrid)
        for hybrid, compared in ((False, "sorted"), (True, "hybrid"))
        for strategy in ("observed", "bayesian")
    }
    for case in cases():
        if not case.same_tokenizer:
            losses[case.name] = lambda z, case=case: case(z, pair.logits[1], pair.alignment, needed)
    rows: list[Row] = []
    cpu_seconds = partial(timed, clock=time.process_time)
    for name, loss in losses.items():
        found: list[float] = []
        first: list[float] = []
        run = partial(lambda loss, found: found.append(step(loss, pair.logits[0])), loss, found)
        peak = peak_growth(partial(lambda run, first: first.append(cpu_seconds(run)), run, first))
        seconds = first[0] if first[0] > LONG else median_seconds(run, given.repeat, cpu_seconds, warm=0)
        megabytes = None if peak is None else peak // 2**20
        rows.append({"loss": name, "CPU seconds": seconds, "peak MB": megabytes, "value": found[0]})
    facts = machine("torch", "trl", threads=given.threads, tokens=[one.shape[1] for one in pair.ids], values=values)
    write_rows(given.output, facts, rows, ("loss",))
    print("tokens of Llama 3, of Qwen3:", facts["tokens"], "sorted loss of one token each:", values)
    print(table(rows))


if __name__ == "__main__":
    main()
