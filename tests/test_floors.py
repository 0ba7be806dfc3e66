"""The oldest versions that are promised are those that `make floors` tries, and the README's."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
ALL, CORE, TRAINING = r".*", r"\ndependencies = \[.*?\]", r"\ntrain = \[.*?\]"
UNTRIED = {"trl"}
"""Whose oldest version cannot be installed beside the others."""

Pins = set[tuple[str, Version]]


def promised(part: str) -> Pins:
    """In the part of pyproject.toml that a pattern finds."""
    found = re.findall(r'"(\w+)>=([\d.]+)"', re.search(part, PROJECT, re.DOTALL)[0])
    return {(name, Version(oldest)) for name, oldest in found}


def tried(python: str) -> Pins:
    """On a version of Python."""
    lines = (ROOT / "requirements" / "floors.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if not line.startswith("#")]
    return {
        (one.name, Version(pin.version))
        for one in wanted if one.marker is None or one.marker.evaluate({"python_version": python})
        for pin in one.specifier if pin.operator == "=="
    }  # fmt: skip


def test_they_are_the_projects() -> None:
    assert {one for one in promised(ALL) if one[0] not in UNTRIED} == tried("3.10") | tried("3.11")
    assert promised(CORE) <= tried("3.10")
    assert promised(TRAINING) <= tried("3.11")


def test_they_are_the_readmes() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    found = [(name, Version(oldest)) for name, oldest in re.findall(r"(\w+) >= ([\d.]*\d)", readme)]
    core, train = dict(promised(CORE)), dict(promised(TRAINING))
    assert found == [("torch", core["torch"]), *((name, train[name]) for name in ("torch", "transformers"))]
    assert re.search(r'requires-python = ">=([\d.]+)"', PROJECT)[1] in re.findall(r"Python ([\d.]+) or newer", readme)
