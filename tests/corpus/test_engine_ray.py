"""The Ray engine gives the output of the local one, on a real local Ray of two workers, of which one is killed."""

from __future__ import annotations

import psutil
import pytest

from xtoken import align_corpus
from xtoken.corpus.progress import Progress

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


def test_ray_gives_the_same_output(cluster, s3, pair_files, corpus, tmp_path, monkeypatch, caplog):
    """From s3:// to s3://. A worker that is killed costs the shard that it was making, which is made again."""
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
    options = {"shard_bytes": SHARD, "engine": "ray", "workers": 2}
    manifest = align_corpus(*pair_files, "s3://bucket/manual.jsonl", "s3://bucket/out", **options)
    assert len(manifest.shards) == len(made) > 4
    assert manifest.deaths == 1
    assert "1 workers died; what they made was lost and begun again: shard-" in caplog.text
    for shard in manifest.shards:
        assert s3.cat(f"bucket/out/{shard.file_name}") == (tmp_path / "local" / shard.file_name).read_bytes()

    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one"}\n{\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2"):
        align_corpus(*pair_files, broken, tmp_path / "out", engine="ray", workers=1)
    assert ray.is_initialized()
