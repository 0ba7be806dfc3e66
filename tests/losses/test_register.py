"""A loss is a place: its folders, its tests, and nothing else in the project names it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from harness import folder_of

from xtoken.losses import registered

ROOT = Path(__file__).parents[2]

SOURCES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".cmake", ".txt", ".toml"}
"""Of code; documents and recipes may name every loss."""

PUBLIC = {
    "xtoken/losses/functions.py",
    "xtoken/reference.py",
    "xtoken/train/help.txt",
    "xtoken/audit.py",
    "tests/test_audit.py",
    # What adapts and measures a trainer of TRL, whose own names are those of two losses.
    "xtoken/integrations/trl.py",
    "tests/train/test_trl.py",
    "bench/bench_trl.py",
}
"""The public names, and the adviser."""

RESULTS = ("ce", "kd")
"""What results and logs call cross-entropy and the sum of all distillation losses. A loss has one of these names too:
in quotes it is that loss only in the places of `as_a_loss`, and its title, which is the sum's, is not looked for."""


def files() -> list[str]:
    """The project's files of code, also those that are not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("needs the project's repository")
    return [name for name in listed.stdout.split() if Path(name).suffix in SOURCES and (ROOT / name).is_file()]


def as_a_loss(name: str) -> list[str]:
    """Where the name of a result is a loss's: beside a word that has to do with losses (but not beside the other
    result), compared, looked up in a table, alone on its line."""
    quoted = rf"""(?<!\w\[)["']{name}["']"""
    others = "|".join(one for one in RESULTS if one != name)
    words = r"(?i:loss|operation|regist|launch|check)"
    return [
        rf"""^(?!.*["'](?:{others})["']).*(?:{words}.*{quoted}|{quoted}.*{words})""",
        rf"[=!]= *{quoted}",
        rf"""[A-Z)]\[["']{name}["']\]""",
        rf"\({quoted}, *\{{",
        rf"^\s*{quoted},?$",
    ]


def names_of(name: str) -> re.Pattern[str]:
    """How a loss is named: its name in quotes, its public function, its class, its title, and its folder in a path."""
    loss, folder = registered()[name], folder_of(name)
    spellings = [rf"(?:linear_)?{folder}_loss", rf"losses[./]{folder}\b"]
    if name in RESULTS:
        spellings += [rf"\b{loss.__name__}[(.\[]\w", rf"import .*\b{loss.__name__}\b", *as_a_loss(name)]
    else:
        spellings += [rf"""["']{name}["']""", rf"\b{loss.__name__}\b", rf"(?i:\b{re.escape(loss.title)}\b)"]
    return re.compile("|".join(spellings))


def is_its_own(path: str, name: str) -> bool:
    folder = folder_of(name)
    tests = rf"tests/losses/test_{folder}(_\w+)?\.py"
    return path in PUBLIC or f"losses/{folder}/" in path or re.fullmatch(tests, path) is not None


def others_that_name(name: str, paths: Iterable[str], root: Path) -> list[str]:
    """The lines that name a loss, in files that are not its own."""
    pattern = names_of(name)
    return [
        f"{path}:{number}: {line.strip()}"
        for path in paths
        if not is_its_own(path, name)
        for number, line in enumerate((root / path).read_text().splitlines(), 1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize("name", registered())
def test_nothing_else_names_a_loss(name: str) -> None:
    paths = files()
    assert f"xtoken/losses/{folder_of(name)}/__init__.py" in paths
    found = others_that_name(name, paths, ROOT)
    others = "\n".join(found)
    assert not found, f"a name or title that says something else too needs to be another; found in\n{others}"


@pytest.mark.parametrize("name", registered())
def test_a_loss_has_its_tests_and_its_place_in_the_documentation(name: str) -> None:
    folder = folder_of(name)
    assert (ROOT / f"tests/losses/test_{folder}.py").is_file()
    assert re.search(rf"^\| .+ \| `{folder}_loss` \| .+ \| .+ \|$", (ROOT / "docs/losses.md").read_text(), re.MULTILINE)
    listed = re.findall(r"^   (\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert {f"{folder}_loss", f"linear_{folder}_loss"} <= set(listed)


@pytest.mark.parametrize("name", registered())
def test_what_names_a_loss_is_found(name: str, tmp_path: Path) -> None:
    loss, folder = registered()[name], folder_of(name)
    lines = [
        f'teacher = Teacher(loss="{name}")',
        f"arguments += ['--loss', '{name}']",
        f'    "{name}",',
        f'if name == "{name}":',
        f'public = OPERATIONS["{name}"].public',
        f'CALLS = ("{name}", {{"temperature": 2.0}})',
        f'check(backend, "{name}", case)',
        f"loss = {folder}_loss(student, teacher)",
        f"xtoken.linear_{folder}_loss(hidden, head, teacher)",
        f"from xtoken.losses.{folder} import cuda",
        f'#include "losses/{folder}/cpu.h"',
        f"from somewhere import {loss.__name__}",
        f"made = {loss.__name__}(temperature)",
    ]
    if name not in RESULTS:
        lines += [f"# The chunks of {loss.title}.", f"// As for {loss.title.lower()}, but faster."]
    others = [
        'total, parts = loss(student), {"ce": 1.0, "kd": 2.0}',
        'assert_close(parts["kd"], operation.public(case))',
        'kd_weight * parts["kd"]  # CE / KD of the step',
        'assert logged(trainer, "kd") == [0.0] * 4',
        "the prefix of a marigold",
    ]
    own = f"xtoken/losses/{folder}/cpu.py", f"tests/losses/test_{folder}.py", f"tests/losses/test_{folder}_cuda.py"
    paths = "xtoken/train/trainer.py", "csrc/losses/shared/cpu.h", *own, f"tests/losses/test_cpu_{folder}.py"
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("\n".join([*others, *lines]))
    found = others_that_name(name, paths, tmp_path)
    assert found == [
        f"{path}:{number}: {line.strip()}"
        for path in (*paths[:2], paths[-1])
        for number, line in enumerate(lines, len(others) + 1)
    ]
