"""The projection matrix: rules, files, errors."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from default_losses import default_loss
from hypothesis import given
from hypothesis import strategies as st
from real_tokenizers import invalid_utf8_ids

import xtoken
from xtoken import ProjectionMatrix, Vocabulary, coverage_audit
from xtoken.losses import Needs
from xtoken.projection import ROW_KINDS, common_pairs
from xtoken.storage import TensorFile


def rows(matrix: ProjectionMatrix) -> list[dict[int, Any]]:
    out = []
    for s in range(matrix.shape[0]):
        ids, weights = matrix.row(s)
        out.append({int(i): pytest.approx(float(w), abs=2e-7) for i, w in zip(ids, weights, strict=True)})
    return out


def kinds(matrix: ProjectionMatrix) -> list[str]:
    return [ROW_KINDS[k] for k in matrix.kind.tolist()]


TEACHER = Vocabulary([b"0", b"1", b"2", b"3", b"4", b"<eos>", b" a"], roles={"eos": 5})


def test_weights_of_pieces():
    student = Vocabulary([b"201", b"2222", b"01234", b"1", b"x", b"</s>", b"<tool>"],
                         kinds=["normal"] * 5 + ["special"] * 2, roles={"eos": 5})  # fmt: skip
    W = ProjectionMatrix.build(student, TEACHER)
    assert kinds(W) == ["pieces", "pieces", "pieces", "exact", "none", "role", "none"]
    total = 0.9 + 0.09 + 0.009 + 0.0009
    assert rows(W) == [
        {2: 0.9 / 0.999, 0: 0.09 / 0.999, 1: 0.009 / 0.999},
        {2: 1.0},
        {0: 0.9 / total, 1: 0.09 / total, 2: 0.009 / total, 3: 0.0009 / total},
        {1: 1.0},
        {},
        {5: 1.0},
        {},
    ]
    assert round(float(W.row(0)[1][2]), 4) == 0.9009
    assert rows(ProjectionMatrix.build(student, TEACHER, top_k=1))[2] == {0: 1.0}
    assert rows(ProjectionMatrix.build(student, TEACHER, gamma=0.0))[0] == {2: 1.0}
    assert rows(ProjectionMatrix.build(student, TEACHER, gamma=0.5, top_k=2))[2] == {0: 2 / 3, 1: 1 / 3}


def brute_force(pieces: list[int], beta: float, gamma: float, top_k: int) -> dict[int, float]:
    """The rule of pass 2, as it is written down."""
    raw: dict[int, float] = {}
    for i, piece in enumerate(pieces):
        raw[piece] = raw.get(piece, 0.0) + beta * gamma**i
    kept = sorted(raw.items(), key=lambda item: -item[1])[:top_k]  # sorted is stable: the earlier position first
    total = sum(weight for _, weight in kept)
    return {piece: weight / total for piece, weight in kept}


@given(
    st.lists(st.sampled_from("01234"), min_size=2, max_size=9),
    st.sampled_from([0.1, 0.5, 0.99]),
    st.integers(1, 5),
)
def test_pass_two_equals_the_rule(pieces, gamma, top_k):
    student = Vocabulary(["".join(pieces).encode()])
    W = ProjectionMatrix.build(student, TEACHER, top_k=top_k, gamma=gamma)
    assert rows(W)[0] == {
        k: pytest.approx(v, rel=1e-5) for k, v in brute_force(list(map(int, pieces)), 0.9, gamma, top_k).items()
    }


def test_which_id_is_preferred():
    teacher = Vocabulary([b"b", b"a", b"a", b"a", b"c"], kinds=["normal", "byte", "normal", "normal", "byte"])
    W = ProjectionMatrix.build(Vocabulary([b"a", b"x", b"c", b"a"]), teacher)
    assert [list(row) for row in rows(W)] == [
        [2],
        [],
        [4],
        [3],
    ]  # normal before byte, the lowest; the same id first


def test_roles_and_literals():
    student = Vocabulary(
        [b"<a>", b"<b>", b"<c>", b"<t>"],
        roles={"eos": 0, "bos": 0, "pad": 1, "end_of_turn": 2},
        kinds=["special"] * 4,
    )
    teacher = Vocabulary([b"<t>", b"<y>", b"<z>"], roles={"bos": 1, "eos": 2, "pad": 2}, kinds=["special"] * 3)
    W = ProjectionMatrix.build(student, teacher)
    assert rows(W) == [{2: 1.0}, {2: 1.0}, {}, {0: 1.0}]  # eos before bos; <t> by its literal
    text = Vocabulary([b"<t>"])  # ordinary text does not equal a special token
    assert kinds(ProjectionMatrix.build(text, teacher)) == ["none"]


def test_reverse_reaches_the_unreached():
    student = Vocabulary([b"a", b"b", b"c"])
    teacher = Vocabulary([b"a", b"b", b"ba", b"zz"])
    assert rows(ProjectionMatrix.build(student, teacher)) == [{0: 1.0}, {1: 1.0}, {}]
    W = ProjectionMatrix.build(student, teacher, reverse=True)
    assert rows(W) == [{0: 1 / 1.09, 2: 0.09 / 1.09}, {1: 1 / 1.9, 2: 0.9 / 1.9}, {}]
    assert W.metadata["passes"] == "exact, pieces, reverse"
    cut = ProjectionMatrix.build(student, teacher, reverse=True, top_k=1)
    assert rows(cut) == [{0: 1.0}, {1: 1.0}, {}]


def test_fold_space_punctuation():
    student, teacher = Vocabulary([b" ,", b" .", b" a"]), Vocabulary([b",", b".", b" ."])
    assert rows(ProjectionMatrix.build(student, teacher, fold_space_punctuation=True)) == [
        {0: 1.0},
        {2: 1.0},
        {},
    ]
    assert kinds(ProjectionMatrix.build(student, teacher, fold_space_punctuation=True))[0] == "exact"


REAL_PAIRS = ["llama3-qwen3", "llama3-o200k", "llama3-smollm2", "smollm2-llama3", "llama3-mistral", "mistral-tekken"]
WITHOUT_BYTES = ["llama3-wordpiece", "qwen3-unigram"]


def test_a_row_that_does_not_spell_its_token_is_marked():
    """The teacher has no "x": what is left of "axb" does not spell it."""
    student, teacher = Vocabulary([b"ab", b"axb", b"x"]), Vocabulary([b"a", b"b"])
    W = ProjectionMatrix.build(student, teacher)
    assert kinds(W) == ["pieces", "partial", "none"]
    assert "pieces=1, partial=1, none=1" in repr(W)
    report = coverage_audit(student, teacher, W)
    assert report.reasons[-1] == "1 of 3 tokens are projected onto teacher tokens that do not spell them"


def test_a_row_of_a_token_that_the_student_does_not_spell_is_marked():
    """The student has no "x": what is left of "axc" does not spell it."""
    student, teacher = Vocabulary([b"a", b"b", b"c"]), Vocabulary([b"a", b"b", b"axc", b"bb"])
    W = ProjectionMatrix.build(student, teacher, reverse=True)
    assert [list(row) for row in rows(W)] == [[0, 2], [1, 3], [2]]
    assert kinds(W) == ["partial", "exact", "partial"]
    assert kinds(ProjectionMatrix.build(student, teacher, reverse=True, top_k=1)) == ["exact", "exact", "partial"]
    assert kinds(ProjectionMatrix.build(student, teacher)) == ["exact", "exact", "none"]


@pytest.mark.parametrize("names", REAL_PAIRS + WITHOUT_BYTES)
def test_real_pairs(names, vocabulary):
    student, teacher = map(vocabulary, names.split("-"))
    W = ProjectionMatrix.build(student, teacher)
    assert W.shape == (len(student), len(teacher))
    sums = torch.zeros(W.shape[0], dtype=torch.float64).index_add(0, W.row_index, W.weight.double())
    filled = W.row_ptr.diff() > 0
    assert torch.allclose(sums[filled], torch.ones_like(sums[filled]), atol=1e-6)
    assert int(W.row_ptr.diff().max()) <= 4
    exact = (W.kind == ROW_KINDS.index("exact")).nonzero()[:, 0].tolist()
    for s in exact[:: max(1, len(exact) // 2000)]:
        assert student[s] == teacher[int(W.row(s)[0][0])]
    if names in WITHOUT_BYTES:  # nothing to fall back on
        assert not bool(filled[torch.from_numpy(student.is_text)].all())
    else:
        missing = (~filled & torch.from_numpy(student.is_text)).nonzero()[:, 0].tolist()
        single = {token for token in (teacher[i] for i in range(len(teacher))) if len(token) == 1}
        for s in missing:  # SmolLM2's vocabulary lacks some bytes
            assert not {bytes([b]) for b in student[s]} <= single
        assert len(missing) < 300
        assert not missing or names.endswith("smollm2")


def test_one_token_of_a_text_has_the_exact_row():
    """The one that the tokenizer writes, and that with the bytes themselves; pairs are of it, whatever the ids."""
    student = Vocabulary([b"e", b"22", b" ,", b"e", b",", b"2", b"e"],
                         kinds=["byte", "normal", "normal", "normal", "normal", "normal", "normal"])  # fmt: skip
    W = ProjectionMatrix.build(student, Vocabulary([b",", b"2", b"e"]), fold_space_punctuation=True)
    assert kinds(W) == ["pieces", "pieces", "pieces", "exact", "exact", "exact", "pieces"]
    assert rows(W) == [{2: 1.0}, {1: 1.0}, {0: 1.0}, {2: 1.0}, {0: 1.0}, {1: 1.0}, {2: 1.0}]
    for one in (W, W.learnable()):
        assert [ids.tolist() for ids in common_pairs(one, 1.0)] == [[3, 4, 5], [2, 0, 1]]


def test_a_file_that_does_not_tell_which_token_is_written(tmp_path, recwarn):
    """As earlier versions made them: loaded, with a warning."""
    student = Vocabulary([b"e", b"x", b"e"], kinds=["byte", "normal", "normal"])
    W = ProjectionMatrix.build(student, Vocabulary([b"e", b"x"]))
    W.save(tmp_path / "w.safetensors")
    ProjectionMatrix.load(tmp_path / "w.safetensors")
    assert not recwarn
    W.kind[0] = ROW_KINDS.index("exact")
    W.save(tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match="earlier version: 1 of its exact rows .* build it anew"):
        assert torch.equal(ProjectionMatrix.load(tmp_path / "w.safetensors").kind, W.kind)


@pytest.mark.parametrize("names", ["mistral-llama3", "smollm2-wordpiece", "llama3-qwen3"])
def test_pairs_are_of_the_tokens_that_are_written(names, vocabulary):
    """Not of a byte token of the same text, nor of one that the teacher's normalizer makes that text."""
    student, teacher = map(vocabulary, names.split("-"))
    pairs = dict(
        zip(*(ids.tolist() for ids in common_pairs(ProjectionMatrix.build(student, teacher), 1.0)), strict=True)
    )
    known = {teacher[i] for i in range(len(teacher)) if teacher.is_text[i]}
    written = set(
        student.tokenizer.encode("a 7 e. In 1995 a reader paid 1 024, x y z = b", add_special_tokens=False).ids
    )
    shared = [token for token in written if student[token] in known]
    assert len(shared) > 10
    assert [teacher[pairs[token]] if token in pairs else None for token in shared] == [student[k] for k in shared]


def test_partial_utf8_goes_through_bytes(vocabulary):
    llama3, smollm2, mistral = map(vocabulary, ("llama3", "smollm2", "mistral"))
    invalid = invalid_utf8_ids(llama3)
    for teacher in (smollm2, mistral):
        W = ProjectionMatrix.build(llama3, teacher, top_k=50)
        replacement = {i for i in range(len(teacher)) if "�".encode() in teacher[i]}
        for s in invalid[::10]:
            ids, weights = W.row(s)
            assert not replacement & set(ids.tolist())
            ordered = [i for _, i in sorted(zip((-weights).tolist(), ids.tolist(), strict=True))]
            assert all(teacher[i] in llama3[s] for i in ordered)


def test_llama3_to_qwen3_is_quick_and_small(tokenizer, tmp_path):
    code = (
        "import re, sys, time; from tokenizers import Tokenizer; from xtoken import ProjectionMatrix\n"
        "student, teacher = map(Tokenizer.from_file, sys.argv[1:])\n"
        "started = time.process_time(); W = ProjectionMatrix.build(student, teacher)\n"
        "seconds = time.process_time() - started\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
        "print(seconds, peak, W.nnz)"
    )
    paths = [str(tmp_path / name) for name in ("llama3", "qwen3")]
    for name, path in zip(("llama3", "qwen3"), paths, strict=True):
        tokenizer(name).save(path)
    output = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True).stdout
    seconds, kilobytes, nnz = map(float, output.split())
    assert seconds < 10  # of all processors, which other processes do not change; the margin is for slow ones
    assert kilobytes < 1e6  # of the whole process, torch and both tokenizers included
    assert nnz > 150_000


def test_save_and_load(tmp_path):
    student = Vocabulary([b"201", b"1", b"</s>"], roles={"eos": 2})
    W = ProjectionMatrix.build(student, TEACHER)
    path = tmp_path / "w.safetensors"
    W.save(path)
    assert os.listdir(tmp_path) == ["w.safetensors"]
    loaded = ProjectionMatrix.load(path, student, TEACHER)
    for name in ("row_ptr", "col", "weight", "kind"):
        assert torch.equal(getattr(loaded, name), getattr(W, name))
    assert loaded.metadata == W.metadata
    assert loaded.shape == W.shape
    assert loaded.metadata["student_fingerprint"] == student.fingerprint()
    W.save_pretrained(tmp_path / "folder")
    assert ProjectionMatrix.from_pretrained(tmp_path / "folder").nnz == W.nnz


def test_file_format_is_frozen(tmp_path):
    W = ProjectionMatrix.from_topk([[0, -1], [1, 0]], [[1.0, 0.0], [0.75, 0.25]], 2)
    path = tmp_path / "w.safetensors"
    W.save(path)
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    values = {"row_ptr": np.array([0, 1, 3], "<i8"), "col": np.array([0, 0, 1], "<i4"),
              "weight": np.array([1, 0.25, 0.75], "<f4"), "kind": np.array([4, 4], "u1")}  # fmt: skip
    places = json.loads(data[8 : 8 + header])
    metadata = places.pop("__metadata__")
    said = {"format": "xtoken.projection", "student_vocab_size": "2", "teacher_vocab_size": "2", "version": "2"}
    types = {"row_ptr": ["I64", [3]], "col": ["I32", [3]], "weight": ["F32", [3]], "kind": ["U8", [2]]}
    digest = hashlib.sha256(json.dumps([sorted(said.items()), sorted(types.items())]).encode())
    for name in sorted(values):
        digest.update(values[name].tobytes())
    assert metadata == {**said, "checksum": digest.hexdigest()}
    assert places.keys() == values.keys()
    for name, place in places.items():
        first, last = place["data_offsets"]
        assert data[8 + header + first : 8 + header + last] == values[name].tobytes(), name


def damaged(tmp_path, **changes):
    """A file with one field of a good one changed."""
    W = ProjectionMatrix.from_topk([[0, 1], [1, -1]], [[0.5, 0.5], [1.0, 0.0]], 2)
    tensors = {"row_ptr": W.row_ptr, "col": W.col, "weight": W.weight, "kind": W.kind}
    metadata = {
        "format": "xtoken.projection",
        "version": "2",
        "student_vocab_size": "2",
        "teacher_vocab_size": "2",
    }
    for name, value in changes.items():
        target = tensors if name in tensors or isinstance(value, torch.Tensor) else metadata
        if value is None:
            del target[name]
        else:
            target[name] = value
    path = tmp_path / "w.safetensors"
    TensorFile("anything").save(path, tensors, **metadata)  # with the checksum of what it is now
    return path


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "other"}, "not a projection matrix of xtoken"),
        ({"format": None}, "not a projection matrix of xtoken"),
        ({"version": "1"}, "format version 1, this xtoken reads version 2; xtoken project .* makes it again"),
        ({"teacher_vocab_size": None}, "damaged: 'teacher_vocab_size'"),
        ({"teacher_vocab_size": "x"}, "damaged"),
        ({"teacher_vocab_size": "1"}, r"damaged: col: expected teacher ids in \[0, 1\)"),
        ({"student_vocab_size": "3"}, "damaged: row_ptr has 2 rows, the metadata says 3"),
        ({"extra": torch.zeros(1)}, "expected the tensors"),
        ({"weight": torch.zeros(3, dtype=torch.float64)}, "expected the tensors"),
        ({"weight": torch.zeros(2)}, "damaged: weight: expected one weight an entry"),
        ({"weight": torch.tensor([float("nan"), 1, 1])}, "damaged: weight: expected finite"),
        ({"weight": torch.tensor([-0.5, 1, 1])}, "damaged: weight: expected finite"),
        ({"row_ptr": torch.tensor([0, 2, 1])}, "damaged: row_ptr"),
        ({"row_ptr": torch.tensor([0, 3, 2])}, "damaged: row_ptr"),
        (
            {"col": torch.tensor([1, 0, 1], dtype=torch.int32)},
            "damaged: col: expected strictly increasing ids within row 0",
        ),
        ({"col": torch.tensor([-1, 0, 1], dtype=torch.int32)}, "damaged: col: expected teacher ids"),
        ({"kind": torch.tensor([9, 0], dtype=torch.uint8)}, "damaged: kind"),
        ({"kind": torch.tensor([0], dtype=torch.uint8)}, "damaged: kind"),
        ({"teacher_vocab_size": str(2**40)}, "damaged: teacher_vocab_size"),
        ({"kind": torch.tensor([3, 0], dtype=torch.uint8)}, "row 1 is of kind 'none', but has 1 entries that sum to 1"),
        ({"kind": torch.tensor([1, 4], dtype=torch.uint8)}, "row 0 is of kind 'exact', but has 2 entries"),
        ({"kind": torch.tensor([3, 1], dtype=torch.uint8)}, "student_fingerprint: expected 64 hex digits, got None"),
        (
            {"kind": torch.tensor([3, 4], dtype=torch.uint8), "weight": torch.tensor([0.5, 0.4, 1.0])},
            "row 0 is of kind 'pieces', but has 2 entries that sum to 0.9",
        ),
    ],
)
def test_damaged_files(changes, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        ProjectionMatrix.load(damaged(tmp_path, **changes))


def test_undamaged_file_loads(tmp_path):
    assert ProjectionMatrix.load(damaged(tmp_path)).nnz == 3


@pytest.mark.parametrize("reverse", [False, True])
def test_a_narrower_model_leaves_the_kinds_of_rows(reverse, tmp_path):
    """Rows that lose nothing are those of a W built for the narrower vocabulary."""
    narrow = [b"1", b"2", b"x", b"<s>"]
    kinds_of = ["normal"] * 3 + ["special"]
    teacher = Vocabulary(narrow, kinds=kinds_of)
    wide = Vocabulary([*narrow, b"x1", b"<t>"], kinds=[*kinds_of, "normal", "special"])
    student = Vocabulary([b"<s>", b"<t>", b"12", b"1", b"y", b"x1", b"x"], kinds=["special"] * 2 + ["normal"] * 5)
    W, want = (ProjectionMatrix.build(student, one, reverse=reverse) for one in (wide, teacher))
    got = W.within(None, len(teacher))
    assert kinds(W) == ["role", "role", "pieces", "exact", "none", "exact", "exact"]
    assert [k for k in range(7) if (rows(got)[k], kinds(got)[k]) != (rows(want)[k], kinds(want)[k])] == [5]
    assert (rows(got)[5], kinds(got)[5]) == ({}, "none")
    got.save(tmp_path / "w.safetensors")
    assert kinds(ProjectionMatrix.load(tmp_path / "w.safetensors")) == kinds(got)
    reached = ProjectionMatrix.build(Vocabulary([b"x", b"1"]), wide, reverse=True)
    assert (kinds(reached), kinds(reached.within(None, 4))) == (["exact", "exact"], ["given", "given"])
    assert kinds(reached.within(1, None)) == ["exact", "none"]


def test_other_load_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        ProjectionMatrix.load(tmp_path / "none")
    student = Vocabulary([b"1"])
    ProjectionMatrix.build(student, TEACHER).save(tmp_path / "w")
    with pytest.raises(ValueError, match="built for another student tokenizer"):
        ProjectionMatrix.load(tmp_path / "w", student_tok=Vocabulary([b"2"]))
    with pytest.raises(ValueError, match="built for another teacher tokenizer"):
        ProjectionMatrix.load(tmp_path / "w", teacher_tok=Vocabulary([b"2"]))


def test_from_topk():
    W = ProjectionMatrix.from_topk([[3, -1, 1], [-1, -1, -1], [0, 2, 1]], [[0.25, 9, 0.75], [0, 0, 0], [1, 0, 0]], 4)
    assert rows(W) == [{1: 0.75, 3: 0.25}, {}, {0: 1.0}]
    assert W.shape == (3, 4)
    assert W.to("cpu").nnz == 3


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: ProjectionMatrix.from_topk([[0]], [[1.0, 2.0]], 1),
            r"weights: expected the shape \[V_student, k\]",
        ),
        (
            lambda: ProjectionMatrix.from_topk([[4]], [[1.0]], 4),
            r"col: expected teacher ids in \[0, 4\), got 4",
        ),
        (lambda: ProjectionMatrix.from_topk([[-2]], [[1.0]], 4), "col: expected teacher ids"),
        (
            lambda: ProjectionMatrix.from_topk([[1, 1]], [[0.5, 0.5]], 4),
            "strictly increasing ids within row 0",
        ),
        (lambda: ProjectionMatrix.from_topk([[1]], [[float("inf")]], 4), "weight: expected finite"),
        (lambda: ProjectionMatrix([], [], [], 1), "row_ptr: expected shape"),
        (lambda: ProjectionMatrix([0], [], [], 1).row(0), r"student_id: expected an id in \[0, 0\)"),
        (lambda: ProjectionMatrix.build(TEACHER, TEACHER, beta=0), "beta: expected 0 < beta <= 1, got 0"),
        (lambda: ProjectionMatrix.build(TEACHER, TEACHER, gamma=1), "gamma: expected 0 <= gamma < 1, got 1"),
        (lambda: ProjectionMatrix.build(TEACHER, TEACHER, top_k=0), "top_k: expected at least 1, got 0"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_nemo_files(tmp_path):
    W = ProjectionMatrix.build(Vocabulary([b"201", b"1", b"x"]), TEACHER)
    W.to_nemo(tmp_path / "w.pt")
    table = torch.load(tmp_path / "w.pt", weights_only=True)
    assert table["indices"].tolist() == [[2, 0, 1], [1, -1, -1], [-1, -1, -1]]
    again = ProjectionMatrix.from_nemo(tmp_path / "w.pt", W.shape[1])
    assert rows(again) == rows(W)
    torch.save([1], tmp_path / "other.pt")
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "link.pt").symlink_to(tmp_path / "target")
    W.to_nemo(tmp_path / "link.pt")
    assert (tmp_path / "target").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="expected a dict with 'indices' and 'likelihoods'"):
        ProjectionMatrix.from_nemo(tmp_path / "other.pt", 3)


def test_nemo_tells_exact_matches_by_the_second_column(tmp_path):
    """Its rule, build_exact_token_map: the largest weight is 1 and the second index is -1."""
    W = ProjectionMatrix.from_topk([[1], [0], [-1]], [[1.0], [0.6], [0.0]], 2)
    W.to_nemo(tmp_path / "w.pt")
    table = torch.load(tmp_path / "w.pt", weights_only=True)
    is_exact = (table["likelihoods"].max(1).values == 1.0) & (table["indices"][:, 1] == -1)
    assert is_exact.tolist() == [True, False, False]


def test_nemo_files_as_its_tools_write_them(tmp_path):
    """minimal_projection_via_multitoken: bfloat16, columns of weight 0, names; and pairs of ids to weight."""
    table = {"indices": torch.tensor([[3, 0, 1], [2, 1, 0]]), "likelihoods": torch.tensor([[0.9, 0.1, 0.0]] * 2)}
    table["likelihoods"] = table["likelihoods"].bfloat16()
    names = {"student_model_id": "s", "teacher_model_id": "t", "enable_scale_trick": False}
    torch.save({**table, **names}, tmp_path / "w.pt")
    W = ProjectionMatrix.from_nemo(tmp_path / "w.pt", 4, 3)
    assert W.shape == (3, 4)
    weights = {name: float(torch.tensor(weight).bfloat16()) for name, weight in (("most", 0.9), ("least", 0.1))}
    assert rows(W) == [{0: weights["least"], 3: weights["most"]}, {1: weights["least"], 2: weights["most"]}, {}]
    torch.save({(2, 1): 0.25, (0, 3): 1.0, (2, 0): 0.75, (1, 1): 0.0}, tmp_path / "pairs.pt")
    W = ProjectionMatrix.from_nemo(tmp_path / "pairs.pt", 4, 4)
    assert rows(W) == [{3: 1.0}, {}, {0: 0.75, 1: 0.25}, {}]
    with pytest.raises(ValueError, match=r"pairs\.pt: student_vocab_size: expected a size for a file of pairs"):
        ProjectionMatrix.from_nemo(tmp_path / "pairs.pt", 4)
    for size in (1, 2):
        with pytest.raises(ValueError, match=r"student_vocab_size: expected at least [23], got"):
            ProjectionMatrix.from_nemo(tmp_path / ("w.pt" if size == 1 else "pairs.pt"), 4, size)
    torch.save({(0, 4): 1.0}, tmp_path / "pairs.pt")
    with pytest.raises(ValueError, match=r"pairs\.pt: col: expected teacher ids in \[0, 4\)"):
        ProjectionMatrix.from_nemo(tmp_path / "pairs.pt", 4, 4)
    torch.save({(0, -1): 1.0}, tmp_path / "pairs.pt")
    with pytest.raises(ValueError, match="or of \\(student id, teacher id\\) to weight"):
        ProjectionMatrix.from_nemo(tmp_path / "pairs.pt", 4, 4)


def test_empty_vocabularies():
    assert ProjectionMatrix.build(Vocabulary([]), TEACHER).shape == (0, 7)
    assert kinds(ProjectionMatrix.build(TEACHER, Vocabulary([]))) == ["none"] * 7


def test_learnable_rows_keep_their_sum_and_get_a_gradient() -> None:
    W = ProjectionMatrix.from_topk([[0, 2], [1, -1], [-1, -1]], [[3.0, 1.0], [0.5, 0.0], [0.0, 0.0]], 3)
    module = W.learnable()
    assert module.weight.tolist() == pytest.approx([0.75, 0.25, 1.0])
    with torch.no_grad():
        module.logits += torch.tensor([64.0, 64.0, -64.0])
    assert module.weight.tolist() == pytest.approx([0.75, 0.25, 1.0], abs=1e-4)
    student = torch.tensor([[[0.1, -0.3, 0.2]] * 3])
    teacher = torch.tensor([[[0.5, 0.2, -0.4]] * 3])
    same = xtoken.Alignment([[1, 2, 1, 2], [2, 3, 2, 3]], [0, 2])
    for reduction in ("mean", "none"):
        module.logits.grad = None
        default_loss(Needs.PROJECTION)(student, teacher, same, module, reduction=reduction).sum().backward()
        grad = module.logits.grad
        assert grad is not None
        assert abs(float(grad[0])) > 1e-3
        assert float(grad[0] + grad[1]) == pytest.approx(0.0, abs=1e-6)
    kept = module.projection()
    assert kept.shape == W.shape
    assert torch.equal(kept.kind, W.kind)
    assert torch.equal(kept.weight, module.weight.detach())


def test_learnable_refuses_weights_of_zero() -> None:
    with pytest.raises(ValueError, match=r"projection: expected weights above 0, got 0 in row 1"):
        ProjectionMatrix([0, 1, 2], [0, 1], [1.0, 0.0], 2).learnable()
