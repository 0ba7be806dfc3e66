"""What a model can take: positions, and ids that it has rows for."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from comparer import assert_close
from default_losses import DEFAULT
from small import SMALL_TEXTS, collate, encode, make_config, make_model, make_tokenizer, make_trainer

from xtoken import Aligner, LinearLogits, PieceIndex, ProjectionMatrix, Teacher, Vocabulary, XTokenLoss
from xtoken.losses import Needs, registered
from xtoken.train import TeacherModel, XTokenCollator, XTokenTrainer
from xtoken.train.limits import Limits, check_head, most_positions

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def toks() -> Any:
    """A student's and a teacher's tokenizer, each with a special token that its model has no row for."""
    made = make_tokenizer(300, "{1,3}", "<s>"), make_tokenizer(280, "", "<|begin|>")
    return with_special(made, "<image_soft_token>", "<image_soft_token>")


def with_special(toks: Any, *tokens: str) -> Any:
    for one, token in zip(toks, tokens, strict=True):
        one.add_special_tokens({"additional_special_tokens": [token]})
    return toks


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32), 32),
        (transformers.LlamaConfig(vocab_size=50, **SMALL, max_position_embeddings=77), 77),
        (transformers.MptConfig(vocab_size=50, d_model=16, n_heads=2, n_layers=1, max_seq_len=64), 64),
        (transformers.RobertaConfig(vocab_size=50, **SMALL, max_position_embeddings=66, is_decoder=True), 64),
        (transformers.ProphetNetConfig(vocab_size=50, hidden_size=16, decoder_ffn_dim=16, num_decoder_layers=1,
                                       num_decoder_attention_heads=2, max_position_embeddings=66, is_decoder=True,
                                       is_encoder_decoder=False), 64),
        (transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2), None),
        (transformers.FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                   alibi=True), None),
        (transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4), None),
    ],
)  # fmt: skip
def test_most_positions(config, limit):
    """As long as that the model computes."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model(input_ids=torch.full((1, limit or 40), 3), use_cache=False)
    assert most_positions(model) == limit


def test_rows_that_are_too_long(tmp_path, toks):
    """Of a teacher and of the student, before the model sees them; of packed rows the longest example counts."""
    student_tok, _ = toks
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = transformers.AutoModelForCausalLM.from_config(config)
    teacher = TeacherModel(Teacher(loss=DEFAULT[Needs.NOTHING]), model, name="short")
    ids = torch.zeros(1, 40, dtype=torch.long)
    side: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    message = "short: expected rows of at most 32 tokens, the positions that it has by its configuration, got 40"
    for call in (teacher.logits, teacher.check_entry):
        with pytest.raises(ValueError, match=message):
            call(side, {"input_ids": ids.clone()})
    packed = {"input_ids": ids, "position_ids": torch.cat([torch.arange(25), torch.arange(15)])[None]}
    teacher.check_entry(packed, {"input_ids": ids.clone()})
    Limits(positions=25).check(packed, "T")
    with pytest.raises(ValueError, match=r"T: expected rows of at most 24 tokens.*got 25"):
        Limits(positions=24).check(packed, "T")
    examples = encode([SMALL_TEXTS[0] * 9], student_tok, None)
    teacher = TeacherModel(Teacher(), make_model(len(student_tok), 1), student_tok)
    trainer = make_trainer(tmp_path, student_tok, [teacher], None, examples)
    with pytest.raises(ValueError, match="student: expected rows of at most 256 tokens"):
        trainer.evaluate()


def test_a_head_without_special_tokens(toks):
    student_tok, _ = toks
    vocabulary = Vocabulary.from_tokenizer(student_tok)
    size = len(vocabulary)
    check_head(make_model(size - 1, 0), vocabulary, "T")
    with pytest.raises(
        ValueError, match=rf"T: expected an output layer of at least {size - 1} rows, one for each token"
    ):
        check_head(make_model(size - 2, 0), vocabulary, "T")
    assert Limits.of(make_model(size + 5, 0), vocabulary, "T").rows is None  # padded
    text = torch.tensor([[3, 4, size - 1]])
    limits = Limits.of(make_model(size - 1, 0), vocabulary, "T")
    with pytest.raises(
        ValueError, match=rf"T: expected token ids below {size - 1}.*got {size - 1} in sample 0 at posit"
    ):
        limits.check({"input_ids": text}, "T")
    side = {"input_ids": text, "attention_mask": torch.tensor([[1, 1, 0]])}
    limits.check(side, "T")
    assert limits.fit(side).tolist() == [[3, 4, size - 2]]
    padded = dataclasses.replace(limits, pad=size - 1)
    padded.check({"input_ids": text}, "T")
    assert padded.fit({"input_ids": text}).tolist() == [[3, 4, size - 2]]
    sharded = SimpleNamespace(weight=SimpleNamespace(shape=(0,), ds_shape=(size, 4)))
    check_head(SimpleNamespace(get_output_embeddings=lambda: sharded), vocabulary, "T")


def objectives(student_tok: Any, teacher_tok: Any) -> dict[str, Teacher]:
    """One of each loss for two tokenizers."""
    W, pieces = ProjectionMatrix.build(student_tok, teacher_tok), PieceIndex.build(student_tok, teacher_tok, texts=())
    given: dict[Needs, Any] = {Needs.PROJECTION: {"projection": W}, Needs.PIECES: {"pieces": pieces}, Needs.NOTHING: {}}
    made = {name: Teacher(loss=name, **given[one.needs]) for name, one in registered().items() if one.needs in given}
    also_diagnosed = (name for name, one in registered().items() if one.needs is Needs.NOTHING)
    return made | {f"{name} with W": Teacher(W, name) for name in also_diagnosed}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_losses_without_a_column_for_special_tokens(backend):
    """Loss and gradients are those with a column of -inf; also from hidden states. A token of text is refused."""
    made = make_tokenizer(300, "{1,3}", "<s>"), make_tokenizer(280, "", "<|begin|>")
    student_tok, teacher_tok = with_special(made, "<one>", "<other>")
    texts = SMALL_TEXTS[:2]
    batch = collate(encode(texts, student_tok, teacher_tok))
    theirs = batch["teachers"][0]["input_ids"]
    rows, columns = len(student_tok) - 1, len(teacher_tok) - 1
    torch.manual_seed(0)
    hidden = torch.randn(*batch["input_ids"].shape, 8, requires_grad=True)
    head = torch.randn(rows, 8, requires_grad=True)
    teacher_logits = torch.randn(*theirs.shape, columns)
    alignment = Aligner(student_tok, teacher_tok).align(
        list(batch["input_ids"]), list(theirs), list(batch["attention_mask"]),
        list(batch["teachers"][0]["attention_mask"]),
    )  # fmt: skip
    wide = torch.nn.functional.pad(teacher_logits, (0, 1), value=-torch.inf)
    for name, objective in objectives(student_tok, teacher_tok).items():
        if registered()[objective.loss].needs is Needs.NOTHING:  # takes as many columns as there are
            continue
        criterion = XTokenLoss([objective], backend=backend)
        found = []
        for student, teacher in (
            (hidden @ head.T, teacher_logits),
            (torch.nn.functional.pad(hidden @ head.T, (0, 1), value=-torch.inf), wide),
            (LinearLogits(hidden, head), LinearLogits(*_factors(teacher_logits))),
        ):
            total, parts = criterion(student, batch["labels"], teacher, alignment)
            found.append([total, *torch.autograd.grad(total, [hidden, head]), parts["agreement"]])
        for other in found[1:]:
            for got, want in zip(other, found[0], strict=True):
                assert_close(got, want, rtol=1e-4, atol=1e-5, what=name)
        with pytest.raises(ValueError, match=f"student_logits: expected at least {rows + 1} columns"):
            criterion(hidden @ head[:-1].T, batch["labels"], teacher_logits, alignment)
        # W does not reach every token of text, but the text has them.
        message = (
            f"teacher_logits: expected at least {columns + 1} columns|expected teacher ids below {columns - 1}, the"
        )
        with pytest.raises(ValueError, match=message):
            criterion(hidden @ head.T, batch["labels"], teacher_logits[..., :-1], alignment)
        labels = batch["labels"].clone()
        labels[0, 2] = rows
        with pytest.raises(ValueError, match=f"labels: expected token ids below {rows}, the columns of student_logits"):
            criterion(hidden @ head.T, labels, teacher_logits, alignment)


def _factors(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and an output layer of which they are the product."""
    flat = logits.flatten(0, 1)
    return torch.eye(len(flat)).view(*logits.shape[:2], -1), flat.T.contiguous()


def test_training_with_heads_that_lack_special_tokens(tmp_path, toks):
    """It trains, and an id that a model has no row for stops it."""
    student_tok, teacher_tok = toks
    examples = encode(SMALL_TEXTS[:8], student_tok, teacher_tok, None)
    collator = XTokenCollator(student_tok, [teacher_tok, student_tok])
    for name, objective in objectives(student_tok, teacher_tok).items():
        teachers = [
            TeacherModel(objective, make_model(len(teacher_tok) - 1, 1), teacher_tok, "T"),
            TeacherModel(Teacher(), make_model(len(student_tok) + 3, 2), student_tok, "twin"),
        ]
        trainer = make_trainer(tmp_path, student_tok, teachers, examples, examples[:2], max_steps=1)
        trainer.model = trainer.model_wrapped = make_model(len(student_tok) - 1, 0)
        trainer = type(trainer)(
            trainer.model, trainer.args, teachers, collator, examples, examples[:2], processing_class=student_tok
        )
        trainer.train()
        assert trainer.evaluate()["eval_kd"] > 0, name
    spoiled = [{**one, "teachers": [dict(entry) for entry in one["teachers"]]} for one in examples[:2]]
    spoiled[1]["teachers"][0]["ids"] = [*spoiled[1]["teachers"][0]["ids"], len(teacher_tok) - 1]
    with pytest.raises(ValueError, match=rf"T: expected token ids below {len(teacher_tok) - 1}, the rows of its outp"):
        trainer.evaluate(spoiled)
    spoiled = [{**examples[0], "student_ids": [*examples[0]["student_ids"], len(student_tok) - 1],
                "labels": [*examples[0]["labels"], -100]}]  # fmt: skip
    with pytest.raises(ValueError, match=rf"student: expected token ids below {len(student_tok) - 1}, the rows of it"):
        trainer.evaluate(spoiled)


@pytest.mark.parametrize("own", [None, 5])
def test_a_pad_token_beyond_the_rows_stays_out_of_the_configuration(tmp_path, toks, own):
    """The Trainer takes it over from the tokenizer, and the student could not be loaded again."""
    student_tok, _ = (copy.copy(one) for one in toks)
    student_tok.pad_token = "<image_soft_token>"
    teacher = TeacherModel(Teacher(), make_model(len(student_tok), 1), student_tok)
    examples = encode(SMALL_TEXTS[:4], student_tok, None)
    model = make_model(student_tok.pad_token_id, 0)
    model.config.pad_token_id = model.generation_config.pad_token_id = own
    trainer = XTokenTrainer(
        model, make_config(tmp_path, max_steps=1), [teacher], collate, examples, processing_class=student_tok
    )
    trainer.train()
    trainer.save_model()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.pad_token_id == loaded.generation_config.pad_token_id == own
    assert loaded.config.eos_token_id == student_tok.eos_token_id
