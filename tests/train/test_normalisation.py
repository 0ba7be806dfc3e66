"""However a batch is cut into micro-batches, its gradient is the same; `test_processes` has it over processes."""

from __future__ import annotations

from typing import Any

import pytest
from small import SMALL_TEXTS, assert_same, cut, encode, make_teacher, make_trainer, run_one_step, two_teachers

CUTS = [(8, 1), (4, 2), (2, 4)]


@pytest.fixture(scope="module")
def examples(student_tok, teacher_tok) -> Any:
    return encode(SMALL_TEXTS[:8], student_tok, teacher_tok, None)


def test_micro_batches(tmp_path, student_tok, teacher_tok, examples):
    """1 x 8, 2 x 4 and 4 x 2 examples; labels and chunks differ between the examples."""
    whole, *rest = [
        run_one_step(
            tmp_path, student_tok, two_teachers(student_tok, teacher_tok, learnable=True), examples, scaling="fixed",
            **cut(*sizes),
        )
        for sizes in CUTS
    ]  # fmt: skip
    assert float(whole["W0"].abs().max()) > 0
    for one in rest:
        assert_same(one, whole)


def test_dynamic_scaling_is_one_factor_a_step(tmp_path, student_tok, teacher_tok, examples):
    """Steps 2, 3, ... take the ratio of the step before, whatever the cut."""
    teachers = [make_teacher(student_tok, teacher_tok)]
    scales = {}
    for size, accumulated in [(8, 1), (4, 2), (2, 4)]:
        trainer = make_trainer(
            tmp_path, student_tok, teachers, [{**one, "teachers": one["teachers"][:1]} for one in examples],
            max_steps=3, optim="sgd", learning_rate=1e-9, lr_scheduler_type="constant", max_scale=100.0,
            **cut(size, accumulated),
        )  # fmt: skip
        trainer.train()
        scales[size] = [one["kd_scale"] for one in trainer.state.log_history if "kd_scale" in one]
        ratios = [one["ce"] / one["kd"] for one in trainer.state.log_history if "kd_scale" in one]
    # The model hardly changes, so all ratios are the same but that of the first micro-batch.
    assert scales[8] == pytest.approx([ratios[0]] * 3, rel=1e-5)
    for size in (4, 2):
        assert scales[size][0] != pytest.approx(ratios[0], rel=1e-5)
        assert scales[size][1:] == pytest.approx([ratios[0]] * 2, rel=1e-5)


def test_the_factor_after_a_short_step(tmp_path, student_tok, teacher_tok, examples):
    """The last step of an epoch, of one micro-batch, hands on its own ratio too."""
    trainer = make_trainer(
        tmp_path, student_tok, [make_teacher(student_tok, teacher_tok)],
        [{**one, "teachers": one["teachers"][:1]} for one in examples[:3]], max_steps=3, max_scale=100.0, **cut(1, 2),
    )  # fmt: skip
    trainer.train()
    first, short, third = (one for one in trainer.state.log_history if "kd_scale" in one)
    assert short["kd_scale"] == pytest.approx(short["ce"] / short["kd"], rel=1e-4)
    assert third["kd_scale"] == pytest.approx(short["kd_scale"], rel=1e-4)
    assert third["kd_scale"] != pytest.approx(first["ce"] / first["kd"], rel=1e-4)
