"""The layers know only what is below them."""

from __future__ import annotations

import re
from pathlib import Path

import xtoken

ROOT = Path(__file__).parents[1]


def test_the_core_knows_neither_torch_nor_python():
    sources = [
        path
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in {".cpp", ".h", ".cu", ".cuh"} and "bindings" not in path.parts
    ]
    assert len(sources) > 10
    for path in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10|Python\.h|pybind11)", path.read_text()), path


def test_every_source_opens_with_what_it_holds():
    sources = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "tests" / "cuda_emulator").glob("*.*")]
    for path in [path for path in sources if path.suffix in {".cpp", ".h", ".cu", ".cuh"}]:
        assert path.read_text().startswith("// "), path
    for path in [*(ROOT / "xtoken").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert path.read_text().startswith('"""'), path


def test_every_source_is_built():
    listed = (ROOT / "CMakeLists.txt").read_text()
    for path in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]:
        assert path.relative_to(ROOT).as_posix() in listed, path


def test_public_names_exist_and_are_documented():
    for name in xtoken.__all__:
        assert getattr(getattr(xtoken, name), "__doc__", None), name
