"""What the benchmarks share: the machine, timers, peak memory, tables, result files. Makes `tests/` importable."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

Row = dict[str, Any]


def parser(doc: str | None, output: str) -> argparse.ArgumentParser:
    """Options of a benchmark, described by the first line of its file; results go to bench/results/`output` unless
    ``--output`` says otherwise."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--output", type=Path, default=RESULTS / output, help=f"default: bench/results/{output}")
    return made


def load_tokenizers(*names: str) -> list[Any]:
    """Real tokenizers by their names in tests/real_tokenizers.py."""
    from real_tokenizers import LOADERS

    with tempfile.TemporaryDirectory() as folder:
        return [LOADERS[name](Path(folder)) for name in names]


# --- machine


def commit() -> str | None:
    """The commit that is checked out, ending in -dirty where files differ that could matter; None on a machine without
    git or the history."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    try:
        head = git("rev-parse", "HEAD").stdout.strip()
        # not results and their tables, which benchmarks write: the next of them runs the same code
        changed = git("diff", "--quiet", "HEAD", "--", ":!bench/results", ":!*.md").returncode
    except OSError:
        return None
    return head + "-dirty" * bool(changed) if head else None


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor()


def machine(*packages: str, **facts: Any) -> Row:
    """What results hold for: commit, versions of xtoken and of the packages, processor, and further facts."""
    versions = {name: str(importlib.import_module(name).__version__) for name in ("xtoken", *packages)}
    return {"commit": commit(), **versions, "processor": processor(), **facts}


# --- time and memory


def timed(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a run; with `time.process_time` those that all threads computed, whoever else computes."""
    started = clock()
    run()
    return clock() - started


def median_seconds(
    run: Callable[[], Any], repeat: int, timer: Callable[[Callable[[], Any]], float] = timed, warm: int = 1
) -> float:
    """Median seconds of a run that is warm."""
    for _ in range(warm):
        run()
    return statistics.median(timer(run) for _ in range(repeat))


def process_memory(field: str) -> int | None:
    """Bytes of this process: ``VmRSS``, or ``VmHWM`` for the peak; None where Linux does not tell."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def peak_growth(run: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes by which the process, or what it has allocated on a GPU, grows at most in a run; None if nobody tells."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - allocated
    clear, before = Path("/proc/self/clear_refs"), process_memory("VmRSS")
    if before is None or not clear.exists():
        return None
    clear.write_text("5")  # the peak begins anew
    run()
    peak = process_memory("VmHWM")
    return None if peak is None else peak - before


# --- results


def table(rows: Sequence[Row], names: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table of the fields with these names; of those that the first row has unless given."""
    names = list(rows[0]) if names is None else names

    def cell(value: Any) -> str:
        return str(value) if not isinstance(value, float) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"

    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(name, "")) for name in names) + " |" for row in rows])


def write(path: Path, result: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def write_rows(path: Path, machine: Row, rows: list[Row], key: Sequence[str]) -> None:
    """Writes the rows beside those that earlier runs on the same machine, commit and versions left there.

    A new row takes the place of the one with the same fields named by `key`.
    """
    if path.exists():
        before = json.loads(path.read_text())
        new = {tuple(row.get(name) for name in key) for row in rows}
        if before["machine"] == machine:
            rows = [row for row in before["rows"] if tuple(row.get(name) for name in key) not in new] + rows
    write(path, {"machine": machine, "rows": rows})
