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
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

from measure import Row, load_tokenizers, machine, parser, process_memory, table, timed, write

HOSTILE_TOKENS = 20_000


def median_of_faster_half(seconds: list[float]) -> float:
    return statistics.median(sorted(seconds)[: len(seconds) // 2 + 1])


def measure(student_name: str, teacher_name: str, length: int, total: int, threads: int, repeat: int) -> list[Row]:
    """Rows for one pair and document length in this process, whose RAYON_NUM_THREADS must be `threads`."""
    from pydoc_data.topics import topics

    import numpy as np

    from xtoken import Aligner, Vocabulary

    student, teacher = (Vocabulary.from_tokenizer(one) for one in load_tokenizers(student_name, teacher_name))
    sides = student, teacher
    text = "\n".join(topics[name] for name in sorted(topics))
    per_token = len(text) / len(sides[0].tokenizer.encode(text).ids)
    size = int(per_token * length)
    text *= 1 + 2 * size // len(text)
    starts = [(k * 7919 * 31) % (len(text) - size) for k in range(max(2, total // (2 * length)))]
    documents = [text[start : start + size] for start in starts]

    def tokenize() -> list[Any]:
        return [side.tokenizer.encode_batch_fast(documents, add_special_tokens=False) for side in sides]

    ids = [[np.array(encoding.ids) for encoding in batch] for batch in tokenize()]
    tokens = sum(len(row) for batch in ids for row in batch)
    tokenizing = median_of_faster_half([timed(tokenize) for _ in range(repeat)])
    rows = []
    for method in ("bytes", "auto", "dp"):
        aligners = {count: Aligner(student, teacher, method, num_threads=count) for count in (1, threads)}
        alignment = aligners[threads].align(*ids)
        for k in range(0, alignment.num_chunks, 1 + alignment.num_chunks // 500):
            a, b, c, d = alignment.spans[k].tolist()
            sample = int(alignment.sample_index[k])
            assert sides[0].decode(ids[0][sample][a:b]) == sides[1].decode(ids[1][sample][c:d]), "wrong chunk"
        seconds: dict[int, list[float]] = {count: [] for count in aligners}
        for _ in range(4 * repeat):
            for count, aligner in aligners.items():
                seconds[count].append(timed(partial(aligner.align, *ids)))
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
                "process_peak_mb": megabytes(process_memory("VmHWM")),
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


def measure_hostile(name: str, method: str, size: int) -> Row:
    """One case by one method, in a process that does nothing else."""
    from xtoken import Aligner, Vocabulary

    sides, ids = [], []
    for tokens in hostile_cases(size)[name]:
        names = sorted(set(tokens))
        number = {token: i for i, token in enumerate(names)}
        sides.append(Vocabulary(names))
        ids.append([number[token] for token in tokens])
    aligner = Aligner(sides[0], sides[1], method, num_threads=1)
    before = process_memory("VmHWM")
    started = time.perf_counter()
    alignment = aligner.align(*ids)
    seconds = time.perf_counter() - started
    after = process_memory("VmHWM")
    return {
        "case": name,
        "student_tokens": len(ids[0]),
        "teacher_tokens": len(ids[1]),
        "method": method,
        "seconds": seconds,
        "chunks": alignment.num_chunks,
        "optimal": bool(alignment.optimal[0]),
        "peak_mb": None if before is None or after is None else megabytes(after - before),
    }


def megabytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def main() -> None:
    arguments = parser(__doc__, "align.json")
    arguments.add_argument("--student", default="llama3")
    arguments.add_argument("--teacher", default="qwen3")
    arguments.add_argument("--lengths", type=int, nargs="+", default=[2048, 32768], help="student tokens of a document")
    arguments.add_argument("--tokens", type=int, default=2_000_000, help="tokens of all documents, both sides")
    arguments.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--repeat", type=int, default=5)
    arguments.add_argument("--hostile-tokens", type=int, default=HOSTILE_TOKENS, help="tokens a side; 0: none")
    arguments.add_argument("--part", help=argparse.SUPPRESS)  # what a process of its own measures, as JSON
    options = arguments.parse_args()
    if options.part:
        part = json.loads(options.part)
        print(json.dumps(globals()[part.pop("run")](**part)))
        return
    rows: list[Row] = []
    for length in options.lengths:
        for threads in options.threads:  # the tokenizers read their number of threads once, so each count is a process
            rows += in_own_process(
                "measure", threads, student_name=options.student, teacher_name=options.teacher, length=length,
                total=options.tokens, threads=threads, repeat=options.repeat,
            )  # fmt: skip
    print(table(rows) + "\n")
    hostile = [
        in_own_process("measure_hostile", 1, name=name, method=method, size=options.hostile_tokens)
        for name in hostile_cases(10)
        if options.hostile_tokens
        for method in ("bytes", "auto", "dp")
    ]
    if hostile:
        print(table(hostile) + "\n")
    facts = machine("tokenizers", python=platform.python_version(), machine=platform.machine())
    write(options.output, {"machine": facts, "rows": rows, "hostile": hostile})


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


if __name__ == "__main__":
    main()
