"""Fixtures of all tests: real tokenizers and their vocabularies, one of each a session; tests that need a GPU."""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch
from old_versions import OF_TRAINING, READS_GGUF, TRAINS
from real_tokenizers import LOADERS

from xtoken import Vocabulary, sample

# Times depend on what else the machine does; what is drawn does not depend on the day.
hypothesis.settings.register_profile("xtoken", deadline=None, derandomize=True)
hypothesis.settings.load_profile("xtoken")

REPEATED = {"emulated", "on_gpu", "cpu:portable", "cpu:avx2", "reference", torch.float16}
"""Backends of the losses other than the CPU's fastest, and a type, that --quick leaves out."""

collect_ignore = [] if TRAINS else OF_TRAINING

NO_GPU = "no GPU"
NOT_BUILT = "this machine has a GPU, but this build of xtoken has no CUDA kernels to run on it; `make cuda` builds them"


def why_no_gpu() -> str | None:
    """Why nothing can run on a GPU here; None if it can."""
    if not torch.cuda.is_available():
        return NO_GPU
    return None if importlib.util.find_spec("xtoken._cuda") else NOT_BUILT


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out what takes long: see tests/conftest.py")
    parser.addoption("--no-tokenizers", action="store_true", help="skip tests that read real tokenizers")
    parser.addoption("--every-file", action="store_true", help="fail if a file of tests holds none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what runs on a GPU, and skips it where none can be used; with --quick leaves out what takes long.

    Tests of the losses' backend "on_gpu" are marked `cuda` here. --quick leaves out tests marked `slow` or `wide`,
    those that read real tokenizers, and of those that are repeated for every backend and type the repetitions in
    `REPEATED`.
    """
    if config.getoption("--every-file"):
        empty = {*Path(__file__).parent.rglob("test_*.py")} - {item.path for item in items}
        if empty:
            raise pytest.UsageError(f"files that hold no tests: {', '.join(sorted(map(str, empty)))}")
    reason = why_no_gpu()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        names = {value for value in parameters if isinstance(value, (str, torch.dtype))}
        if "on_gpu" in names:
            item.add_marker(pytest.mark.cuda)
        if reason is not None and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))
        is_long = any(map(item.get_closest_marker, ("slow", "wide"))) or not names.isdisjoint(REPEATED)
        is_long = is_long or "tokenizer" in getattr(item, "fixturenames", ())
        (left_out if is_long and config.getoption("quick") else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection() -> None:
    gc.disable()  # nothing of what files import is garbage


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def keep_what_is_there() -> None:
    """Garbage is looked for in what a file's tests make, not among the million objects of what is imported: each run of
    a trainer looks several times, which was half of its time."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if why_no_gpu() == NOT_BUILT:
        terminalreporter.section("GPU", yellow=True)
        terminalreporter.line(NOT_BUILT)


WHOLE_SAMPLE = {name: getattr(sample, name) for name in ("_texts_by_rule", "_vocabulary_words")}


@pytest.fixture(scope="session", autouse=True)
def short_sample() -> Iterator[None]:
    """A tenth of the text that piece indices are calibrated on, since all of it takes seconds; see `whole_sample`."""

    @functools.cache
    def tenth() -> tuple[str, ...]:
        source = sample._Source()
        return tuple(text for maker in sample._MAKERS for text in itertools.islice(maker(source), 0, None, 10))

    words = WHOLE_SAMPLE["_vocabulary_words"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "_texts_by_rule", tenth)
        patch.setattr(sample, "_vocabulary_words", lambda vocabularies: itertools.islice(words(vocabularies), 3))
        yield


@pytest.fixture
def whole_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text that users have."""
    for name, value in WHOLE_SAMPLE.items():
        monkeypatch.setattr(sample, name, value)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """A tokenizer by its name in LOADERS."""
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if request.config.getoption("--no-tokenizers"):
            pytest.skip("--no-tokenizers")
        if name == "gemma3" and not READS_GGUF:
            pytest.skip("transformers 4 does not cut words as Gemma does")
        if name not in loaded:
            loaded[name] = LOADERS[name](tmp_path_factory.mktemp(name))
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Callable[[str], Any]) -> Callable[[str], Vocabulary]:
    """A vocabulary by its name in LOADERS."""
    parsed: dict[str, Vocabulary] = {}

    def get(name: str) -> Vocabulary:
        if name not in parsed:
            parsed[name] = Vocabulary.from_tokenizer(tokenizer(name))
        return parsed[name]

    return get
