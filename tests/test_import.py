"""``import xtoken`` imports nothing else; every public name and module is there when it is used."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pydoc
import subprocess
import sys

import pytest

import xtoken


def loaded_after(statement: str) -> set[str]:
    """The modules of a new process after a statement."""
    code = f"import sys; {statement}; print('\\nmodules', *sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


def test_nothing_happens_at_import() -> None:
    modules = loaded_after("import xtoken")
    assert {one for one in modules if one.startswith("xtoken")} == {"xtoken"}
    assert not modules & {"torch", "numpy", "transformers", "tokenizers"}


def test_all_losses_are_registered_with_the_first_name() -> None:
    known = list(xtoken.losses.registered())
    first = "import xtoken; xtoken.Vocabulary; from xtoken.losses import registered"
    assert "torch" in loaded_after(f"{first}; assert list(registered()) == {known}")


def test_threads_that_come_at_once() -> None:
    names = "Aligner", "losses", "train", "Teacher", "data"
    threads = f"""
import threading, xtoken
together, found = threading.Barrier({len(names)}), []
def use(name):
    together.wait()
    found.append(getattr(xtoken, name))
threads = [threading.Thread(target=use, args=(name,)) for name in {names}]
for one in threads: one.start()
for one in threads: one.join()
assert len(found) == {len(names)}
"""
    loaded_after(f"exec({threads!r})")


def test_it_can_be_looked_at() -> None:
    names = {name for name, _ in inspect.getmembers(xtoken)}
    assert {"Aligner", "train"} <= names
    assert "__main__" not in names
    assert "xtoken" in pydoc.render_doc(xtoken)


def test_names() -> None:
    assert set(xtoken.__all__) | {"train", "data", "report", "losses"} <= set(dir(xtoken))
    for name in set(xtoken.__all__) - {"__version__", "reference"}:
        found = getattr(xtoken, name)
        assert getattr(importlib.import_module(found.__module__), found.__name__) is found
        assert pickle.loads(pickle.dumps(found)) is found
    assert xtoken.train is importlib.import_module("xtoken.train")
    assert not hasattr(xtoken, "__wrapped__")
    with pytest.raises(AttributeError, match="module 'xtoken' has no attribute 'nothing'"):
        _ = xtoken.nothing  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        from xtoken import nothing  # type: ignore[attr-defined]  # noqa: F401
