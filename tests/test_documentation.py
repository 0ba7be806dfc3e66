"""What the documentation says is so: examples run, tables are those of the results, names, options and files exist."""

from __future__ import annotations

import contextlib
import doctest
import functools
import importlib
import inspect
import io
import pkgutil
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tokenizers import byte_level

import xtoken
from xtoken import cli

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import tables  # noqa: E402

MODULES = [
    m.name for m in pkgutil.walk_packages(xtoken.__path__, "xtoken.") if not m.name.endswith(("_core", "__main__"))
]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTES = [*sorted((ROOT / "csrc").rglob("README.md")), ROOT / "tests" / "cuda_emulator" / "README.md"]
COMMANDS = ("align", "audit", "cache-teacher", "check", "demo", "project", "report", "show", "train")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)


def quoted(document: Path) -> list[str]:
    """What a document quotes as code: within lines, and line by line in fenced blocks."""
    fenced = re.findall(r"^```\w+\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose) + [line for block in fenced for line in block.splitlines()]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_site_takes_no_sentence_for_a_parameter() -> None:
    napoleon = pytest.importorskip("sphinx.ext.napoleon")
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    found = set()
    for name in xtoken.__all__:
        lines = (inspect.getdoc(getattr(xtoken, name)) or "").split("\n")
        conf["end_sections"](None, "", name, None, None, lines)
        found |= set(re.findall(r"^:param (.*?):", str(napoleon.NumpyDocstring(lines)), re.MULTILINE))
    assert {"labels", "top_k", "student_tok"} <= found
    assert not [one for one in found if " " in one or not one]


@pytest.mark.parametrize("document", GUIDES, ids=name_of)
def test_examples(document: Path) -> None:
    outcome = doctest.testfile(str(document), module_relative=False)
    assert outcome.failed == 0
    assert outcome.attempted >= (8 if document.name == "README.md" else 0)


def save_model(seed: str, tokenizer: Any, folder: Path) -> None:
    """A small random model as a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(len(seed))
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What snippets take for granted: two tokenizers, their models, a batch of both, the corpus ``aligned``."""
    from pydoc_data.topics import topics

    texts = [text for name in sorted(topics) for text in topics[name].split("\n\n") if text.strip()]
    student_tok, teacher_tok = byte_level(600, texts[::9]), byte_level(900, texts[::7])
    folder = tmp_path_factory.mktemp("documentation")
    (folder / "texts.txt").write_text("\n".join(" ".join(text.split()) for text in texts[:40]) + "\n")
    xtoken.align_corpus(student_tok, teacher_tok, folder / "texts.txt", folder / "aligned", progress=False)
    names: dict[str, Any] = {"torch": torch, "xtoken": xtoken, "folder": folder}
    for side, tokenizer in (("student", student_tok), ("teacher", teacher_tok)):
        rows = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(texts[:3])]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits = torch.randn(*ids.shape, tokenizer.get_vocab_size(), requires_grad=side == "student")
        save_model(side, tokenizer, folder / side.upper())
        names |= {f"{side}_tok": tokenizer, f"{side}_ids": ids, f"{side}_mask": mask, f"{side}_logits": logits}
    names["labels"] = names["student_ids"].masked_fill(names["student_mask"] == 0, -100)
    return names


@pytest.mark.parametrize("document", GUIDES, ids=name_of)
def test_snippets(document: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(given["folder"])
    monkeypatch.setenv("XTOKEN_CACHE", str(given["folder"] / "cache"))
    for lazy in ("data", "integrations", "train"):  # as for somebody who has imported xtoken only
        monkeypatch.delattr(xtoken, lazy, raising=False)
    names = dict(given)
    for block in blocks(document, "python"):
        if not block.startswith(">>>"):
            exec(compile(block, name_of(document), "exec"), names)


def test_the_loop_of_the_readme_runs() -> None:
    assert any("loss.backward()" in block and ">>>" not in block for block in blocks(ROOT / "README.md", "python"))


@pytest.mark.parametrize("document", NOTES, ids=name_of)
def test_snippets_of_notes_compile(document: Path) -> None:
    for block in blocks(document, "python"):
        compile(block, name_of(document), "exec")


@pytest.mark.parametrize("document", [*GUIDES, *NOTES], ids=name_of)
def test_names_exist(document: Path) -> None:
    for code in quoted(document):
        for name in re.findall(r"(?<![\w./])xtoken(?:\.[A-Za-z_]\w*)+", code):
            found: Any = xtoken
            for k, part in enumerate([] if name == "xtoken._cuda" else name.split(".")[1:], 2):
                if not hasattr(found, part):
                    importlib.import_module(".".join(name.split(".")[:k]))
                found = getattr(found, part)


@functools.cache
def help_of(command: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):  # of argparse
        cli.main([*command.split(), "--help-all" if command == "train" else "--help"])
    return text.getvalue()


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@pytest.mark.parametrize("document", GUIDES, ids=name_of)
def test_options_exist(document: Path) -> None:
    everywhere = options_in("".join(map(help_of, ("", *COMMANDS))))
    scripts = [*(ROOT / "bench").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    everywhere |= {option for script in scripts for option in options_in(script.read_text())}
    for code in quoted(document):
        if "vllm serve" in code or "torchrun" in code:  # whose options are their own
            continue
        command = re.search(r"xtoken (train|align|audit|cache-teacher|check|project|report|show|demo)\b", code)
        allowed = options_in(help_of(command[1])) if command else everywhere
        assert options_in(code) <= allowed, code


def test_all_that_is_public_is_on_the_page_of_the_api() -> None:
    page = set(re.findall(r"^   (\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    modules = xtoken, xtoken.data, xtoken.report, xtoken.train
    assert {name for module in modules for name in module.__all__} - page == {"__version__"}


@pytest.mark.parametrize("document", GUIDES, ids=name_of)
def test_files_and_targets_exist(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / link).exists(), link
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in quoted(document):
        for path in re.findall(
            r"(?<![\w./])(?:bench|cmake|csrc|docs|recipes|requirements|tests|xtoken)/[\w./-]*", code
        ):
            assert "<" in code or (ROOT / path).exists(), path
        assert set(re.findall(r"\bmake ([a-z]+)\b", code)) <= targets, code


def test_tables_are_those_of_the_results() -> None:
    for document in tables.documents():
        assert tables.with_tables(document.read_text()) == document.read_text(), "run python bench/tables.py"
    assert sum(len(tables.PLACE.findall(document.read_text())) for document in tables.documents()) >= len(tables.TABLES)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
