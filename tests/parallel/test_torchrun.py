"""Under torchrun: what one rank raises ends all of them with its message, wherever it is raised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("world", "place", "message"),
    [
        pytest.param(2, "formula", "MemoryError: no memory for a batch", marks=pytest.mark.wide),
        (3, "between", "KeyError: 'a batch without a text'"),
    ],
)
def test_a_rank_that_raises_ends_the_others(world: int, place: str, message: str, tmp_path: Path) -> None:
    """Those that wait for it in a loss, and one that waits for nobody."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(world),
        "--local-addr",
        "127.0.0.1",
    ]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(HERE / "raising.py"), place]
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert run.returncode == 1, run.stderr
    assert message in run.stderr
    assert "Root Cause (first observed failure)" in run.stderr
    found = {path.suffix: sorted(tmp_path.glob(f"*{path.suffix}")) for path in tmp_path.iterdir()}
    assert {suffix: len(paths) for suffix, paths in found.items()} == {
        ".pid": world,
        ".heard": world,
        ".went on": world,
    }
    assert not [pid for path in found[".pid"] if Path("/proc", pid := path.read_text()).exists()]
    own = "ValueError: reduction: expected one of"
    for rank, path in enumerate(found[".heard"]):
        expected = own if rank == world - 1 else f"RuntimeError: rank {world - 1} of tp_group raised {own}"
        assert path.read_text().startswith(expected)
