"""Making shards with Ray, on a cluster or, if there is none, on a local Ray."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from . import require
from .deaths import Deaths
from .manifest import Counts
from .partition import Shard
from .shards import Advance, Job, ShardMaker


class _Worker:
    """The shard function in a process of Ray.

    An error comes back as a value: Ray would wrap it, and print it many times.
    """

    def __init__(self, job: Job) -> None:
        os.environ["RAYON_NUM_THREADS"] = "1"
        self._maker = ShardMaker(job, threads=1)

    def start(self) -> None:
        """Returns when the worker is there."""

    def make(self, shard: Shard) -> Counts | Exception:
        try:
            return self._maker.make(shard, lambda *more: None)
        except (ValueError, OSError) as error:
            return error


def make_shards(
    job: Job, shards: Sequence[Shard], workers: int | None, advance: Advance, deaths: Deaths
) -> Iterator[tuple[Shard, Counts]]:
    """Makes shards and gives the counts of each when it is complete, in no certain order.

    Workers are processes of one processor each; by default as many as the cluster has. One that dies is replaced, and
    its shard goes back to the queue.
    """
    ray = require("ray", "ray")
    started = not ray.is_initialized()
    if started:
        processors = None if "RAY_ADDRESS" in os.environ else workers
        ray.init(num_cpus=processors, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    running: dict[Any, tuple[Any, Shard | None]] = {}
    try:
        work = ray.put(job)
        new_worker = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(_Worker).remote
        todo = deque(shards)

        def hire() -> None:
            """Starts a worker. It gets a shard when it is there, since a cluster may have no place for it yet."""
            worker = new_worker(work)
            running[worker.start.remote()] = (worker, None)

        for _ in range(min(workers or int(ray.cluster_resources()["CPU"]), len(shards))):
            hire()
        while todo or any(shard for _, shard in running.values()):
            (ready,), _ = ray.wait(list(running), num_returns=1)
            worker, shard = running.pop(ready)
            try:
                made: Any = ray.get(ready)
            except ray.exceptions.RayActorError as error:
                deaths(shard, str(error).strip().replace("\n", " "))
                if shard is not None:
                    todo.appendleft(shard)
                hire()
                continue
            if isinstance(made, Exception):
                raise made
            if todo:
                following = todo.popleft()
                running[worker.make.remote(following)] = (worker, following)
            if shard is None:
                deaths.started()
                continue
            advance(made.documents, made.student_tokens + made.teacher_tokens, made.text_bytes)
            yield shard, made
    finally:
        for worker, _ in running.values():
            ray.kill(worker)
        if started:
            ray.shutdown()
