"""Run by torchrun: ranks that compute a loss together, of which the last raises; what each hears is written down.

    raising.py PLACE FOLDER

First it raises what all can see before they compute, and all hear of it; then, at the place, something else: "formula"
(in the middle of a loss) or "between" (in a user's code between two losses, while the first rank waits for nobody).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from xtoken.losses import Needs, registered
from xtoken.losses.backends import kernels_of

SHARE = 8
"""Columns of a rank."""


def step(kind: Any, rank: int, world: int, **options: Any) -> None:
    """Forward and backward."""
    logits = torch.randn(1, 5, SHARE * world, generator=torch.Generator().manual_seed(0))
    own = logits.split(SHARE, -1)[rank].clone().requires_grad_()
    size, group = SHARE * world, dist.group.WORLD
    kind.function()(own, logits.flip(1), vocab_size=size, tp_group=group, **options).backward()


@record
def main() -> None:
    """What a rank does."""
    place, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    is_last = rank == world - 1
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    kind = next(one for one in registered().values() if one.needs is Needs.SAME_TOKENIZER and one.is_default)
    try:
        step(kind, rank, world, reduction="median" if is_last else "mean")
    except Exception as error:
        (folder / f"{rank}.heard").write_text(f"{type(error).__name__}: {error}")
    step(kind, rank, world)  # they may go on
    (folder / f"{rank}.went on").touch()
    dist.barrier()
    if place == "between" and is_last:
        raise KeyError("a batch without a text")
    if place == "between" and rank == 0:
        signal.pause()
    if place == "formula" and is_last:
        formula: Any = kernels_of(kind.name, "parallel")
        with mock.patch.object(formula.InParts, "losses", side_effect=MemoryError("no memory for a batch")):
            step(kind, rank, world)
    step(kind, rank, world)
    (folder / f"{rank}.end").touch()


if __name__ == "__main__":
    main()
