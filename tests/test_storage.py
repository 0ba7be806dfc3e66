"""Files: written complete or not at all, and what a file must say and hold to be read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from xtoken import Vocabulary
from xtoken.client import _Threads
from xtoken.remote import in_threads
from xtoken.storage import (
    LOCK,
    TEMPORARY,
    FolderLock,
    Index,
    Numbering,
    TensorFile,
    atomic,
    other_tokenizers,
    write_atomically,
)

KIND = TensorFile("a table", {"format": "xtoken.table", "version": "1"}, {"cells": ("F32", 2)})
INDEX, NEXT = (Index("index.json", version, "an index of tables") for version in (3, 4))


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_half_a_file_is_never_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic(path) as temporary:
        temporary.write_bytes(b"half")
        assert os.listdir(tmp_path) == [temporary.name]
        assert temporary.name.startswith(".file.")
        assert temporary.name.endswith(TEMPORARY)
    assert os.listdir(tmp_path) == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_symbolic_links_are_not_written_through(tmp_path: Path) -> None:
    """As in a cache where several names share a file: one name gets the new file, the others keep theirs."""
    shared, link = tmp_path / "shared", tmp_path / "link"
    shared.write_bytes(b"old")
    link.symlink_to(shared)
    write_atomically(link, b"new")
    assert link.read_bytes() == b"new"
    assert not link.is_symlink()
    assert shared.read_bytes() == b"old"


def test_what_cannot_be_written_stays_and_is_named(tmp_path: Path) -> None:
    """The error has the path that was given, not the hidden name of the file on its way there."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(OSError, match=f"^path: expected a regular file, which {path} is not$"):
            write_atomically(path, b"")
    assert pipe.is_fifo()
    assert link.is_symlink()
    for given, message in (
        (tmp_path, f"path: expected a file, got a folder: {tmp_path}; such as "),
        (tmp_path / "none" / "w", f"path: no such folder: {tmp_path}/none; make it first"),
        ("", "path: expected a name"),
        ("s3://bucket/w", "path: expected a local file, got the URL s3://bucket/w"),
    ):
        with pytest.raises((OSError, ValueError), match=f"^{message}"):
            write_atomically(given, b"")
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    """What the system says of a write has no name in it."""
    script = (
        "import resource, sys; from xtoken.storage import write_atomically;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)); write_atomically(sys.argv[1], b'x' * 99)"
    )
    path = tmp_path / "file"
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1].endswith(f"File too large: '{path}'")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_tensors_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "t"
    KIND.save(path, {"cells": torch.arange(6.0).view(2, 3).T}, rows="3")
    tensors, metadata = KIND.load(path, lambda *found: found)
    assert tensors["cells"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert metadata == {"rows": "3"}
    with KIND.open(path) as file:
        assert file.read("cells", 1, 2).tolist() == [[1.0, 4.0]]
    assert load_file(path)["cells"].tolist() == tensors["cells"].tolist()  # what others read
    before = path.read_bytes()
    for metadata in ({"rows": "3", "name": "x"}, {"name": "x", "rows": "3"}):
        KIND.save(path, {"cells": torch.arange(6.0).view(2, 3).T}, **metadata)
        assert path.read_bytes() == before or "name" in metadata
        before = path.read_bytes()


def test_loaded_tensors_are_owned(tmp_path: Path) -> None:
    """Writing over a file in place, or cutting it, does not reach what was loaded, and is an error for what was not."""
    path = tmp_path / "t"
    KIND.save(path, {"cells": torch.ones(3000, 2)})
    cells = KIND.load(path, lambda tensors, _: tensors["cells"])
    with KIND.open(path) as file:
        with open(path, "r+b") as other:
            other.truncate(1000)
        with pytest.raises(ValueError, match="t: was cut short while it is read"):
            file.read("cells")
    path.write_bytes(bytes(10))
    assert float(cells.sum()) == 6000.0


def test_small_headers_make_no_giants(tmp_path: Path) -> None:
    headers: list[Any] = [
        {"cells": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 1 << 82]}},
        {"cells": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 4]}},
        {"cells": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"cells": {"dtype": "F32", "shape": [True, 1], "data_offsets": [0, 4]}},
        {"cells": {"dtype": "F8", "shape": [1, 1], "data_offsets": [0, 4]}},
        {"cells": {"dtype": ["F32"], "shape": [1, 1], "data_offsets": [0, 4]}},
        {"cells": [], "__metadata__": {}},
        {"__metadata__": {"format": 3}},
        [],
        7,
    ]
    for header in headers:
        text = json.dumps(header).encode()
        (tmp_path / "t").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(ValueError, match="t: not a table: not a complete safetensors file"):
            KIND.open(tmp_path / "t")
    for size in (0, 7, 8, 1 << 62, (1 << 64) - 1):
        (tmp_path / "t").write_bytes(size.to_bytes(8, "little")[: size or 8] + b"[" * 5)
        with pytest.raises(ValueError, match="t: not a table: not a complete safetensors file"):
            KIND.open(tmp_path / "t")


def test_checksums(tmp_path: Path) -> None:
    KIND.save(tmp_path / "t", {"cells": torch.ones(1, 1)}, rows="3")
    good = (tmp_path / "t").read_bytes()
    for other in (
        good.replace(b'"rows":"3"', b'"rows":"4"'),
        good[:-1] + b"\0",
        good.replace(b"checksum", b"chocksum"),
    ):
        assert other != good
        (tmp_path / "t").write_bytes(other)
        with pytest.raises(ValueError, match=r"t: damaged: the checksum does not fit the content$"):
            KIND.open(tmp_path / "t")
    INDEX.write(tmp_path, {"cells": [1]})
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace("1\n", "2\n"))
    with pytest.raises(ValueError, match=r"index\.json: damaged: the checksum"), INDEX.read(tmp_path):
        pass


@pytest.mark.parametrize(
    ("written", "tensor", "message"),
    [
        ({"format": "xtoken.chair", "version": "1"}, torch.zeros(1, 1), "t: not a table$"),
        ({}, torch.zeros(1, 1), "t: not a table$"),
        ({"format": "xtoken.table", "version": "2"}, torch.zeros(1, 1), "t: format version 2, .* reads version 1$"),
        ({"format": "xtoken.table"}, torch.zeros(1, 1), "t: format version None, this xtoken reads version 1$"),
        (KIND.metadata, torch.zeros(1), r"t: not a table: expected the tensors .*\('F32', 2\).*, got .*\('F32', 1\)"),
        (KIND.metadata, torch.zeros(1, 1).double(), r"expected the tensors .*, got \{'cells': \('F64', 2\)\}"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, written: dict[str, str], tensor: torch.Tensor, message: str) -> None:
    TensorFile("anything").save(tmp_path / "t", {"cells": tensor}, **written)
    with pytest.raises(ValueError, match=message):
        KIND.open(tmp_path / "t")


def test_what_does_not_fit_together_is_damaged(tmp_path: Path) -> None:
    KIND.save(tmp_path / "t", {"cells": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="t: damaged: 'rows'"):
        KIND.load(tmp_path / "t", lambda tensors, metadata: metadata["rows"])
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-1])
    with pytest.raises(ValueError, match="t: not a table: not a complete safetensors file"):
        KIND.open(tmp_path / "t")
    with pytest.raises(FileNotFoundError, match=r"path: no such file: .*none"):
        KIND.open(tmp_path / "none")


def test_an_index_comes_back_or_says_its_name(tmp_path: Path) -> None:
    INDEX.write(tmp_path, {"cells": ["ä"]})
    checksum = hashlib.sha256(b'{"cells": ["\\u00e4"], "format": 3}').hexdigest()
    expected = f'{{\n "format": 3,\n "cells": [\n  "ä"\n ],\n "checksum": "{checksum}"\n}}\n'
    assert (tmp_path / "index.json").read_text() == expected
    with INDEX.read(tmp_path) as content:
        assert content["cells"] == ["ä"]
    for missing in (lambda content: content["rows"], lambda content: content["cells"][1], lambda content: content + 1):
        with pytest.raises(ValueError, match=r"index\.json: not an index of tables: "), INDEX.read(tmp_path) as content:
            missing(content)
    with pytest.raises(ValueError, match=r"index\.json: expected format 4, got 3"), NEXT.read(tmp_path):
        pass
    for damaged in (b"{", b"[]", b"\xff", b"[" * 100_000, b"3" * 5000, b"null", b'{"format": 3'):
        (tmp_path / "index.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"index\.json: not an index of tables: "), INDEX.read(tmp_path):
            pass
    with pytest.raises(FileNotFoundError), INDEX.read(tmp_path / "none"):
        pass


def test_the_next_write_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """Not what is still being written, nor that of another file."""
    leftover, other = (tmp_path / f".{name}.0123456789abcdef{TEMPORARY}" for name in ("file", "other"))
    leftover.write_bytes(b"half")
    other.write_bytes(b"half")
    with atomic(tmp_path / "file") as first:
        assert not leftover.exists()
        first.write_bytes(b"first")
        write_atomically(tmp_path / "file", b"second")
        assert first.exists()
    assert (tmp_path / "file").read_bytes() == b"first"
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, "file"])
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    (tmp_path / "link").symlink_to(target)
    write_atomically(tmp_path / "link", b"new")
    assert (target.read_bytes(), (tmp_path / "link").read_bytes()) == (b"mine", b"new")


def test_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    script = "import pathlib, sys, xtoken.storage as s; s.FolderLock(pathlib.Path(sys.argv[1])); print(1, flush=True)"
    with FolderLock(folder):
        assert os.listdir(folder) == [LOCK]
        other = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
        assert other.returncode == 1
        assert f"output: another run writes to {folder}; wait for its end" in other.stderr
    assert os.listdir(folder) == []
    script += "; import os; held = s.FolderLock(pathlib.Path(sys.argv[1])); os._exit(9)"
    subprocess.run([sys.executable, "-c", script, str(folder)])
    assert os.listdir(folder) == [LOCK]  # of a killed run, which holds nothing any more
    with FolderLock(folder):
        assert not INDEX.prepare(folder, False, "tables")


def test_an_output_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    """Is the one error: nothing is said of a lock that was never held."""
    (tmp_path / LOCK).mkdir()
    script = "import pathlib, sys, xtoken.storage as s; s.FolderLock(pathlib.Path(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1] == f"IsADirectoryError: [Errno 21] Is a directory: '{tmp_path / LOCK}'"
    assert "Exception ignored" not in run.stderr


def test_a_lock_is_given_back_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that fails: its number may soon be that of another file."""
    lock, closed = FolderLock(tmp_path), os.close

    def fail(descriptor: int) -> None:
        closed(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "close", fail)
    with pytest.raises(OSError, match="Input/output error"):
        lock.__exit__()
    lock.__exit__()


def test_a_failing_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system says of a read has no name in it."""
    KIND.save(tmp_path / "t", {"cells": torch.ones(3, 2)})
    with KIND.open(tmp_path / "t") as file:

        def fail(*_: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(OSError, match=f"Input/output error: '{tmp_path / 't'}'"):
            file.read("cells")


def test_output_folders(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert not INDEX.prepare(folder, False, "tables")
    assert folder.is_dir()
    leftover = folder / f".table-0.1234{TEMPORARY}"
    leftover.write_text("half")
    with pytest.raises(ValueError, match=r"output: .*b is not empty; give another folder, or resume"):
        INDEX.prepare(folder, False, "tables")
    assert not INDEX.prepare(folder, True, "tables")  # what a killed run leaves is no reason to refuse
    assert not leftover.exists()
    older = folder / ".index.json.k3j4h5g6"
    older.write_text("{")
    assert not INDEX.prepare(folder, True, "tables")
    assert not older.exists()
    (folder / "thesis.tmp").write_text("mine")
    with pytest.raises(ValueError, match=r"b holds thesis\.tmp but no index\.json; expected tables"):
        INDEX.prepare(folder, True, "tables")
    INDEX.write(folder, {})
    assert INDEX.prepare(folder, True, "tables")
    assert (folder / "thesis.tmp").exists()


def test_items_are_numbered_through() -> None:
    numbering = Numbering([2, 0, 3])
    assert [numbering.find(k) for k in range(len(numbering))] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    assert [numbering.find(k) for k in (-1, -5)] == [(2, 2), (0, 0)]
    for one, index in ((numbering, 5), (numbering, -6), (Numbering([]), 0)):
        with pytest.raises(IndexError, match=f"index: expected -.* got {index}"):
            one.find(index)
    assert len(Numbering([])) == 0


def test_other_tokenizers() -> None:
    mine, other = Vocabulary([b"a"]), Vocabulary([b"b"])
    recorded = {"student": mine.fingerprint(), "teacher": None}
    assert not list(other_tokenizers(recorded, mine, other))  # nothing is recorded of the teacher's
    assert not list(other_tokenizers(recorded))
    found = ("student", mine.fingerprint()[:12], other.fingerprint()[:12])
    assert list(other_tokenizers(recorded, other, other)) == [found]


@pytest.mark.parametrize("given", [0, 1, 3])
def test_threads_that_the_system_refuses(given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they were to do is done once, in order, by those that there are."""
    start = threading.Thread.start
    started: list[threading.Thread] = []
    done: list[int] = []

    def limited(thread: threading.Thread) -> None:
        if len(started) == given:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    def work(number: int) -> int:
        done.append(number)
        if number == 30:
            raise KeyError(number)
        return 2 * number

    monkeypatch.setattr(threading.Thread, "start", limited)
    assert list(in_threads(work, range(20), 4)) == [2 * number for number in range(20)]
    assert sorted(done) == list(range(20))
    assert len(started) <= given
    with pytest.raises(KeyError, match="30"):
        list(in_threads(work, range(20, 40), 4))
    started.clear()
    threads = _Threads(4)
    if not given:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threads.submit(work, 1)
    else:
        assert [threads.submit(work, k).result(5) for k in range(10)] == [2 * k for k in range(10)]
