"""XTokenTrainer: steps, exact normalisation, metrics, checkpoints, guards."""

from __future__ import annotations

from small import encode, make_teacher, make_trainer


def test_trains(tmp_path, student_tok, teacher_tok, texts):
    examples = encode(texts, student_tok, teacher_tok)
    teacher = make_teacher(student_tok, teacher_tok)
    trainer = make_trainer(tmp_path, student_tok, [teacher], examples[:16], examples[16:], max_steps=8)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    print(before, after)
    print(trainer.state.log_history)
    assert after["eval_ce"] < before["eval_ce"]
    assert after["eval_kd"] < before["eval_kd"]
