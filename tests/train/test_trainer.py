"""XTokenTrainer: what a run learns, reports, keeps and refuses."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparer import assert_close
from default_losses import DEFAULT, OTHER, default_loss
from safetensors.torch import load_file
from small import SMALL_TEXTS, collate, encode, make_config, make_model, make_teacher, make_trainer
from transformers import TrainerCallback, TrainingArguments

from xtoken import PieceIndex, ProjectionMatrix, Teacher, Vocabulary
from xtoken.losses import Needs
from xtoken.train import TeacherModel, XTokenConfig, XTokenTrainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def examples(student_tok, teacher_tok) -> Any:
    return encode(SMALL_TEXTS, student_tok, teacher_tok)


@pytest.fixture(scope="module")
def twins(student_tok, teacher_tok) -> Any:
    """Each for two teachers of another tokenizer and one of the student's."""
    return encode(SMALL_TEXTS, student_tok, teacher_tok, teacher_tok, None)


def logged(trainer: XTokenTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_learns_and_reports(tmp_path, student_tok, teacher_tok, examples):
    teacher = make_teacher(student_tok, teacher_tok, top_k=100)
    trainer = make_trainer(
        tmp_path, student_tok, [teacher], examples[:16], examples[16:], max_steps=12, logging_steps=3,
        learning_rate=3e-3, scaling="fixed", kd_weight=0.5,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_ce"] < before["eval_ce"] - 0.1
    assert after["eval_kd"] < before["eval_kd"] - 0.1
    assert after["eval_loss"] == pytest.approx(after["eval_ce"] + 0.5 * after["eval_kd"])
    assert after["eval_chunks"] == sum(len(one["teachers"][0]["spans"]) - 1 for one in examples[16:])  # but the bos
    assert len(logged(trainer, "ce")) == 4
    for k in range(4):
        entry = [one for one in trainer.state.log_history if "tokens_per_second" in one][k]
        assert entry["loss"] == pytest.approx(entry["ce"] + 0.5 * entry["kd"], rel=1e-4)
        assert entry["kd_scale"] == 1
        assert entry["tokens_per_second"] > 0
        assert 0 <= entry["agreement"] <= 1
        assert 0 < entry["teacher_mass"] < 1
        assert 0 < entry["projected_outside"] < 1
        shares = [entry[f"time_{name}"] for name in ("teacher", "student", "loss")]
        assert min(shares) > 0
        assert sum(shares) <= 1
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    assert all(weight.grad is None for weight in teacher.model.parameters())


def test_training_that_has_no_step(tmp_path, student_tok, teacher_tok, examples):
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "dataloader_drop_last": True}
    teachers = [make_teacher(student_tok, teacher_tok)]
    trainer = make_trainer(tmp_path, student_tok, teachers, examples[:3], **options)
    with pytest.raises(ValueError, match=r"^dataloader_drop_last: expected .* got 3 for 4 a batch on 1 device$"):
        trainer.train()
    trainer = make_trainer(tmp_path, student_tok, teachers, examples[:4], **options)
    trainer.train()
    assert trainer.state.global_step == 2


def test_evaluation_is_over_all_labels_and_chunks(tmp_path, student_tok, teacher_tok, examples):
    """Batches of different sizes weigh by what is in them, and the last counts though it is not full."""
    teacher = make_teacher(student_tok, teacher_tok)
    trainer = make_trainer(tmp_path, student_tok, [teacher], None, examples[:7], dataloader_drop_last=True)
    got = trainer.evaluate()
    batch = collate(examples[:7])
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        entry = batch["teachers"][0]
        theirs = teacher.model(entry["input_ids"], attention_mask=entry["attention_mask"]).logits
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    kd = default_loss(Needs.PROJECTION)(logits, theirs, entry["alignment"], teacher.objective.projection, top_k=None)
    assert got["eval_ce"] == pytest.approx(float(ce), rel=1e-5)
    assert got["eval_kd"] == pytest.approx(float(kd), rel=1e-5)


def test_several_teachers_add_up(tmp_path, student_tok, teacher_tok, twins):
    teachers = [
        make_teacher(student_tok, teacher_tok, 1, name="a", weight=0.2),
        make_teacher(student_tok, teacher_tok, 2, name="b", loss=OTHER, weight=0.5),
        make_teacher(student_tok, None, 3, name="c", weight=2.0),
    ]
    trainer = make_trainer(tmp_path, student_tok, teachers, None, twins[:4])
    got = trainer.evaluate()
    parts = [got[f"eval_kd/{name}"] for name in "abc"]
    assert got["eval_kd"] == pytest.approx(0.2 * parts[0] + 0.5 * parts[1] + 2.0 * parts[2])
    assert got["eval_chunks/c"] == sum(len(one["labels"]) - 1 for one in twins[:4])
    assert got["eval_agreement/c"] <= 1


def test_select_takes_the_better_teacher(tmp_path, student_tok, teacher_tok, twins):
    """A teacher that has learned the text is chosen for every sample, and the sums are those of it alone."""
    good, bad = (
        make_teacher(student_tok, teacher_tok, 1, name="good"),
        make_teacher(student_tok, teacher_tok, 2, name="bad"),
    )
    twin = make_teacher(student_tok, None, 3, name="twin", trust_top_k=len(student_tok))
    with torch.no_grad():  # a teacher that is sure of the wrong tokens is worse than one that knows nothing
        bad.model.get_parameter("lm_head.weight").mul_(40)
        twin.model.get_parameter("lm_head.weight").mul_(40)
    trainer = make_trainer(tmp_path, student_tok, [bad, good, twin], None, twins[:6], teacher_mode="select")
    got = trainer.evaluate()
    assert got["eval_chunks/good"] > 0
    assert got["eval_chunks/bad"] == got["eval_chunks/twin"] == 0
    alone = make_trainer(tmp_path, student_tok, [good], None, encode_first(twins[:6])).evaluate()
    chunks = [alone["eval_chunks"]] * 2 + [sum(len(one["labels"]) - 1 for one in twins[:6])]
    mean = sum(chunks) / 3
    assert got["eval_kd"] == pytest.approx(alone["eval_kd"] * alone["eval_chunks"] / mean, rel=1e-5)


def encode_first(examples: Any) -> list[dict[str, Any]]:
    return [{**one, "teachers": one["teachers"][:1]} for one in examples]


def test_average_is_one_teacher(tmp_path, student_tok, teacher_tok, twins):
    teachers = [
        make_teacher(student_tok, None, k, name=name, weight=w) for k, name, w in ((1, "a", 1.0), (2, "b", 3.0))
    ]
    pair = [{**one, "teachers": [one["teachers"][2]] * 2} for one in twins[:4]]
    trainer = make_trainer(tmp_path, student_tok, teachers, None, pair, teacher_mode="average")
    got = trainer.evaluate()
    batch = collate(pair)
    with torch.no_grad():
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        logits = trainer.model(**given).logits
        p = [teacher.model(**given).logits.softmax(-1) for teacher in teachers]
    mask = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    want = default_loss(Needs.SAME_TOKENIZER)(logits, (0.25 * p[0] + 0.75 * p[1]).log(), mask=mask)
    assert got["eval_kd"] == pytest.approx(float(want), rel=1e-4)
    assert "eval_kd/a" not in got


def test_teachers_that_are_one_have_one_loss(tmp_path, student_tok, teacher_tok):
    """Also where only one of them would leave chunks out."""
    others: dict[str, Any] = {
        "loss": {"loss": OTHER}, "trust_top_k": {"trust_top_k": 3}, "top_k": {"top_k": 7},
        "projection": {"learnable": True},
    }  # fmt: skip
    for name, of in others.items():
        teachers = [make_teacher(student_tok, teacher_tok, name="a"), make_teacher(student_tok, teacher_tok, **of)]
        with pytest.raises(ValueError, match=rf"^{name}: expected one for all .* for a and .* for teacher$"):
            make_trainer(tmp_path, student_tok, teachers, None, teacher_mode="average")


def test_a_loss_of_chunks_on_the_students_own_ids(tmp_path, student_tok, texts):
    """A teacher with the student's tokenizer is compared as if it had read ids of its own."""
    logs = []
    for own in (None, student_tok):
        teacher = make_teacher(student_tok, student_tok, loss=OTHER)
        examples = encode(texts[:6], student_tok, own)
        trainer = make_trainer(tmp_path, student_tok, [teacher], examples, examples[:3])
        trainer.train()
        trainer.evaluate()
        wanted = ("loss", "chunks", "eval_loss", "eval_kd")
        logs.append([entry[name] for entry in trainer.state.log_history for name in wanted if name in entry])
    assert len(logs[0]) == 6
    assert logs[0] == pytest.approx(logs[1])


def test_a_stream_that_begins_again(tmp_path, student_tok, teacher_tok, examples):
    """Each step has all of its micro-batches, also where a round ends within it, and what is logged is of steps."""

    class Stream:
        def __iter__(self) -> Any:
            return iter(examples[:3])

    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3}
    logs = []
    for data, more in ((Stream(), {}), (examples[:3] * 2, {"train_sampling_strategy": "sequential"})):
        trainer = XTokenTrainer(
            make_model(len(student_tok), 0), make_config(tmp_path, **options, **more),
            [make_teacher(student_tok, teacher_tok)], None, data, None, student_tok,
        )  # fmt: skip
        trainer.train()
        logs.append(
            [[entry[key] for key in ("loss", "ce", "kd")] for entry in trainer.state.log_history if "ce" in entry]
        )
    assert len(logs[0]) == 3
    assert logs[0] == logs[1]
    options["gradient_accumulation_steps"] = 4
    trainer = XTokenTrainer(
        make_model(len(student_tok), 0), make_config(tmp_path, **options), [make_teacher(student_tok, teacher_tok)],
        None, iter(examples[:3]), None, student_tok,
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected examples for at least one step of 4 micro-batches, got fewer"):
        trainer.train()


def test_a_run_goes_on_in_a_later_round_of_a_stream(tmp_path, student_tok, teacher_tok, examples):
    """With the rows that come next, in the order that the stream has in that round."""

    class Shuffled:
        def set_epoch(self, number: int) -> None:
            self.first = number

        def __iter__(self) -> Any:
            return iter([*examples[self.first : 5], *examples[: self.first]])

    logs = []
    for name, start in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-4"))):
        options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 2}
        trainer = XTokenTrainer(
            make_model(len(student_tok), 0), make_config(tmp_path / name, **options),
            [make_teacher(student_tok, teacher_tok)], None, Shuffled(), None, student_tok,
        )  # fmt: skip
        trainer.train(start)
        assert len(list(trainer.train_dataset)) == 5
        logs.append([entry["loss"] for entry in trainer.state.log_history if "ce" in entry])
    assert len(set(logs[0])) == 7
    assert logs[0] == logs[1]


def test_trainable_projection(tmp_path, student_tok, teacher_tok, examples):
    """W has its own learning rate, no clipping, no decay; it is saved, and a projection beside it."""
    teacher = make_teacher(student_tok, teacher_tok, learnable=True, name="T")
    weight = teacher.objective.projection.logits
    start, start_weight = teacher.objective.projection.projection(), weight.detach().clone()
    trainer = make_trainer(
        tmp_path, student_tok, [teacher], examples, max_steps=1, max_grad_norm=1e-9, save_strategy="steps",
        save_steps=1, weight_decay=0.1, learning_rate=1e-5,
    )  # fmt: skip
    trainer.train()
    # A first step of Adam goes as far as the learning rate, wherever the gradient is well above Adam's epsilon.
    moved = (weight.detach() - start_weight)[weight.grad.abs() > 1e-5].abs()
    assert len(moved)
    assert_close(moved, torch.full_like(moved, 1e-2), rtol=2e-3)
    assert torch.equal(weight.detach()[weight.grad == 0], start_weight[weight.grad == 0])
    learned = ProjectionMatrix.load(tmp_path / "checkpoint-1" / "projection-T.safetensors", student_tok, teacher_tok)
    assert float((learned.weight - start.weight).abs().max()) > 1e-3
    state = load_file(tmp_path / "checkpoint-1" / "distillation.safetensors")
    assert {name for name in state if not name.startswith("moments.0.")} == {"projections.0.logits"}


def test_projections_follow_the_schedule_and_skip_what_is_skipped(tmp_path, student_tok, teacher_tok, examples):
    """Their rate is the same share of its start as the student's; a step that fp16 leaves out moves neither."""
    teacher = make_teacher(student_tok, teacher_tok, learnable=True)
    trainer = make_trainer(tmp_path, student_tok, [teacher], examples, max_steps=4, lr_scheduler_type="linear")
    rates = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            rates.append(trainer._projection_steps.optimizer.param_groups[0]["lr"])

    trainer.add_callback(Watch())
    trainer.train()
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    before = teacher.objective.projection.logits.detach().clone()
    trainer.args.learning_rate = 0.0  # then W keeps its own, though the schedule is at its end
    trainer.optimizer._is_overflow = True
    assert trainer.accelerator.optimizer_step_was_skipped
    trainer._projection_steps.on_optimizer_step(trainer.args, trainer.state, trainer.control)
    assert torch.equal(teacher.objective.projection.logits, before)
    trainer.optimizer._is_overflow = False
    trainer._projection_steps.on_optimizer_step(trainer.args, trainer.state, trainer.control)
    assert not torch.equal(teacher.objective.projection.logits, before)


def test_the_best_model_brings_its_projection(tmp_path, student_tok, teacher_tok, examples):
    teacher = make_teacher(student_tok, teacher_tok, learnable=True)
    trainer = make_trainer(
        tmp_path, student_tok, [teacher], examples[:8], examples[8:12], max_steps=2, save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, greater_is_better=True,
        metric_for_best_model="eval_loss", learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    kept = load_file(f"{best}/distillation.safetensors")["projections.0.logits"]
    assert torch.equal(teacher.objective.projection.logits.detach(), kept)


@pytest.mark.parametrize("learnable", [False, True])
def test_an_interrupted_run_goes_on_as_if_it_had_not(tmp_path, student_tok, teacher_tok, examples, learnable, threads):
    """The same losses, to the last digit, with accumulation, dynamic scaling and dropped-in W."""
    options = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear",
    }  # fmt: skip

    def trainer(folder: str) -> XTokenTrainer:
        teacher = make_teacher(student_tok, teacher_tok, learnable=learnable)
        return make_trainer(tmp_path / folder, student_tok, [teacher], examples, **options)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name in ("loss", "ce", "kd", "kd_scale"):
        assert logged(resumed, name) == logged(whole, name)
    assert len(logged(resumed, "ce")) == 6
    for (name, got), want in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, want), name


def test_samples_without_chunks(tmp_path, student_tok, teacher_tok, examples):
    """Some, and then all: cross-entropy goes on, and nothing becomes NaN."""
    none = [{**one, "teachers": [{**one["teachers"][0], "spans": []}]} for one in examples]
    teacher = make_teacher(student_tok, teacher_tok)
    mixed = make_trainer(tmp_path, student_tok, [teacher], none[:2] + examples[2:8], max_steps=4)
    mixed.train()
    assert min(logged(mixed, "kd")) >= 0
    alone = make_trainer(
        tmp_path, student_tok, [teacher], none[:8], none[:4], max_steps=4, gradient_accumulation_steps=2
    )
    alone.train()
    assert logged(alone, "kd") == [0.0] * 4
    assert logged(alone, "loss") == pytest.approx(logged(alone, "ce"), rel=1e-5)
    assert logged(alone, "ce")[-1] < logged(alone, "ce")[0]
    assert alone.evaluate()["eval_kd"] == 0


def test_a_step_without_chunks_does_not_switch_distillation_off(
    tmp_path, student_tok, teacher_tok, examples, monkeypatch
):
    """The factor of the next step is that of the last step that had chunks."""
    none = [{**one, "teachers": [{**one["teachers"][0], "spans": []}]} for one in examples]
    data = [*none[:2], *examples[2:4], *none[4:8], *examples[8:12]]
    trainer = make_trainer(
        tmp_path, student_tok, [make_teacher(student_tok, teacher_tok)], data, max_steps=3,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_scale=math.inf,
    )  # fmt: skip
    monkeypatch.setattr(trainer, "_get_train_sampler", lambda *_: torch.utils.data.SequentialSampler(data))
    trainer.train()
    scales, kd, ce = (logged(trainer, name) for name in ("kd_scale", "kd", "ce"))
    assert kd[1] == 0
    assert scales[1] == scales[2] == pytest.approx(ce[0] / kd[0], rel=1e-5)


def test_the_bound_of_the_factor_is_told_once(tmp_path, student_tok, teacher_tok, examples, monkeypatch, caplog):
    """And the logged loss moves with KD whatever the factor is."""
    monkeypatch.setattr("xtoken.train.trainer.TOLD_AFTER", 3)
    trainers = [
        make_trainer(
            tmp_path, student_tok, [make_teacher(student_tok, teacher_tok)], examples, max_steps=8, logging_steps=2,
            gradient_accumulation_steps=2, per_device_train_batch_size=2, kd_weight=0.5, **options,
        )
        for options in ({"max_scale": 0.01}, {"max_scale": math.inf}, {"scaling": "fixed"})
    ]  # fmt: skip
    for trainer, told in zip(trainers, (1, 0, 0), strict=True):
        caplog.clear()
        trainer.train()
        messages = [one.getMessage() for one in caplog.records if "max_scale" in one.getMessage()]
        assert (
            messages
            == ["in 4 of 4 steps CE / |KD| was larger than max_scale=0.01, so that the loss was CE + 0.01 KD"] * told
        )
        for name in ("loss", "kd_scale"):
            assert len(logged(trainer, name)) == 4
        want = [ce + 0.5 * kd for ce, kd in zip(logged(trainer, "ce"), logged(trainer, "kd"), strict=True)]
        assert logged(trainer, "loss") == pytest.approx(want, rel=1e-4)
    assert logged(trainers[0], "kd_scale") == pytest.approx([0.01] * 4)
    assert min(logged(trainers[1], "kd_scale")) > 4


def test_many_starts_left_out_are_told_once(tmp_path, student_tok, teacher_tok, examples, caplog):
    """With the remedy; the first index is of a teacher with other ids, so that hardly any two events agree."""
    plain = PieceIndex.build(student_tok, teacher_tok, texts=())
    vocabulary = Vocabulary.from_tokenizer(teacher_tok)
    turned = Vocabulary([vocabulary[i - 1] for i in range(len(vocabulary))])
    other = PieceIndex(PieceIndex.build(student_tok, turned).data)
    for pieces, names in (([other], ["a"]), ([plain], ["a"]), ([plain, other], ["a", "b"])):
        caplog.clear()
        teachers = [
            TeacherModel(
                Teacher(loss=DEFAULT[Needs.PIECES], pieces=one), make_model(len(teacher_tok), 1), teacher_tok, name
            )
            for one, name in zip(pieces, names, strict=True)
        ]
        rows = [{**row, "teachers": row["teachers"] * len(names)} for row in examples[:8]]
        trainer = make_trainer(tmp_path, student_tok, teachers, rows, max_steps=3)
        trainer.train()
        told = [one.getMessage() for one in caplog.records if "different events" in one.getMessage()]
        names = ["starts_left_out"] if len(names) == 1 else [f"starts_left_out/{name}" for name in names]
        shares = [logged(trainer, name) for name in names]
        assert [min(share) > 0.5 for share in shares] == [one is other for one in pieces]
        assert all(share == [0.0] * 3 for share, one in zip(shares, pieces, strict=True) if one is plain)
        assert len(told) == (other in pieces)
        for message in told:
            assert message.startswith(f"{'ab'[pieces.index(other)]}: {100 * shares[pieces.index(other)][0]:.1f} % of")
            assert message.endswith("texts=[*xtoken.sample_texts(student, teacher), *own]")


def test_teachers_that_tell_nothing_are_told_once(tmp_path, student_tok, teacher_tok, examples, caplog):
    """As one whose log-probabilities list none of the tokens that are compared."""
    model = make_model(len(teacher_tok), 1)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    projection = ProjectionMatrix.build(student_tok, teacher_tok)
    teacher = TeacherModel(Teacher(projection), model, teacher_tok, "a")
    trainer = make_trainer(tmp_path, student_tok, [teacher], examples[:8], max_steps=2)
    trainer.train()
    told = [one.getMessage() for one in caplog.records if "uniform distribution" in one.getMessage()]
    assert [one[:20] for one in told] == ["a: in 100.0 % of the"]
    assert logged(trainer, "teacher_flat") == [1.0] * 2


def spoil(model: Any, student_tok: Any) -> None:
    """NaN for whatever follows token 5."""
    forward = model.forward

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits.clone()
        outputs.logits[1, 2] = math.nan
        return outputs

    model.forward = spoiled


def test_logits_that_are_not_numbers(tmp_path, student_tok, teacher_tok, examples):
    teacher = make_teacher(student_tok, teacher_tok, name="T")
    trainer = make_trainer(tmp_path, student_tok, [teacher], examples, examples[:4])
    spoil(teacher.model, student_tok)
    with pytest.raises(ValueError, match=r"T: logits are not a number at step 1, first in sample 1 at position 2"):
        trainer.train()
    with pytest.raises(ValueError, match=r"T: logits are not a number at evaluation"):
        trainer.evaluate()
    trainer = make_trainer(tmp_path, student_tok, [make_teacher(student_tok, teacher_tok)], examples, max_steps=3)
    trainer.train()
    spoil(trainer.model, student_tok)
    with pytest.raises(ValueError, match=r"student: logits are not a number at step 1"):
        trainer.train()


def test_a_loss_that_is_not_finite(tmp_path, student_tok, teacher_tok, examples):
    teacher = make_teacher(student_tok, teacher_tok, learnable=True)
    with torch.no_grad():
        teacher.objective.projection.logits.fill_(math.nan)
    trainer = make_trainer(tmp_path, student_tok, [teacher], examples)
    with pytest.raises(ValueError, match="loss: expected a finite number, got nan at step 1"):
        trainer.train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry, batch: entry.pop("input_ids"), "T: expected input_ids of its own tokenizer, got none"),
        (lambda entry, batch: entry.update(input_ids=batch["input_ids"]), "T: got the student's input_ids"),
        (
            lambda entry, batch: entry.update(input_ids=(entry["input_ids"] + 17) % 250),
            "T: expected chunks that spell the same text on both sides, but only",
        ),
        (lambda entry, batch: entry["input_ids"].fill_(699), r"T: expected input_ids below \d+, got 699"),
        (lambda entry, batch: batch["teachers"].append(entry), "teachers: expected 1 in a batch, got 2"),
    ],
)  # fmt: skip
def test_a_teacher_is_not_fed_the_students_ids(tmp_path, student_tok, teacher_tok, examples, change, message):
    trainer = make_trainer(tmp_path, student_tok, [make_teacher(student_tok, teacher_tok, name="T")], examples)

    def spoiled(items: Any) -> Any:
        batch = collate(items)
        change(batch["teachers"][0], batch)
        return batch

    trainer.data_collator = spoiled
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_bad_arguments(tmp_path, student_tok, teacher_tok):
    model, teacher = make_model(700, 0), make_teacher(student_tok, teacher_tok)
    with pytest.raises(TypeError, match="args: expected an XTokenConfig, got TrainingArguments"):
        XTokenTrainer(model, TrainingArguments(output_dir=str(tmp_path), report_to="none"), [teacher])
    config = make_config(tmp_path)
    config._n_gpu = 2
    with pytest.raises(ValueError, match="args: expected one device a process, got 2 for DataParallel"):
        XTokenTrainer(model, config, [teacher])
    with pytest.raises(ValueError, match="student: expected an output layer of at least 700 rows"):
        XTokenTrainer(make_model(699, 0), make_config(tmp_path), [teacher], processing_class=student_tok)
    with pytest.raises(
        ValueError, match=r"teachers: expected a name of its own for each, got \['teacher', 'teacher'\]"
    ):
        XTokenTrainer(model, make_config(tmp_path), [teacher, teacher])
    other = make_teacher(student_tok, None, name="other")
    with pytest.raises(ValueError, match="teacher_mode: expected teachers with one tokenizer for 'average', but"):
        make_trainer(tmp_path, student_tok, [teacher, other], None, teacher_mode="average")


def test_deepspeed_in_fp16_cannot_train_projections(tmp_path, student_tok, teacher_tok, monkeypatch):
    scales = XTokenTrainer._scales_gradients

    def trainer(**config: Any) -> Any:
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
        return SimpleNamespace(is_deepspeed_enabled=True, accelerator=SimpleNamespace(state=state))

    assert [scales(trainer(fp16={"enabled": value})) for value in (True, False)] == [True, False]
    assert not scales(trainer(bf16={"enabled": True}))
    monkeypatch.setattr(XTokenTrainer, "_scales_gradients", lambda self: True)
    make_trainer(tmp_path, student_tok, [make_teacher(student_tok, teacher_tok)], None)
    teachers = [make_teacher(student_tok, teacher_tok, learnable=True)]
    with pytest.raises(ValueError, match="teachers: expected projections without trainable weights for DeepSpeed in"):
        make_trainer(tmp_path, student_tok, teachers, None)


def test_average_wants_the_same_ids(tmp_path, student_tok, teacher_tok, twins):
    teachers = [make_teacher(student_tok, teacher_tok, k, name=str(k)) for k in (1, 2)]
    mixed = [{**one, "teachers": [one["teachers"][0], other["teachers"][1]]} for one, other in pairwise(twins)]
    trainer = make_trainer(tmp_path, student_tok, teachers, None, mixed[:4], teacher_mode="average")
    trainer._unchecked.clear()
    with pytest.raises(ValueError, match="teacher_mode: expected 'average' teachers to read the same ids"):
        trainer.evaluate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "static"}, "scaling: expected one of 'dynamic', 'fixed', got 'static'"),
        ({"teacher_mode": "vote"}, "teacher_mode: expected one of 'sum', 'select', 'average', 'entropy', got 'vote'"),
        ({"remove_unused_columns": True}, "remove_unused_columns: expected False"),
    ],
)
def test_bad_config(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        XTokenConfig(output_dir=str(tmp_path), **options)


def test_a_twin_with_another_template(tmp_path, student_tok):
    """A teacher with the student's tokenizer but ids of its own is compared where both cut the text alike."""
    pair = encode(SMALL_TEXTS[:4], student_tok, student_tok)
    for one in pair:  # as if a chunk in the middle were cut differently
        spans = one["teachers"][0]["spans"].clone()
        spans[2, 1], spans[2, 3] = spans[3, 1], spans[3, 3]
        one["teachers"][0]["spans"] = torch.cat([spans[:3], spans[4:]])
    trainer = make_trainer(tmp_path, student_tok, [make_teacher(student_tok, None)], None, pair)
    got = trainer.evaluate()
    assert got["eval_chunks"] == sum(len(one["teachers"][0]["spans"]) - 2 for one in pair)
    assert got["eval_kd"] > 0
