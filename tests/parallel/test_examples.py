"""The examples run for some steps, and several processes come to what one comes to."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
from processes import on_ranks

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


def run(name: str, world: int, folder: Path, *arguments: str) -> list[tuple[float, float]]:
    """Cross-entropy and distillation of the steps, which the first of so many processes prints."""
    importlib.import_module(name)  # what it imports is imported once
    command = [str(EXAMPLES / f"{name}.py"), *arguments, "--steps", "2"]

    def printed(rank: int) -> str:
        sys.argv = command
        with contextlib.redirect_stdout(io.StringIO()) as out:
            runpy.run_path(command[0], run_name="__main__")
        return out.getvalue()

    found = on_ranks(world, printed, folder, as_torchrun=True)
    steps = re.findall(r"step \d: cross-entropy (\S+), distillation (\S+)", found[0])
    return [(float(ce), float(kd)) for ce, kd in steps]


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
