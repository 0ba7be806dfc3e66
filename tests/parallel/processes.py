"""Real processes of torch.distributed on this machine: forked, so that nothing is imported again, over gloo."""

from __future__ import annotations

import functools
import importlib
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(
    count: int, function: Callable[[int], Any], folder: Path, seconds: float = 300.0, *, as_torchrun: bool = False
) -> list[Any]:
    """What `function` of the rank returns on each of so many ranks, which are a group; or have what torchrun gives a
    process, to make their own.

    Raises
    ------
    AssertionError
        If one fails, with its traceback, or they do not end in time: then they are killed.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = mp.get_context("fork")
    importlib.import_module("torch._dynamo")  # which each would import, as soon as it makes a group
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) if as_torchrun else None
    port = None if store is None else store.port
    processes = [
        context.Process(target=_rank, args=(rank, count, function, folder, port), daemon=True) for rank in range(count)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            break  # the others may wait for it for ever
        time.sleep(0.05)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    if any(process.exitcode for process in processes):
        time.sleep(1.0)  # what others have to say of it
    for process in processes:
        process.kill()
        process.join()
    failures = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    assert not failures, "\n".join(failures)
    assert not late, f"ranks {late} did not end in {seconds:g} s"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def on_two_and_four(
    function: Callable[[int, int], dict[str, Any]], folders: pytest.TempPathFactory
) -> dict[int, list[dict[str, Any]]]:
    """What each rank of two and of four found by ``function(world, rank)``; they are started once."""
    return {
        world: on_ranks(world, functools.partial(function, world), folders.mktemp(f"{world}ranks")) for world in (2, 4)
    }


def _rank(rank: int, count: int, function: Callable[[int], Any], folder: Path, port: int | None) -> None:
    torch.set_num_threads(1)
    try:
        if port is None:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        else:
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
            os.environ.update({name: str(value) for name, value in given.items()})
        torch.save(function(rank), folder / f"{rank}.pt")
        if port is None:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
