"""The stub of the compiled core says what is in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xtoken import _core

ROOT = Path(__file__).parents[1]

OF_PYBIND11 = re.compile(r"metaclass differs|__pybind11_|__init__ is inconsistent, stub does not have \*")
"""What no stub can say."""


@pytest.mark.slow
def test_core(tmp_path: Path) -> None:
    """By itself: mypy would read torch for the package around it."""
    pytest.importorskip("mypy")
    for file in (_core.__file__, ROOT / "xtoken" / "_core.pyi"):
        shutil.copy(file, tmp_path)
    command = [sys.executable, "-m", "mypy.stubtest", "_core", "--concise"]
    command += ["--mypy-config-file", str(ROOT / "pyproject.toml")]
    found = {"PYTHONPATH": str(tmp_path), "MYPYPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **found})
    printed = (done.stdout + done.stderr).splitlines()
    assert any(OF_PYBIND11.search(line) for line in printed), printed  # the module was looked at
    assert [line for line in printed if not OF_PYBIND11.search(line)] == []
