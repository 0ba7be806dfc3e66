"""Reading aligned corpora back."""

from __future__ import annotations

import errno
import json
import multiprocessing
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from xtoken import Aligner, Vocabulary, align_corpus, data
from xtoken.corpus.manifest import INDEX
from xtoken.data import AlignedCollator, AlignedDataset

TEXTS = [f"document {k}: " + "In 1995, 1,024 readers paid. " * (k % 90) for k in range(300)]


@pytest.fixture(scope="module")
def pair(vocabulary):
    return vocabulary("smollm2"), vocabulary("llama3")


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    (path / "a.jsonl").write_text("".join(json.dumps({"text": text, "id": k}) + "\n" for k, text in enumerate(TEXTS)))
    align_corpus(*pair, path / "a.jsonl", path / "out", shard_bytes=100_000)
    return path / "out"


def test_documents(folder, pair):
    dataset = AlignedDataset(folder, *pair)
    assert len(dataset) == len(TEXTS) == dataset.counts.documents
    for k in (7, 0, 299, -1, 150):
        document = dataset[k]
        assert document["id"] == str(k % 300)
        assert document["spans"].dtype == torch.int32
        for side, vocabulary in zip(("student", "teacher"), pair, strict=True):
            assert vocabulary.decode(document[f"{side}_ids"]).decode() == TEXTS[k]
        expected = Aligner(*pair).align(document["student_ids"], document["teacher_ids"])
        assert torch.equal(document["spans"], expected.spans)
    for k in (300, -301):
        with pytest.raises(IndexError, match="expected -300 to 299"):
            dataset[k]
    assert len(pickle.dumps(dataset)) < 20_000


def test_a_shard_that_cannot_be_read_is_not_called_damaged(folder, monkeypatch):
    """Nobody is told to delete what only lacks permission."""

    def refuse(place):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(data, "arrow_file", refuse)
    with pytest.raises(PermissionError, match=f"Permission denied: '{folder}/shard-00000.parquet'$"):
        AlignedDataset(folder)[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_with_workers(start, folder, pair):
    dataset = AlignedDataset(folder)
    dataset[0]
    loader = DataLoader(
        dataset,
        batch_size=16,
        collate_fn=AlignedCollator(*pair),
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(start),
    )
    names = []
    for batch in loader:
        names += batch["ids"]
        alignment = batch["alignment"]
        assert len(alignment) == len(batch["ids"])
        expected = Aligner(*pair).align(
            batch["student_ids"], batch["teacher_ids"], batch["student_mask"], batch["teacher_mask"]
        )
        assert torch.equal(alignment.spans, expected.spans)
        assert torch.equal(alignment.offsets, expected.offsets)
        assert (batch["student_ids"][batch["student_mask"] == 0] == pair[0].roles["pad"]).all()
    assert names == [str(k) for k in range(len(TEXTS))]


def test_collator():
    document = {"id": "a", "student_ids": [4, 5], "teacher_ids": [6], "spans": torch.zeros(0, 4)}
    empty = {"id": "b", "student_ids": [], "teacher_ids": [], "spans": []}
    batch = AlignedCollator(student_pad_id=9, teacher_tok=Vocabulary([b"a", b"<e>"], roles={"eos": 1}))(
        [document, empty]
    )
    assert batch["student_ids"].tolist() == [[4, 5], [9, 9]]
    assert batch["teacher_ids"].tolist() == [[6], [1]]
    assert batch["student_mask"].tolist() == [[1, 1], [0, 0]]
    assert batch["alignment"].num_chunks == 0
    with pytest.raises(ValueError, match="expected at least one"):
        AlignedCollator()([])


def test_what_does_not_fit(folder, pair, tmp_path):
    with pytest.raises(ValueError, match="was made with another student tokenizer"):
        AlignedDataset(folder, pair[1], pair[1])
    with pytest.raises(ValueError, match="teacher_tok: "):
        AlignedDataset(folder, teacher_tok=pair[0])
    with pytest.raises(FileNotFoundError):
        AlignedDataset(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FileNotFoundError, match=r"shard-00000\.parquet is missing"):
        AlignedDataset(tmp_path)
    del manifest["checksum"]
    INDEX.write(tmp_path, {**manifest, "complete": False})
    with pytest.raises(ValueError, match="is not complete"):
        AlignedDataset(tmp_path)


def test_an_empty_corpus(pair, tmp_path):
    (tmp_path / "a.txt").write_text("")
    align_corpus(*pair, tmp_path / "a.txt", tmp_path / "out")
    assert len(AlignedDataset(tmp_path / "out")) == 0


def test_vocabularies_survive_pickling(pair):
    copy = pickle.loads(pickle.dumps(pair[0]))
    assert copy.fingerprint() == pair[0].fingerprint()
    assert copy.tokenizer.encode(TEXTS[5]).ids == pair[0].tokenizer.encode(TEXTS[5]).ids
