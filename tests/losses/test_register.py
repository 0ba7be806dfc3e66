"""A loss is a place: its folders, its test, and nothing else in the project names it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from xtoken.losses import Loss, registered

ROOT = Path(__file__).parents[2]

SOURCES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".cmake", ".txt", ".toml"}
"""Of code; documents and recipes may name every loss."""

PUBLIC = {
    "xtoken/__init__.py",
    "xtoken/losses/__init__.py",
    "xtoken/reference.py",
    "xtoken/audit.py",
    "tests/test_audit.py",
}
"""The public names, and the adviser."""


def files() -> list[str]:
    """The project's files of code, also those that are not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("needs the project's repository")
    return [name for name in listed.stdout.split() if Path(name).suffix in SOURCES and (ROOT / name).is_file()]


def folder_of(loss: type[Loss]) -> str:
    return loss.__module__.rpartition(".")[2]


def names_of(loss: type[Loss]) -> re.Pattern[str]:
    """How a loss is named: its name in quotes, its public function, its class, its title, and its folder in a path."""
    folder = folder_of(loss)
    spellings = [
        rf"""["']{loss.name}["']""",
        rf"(?:linear_)?{folder}_loss",
        rf"\b{loss.__name__}\b",
        rf"(?i:\b{re.escape(loss.title)}\b)",
        rf"losses[./]{folder}\b",
    ]
    return re.compile("|".join(spellings))


def is_its_own(name: str, loss: type[Loss]) -> bool:
    folder = folder_of(loss)
    return name in PUBLIC or f"losses/{folder}/" in name or name == f"tests/losses/test_{folder}.py"


@pytest.mark.parametrize("name", registered())
def test_nothing_else_names_a_loss(name: str) -> None:
    loss = registered()[name]
    pattern = names_of(loss)
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in files()
        if not is_its_own(path, loss)
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)
