"""The piece index: roots, pieces and their order, calibration, files, real vocabularies."""

import _pydecimal
import copy
import hashlib
import inspect
import itertools
import os
import pickle
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from old_versions import needs_mistral
from real_tokenizers import encode
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from xtoken import Aligner, Alignment, MergedEvents, MergeReport, PieceIndex, Vocabulary, sample_texts
from xtoken.calibration import LISTED, _roots, calibrate
from xtoken.storage import TensorFile

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
    assert student.order.tolist() == [0, 1, 2, 3, 4, 5]  # by the events of the pieces
    assert teacher.pieces.tolist() == [1, 3, 0, 0, 1]
    # "95" and "99" are tokens, and "995" is "99" and "5"; "95", the rest of "995" after "9", has no partner.
    assert (student.joined_ptr.diff().tolist(), student.joined.tolist()) == ([0, 2, 0, 1, 0, 0], [0, 1, 0])
    assert (teacher.joined_ptr.diff().tolist(), teacher.joined.tolist()) == ([1, 0, 1, 0], [0, 0])


def test_a_rest_that_the_other_side_cannot_spell() -> None:
    built = PieceIndex.build(Vocabulary([b"5x9", b"x"]), Vocabulary([b"5", b"9"]))
    assert built.student.pieces.tolist() == [0, 2, 2]
    assert built.student.ptr.tolist() == [0, 2, 3]


def test_parts_of_characters() -> None:
    """Nothing is told behind a piece that ends inside a character; what cannot follow counts by its root then, too."""
    one, other = "好".encode(), "妥".encode()  # e5 a5 bd and e5 a6 a5
    student = Vocabulary([b"x", one, b"x" + one, one + b"x", one + other, other, b"x" + one[:2], one[:2], one[:1]])
    teacher = Vocabulary([b"x", one[:1], one[:2], one[2:], other[1:2], other[2:]])
    built = PieceIndex.build(student, teacher)
    ptr = built.student.ptr.tolist()
    cut = [built.student.pieces[a:b].tolist() for a, b in itertools.pairwise(ptr)]
    assert cut == [[0], [2, 6], [0, 6], [2, 6], [2, 6], [1, 6], [0, 6], [2], [1]]
    assert built.student.joined_ptr.diff().tolist() == [2, 2, 0, 0, 0, 0, 0, 0, 0]
    assert built.student.joined.tolist() == [1, 7, 0, 5]  # "x" is not followed by "好", nor "好" by "x" or "妥"


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
    built = PieceIndex.build(student_vocabulary, teacher_vocabulary, texts=())
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
    assert loaded.text is not None
    assert loaded.text.numpy().tobytes() == b"".join([*STUDENT, *TEACHER])
    assert loaded.metadata == built.metadata
    assert repr(loaded) == "PieceIndex([6, 4], events=4, not calibrated)"
    with pytest.raises(ValueError, match="pieces: built for another teacher tokenizer"):
        PieceIndex.load(path, teacher_tok=Vocabulary(STUDENT))
    with pytest.raises(FileNotFoundError, match="path: no such file"):
        PieceIndex.load(tmp_path / "none")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "pieces.safetensors"
    index().save(path)
    held, built = load_file(path), index()
    data, text = held["data"], held["text"]
    summed = {"text_sha256": hashlib.sha256(text.numpy().tobytes()).hexdigest()}
    good = {"format": "xtoken.pieces", "version": "4", **built.metadata, **summed}
    for tensors, metadata, message in (
        (held, {"format": "xtoken.projection"}, "not a piece index of xtoken"),
        ({"other": data}, good, "not a piece index of xtoken"),
        ({"data": data}, {**good, "version": "3"}, "version 3, this xtoken reads version 4; xtoken project --pieces"),
        ({"data": data}, good, "not a piece index of xtoken"),
        (held, {**good, "teacher_fingerprint": ""}, "damaged: teacher_fingerprint: expected 64 hex digits"),
        (held, {**good, "calibration": "[]"}, "damaged: calibration: not what calibration has found"),
        ({**held, "data": data[:-1]}, good, "damaged: pieces: not a piece index: expected .* numbers, got"),
        ({**held, "text": text.flip(0)}, good, "damaged: text: not the bytes of the tokens"),
    ):
        TensorFile("anything").save(path, tensors, **metadata)
        with pytest.raises(ValueError, match=message):
            PieceIndex.load(path)


def test_damaged_data() -> None:
    data, text = index().data, index().text
    assert text is not None
    for wrong in (text[1:], text.int(), text.tolist(), text.numpy()):
        with pytest.raises(ValueError, match=r"text: expected uint8 .16., as many bytes as the tokens have, got"):
            PieceIndex(data, text=wrong)
    with pytest.raises(ValueError, match="text: expected the bytes of the tokens, to save them"):
        PieceIndex(data).save("never")
    with pytest.raises(ValueError, match="not a piece index: 3 numbers"):
        PieceIndex(data[:3])
    head, body = 7, 6 * 4 + 1 + 8 + 7 + int(data[5])  # the head, and the student's part
    places = {"event": head, "length": head + 6, "order": head + 12, "ptr": head + 18, "pieces": head + 25}
    places["joined_ptr"] = head + 33
    assert data[5] > 0
    places["joined"] = head + 40
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
    damaged = data.clone()
    damaged[2] = 2**31 - 1
    with pytest.raises(ValueError, match="not a piece index: 2147483647 events of 10 tokens"):
        PieceIndex(damaged)


def spaces(pattern: str) -> Tokenizer:
    """Knows up to three spaces, "a", "b" and " b", and cuts text by a pattern before it merges."""
    runs = ["Ġ" * n for n in range(1, 4)]
    merges = [("Ġ", "b"), *((run, "Ġ") for run in runs[:-1])]
    vocab = {token: i for i, token in enumerate([*runs, "a", "b", "Ġb"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# The word has the last space, as in Llama 3, or none, as in Gemma 3.
LAST_SPACE, ALL_SPACES = r"\s+(?!\S)| ?\S+", r" +|\S+"
CODE = ["a   b", "a   b   a b", "a     b"]


def test_calibration_by_hand() -> None:
    """Three spaces and "b" are "  ", " b" to the student and "   ", "b" to the teacher."""
    student, teacher = spaces(LAST_SPACE), spaces(ALL_SPACES)
    plain = PieceIndex.build(student, teacher, texts=())
    assert repr(plain) == "PieceIndex([6, 6], events=6, not calibrated)"
    assert str(plain.merged()).startswith("not calibrated")
    built = PieceIndex.build(student, teacher, texts=iter(CODE))
    assert repr(built) == "PieceIndex([6, 6], events=4, merged=2)"
    old, new = plain.student.event.tolist(), built.student.event.tolist()
    for i, j in itertools.combinations(range(6), 2):
        assert (new[i] == new[j]) == (old[i] == old[j] or (i, j) in ((1, 2), (0, 5)))
    assert set(new) == set(range(4))
    assert built.teacher.event.tolist() == new
    for name in ("length", "ptr", "pieces"):
        assert torch.equal(getattr(built.student, name), getattr(plain.student, name))
    report = built.merged()
    # The second: the space before the only "b" with one space, which to the teacher is a token of its own.
    assert (report.texts, report.bytes, report.chunks, report.differing, report.left) == (3, 23, 10, 5, 0)
    assert report.groups == (
        MergedEvents(("  ",), ("   ",), 4, "a   b"),
        MergedEvents((" b",), (" ",), 1, "a   b   a b"),
    )
    said = "50.00 % of 10 chunks began with different events, 0.00 % do after 2 groups of events are merged"
    assert report.summary().endswith(said)
    assert "4  '  ' | '   '   as in 'a   b'" in str(report)


def test_chains_are_one_group() -> None:
    """Two spaces are confused with one, three with two ...; and one space before "b" with " b"."""
    texts = [f"a{' ' * n}b" for n in range(1, 5)] * 2
    built = PieceIndex.build(spaces(LAST_SPACE), spaces(ALL_SPACES), texts=texts)
    assert (built.events, built.merged().left, len(built.merged().groups)) == (3, 0, 1)
    assert built.student.event.tolist() == [0, 0, 0, 1, 2, 0]


def test_what_a_merger_is_worth() -> None:
    """To merge two events of 1000 chunks each costs 2000 ln 2 nats, 1386."""
    for times, merged in ((23, False), (24, True)):
        assert (_roots(Counter({(0, 1): times}), [1000.0, 1000.0], set()) == [0, 0]) == merged
    assert _roots(Counter({(0, 1): 1}), [1000.0, 1000.0], {0, 1}) == [0, 0]  # runs of white space
    # 1 and 2 meet 0 in 17 chunks each: too few for either, enough once they are one.
    met = Counter({(0, 1): 17, (0, 2): 17, (1, 2): 24, (3, 4): 1})
    assert _roots(met, [1000.0, 1000.0, 1000.0, 1e6, 1e6], set()) == [0, 0, 0, 3, 4]
    assert _roots(Counter({(0, 1): 17, (0, 2): 17}), [1000.0] * 3, set()) == [0, 1, 2]


def test_a_remedy_where_much_is_left() -> None:
    remedy = "texts=[*sample_texts(student, teacher), *own]"
    for left in (2, 3):
        said = MergeReport(1, 400, 100, 10, left).summary()
        assert f"10.00 % of 100 chunks began with different events, {left}.00 % do after 0 groups" in said
        assert (remedy in said) == (left > 2)
    groups = tuple(MergedEvents((str(k),), ("x",), 1, "") for k in range(LISTED + 5))
    assert str(MergeReport(1, 1, 1, groups=groups)).endswith("   as in ''\n          and 5 more")


def test_differing_chunks() -> None:
    tokenizers = spaces(LAST_SPACE), spaces(ALL_SPACES)
    alignment = Aligner(*tokenizers).align(*([encode(one, text) for text in CODE] for one in tokenizers))
    for texts, count in (((), 5), (CODE[2:], 1)):
        built = PieceIndex.build(*tokenizers, texts=texts)
        assert built.differing(alignment).sum() == count
        assert built.differing(alignment.slice(0, 1)).tolist() == [False, count == 5]
    with pytest.raises(ValueError, match="alignment: expected its token ids, but student_ids or teacher_ids is None"):
        built.differing(Alignment([[0, 1, 0, 1]]))


def test_a_calibrated_file(tmp_path: Path) -> None:
    tokenizers, path = (spaces(LAST_SPACE), spaces(ALL_SPACES)), tmp_path / "pieces.safetensors"
    built = PieceIndex.build(*tokenizers, texts=CODE)
    built.save(path)
    loaded = PieceIndex.load(path, *tokenizers)
    for copied in (loaded, copy.deepcopy(built)):
        assert torch.equal(copied.data, built.data)
        assert copied.merged() == built.merged() != MergeReport()


def test_tokens_without_a_root_stay_apart() -> None:
    """They share an event, not a text."""
    sides = [Vocabulary.from_tokenizer(spaces(pattern)) for pattern in (LAST_SPACE, ALL_SPACES)]
    events = np.array([0, 1, 5, 2, 3, 4])
    for rootless, count in ((5, 5), (6, 4)):
        assert calibrate(*sides, (events, events), 6, rootless, CODE)[0].max() + 1 == count


def test_texts_that_nothing_can_read() -> None:
    student, teacher = spaces(LAST_SPACE), Vocabulary(TEACHER)
    assert repr(PieceIndex.build(student, teacher)).endswith("not calibrated)")
    with pytest.raises(ValueError, match="texts: expected a teacher_tok that encodes text, got a Vocabulary of tokens"):
        PieceIndex.build(student, teacher, texts=CODE)
    with pytest.raises(TypeError, match="texts: expected several texts, got one str"):
        PieceIndex.build(student, student, texts="a b")
    with pytest.raises(TypeError, match="texts: expected strings, got bytes"):
        PieceIndex.build(student, student, texts=[b"a b"])


# Text that the sample does not have.
SOURCES = (os, shutil, Path, _pydecimal, socket, pickle)
PYTHON = "".join(Path(inspect.getsourcefile(one) or "").read_text() for one in SOURCES)


@pytest.mark.usefixtures("whole_sample")
@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(("smollm2", "mistral", 0.012), marks=needs_mistral),
        pytest.param(("llama3", "gemma3", 0.1), marks=pytest.mark.wide),
        pytest.param(("smollm2", "gemma3", 0.014), marks=pytest.mark.wide),
    ],
)
def test_the_sample_calibrates_real_pairs(pair: tuple[str, str, float], tokenizer: Callable[[str], Any]) -> None:
    """At most 0.5 % of starts differ, and what is merged tells them apart by no more than 6 % of their information."""
    *names, before = pair
    tokenizers = [tokenizer(name) for name in names]
    alignment = Aligner(*tokenizers).align(*(encode(one, PYTHON) for one in tokenizers))
    plain, built = PieceIndex.build(*tokenizers, texts=()), PieceIndex.build(*tokenizers)
    assert plain.differing(alignment).float().mean() >= before
    assert built.differing(alignment).float().mean() <= 0.005
    assert alignment.teacher_ids is not None
    first = alignment.teacher_ids.flatten()[alignment.spans[:, 2].long()]
    counts = [torch.bincount(one.teacher.event[first]).double() for one in (plain, built)]
    kept = [torch.special.entr(count / count.sum()).sum() for count in counts]
    assert kept[1] >= 0.94 * kept[0]
    assert built.merged().texts == len(sample_texts(*tokenizers))
