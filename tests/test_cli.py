"""The command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from old_versions import needs_training
from small_tokenizers import byte_level

from xtoken import PieceIndex, ProjectionMatrix, Vocabulary, _core, sample_texts
from xtoken.alignment import METHODS
from xtoken.cli import app, main
from xtoken.corpus import KNOWN
from xtoken.terminal import working


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


@needs_training
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
    assert "--data: expected --pieces with it" in capsys.readouterr().err
    for option in (["--gamma", "0.5"], ["--beta", "1"], ["--row-entries", "2"], ["--reverse"]):
        assert main([*command, "--pieces", *option]) == 1
        assert f"{option[0]}: expected no --pieces with it" in capsys.readouterr().err


def test_what_is_read_is_not_overwritten(files, tmp_path, capsys):
    own = tmp_path / "own.txt"
    own.write_text("one line\n")
    sides = ["--student", files[0], "--teacher", files[1]]
    before = [Path(one).read_bytes() for one in (*files, own)]
    for command in (["project", *sides], ["report", *sides], ["project", "--pieces", *sides, "--data", str(own)]):
        assert main([*command, "--output", str(own) if "--data" in command else files[1]]) == 1
        assert "output: expected another place than /" in capsys.readouterr().err
    assert before == [Path(one).read_bytes() for one in (*files, own)]


def test_files_of_what_is_read_are_not_overwritten(files, tmp_path, capsys):
    folder, own = tmp_path / "model", tmp_path / "own.txt"
    folder.mkdir()
    own.write_text("one line\n")
    shutil.copy(files[0], folder / "tokenizer.json")
    (folder / "config.json").symlink_to(own)  # as in a cache: the link would make way
    sides = ["--student", str(folder), "--teacher", files[1]]
    for name in ("tokenizer.json", "config.json"):
        for command in (["project", *sides], ["report", *sides], ["report", str(folder)]):
            assert main([*command, "-o", str(folder / name)]) == 1
            assert f"output: expected another place than {folder / name}, which is read" in capsys.readouterr().err
    for command in (["align", *sides], ["cache-teacher", "--teacher", str(folder)]):
        assert main([*command, "--data", str(own), "-o", str(folder)]) == 1
        assert f"output: expected another place than {folder}, which is read" in capsys.readouterr().err
    assert main(["align", *sides, "--data", str(own), "-o", str(tmp_path), "--resume"]) == 1
    assert f"output: {tmp_path} holds" in capsys.readouterr().err
    assert (folder / "tokenizer.json").read_bytes() == Path(files[0]).read_bytes()
    assert (folder / "config.json").is_symlink()
    for _ in range(2):  # the second run replaces what the first one wrote
        assert main(["project", *sides, "-o", str(folder / "w.safetensors")]) == 0


def test_errors_are_one_line_and_status_one(files, tmp_path, capsys):
    assert main(["audit", "--student", "./missing.json", "--teacher", files[1]]) == 1
    error = capsys.readouterr().err
    assert error.startswith("xtoken audit: --student: no such file")
    assert error.count("\n") == 1
    assert main(["project", "--student", files[0], "--teacher", files[1], "--output", str(tmp_path / "no" / "w")]) == 1
    assert main(["nonsense"]) == 2


@needs_training
@pytest.mark.parametrize("option", ["requests", "timeout", "patience"])
def test_options_of_a_server_without_one(option, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("one line\n")
    command = ["cache-teacher", "--teacher", "./none", "--data", str(tmp_path / "own.txt"), "--output", f"{tmp_path}/c"]
    assert main([*command, f"--{option}", "5"]) == 1
    assert capsys.readouterr().err == f"xtoken cache-teacher: --{option}: expected --url with it, got none\n"


@pytest.mark.parametrize(("command", "name"), [("project", "--row-entries"), ("cache-teacher", "--logprobs")])
def test_an_option_that_has_another_name(command, name, capsys):
    """``--top-k`` is the columns of a loss, in ``xtoken train``."""
    assert main([command, "--top-k", "4"]) == 2
    assert f"--top-k is {name} now" in capsys.readouterr().err


def test_choices_are_in_the_help(capsys):
    assert main(["align", "--help"]) == 0
    printed = capsys.readouterr().out
    for option, known in (("method", METHODS), ("engine", KNOWN["engine"]), ("on-error", KNOWN["on_error"])):
        assert re.search(rf"--{option} +{{{','.join(known)}}}", printed)


def test_installed_command_prints_the_configuration():
    output = subprocess.run(
        [sys.executable, "-m", "xtoken", "config"], capture_output=True, text=True, check=True
    ).stdout
    facts = dict(line.split("  ", 1) for line in output.splitlines())
    assert facts["xtoken"].strip() == _core.version
    assert facts["compiler"].strip().startswith(_core.compiler)
    assert facts["CUDA kernels"].strip().startswith(("sm_", "not built "))


@needs_training
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
    assert main(["audit", *sides, "--json", "--critical", "numbers"]) == 0
    assert len(json.loads(capsys.readouterr().out)["critical"]) == 4
    assert main(["audit", *sides, "--data", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in capsys.readouterr().err
    (tmp_path / "own.jsonl").write_text('{"body": "7 7"}\n{"text": null}\n')  # nothing that could be counted
    assert main(["audit", *sides, "--data", str(tmp_path / "own.jsonl")]) == 1
    assert "--data: expected rows with text, messages or a prompt, got none" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"xtoken {_core.version}\n"


COMMANDS = tuple(typer.main.get_group(app).commands)


def test_help_is_there_at_once():
    """It imports neither torch nor what takes long beside it, and shows an example."""
    code = f"""
import sys
from xtoken.cli import main
for command in {COMMANDS}:
    assert main([command, "--help"]) == 0
    print("loaded:", *sys.modules)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        printed, _, rest = run.stdout.partition("loaded: ")
        loaded, _, run.stdout = rest.partition("\n")
        assert f"Example: xtoken {command}" in printed
        assert not {"torch", "transformers", "tokenizers", "numpy", "pyarrow"} & set(loaded.split()), command


def test_a_command_knows_its_words(capsys):
    """Usage errors are one line, which says what may be meant, and status 2."""
    pair = ["--student", "none.json", "--teacher", "none.json"]
    for given, said in (
        (["adit"], "audit"),
        (["audit", "--studnet", "x"], "--student"),
        (["audit", "--student", "x"], "--teacher"),
        (["show", *pair, "text", "--method", "byte"], "did you mean bytes?"),
        (["align", *pair, "--data", "x", "-o", "x", "--on-error", "skp"], "did you mean skip?"),
        (["project", *pair, "-o", "x", "--row-entries", "0"], "--row-entries"),
        (["project", *pair, "-o", "x", "--row-entries", "9999999999"], "1024"),
        (["cache-teacher", "--requests", "0"], "--requests"),
        (["cache-teacher", "--timeout", "0"], "--timeout"),
        (["cache-teacher", "--patience", "-1"], "--patience"),
        (["check", "--rows", "many"], "--rows"),
    ):
        assert main(given) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"xtoken {given[0]}: " if given[0] in COMMANDS else "xtoken: ")
        assert said in error
        assert error.endswith(" --help)\n")
        assert error.count("\n") == 1


UTF8 = {**os.environ, "PYTHONIOENCODING": "utf-8"}

OUTPUTS = {
    "project": ["--student", "a.json", "--teacher", "b.json"],
    "align": ["--student", "a.json", "--teacher", "b.json", "--data", "c.txt"],
    "cache-teacher": ["--teacher", "a.gguf", "--data", "c.txt"],
    "report": ["--student", "a.json", "--teacher", "b.json"],
    "train": ["--student", "a.gguf", "--teacher", "b.gguf", "--data", "c.txt"],
}


@needs_training
@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_that_cannot_be_written_is_found_before_the_work(command, tmp_path, monkeypatch, capsys):
    """And before inputs, which are not there, are looked at."""
    is_file = command in ("project", "report")
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir()
    os.mkfifo(tmp_path / "pipe")
    wrong = [tmp_path, tmp_path / "none" / "file"] if is_file else [tmp_path / "file", tmp_path / "file" / "out"]
    for output in (*wrong, tmp_path / "pipe"):
        assert main([command, *OUTPUTS[command], "-o", str(output)]) == 1
        error = capsys.readouterr().err
        said = "expected a f|expected a regular file|no such folder"
        assert re.match(rf"xtoken {command}: output: ({said})[^\n]*{tmp_path}[^\n]*\n$", error)
    if is_file:
        assert main([command, *OUTPUTS[command], "-o", f"s3:/{tmp_path}/w"]) == 1
        assert "output: expected a local file, got the URL s3://" in capsys.readouterr().err
    assert main([command, *OUTPUTS[command], "-o", ""]) == 1
    assert capsys.readouterr().err == f"xtoken {command}: output: expected a name\n"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "closed")  # root may write anywhere
    assert main([command, *OUTPUTS[command], "-o", str(tmp_path / "closed" / "x")]) == 1
    assert capsys.readouterr().err == f"xtoken {command}: output: no permission to write to {tmp_path}/closed\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["closed", "file", "pipe"]


@needs_training
def test_inputs_are_looked_at_before_the_first_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Vocabulary, "from_tokenizer", None)
    for name in ("a.json", "own.txt"):
        (tmp_path / name).touch()
    good, bad = str(tmp_path / "a.json"), str(tmp_path / "none.json")
    for given in (
        ["audit", "--student", good, "--teacher", bad],
        ["audit", "--student", good, "--teacher", good, "--data", str(tmp_path / "own.txt"), bad],
        ["audit", "--student", good, "--teacher", good, "--critical", "("],
        ["report", "--student", good, "--teacher", bad, "-o", str(tmp_path / "page.html")],
        ["project", "--student", bad, "--teacher", good, "-o", str(tmp_path / "w")],
        ["align", "--student", good, "--teacher", bad, "--data", good, "-o", str(tmp_path / "out")],
        ["cache-teacher", "--teacher", bad, "--data", good, "-o", str(tmp_path / "out")],
        ["cache-teacher", "--teacher", good, "--data", good, "-o", str(tmp_path / "out"), "--dtype", "flaot16"],
        ["cache-teacher", "--teacher", good, "--data", good, "-o", str(tmp_path / "out"), "--device", "gpu"],
        ["cache-teacher", "--teacher", good, "--data", good, "-o", str(tmp_path)],
    ):
        assert main(given) == 1
        error = capsys.readouterr().err
        assert re.search(r"no such file|no file matches|'\('|flaot16|'gpu'|not empty", error), error
        assert error.count("\n") == 1


@needs_training
def test_json(tmp_path, capsys):
    """Standard output is one document; what there is to read is not in it."""
    sides = []
    for name, size in (("student", 300), ("teacher", 280)):
        byte_level(size, ["a 19 201"]).save(str(tmp_path / f"{name}.json"))
        sides += [f"--{name}", str(tmp_path / f"{name}.json")]
    shape = [len(Vocabulary.from_tokenizer(path)) for path in sides[1::2]]
    text = tmp_path / "own.txt"
    text.write_text("19 201\n7 7\n")
    out, data = str(tmp_path / "out"), ["--data", str(text), str(text)]
    for given, wanted in (
        (["project", *sides, "-o", out], {"output": out, "shape": shape}),
        (["project", *sides, "-o", out, "--pieces", *data], {"output": out, "shape": shape}),
        (["report", *sides, "-o", out, *data], {"output": out}),
        (["align", *sides, "-o", f"{out}s", *data], {"output": f"{out}s", "documents": 2, "shards": 1}),
        (["show", *sides, "19"], {"student_tokens": ["19"]}),
        (["config"], {"xtoken": _core.version}),
    ):
        assert main([*given, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert {name: facts[name] for name in wanted} == wanted


def test_progress_is_on_a_terminal_only(monkeypatch, capsys):
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        with working("reading \x1b[31m") as say:
            print("result")
            say("counting")
        out, err = capsys.readouterr()
        assert out == "result\n"
        assert ("counting" in err) == is_terminal
        assert "\x1b[31m" not in err


def test_closed_and_narrow_outputs(tmp_path):
    """What cannot be written is left out or escaped; an error is no result."""
    byte_level(300, ["é"]).save(str(tmp_path / "a.json"))
    show = f"'{sys.executable}' -m xtoken show --student a.json --teacher"
    for command, status, out, err in (
        (f"{show} a.json a >&-", 0, b"", b""),
        (f"{show} a.json a 2>&-", 0, b"a", b""),
        (f"{show} none.json a 2>&-", 1, b"", b""),
        (f"PYTHONIOENCODING=ascii {show} a.json ' a'", 0, rb"\xb7", b""),
        (f"{show} a.json $'a\\xff'", 1, b"", rb"xtoken show: text: expected UTF-8, got 'a\udcff'"),
    ):
        run = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, env=UTF8)
        assert run.returncode == status, run
        assert (out in run.stdout and err in run.stderr) if out or err else not run.stdout, run
        assert b"Traceback" not in run.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("words", [["config"], ["train", "--help"]])  # less and more than a buffer holds
def test_a_full_output_is_an_error_of_one_line(words):
    """Python itself writes what waits for standard output at its end, where an error is a remark."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "xtoken", *words]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"xtoken {words[0]}: ")
    assert line.endswith("[Errno 28] No space left on device")


def test_several_values_of_an_option(tmp_path, capsys):
    """Of ``--option=value`` too; a word right behind an option is its value, whatever it begins with."""
    sides = []
    for name in ("student", "teacher"):
        byte_level(280, ["a 19"]).save(str(tmp_path / f"{name}.json"))
        sides += [f"--{name}", str(tmp_path / f"{name}.json")]
    files = [str(tmp_path / f"{k}.txt") for k in range(3)]
    for file in files:
        (tmp_path / file).write_text("19\n")
    assert main(["align", *sides, f"--data={files[0]}", *files[1:], "-o", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 3
    page = ["report", *sides, "-o", str(tmp_path / "page")]
    assert main([*page, "--text", "-5", "a"]) == 0
    assert "PairReport" in capsys.readouterr().out
    assert main([*page, "run"]) == 1
    assert "expected --student and --teacher or a RUN, got both, with 'run' as RUN" in capsys.readouterr().err


def test_urls(tmp_path, capsys):
    (tmp_path / "a.json").touch()
    local, out = str(tmp_path / "a.json"), str(tmp_path / "out")
    for given, said in (
        (["audit", "--student", local, "--teacher", "s3://b/t.json"], "--teacher: expected a local file or folder"),
        (["align", "-o", "s3://"], "output: expected s3://BUCKET/PATH or its like, got s3://"),
        (["align", "-o", "file://out"], "output: expected file:///PATH, with three slashes, got file://out"),
        (["align", "-o", out, "--data", "file://a.json"], "--data: expected file:///PATH"),
        (["align", "-o", out, "--data", ""], "--data: expected the name of a file"),
        (["cache-teacher", "-o", "s3://b/out"], "output: expected a local folder, got the URL s3://b/out"),
    ):
        pair = ["--teacher", local, *(["--student", local] if given[0] == "align" else [])]
        data = [] if given[0] == "audit" or "--data" in given else ["--data", local]
        assert main([*given, *(pair if given[0] != "audit" else []), *data]) == 1
        assert said in capsys.readouterr().err


def test_completion():
    """Of commands, and of the values of an option."""
    for words, wanted in (("xtoken au", {"audit"}), ("xtoken align --engine l", {"local"})):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_XTOKEN_COMPLETE": "complete_bash"}
        run = subprocess.run(
            [sys.executable, "-m", "xtoken"], env={**os.environ, **asked}, capture_output=True, text=True
        )
        assert wanted == set(run.stdout.split())


def test_a_loss_that_is_not_there(capsys):
    assert main(["check", "--losses", "nosuch"]) == 2
    assert "xtoken check: Invalid value for --losses: expected some of" in capsys.readouterr().err
