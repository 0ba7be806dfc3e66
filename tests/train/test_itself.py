"""The student as its own teacher: frozen or a moving average, of other prompts, and going on after an interruption."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparer import assert_close
from safetensors.torch import load_file, save_file
from small import SMALL_TEXTS, make_config, make_model
from transformers import Trainer, TrainerCallback

from xtoken.train import TeacherModel, XTokenTrainer

ROWS = [{"text": text} for text in SMALL_TEXTS[:8]]
TURNS = [{"role": "user", "content": "How many in 1999?"}, {"role": "assistant", "content": "There were 113 readers."}]


class Weights(TrainerCallback):
    """Copies of the student's weights after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(copied(kwargs["model"]))


def copied(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def make_trainer(folder: Any, tok: Any, teacher: TeacherModel, model: Any = None, **options: Any) -> XTokenTrainer:
    model = make_model(len(tok), 0, 16) if model is None else model
    options = {"scaling": "fixed", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, **options}
    return XTokenTrainer(model, make_config(folder, **options), [teacher], None, ROWS, ROWS[:4], tok)


def test_a_frozen_copy_stays(tmp_path, student_tok):
    """Nothing to learn from at first; then it is the student's beginning, whose losses are computed anew here."""
    teacher = TeacherModel.of_student()
    trainer = make_trainer(tmp_path, student_tok, teacher, save_strategy="no")
    start = copied(trainer.model)
    assert trainer.evaluate()["eval_kd"] == pytest.approx(0.0, abs=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_kd"] > 1e-3
    assert teacher.vocabulary is not None
    for name, one in teacher.model.named_parameters():
        assert not one.requires_grad
        assert torch.equal(one, start[name])
        assert not torch.equal(one, trainer.model.get_parameter(name))


def averaged(start: dict[str, torch.Tensor], after: list[dict[str, torch.Tensor]], share: float) -> Any:
    """By hand, in double precision."""
    found = {name: one.double() for name, one in start.items()}
    for weights in after:
        found = {name: share * one + (1 - share) * weights[name].double() for name, one in found.items()}
    return found


def test_a_moving_average(tmp_path, student_tok):
    """After each step of the optimizer, not of each micro-batch; and the same after an interruption."""
    logs = []
    for name, start_at in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-2")):
        teacher = TeacherModel.of_student(average=0.75, name="ema")
        kept = Weights()
        trainer = make_trainer(
            tmp_path / name, student_tok, teacher, gradient_accumulation_steps=2, per_device_train_batch_size=2
        )
        start = copied(trainer.model)
        trainer.add_callback(kept)
        trainer.train(resume_from_checkpoint=None if start_at is None else str(start_at))
        logs.append(
            [[one[key] for key in ("loss", "ce", "chunks")] for one in trainer.state.log_history if "ce" in one]
        )
        if name == "whole":
            assert len(kept.after) == 4
            want = averaged(start, kept.after, 0.75)
            for key, one in teacher.model.named_parameters():
                assert_close(one.double(), want[key], rtol=1e-5, atol=1e-7, what=key)
    assert logs[0] == logs[1]
    saved = [load_file(tmp_path / name / "checkpoint-4" / "teacher-ema.safetensors") for name in ("whole", "resumed")]
    assert saved[0].keys() == saved[1].keys() == want.keys()
    for key, one in saved[0].items():
        assert torch.equal(one, saved[1][key])


def test_small_steps_of_16_bits_are_not_lost(tmp_path, student_tok):
    """The average is kept in 32 bits, and the model has it rounded."""
    model = make_model(len(student_tok), 0, 16).bfloat16()
    teacher = TeacherModel.of_student(average=0.999)
    make_trainer(tmp_path, student_tok, teacher, model)
    start, moved = copied(model), copy.deepcopy(model)
    with torch.no_grad():
        for one in moved.parameters():
            one.add_(0.0625)
    for _ in range(100):
        teacher.step(moved)  # type: ignore[attr-defined]
    want = averaged(start, [copied(moved)] * 100, 0.999)
    for key, one in teacher.model.named_parameters():
        assert one.dtype == torch.bfloat16
        assert_close(one.double(), want[key], rtol=4e-3, atol=1e-5, what=key)
        assert not torch.equal(one, start[key])


def test_a_checkpoint_without_the_average(tmp_path, student_tok):
    make_trainer(tmp_path, student_tok, TeacherModel.of_student(), max_steps=2).train()
    path = str(tmp_path / "checkpoint-2")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .* has no teacher-self\.safetensors, the mov"):
        make_trainer(tmp_path, student_tok, TeacherModel.of_student(average=0.5)).train(path)
    save_file({"other": torch.zeros(1)}, tmp_path / "other" / "teacher-self.safetensors")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*safetensors has the weights of another model"):
        TeacherModel.of_student(average=0.5).load(tmp_path / "other", None, True)  # type: ignore[attr-defined]
    teacher = TeacherModel.of_student(average=0.5)
    trainer = make_trainer(tmp_path, student_tok, teacher, resume_weights_only=True, max_steps=2)
    trainer.train(path)  # which is the end of its run
    for name, one in teacher.model.named_parameters():
        assert torch.equal(one, trainer.model.get_parameter(name))


def test_refused(tmp_path, student_tok, monkeypatch):
    for wrong in (1.0, -0.1, 2.0):
        with pytest.raises(ValueError, match=r"average: expected a number in \[0, 1\), or None for the first weights"):
            TeacherModel.of_student(average=wrong)
    monkeypatch.setattr("transformers.Trainer.create_accelerator_and_postprocess", _with_fsdp)
    with pytest.raises(ValueError, match="teachers: expected none of the student itself with FSDP or DeepSpeed"):
        make_trainer(tmp_path, student_tok, TeacherModel.of_student())


def _with_fsdp(self: Any, make: Any = Trainer.create_accelerator_and_postprocess) -> None:
    make(self)
    self.is_fsdp_enabled = True


def test_context_distillation(tmp_path, small_chat_tok):
    """The frozen copy is told more than the student, so there is something to learn at once."""
    tok = small_chat_tok("qwen3")
    rows = [{"messages": TURNS}] * 4
    teacher = TeacherModel.of_student(system="The answer is 113.")
    args = make_config(tmp_path, max_steps=12, ce_weight=0.0, scaling="fixed", learning_rate=1e-4)
    model = make_model(len(tok), 0, 16)
    with torch.no_grad():  # which then tells more of what it has read
        model.lm_head.weight.mul_(100)
    trainer = XTokenTrainer(model, args, [teacher], None, rows, rows, tok)
    before = trainer.evaluate()["eval_kd"]
    trainer.train()
    assert trainer.evaluate()["eval_kd"] < 0.5 * before
    assert before > 1e-2


@pytest.mark.parametrize("average", [None, 0.5])
def test_adapters(tmp_path, student_tok, average):
    """The teacher is the student without its adapters, which shares its weights; or has a moving average of them."""
    peft = pytest.importorskip("peft")
    base = make_model(len(student_tok), 0, 16)
    want = copied(base)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.5)
    model = peft.get_peft_model(base, config)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    teacher = TeacherModel.of_student(average=average)
    trainer = make_trainer(tmp_path, student_tok, teacher, model, learning_rate=0.1, save_steps=4)
    assert trainer.evaluate()["eval_kd"] == pytest.approx(0.0, abs=1e-6)
    kept = Weights()
    trainer.add_callback(kept)
    start = copied(model)
    trainer.train()
    assert trainer.evaluate()["eval_kd"] > 1e-5
    assert {name for name, one in model.named_parameters() if one.requires_grad} == trained
    file = tmp_path / "checkpoint-4" / "teacher-self.safetensors"
    if average is not None:
        by_hand = averaged(start, kept.after, average)
        saved = load_file(file)
        assert saved.keys() == trained
        for name, one in saved.items():
            assert_close(one.double(), by_hand[name], rtol=1e-5, atol=1e-7, what=name)
        return
    assert teacher.model is trainer.model
    assert not file.exists()
    plain = make_model(len(student_tok), 1, 16)
    plain.load_state_dict(want)
    ids = torch.arange(3, 12)[None]
    got = teacher.logits({}, {"input_ids": ids})
    assert isinstance(got, torch.Tensor)
    with torch.no_grad():
        assert_close(got, plain(ids).logits, rtol=1e-5, atol=1e-6)
