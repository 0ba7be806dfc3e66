"""The layers know only what is below them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

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
    of_a_loss = {"cpu.cpp", "cpu_kernel.cpp", "cpu_plan.cpp", "cuda.cu"}  # see cmake/Losses.cmake
    for path in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]:
        if path.parent.parent.name == "losses":
            assert path.name in of_a_loss, path
            assert f"xtoken_loss({path.parent.name})" in listed, path
        else:
            assert path.relative_to(ROOT).as_posix() in listed, path


def test_data_and_training_are_imported_on_use():
    program = (
        "import sys, xtoken\n"
        "assert {'data', 'train'} <= set(dir(xtoken))\n"
        "assert not {'transformers', 'pyarrow', 'xtoken.data', 'xtoken.train'} & set(sys.modules)\n"
        "assert xtoken.data.AlignedDataset.__module__ == 'xtoken.data' and 'transformers' not in sys.modules\n"
        "assert xtoken.train.XTokenTrainer.__module__ == 'xtoken.train.trainer'\n"
        "assert 'transformers.trainer' in sys.modules and not hasattr(xtoken, 'trains')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def returned(place: ModuleType) -> Iterator[tuple[str, type]]:
    """Each public function, method and property of a module with each class that its return annotation names."""

    def classes(hint: Any) -> Iterator[type]:
        if get_args(hint):
            for part in get_args(hint):
                yield from classes(part)
        elif isinstance(hint, type):
            yield hint

    for name in place.__all__:
        one = getattr(place, name)
        for key, member in (vars(one) if inspect.isclass(one) else {name: one}).items():
            function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
            if inspect.isfunction(function) and (key == "__getitem__" or not key.startswith("_")):
                yield from ((f"{name}.{key}", kind) for kind in classes(get_type_hints(function).get("return")))


def test_what_public_functions_return_is_public():
    places = [xtoken, xtoken.corpus, xtoken.data, xtoken.train]
    names = [getattr(place, name) for place in (*places, xtoken.losses) for name in place.__all__]
    public = {one for one in names if inspect.isclass(one)}
    found = [pair for place in places for pair in returned(place)]
    assert {xtoken.LearnableProjection, xtoken.corpus.Manifest, xtoken.Alignment} <= {kind for _, kind in found}
    for where, kind in found:
        assert kind in public or not kind.__module__.startswith("xtoken."), (where, kind)


def test_public_names_exist_and_are_documented():
    for name in xtoken.__all__:
        assert getattr(getattr(xtoken, name), "__doc__", None), name
