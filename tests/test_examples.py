"""The examples run for some steps, and several processes come to what one comes to."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest
import torch.distributed as dist
from old_versions import needs_fsdp

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))


STEP = re.compile(r"step \d: cross-entropy (\S+), distillation (\S+)")


def run_here(name: str, *arguments: str) -> str:
    """What the example prints as the only process."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "1", "RANK": "0"}.items():
            patch.setenv(key, value)
        patch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(name).main()
    return printed.getvalue()


def run(name: str, world: int, *arguments: str) -> str:
    """What the first of so many processes prints. They have the environment that torchrun gives them."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    given |= {"WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    processes = [
        subprocess.Popen(command, env={**os.environ, **given, "RANK": str(rank)}, stdout=PIPE, stderr=STDOUT, text=True)
        for rank in range(world)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(printed)
    return printed[0]


@pytest.mark.parametrize(
    ("name", "alone", "together"),
    [
        pytest.param("mesh", ["--tp", "1"], ["--tp", "2"], marks=needs_fsdp),
        ("groups", ["--tp", "1", "--cp", "1"], ["--tp", "1", "--cp", "2"]),
    ],
)
def test_two_processes_do_what_one_does(name: str, alone: list[str], together: list[str]) -> None:
    """Cross-entropy and distillation of the steps."""
    steps = "--steps", "2"
    printed = run_here(name, *alone, *steps), run(name, 2, *together, *steps)
    want, got = ([[float(value) for value in step] for step in STEP.findall(one)] for one in printed)
    assert len(want) == 2
    assert want[1][0] < want[0][0]
    assert got == [pytest.approx(one, abs=2e-3) for one in want]


@pytest.mark.parametrize("name", ["mesh", "groups"])
def test_one_process_without_torchrun_says_how_to_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match=rf"^Start it with torchrun: .*examples/{name}\.py"):
        importlib.import_module(name).main()
