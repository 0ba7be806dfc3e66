"""Every benchmark runs, at its smallest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_bench_align(tmp_path):
    output = tmp_path / "align.json"
    command = [
        sys.executable,
        str(ROOT / "bench" / "bench_align.py"),
        "--student",
        "llama3",
        "--teacher",
        "smollm2",
        "--lengths",
        "256",
        "--tokens",
        "4000",
        "--threads",
        "1",
        "--repeat",
        "1",
        "--hostile-tokens",
        "0",
        "--output",
        str(output),
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = json.loads(output.read_text())
    assert [row["method"] for row in results["rows"]] == ["bytes", "auto", "dp"]
    assert all(row["million_tokens_per_second"] > 0 for row in results["rows"])
    assert "| llama3 / smollm2 | 256 | 1 | dp |" in printed
    assert results["machine"]["xtoken"]


def test_bench_align_on_hostile_input():
    part = {"run": "measure_hostile", "name": "random a, b", "method": "dp", "size": 60}
    command = [sys.executable, str(ROOT / "bench" / "bench_align.py"), "--part", json.dumps(part)]
    row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (row["student_tokens"], row["teacher_tokens"], row["optimal"]) == (60, 60, True)
    assert row["chunks"] > 20
