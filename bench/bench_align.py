"""Speed of alignment, as a share of the time that tokenizing the same documents takes on the same threads.

Documents are cut from the Python manual. Both tokenizers encode them in one batch each; then each method aligns them.
Every figure is the median of the repetitions. Results go to bench/results/align.json.

    python bench/bench_align.py [--student llama3] [--teacher qwen3] [--lengths 2048 32768] [--tokens 2000000]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COLUMNS = (
    "pair",
    "document_tokens",
    "threads",
    "method",
    "million_tokens_per_second",
    "share_of_tokenization",
    "spread",
)


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

    def median(run: Any) -> tuple[float, float, Any]:
        seconds, result = [], run()
        for _ in range(repeat):
            started = time.perf_counter()
            result = run()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds), max(seconds) / min(seconds), result

    tokenizing, _, encoded = median(
        lambda: [side.tokenizer.encode_batch_fast(documents, add_special_tokens=False) for side in sides]
    )
    ids = [[np.array(encoding.ids) for encoding in batch] for batch in encoded]
    tokens = sum(len(row) for batch in ids for row in batch)
    rows = []
    for method in ("bytes", "auto", "dp"):
        aligner = Aligner(*sides, method, num_threads=threads)
        seconds, spread, alignment = median(lambda aligner=aligner: aligner.align(*ids))
        for k in range(0, alignment.num_chunks, 1 + alignment.num_chunks // 500):
            a, b, c, d = alignment.spans[k].tolist()
            sample = int(alignment.sample_index[k])
            assert sides[0].decode(ids[0][sample][a:b]) == sides[1].decode(ids[1][sample][c:d]), "wrong chunk"
        values = (
            f"{student_name} / {teacher_name}",
            length,
            threads,
            method,
            tokens / seconds / 1e6,
            seconds / tokenizing,
            spread,
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()) if sys.platform == "linux" else None
    for row in rows:
        row["process_peak_mb"] = int(peak[1]) // 1024 if peak else None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="llama3")
    parser.add_argument("--teacher", default="qwen3")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 32768], help="student tokens of a document")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens of all documents, both sides")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", default=str(ROOT / "bench" / "results" / "align.json"))
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        length, threads = options.lengths[0], options.threads[0]
        print(json.dumps(measure(options.student, options.teacher, length, options.tokens, threads, options.repeat)))
        return
    rows = []
    for length in options.lengths:
        for threads in options.threads:  # the tokenizers read their number of threads once, so each count is a process
            command = [sys.executable, __file__, "--in-process", "--lengths", str(length), "--threads", str(threads),
                       "--student", options.student, "--teacher", options.teacher, "--tokens", str(options.tokens),
                       "--repeat", str(options.repeat)]  # fmt: skip
            environment = {
                **os.environ,
                "RAYON_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": "true",
                "HF_HUB_OFFLINE": "1",
            }
            output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows += json.loads(output.splitlines()[-1])
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print(
            "| "
            + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
            + " |"
        )
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
    Path(options.output).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
