"""The piece index: roots, pieces and their order, files, real vocabularies."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xtoken import PieceIndex, Vocabulary

STUDENT = [b"5", b"9", b"95", b"99", b"995", b"x"]
TEACHER = [b"9", b"99", b"5", b"59"]


def index() -> PieceIndex:
    return PieceIndex.build(Vocabulary(STUDENT), Vocabulary(TEACHER))


def test_by_hand() -> None:
    built = index()
    assert built.shape == (6, 4)
    assert built.events == 4  # 5, 9, 99, and "x", which the teacher cannot spell
    student, teacher = built.student, built.teacher
    five, nine = student.event[:2].tolist()
    double = int(student.event[3])
    assert student.event.tolist() == [five, nine, nine, double, double, 3]
    assert teacher.event.tolist() == [nine, double, five, five]
    assert student.length.tolist() == [1, 1, 2, 2, 3, 1]
    sequences = [student.pieces[student.ptr[t] : student.ptr[t + 1]].tolist() for t in range(6)]
    assert sequences == [[2], [0], [0, 2], [1], [1, 2], [4]]
    assert student.order.tolist() == [1, 2, 3, 4, 0, 5]
    assert teacher.pieces.tolist() == [1, 3, 0, 0, 1]


def test_a_rest_that_the_other_side_cannot_spell() -> None:
    built = PieceIndex.build(Vocabulary([b"5x9", b"x"]), Vocabulary([b"5", b"9"]))
    assert built.student.pieces.tolist() == [0, 2, 2]
    assert built.student.ptr.tolist() == [0, 2, 3]


def test_roles_and_special_tokens() -> None:
    kinds = ["normal", "special", "special"]
    student = Vocabulary([b"a", b"<s>", b"<tool>"], kinds, {"bos": 1})
    teacher = Vocabulary([b"a", b"<bos>", b"<other>"], kinds, {"bos": 1})
    built = PieceIndex.build(student, teacher)
    assert built.events == 3
    assert built.student.event.tolist() == built.teacher.event.tolist()
    assert built.student.event[2] == 2
    assert built.student.length.tolist() == [1, 0, 0]
    assert built.student.ptr.diff().tolist() == [1, 1, 0]


def test_equal_bytes_are_one_event() -> None:
    student = Vocabulary([b"a", b"a", b"b"], ["byte", "normal", "normal"])
    built = PieceIndex.build(student, Vocabulary([b"b", b"a"]))
    assert built.student.event[0] == built.student.event[1] == built.teacher.event[1]
    assert built.teacher.pieces.tolist() == [2, 1]  # the normal token, not the byte


def test_no_token() -> None:
    with pytest.raises(ValueError, match="vocabulary: expected at least one token"):
        PieceIndex.build(Vocabulary([]), Vocabulary(TEACHER))


# Llama 3 as the student of these: events of text tokens, and the most tokens of one side in an event.
KNOWN = {"qwen3": (109_566, 872), "o200k": (103_245, 2747)}


@pytest.mark.parametrize("teacher", KNOWN)
def test_real_vocabularies(teacher: str, vocabulary: Callable[[str], Vocabulary]) -> None:
    student_vocabulary, teacher_vocabulary = vocabulary("llama3"), vocabulary(teacher)
    built = PieceIndex.build(student_vocabulary, teacher_vocabulary)
    counts = []
    for side, one in ((built.student, student_vocabulary), (built.teacher, teacher_vocabulary)):
        is_text = torch.from_numpy(one.is_text)
        rootless = built.events - 1
        assert not (is_text & (side.event == rootless)).any()
        counts.append(torch.bincount(side.event[is_text].long(), minlength=built.events))
    events, largest = KNOWN[teacher]
    assert int(((counts[0] > 0) & (counts[1] > 0)).sum()) == events
    assert int(((counts[0] > 0) | (counts[1] > 0)).sum()) == events
    assert max(int(count.max()) for count in counts) == largest


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "pieces.safetensors"
    built = index()
    built.save(path)
    loaded = PieceIndex.load(path, Vocabulary(STUDENT), Vocabulary(TEACHER))
    assert torch.equal(loaded.data, built.data)
    assert loaded.metadata == built.metadata
    assert repr(loaded) == "PieceIndex([6, 4], events=4)"
    with pytest.raises(ValueError, match="pieces: built for another teacher tokenizer"):
        PieceIndex.load(path, teacher_tok=Vocabulary(STUDENT))
    with pytest.raises(FileNotFoundError, match="path: no such file"):
        PieceIndex.load(tmp_path / "none")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "pieces.safetensors"
    index().save(path)
    data = load_file(path)["data"]
    good = {"format": "xtoken.pieces", "version": "1"}
    for tensors, metadata, message in (
        ({"data": data}, {"format": "xtoken.projection"}, "not a piece index of xtoken"),
        ({"other": data}, good, "not a piece index of xtoken"),
        ({"data": data}, {**good, "version": "2"}, "format version 2, this xtoken reads version 1"),
        ({"data": data[:-1]}, good, "damaged: pieces: not a piece index: expected .* numbers, got"),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=message):
            PieceIndex.load(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        PieceIndex.load(path)


def test_damaged_data() -> None:
    data = index().data
    with pytest.raises(ValueError, match="not a piece index: 3 numbers"):
        PieceIndex(data[:3])
    head, body = 5, 6 * 4 + 1 + 8  # the head, and the student's part
    places = {"event": head, "length": head + 6, "order": head + 12, "ptr": head + 18, "pieces": head + 25}
    for place, side in [(p, "student") for p in places.values()] + [(head + body, "teacher")]:
        damaged = data.clone()
        damaged[place] = -1
        with pytest.raises(ValueError, match=f"a number of the {side}'s part is out of place"):
            PieceIndex(damaged)
    damaged = data.clone()
    damaged[places["order"] : places["order"] + 2] = data[places["order"] : places["order"] + 2].flip(0)
    with pytest.raises(ValueError, match="a number of the student's part is out of place"):
        PieceIndex(damaged)
    damaged = data.clone()
    damaged[0] = 0
    with pytest.raises(ValueError, match="number 0 of its head is 0"):
        PieceIndex(damaged)
