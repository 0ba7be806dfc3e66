"""Batches: rows, masks and chunks as the examples have them, also when several share a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from default_losses import default_loss
from hypothesis import given
from hypothesis import strategies as st
from small import SMALL_TEXTS, make_model, make_teacher, make_trainer

from xtoken import Aligner, PieceIndex, ProjectionMatrix, Vocabulary
from xtoken.losses import Needs
from xtoken.train import ExampleEncoder, XTokenCollator, pack


@pytest.fixture(scope="module")
def examples(student_tok, teacher_tok):
    encoder = ExampleEncoder(student_tok, [teacher_tok, student_tok])
    return [example for one in encoder.encode([{"text": text} for text in SMALL_TEXTS]) for example in one]


def test_a_row_an_example(examples, student_tok, teacher_tok):
    batch = XTokenCollator(student_tok, [teacher_tok, student_tok])(examples[:4])
    assert batch["teachers"][1] == {"alignment": None}
    teacher = batch["teachers"][0]
    for k, example in enumerate(examples[:4]):
        for side, ids, pad in ((batch, example["student_ids"], 2), (teacher, example["teachers"][0]["ids"], 2)):
            row = side["input_ids"][k]
            assert row[: len(ids)].tolist() == ids.tolist()
            assert (row[len(ids) :] == pad).all()
            assert side["attention_mask"][k].tolist() == [1] * len(ids) + [0] * (len(row) - len(ids))
        labels = batch["labels"][k]
        assert labels[: len(example["labels"])].tolist() == example["labels"].tolist()
        assert (labels[len(example["labels"]) :] == -100).all()
        assert teacher["alignment"].slice(k).spans.tolist() == example["teachers"][0]["spans"].tolist()
    assert "position_ids" not in batch


def test_packed_models_see_each_example_alone(examples, student_tok, teacher_tok):
    toks = [teacher_tok, student_tok]
    apart = XTokenCollator(student_tok, toks)(examples)
    packed = XTokenCollator(student_tok, toks, packed=True, max_length=150)(examples)
    assert len(packed["input_ids"]) < len(examples) / 2
    assert packed["input_ids"].shape[1] <= 150
    assert "attention_mask" not in packed
    assert "attention_mask" not in packed["teachers"][0]
    W = ProjectionMatrix.build(student_tok, teacher_tok)
    models = make_model(len(student_tok), 0), make_model(len(teacher_tok), 1)
    results = []
    for batch in (apart, packed):
        alignment = batch["teachers"][0]["alignment"]
        assert torch.equal(alignment.supervised(batch["labels"]).predicted, alignment.predicted)
        sides = (batch, batch["teachers"][0])
        inputs = [
            {name: side[name] for name in ("input_ids", "attention_mask", "position_ids") if name in side}
            for side in sides
        ]
        with torch.no_grad():
            logits = [model(**one, use_cache=False).logits for model, one in zip(models, inputs, strict=True)]
        kd = default_loss(Needs.PROJECTION)(*logits, sides[1]["alignment"], W, top_k=None, reduction="sum")
        ce = torch.nn.functional.cross_entropy(
            logits[0][:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        results.append((kd.item(), ce.item(), sides[1]["alignment"].num_chunks, int((batch["labels"] != -100).sum())))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize("size", [0, 7])
def test_a_text_begins_behind_what_is_before_it(student_tok, teacher_tok, size):
    """What a loss leaves out because of the token before a chunk, it leaves out where a completion begins, too, and
    behind the first token of a text, which nothing predicts."""
    rows = [{"prompt": text[:size], "completion": text[size:19]} for text in SMALL_TEXTS[:8]]
    examples = [one for (one,) in ExampleEncoder(student_tok, [teacher_tok], train_on="completion").encode(rows)]
    batch = XTokenCollator(student_tok, [teacher_tok])(examples)
    entry = batch["teachers"][0]
    masks = batch["attention_mask"], entry["attention_mask"]
    whole = Aligner(student_tok, teacher_tok).align(batch["input_ids"], entry["input_ids"], *masks)
    torch.manual_seed(0)
    logits = [
        torch.randn(*side["input_ids"].shape, len(tok)) for side, tok in ((batch, student_tok), (entry, teacher_tok))
    ]
    alignments = entry["alignment"], whole.supervised(batch["labels"])
    pieces = PieceIndex.build(student_tok, teacher_tok)
    got, want = (default_loss(Needs.PIECES)(*logits, one, pieces, reduction="sum") for one in alignments)
    assert float(got) == pytest.approx(float(want))
    assert alignments[0].predicted.sum() == alignments[1].predicted.sum()


def test_packing_does_not_change_a_step(examples, student_tok, teacher_tok, tmp_path):
    logged = []
    for options in ({}, {"packed": True, "max_length": 150}):
        teachers = [make_teacher(student_tok, teacher_tok), make_teacher(student_tok, None, name="direct")]
        trainer = make_trainer(
            tmp_path, student_tok, teachers, examples[:8], max_steps=1, per_device_train_batch_size=8
        )
        trainer.data_collator = XTokenCollator(student_tok, [teacher_tok, student_tok], **options)
        trainer.train()
        logged += [(one["ce"], one["kd"]) for one in trainer.state.log_history if "ce" in one]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_no_label_or_chunk_at_the_first_token(examples, student_tok, teacher_tok):
    one = {
        "student_ids": [5, 6, 7],
        "labels": [5, 6, 7],
        "teachers": [{"ids": [8, 9], "spans": [[1, 2, 0, 1], [2, 3, 1, 2]]}],
    }
    batch = XTokenCollator(student_tok, [teacher_tok], packed=True, max_length=8)([one, one])
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    alignment = batch["teachers"][0]["alignment"]
    assert alignment.spans[alignment.predicted].tolist() == [[2, 3, 1, 2], [5, 6, 3, 4]]
    wider = XTokenCollator(student_tok, [teacher_tok], packed=True, max_length=4)(
        [one, {**one, "student_ids": [5] * 5, "labels": [5] * 5}]
    )
    assert wider["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]  # padding begins anew as well


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), most=st.integers(10, 80))
def test_pack(lengths, most):
    rows = pack([{"student_ids": np.zeros(n)} for n in lengths], most)
    assert sorted(k for row in rows for k in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[k] for k in row) <= most
    assert pack([{"student_ids": np.zeros(n)} for n in lengths], most) == rows
    sizes = sorted(sum(lengths[k] for k in row) for row in rows)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > min(most, sizes[1] + 1)  # no two rows that are small fit together


def test_bad_input(examples, student_tok, teacher_tok):
    with pytest.raises(ValueError, match="max_length: expected the most tokens of a packed row"):
        XTokenCollator(student_tok, packed=True)
    with pytest.raises(ValueError, match=r"teacher_toks\[0\]: expected a pad or an end token to fill rows with"):
        XTokenCollator(student_tok, [Vocabulary([b"a"])])
    with pytest.raises(ValueError, match="examples: expected at least one"):
        XTokenCollator(student_tok)([])
    with pytest.raises(ValueError, match=r"examples: expected 1 teachers each, got \[2\]"):
        XTokenCollator(student_tok, [teacher_tok])(examples[:1])
    direct = {**examples[0], "teachers": [{"ids": None, "spans": None}, {"ids": None, "spans": None}]}
    with pytest.raises(ValueError, match="examples: expected ids of teacher 0 in all or in none"):
        XTokenCollator(student_tok, [teacher_tok, student_tok])([examples[0], direct])
