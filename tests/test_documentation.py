"""Examples in the README and in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import xtoken

MODULES = [
    m.name for m in pkgutil.walk_packages(xtoken.__path__, "xtoken.") if not m.name.endswith(("_core", "__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_readme():
    outcome = doctest.testfile(str(Path(__file__).parents[1] / "README.md"), module_relative=False)
    assert outcome.failed == 0
    assert outcome.attempted >= 8
