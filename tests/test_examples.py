"""The examples run for some steps, and several processes come to what one comes to."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

pytestmark = pytest.mark.slow

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def run(name: str, world: int, folder: Path, *arguments: str) -> list[tuple[float, float]]:
    """Cross-entropy and distillation of the steps, which the first of so many processes prints. They are forked, with
    the environment that torchrun gives them, so that nothing is imported again."""
    main = importlib.import_module(name).main
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def work(rank: int) -> None:
        os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
        sys.argv = [name, *arguments, "--steps", "2"]
        output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        main()

    processes = [mp.get_context("fork").Process(target=work, args=(rank,), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    printed = [(folder / f"{rank}.txt").read_text() for rank in range(world)]
    assert [process.exitcode for process in processes] == [0] * world, "\n".join(printed)
    found = re.findall(r"step \d: cross-entropy (\S+), distillation (\S+)", printed[0])
    return [(float(ce), float(kd)) for ce, kd in found]


@pytest.mark.parametrize(
    ("name", "alone", "together"),
    [("mesh", ["--tp", "1"], ["--tp", "2"]), ("groups", ["--tp", "1", "--cp", "1"], ["--tp", "1", "--cp", "2"])],
)
def test_two_processes_do_what_one_does(name: str, alone: list[str], together: list[str], tmp_path: Path) -> None:
    want, got = run(name, 1, tmp_path, *alone), run(name, 2, tmp_path, *together)
    assert len(want) == 2
    assert want[1][0] < want[0][0]
    assert got == [pytest.approx(one, abs=2e-3) for one in want]


@pytest.mark.parametrize("name", ["mesh", "groups"])
def test_one_process_without_torchrun_says_how_to_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match=rf"^Start it with torchrun: .*examples/{name}\.py"):
        importlib.import_module(name).main()
