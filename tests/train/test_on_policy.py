"""Training on completions that are written in training: what is compared, counted, shown, drawn again and refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from comparer import assert_close
from default_losses import DEFAULT, default_loss
from fake_server import FakeServer
from small import SMALL_TEXTS, collate, command, history, make_config, make_model, with_adapters
from transformers import GenerationConfig

from xtoken import ProjectionMatrix, ServedModel, Teacher
from xtoken.cli import main
from xtoken.losses import Needs, registered
from xtoken.train import EncodedDataset, ExampleEncoder, TeacherModel, XTokenCollator, XTokenTrainer
from xtoken.train.generate import ModelWriter, Sampling
from xtoken.train.limits import Limits
from xtoken.train.reader import Reader

pytestmark = pytest.mark.slow

ROWS = [
    {"messages": [{"role": "user", "content": text[:24]}, {"role": "assistant", "content": text[24:56]}]}
    for text in SMALL_TEXTS[:8]
]


@pytest.fixture(scope="module")
def toks(small_chat_tok) -> tuple[Any, Any]:
    return small_chat_tok("llama3"), small_chat_tok("qwen3")


@pytest.fixture(scope="module")
def projection(toks) -> ProjectionMatrix:
    return ProjectionMatrix.build(*toks)


def teacher_of(toks: Any, projection: Any, **objective: Any) -> TeacherModel:
    loss = objective.setdefault("loss", DEFAULT[Needs.PROJECTION])
    if "top_k" in registered()[loss].options():
        objective.setdefault("top_k", None)
    return TeacherModel(Teacher(projection, **objective), make_model(len(toks[1]), 1), toks[1])


def trainer_of(folder: Path, toks: Any, teachers: Any, rows: Any = ROWS, **options: Any) -> XTokenTrainer:
    options = {"on_policy": 1.0, "max_new_tokens": 8, **options}
    student = make_model(len(toks[0]), 0)
    return XTokenTrainer(student, make_config(folder, **options), teachers, None, rows, None, toks[0])


def kept(trainer: XTokenTrainer) -> list[dict[str, Any]]:
    """The batches of the steps, as the losses see them, from now on."""
    found: list[dict[str, Any]] = []
    counts = trainer._counts

    def keeping(batch: Any) -> Any:
        found.append(batch["host"].batch)
        return counts(batch)

    trainer._counts = keeping  # type: ignore[method-assign]
    return found


def logged(trainer: XTokenTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("options", [{}, {"reverse": True}])
def test_the_gradient_is_that_of_the_distillation(tmp_path, toks, projection, options, capsys):
    """Of the tokens that were drawn, by a model called in the plain way; cross-entropy has no part in it."""
    teacher = teacher_of(toks, projection, **options)
    trainer = trainer_of(tmp_path, toks, [teacher], max_steps=1, optim="sgd", learning_rate=1.0, num_generations=2)
    batches, before = kept(trainer), {name: one.clone() for name, one in trainer.model.named_parameters()}
    trainer.train()
    (batch,) = batches
    assert len(batch["input_ids"]) == 8  # two for each of four
    assert (batch["ce_labels"] == -100).all()
    assert logged(trainer, "ce") == [0.0]
    assert logged(trainer, "kd_scale") == [1.0]
    assert logged(trainer, "on_policy") == [1.0]
    model, entry = make_model(len(toks[0]), 0), batch["teachers"][0]
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        theirs = teacher.model(entry["input_ids"], attention_mask=entry["attention_mask"]).logits
    loss = default_loss(Needs.PROJECTION)(
        model(**given).logits, theirs, entry["alignment"].supervised(batch["labels"]), projection, top_k=None, **options
    )
    loss.backward()
    assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-4)]
    for name, weight in model.named_parameters():
        change = before[name] - trainer.model.get_parameter(name).detach()
        assert_close(change, weight.grad, rtol=1e-3, atol=1e-4 * float(weight.grad.abs().max()) + 1e-7, what=name)
    shown = capsys.readouterr().out
    assert "step 1, a prompt: <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\nIn 19" in shown
    assert "step 1, its completion, " in shown


def test_a_served_teacher(tmp_path, toks, projection):
    """Is asked for what was written, and its answers make the step that the model itself makes."""
    local = teacher_of(toks, projection)
    weights = []
    with FakeServer(local.model, toks[1]) as server:
        remote = ServedModel(server.url, toks[1], logprobs=len(toks[1]), patience=0.0)
        server.asked.clear()
        for teacher in (local, TeacherModel(local.objective, remote)):
            trainer = trainer_of(tmp_path, toks, [teacher], optim="sgd", learning_rate=0.1)
            batches = kept(trainer)
            trainer.train()
            weights.append({name: one.detach() for name, one in trainer.model.named_parameters()})
        entries = [batch["teachers"][0] for batch in batches]
        pairs = [pair for one in entries for pair in zip(one["input_ids"], one["attention_mask"], strict=True)]
        rows = [ids[mask != 0].tolist() for ids, mask in pairs]
        assert sorted(server.asked) == sorted(rows)
    for name, want in weights[0].items():
        assert_close(weights[1][name], want, rtol=1e-4, atol=1e-6, what=name)


def test_a_share_of_the_rows(tmp_path, toks, projection):
    """The others are trained on as ever; a twin with the student's tokenizer is compared at each drawn token."""
    twin = TeacherModel(Teacher(), make_model(len(toks[0]), 2), toks[0], "twin")
    teachers = [teacher_of(toks, projection), twin]
    trainer = trainer_of(tmp_path, toks, teachers, on_policy=0.5, max_steps=4, per_device_train_batch_size=8)
    batches = kept(trainer)
    trainer.train()
    share = [float((batch["ce_labels"] == -100).all(1).float().mean()) for batch in batches]
    assert share == logged(trainer, "on_policy")
    assert 0 < sum(share) / 4 < 1
    assert len(set(share)) > 1
    for k, batch in enumerate(batches):
        drawn = (batch["ce_labels"] == -100).all(1)
        assert torch.equal(batch["ce_labels"][~drawn], batch["labels"][~drawn])
        assert logged(trainer, "chunks/twin")[k] == int((batch["labels"] != -100).sum())
        tokens = int((batch["labels"][drawn] != -100).sum())
        assert logged(trainer, "completion_length")[k] == pytest.approx(tokens / int(drawn.sum()), rel=1e-5)
    assert all(0 < one < 1 for one in logged(trainer, "time_generation"))
    assert all(one > 0 for one in logged(trainer, "ce"))


def test_a_run_that_goes_on_draws_the_same(tmp_path, toks, projection):
    """And dropout is as it would be without completions: they take nothing from the generators of random numbers."""

    def run(name: str, start: str | None = None, **options: Any) -> Any:
        trainer = trainer_of(
            tmp_path / name, toks, [teacher_of(toks, projection)], on_policy=0.5, max_steps=4, save_strategy="steps",
            save_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2, **options,
        )  # fmt: skip
        trainer.model.config.attention_dropout = 0.5
        for layer in trainer.model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        batches = kept(trainer)
        trainer.train(resume_from_checkpoint=start)
        assert trainer.model.training
        return logged(trainer, "loss"), [batch["input_ids"].tolist() for batch in batches]

    losses, batches = run("whole")
    again, resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert again == losses
    assert resumed == batches[4:]
    assert run("other", seed=4)[1] != batches
    writer, state = writer_of(toks[0]), torch.get_rng_state()
    writer.write([[1, 2]], 3)
    assert torch.equal(torch.get_rng_state(), state)


def writer_of(tokenizer: Any, model: Any = None, **options: Any) -> ModelWriter:
    made = make_model(len(tokenizer), 0) if model is None else model
    sampling = Sampling(**{"max_new_tokens": 6, **options})
    return ModelWriter(lambda: made, Reader(tokenizer, "student"), Limits(), torch.device("cpu"), sampling, 2)


def test_the_tokens_are_those_of_the_model(toks):
    """Alone or among longer prompts, whatever the model's own configuration wants of generation."""
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    greedy = writer_of(toks[0], temperature=0.0)
    model = greedy.model()
    for prompt, got in zip(prompts, greedy.write(prompts, 0), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] not in greedy.ends):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert got == ids[len(prompt) :]
    model.generation_config = GenerationConfig(repetition_penalty=50.0, suppress_tokens=list(range(300)))
    own = model.generation_config
    assert greedy.write(prompts, 0) == writer_of(toks[0], temperature=0.0).write(prompts, 1)
    assert model.generation_config is own
    drawn = writer_of(toks[0])
    assert drawn.write(prompts, 0) == drawn.write(prompts, 0) != drawn.write(prompts, 1)
    assert writer_of(toks[0], top_p=1e-6).write(prompts, 0) == greedy.write(prompts, 0)


def test_a_model_within_adapters_keeps_its_configuration_of_generation(toks):
    """It is what the merged student is saved with."""
    pytest.importorskip("peft")
    model = make_model(len(toks[0]), 0)
    own = model.generation_config = GenerationConfig(eos_token_id=[1, 3], repetition_penalty=1.5)
    adapted = with_adapters(model, 2)
    writer_of(toks[0], adapted).write([[5]], 0)
    assert adapted.merge_and_unload().generation_config is own


def test_no_token_beyond_the_tokenizer(toks):
    """Where an output layer is padded, and its padding the most probable."""
    size = len(toks[0])
    model = make_model(size + 60, 0)
    with torch.no_grad():
        model.lm_head.weight[:size] *= 1e-3
    for temperature in (0.0, 1.0):
        written = writer_of(toks[0], model, temperature=temperature, max_new_tokens=20).write([[5], [6]], 0)
        assert max(max(ids) for ids in written) < size


def test_an_end_ends(toks):
    """With the token itself, of the tokenizer's or of the model's configuration."""
    model = make_model(len(toks[0]), 0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert writer_of(toks[0], model, temperature=0.0).write([[5]], 0) == [[0] * 6]
    model.generation_config.eos_token_id = [0, 3]
    assert writer_of(toks[0], model, temperature=0.0).write([[5]], 0) == [[0]]


def test_a_teacher_writes(tmp_path, toks, projection):
    """Data like any other: cross-entropy too, of the text that the student's tokenizer writes."""
    trainer = trainer_of(tmp_path, toks, [teacher_of(toks, projection)], on_policy="teacher", max_steps=1)
    (given,) = {len(one["labels"]) for one in trainer.train_dataset} and [trainer.train_dataset]
    batches = kept(trainer)
    trainer.train()
    assert logged(trainer, "on_policy") == [1.0]
    assert logged(trainer, "ce")[0] > 0
    assert logged(trainer, "kd_scale")[0] > 1
    assert "ce_labels" not in batches[0]
    known = {tuple(one["student_ids"].tolist()) for one in given}
    rows = [row[row != trainer.data_collator.student_pad_id].tolist() for row in batches[0]["input_ids"]]
    assert not any(tuple(row) in known for row in rows)


def test_prompts_alone_are_always_completed(tmp_path, toks, projection):
    """Among rows of text, which stay as they are; and streamed."""
    rows = [{"prompt": "In 1914, 126"}, {"text": SMALL_TEXTS[0]}, {"prompt": ROWS[0]["messages"][:1]}, *ROWS[:1]] * 2
    for data in (rows, iter(rows)):
        trainer = trainer_of(
            tmp_path, toks, [teacher_of(toks, projection)], data, on_policy=1e-9, max_steps=1,
            per_device_train_batch_size=8,
        )  # fmt: skip
        trainer.train()
        assert logged(trainer, "on_policy") == [0.5]


def test_packed_rows(tmp_path, toks, projection):
    examples = EncodedDataset(ROWS, ExampleEncoder(toks[0], [toks[1]], with_prompts=True))
    collator = XTokenCollator(toks[0], [toks[1]], packed=True, max_length=128)
    args = make_config(tmp_path, on_policy=0.5, max_new_tokens=8, max_steps=2, per_device_train_batch_size=8)
    trainer = XTokenTrainer(
        make_model(len(toks[0]), 0), args, [teacher_of(toks, projection)], collator, examples, None, toks[0]
    )
    batches = kept(trainer)
    trainer.train()
    for batch in batches:
        assert len(batch["input_ids"]) < 8
        assert torch.equal((batch["ce_labels"] != -100) & (batch["labels"] == -100), batch["labels"] > 1e9)
    assert 0 < logged(trainer, "on_policy")[0] < 1


def test_what_leaves_no_room_is_skipped(tmp_path, toks, projection, caplog):
    """Counted, told once, and trained on as it is."""
    long = {"messages": [{"role": "user", "content": SMALL_TEXTS[0] * 2}, {"role": "assistant", "content": "12"}]}
    rows = [long, long, *ROWS[:2]]
    toks_and = [toks[1]]
    examples = EncodedDataset(rows, ExampleEncoder(toks[0], toks_and, with_prompts=True, max_length=120))
    args = make_config(tmp_path, on_policy=1.0, max_new_tokens=60, max_steps=1)
    collator = XTokenCollator(toks[0], toks_and)
    trainer = XTokenTrainer(
        make_model(len(toks[0]), 0), args, [teacher_of(toks, projection)], collator, examples, None, toks[0]
    )
    trainer.train()
    assert logged(trainer, "on_policy") == [0.5]
    assert logged(trainer, "on_policy_skipped") == [0.5]
    assert logged(trainer, "ce")[0] > 0
    assert len(said(caplog, "leaves no room for 60 of a completion, so its row is trained on as it is")) == 1


def said(caplog: Any, part: str) -> list[str]:
    return [one.getMessage() for one in caplog.records if part in one.getMessage()]


def test_prompts_alone_that_leave_no_room_are_left_out(monkeypatch, tmp_path, toks, projection, caplog):
    """Refused if all are such: of a small data set at once, else of the first ones."""
    rows = [{"prompt": SMALL_TEXTS[0] * 2}, {"prompt": SMALL_TEXTS[1][:10]}] * 2
    given = toks, [teacher_of(toks, projection)]
    trainer = trainer_of(tmp_path, *given, rows, max_length=60, max_new_tokens=30, max_steps=1)
    trainer.train()
    assert logged(trainer, "on_policy_skipped") == [0.5]
    assert len(said(caplog, "so its row is left out (nothing of it is trained on)")) == 1
    message = (
        "max_new_tokens: expected prompts of at most 30 tokens, which leave room for 30 of a completion, got none "
    )
    with pytest.raises(ValueError, match=f"{message}of the 2 prompts"):
        trainer_of(tmp_path, *given, rows[::2], max_length=60, max_new_tokens=30)
    monkeypatch.setattr("xtoken.train.rollout.MOST_WITHOUT", 3)
    trainer = trainer_of(tmp_path, *given, rows[::2] * 4, max_length=60, max_new_tokens=30)
    with pytest.raises(ValueError, match=f"{message}of the first 3 prompts"):
        trainer.train()


def test_a_text_beside_a_prompt_is_plain_text(tmp_path, toks, projection, caplog):
    """As without completions; it has no prompt."""
    rows = [{"prompt": "In 1914", "text": SMALL_TEXTS[0]}, *ROWS[:1]] * 2
    trainer = trainer_of(tmp_path, toks, [teacher_of(toks, projection)], rows, max_steps=1)
    plain = ExampleEncoder(toks[0], [toks[1]]).encode(rows[:1])[0][0]
    assert trainer.train_dataset[0]["labels"].tolist() == plain["labels"].tolist()
    trainer.train()
    assert logged(trainer, "on_policy") == [0.5]
    assert len(said(caplog, "a row has no prompt, so that it is trained on as it is")) == 1


def test_rows_that_go_to_no_teacher_stay(tmp_path, toks, projection, caplog):
    """Since a completion would teach nothing."""
    rows = [{**row, "who": [] if k % 2 else None} for k, row in enumerate(ROWS[:4])]
    trainer = trainer_of(tmp_path, toks, [teacher_of(toks, projection)], rows, max_steps=1, teacher_column="who")
    trainer.train()
    assert logged(trainer, "on_policy") == [0.5]
    assert logged(trainer, "ce")[0] > 0
    assert len(said(caplog, "a row goes to no teacher")) == 1
    with pytest.raises(ValueError, match="got none of the 2 examples with one, and with a teacher to go to"):
        trainer_of(
            tmp_path, toks, [teacher_of(toks, projection)], [{**row, "who": []} for row in ROWS[:2]],
            teacher_column="who",
        )  # fmt: skip


def test_a_teachers_limit_cuts_completions(tmp_path, toks, projection, caplog):
    """Counted, and told once with the teacher and its limit."""
    teachers = [teacher_of(toks, projection)]
    options = {"max_steps": 2, "max_new_tokens": 40, "max_length": 200}
    logs = []
    for limit in (None, 40):
        trainer = trainer_of(tmp_path, toks, teachers, max_teacher_length=limit, **options)
        trainer.train()
        logs.append([logged(trainer, name) for name in ("on_policy_cut", "chunks")])
    (whole, chunks), (cut, fewer) = logs
    assert not whole
    assert all(0 < one <= 1 for one in cut)
    assert sum(fewer) < sum(chunks)
    assert len(said(caplog, f"a completion is cut for {teachers[0].name}, whose limit is 40 tokens")) == 1


@pytest.mark.parametrize("cut", [(4, 1), (1, 4)])
def test_the_factor_without_cross_entropy_is_the_last(tmp_path, toks, projection, cut):
    """1 until there is one; what is on policy sets none; and a run that goes on has it too."""
    size, accumulation = cut
    rows = [{"prompt": "In 1914"}] * 4
    options = {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_scale": math.inf,
        "save_strategy": "steps", "save_steps": 3, "max_steps": 5, "on_policy": 1e-9, "max_new_tokens": 4,
    }  # fmt: skip
    logs = []
    for name, start in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-3"))):
        # A step of prompts alone, one with some text, and others of prompts alone, in this order.
        data = iter([*rows, *rows[:2], *ROWS[:2], *rows * 3])
        trainer = trainer_of(tmp_path / name, toks, [teacher_of(toks, projection)], data, **options)
        trainer.train(resume_from_checkpoint=start)
        logs.append([logged(trainer, one) for one in ("kd_scale", "ce", "kd")])
    scales, ce, kd = logs[0]
    assert [one > 0 for one in ce] == [False, True, False, False, False]
    assert scales[0] == 1.0
    assert scales[2:] == [pytest.approx(ce[1] / kd[1], rel=1e-4)] * 3
    assert scales[1] > 1
    assert logs[1] == logs[0]


def test_what_is_refused(tmp_path, toks, projection):
    teacher = teacher_of(toks, projection)
    for name, value, message in (
        ("on_policy", "student", "expected a share from 0 to 1, or 'teacher', got 'student'"),
        ("on_policy", 1.5, "expected a share from 0 to 1, or 'teacher', got 1.5"),
        ("on_policy", math.nan, "expected a share from 0 to 1, or 'teacher', got nan"),
        ("max_new_tokens", 0, "expected at least 1, got 0"),
        ("num_generations", 0, "expected at least 1, got 0"),
        ("generation_temperature", -1.0, "expected a number >= 0, got -1.0"),
        ("generation_top_p", 0.0, "expected a share above 0, at most 1, got 0.0"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            trainer_of(tmp_path, toks, [teacher], **{name: value})
    with pytest.raises(ValueError, match="max_new_tokens: expected fewer than the 256 tokens of an example, got 256"):
        trainer_of(tmp_path, toks, [teacher], max_new_tokens=256)
    with pytest.raises(ValueError, match=r"on_policy: expected rows with a prompt .*, got none of the 2 examples with"):
        trainer_of(tmp_path, toks, [teacher], [{"text": SMALL_TEXTS[0]}] * 2)
    examples = EncodedDataset(ROWS, ExampleEncoder(toks[0], [toks[1]]))
    with pytest.raises(ValueError, match="examples have them of ExampleEncoder"):
        trainer_of(tmp_path, toks, [teacher], examples)
    for teachers, options in (
        ([teacher], {"kd_weight": 0.0}), ([], {}), ([teacher_of(toks, projection, weight=0.0)], {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="on_policy: expected a kd_weight and a teacher's weight other than 0"):
            trainer_of(tmp_path, toks, teachers, on_policy=0.5, **options)
    cached = TeacherModel(Teacher(projection, top_k=None), None, toks[1], "kept")
    examples = EncodedDataset(ROWS, ExampleEncoder(toks[0], [toks[1]], with_prompts=True))
    with pytest.raises(ValueError, match="on_policy: expected teachers that run, but kept is cached"):
        trainer_of(tmp_path, toks, [cached], examples)
    args = make_config(tmp_path, on_policy=1.0)
    with pytest.raises(ValueError, match=r"on_policy: expected an XTokenCollator, .*, got function"):
        XTokenTrainer(make_model(len(toks[0]), 0), args, [teacher], collate, examples, None, toks[0])
    with pytest.raises(ValueError, match="on_policy: expected a model of transformers, which can generate, as the stu"):
        writer_of(toks[0], torch.nn.Linear(2, 2))
    endless = ({"text": SMALL_TEXTS[0]} for _ in range(2000))
    trainer = trainer_of(tmp_path, toks, [teacher], endless, max_steps=2, per_device_train_batch_size=1000)
    with pytest.raises(ValueError, match=r"on_policy: expected rows with a prompt .*, got none of the first 1000 rows"):
        trainer.train()


def test_hidden_states_in_place_of_logits(tmp_path, toks, projection):
    """The same losses, with labels of cross-entropy of their own."""
    logs = []
    for fused in ("on", "off"):
        trainer = trainer_of(
            tmp_path / fused, toks, [teacher_of(toks, projection)], on_policy=0.5, max_steps=3, fused=fused
        )
        trainer.train()
        logs.append([logged(trainer, name) for name in ("ce", "kd", "chunks", "completion_length")])
    for on, off in zip(*logs, strict=True):
        assert on == pytest.approx(off, rel=1e-4)


def test_command(tmp_path, folders, capsys):
    """With rows that have prompts; not with a corpus that has none."""
    rows = [json.dumps({"prompt": text[:20], "completion": text[20:60]}) for text in SMALL_TEXTS[:8]]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    here = {**folders, "train": str(tmp_path / "rows.jsonl")}
    more = "--on_policy", "0.5", "--max_new_tokens", "4", "--top_p", "0.9", "--num_generations", "2", "--max_steps", "2"
    assert main(command(here, tmp_path / "out", *more)) == 0
    entries = [one for one in history(tmp_path / "out") if "completion_length" in one]
    assert entries
    assert all(1 <= one["completion_length"] <= 4 for one in entries)
    assert "its completion, " in capsys.readouterr().out
    assert main(command(folders, tmp_path / "texts", *more)) == 1
    assert "on_policy: expected rows with a prompt" in capsys.readouterr().err
