"""Throughput of `xtoken align`, as a share of what tokenizing the same documents alone reaches on the same processors.

The corpus is the Python standard library's source, cut into documents, as JSON lines. Tokenizing alone means: the texts
lie in memory, both tokenizers encode them in batches of the same size, the encodings are dropped. The shard function
runs from file to files. Both take turns, in one process; every figure is the median. Results go
to bench/results/corpus.json.

    python bench/bench_corpus.py [--student llama3] [--teacher qwen3] [--megabytes 20] [--repeat 3]
"""

from __future__ import annotations

import json
import statistics
import sysconfig
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import load_tokenizers, machine, parser, timed, write


def documents(size: int) -> list[str]:
    """Texts of up to 8,000 characters, `size` bytes in all: files of the standard library, over again if need be."""
    texts: list[str] = []
    total = 0
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    while total < size:
        for path in paths:
            source = path.read_text(encoding="utf-8", errors="ignore")
            for start in range(0, len(source), 8000):
                texts.append(source[start : start + 8000])
                total += len(texts[-1].encode())
                if total >= size:
                    return texts
    return texts


def main() -> None:
    arguments = parser(__doc__, "corpus.json")
    arguments.add_argument("--student", default="llama3")
    arguments.add_argument("--teacher", default="qwen3")
    arguments.add_argument("--megabytes", type=float, default=20)
    arguments.add_argument("--repeat", type=int, default=3)
    options = arguments.parse_args()

    import numpy as np

    import xtoken
    from xtoken.config import config
    from xtoken.corpus import SHARD_BYTES, Options
    from xtoken.corpus.documents import BATCH_BYTES
    from xtoken.corpus.files import find_files
    from xtoken.corpus.partition import into_shards
    from xtoken.corpus.shards import Job, ShardMaker, encoder, scan_file
    from xtoken.data import AlignedDataset

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaded = load_tokenizers(options.student, options.teacher)
        student, teacher = (encoder(one, side) for one, side in zip(loaded, ("student", "teacher"), strict=True))
        texts = documents(int(options.megabytes * 1e6))
        source = folder / "corpus.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sizes = np.cumsum([len(text.encode()) for text in texts])
        cuts = [0, *np.searchsorted(sizes, np.arange(BATCH_BYTES, sizes[-1], BATCH_BYTES)).tolist(), len(texts)]
        batches = [texts[start:stop] for start, stop in pairwise(cuts)]

        def tokenize() -> None:
            for batch in batches:
                for side in (student, teacher):
                    side.tokenizer.encode_batch_fast(batch, add_special_tokens=False)

        runs = 0

        def both_clocks(run: Any) -> tuple[float, float]:
            computed: list[float] = []
            return timed(lambda: computed.append(timed(run, time.process_time))), computed[0]

        def align() -> None:
            """The shards of the corpus; the tokenizers are loaded already, as they are for all but the first shard."""
            nonlocal runs
            runs += 1
            output = folder / f"out{runs}"
            output.mkdir()
            job = Job(student, teacher, str(output), Options())
            maker = ShardMaker(job)
            for shard in shards:
                maker.make(shard, lambda *more: None)

        scanning = timed(lambda: scan_file(find_files([source])[0], "text", SHARD_BYTES))
        shards = list(into_shards(scan_file(find_files([source])[0], "text", SHARD_BYTES), SHARD_BYTES))
        align()
        measured = [(*both_clocks(tokenize), *both_clocks(align)) for _ in range(options.repeat)]
        pairs = [(alone, whole) for alone, _, whole, _ in measured]
        tokenizing, computing, aligning, computing_all = (
            statistics.median(column) for column in zip(*measured, strict=True)
        )

        manifest = xtoken.align_corpus(student, teacher, source, folder / "whole")
        total = manifest.total
        dataset = AlignedDataset(folder / "whole")
        order = np.random.default_rng(0).permutation(len(dataset))[:500].tolist()
        dataset[0]
        reading = timed(lambda: [dataset[k] for k in order]) / len(order)
        stored = sum(path.stat().st_size for path in (folder / "whole").glob("*.parquet"))
    tokens = total.student_tokens + total.teacher_tokens
    row = {
        "pair": f"{options.student} / {options.teacher}",
        "processors": int(config()["processors"]),
        "megabytes": source_size(texts),
        "documents": total.documents,
        "student_tokens": total.student_tokens,
        "teacher_tokens": total.teacher_tokens,
        "tokenizing_seconds": tokenizing,
        "align_seconds": aligning,
        "share_of_tokenizing_throughput": statistics.median(alone / whole for alone, whole in pairs),
        "share_of_processor_time": statistics.median(alone / whole for _, alone, _, whole in measured),
        "tokenizing_processor_seconds": computing,
        "align_processor_seconds": computing_all,
        "shares": [alone / whole for alone, whole in pairs],
        "million_tokens_per_second": tokens / aligning / 1e6,
        "student_tokens_per_processor_second": total.student_tokens / computing_all,
        "scan_megabytes_per_second": source_size(texts) / scanning,
        "stored_bytes_per_student_token": stored / total.student_tokens,
        "random_read_milliseconds": reading * 1e3,
    }
    for key, value in row.items():
        print(f"{key:40} {value:.4g}" if isinstance(value, float) else f"{key:40} {value}")
    write(options.output, {"machine": machine("tokenizers", "pyarrow"), "rows": [row]})


def source_size(texts: list[str]) -> float:
    """Megabytes of text."""
    return sum(len(text.encode()) for text in texts) / 1e6


if __name__ == "__main__":
    main()
