"""Every input format gives the same documents, wherever the file is cut; broken ones are named."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from xtoken.corpus import source
from xtoken.corpus.documents import Broken
from xtoken.corpus.files import find_files
from xtoken.corpus.partition import MOST_SLICES, FileSlice, into_shards
from xtoken.corpus.shards import read_shard, scan_file
from xtoken.train.data import read_rows

TEXTS = [f"document {k} " + "äöü€😀 " * (k % 40) for k in range(400)]


def documents(path, target=3000, text_column="text", on_error="raise"):
    """All (id, text) of a file, with the slices that it was cut into and the count of broken ones."""
    (file,) = find_files([path])
    slices = scan_file(file, text_column, target)
    broken = Broken(on_error)
    rows = [
        (row["id"], row["text"])
        for shard in into_shards(slices, target)
        for batch in read_shard(shard, text_column, broken)
        for row in batch.to_pylist()
    ]
    return rows, slices, dict(broken.skipped)


def write(path, texts):
    rows = [{"text": text, "meta": {"a": [1]}} for text in texts]
    jsonl = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ".array." in path.name:
        jsonl = ("\ufeff\n " + json.dumps(rows, indent=1, ensure_ascii=False)).encode()
    plain = "".join(text + "\n" for text in texts).encode()
    data = jsonl if ".json" in path.name else plain
    table = pa.table({"n": range(len(texts)), "text": texts})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=90)
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    elif path.suffix == ".feather":
        with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            writer.write_table(table, max_chunksize=70)
    elif path.suffix == ".gz":  # two members, as tools that append make them
        path.write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))
    elif path.suffix == ".zst":
        path.write_bytes(b"".join(zstandard.compress(part) for part in (data[:5000], data[5000:])))
    else:
        path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.json.gz",
        "a.jsonl.zst",
        "a.txt",
        "a.txt.gz",
        "a.txt.zst",
        "a.parquet",
        "a.arrow",
        "a.feather",
        "a.array.json",
        "a.array.json.gz",
    ],
)
def test_every_format_gives_the_same_documents(name, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_BYTES", 4096)
    write(tmp_path / name, TEXTS)
    texts = [text.rstrip("\n") for text in TEXTS]
    for target in (700, 3000, 1 << 20):
        rows, slices, _ = documents(tmp_path / name, target)
        assert [text for _, text in rows] == texts
        assert [name_ for name_, _ in rows] == [f"{name}:{k + 1}" for k in range(len(TEXTS))]
        assert len(slices) > 3 or target > 3000
        assert not name.endswith((".gz", ".zst")) or len(slices) <= MOST_SLICES


LINES = [{"text": f"row {k}", "n": None} for k in range(20)]
JSONL = b"".join(json.dumps(row).encode() + b"\n" for row in LINES)
ARRAY = json.dumps(LINES, indent=2).encode()
MEMBERS = gzip.compress(JSONL[:100]) + gzip.compress(b"") + gzip.compress(JSONL[100:])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("A.JSONL.GZ", gzip.compress(JSONL)),
        ("b.jsonl.Gz", MEMBERS),
        ("c.jsonl", MEMBERS + bytes(512)),
        ("d.json.gz", gzip.compress(JSONL) + bytes(1) + gzip.compress(ARRAY[:0])),
        ("e.jsonl.zst", gzip.compress(JSONL)),
        ("f.JSON", zstandard.compress(ARRAY)),
        ("g.ndjson.zst", b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstandard.compress(JSONL)),
        ("h.jsonl.BZ2", bz2.compress(JSONL[:9]) + bz2.compress(JSONL[9:])),
        ("i.jsonl.xz", lzma.compress(JSONL)),
        ("o.jsonl.xz", lzma.compress(JSONL[:9]) + bytes(4) + lzma.compress(JSONL[9:]) + bytes(100_000)),
        ("p.jsonl.bz2", bz2.compress(JSONL[:9]) + bytes(512) + bz2.compress(JSONL[9:]) + bytes(1)),
        ("j.jsonl.gz", JSONL),
        ("k.json", ARRAY),
        ("l.json", b"\xef\xbb\xbf" + ARRAY + b"\n\n"),
        ("m.jsonl", b"\xef\xbb\xbf\n \t\r\n" + JSONL.replace(b"\n", b"\r\n\r\n")[:-4]),
        ("n.json", json.dumps(LINES).encode()),
    ],
)
def test_the_content_says_what_a_file_is(name, content, tmp_path, monkeypatch):
    """Corpora and training read the same rows, whatever the name says of packing and case."""
    (tmp_path / name).write_bytes(content)
    for size in (5, 1 << 20):
        monkeypatch.setattr(source, "BLOCK_BYTES", size)
        assert list(read_rows([tmp_path / name])) == LINES
        for target in (40, 1 << 20):
            assert [text for _, text in documents(tmp_path / name, target)[0]] == [row["text"] for row in LINES]


@pytest.mark.parametrize("packing", [gzip, bz2, lzma, zstandard])
def test_what_is_no_member_is_not_passed_over(packing, tmp_path):
    """As where a file of many members is damaged at the beginning of one: the rest is not there."""
    first, second = (packing.compress(part) for part in (JSONL[:100], JSONL[100:]))
    for behind in (b"junk", b"\xff" + second[1:], b"\0" * 9 + b"\xff" + second[1:], second[:3], second[:-3]):
        (tmp_path / "a.jsonl.gz").write_bytes(first + behind)
        for read in (documents, lambda path: list(read_rows([path]))):
            with pytest.raises(ValueError, match=r"a\.jsonl\.gz: cannot read it"):
                read(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.bz2", "a.jsonl.xz", "a.txt.zst", "a.json", "a.JSONL"])
def test_empty_files_hold_nothing(name, tmp_path):
    pack: dict[str, Any] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.compress,
    }
    for content in (b"", pack.get(os.path.splitext(name)[1], bytes)(b"\n"), b"[]" if name == "a.json" else b""):
        (tmp_path / name).write_bytes(content)
        assert (documents(tmp_path / name)[0], list(read_rows([tmp_path / name]))) == ([], [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"},\n {"text": "b"}\n {"text": "c"}]', "line 3: expected a comma or the end of a JSON array"),
        (b'[{"text": "a"},\n\n {"text" "b"}]', "line 3: Expecting ':' delimiter, in a JSON array"),
        (b'[{"text": "a"},\n]', "line 2: Expecting value"),
        (b'[{"text": "a"},\n {"text": "b', "line 2: Unterminated string"),
        (b'[{"text": "a"}]\n[1]', "line 2: expected nothing behind the end"),
        (b'[{"text": "a"}', "line 1: expected a comma or the end of a JSON array, got ''"),
        (b'[{"text": "a"}, 1]', "row 2: expected a JSON object, got int"),
        (b'[{"text": "\xff"}]', "line 1 or later: .*utf-8"),
        (b'[{"text": "a", "id": ' + b"1" * 5000 + b"}]", "line 1 or later: .*integer string"),
        (b'{"text":\n "a"}', "line 1: .*expected JSON lines .an object a line. or one array"),
        (b'\xff\xfe{\0"\0', "expected UTF-8, got UTF-16"),
    ],
)
def test_broken_arrays(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_BYTES", 3)
    (tmp_path / "a.json").write_bytes(content)
    for read in (documents, lambda path: list(read_rows([path]))):
        with pytest.raises(ValueError, match=r"a\.json[,:] .*" + message):
            read(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.gz", "a.parquet", "a.arrow"])
def test_a_device_is_no_file(name, tmp_path):
    (tmp_path / name).symlink_to("/dev/null")
    for read in (documents, lambda path: list(read_rows([path]))):
        with pytest.raises(ValueError, match=f"{name}: cannot read it: expected a regular file"):
            read(tmp_path / name)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are UTF-8")
def test_a_name_that_is_no_utf8(tmp_path):
    path = os.fsencode(tmp_path / "a") + b"\xff.jsonl"
    Path(os.fsdecode(path)).write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"inputs: expected a name in UTF-8, got '.*a\\udcff\.jsonl'"):
        find_files([tmp_path / "*.jsonl"])


def test_a_null_text_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": null}]')
    with pytest.raises(ValueError, match=r"a\.json, row 2: expected text in field 'text', got null"):
        documents(tmp_path / "a.json")
    assert documents(tmp_path / "a.json", on_error="skip")[2] == {"a.json": 1}


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json.zst", "a.array.json", "a.txt.gz", "a.parquet", "a.arrow"]
)
def test_damaged_files_give_their_rows_or_an_error(name, tmp_path):
    """Cut, or with a bit flipped: an error with the name. What is packed or a table never gives less of it."""
    path = tmp_path / name
    write(path, TEXTS[:7])
    data, draw = path.read_bytes(), random.Random(0)
    ways = [lambda: documents(path)[0], lambda: list(read_rows([path]))]
    right, seen = [read() for read in ways], Counter[str]()
    cuts = [data[:size] for size in sorted(draw.sample(range(1, len(data)), 60))]
    flips = [bytearray(data) for _ in range(60)]
    for flipped in flips:
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    for content in (*cuts, *flips):
        path.write_bytes(content)
        for expected, read in zip(right, ways, strict=True):
            got, refusal = None, ""
            try:
                got = read()
            except ValueError as error:
                refusal = str(error)
            seen["refused"] += bool(refusal)
            is_checked = name.endswith(".gz") or (len(content) < len(data) and name not in ("a.jsonl", "a.txt"))
            assert name in refusal if refusal else got == expected or not is_checked
    assert seen["refused"] > 60


def test_files_that_change_are_named(tmp_path):
    path = tmp_path / "a.txt"
    for change in (lambda: os.truncate(path, 50), lambda: path.write_text("y\n" * 100), path.unlink):
        path.write_text("x\n" * 100)
        os.utime(path, ns=(0, 0))
        (file,) = find_files([path])
        rows = read_rows([path])
        next(rows)
        change()
        with pytest.raises(ValueError, match=r"a\.txt: (was changed|is gone) while it is read"):
            list(rows)
        (shard,) = into_shards([FileSlice(file, 0, 200, 1, 200)], 200)
        with pytest.raises(ValueError, match=r"a\.txt: (was changed while it is read|cannot read it)"):
            list(read_shard(shard, "text", Broken("skip")))


def test_lines_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_BYTES", 64)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\n  \n".encode() + b"x" * 1000 + b"\ntwo\x0bthree\nlast")
    rows, _, _ = documents(path, 10)
    assert rows == [("a.txt:1", "one"), ("a.txt:4", "x" * 1000), ("a.txt:5", "two\x0bthree"), ("a.txt:6", "last")]
    (tmp_path / "empty.txt").write_bytes(b"")
    assert documents(tmp_path / "empty.txt")[:2] == ([], [])


@pytest.mark.parametrize("ids", [["x", "y"], [7, 8], ["x", None], [3, "y"]])
def test_ids_of_json_lines(ids, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"id": name, "text": "t"}) for name in ids) + "\n\n")
    expected = [f"a.jsonl:{k + 1}" if name is None else str(name) for k, name in enumerate(ids)]
    assert [name for name, _ in documents(path)[0]] == expected
    assert [text for _, text in documents(path, text_column="text")[0]] == ["t", "t"]


def test_ids_of_tables(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [5, None], "text": pa.array(["a", "b"]).dictionary_encode()}), path)
    assert documents(path)[0] == [("5", "a"), ("a.parquet:2", "b")]
    assert documents(path, text_column="text")[2] == {}
    pq.write_table(pa.table({"id": ["a", "b"]}), path)
    assert documents(path, text_column="id")[0] == [("a.parquet:1", "a"), ("a.parquet:2", "b")]


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "Unterminated"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"other": "x", "more": 1}', "expected text in field 'text', the row has other, more"),
        (b'{"text": 3}', "got int"),
        (b'{"text": "\xff"}', "utf-8"),
        (b'{"text": "\\ud800"}', "surrogates"),
        (b'{"text": "a", "id": 1.5}', "expected a string or an integer in field 'id', got float"),
        (b'{"text": "a", "id": true}', "got bool"),
        (b"\x00\x01\x02\xfe", "utf-8"),
        (b'{"text":' + b"[" * 100_000, "recursion"),
    ],
)
def test_broken_json_lines(line, reason, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 2 + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: ") as caught:
        documents(path)
    assert reason in str(caught.value)
    rows, _, skipped = documents(path, on_error="skip")
    assert [name for name, _ in rows] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    assert skipped == {"a.jsonl": 1}


def test_broken_text_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\xff\xfe\nthree\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: not UTF-8"):
        documents(path)
    assert documents(path, on_error="skip")[2] == {"a.txt": 1}


def test_broken_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "c"]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: the text is null"):
        documents(path)
    assert [name for name, _ in documents(path, on_error="skip")[0]] == ["a.parquet:1", "a.parquet:3"]
    data = pa.array([b"a", b"b", b"\xff"], pa.binary()).view(pa.string())
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": data}))
    with pytest.raises(ValueError, match=r"a\.arrow, row 3: not UTF-8"):
        documents(tmp_path / "a.arrow")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.txt.zst"])
def test_files_that_are_something_else(name, tmp_path):
    (tmp_path / name).write_bytes(bytes(range(256)) * 20)
    with pytest.raises(ValueError, match=f"{name}: cannot read it"):
        documents(tmp_path / name)


def test_packed_files_that_end_early(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 5000)[:-30])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz"):
        documents(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, "expected a column 'text' of strings, got body: string"),
        ({"text": [1]}, "expected a column 'text' of strings, got text: int64"),
        ({"text": ["a"], "id": [1.5]}, "expected strings or integers in column 'id', got double"),
    ],
)
def test_wrong_columns(columns, message, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match=message):
        documents(path)


def test_files_that_a_pattern_would_leave_out(tmp_path, monkeypatch):
    """Python's glob says nothing of folders that it cannot read; and a link may point to what is not there."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "1.txt").touch()
    (tmp_path / "2.txt").touch()
    scandir = os.scandir

    def refuse(path: Any = ".") -> Any:
        if os.fspath(path).rstrip("/").endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        for pattern in ("**/*.txt", "a/*/*.txt", "a/b/*.txt"):
            with pytest.raises(OSError, match=r"^inputs: .*: cannot look into .*/a/b/?: .* Permission denied"):
                find_files([tmp_path / pattern])
        assert len(find_files([tmp_path / "*.txt"])) == len(find_files([tmp_path / "a/b/1.txt"])) == 1
    (tmp_path / "3.txt").symlink_to(tmp_path / "none")
    for given in ("*.txt", "3.txt"):
        with pytest.raises(FileNotFoundError, match=r"^inputs: .*/3\.txt is a link to a file that is not there"):
            find_files([tmp_path / given])


def test_finding_files(tmp_path):
    for name in ("b/1.txt", "a/2.txt", "a/1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = find_files([str(tmp_path / "b" / "1.txt"), str(tmp_path / "**" / "*.txt")])
    assert [file.name for file in found] == ["b/1.txt", "a/2.txt"]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        find_files([tmp_path / "c*.txt"])
    with pytest.raises(ValueError, match="is a folder"):
        find_files([tmp_path / "a"])
    with pytest.raises(ValueError, match="expected at least one file"):
        find_files([])
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]" / "3.TXT").write_text("")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "4.txt").write_text("")
    assert [file.name for file in find_files([tmp_path / "[x]" / "*"])] == ["3.TXT"]
    assert [file.name for file in find_files([tmp_path / "[xy]" / "*.txt"])] == ["4.txt"]
    (tmp_path / "a.docx").write_text("")
    with pytest.raises(ValueError, match=r"unknown ending; expected one of \.jsonl"):
        find_files([tmp_path / "a.docx"])


def test_small_files_share_a_shard(tmp_path):
    for k in range(6):
        (tmp_path / f"{k}.txt").write_text("x" * 39 + "\n")
    slices = [slice for file in find_files([tmp_path / "*.txt"]) for slice in scan_file(file, "text", 100)]
    assert [len(shard.slices) for shard in into_shards(slices, 100)] == [2, 2, 2]
