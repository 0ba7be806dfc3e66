"""Mutated files and hostile calls in short; `make fuzz` is the long form, on a build with sanitizers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = 33


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_some_hundred_inputs() -> None:
    """In a process of its own, which a crash, a hang or a giant allocation would end."""
    count = 20
    script = Path(__file__).parent / "fuzzing.py"
    run = subprocess.run([sys.executable, str(script), str(count)], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    counts = re.findall(r"^ *(\d+) ", run.stdout, re.MULTILINE)  # transformers 4 prints something too
    assert sum(map(int, counts)) == count * TARGETS
