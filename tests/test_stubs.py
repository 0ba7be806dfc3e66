"""The stub of the compiled core says what is in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

OF_PYBIND11 = re.compile(r"metaclass differs|__pybind11_|__init__ is inconsistent, stub does not have \*")
"""What no stub can say."""


@pytest.mark.slow
def test_core() -> None:
    command = [sys.executable, "-m", "mypy.stubtest", "xtoken._core", "--concise"]
    command += ["--mypy-config-file", "pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    printed = (done.stdout + done.stderr).splitlines()
    assert any(OF_PYBIND11.search(line) for line in printed), printed  # the module was looked at
    assert [line for line in printed if not OF_PYBIND11.search(line)] == []
