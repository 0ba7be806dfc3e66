"""Mutated files in short; see fuzzing.py for the long form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_mutated_files_are_refused_or_read() -> None:
    """In a process of its own, which a crash, a hang or a giant allocation would end."""
    script = Path(__file__).parent / "fuzzing.py"
    run = subprocess.run([sys.executable, str(script), "300"], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert sum(int(line.split()[0]) for line in run.stdout.splitlines()) == 6 * 300
