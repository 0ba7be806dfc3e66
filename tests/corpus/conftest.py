"""Two small tokenizers, and a corpus of JSON lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from small_tokenizers import byte_level


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of several sizes: pages of the Python manual and their paragraphs."""
    from pydoc_data.topics import topics

    pages = [topics[name] for name in sorted(topics)]
    return [text for page in pages for text in (page, *page.split("\n\n")) if text.strip()]


@pytest.fixture(scope="session")
def pair(texts: list[str]) -> tuple[Any, Any]:
    """A student's and a teacher's tokenizer that cut text differently."""
    return byte_level(600, texts[::9]), byte_level(1200, texts[::7])


@pytest.fixture(scope="session")
def pair_files(pair: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same as files."""
    folder = tmp_path_factory.mktemp("pair")
    paths = [str(folder / "student.json"), str(folder / "teacher.json")]
    for tokenizer, path in zip(pair, paths, strict=True):
        tokenizer.save(path)
    return paths


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "manual.jsonl"
    path.write_text("".join(json.dumps({"text": text, "page": k}) + "\n" for k, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """The file system of a server on this machine that speaks S3, with an empty "bucket"."""
    pytest.importorskip("s3fs", reason="xtoken[s3] is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    here = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    here.start()
    address = "http://{}:{}".format(*here.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ENDPOINT_URL": address, **keys}.items():
            patch.setenv(name, value)
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        type(system).clear_instance_cache()
        if system.exists("bucket"):  # all servers of a process have the same buckets
            system.rm("bucket", recursive=True)
        system.mkdir("bucket")
        yield system
        type(system).clear_instance_cache()
    here.stop()
