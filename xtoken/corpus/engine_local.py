"""Making shards on this machine, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection
from typing import Any

import torch

from .. import _core
from .deaths import Deaths
from .manifest import Counts
from .partition import Shard
from .shards import Advance, Job, ShardMaker

PATIENCE = 10.0
"""Seconds that a worker has for its end."""


def make_shards(
    job: Job, shards: Sequence[Shard], workers: int | None, advance: Advance, deaths: Deaths
) -> Iterator[tuple[Shard, Counts]]:
    """Makes shards and gives the counts of each when it is complete, in no certain order.

    One worker (the default) is this process, whose tokenizers use all processors; more are processes that share them,
    one of which may die: its shard is made again.
    """
    if workers is None or workers == 1:
        maker = ShardMaker(job)
        for shard in shards:
            yield shard, maker.make(shard, advance)
        return
    threads = max(1, _core.available_processors() // workers)
    todo = deque(shards)
    running: dict[Any, _Worker] = {}
    try:
        for _ in range(min(workers, len(shards))):
            worker = _Worker(job, threads, todo.popleft())
            running[worker.pipe] = worker
        while running:
            for pipe in connection.wait(running):
                worker = running[pipe]
                try:
                    said = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    del running[pipe]
                    advance(*(-count for count in worker.said))
                    deaths(worker.shard, worker.end())
                    worker = _Worker(job, threads, worker.shard)
                    running[worker.pipe] = worker
                    continue
                if isinstance(said, Exception):
                    raise said
                if isinstance(said, tuple):
                    worker.said = [so_far + more for so_far, more in zip(worker.said, said, strict=True)]
                    advance(*said)
                    continue
                made = worker.shard
                if todo:
                    worker.give(todo.popleft())
                else:
                    del running[pipe]
                    worker.end()
                yield made, said
    finally:
        for worker in running.values():
            worker.pipe.close()
        for worker in running.values():
            worker.end()


class _Worker:
    """A process that makes one shard after the other, and the shard that it makes.

    It shares nothing but a pipe, so that its death leaves no lock behind. Through the pipe come what it has done of the
    shard, a tuple as `Advance` takes it; the counts of the complete one; or an error. It ends when the pipe is closed.
    """

    def __init__(self, job: Job, threads: int, shard: Shard) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would inherit locks of tokenizers' threads
        self.pipe, its_end = context.Pipe()
        self._process = context.Process(target=_work, args=(job, threads, its_end), daemon=True)
        self._process.start()
        its_end.close()
        self.give(shard)

    def give(self, shard: Shard) -> None:
        """Has it make this shard."""
        self.shard, self.said = shard, [0, 0, 0]
        with suppress(ConnectionError):  # it has died; reading from it says so
            self.pipe.send(shard)

    def end(self) -> str:
        """Waits for its end, which comes soon without a pipe, unless it hangs; how it came."""
        self.pipe.close()
        self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()
        code = self._process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _work(job: Job, threads: int, pipe: Any) -> None:
    """What the process does."""
    threading.Thread(target=_end_with_the_first_process, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides, and closes the pipe
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    with suppress(EOFError, ConnectionError):
        try:
            maker = ShardMaker(job, threads)
            while True:
                pipe.send(maker.make(pipe.recv(), lambda *more: pipe.send(more)))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            pipe.send(error)


def _end_with_the_first_process() -> None:
    """Ends this process when the one that started it is gone: killed, it cannot tell."""
    first = multiprocessing.parent_process()
    assert first is not None
    connection.wait([first.sentinel])
    os._exit(1)
