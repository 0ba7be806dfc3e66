"""What `make dist` would say of a wrong archive, and that workflows call targets of the Makefile and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import distribution
import pytest
import yaml

ROOT = Path(__file__).parents[1]

TRACKED = {".ci/run", "setup.py", "csrc/core/a.cpp", "tests/test_a.py", "xtoken/__init__.py", "xtoken/py.typed"}
SDIST = {"PKG-INFO", "setup.cfg", "xtoken.egg-info/SOURCES.txt", *(TRACKED - {".ci/run"})}
WHEEL = {
    "xtoken/__init__.py", "xtoken/py.typed", "xtoken/_core.cpython-311-x86_64-linux-gnu.so",
    "xtoken-0.1.0.dist-info/METADATA", "xtoken-0.1.0.dist-info/licenses/LICENSE",
}  # fmt: skip


def test_what_should_be_there_is_right() -> None:
    assert distribution.wrong_with_sdist(SDIST, TRACKED) == []
    assert distribution.wrong_with_wheel(WHEEL, TRACKED) == []


@pytest.mark.parametrize("name", ["csrc/core/a.cpp", "tests/test_a.py", "xtoken/py.typed"])
def test_what_an_sdist_lacks(name: str) -> None:
    assert distribution.wrong_with_sdist(SDIST - {name}, TRACKED) == [f"the sdist lacks {name}"]


@pytest.mark.parametrize("name", [".ci/run", "build/a.o", "xtoken/_core.cpython-311-x86_64-linux-gnu.so"])
def test_what_an_sdist_should_not_have(name: str) -> None:
    assert distribution.wrong_with_sdist(SDIST | {name}, TRACKED) == [f"the sdist has {name}, which it should not"]


def test_what_a_wheel_lacks_or_should_not_have() -> None:
    for name in ("xtoken/py.typed", "xtoken/_core.cpython-311-x86_64-linux-gnu.so"):
        [wrong] = distribution.wrong_with_wheel(WHEEL - {name}, TRACKED)
        assert wrong == f"the wheel lacks {name.partition('.cpython')[0]}"
    assert distribution.wrong_with_wheel(WHEEL - {"xtoken-0.1.0.dist-info/licenses/LICENSE"}, TRACKED)
    assert distribution.wrong_with_wheel(WHEEL | {"tests/test_a.py"}, TRACKED)


def test_tests_of_the_wheel_exist() -> None:
    assert [name for name in distribution.TESTS if not (ROOT / "tests" / name).is_file()] == []


def test_workflows_call_targets() -> None:
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    for path in workflows:
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            commands = [step["run"] for step in job["steps"] if "run" in step]
            assert commands, (path, name)
            for command in commands:
                choices = job["strategy"]["matrix"]["make"] if "matrix.make" in command else [command.split()[-1]]
                assert re.fullmatch(r"make [\w${}. ]+", command), command
                assert set(choices) <= targets, command
