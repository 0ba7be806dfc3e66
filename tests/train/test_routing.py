"""Rows that go to some of the teachers: the same as computing each teacher on its own rows, and nothing more is run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from comparer import assert_close
from default_losses import default_loss
from small import SMALL_TEXTS, cut, make_config, make_model, make_teacher, two_teachers
from transformers import TrainerCallback

from xtoken import cache_teacher
from xtoken.losses import Needs
from xtoken.train import (
    CachedExamples,
    EncodedDataset,
    ExampleEncoder,
    XTokenCollator,
    XTokenConfig,
    XTokenTrainer,
    load_examples,
)
from xtoken.train.cached import teacher_documents
from xtoken.train.data import EncodedStream

COLUMN = "goes_to"
NAMES = ["teacher", "twin"]
ROUTES: list[Any] = ["teacher", "teacher", ["teacher", "twin"], [], "twin", "twin", None, "teacher"]
"""The first micro-batches of two rows are without the twin, the third without the other; one row has none."""
GOES = np.array([[1, 1, 1, 0, 0, 0, 1, 1], [0, 0, 1, 0, 1, 1, 1, 0]], bool)
ROWS = [{"text": text, COLUMN: route} for text, route in zip(SMALL_TEXTS, ROUTES, strict=False)]


def make_encoder(student_tok: Any, teacher_tok: Any, **options: Any) -> ExampleEncoder:
    return ExampleEncoder(
        student_tok, [teacher_tok, student_tok], teacher_column=COLUMN, teacher_names=NAMES, **options
    )


def make_routed(
    folder: Any, student_tok: Any, teacher_tok: Any, rows: Any = None, held_out: Any = None, **options: Any
):
    return XTokenTrainer(
        make_model(len(student_tok), 0),
        make_config(folder, teacher_column=COLUMN, train_sampling_strategy="sequential", **options),
        two_teachers(student_tok, teacher_tok), None, rows, held_out, student_tok,
    )  # fmt: skip


def sums_by_hand(
    trainer: Any, student_tok: Any, teacher_tok: Any, rows: Any = range(8)
) -> tuple[list[torch.Tensor], list[int]]:
    """Of each teacher the sum of its loss over its rows alone, one row after the other, and how many chunks they have.

    The rows are encoded without any routing.
    """
    encoder = ExampleEncoder(student_tok, [teacher_tok, student_tok])
    collator = XTokenCollator(student_tok, [teacher_tok, student_tok])
    sums, counts = [torch.zeros(())] * 2, [0, 0]
    losses = default_loss(Needs.PROJECTION), default_loss(Needs.SAME_TOKENIZER)
    for k in rows:
        batch = collator(*encoder.encode([ROWS[k]]))
        logits = trainer.model(batch["input_ids"]).logits
        for m, teacher in enumerate(trainer.teachers):
            if not GOES[m, k]:
                continue
            entry = batch["teachers"][m]
            theirs = teacher.model(input_ids=entry.get("input_ids", batch["input_ids"])).logits
            options: dict[str, Any] = {"top_k": None, "reduction": "sum"}
            if m == 0:
                wanted = entry["alignment"].supervised(batch["labels"])
                counts[m] += int(wanted.predicted.sum())
                sums[m] = sums[m] + losses[m](logits, theirs, wanted, teacher.objective.projection, **options)
            else:
                mask = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
                counts[m] += int(mask.sum())
                sums[m] = sums[m] + losses[m](logits, theirs, mask=mask, **options)
    return sums, counts


class Runs:
    """How many rows a teacher was run for, call by call."""

    def __init__(self, trainer: Any) -> None:
        self.rows: dict[str, list[int]] = {one.name: [] for one in trainer.teachers}
        for one in trainer.teachers:
            one.model.register_forward_pre_hook(self._note(self.rows[one.name]), with_kwargs=True)

    @staticmethod
    def _note(rows: list[int]) -> Any:
        return lambda module, args, kwargs: rows.append(len(kwargs["input_ids"]))


@pytest.mark.parametrize("packed", [False, True])
def test_each_teacher_has_its_rows(tmp_path, student_tok, teacher_tok, packed):
    trainer = make_routed(tmp_path, student_tok, teacher_tok, None, ROWS, per_device_eval_batch_size=4)
    trainer.data_collator.packed, trainer.data_collator.max_length = packed, 128
    runs = Runs(trainer)
    got = trainer.evaluate()
    with torch.no_grad():
        sums, counts = sums_by_hand(trainer, student_tok, teacher_tok)
    for name, total, count in zip(NAMES, sums, counts, strict=True):
        assert got[f"eval_chunks/{name}"] == count
        assert got[f"eval_kd/{name}"] == pytest.approx(float(total) / count, rel=1e-5)
    if not packed:
        first, second = (GOES[:, half].sum(1).tolist() for half in (slice(0, 4), slice(4, 8)))
        assert runs.rows["teacher"][:2] == [first[0], second[0]] == [3, 2]
        assert runs.rows["twin"][:2] == [first[1], second[1]] == [1, 3]


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = {name: one.grad.clone() for name, one in kwargs["model"].named_parameters()}


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (1, 8)])
def test_gradients_are_those_of_the_parts(tmp_path, student_tok, teacher_tok, sizes):
    """However the step is cut, a teacher without a row of a micro-batch is not run, and divisors are the step's."""
    options = {"scaling": "fixed", "ce_weight": 0.0, "max_steps": 1, **cut(*sizes)}
    trainer = make_routed(tmp_path, student_tok, teacher_tok, ROWS, **options)
    sums, counts = sums_by_hand(trainer, student_tok, teacher_tok)
    total = sum(part / count for part, count in zip(sums, counts, strict=True))
    want = torch.autograd.grad(total, list(trainer.model.parameters()))
    kept, runs = Gradients(), Runs(trainer)
    trainer.add_callback(kept)
    trainer.train()
    for (name, _), value in zip(trainer.model.named_parameters(), want, strict=True):
        assert_close(kept.found[name], value, rtol=1e-4, atol=2e-6 * float(value.abs().max()) + 1e-9, what=name)
    if sizes == (1, 8):
        assert runs.rows == {"teacher": [1] * 5, "twin": [1] * 4}


def test_the_dynamic_factor_waits_for_a_teacher(tmp_path, student_tok, teacher_tok):
    """A micro-batch in which no teacher has a row gives no factor; that of the step is its ratio of CE and KD."""
    rows = [{**row, COLUMN: []} for row in ROWS[:2]] + [{**row, COLUMN: "teacher"} for row in ROWS[2:4]]
    trainer = make_routed(
        tmp_path, student_tok, teacher_tok, rows, scaling="dynamic", max_steps=1, max_scale=1e6, **cut(2, 2)
    )
    seen = []
    trainer._finish = lambda step, parts, finish=trainer._finish: (seen.append(dict(parts)), finish(step, parts))
    trainer.train()
    assert seen[0]["kd"] == 0
    assert seen[1]["kd"] != 0
    assert float(seen[1]["scale"]) == pytest.approx(float(seen[1]["ce"] / seen[1]["kd"]), rel=1e-5)
    ce, kd = (float(seen[0][name] + seen[1][name]) for name in ("ce", "kd"))
    assert float(trainer._last_scale) == pytest.approx(ce / kd, rel=1e-5)


def test_select_and_entropy_take_routes(tmp_path, student_tok, teacher_tok):
    """Only of the teachers that a row goes to."""
    for mode in ("select", "entropy"):
        trainer = make_routed(tmp_path, student_tok, teacher_tok, None, ROWS[:2] + ROWS[4:6], teacher_mode=mode)
        got = trainer.evaluate()
        with torch.no_grad():
            sums, counts = sums_by_hand(trainer, student_tok, teacher_tok, [0, 1, 4, 5])
        for name, total, count in zip(NAMES, sums, counts, strict=True):
            assert got[f"eval_chunks/{name}"] == count > 0
            by = count if mode == "entropy" else sum(counts)  # of one teacher each, so their sums are one mean
            assert got[f"eval_kd/{name}"] == pytest.approx(float(total) / by, rel=1e-5)
        if mode == "entropy":  # no chunk has two teachers
            assert got["eval_certainty/teacher"] == got["eval_certainty/twin"] == 1.0
    with pytest.raises(ValueError, match="teacher_column: expected None for teacher_mode='average'"):
        XTokenConfig(output_dir=str(tmp_path), teacher_column=COLUMN, teacher_mode="average")


def test_a_cache_need_not_have_what_its_teacher_does_not_read(tmp_path, student_tok, teacher_tok):
    teachers = two_teachers(student_tok, teacher_tok)
    caches = []
    for m, (tok, teacher) in enumerate(zip((teacher_tok, student_tok), teachers, strict=True)):
        documents = teacher_documents(tok, [row for row, goes in zip(ROWS, GOES[m], strict=True) if goes])
        caches.append(cache_teacher(teacher.model, tok, documents, tmp_path / str(m), top_k=10**6))
    encoder = make_encoder(student_tok, teacher_tok, name_documents=True)
    examples = CachedExamples(EncodedDataset(ROWS, encoder), caches)
    for packed in (False, True):
        collator = XTokenCollator(student_tok, [teacher_tok, student_tok], packed=packed, max_length=128)
        results = []
        for data in (examples, examples.examples):
            trainer = make_routed(tmp_path, student_tok, teacher_tok, None, data)
            trainer.data_collator = collator
            results.append(trainer.evaluate())
        for name in NAMES:
            assert results[0][f"eval_kd/{name}"] == pytest.approx(results[1][f"eval_kd/{name}"], rel=2e-3)
            assert results[0][f"eval_chunks/{name}"] == results[1][f"eval_chunks/{name}"]


def test_who_does_not_read_a_row_does_not_matter_to_it(small_chat_tok):
    """Not its template, which may refuse the row, not its limit, and not how it writes calls."""
    student_tok, teacher_tok = small_chat_tok("llama3"), small_chat_tok("qwen3")
    other = type(teacher_tok)(tokenizer_object=teacher_tok.backend_tokenizer, eos_token="<|im_end|>")
    other.chat_template = "{{ raise_exception('no') }}"
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "In 1995, 123 readers."}]
    row = {"messages": messages, COLUMN: "a"}
    options: dict[str, Any] = {"teacher_column": COLUMN, "teacher_names": ["a", "b"], "train_on": "assistant"}
    encoder = ExampleEncoder(student_tok, [teacher_tok, other], max_teacher_length=[None, 3], **options)
    ((example,),) = encoder.encode([row])
    ((alone,),) = ExampleEncoder(student_tok, [teacher_tok], train_on="assistant").encode([row])
    assert example["route"] == [True, False]
    assert example["student_ids"].tolist() == alone["student_ids"].tolist()
    assert example["labels"].tolist() == alone["labels"].tolist()
    assert example["teachers"][0]["spans"].tolist() == alone["teachers"][0]["spans"].tolist()
    assert [len(example["teachers"][1][key]) for key in ("ids", "spans")] == [0, 0]
    assert not encoder.report.counts
    with pytest.raises(ValueError, match="row 0: b: its chat template refuses the messages: no"):
        encoder.encode([{**row, COLUMN: ["a", "b"]}])


def test_rows_that_say_nothing_go_to_all(student_tok, teacher_tok, caplog, monkeypatch):
    encoder = make_encoder(student_tok, teacher_tok)
    data = EncodedDataset(ROWS, encoder)
    assert [one["route"] for one in data] == GOES.T.tolist()  # type: ignore[attr-defined]
    assert sum("row 6: no teacher in 'goes_to', so it goes to all" in one for one in caplog.messages) == 1
    assert "of 8 rows: 1 rows that name no teacher and go to all" in caplog.text
    plain = [{"text": row["text"]} for row in ROWS]
    with pytest.raises(ValueError, match="rows: all 8 are rows that name no teacher and go to all, first row 0"):
        EncodedDataset(plain, encoder)
    monkeypatch.setattr("xtoken.train.data.MOST_DROPPED", 8)
    stream = EncodedStream(plain * 40, lambda row: encoder)
    with pytest.raises(ValueError, match="are rows that name no teacher and go to all"):
        list(stream)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("teachers", r"row 1: goes_to: expected names of teachers \(teacher, twin\), got 'teachers'"),
        (["twin", "x"], r"row 1: goes_to: expected names of teachers \(teacher, twin\), got 'x'"),
        (3, "row 1: goes_to: expected the name of a teacher, or a list of names, got 3"),
        ([None], r"row 1: goes_to: expected the name of a teacher, or a list of names, got \[None\]"),
    ],
)
def test_unknown_teachers(student_tok, teacher_tok, value, message):
    with pytest.raises(ValueError, match=message):
        make_encoder(student_tok, teacher_tok).encode([ROWS[0], {**ROWS[1], COLUMN: value}])


def test_routes_that_would_be_ignored(tmp_path, student_tok, teacher_tok):
    plain = EncodedDataset(ROWS, ExampleEncoder(student_tok, [teacher_tok, student_tok]))
    with pytest.raises(
        ValueError, match=r"train_dataset: expected examples of an ExampleEncoder\(teacher_column='goes"
    ):
        make_routed(tmp_path, student_tok, teacher_tok, plain)
    args = make_config(tmp_path, teacher_column=COLUMN)
    with pytest.raises(ValueError, match="data_collator: expected an XTokenCollator for teacher_column"):
        XTokenTrainer(make_model(len(student_tok), 0), args, [make_teacher(student_tok, None)], lambda examples: {})
    with pytest.raises(ValueError, match="teacher_names: expected the names that 'goes_to' has, got None"):
        ExampleEncoder(student_tok, [teacher_tok], teacher_column=COLUMN)
    with pytest.raises(
        ValueError, match="files: expected rows for teacher_column and teacher_systems, got the aligned"
    ):
        load_examples([tmp_path], student_tok, [teacher_tok], teacher_column=COLUMN, teacher_names=NAMES[:1])
    with pytest.raises(ValueError, match="teacher_names: expected one for each of 1 teachers, got 2"):
        ExampleEncoder(student_tok, [teacher_tok], teacher_column=COLUMN, teacher_names=NAMES)
