"""Files of ours that are cut, have a bit flipped, or were written with something wrong in them: an error of ours with
the file's name, or the right value."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from small_tokenizers import byte_level
from torch import Tensor

from xtoken import PieceIndex, ProjectionMatrix, TeacherCache, Vocabulary, align_corpus, cache_teacher
from xtoken.corpus import shards
from xtoken.corpus.manifest import INDEX as MANIFEST
from xtoken.data import AlignedDataset
from xtoken.storage import TensorFile
from xtoken.teacher_cache import _OF_TOKENS, _SHARD, INDEX, _sums

STUDENT = Vocabulary([b"5", b"9", b"95", b"99", b"995", b"x", b"</s>"], roles={"eos": 6})
TEACHER = Vocabulary([b"9", b"99", b"5", b"59", b"</s>"], roles={"eos": 4})
TEXTS = [f"document {k}: " + "In 1995, 1,024 readers paid. " * (k % 7) for k in range(40)]


def matrix(path: Path) -> Any:
    W = ProjectionMatrix.load(path, STUDENT, TEACHER)
    return [W.row_ptr, W.col, W.weight, W.kind], W.shape, W.metadata


def pieces(path: Path) -> Any:
    index = PieceIndex.load(path, STUDENT, TEACHER)
    return [index.data, index.text], index.metadata


def nemo(path: Path) -> Any:
    W = ProjectionMatrix.from_nemo(path, len(TEACHER))
    return [W.row_ptr, W.col, W.weight], W.shape


def cache(path: Path) -> Any:
    opened = TeacherCache(path.parent, TEACHER)
    documents = [opened[k] for k in range(len(opened))]
    found = [(one.token_ids, one.byte_ends, one.logits.ids, one.logits.logprobs) for one in documents]
    return found, opened.top_k, opened.max_length, opened.end_id


def corpus(path: Path) -> Any:
    dataset = AlignedDataset(path.parent)
    documents = [dataset[k] for k in range(len(dataset))]
    sides = ("student_ids", "teacher_ids", "spans")
    return [one[side] for one in documents for side in sides], [one["id"] for one in documents], dataset.counts


def model(input_ids: Tensor, attention_mask: Tensor) -> Any:
    generator = torch.Generator().manual_seed(int(input_ids.sum()))
    return SimpleNamespace(logits=torch.randn(*input_ids.shape, len(TEACHER), generator=generator))


def make(name: str, folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    """A small file of a kind, and what reads it."""
    path = folder / name
    if not name.startswith(("shard", "cache", "manifest")):
        folder.mkdir(parents=True, exist_ok=True)
    if name.startswith(("w.", "nemo")):
        W = ProjectionMatrix.build(STUDENT, TEACHER)
        (W.save if name.startswith("w.") else W.to_nemo)(path)
        return path, matrix if name.startswith("w.") else nemo
    if name.startswith("pieces"):
        PieceIndex.build(STUDENT, TEACHER).save(path)
        return path, pieces
    if name in ("cache.json", "shard-00001.safetensors"):
        cache_teacher(model, TEACHER, [[0, 1], [2, 3, 4, 1], [], [1, 1, 4]], folder, top_k=3, shard_tokens=5)
        return path, cache
    folder.parent.mkdir(exist_ok=True)
    (folder.parent / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    pair = byte_level(400, TEXTS), byte_level(300, TEXTS)
    align_corpus(*pair, folder.parent / "in.jsonl", folder, shard_bytes=3000)
    return path, corpus


NAMES = ["w.safetensors", "pieces.safetensors", "nemo.pt", "cache.json", "shard-00001.safetensors", "manifest.json",
         "shard-00001.parquet"]  # fmt: skip


def is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return bool(one == other)


def refused(read: Callable[[Path], Any], path: Path, expected: Any) -> bool:
    """Whether an error names the file; without an error the value must be right."""
    try:
        value = read(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017, an error may come or not
        return True
    assert is_equal(value, expected)
    return False


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_seen(name: str, tmp_path: Path) -> None:
    path, read = make(name, tmp_path / "out")
    expected, content, draw = read(path), path.read_bytes(), random.Random(0)
    assert is_equal(expected, read(path))
    cuts = {0, 1, 7, 8, 9, len(content) - 1, *draw.sample(range(len(content)), 40)}
    for size in sorted(cuts):
        path.write_bytes(content[:size])
        assert refused(read, path, expected) or content[size:] == b"\n"
    count = 0
    for _ in range(150):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        count += refused(read, path, expected)
    assert count > 80  # nemo.pt has padding
    for _ in range(30):  # two stretches change places
        a, b, c = sorted(draw.sample(range(len(content)), 3))
        path.write_bytes(content[:a] + content[b:c] + content[a:b] + content[c:])
        refused(read, path, expected)
    for other in (content + b"\0", b"\0" * len(content), b"[" * 100_000, b"{}", b"null"):
        path.write_bytes(other)
        assert refused(read, path, expected) or other == content + b"\0"


@pytest.mark.parametrize("name", NAMES)
def test_no_file(name: str, tmp_path: Path) -> None:
    """A pipe would be waited for, and a device may have no end."""
    path, read = make(name, tmp_path / "out")
    path.unlink()
    path.symlink_to("/dev/null")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(path))) as caught:
        read(path)
    assert "expected a regular file" in str(caught.value) or "no such file" in str(caught.value)


def wrong(tensor: Tensor) -> list[Tensor]:
    """Tensors that cannot be right in place of this one."""
    others = [tensor.double() if tensor.dtype != torch.float64 else tensor.float(), tensor[:0], tensor[:-1]]
    others += [torch.cat([tensor, tensor[-1:]]), tensor[None], tensor.reshape(-1)[:1].reshape(())]
    last = tensor.clone()
    last[-1] = torch.iinfo(tensor.dtype).max if not tensor.is_floating_point() else torch.nan
    others.append(last)
    if tensor.is_floating_point():
        others += [tensor + 1, -torch.ones_like(tensor) * torch.inf, torch.full_like(tensor, torch.nan)]
    elif tensor.dtype != torch.uint8:
        others += [torch.full_like(tensor, -2), torch.full_like(tensor, torch.iinfo(tensor.dtype).min)]
    return others


@pytest.mark.parametrize(
    ("name", "kind"), [(NAMES[0], ProjectionMatrix.FILE), (NAMES[1], PieceIndex.FILE), (NAMES[4], _SHARD)]
)
def test_wrong_tensors_are_seen(name: str, kind: TensorFile, tmp_path: Path) -> None:
    """Even with the checksum that goes with them."""
    path, read = make(name, tmp_path / "out")
    expected = read(path)
    with kind.open(path) as file:
        tensors, metadata = {part: file.read(part) for part in file.parts}, dict(file.metadata)

    def rejects(changed: dict[str, Tensor], **more: str) -> bool:
        size = tensors.get("tokens", torch.empty(0)).shape
        fits = all(one in changed and changed[one].shape[:1] == size for one in _OF_TOKENS)
        if kind is _SHARD and fits and changed.get("sums") is tensors["sums"]:
            changed = {**changed, "sums": torch.tensor(_sums(changed, tensors["offsets"].tolist()))}
        TensorFile("any", unsummed=kind.unsummed).save(path, changed, **{**metadata, **more})
        return refused(read, path, expected)

    assert not rejects(tensors)
    for part, tensor in tensors.items():
        for other in wrong(tensor):
            is_right = is_equal(other, tensor) or (part == "digests" and other.shape == tensor.shape)
            assert rejects({**tensors, part: other}) or is_right
        assert rejects({one: value for one, value in tensors.items() if one != part})
        assert rejects({**tensors, "more": tensor})
        for second, value in tensors.items():
            if second > part:
                assert rejects({**tensors, part: value, second: tensor})
    for key in set(metadata) - {"checksum", "calibration", "beta", "gamma", "top_k", "passes"}:
        assert rejects(tensors, **{key: "1" + metadata[key]})


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    for name in (*NAMES[:2], *NAMES[3:]):
        written = [make(name, tmp_path / f"{name}{k}" / "out")[0].read_bytes() for k in range(2)]
        if name != "manifest.json":  # which has the paths and times of its inputs
            assert written[0] == written[1]


def test_a_shard_must_fit_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = make("shard-00001.parquet", tmp_path / "out")
    content, other = path.read_bytes(), path.with_name("shard-00000.parquet").read_bytes()
    expected = corpus(path)
    path.write_bytes(other)
    assert refused(corpus, path, expected)
    path.write_bytes(content)
    index = json.loads((path.parent / MANIFEST.name).read_text())
    good = json.dumps({name: value for name, value in index.items() if name != "checksum"})
    for field in ("documents", "student_tokens", "chunks"):
        changed = json.loads(good)
        changed["shards"][1][field] -= 1
        MANIFEST.write(path.parent, changed)
        assert refused(corpus, path, expected)
    for field, value in (("documents", -1), ("documents", "3"), ("chunks", None), ("skipped", 3), ("pieces", [[9]])):
        changed = json.loads(good)
        changed["shards"][1][field] = value
        MANIFEST.write(path.parent, changed)
        assert refused(corpus, path.parent / MANIFEST.name, expected) or field == "pieces"
    MANIFEST.write(path.parent, json.loads(good))
    assert not refused(corpus, path, expected)
    # Wrong values that were written as such: checksums fit them.
    group = pq.read_table(path)
    for column, change in (("student_ids", lambda ids: [400, *ids[1:]]), ("teacher_ids", lambda ids: [-1, *ids[1:]]),
                           ("student_ids", lambda ids: ids[:1]), ("spans", lambda spans: [[3, 3, 0, 1]])):  # fmt: skip
        rows = group.to_pylist()
        rows[2][column] = change(rows[2][column])
        table = type(group).from_pylist(rows, schema=group.schema)
        held = {name.decode(): text for name, text in group.schema.metadata.items()}
        footer = pq.read_metadata(path).metadata
        held |= {name: footer[name.encode()].decode() for name in (shards.COUNTS, shards.NUMBER)}
        held[shards.SUMS] = json.dumps([shards.checksum(table)])
        pq.write_table(table.replace_schema_metadata(held), path)
        assert refused(corpus, path, expected)
        path.write_bytes(content)


def test_indices_of_caches(tmp_path: Path) -> None:
    path, read = make("cache.json", tmp_path / "out")
    expected, index = read(path), json.loads(path.read_text())
    del index["checksum"]
    for changed in (
        {"shards": [{**index["shards"][0], "file": 5}, *index["shards"][1:]]},
        {"shards": [{**index["shards"][0], "file": "../x"}, *index["shards"][1:]]},
        {"shards": [{**index["shards"][0], "documents": 1 << 60}, *index["shards"][1:]]},
        {"shards": [{**index["shards"][0], "documents": 0.5}, *index["shards"][1:]]},
        {"shards": index["shards"][::-1]},
        {"shards": 3},
        {"top_k": -1},
        {"top_k": "3"},
        {"max_length": [1]},
    ):
        INDEX.write(path.parent, {**index, **changed})
        assert refused(read, path, expected)
    for changed in ({"shards": [{**index["shards"][0], "documents": 1}, *index["shards"][1:]]}, {"top_k": 2}):
        INDEX.write(path.parent, {**index, **changed})
        assert refused(read, path.parent / "shard-00000.safetensors", expected)
