"""Throughput of `xtoken align` by engine, a worker: processes of this machine, and of a local Ray.

The corpus is that of bench_corpus.py. What counts is the time, and the processors' time in the workers, between the
first shards and the last ones, so that the start of processes and of Ray, which a long run does not notice, is told by
itself. Engines take turns; every figure is the median. Results go to bench/results/engines.json.

    python bench/bench_engines.py [--student llama3] [--teacher qwen3] [--megabytes 8] [--workers 2] [--repeat 3]
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

from bench_corpus import documents, source_size
from measure import Row, load_tokenizers, machine, parser, table, write

SHARDS = 40

Moment = tuple[float, float, int]
"""Of a complete shard: clock, seconds that the workers have computed, bytes of text."""


def main() -> None:
    arguments = parser(__doc__, "engines.json")
    arguments.add_argument("--student", default="llama3")
    arguments.add_argument("--teacher", default="qwen3")
    arguments.add_argument("--megabytes", type=float, default=8)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--repeat", type=int, default=3)
    options = arguments.parse_args()

    import psutil
    import ray

    import xtoken
    from xtoken.corpus import run as corpus_run
    from xtoken.corpus.run import Progress

    runs: dict[str, list[tuple[float, float, float]]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = load_tokenizers(options.student, options.teacher)
        texts = documents(int(options.megabytes * 1e6))
        source = folder / "corpus.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        done: list[Moment] = []

        class Noted(Progress):
            def shard_done(self, size: int, text_bytes: int) -> None:
                processes = {one.pid for one in multiprocessing.active_children()}
                computed = 0.0
                for one in psutil.Process().children(recursive=True):
                    if one.pid in processes or one.name().startswith("ray::_Worker"):
                        computed += sum(one.cpu_times()[:2])
                done.append((time.perf_counter(), computed, text_bytes))

        corpus_run.Progress = Noted
        for turn in range(options.repeat):
            for engine, seen in runs.items():
                done.clear()
                started = time.perf_counter()
                size = source.stat().st_size // SHARDS
                output = folder / f"{engine}{turn}"
                xtoken.align_corpus(
                    *pair, source, output, engine=engine, workers=options.workers, shard_bytes=size, progress=False
                )
                first, *rest = done[options.workers - 1 : -options.workers]
                megabytes = sum(text_bytes for _, _, text_bytes in rest) / 1e6
                wall, computed = (rest[-1][k] - first[k] for k in (0, 1))
                seen.append((megabytes / wall / options.workers, megabytes / computed, first[0] - started))
    rows: list[Row] = []
    for engine, seen in runs.items():
        medians = list(map(statistics.median, zip(*seen, strict=True)))
        ratios = [one[1] / local[1] for one, local in zip(seen, runs["local"], strict=True)]
        rows.append(
            {
                "engine": engine,
                "workers": options.workers,
                "megabytes": source_size(texts),
                "megabytes_per_second_and_worker": medians[0],
                "megabytes_per_processor_second": medians[1],
                "of_local_per_processor_second": statistics.median(ratios),
                "seconds_until_each_has_made_a_shard": medians[2],
            }
        )
    print(table(rows))
    facts = machine("tokenizers", "pyarrow", ray=ray.__version__, pair=f"{options.student} / {options.teacher}")
    write(options.output, {"machine": facts, "rows": rows})


if __name__ == "__main__":
    main()
