"""Whole runs: contents, resuming after a kill, both engines, bad input."""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import json
import multiprocessing
import os
import random
import signal
import statistics
import string
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import pyarrow.parquet as pq
import pytest
import tokenizers

import xtoken
from xtoken import Aligner, Vocabulary, align_corpus, cli
from xtoken.cli import main
from xtoken.corpus import Options, engine_local, require
from xtoken.corpus.deaths import Deaths
from xtoken.corpus.partition import Shard
from xtoken.corpus.run import Progress

pytestmark = pytest.mark.slow

SHARD = 40_000


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_shards(folder):
    return pq.read_table(sorted(folder.glob("shard-*.parquet")))


@pytest.fixture(scope="module")
def undisturbed(pair_files, corpus, tmp_path_factory):
    """Output of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    align_corpus(*pair_files, corpus, folder, shard_bytes=SHARD)
    return folder


def test_rows_hold_what_the_aligner_says(undisturbed, pair_files, texts):
    vocabularies = [Vocabulary.from_tokenizer(path) for path in pair_files]
    table = read_shards(undisturbed)
    assert table["id"].to_pylist() == [f"manual.jsonl:{k + 1}" for k in range(len(texts))]
    sides = [
        [encoding.ids for encoding in vocabulary.tokenizer.encode_batch(texts, add_special_tokens=False)]
        for vocabulary in vocabularies
    ]
    assert [table["student_ids"].to_pylist(), table["teacher_ids"].to_pylist()] == sides
    alignment = Aligner(*vocabularies).align(*sides)
    assert table["spans"].combine_chunks().flatten().flatten().to_pylist() == alignment.spans.flatten().tolist()
    assert [str(field.type) for field in table.schema][1:] == [
        "list<element: int32 not null>",
        "list<element: int32 not null>",
        "list<element: fixed_size_list<element: int32 not null>[4] not null>",
    ]
    metadata = pq.read_schema(undisturbed / "shard-00000.parquet").metadata
    assert metadata[b"xtoken.student"].decode() == vocabularies[0].fingerprint()
    assert metadata[b"xtoken.teacher"].decode() == vocabularies[1].fingerprint()
    assert metadata[b"xtoken.method"] == b"auto"
    assert metadata[b"xtoken.version"].decode() == xtoken.__version__
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["complete"]
    assert len(manifest["shards"]) > 10
    assert manifest["total"]["student_tokens"] == sum(map(len, sides[0]))
    assert manifest["total"]["documents"] == len(texts)


def test_truncation(pair, texts, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:50]))
    total = align_corpus(*pair, tmp_path / "a.jsonl", tmp_path / "out", max_length=20).total
    table = read_shards(tmp_path / "out")
    vocabularies = [Vocabulary.from_tokenizer(tokenizer) for tokenizer in pair]
    assert 0 < total.student_tokens <= 20 * len(table)
    for row in table.to_pylist():
        assert max(len(row["student_ids"]), len(row["teacher_ids"])) <= 20
        assert vocabularies[0].decode(row["student_ids"]) == vocabularies[1].decode(row["teacher_ids"])


def test_workers_give_the_same_bytes(undisturbed, pair_files, corpus, tmp_path, monkeypatch, caplog):
    """Also where one of them is killed: what others have made is kept, its shard is made again, and that is told."""
    folder = tmp_path / "out"
    kept: dict[Path, int] = {}

    def kill_one(*_):
        if not kept:
            kept.update({path: path.stat().st_ino for path in folder.glob("shard-*.parquet")})
            multiprocessing.active_children()[0].kill()

    monkeypatch.setattr(Progress, "shard_done", kill_one)
    manifest = align_corpus(*pair_files, corpus, folder, shard_bytes=SHARD, workers=2)
    assert contents(folder) == contents(undisturbed)
    assert kept == {path: path.stat().st_ino for path in kept} != {}
    assert manifest.deaths == 1
    assert "1 workers died; what they made was lost and begun again: shard-" in caplog.text


def test_a_shard_that_kills_workers_ends_the_run(caplog):
    shards = [Shard(k, ()) for k in range(2)]
    with Deaths() as died:
        for shard in (1, 0, 0, 1):
            died(shards[shard], "killed by SIGKILL")
        with pytest.raises(OSError, match=r"shard-00001\.parquet: 3 workers died at it, .* so: killed by SIGKILL"):
            died(shards[1], "killed by SIGKILL")
    assert died.total == 5
    assert "5 workers died; what they made was lost and begun again: shard-00001.parquet (3), shard-0" in caplog.text
    patient = Deaths()
    for _ in range(2):
        patient(None, "no memory")
        patient(None, "no memory")
        patient.started()
    patient(None, "no memory")
    patient(None, "no memory")
    with pytest.raises(OSError, match=r"the start: 3 workers died at it, the last of them so: no memory"):
        patient(None, "no memory")


def test_kill_and_resume_gives_the_same_bytes(undisturbed, pair_files, corpus, tmp_path):
    """A process that kills itself at some write, fsync or rename, of a shard or of the manifest. It forks off one for
    each such place, so that only the first has to import everything."""
    script = (
        "import os, signal, sys; import pyarrow.parquet as pq; import xtoken.corpus.run; from xtoken.cli import main\n"
        "places, arguments = [int(word) for word in sys.argv[1].split()], sys.argv[2:]\n"
        "def mortal(function):\n"
        "    def call(*args, **options):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return function(*args, **options)\n"
        "    return call\n"
        "pq.ParquetWriter.write_table = mortal(pq.ParquetWriter.write_table)\n"
        "os.fsync, os.replace = mortal(os.fsync), mortal(os.replace)\n"
        "for left in places:\n"
        "    child = os.fork()\n"
        "    if child == 0: os.dup2(2, 1); os._exit(main(arguments))\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
        "    input()\n"  # until the test has looked
    )
    command = ["align", "--student", pair_files[0], "--teacher", pair_files[1], "--input", str(corpus)]
    command += ["--output", str(tmp_path / "out"), "--shard-bytes", str(SHARD), "--resume"]
    places = (3, 12, 13, 18)
    with subprocess.Popen(
        [sys.executable, "-c", script, " ".join(map(str, places)), *command], stdin=PIPE, stdout=PIPE, stderr=DEVNULL
    ) as process:
        for _ in places:
            assert int(process.stdout.readline()) == -signal.SIGKILL
            files = os.listdir(tmp_path / "out")
            if "manifest.json" in files:
                assert not json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]
            process.stdin.write(b"\n")
            process.stdin.flush()
    assert 3 < len([name for name in files if name.startswith("shard-")]) < len(contents(undisturbed)) - 3
    assert main(command) == 0
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_resume_keeps_complete_shards_and_makes_the_rest(undisturbed, pair_files, corpus, tmp_path):
    folder = tmp_path / "out"
    align_corpus(*pair_files, corpus, folder, shard_bytes=SHARD)
    kept = (folder / "shard-00002.parquet").stat().st_ino
    (folder / "shard-00000.parquet").unlink()
    (folder / "shard-00001.parquet").write_bytes(b"PAR1 cut short")
    (folder / ".shard-00003.parquet.0.tmp").write_bytes(b"half")
    align_corpus(*pair_files, corpus, folder, shard_bytes=SHARD, resume=True)
    assert contents(folder) == contents(undisturbed)
    assert (folder / "shard-00002.parquet").stat().st_ino == kept


def test_what_may_not_be_resumed(undisturbed, pair_files, corpus, tmp_path):
    def again(*pair, inputs=corpus, output=undisturbed, **options):
        options = {"shard_bytes": SHARD, "resume": True, **options}
        align_corpus(*(pair or pair_files), inputs, output, **options)

    again()
    with pytest.raises(ValueError, match="is not empty; give another folder, or resume"):
        again(resume=False)
    with pytest.raises(ValueError, match="teacher: was"):
        again(pair_files[0], pair_files[0])
    with pytest.raises(ValueError, match="max_length: was None, now 5"):
        again(max_length=5)
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"other\.jsonl is new"):
        again(inputs=[corpus, other])
    align_corpus(*pair_files, other, tmp_path / "out")
    written = other.stat().st_mtime_ns
    for text in ("ab", "b"):  # another size; the same size later
        other.write_text(json.dumps({"text": text}) + "\n")
        os.utime(other, ns=(written, written + 10**9))
        with pytest.raises(ValueError, match=r"other\.jsonl was changed"):
            align_corpus(*pair_files, other, tmp_path / "out", resume=True)
    # Same tokens, other merges: other ids.
    tokenizer = json.loads((tmp_path.__class__(pair_files[0])).read_text())
    tokenizer["model"]["merges"].reverse()
    (tmp_path / "merges.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="student: was"):
        again(str(tmp_path / "merges.json"), pair_files[1])
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds thesis\.txt but no manifest\.json"):
        again(output=strange)
    (strange / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not an index of aligned shards"):
        again(output=strange)
    (strange / "manifest.json").write_text('{"format": "0"}')
    with pytest.raises(ValueError, match="expected format 2, got 0; xtoken align with another --output makes it again"):
        again(output=strange)


def test_broken_lines(pair_files, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n{"text": "three"}\n')
    command = ["align", "--student", pair_files[0], "--teacher", pair_files[1], "--input", str(path), "--output"]
    assert main([*command, str(tmp_path / "out")]) == 1
    assert "a.jsonl, line 2: " in capsys.readouterr().err
    assert main([*command, str(tmp_path / "skip"), "--on-error", "skip"]) == 0
    assert "1 broken documents left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "skip" / "manifest.json").read_text())["total"]["skipped"] == {"a.jsonl": 1}
    for workers in (1, 2):
        with pytest.raises(ValueError, match="line 2"):
            align_corpus(*pair_files, path, tmp_path / f"out{workers}", workers=workers)
        assert os.listdir(tmp_path / f"out{workers}") == ["manifest.json"]


def test_an_input_that_changes_ends_the_run(pair, pair_files, texts, tmp_path, monkeypatch):
    """Also after all shards are made, and with `on_error="skip"`; nothing says complete."""
    path = tmp_path / "a.txt"
    path.write_text("".join(text.replace("\n", " ") + "\n" for text in texts[:200]))
    for k, change in enumerate((lambda: os.truncate(path, 5000), lambda: path.open("a").write("more\n"))):
        monkeypatch.setattr(Progress, "shard_done", lambda *_, change=change: change())
        with pytest.raises(ValueError, match=r"a\.txt: was changed while it is read"):
            align_corpus(*pair, path, tmp_path / f"out{k}", shard_bytes=SHARD, on_error="skip")
        assert not json.loads((tmp_path / f"out{k}" / "manifest.json").read_text())["complete"]


def test_one_run_at_a_time(pair, corpus, tmp_path, monkeypatch):
    def again(*_):
        with pytest.raises(ValueError, match=r"output: another run writes to .*out; wait for its end"):
            align_corpus(*pair, corpus, tmp_path / "out", shard_bytes=SHARD, resume=True)

    monkeypatch.setattr(Progress, "shard_done", again)
    align_corpus(*pair, corpus, tmp_path / "out", shard_bytes=SHARD * 20)
    assert ".lock" not in os.listdir(tmp_path / "out")


def test_extreme_documents(pair, tmp_path):
    rows = ["x", "", "<s></s><pad>", "a b" * 150_000]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    total = align_corpus(*pair, tmp_path / "a.jsonl", tmp_path / "out").total
    table = read_shards(tmp_path / "out").to_pylist()
    assert total.student_tokens > 300_000
    assert [len(row["student_ids"]) for row in table[:3]] == [1, 0, 3]
    assert table[0]["spans"] == [[0, 1, 0, 1]]
    assert table[3]["spans"][-1][1] == len(table[3]["student_ids"])
    (tmp_path / "b.jsonl").write_text("\n")
    assert align_corpus(*pair, tmp_path / "b.jsonl", tmp_path / "none").total.documents == 0
    (tmp_path / "c.jsonl").write_text("")
    empty = align_corpus(*pair, tmp_path / "c.jsonl", tmp_path / "empty")
    assert (empty.shards, empty.is_complete) == ([], True)


def test_tokenizers_that_cannot_be_used(pair, corpus, tmp_path):
    with pytest.raises(TypeError, match="slow tokenizers"):
        align_corpus(object(), pair[1], corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="student: expected a tokenizer that encodes text"):
        align_corpus(Vocabulary([b"a"]), pair[1], corpus, tmp_path / "out")
    random_tokenizer = type(pair[0]).from_str(pair[0].to_str())
    random_tokenizer.model.dropout = 0.5
    with pytest.raises(ValueError, match=r"teacher: the tokenizer has dropout 0\.5"):
        align_corpus(pair[0], random_tokenizer, corpus, tmp_path / "out")


def test_padding_and_truncation_of_the_tokenizer_are_turned_off(pair, corpus, tmp_path, undisturbed):
    student = type(pair[0]).from_str(pair[0].to_str())
    student.enable_padding(length=64)
    student.enable_truncation(8)
    align_corpus(student, pair[1], corpus, tmp_path / "out", shard_bytes=SHARD)
    assert read_shards(tmp_path / "out").equals(read_shards(undisturbed))
    assert student.padding


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("engine", "spark", "engine: expected one of"),
        ("on_error", "warn", "on_error: expected one of"),
        ("method", "magic", "method: expected one of"),
        ("workers", 0, "workers: expected at least 1"),
        ("max_length", 0, "max_length: expected at least 1"),
        ("shard_bytes", -1, "shard_bytes: expected at least 1"),
    ],
)
def test_options(option, value, message, pair, corpus, tmp_path):
    with pytest.raises(ValueError, match=message):
        align_corpus(*pair, corpus, tmp_path / "out", **{option: value})


def test_options_are_those_of_the_function_and_of_the_command():
    """`Options` has their defaults; the command line has all but the progress bar."""
    signature = inspect.signature(align_corpus).parameters.values()
    named = {one.name: one.default for one in signature if one.kind is one.KEYWORD_ONLY}
    assert list(named.items()) == list(dataclasses.asdict(Options()).items())
    command = inspect.signature(cli.align).parameters
    del named["progress"]
    assert {name: command[name].default for name in named} == named


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_full_disk(undisturbed, pair_files, corpus, tmp_path):
    """The limit on the size of a file makes writing fail, as a full disk does."""
    script = (
        "import resource, sys; from xtoken.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2); sys.exit(main(sys.argv[1:]))"
    )
    command = ["align", "--student", pair_files[0], "--teacher", pair_files[1], "--input", str(corpus), "--output"]
    command += [str(tmp_path / "out"), "--shard-bytes", str(SHARD)]
    run = subprocess.run([sys.executable, "-c", script, "20000", *command], capture_output=True, text=True)
    assert run.returncode == 1
    assert "shard-" in run.stderr
    assert "cannot write" in run.stderr
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp")]
    assert main([*command, "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(undisturbed)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_interrupt(workers, undisturbed, pair_files, corpus, tmp_path):
    """The signal comes when the first shard is complete."""
    command = ["align", "--student", pair_files[0], "--teacher", pair_files[1], "--input", str(corpus)]
    command += ["--output", str(tmp_path / "out"), "--shard-bytes", str(SHARD)]
    script = (
        "import os, signal, sys; from xtoken.cli import main; from xtoken.corpus.run import Progress\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell starts background jobs without it
        "Progress.shard_done = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, *command, "--workers", workers], stderr=subprocess.PIPE, text=True
    )
    error = process.stderr
    # If the signal comes while Python runs code from a string (as dataclasses do on import), Python ends by the signal
    # itself although the exception was caught; a shell says 130 both times.
    assert process.returncode in (130, -signal.SIGINT)
    assert error.strip().endswith("interrupted; what is complete stays, go on with --resume")
    assert "Traceback" not in error
    assert main([*command, "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(undisturbed)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_the_first_process(pair_files, corpus, tmp_path):
    """It is killed, and so cannot tell them, when they have a part of the work."""
    command = ["align", "--student", pair_files[0], "--teacher", pair_files[1], "--input", str(corpus), "--workers=2"]
    command += ["--output", str(tmp_path / "out"), "--shard-bytes", str(SHARD)]
    script = (
        "import os, signal, sys; from xtoken.cli import main; from xtoken.corpus.run import Progress\n"
        "Progress.shard_done = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(sys.argv[1:])"
    )
    with subprocess.Popen([sys.executable, "-c", script, *command], start_new_session=True) as first:
        first.wait()

    def session(process):
        try:
            return int((process / "stat").read_text().rpartition(")")[2].split()[3])
        except OSError:  # it has just ended
            return None

    deadline = time.monotonic() + 60
    while left := [process.name for process in Path("/proc").glob("[0-9]*") if session(process) == first.pid]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_progress_bar(pair, corpus, tmp_path, capsys):
    align_corpus(*pair, corpus, tmp_path / "out", progress=True)
    assert "tokens/s" in capsys.readouterr().err
    align_corpus(*pair, corpus, tmp_path / "quiet")
    assert capsys.readouterr().err == ""


def test_missing_dependency():
    with pytest.raises(ImportError, match=r"pip install 'xtoken\[corpus\]'"):
        require("no_such_module", "corpus")


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks the allocator of glibc"
)
def test_memory_does_not_grow_with_the_input(tmp_path):
    """What is allocated stays as it is from batch to batch of a shard, and from shard to shard; texts that were kept
    would take their size again, 3 MB or more, tokens two thirds.

    Allocated bytes are asked for, since the memory of a process depends on what the allocators keep. Words of 30
    characters that are tokens make tokenizing cheap, and small batches what is in flight.
    """
    draw = random.Random(0)
    words = ["Ġ" + "".join(draw.choices(string.ascii_lowercase, k=30)) for _ in range(500)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(dict(zip([*string.ascii_lowercase, "Ġ", *words], count())), [], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(" ", "merged_with_next"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lines = (json.dumps({"text": "".join(draw.choices(words, k=100)).replace("Ġ", " ")}) for _ in range(3000))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    script = """
import ctypes
from xtoken import align_corpus
from xtoken.corpus import shards
from xtoken.corpus.run import Progress

class Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "a b c d mapped e f used g h".split()]

ask = ctypes.CDLL(None).mallinfo2
ask.restype = Memory
Progress.advance = lambda *_: print(ask().mapped + ask().used)
shards.BATCH_BYTES = 50_000
align_corpus(*2 * ["tokenizer.json"], "text.jsonl", "out", shard_bytes=5_000_000)
"""
    asks_one_allocator = os.environ | {"PYTHONMALLOC": "malloc", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [sys.executable, "-c", script]
    output = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, env=asks_one_allocator
    ).stdout
    allocated = [int(size) / 1e6 for size in output.split()]
    assert len(allocated) > 180
    first, later, next_shard = (statistics.median(allocated[k : k + 20]) for k in (10, 70, 160))
    assert max(later, next_shard) < first + 1.0, f"{allocated} MB after batches of 0.05 MB of text"


def test_a_worker_that_hangs_does_not_keep_the_run(monkeypatch):
    """Interrupted, a run ends, also if one of its workers does not."""
    monkeypatch.setattr(engine_local, "PATIENCE", 0.1)
    worker: Any = object.__new__(engine_local._Worker)
    worker.pipe, its_end = multiprocessing.Pipe()
    worker._process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker._process.start()
    assert worker.end() == "killed by SIGKILL"
    its_end.close()
