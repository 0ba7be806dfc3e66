"""Every input format gives the same documents, wherever the file is cut; broken ones are named."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from xtoken.corpus import lines
from xtoken.corpus.documents import Broken
from xtoken.corpus.files import find_files
from xtoken.corpus.partition import MOST_SLICES, into_shards
from xtoken.corpus.reading import read_shard, scan_file

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
    jsonl = "".join(json.dumps({"text": text, "meta": {"a": [1]}}) + "\n" for text in texts).encode()
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
    ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "a.txt.zst", "a.parquet", "a.arrow", "a.feather"],
)
def test_every_format_gives_the_same_documents(name, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 4096)
    write(tmp_path / name, TEXTS)
    texts = [text.rstrip("\n") for text in TEXTS]
    for target in (700, 3000, 1 << 20):
        rows, slices, _ = documents(tmp_path / name, target)
        assert [text for _, text in rows] == texts
        assert [name_ for name_, _ in rows] == [f"{name}:{k + 1}" for k in range(len(TEXTS))]
        assert len(slices) > 3 or target > 3000
        assert not name.endswith((".gz", ".zst")) or len(slices) <= MOST_SLICES


def test_lines_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 64)
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
        (b'{"other": "x", "more": 1}', "expected text in field 'text', the line has other, more"),
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
    (tmp_path / "a.docx").write_text("")
    with pytest.raises(ValueError, match=r"unknown ending; expected one of \.jsonl"):
        find_files([tmp_path / "a.docx"])


def test_small_files_share_a_shard(tmp_path):
    for k in range(6):
        (tmp_path / f"{k}.txt").write_text("x" * 39 + "\n")
    slices = [slice for file in find_files([tmp_path / "*.txt"]) for slice in scan_file(file, "text", 100)]
    assert [len(shard.slices) for shard in into_shards(slices, 100)] == [2, 2, 2]
