"""Making shards on this machine, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import connection
from typing import Any

from .. import _core
from .manifest import Counts
from .partition import Shard
from .shards import Advance, Job, ShardMaker

POLL_SECONDS = 0.5
"""How often the progress of other processes is asked for."""


class Stopped(Exception):
    """The run was told to stop."""


def make_shards(
    job: Job, shards: Sequence[Shard], workers: int | None, advance: Advance
) -> Iterator[tuple[Shard, Counts]]:
    """Makes shards and gives the counts of each when it is complete, in no certain order.

    One worker (the default) is this process, whose tokenizers use all processors; more are processes that share them.
    """
    if workers is None or workers == 1:
        maker = ShardMaker(job)
        for shard in shards:
            yield shard, maker.make(shard, advance)
        return
    context = multiprocessing.get_context("spawn")  # a forked process would inherit locks of the tokenizers' threads
    done = context.Array("q", 3)  # documents, tokens, bytes of text
    stop = context.Event()
    threads = max(1, _core.available_processors() // workers)
    seen = [0, 0, 0]
    with ProcessPoolExecutor(workers, context, _start, (job, threads, done, stop)) as processes:
        try:
            todo = list(shards)
            running: dict[Future[Counts], Shard] = {}
            while todo or running:
                while todo and len(running) <= workers:  # one in the queue, so that no process ever waits
                    shard = todo.pop(0)
                    running[processes.submit(_make, shard)] = shard
                finished, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                now = done[:]
                advance(*(new - old for new, old in zip(now, seen, strict=True)))
                seen = now
                for future in finished:
                    yield running.pop(future), future.result()
        finally:
            stop.set()
            processes.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _start(job: Job, threads: int, done: Any, stop: Any) -> None:
    """Prepares a worker process."""
    threading.Thread(target=_end_with_the_first_process, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides, and says so through `stop`
    os.environ["RAYON_NUM_THREADS"] = str(threads)

    def advance(*more: int) -> None:
        if stop.is_set():
            raise Stopped
        with done.get_lock():
            for k, count in enumerate(more):
                done[k] += count

    _worker.update(maker=ShardMaker(job, threads), advance=advance)


def _end_with_the_first_process() -> None:
    """Ends this process when the one that started it is gone: killed, it cannot tell, and the queue would never end."""
    first = multiprocessing.parent_process()
    assert first is not None
    connection.wait([first.sentinel])
    os._exit(1)


def _make(shard: Shard) -> Counts:
    counts: Counts = _worker["maker"].make(shard, _worker["advance"])
    return counts
