"""The Ray engine gives the output of the local one, on a real local Ray of two workers."""

from __future__ import annotations

import pytest

from xtoken import align_corpus

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray")


@pytest.fixture
def cluster():
    ray.init(
        num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield
    ray.shutdown()


def test_ray_gives_the_same_output(cluster, pair_files, corpus, tmp_path):
    align_corpus(*pair_files, corpus, tmp_path / "local", shard_bytes=100_000)
    manifest = align_corpus(*pair_files, corpus, tmp_path / "ray", shard_bytes=100_000, engine="ray", workers=2)
    assert len(manifest.shards) > 4
    for path in (tmp_path / "local").iterdir():
        assert (tmp_path / "ray" / path.name).read_bytes() == path.read_bytes()

    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one"}\n{\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2"):
        align_corpus(*pair_files, broken, tmp_path / "out", engine="ray", workers=1)
    assert ray.is_initialized()
