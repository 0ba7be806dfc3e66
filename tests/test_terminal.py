"""What commands print never steers the terminal: tokens, texts and paths show their control characters escaped."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_tokenizers import byte_level

from xtoken import Alignment, Vocabulary
from xtoken.cli import main

HOSTILE = ["\x1b[31m", "\u202e", "\x07", "\x9b2J", "\u2066", "\r", "\x7f", "\x1b]0;title\x07"]
TEXT = "red \x1b[31m, turned \u202e, rung \x07, wiped \x9b2J\r, new\nline \x1b]0;title\x07"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers with such tokens, in a folder with such a name, and a corpus."""
    folder = tmp_path_factory.mktemp("terminal") / "\x1b[31m\u202e\x07\n"
    folder.mkdir()
    for name, size in (("s", 300), ("t", 320)):
        tokenizer = byte_level(size, [TEXT] * 9)
        tokenizer.add_tokens(HOSTILE[: 4 if name == "s" else None])
        tokenizer.add_special_tokens(HOSTILE[4:6])
        tokenizer.save(str(folder / f"{name}.json"))
    (folder / "corpus.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (folder / "broken.jsonl").write_text("{\x1b[31m\n")
    return folder


COMMANDS: dict[str, list[str]] = {
    "audit": ["audit"],
    "audit, JSON": ["audit", "--json"],
    "audit of a class": ["audit", "--critical", r"\x1b.*"],
    "show": ["show", TEXT],
    "show, JSON": ["show", TEXT, "--json"],
    "project": ["project", "--output", "FOLDER/W"],
    "pieces": ["project", "--pieces", "--texts", "FOLDER/corpus.jsonl", "--output", "FOLDER/P"],
    "align": ["align", "--input", "FOLDER/corpus.jsonl", "--output", "FOLDER/out"],
    "align what is not there": ["align", "--input", "FOLDER/none.jsonl", "--output", "FOLDER/out2"],
    "align what is broken": ["align", "--input", "FOLDER/broken.jsonl", "--output", "FOLDER/out3"],
    "report": ["report", "--text", TEXT, "--output", "FOLDER/r.html"],
    "train on what is not there": ["train", "--data", "FOLDER/none.jsonl", "--output_dir", "FOLDER/o"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, *rest = (part.replace("FOLDER", str(folder)) for part in COMMANDS[name])
    pair = ["--student", str(folder / "s.json"), "--teacher", str(folder / "t.json")]
    with contextlib.suppress(SystemExit):
        main([command, *pair, *rest])
    out, err = capsys.readouterr()
    assert out or err
    assert all(c.isprintable() or c == "\n" for c in out + err), (out, err)
    if "JSON" in name:
        assert json.loads(out)


def test_a_drawing_steers_by_its_own_colours_alone() -> None:
    tokens = Vocabulary([text.encode() for text in [*HOSTILE, "\n"]])
    ids = list(range(len(tokens)))
    drawn = Alignment([[i, i + 1, i, i + 1] for i in ids], student_ids=ids, teacher_ids=ids)
    plain = drawn.pretty(tokens, tokens, color=False)
    assert all(c.isprintable() or c == "\n" for c in plain)
    coloured = drawn.pretty(tokens, tokens, color=True, width=10_000)
    assert coloured.count("\x1b") == 2 * 3 * len(ids)  # in two lines, two before a cell and one behind it


def test_the_log_and_what_debug_shows(folder: Path) -> None:
    """Of the command itself, whose last handlers are the interpreter's: what a path, or a server, may say."""
    script = (
        "import logging, sys; from xtoken import cli; cli.main(['config']);"
        "logging.getLogger('xtoken').warning('%s\\n%s', *sys.argv[1:]);"
        "sys.exit(cli.main(['--debug', 'audit', '--student', sys.argv[1], '--teacher', 'x']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(folder / "none"), HOSTILE[0]], capture_output=True, text=True
    )
    assert run.returncode == 1
    lines = run.stderr.split("\n")
    assert any(line.startswith("FileNotFoundError: --student: no such file or folder: ") for line in lines)
    assert r"\u001b[31m" in lines
    assert all(c.isprintable() or c == "\n" for c in run.stderr), run.stderr
