"""`--self_test`: a run whose losses are wrong on its device does not begin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import SMALL_TEXTS, encode, make_config, make_teacher, make_trainer
from torch import Tensor

from xtoken.losses import cpu
from xtoken.losses.backends import Kernel, register_backend, unregister_backend


@pytest.fixture(scope="module")
def examples(student_tok, teacher_tok) -> Any:
    return encode(SMALL_TEXTS[:4], student_tok, teacher_tok, None)


@pytest.fixture
def wrong_kernels() -> Iterator[list[torch.dtype]]:
    """Those of the CPU, with a gradient that is off by a thousandth; the types that they were called with."""
    right, types = cpu.backend(), []

    def kernel(loss: str) -> Kernel | None:
        known = right.kernel(loss)
        if known is None:
            return None

        def run(problem: Any, student_grad: Tensor | None = None, *rest: Any) -> Tensor:
            types.append(problem.student.dtype)
            losses = known.run(problem, student_grad, *rest)
            if student_grad is not None:
                student_grad *= 1.001
            return losses

        return known._replace(run=run)

    register_backend(replace(right, name="planted", kernel=kernel))
    yield types
    unregister_backend("planted")


def trainer_of(tmp_path, student_tok, teacher_tok, examples, **options):
    teachers = [
        make_teacher(student_tok, teacher_tok, learnable=True, name="other", temperature=1.5),
        make_teacher(student_tok, None, 2, name="twin"),
    ]
    return make_trainer(tmp_path, student_tok, teachers, examples, max_steps=1, **options)


def test_a_wrong_loss_stops_the_run(tmp_path, student_tok, teacher_tok, examples, wrong_kernels):
    trainer = trainer_of(tmp_path, student_tok, teacher_tok, examples, self_test="on")
    with pytest.raises(RuntimeError) as error:
        trainer.train()
    assert trainer.state.global_step == 0
    message = str(error.value)
    assert message.startswith("self_test: expected losses that agree with float64, got\nWRONG: ")
    assert "with XTokenLoss, float32, backend 'planted': gradient, row " in message
    assert "with trained W, float32" in message
    assert "xtoken check tells more" in message
    assert "of 3 calls are wrong (cpu, 16 rows" in message


@pytest.mark.parametrize("self_test", ["auto", "off"])
def test_it_is_for_gpus_unless_it_is_asked_for(tmp_path, student_tok, teacher_tok, examples, wrong_kernels, self_test):
    trainer = trainer_of(tmp_path, student_tok, teacher_tok, examples, self_test=self_test)
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_types_of_the_run_are_tested(tmp_path, student_tok, teacher_tok, examples, wrong_kernels, monkeypatch):
    trainer = trainer_of(tmp_path, student_tok, teacher_tok, examples, self_test="on")
    trainer.args.bf16 = True
    report_of = []
    monkeypatch.setattr("xtoken.train.trainer.check_lessons", lambda *given: report_of.append(given[0]) or _nothing())
    trainer._check_losses()
    types = [lesson.dtypes for lesson in report_of[0]]
    assert types == [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)] * 2
    assert report_of[0][0].widths == (len(student_tok), len(teacher_tok))
    assert report_of[0][3].widths == (len(student_tok), len(student_tok))


def _nothing():
    from xtoken.check import CheckReport

    return CheckReport("cpu")


def test_what_is_right_trains(tmp_path, student_tok, teacher_tok, examples, caplog):
    trainer = trainer_of(tmp_path, student_tok, teacher_tok, examples, self_test="on")
    with caplog.at_level("INFO", "xtoken.train.trainer"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert "self_test: all 3 calls agree with float64 (cpu, 16 rows" in caplog.text


def test_without_memory_it_is_left_out(tmp_path, student_tok, teacher_tok, examples, monkeypatch, caplog):
    def check_lessons(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("xtoken.train.trainer.check_lessons", check_lessons)
    trainer_of(tmp_path, student_tok, teacher_tok, examples, self_test="on")._check_losses()
    assert "self_test: left out, since cpu has too little memory left for it" in caplog.text


def test_an_unknown_word_is_refused(tmp_path):
    with pytest.raises(ValueError, match="self_test: expected one of 'auto', 'on', 'off', got 'never'"):
        make_config(tmp_path, self_test="never")
