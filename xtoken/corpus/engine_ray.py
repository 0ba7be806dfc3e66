"""Making shards with Ray Data, on a cluster or, if there is none, on a local Ray."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from . import require
from .manifest import Counts
from .partition import Shard
from .shards import Advance, Job, ShardMaker


class _RayMaker:
    """The shard function as Ray Data calls it: built once in each worker.

    An error comes back as data: Ray would wrap it, and print it many times.
    """

    def __init__(self, work: Any) -> None:
        import ray

        os.environ["RAYON_NUM_THREADS"] = "1"
        job, self.shards = ray.get(work)
        self.maker = ShardMaker(job, threads=1)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            counts = self.maker.make(self.shards[row["index"]], lambda *more: None)
        except (ValueError, OSError) as error:
            kind = "ValueError" if isinstance(error, ValueError) else "OSError"
            return {**row, "counts": "", "error": str(error), "kind": kind}
        return {**row, "counts": json.dumps(asdict(counts)), "error": "", "kind": ""}


def make_shards(
    job: Job, shards: Sequence[Shard], workers: int | None, advance: Advance
) -> Iterator[tuple[Shard, Counts]]:
    """Makes shards and gives the counts of each when it is complete, in no certain order.

    Workers are processes of one processor each; by default as many as the cluster has.
    """
    ray = require("ray", "ray")
    data = require("ray.data", "ray")
    started = not ray.is_initialized()
    if started:
        processors = None if "RAY_ADDRESS" in os.environ else workers
        ray.init(num_cpus=processors, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        data.DataContext.get_current().enable_progress_bars = False
        pool = data.ActorPoolStrategy(size=min(workers or int(ray.cluster_resources()["CPU"]), len(shards)))
        rows = data.from_items([{"index": k} for k in range(len(shards))], override_num_blocks=len(shards))
        work = ray.put((job, list(shards)))
        made = rows.map(_RayMaker, fn_constructor_args=(work,), num_cpus=1, compute=pool)
        for row in made.iter_rows():
            if row["kind"]:
                raise (ValueError if row["kind"] == "ValueError" else OSError)(row["error"])
            counts = Counts(**json.loads(row["counts"]))
            advance(counts.documents, counts.student_tokens + counts.teacher_tokens, counts.text_bytes)
            yield shards[row["index"]], counts
    finally:
        if started:
            ray.shutdown()
