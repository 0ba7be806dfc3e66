"""The command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from small_tokenizers import byte_level

from xtoken import PieceIndex, ProjectionMatrix, Vocabulary, _core, sample_texts
from xtoken.cli import main


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    paths = []
    for name in ("smollm2", "mistral"):
        paths.append(str(folder / f"{name}.json"))
        tokenizer(name).backend_tokenizer.save(paths[-1])
    return paths


def test_show(files, capsys):
    pair = ["show", "--student", files[0], "--teacher", files[1]]
    assert main([*pair, "In 1995"]) == 0
    upper, lower = capsys.readouterr().out.splitlines()
    assert upper.split()[-4:] == ["1", "9", "9", "5"]
    assert lower.split()[-4:] == ["1", "9", "9", "5"]
    assert main([*pair, "In ♞", "--json", "--method", "bytes"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "".join(facts["teacher_tokens"][-3:]) == "\\xe2\\x99\\x9e"
    assert len(facts["student_ids"]) == len(facts["student_tokens"])
    assert facts["spans"]


def test_project(files, tmp_path, capsys):
    output = str(tmp_path / "w.safetensors")
    assert (
        main(["project", "--student", files[0], "--teacher", files[1], "--output", output, "--row-entries", "2"]) == 0
    )
    assert "ProjectionMatrix(" in capsys.readouterr().out
    W = ProjectionMatrix.load(output, files[0], files[1])
    assert int(W.row_ptr.diff().max()) == 2
    assert W.shape[0] == len(Vocabulary.from_tokenizer(files[0]))


def test_project_pieces(files, tmp_path, capsys):
    """The sample alone, and with texts of one's own."""
    output, own = str(tmp_path / "pieces.safetensors"), tmp_path / "own.txt"
    own.write_text("one line\nand another\n")
    command = ["project", "--student", files[0], "--teacher", files[1], "--output", output]
    seen = []
    for more in ([], ["--texts", str(own)]):
        assert main([*command, "--pieces", *more]) == 0
        printed = capsys.readouterr().out
        pieces = PieceIndex.load(output, files[0], files[1])
        assert printed == f"{output}: {pieces!r}\n{pieces.merged()}\n"
        seen.append(pieces.merged().texts)
    sample = len(sample_texts(*files))
    assert seen == [sample, sample + 2]
    assert main([*command, "--texts", str(own)]) == 1
    assert "--texts: expected --pieces with it" in capsys.readouterr().err


def test_errors_are_one_line_and_status_one(files, tmp_path, capsys):
    assert main(["audit", "--student", "./missing.json", "--teacher", files[1]]) == 1
    error = capsys.readouterr().err
    assert error.startswith("xtoken audit: tokenizer: no such file")
    assert error.count("\n") == 1
    assert main(["project", "--student", files[0], "--teacher", files[1], "--output", str(tmp_path / "no" / "w")]) == 1
    with pytest.raises(SystemExit, match="2"):
        main(["nonsense"])


@pytest.mark.parametrize(("command", "name"), [("project", "--row-entries"), ("cache-teacher", "--logprobs")])
def test_an_option_that_has_another_name(command, name, capsys):
    """``--top-k`` is the columns of a loss, in ``xtoken train``."""
    with pytest.raises(SystemExit, match="2"):
        main([command, "--top-k", "4"])
    assert f"error: --top-k is {name} now" in capsys.readouterr().err


def test_choices_are_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["align", "--help"])
    printed = capsys.readouterr().out
    for choices in ("--method {auto,bytes,dp}", "--engine {local,ray}", "--on-error {raise,skip}"):
        assert choices in printed


def test_installed_command_prints_the_configuration():
    output = subprocess.run(
        [sys.executable, "-m", "xtoken", "config"], capture_output=True, text=True, check=True
    ).stdout
    facts = dict(line.split("  ", 1) for line in output.splitlines())
    assert facts["xtoken"].strip() == _core.version
    assert facts["compiler"].strip().startswith(_core.compiler)
    assert facts["CUDA kernels"].strip().startswith(("sm_", "not built "))


def test_an_audit_counts_the_tokens_of_files(tmp_path, capsys):
    sides = []
    for name, size in (("student", 300), ("teacher", 280)):
        byte_level(size, ["a 19 201"]).save(str(tmp_path / f"{name}.json"))
        sides += [f"--{name}", str(tmp_path / f"{name}.json")]
    (tmp_path / "own.txt").write_text("7 7\n7\n")
    assert main(["audit", *sides, "--data", str(tmp_path / "own.txt"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["weighted"]
    assert facts["classes"]["digits_1"]["count"] == 3
    assert main(["audit", *sides, "--data", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"xtoken {_core.version}\n"
