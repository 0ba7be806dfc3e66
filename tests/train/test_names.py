"""One name is enough: students, teachers and data as they are found, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from default_losses import DEFAULT, OTHER
from small import SMALL_TEXTS, command, history, make_config, make_model, make_teacher

from xtoken import Vocabulary
from xtoken.cli import main
from xtoken.losses import Needs
from xtoken.train import EncodedDataset, EncodedTable, TeacherModel, XTokenCollator, XTokenConfig, XTokenTrainer
from xtoken.train.table import open_data

datasets = pytest.importorskip("datasets", reason="xtoken[datasets] is not installed")

pytestmark = pytest.mark.slow

UNAIDED, PROJECTED, PIECES, SHARED = (DEFAULT[needs] for needs in Needs)
ROWS = [{"text": text} for text in SMALL_TEXTS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))


def logged(trainer: XTokenTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_three_lines(folders, tmp_path, monkeypatch, caplog):
    """Names and rows alone: the loss that is recommended, told with its reasons; the rows are cut as the models can."""
    monkeypatch.chdir(tmp_path)
    trainer = XTokenTrainer(folders["student"], teachers=folders["teacher"], train_dataset=ROWS[:8])
    (teacher,) = trainer.teachers
    assert (teacher.name, teacher.objective.loss, teacher.objective.weight) == ("teacher", PIECES, 1.0)
    assert teacher.objective.pieces is not None
    (told,) = [one for one in caplog.messages if one.startswith("teacher teacher")]
    assert told == teacher.summary()
    assert told.startswith(f"teacher teacher: {PIECES}, weight 1\n  ")
    assert "common set, less than 99%" in told
    assert isinstance(trainer.data_collator, XTokenCollator)
    assert isinstance(trainer.train_dataset, EncodedDataset)
    assert isinstance(trainer.args, XTokenConfig)
    assert len(trainer.processing_class) == len(Vocabulary.from_tokenizer(folders["student"]))
    assert (tmp_path / "cache").is_dir()


def test_teachers_of_all_kinds(folders, tmp_path, student_tok, teacher_tok):
    """A name, a path, a model and a TeacherModel, the last with a loss of its own; options are for who has them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders["teacher"])
    own = make_teacher(student_tok, teacher_tok, name="own", weight=0.3)
    args = make_config(
        tmp_path / "out", loss=[PROJECTED, "auto", OTHER], teacher_weight=[0.2, 0.3], max_steps=1, max_length=30,
        loss_options={"temperature": 2.0, "top_k": 0, "uncommon_top_k": 5}, learn_projection=True, text_column="body",
    )  # fmt: skip
    names = [folders["teacher"], Path(folders["twin"]), model, own]
    rows = [{"body": row["text"]} for row in ROWS]
    student = AutoModelForCausalLM.from_pretrained(folders["student"])
    trainer = XTokenTrainer(student, args, names, train_dataset=rows, eval_dataset=rows[:4])
    assert [one.name for one in trainer.teachers] == ["teacher", "twin", "teacher-3", "own"]
    objectives = [one.objective for one in trainer.teachers]
    assert [one.loss for one in objectives] == [PROJECTED, SHARED, OTHER, own.objective.loss]
    assert [one.weight for one in objectives] == pytest.approx([0.5, 0.2, 0.3, 0.3])
    assert (objectives[0].temperature, objectives[0].top_k, objectives[2].uncommon_top_k) == (2.0, None, 5)
    assert [isinstance(one.projection, torch.nn.Module) for one in objectives] == [True, False, False, False]
    assert trainer.teachers[2].model is model
    assert max(len(one["student_ids"]) for one in trainer.train_dataset) <= 30
    assert len(trainer.train_dataset) > len(rows)
    trainer.train()
    assert {f"kd/{one.name}" for one in trainer.teachers} <= trainer.state.log_history[0].keys()


def test_the_selected_teacher_counts_as_it_would_alone(folders, tmp_path):
    found = []
    for teachers, options in (([folders["twin"]], {}), ([folders["twin"]] * 2, {"teacher_mode": "select"})):
        args = make_config(tmp_path, **options)
        trainer = XTokenTrainer(folders["student"], args, teachers, eval_dataset=ROWS[:4])
        found.append(trainer.evaluate()["eval_kd"])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_teacher_by_name(folders, student_tok, teacher_tok, tmp_path):
    """`TeacherModel.build` is strict with options, learns from texts, and says what it lacks."""
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    built = TeacherModel.build(
        folders["teacher"], student_tok, weight=0.5, texts=lambda: iter(SMALL_TEXTS), chat_template=str(template),
        name="T", dtype="bfloat16",
    )  # fmt: skip
    assert (built.name, built.objective.loss, built.objective.weight) == ("T", PIECES, 0.5)
    assert built.tokenizer.chat_template == template.read_text()
    assert built.model.dtype == torch.bfloat16
    assert TeacherModel.build(folders["teacher"], student_tok, model=None, loss=UNAIDED).model is None
    with pytest.raises(ValueError, match=f"merge: none of the chosen losses has it: {UNAIDED}"):
        TeacherModel.build(folders["teacher"], student_tok, model=None, loss=UNAIDED, loss_options={"merge": "mean"})
    with pytest.raises(ValueError, match=r"loss: expected one of 'auto', .*, got 'best'"):
        TeacherModel.build(folders["teacher"], student_tok, model=None, loss="best")
    with pytest.raises(ValueError, match="tokenizer: expected one, since LlamaForCausalLM does not say where it was"):
        TeacherModel.build(make_model(500, 1), student_tok)
    assert TeacherModel.build(make_model(500, 1), student_tok, tokenizer=teacher_tok, loss=UNAIDED).name == "teacher"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": [UNAIDED, PROJECTED, OTHER]}, "loss: expected one, or one for each of the 2 teachers, got 3"),
        ({"teacher_weight": [1.0, 2.0, 3.0]}, "teacher_weight: expected one for each of the 2 teachers, got 3"),
        ({"loss_options": {"merge": "mean"}, "loss": UNAIDED}, f"merge: none of the chosen losses has it: {UNAIDED}"),
        ({"loss": UNAIDED, "learn_projection": True}, "learn_projection: none of the chosen losses can train W"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(folders, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        XTokenTrainer(folders["student"], make_config(tmp_path, **options), [folders["teacher"], folders["twin"]])


def test_chats_without_a_template(folders, tmp_path):
    """Of a base model: what is missing is said; a template that is given goes to all that have none."""
    rows = [{"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "they read it"}]}] * 4
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    for more in ({}, {"chat_template": template}):
        args = make_config(tmp_path, loss=[UNAIDED, "auto"][: 1 + len(more)], train_on="assistant", **more)
        if not more:
            with pytest.raises(ValueError, match=r"student: tokenizer .* has no chat template, so it"):
                XTokenTrainer(folders["student"], args, folders["teacher"], train_dataset=rows)
            continue
        trainer = XTokenTrainer(folders["student"], args, [folders["teacher"], "self"], train_dataset=rows)
    assert (trainer.train_dataset[0]["labels"] == -100).sum() > 4
    assert trainer.teachers[1].tokenizer is trainer.processing_class
    trainer.train()


def test_tables_that_are_no_rows(tmp_path):
    frame = pytest.importorskip("pandas").DataFrame(ROWS)
    for data, what in (
        (frame, "a DataFrame; datasets.Dataset.from_pandas reads it"),
        (datasets.Dataset.from_list([]), "none"),
    ):
        with pytest.raises(ValueError, match=f"train_dataset: expected .*, got {what}"):
            XTokenTrainer("none", make_config(tmp_path), train_dataset=data)


def test_an_empty_system_is_none(folders, tmp_path):
    args = make_config(tmp_path, loss=UNAIDED, teacher_system=["", "be brief"])
    trainer = XTokenTrainer(folders["student"], args, [folders["teacher"], folders["twin"]])
    assert [one.system for one in trainer.teachers] == [None, "be brief"]


def test_what_is_missing(folders, tmp_path, student_tok):
    with pytest.raises(ValueError, match="loss_options: expected a JSON object, got 'temperature=2'"):
        make_config(tmp_path, loss_options="temperature=2")
    assert make_config(tmp_path, loss_options='{"temperature": 2.0}').loss_options == {"temperature": 2.0}
    model = make_model(len(student_tok), 0)
    with pytest.raises(ValueError, match="processing_class: expected the student's tokenizer, to build teachers by na"):
        XTokenTrainer(model, make_config(tmp_path), [folders["teacher"]])
    with pytest.raises(
        ValueError, match=r"train_dataset: expected a split of the name 'train', or one alone, got \['a', "
    ):
        XTokenTrainer(model, make_config(tmp_path), train_dataset={"a": ROWS, "b": ROWS}, processing_class=student_tok)
    with pytest.raises(OSError, match="no/such-teacher"):
        XTokenTrainer(model, make_config(tmp_path), "no/such-teacher", processing_class=student_tok)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """A dataset of two splits on disk, as it is after it was downloaded."""
    folder = tmp_path_factory.mktemp("splits")
    found = {}
    for name, rows in (("train", ROWS[:16]), ("test", ROWS[16:])):
        datasets.Dataset.from_list(rows).save_to_disk(folder / name)
        found[name] = datasets.load_from_disk(folder / name)
    return datasets.DatasetDict(found)


def test_datasets(folders, tmp_path, splits, caplog, threads):
    """Splits, map-style and streamed, train as the list of their rows does, also in the DataLoader's workers."""
    losses = []
    for data, more in (
        (ROWS[:16], {}),
        (splits, {}),
        (splits["train"].to_iterable_dataset(), {}),
        (splits["train"].to_iterable_dataset(num_shards=2), {"dataloader_num_workers": 2}),
        (splits, {"dataset_num_proc": 2}),
    ):
        args = make_config(tmp_path / "out", loss=UNAIDED, train_sampling_strategy="sequential", **more)
        evaluated = splits if data is splits and not more else None
        trainer = XTokenTrainer(
            folders["student"], args, folders["teacher"], train_dataset=data, eval_dataset=evaluated
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
        assert isinstance(trainer.train_dataset, EncodedTable) == (data is splits)
        if evaluated is not None:
            assert {"eval_train_ce", "eval_test_ce"} <= trainer.evaluate().keys()
    assert "train_dataset: trained on is the split 'train'; left are ['test']" in caplog.text
    assert losses[0] == losses[1] == losses[2] == losses[4]
    assert len(losses[3]) == len(losses[0])  # two workers take turns by batches


def test_a_stream_is_resumed(folders, tmp_path, splits, threads):
    """The Trainer skips what was trained on; texts are cut into several examples."""
    options: dict[str, Any] = {"loss": UNAIDED, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    logs = []
    for name, start in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-2")):
        args = make_config(tmp_path / name, max_length=30, lr_scheduler_type="constant", **options)
        stream = splits["train"].to_iterable_dataset().shuffle(seed=3, buffer_size=4)
        trainer = XTokenTrainer(folders["student"], args, folders["teacher"], train_dataset=stream)
        trainer.train(resume_from_checkpoint=start and str(start))
        logs.append(logged(trainer, "loss"))
    assert logs[0] == logs[1]
    assert len(set(logs[0])) == 4


def test_the_command_reads_datasets(folders, tmp_path, splits, monkeypatch, capsys):
    """Beside files, with a teacher that runs or a cache; streamed; and what else than one stream is refused."""
    file = tmp_path / "more.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, streaming: (
        splits[split].to_iterable_dataset() if streaming else splits[split]
    ))  # fmt: skip
    arguments = command(folders, tmp_path / "out", "--loss", UNAIDED, "--max_steps", "2")
    at, to = arguments.index("--data"), arguments.index("--eval_data")
    arguments[at + 1] = "org/set"
    arguments[to + 1] = "org/set:test"
    assert main([*arguments, "--data", str(file)]) == 0
    assert history(tmp_path / "out")[-1]["eval_ce"] > 0
    arguments[arguments.index("--output") + 1] = str(tmp_path / "streamed")
    assert main([*arguments, "--streaming"]) == 0
    arguments[arguments.index("--output") + 1] = str(tmp_path / "of_cache")
    for more in (["--data", str(file)], ["--teacher_cache", "cache"]):
        assert main([*arguments, "--streaming", *more]) == 1
        assert "--streaming: expected one dataset of the Hub in --data, and no --teacher_cache" in (
            capsys.readouterr().err
        )
    cached = str(tmp_path / "cached")
    assert main(["cache-teacher", "--teacher", folders["teacher"], "--data", "org/set", "org/set:test", "--output",
                 cached, "--logprobs", "8"]) == 0  # fmt: skip
    assert main([*arguments, "--teacher_cache", cached]) == 0
    assert open_data("org/set:test", "data").num_rows == 8
