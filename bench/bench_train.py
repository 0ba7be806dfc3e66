"""Peak memory and time of a training step, from logits and from hidden states and output layer (``--fused``).

A small random Llama with Llama 3's vocabulary learns from one with Qwen3's, with the default loss of a projection over
all columns, on text full of numbers: one micro-batch through `XTokenTrainer`, forward and backward, in float32. Memory
is what the process grows by at most, beyond weights and their gradients; seconds are those that processors worked,
whoever else computes. With ``scaling="fixed"`` (and in a step of several micro-batches) the losses know
their factors and compute logits once a loss; with "dynamic" a second time in backward. Gradients of both ways are
compared first. Results go to bench/results/train_memory.json.

    python bench/bench_train.py [--rows 1 4] [--length 256 512] [--hidden 512] [--threads 2]
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_losses import numbers_text
from default_losses import DEFAULT
from measure import Row, load_tokenizers, machine, parser, peak_growth, table, write_rows
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xtoken import ProjectionMatrix, Teacher
from xtoken.losses.loss import Needs
from xtoken.train import EncodedDataset, ExampleEncoder, TeacherModel, XTokenCollator, XTokenConfig, XTokenTrainer
from xtoken.train.fused import Fused, logit_bytes
from xtoken.train.teachers import ensure_pad_token

WAYS = ("off", "on")
TOLERANCE = 1e-3
"""Of the largest gradient of a weight: sums of thousands of terms in float32, in another order."""


def small_model(vocabulary: int, hidden: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=8192, bos_token_id=None,
            eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip


class Bench:
    """A trainer whose steps are measured."""

    def __init__(self, hidden: int, folder: Path) -> None:
        self.tokenizers = [PreTrainedTokenizerFast(tokenizer_object=one) for one in load_tokenizers("llama3", "qwen3")]
        for one in self.tokenizers:
            ensure_pad_token(one)
        student_tok, teacher_tok = self.tokenizers
        loss = DEFAULT[Needs.PROJECTION]
        objective = Teacher(projection=ProjectionMatrix.build(*self.tokenizers), loss=loss, top_k=None)
        teacher = TeacherModel(objective, small_model(len(teacher_tok), hidden, 1), teacher_tok)
        config = XTokenConfig(
            output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, scaling="fixed", fused="off"
        )
        self.trainer = XTokenTrainer(
            small_model(len(student_tok), hidden, 0), config, [teacher], processing_class=student_tok
        )
        self.trainer.create_optimizer()
        self.trainer.model.train()

    def batch(self, rows: int, length: int) -> dict[str, Any]:
        """Rows of so many tokens of the student."""
        encoder = ExampleEncoder(self.tokenizers[0], self.tokenizers[1:], max_length=length)
        examples = EncodedDataset([{"text": numbers_text(0, rows * length)}], encoder)
        batch = XTokenCollator(self.tokenizers[0], self.tokenizers[1:])([examples[k] for k in range(rows)])
        assert batch["input_ids"].shape == (rows, length)
        return batch

    def step(self, batch: dict[str, Any], way: str, scaling: str) -> tuple[float, int | None]:
        """Processor seconds and bytes of a step whose gradients take the place of others."""
        trainer = self.trainer
        trainer._fused = Fused(way, trainer.args.device)
        trainer.args.scaling = trainer.criterion.scaling = scaling
        trainer.get_batch_samples(iter([batch]), 1)
        trainer.criterion.diagnostics = False
        for weight in trainer.model.parameters():
            weight.grad = torch.zeros_like(weight)
        given = trainer._prepare_inputs(dict(batch))
        if way == "on":  # the comparison of a few tokens is not measured
            trainer._fused.outputs(trainer.model, trainer.model, input_ids=given["input_ids"][:, :1])
            teacher = trainer.teachers[0]
            trainer._fused.outputs(teacher.model, teacher.model, teacher.name, input_ids=given["input_ids"][:, :1])
        seconds: list[float] = []

        def run() -> None:
            started = time.process_time()
            trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
            trainer.training_step(trainer.model, given)
            seconds.append(time.process_time() - started)

        grown = peak_growth(run)
        return seconds[0], grown

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: one.grad.clone() for name, one in self.trainer.model.named_parameters() if one.grad is not None}


def check(bench: Bench, batch: dict[str, Any]) -> None:
    """That both ways give the same gradients."""
    found = []
    for way in WAYS:
        bench.step(batch, way, "dynamic")
        found.append(bench.gradients())
    for name, want in found[0].items():
        off = float((found[1][name] - want).abs().max())
        assert off <= TOLERANCE * float(want.abs().max()), f"wrong gradient of {name}: off by {off}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "train_memory.json")
    options.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    options.add_argument("--length", type=int, nargs="+", default=[256])
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--threads", type=int, default=2)
    given: Namespace = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.hidden, Path(folder))
        check(bench, bench.batch(1, 64))
        rows: list[Row] = []
        for length in given.length:
            for count in given.rows:
                batch = bench.batch(count, length)
                sizes = logit_bytes(batch, bench.trainer.model, [bench.trainer.teachers[0].model])
                for scaling in ("fixed", "dynamic"):
                    row: Row = {"rows": count, "length": length, "scaling": scaling, "logits_bytes": sizes}
                    for way in WAYS:
                        seconds, grown = bench.step(batch, way, scaling)
                        row.update({f"seconds_{way}": seconds, f"peak_bytes_{way}": grown})
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    facts = machine("torch", "transformers", threads=given.threads, hidden=given.hidden)
    write_rows(given.output, facts, rows, ("rows", "length", "scaling"))
    print(table(rows))


if __name__ == "__main__":
    logging.getLogger(Fused.__module__).setLevel(logging.ERROR)  # it would tell its choice in every step
    main()
