"""Speed of alignment, as a share of the time that tokenizing the same documents takes on the same threads.

Documents are cut from the Python manual. Both tokenizers encode them in one batch each; then each method aligns them,
with one thread and with all in turn. Every time is the median of the faster half of the repetitions: other work on the
machine only ever makes one slower.

A second table has hostile input, each case in a process of its own; its memory is what the alignment adds to the peak
of that process. Results go to bench/results/align.json.

    python bench/bench_align.py [--student llama3] [--teacher qwen3] [--lengths 2048 32768] [--tokens 2000000]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HOSTILE_TOKENS = 20_000


def median_of_faster_half(seconds: list[float]) -> float:
    return statistics.median(sorted(seconds)[: len(seconds) // 2 + 1])


def peak_mb() -> float | None:
    """This process's peak memory, where Linux tells."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else None


def measure(
    student_name: str, teacher_name: str, length: int, total: int, threads: int, repeat: int
) -> list[dict[str, Any]]:
    """Rows for one pair and document length in this process, whose RAYON_NUM_THREADS must be `threads`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from pydoc_data.topics import topics

    import numpy as np
    from real_tokenizers import LOADERS

    from xtoken import Aligner, Vocabulary

    with tempfile.TemporaryDirectory() as folder:
        tokenizers = [LOADERS[name](Path(folder)) for name in (student_name, teacher_name)]
    sides = [Vocabulary.from_tokenizer(tokenizer) for tokenizer in tokenizers]
    text = "\n".join(topics[name] for name in sorted(topics))
    per_token = len(text) / len(sides[0].tokenizer.encode(text).ids)
    size = int(per_token * length)
    text *= 1 + 2 * size // len(text)
    starts = [(k * 7919 * 31) % (len(text) - size) for k in range(max(2, total // (2 * length)))]
    documents = [text[start : start + size] for start in starts]

    def timed(run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def tokenize() -> list[Any]:
        return [side.tokenizer.encode_batch_fast(documents, add_special_tokens=False) for side in sides]

    ids = [[np.array(encoding.ids) for encoding in batch] for batch in tokenize()]
    tokens = sum(len(row) for batch in ids for row in batch)
    tokenizing = median_of_faster_half([timed(tokenize) for _ in range(repeat)])
    rows = []
    for method in ("bytes", "auto", "dp"):
        aligners = {count: Aligner(*sides, method, num_threads=count) for count in (1, threads)}
        alignment = aligners[threads].align(*ids)
        for k in range(0, alignment.num_chunks, 1 + alignment.num_chunks // 500):
            a, b, c, d = alignment.spans[k].tolist()
            sample = int(alignment.sample_index[k])
            assert sides[0].decode(ids[0][sample][a:b]) == sides[1].decode(ids[1][sample][c:d]), "wrong chunk"
        seconds: dict[int, list[float]] = {count: [] for count in aligners}
        for _ in range(4 * repeat):
            for count, aligner in aligners.items():
                seconds[count].append(timed(lambda aligner=aligner: aligner.align(*ids)))
        typical = {count: median_of_faster_half(values) for count, values in seconds.items()}
        rows.append(
            {
                "pair": f"{student_name} / {teacher_name}",
                "document_tokens": length,
                "threads": threads,
                "method": method,
                "million_tokens_per_second": tokens / typical[threads] / 1e6,
                "times_one_thread": typical[1] / typical[threads],
                "share_of_tokenization": typical[threads] / tokenizing,
                "spread": max(seconds[threads]) / min(seconds[threads]),
                "process_peak_mb": peak_mb(),
            }
        )
    return rows


def hostile_cases(size: int) -> dict[str, tuple[list[bytes], list[bytes]]]:
    """Two token sequences of about `size` tokens each, by name; the worst that is known for each algorithm."""
    rng = random.Random(0)

    def letters(alphabet: str) -> list[bytes]:
        return [rng.choice(alphabet).encode() for _ in range(size)]

    def cut(text: bytes, longest: int) -> list[bytes]:
        tokens = []
        while text:
            length = rng.randint(1, longest)
            tokens.append(text[:length])
            text = text[length:]
        return tokens

    ab = letters("ab")
    edited = [rng.choice([b"a", b"b"]) if rng.random() < 0.05 else token for token in ab]
    text = b"".join(letters("ab")) * 2
    shifted = [b"%d " % i for i in range(3 * size // 7)]
    return {
        "random a, b": (ab, letters("ab")),
        "random a, b, c, d": (letters("abcd"), letters("abcd")),
        "random a, b, one token in 20 edited": (ab, edited),
        "same text of a, b, cut at random": (cut(text, 3), cut(text, 3)),
        "one letter, cut at random": (cut(b"a" * 2 * size, 3), cut(b"a" * 2 * size, 3)),
        "periods cut two ways: ab a b, a b ab": ([b"ab", b"a", b"b"] * (size // 3), [b"a", b"b", b"ab"] * (size // 3)),
        "unique tokens, then a b c d against abcd": (
            shifted + [b"a", b"b", b"c", b"d"] * (size // 7),
            shifted + [b"abcd"] * (size // 7),
        ),
    }


def measure_hostile(name: str, method: str, size: int) -> dict[str, Any]:
    """One case by one method, in a process that does nothing else."""
    from xtoken import Aligner, Vocabulary

    sides, ids = [], []
    for tokens in hostile_cases(size)[name]:
        names = sorted(set(tokens))
        number = {token: i for i, token in enumerate(names)}
        sides.append(Vocabulary(names))
        ids.append([number[token] for token in tokens])
    aligner = Aligner(*sides, method, num_threads=1)
    before = peak_mb()
    started = time.perf_counter()
    alignment = aligner.align(*ids)
    seconds = time.perf_counter() - started
    after = peak_mb()
    return {
        "case": name,
        "student_tokens": len(ids[0]),
        "teacher_tokens": len(ids[1]),
        "method": method,
        "seconds": seconds,
        "chunks": alignment.num_chunks,
        "optimal": bool(alignment.optimal[0]),
        "peak_mb": None if before is None or after is None else after - before,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        print("| " + " | ".join(cells) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="llama3")
    parser.add_argument("--teacher", default="qwen3")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 32768], help="student tokens of a document")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens of all documents, both sides")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--hostile-tokens", type=int, default=HOSTILE_TOKENS, help="tokens a side; 0: none")
    parser.add_argument("--output", default=str(ROOT / "bench" / "results" / "align.json"))
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what a process of its own measures, as JSON
    options = parser.parse_args()
    if options.part:
        part = json.loads(options.part)
        print(json.dumps(globals()[part.pop("run")](**part)))
        return
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        for threads in options.threads:  # the tokenizers read their number of threads once, so each count is a process
            rows += in_own_process(
                "measure", threads, student_name=options.student, teacher_name=options.teacher, length=length,
                total=options.tokens, threads=threads, repeat=options.repeat,
            )  # fmt: skip
    print_table(rows)
    hostile = [
        in_own_process("measure_hostile", 1, name=name, method=method, size=options.hostile_tokens)
        for name in hostile_cases(10)
        if options.hostile_tokens
        for method in ("bytes", "auto", "dp")
    ]
    if hostile:
        print_table(hostile)
    import tokenizers

    import xtoken

    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = {
        "commit": revision,
        "xtoken": xtoken.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps({"machine": machine, "rows": rows, "hostile": hostile}, indent=1) + "\n")


def in_own_process(run: str, rayon_threads: int, **arguments: Any) -> Any:
    """The result of the function named `run` in a process whose tokenizers use `rayon_threads`."""
    environment = {
        **os.environ,
        "RAYON_NUM_THREADS": str(rayon_threads),
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--part", json.dumps({"run": run, **arguments})]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
