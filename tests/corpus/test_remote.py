"""Corpora at s3://, on a server of this machine: the same output as in a folder, and errors that say what is wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import sys

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from xtoken import align_corpus
from xtoken.cli import main
from xtoken.corpus.files import find_files
from xtoken.corpus.run import Progress
from xtoken.data import AlignedDataset
from xtoken.remote import Remote

pytestmark = pytest.mark.slow

SHARD = 80_000


@pytest.fixture(scope="module")
def files(texts, tmp_path_factory):
    """A corpus in many formats, with ids, or without."""
    folder = tmp_path_factory.mktemp("formats")
    rows = [{"id": f"page-{k}", "text": text} for k, text in enumerate(texts[:200])]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = pa.Table.from_pylist(rows)
    for name, data in (
        ("a/plain.jsonl", lines),
        ("a/packed.jsonl.gz", gzip.compress(lines, mtime=0)),
        ("a/packed.jsonl.bz2", bz2.compress(lines)),
        ("a/packed.jsonl.zst", pa.compress(lines, codec="zstd", asbytes=True)),
        ("b/array.json", json.dumps([{"text": row["text"]} for row in rows]).encode()),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    pq.write_table(table, folder / "b" / "table.parquet", row_group_size=50)
    pa.feather.write_feather(table, folder / "b" / "table.arrow", chunksize=50)
    return folder


def test_every_format_gives_what_a_folder_gives(s3, files, pair, pair_files, tmp_path, capsys):
    """Ids too, by the command line; and it is read back from there."""
    s3.put(str(files), "bucket/in", recursive=True)
    here = align_corpus(*pair, [f"{files}/a/*", f"{files}/b/*"], tmp_path / "out", shard_bytes=SHARD)
    command = ["align", "--student", pair_files[0], "--teacher", pair_files[1], "--shard-bytes", str(SHARD), "--json"]
    assert main([*command, "--data", "s3://bucket/in/a/*", "s3://bucket/in/b/*", "-o", "s3://bucket/out"]) == 0
    assert json.loads(capsys.readouterr().out).items() >= vars(here.total).items()
    assert here.total.documents == 1400
    names = {name.rpartition("/")[2] for name in s3.ls("bucket/out")}
    assert names == set(os.listdir(tmp_path / "out"))
    for shard in here.shards:
        assert s3.cat(f"bucket/out/{shard.file_name}") == (tmp_path / "out" / shard.file_name).read_bytes()
    dataset = AlignedDataset("s3://bucket/out", *pair)
    ids = [dataset[k]["id"] for k in (0, 250, 800, 1399)]
    assert ids == ["page-0", "page-50", "b/array.json:1", "page-199"]
    files_there = find_files(["s3://bucket/in/b/table.parquet", "s3://bucket/in/**/*.gz"])
    assert [file.name for file in files_there] == ["b/table.parquet", "a/packed.jsonl.gz"]
    mixed = find_files(["s3://bucket/in/b/table.parquet", f"file://{files}/b/array.json"])
    assert [file.name for file in mixed] == ["s3://bucket/in/b/table.parquet", f"{files}/b/array.json"]
    s3.rm("bucket/out", recursive=True)


def test_resume(s3, pair, corpus, monkeypatch):
    """What is complete stays; what another run has begun since, and an input that has changed, end a run."""
    lines = b"".join(corpus.read_bytes().splitlines(keepends=True)[:300])
    s3.pipe("bucket/manual.jsonl", lines)

    def again(resume=True):
        return align_corpus(
            *pair, "s3://bucket/manual.jsonl", "s3://bucket/again", shard_bytes=SHARD // 2, resume=resume
        )

    whole = again()
    with pytest.raises(ValueError, match="s3://bucket/again is not empty; give another folder, or resume"):
        again(resume=False)
    before = {name: s3.cat(name) for name in s3.ls("bucket/again")}
    s3.rm("bucket/again/shard-00001.parquet")
    s3.pipe("bucket/again/shard-00002.parquet", before["bucket/again/shard-00002.parquet"][:-9])
    made = []
    monkeypatch.setattr(Progress, "shard_done", lambda *_: made.append(1))
    again()
    s3.invalidate_cache()
    assert {name: s3.cat(name) for name in s3.ls("bucket/again")} == before
    assert len(made) == 2 < len(whole.shards)

    s3.rm("bucket/again/shard-00001.parquet")
    monkeypatch.setattr(Progress, "shard_done", lambda *_: s3.pipe("bucket/again/.lock", b"another"))
    with pytest.raises(ValueError, match="another run writes to s3://bucket/again"):
        again()
    s3.rm("bucket/again/shard-00001.parquet")
    changed = b" " + lines[1:]  # of the same size, in the same second
    monkeypatch.setattr(Progress, "shard_done", lambda *_: s3.pipe("bucket/manual.jsonl", changed))
    with pytest.raises(ValueError, match=r"s3://bucket/manual\.jsonl: was changed while it is read"):
        again()
    s3.rm("bucket/again", recursive=True)


@pytest.mark.parametrize("protocol", ["memory", "local"])
def test_other_file_systems(protocol, pair, corpus, tmp_path):
    """Two that have neither buckets nor ETags: the output of a folder, again where a shard is lost, and read back."""
    system, root = fsspec.filesystem(protocol), str(tmp_path / "there")
    lines = b"".join(corpus.read_bytes().splitlines(keepends=True)[:200])
    system.makedirs(f"{root}/out")
    system.pipe_file(f"{root}/manual.jsonl", lines)
    (tmp_path / "manual.jsonl").write_bytes(lines)

    def again():
        inputs, output = f"{protocol}://{root}/*.jsonl", f"{protocol}://{root}/out"
        return align_corpus(*pair, inputs, output, shard_bytes=SHARD // 2, resume=True)

    here = align_corpus(*pair, tmp_path / "manual.jsonl", tmp_path / "out", shard_bytes=SHARD // 2)
    assert again().total == here.total
    lost = f"{root}/out/{here.shards[0].file_name}"
    system.rm_file(lost)
    again()
    names = {name.rpartition("/")[2] for name in system.ls(f"{root}/out", detail=False)}
    assert names == set(os.listdir(tmp_path / "out"))
    for shard in here.shards:
        assert system.cat_file(f"{root}/out/{shard.file_name}") == (tmp_path / "out" / shard.file_name).read_bytes()
    dataset = AlignedDataset(f"{protocol}://{root}/out", *pair)
    assert [dataset[k]["id"] for k in (0, 199)] == ["manual.jsonl:1", "manual.jsonl:200"]
    with pytest.raises(FileNotFoundError, match=rf"no file matches {protocol}:///nowhere/a: there is no /nowhere"):
        find_files([f"{protocol}:///nowhere/a"])
    system.pipe_file(f"{root}/manual.jsonl", b"x")
    with pytest.raises(ValueError, match=r"manual\.jsonl was changed"):
        again()


def test_errors(s3, pair, corpus, tmp_path, monkeypatch):
    """They say which URL, and what is wrong with it, before anything is made."""
    with pytest.raises(FileNotFoundError, match=r"inputs: no file matches s3://nowhere/a\.jsonl: there is no nowhere"):
        align_corpus(*pair, "s3://nowhere/a.jsonl", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"inputs: no file matches s3://bucket/none/\*\.jsonl$"):
        align_corpus(*pair, "s3://bucket/none/*.jsonl", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"output: s3://nowhere/out cannot be written to: .* does not exist"):
        align_corpus(*pair, corpus, "s3://nowhere/out")
    s3.pipe("bucket/folder/a.jsonl", b'{"text": "a"}\n{"text":\n')
    with pytest.raises(ValueError, match=r"output: expected a folder, but s3://bucket/folder/a\.jsonl is a file"):
        align_corpus(*pair, "s3://bucket/folder/a.jsonl", "s3://bucket/folder/a.jsonl")
    assert s3.ls("bucket/folder", detail=False) == ["bucket/folder/a.jsonl"]
    for folder in ("s3://bucket/folder", "S3://bucket/folder/"):
        with pytest.raises(ValueError, match=r"is a folder; expected files, such as '[sS]3://bucket/folder/\*"):
            align_corpus(*pair, folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"s3://bucket/folder/a\.jsonl, line 2: "):
        align_corpus(*pair, "s3://bucket/folder/a.jsonl", tmp_path / "broken")
    with pytest.raises(ValueError, match="nonsense://a/b: Protocol not known: nonsense"):
        find_files(["nonsense://a/b"])
    with pytest.raises(FileNotFoundError, match="s3://bucket/none"):
        AlignedDataset("s3://bucket/none")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    type(s3).clear_instance_cache()
    with pytest.raises(OSError, match=r"s3://bucket/folder/a\.jsonl: Unable to locate credentials"):
        find_files(["s3://bucket/folder/a.jsonl"])
    with pytest.raises(OSError, match="output: s3://bucket/out cannot be written to: Unable to locate credentials"):
        align_corpus(*pair, corpus, "s3://bucket/out")
    type(s3).clear_instance_cache()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ImportError, match=r"gs://a/b: the library of gs:// is not .*pip install 'xtoken\[gs\]'"):
        Remote("gs://a/b")
