"""TRL's GOLDTrainer with a loss of xtoken; skipped where that trainer cannot be imported."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from default_losses import DEFAULT
from small import make_model, make_tokenizer

from xtoken import Aligner, PieceIndex, Teacher, Vocabulary, XTokenLoss, choose_loss
from xtoken.integrations.trl import GOLDLoss, replace_loss
from xtoken.losses import Needs

STUDENT = Vocabulary([b"<s>", b"In", b" ", b"199", b"5", b"ok", b"</s>"], roles={"bos": 0, "eos": 6})
TEACHER = Vocabulary([b"In", b" ", b"1", b"5", b"9", b"ok", b"<s>", b"</s>"], roles={"bos": 6, "eos": 7})
STUDENT_IDS = torch.tensor([[0, 1, 2, 3, 2, 5, 6], [1, 2, 3, 4, 6, 6, 6]])  # "<s>In 199 ok</s>", "In 1995</s>"
TEACHER_IDS = torch.tensor([[6, 0, 1, 2, 4, 4, 1, 5, 7], [0, 1, 2, 4, 4, 3, 7, 7, 7]])


def labels(ids: torch.Tensor, *regions: tuple[int, int]) -> torch.Tensor:
    wanted = torch.full_like(ids, -100)
    for row, (first, last) in enumerate(regions):
        wanted[row, first:last] = ids[row, first:last]
    return wanted


@pytest.mark.parametrize("skipped", [(None, None), (6, 7)], ids=["ends", "without-ends"])
def test_completions_alone_are_compared(skipped):
    pieces = PieceIndex.build(STUDENT, TEACHER)
    criterion = XTokenLoss([Teacher(pieces=pieces)], "fixed", 0.5, 2.0)
    loss = GOLDLoss(criterion, Aligner(STUDENT, TEACHER), (6, 7), skipped)
    wanted = labels(STUDENT_IDS, (4, 7), (2, 5)), labels(TEACHER_IDS, (6, 9), (2, 7))
    torch.manual_seed(0)
    z, y = torch.randn(2, 7, 7, requires_grad=True), torch.randn(2, 9, 8)
    total = loss(z, y, *wanted, STUDENT_IDS, TEACHER_IDS, student_byte_offsets=None, teacher_byte_offsets=None)
    (grad,) = torch.autograd.grad(total, z)

    ce = torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), wanted[0][:, 1:].flatten())
    masks = torch.tensor([[1] * 7, [1] * 5 + [0] * 2]), torch.tensor([[1] * 9, [1] * 7 + [0] * 2])
    alignment = Aligner(STUDENT, TEACHER).align(STUDENT_IDS, TEACHER_IDS, *masks)
    chunks = [
        (tuple(span), sample) for span, sample in zip(alignment.spans.tolist(), alignment.sample_index, strict=True)
    ]
    ends = 0 if skipped[0] is None else 1
    kept = [a >= (4, 2)[sample] and b <= (7, 5)[sample] - ends for (a, b, _, _), sample in chunks]
    assert sum(kept) == 6 - 2 * ends
    alignment.predicted = torch.tensor(kept)
    kd, _ = XTokenLoss([Teacher(pieces=pieces)], "fixed", 0.0)(z, STUDENT_IDS, y, alignment)
    torch.testing.assert_close(total, 0.5 * ce + 2.0 * kd)
    torch.testing.assert_close(loss.parts["kd"], kd.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(0.5 * ce + 2.0 * kd, z)[0])


def test_columns_of_no_token_take_no_part():
    """Those with which a teacher's output layer is filled up."""
    criterion = XTokenLoss([Teacher(loss=DEFAULT[Needs.NOTHING])], "fixed", vocab_size=len(STUDENT))
    loss = GOLDLoss(criterion, Aligner(STUDENT, TEACHER), (6, 7))
    torch.manual_seed(0)
    z, y = torch.randn(2, 7, 10), torch.randn(2, 9, 11)
    totals = [loss(z, one, STUDENT_IDS, TEACHER_IDS, STUDENT_IDS, TEACHER_IDS) for one in (y, y[..., :8])]
    assert totals[0] == totals[1]


def test_trainers_without_a_loss_to_replace():
    with pytest.raises(ValueError, match="trainer: expected a GOLDTrainer made with use_uld_loss=True"):
        replace_loss(SimpleNamespace(uld_loss_fn=None, teacher_tokenizer=object()))
    args = SimpleNamespace(uld_student_temperature=2.0, uld_teacher_temperature=1.0)
    with pytest.raises(ValueError, match=r"uld_student_temperature: .* got 2\.0 and 1\.0"):
        replace_loss(
            SimpleNamespace(uld_loss_fn=object(), teacher_tokenizer=object(), processing_class=object(), args=args)
        )


TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.filterwarnings("ignore")  # those of TRL
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["off-policy", "on-policy"])
def test_gold_trainer_trains(share, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        datasets, gold = importlib.import_module("datasets"), importlib.import_module("trl.experimental.gold")
    except ImportError as error:
        pytest.skip(f"TRL's GOLDTrainer cannot be imported: {error}")
    student_tok, teacher_tok = make_tokenizer(1400, "{1,3}", "<s>"), make_tokenizer(500, "", "<s>")
    for tokenizer in (student_tok, teacher_tok):
        tokenizer.chat_template = TEMPLATE
    teacher_tok.save_pretrained(tmp_path / "teacher")
    chat = [{"role": "user", "content": "In 1995?"}, {"role": "assistant", "content": "In 1995, 230 readers paid."}]
    args = gold.GOLDConfig(
        output_dir=str(tmp_path), use_uld_loss=True, teacher_tokenizer_name_or_path=str(tmp_path / "teacher"),
        lmbda=share, max_completion_length=8, max_length=64, max_steps=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=1, learning_rate=0.01, warmup_steps=0, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no",
    )  # fmt: skip
    student, teacher = make_model(len(student_tok), 0), make_model(len(teacher_tok), 1)
    trainer = gold.GOLDTrainer(
        student, teacher_model=teacher, args=args, processing_class=student_tok,
        train_dataset=datasets.Dataset.from_list([{"messages": chat}] * 8),
    )  # fmt: skip
    choice = replace_loss(trainer)
    before = student.lm_head.weight.detach().clone()
    trainer.train()
    assert choice.loss == choose_loss(student_tok, teacher_tok).loss
    assert trainer.uld_loss_fn.parts["chunks"] > 0
    assert trainer.uld_loss_fn.parts["kd"] > 0
    assert not torch.equal(student.lm_head.weight, before)
