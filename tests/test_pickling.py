"""What users hand to the workers of a DataLoader: it can be pickled, works there, and says what it is."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch.utils.data import DataLoader

import xtoken
from xtoken import Aligner, Alignment, LinearLogits, PieceIndex, ProjectionMatrix, Teacher, TopKLogits, Vocabulary
from xtoken.data import AlignedCollator, AlignedDataset
from xtoken.teacher_cache import TeacherCacheWriter

STUDENT = Vocabulary([b"<s>", b" ", b"a", b"b", b"ab", b","], roles={"bos": 0})
TEACHER = Vocabulary([b" ", b"a", b"b", b"ba", b","])
W = ProjectionMatrix.build(STUDENT, TEACHER)
PIECES = PieceIndex.build(STUDENT, TEACHER)
ALIGNMENT = Alignment([[1, 2, 1, 3], [2, 3, 3, 4]], None, [0, 4, 2], [0, 1, 2, 1])
IDS = [([0, 4, 3], [1, 2, 2]), ([0, 4, 4], [1, 3, 2])]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two documents, and a teacher cache of one."""
    path = tmp_path_factory.mktemp("stored")
    (path / "a.jsonl").write_text("".join(json.dumps({"text": text, "id": text}) + "\n" for text in ("abb", "aba")))
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.decoder = decoders.ByteLevel()
    xtoken.align_corpus(tokenizer, tokenizer, path / "a.jsonl", path / "corpus")
    with TeacherCacheWriter(path / "cache", TEACHER, top_k=2) as writer:
        writer.add([1, 2], TopKLogits(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])))
    return path


def objects(stored: Path) -> dict[str, Any]:
    """One of each, and the beginning of what it prints."""
    cache, teacher = xtoken.TeacherCache(stored / "cache"), Teacher(W, temperature=2.0)
    made = f"top_k=2, max_length=None, teacher={TEACHER.fingerprint()[:12]}"
    return {
        "Vocabulary(6 tokens: 5 normal, 1 special; roles: bos)": STUDENT,
        "Aligner(6 to 5 tokens, method='dp', num_threads=3)": Aligner(STUDENT, TEACHER, "dp", num_threads=3),
        "Aligner(6 to 5 tokens, method='auto', fold_space_punctuation=True, num_threads=": Aligner(
            STUDENT, TEACHER, fold_space_punctuation=True
        ),
        "ProjectionMatrix([6, 5], nnz=6, exact=4, role=0, pieces=1, none=1)": W,
        "LearnableProjection([6, 5], nnz=6)": W.learnable(),
        "PieceIndex([6, 5], events=5, not calibrated)": PIECES,
        "Alignment(samples=1, chunks=2, exact=1, device=cpu)": ALIGNMENT,
        "TopKLogits([3, 2], torch.float32, device=cpu, tail='uniform')": TopKLogits(
            torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
        ),
        "LinearLogits([3, 5] of width 2, torch.float32, cpu)": LinearLogits(torch.zeros(3, 2), torch.zeros(5, 2)),
        "Teacher(projection=ProjectionMatrix([6, 5], nnz=6, ": teacher,
        "XTokenLoss(\n  teachers=[1 ": xtoken.XTokenLoss([teacher, Teacher(W.learnable())]),
        "CoverageReport(11 classes, 6 tokens, critical=[": xtoken.coverage_audit(STUDENT, TEACHER, W),
        f"TeacherCache('{stored}/cache', documents=1, {made})": cache,
        f"AlignedDataset('{stored}/corpus', documents=2, shards=1)": AlignedDataset(stored / "corpus"),
        "AlignedCollator(student_pad_id=3, teacher_pad_id=0)": AlignedCollator(student_pad_id=3),
    }


def test_copies_are_the_same(stored: Path) -> None:
    for shown, one in objects(stored).items():
        assert repr(one).startswith(shown)
        for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert type(other) is type(one)
            assert repr(other) == repr(one)


def test_copies_work(stored: Path) -> None:
    made = [pickle.loads(pickle.dumps(one)) for one in objects(stored).values()]
    one = {type(other).__name__: other for other in made}
    assert one["Vocabulary"].fingerprint() == STUDENT.fingerprint()
    assert one["Aligner"].align(*IDS[1]).spans.tolist() == Aligner(STUDENT, TEACHER).align(*IDS[1]).spans.tolist()
    assert torch.equal(one["LearnableProjection"].weight, W.learnable().weight)
    one["PieceIndex"].check_tokenizers(STUDENT, TEACHER)
    assert one["Alignment"].teacher_ids.tolist() == [0, 1, 2, 1]
    assert one["TeacherCache"].lookup([1, 2]).logits.ids.shape == (2, 2)
    teacher = one["XTokenLoss"].teachers[0]
    assert torch.equal(teacher.projection.weight, W.weight)
    assert teacher.temperature == 2.0


def test_folding_is_kept() -> None:
    """What only the core knew: " ," is "," to the aligner that folds."""
    student, teacher = Vocabulary([b"a", b" ,"]), Vocabulary([b"a", b","])
    for fold in (False, True):
        aligner = pickle.loads(pickle.dumps(Aligner(student, teacher, "dp", fold_space_punctuation=fold)))
        assert aligner.align([0, 1], [0, 1]).num_chunks == 1 + fold


def test_views_are_pickled_once() -> None:
    assert len(pickle.dumps(PIECES)) < PIECES.data.nbytes + 1000


class Collate:
    """Aligns in the worker, and tells what arrived there."""

    def __init__(self, held: dict[str, Any]) -> None:
        self.aligner = Aligner(STUDENT, TEACHER)
        self.held = held

    def __call__(self, rows: list[Any]) -> tuple[Alignment, list[str], str]:
        document = self.held["corpus"][1]["id"] + str(len(self.held["cache"].lookup([1, 2]).token_ids))
        return self.aligner.align(*map(list, zip(*rows, strict=True))), list(map(repr, self.held.values())), document


def test_a_spawned_worker_aligns_and_reads(stored: Path) -> None:
    held = {
        **objects(stored),
        "corpus": AlignedDataset(stored / "corpus"),
        "cache": xtoken.TeacherCache(stored / "cache"),
    }
    loader: DataLoader[Any] = DataLoader(
        IDS,
        batch_size=2,
        collate_fn=Collate(held),
        num_workers=1,
        multiprocessing_context=multiprocessing.get_context("spawn"),
    )
    ((alignment, shown, document),) = loader
    want = Aligner(STUDENT, TEACHER).align(*map(list, zip(*IDS, strict=True)))
    assert torch.equal(alignment.spans, want.spans)
    assert alignment.student_ids.tolist() == [[0, 4, 3], [0, 4, 4]]
    assert shown == list(map(repr, held.values()))
    assert document == "aba2"
