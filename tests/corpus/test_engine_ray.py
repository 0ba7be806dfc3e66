"""The Ray engine gives the output of the local one, on a real local Ray of two workers, of which one is killed; by the
command line, from s3:// to s3://."""

from __future__ import annotations

import json

import psutil
import pyarrow.parquet as pq
import pytest

from xtoken import align_corpus
from xtoken.cli import main
from xtoken.corpus.run import Progress

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray")

SHARD = 100_000


@pytest.fixture
def cluster(s3):  # which the workers are to find in their environment
    ray.init(
        num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield
    ray.shutdown()


def workers():
    """The processes of the engine on the local Ray that this one has started."""
    return [one for one in psutil.Process().children(recursive=True) if "_Worker" in one.name() + one.cmdline()[0]]


def test_ray_gives_the_same_output(cluster, s3, pair_files, texts, tmp_path, monkeypatch, capsys, caplog):
    """Ids too, which are a column. A worker that is killed costs the shard that it was making, which is made again."""
    corpus = tmp_path / "manual.jsonl"
    corpus.write_text("".join(json.dumps({"id": f"text {k}", "text": text}) + "\n" for k, text in enumerate(texts)))
    align_corpus(*pair_files, corpus, tmp_path / "local", shard_bytes=SHARD)
    made: list[dict[str, str]] = []

    def kill_one(*_):
        s3.invalidate_cache()
        made.append({name: str(s3.info(name)["ETag"]) for name in s3.ls("bucket/out") if "shard" in name})
        if len(made) == 1:
            alive = workers()
            assert len(alive) == 2
            alive[0].kill()

    monkeypatch.setattr(Progress, "shard_done", kill_one)
    s3.put(str(corpus), "bucket/manual.jsonl")
    command = ["align", "--student", pair_files[0], "--teacher", pair_files[1], "--data", "s3://bucket/manual.jsonl"]
    command += ["--output", "s3://bucket/out", "--shard-bytes", str(SHARD), "--engine", "ray", "--workers=2", "--json"]
    assert main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["shards"] == len(made) > 4
    assert facts["documents"] == len(texts)
    assert "1 workers died; what they made was lost and begun again: shard-" in caplog.text
    shards = sorted(path.name for path in (tmp_path / "local").glob("shard-*"))
    for name in shards:
        assert s3.cat(f"bucket/out/{name}") == (tmp_path / "local" / name).read_bytes()
    ids = pq.read_table(tmp_path / "local" / shards[-1])["id"].to_pylist()
    assert ids == [f"text {len(texts) - k}" for k in range(len(ids), 0, -1)]

    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one"}\n{\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2"):
        align_corpus(*pair_files, broken, tmp_path / "out", engine="ray", workers=1)
    assert ray.is_initialized()
