"""Rows of several examples only for models that keep them apart, which is tried out."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from default_losses import DEFAULT
from small import SMALL_TEXTS, make_model, make_teacher, make_trainer

from xtoken import Teacher
from xtoken.losses import Needs
from xtoken.train import ExampleEncoder, TeacherModel, XTokenCollator
from xtoken.train.packing import packing_fault

IDS = torch.arange(5, 90)
SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
KEPT_APART = {
    "llama": transformers.LlamaConfig(**SMALL, attention_dropout=0.5),
    "gpt2": transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=128),
    "mixtral": transformers.MixtralConfig(**SMALL, **EXPERTS, router_jitter_noise=0.3),
    "sliding windows": transformers.Gemma2Config(**SMALL, head_dim=16, sliding_window=8),
}
LEAKING = {
    "bloom": transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=2),
    "mpt": transformers.MptConfig(vocab_size=100, d_model=32, n_heads=2, n_layers=2, max_seq_len=128),
    "opt": transformers.OPTConfig(vocab_size=100, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                                  num_attention_heads=2, word_embed_proj_dim=32),
    "mamba": transformers.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4),
}  # fmt: skip


def from_config(config: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KEPT_APART)
def test_examples_are_kept_apart(name, dtype, threads):
    """Rounding, dropout and experts are no leak, nothing random is drawn, and the model is left as it was."""
    model = from_config(KEPT_APART[name], dtype)
    model.get_output_embeddings().eval()
    state = torch.get_rng_state()
    assert packing_fault(model, IDS) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.get_output_embeddings().training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAKING)
def test_a_leak_is_found(name, dtype, threads):
    """Also where half precision makes it as small as rounding."""
    fault = packing_fault(from_config(LEAKING[name], dtype), IDS)
    assert fault is not None
    assert "with the example before it, by 0.0" in fault or "by 0." in fault


@pytest.mark.parametrize("positions", [9, 32, 50])
def test_models_with_few_positions(positions, threads):
    """Are tried with rows that they can take."""
    gpt2 = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=positions)
    assert packing_fault(from_config(gpt2, torch.float32), IDS) is None
    opt = type(LEAKING["opt"])(**{**LEAKING["opt"].to_dict(), "max_position_embeddings": positions})
    assert "with the example before it" in str(packing_fault(from_config(opt, torch.float32), IDS))


class Positions(torch.nn.Module):
    """Says what the position in the row is, whatever position_ids say."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.table, self.by = torch.nn.Parameter(torch.eye(100)), by

    def forward(self, input_ids: Any, **given: Any) -> Any:
        logits = self.table[input_ids].clone()
        if self.by == "row":
            logits += torch.arange(input_ids.shape[1])[:, None] / 10
        elif self.by == "chunk":
            begin = torch.arange(input_ids.shape[1]) // 70 * 70
            logits += self.table[input_ids[:, begin.clamp_max(input_ids.shape[1] - 1)]] * (begin > 0)[:, None]
        elif self.by == "mask" and given.get("attention_mask") is not None:
            logits += self.table[input_ids[:, :1]]
        elif self.by == "rows" and len(input_ids) > 1:
            logits += self.table[input_ids[:, :1]] * (torch.arange(input_ids.shape[1]) > 0)[:, None]
        elif self.by == "what follows":
            logits += self.table[input_ids].sum(1, keepdim=True)
        return SimpleNamespace(logits=logits)


def test_what_else_can_be_wrong():
    """Positions that go on, chunks of the row, a mask that switches it off, kernels for one row, no causal order."""
    assert packing_fault(Positions("token"), IDS) is None
    assert "are not those that it has alone" in str(packing_fault(Positions("row"), IDS))
    chunked = Positions("chunk")
    assert packing_fault(chunked, IDS, longest=200) is None  # unless the configuration speaks of chunks
    chunked.__dict__["config"] = SimpleNamespace(attention_chunk_size=70)
    assert packing_fault(chunked, IDS, longest=64) is None
    assert packing_fault(chunked, IDS, longest=200) is not None
    assert packing_fault(Positions("mask"), IDS) is None
    assert "with the example before it" in str(packing_fault(Positions("mask"), IDS, masked=True))
    assert packing_fault(Positions("rows"), IDS) is not None
    assert "with the tokens behind" in str(packing_fault(Positions("what follows"), IDS))
    assert "takes no position_ids" in str(packing_fault(torch.nn.Linear(1, 1), IDS))


@pytest.fixture(scope="module")
def examples(student_tok) -> Any:
    return [one for row in ExampleEncoder(student_tok, [student_tok]).encode([{"text": t} for t in SMALL_TEXTS[:8]])
            for one in row]  # fmt: skip


def bloom(size: int) -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=size, hidden_size=32, n_layer=2, n_head=2))


@pytest.mark.parametrize("leaks", ["student", "teacher"])
def test_the_trainer_falls_back_to_rows_of_one_example(tmp_path, student_tok, examples, leaks, caplog):
    """It says so once, names the model, and learns what it learns from unpacked rows."""
    results = []
    for packed in (True, False):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path, student_tok, [make_teacher(student_tok, None, name="T")], examples, max_steps=1
        )
        torch.manual_seed(1)
        if leaks == "student":
            trainer.model = trainer.model_wrapped = bloom(len(student_tok))
        else:
            trainer.teachers[0] = TeacherModel(trainer.teachers[0].objective, bloom(len(student_tok)), student_tok, "T")
        trainer.data_collator = XTokenCollator(student_tok, [student_tok], packed=packed, max_length=150)
        with caplog.at_level(logging.WARNING):
            trainer.train()
            trainer.evaluate(examples[:2])
        results.append([one["ce"] for one in trainer.state.log_history if "ce" in one])
    assert results[0] == results[1]
    (said,) = [one.getMessage() for one in caplog.records if one.getMessage().startswith("packed:")]
    assert f"since of {leaks.replace('teacher', 'T')} an example's logits change with the example before it" in said


def test_rows_that_somebody_else_has_packed_are_refused(tmp_path, student_tok, examples):
    batch = XTokenCollator(student_tok, [student_tok], packed=True, max_length=150)(examples[:4])
    teacher = TeacherModel(Teacher(loss=DEFAULT[Needs.NOTHING]), bloom(len(student_tok)), student_tok, "T")
    with pytest.raises(ValueError, match=r"T: expected rows of one example each \(packed=False\), since an example's"):
        teacher.logits({}, batch)
    trainer = make_trainer(tmp_path, student_tok, [make_teacher(student_tok, None)], examples)
    trainer.model = bloom(len(student_tok))
    trainer.data_collator = lambda some: XTokenCollator(student_tok, [student_tok], packed=True, max_length=150)(some)
    with pytest.raises(ValueError, match=r"student: expected rows of one example each \(packed=False\), since an"):
        trainer.evaluate(examples[:4])
    masked = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    teacher = TeacherModel(Teacher(loss=DEFAULT[Needs.NOTHING]), make_model(len(student_tok), 1), student_tok, "T")
    teacher.logits({}, batch)
    with pytest.raises(ValueError, match="T: expected rows of one example each"):  # which a mask switches off
        TeacherModel(teacher.objective, teacher.model, student_tok, "T").logits({}, masked)


def test_packed_samples_choose_their_teachers(tmp_path, student_tok, threads):
    """As they do alone in a row."""
    examples = [one for row in ExampleEncoder(student_tok, [student_tok] * 2).encode(
        [{"text": text[: 60 + 5 * k]} for k, text in enumerate(SMALL_TEXTS[:8])]) for one in row]  # fmt: skip
    teachers = [make_teacher(student_tok, None, seed, name=str(seed)) for seed in (1, 2)]
    with torch.no_grad():  # so sure that they differ
        for teacher in teachers:
            for weight in teacher.model.parameters():
                weight.mul_(1.5)
    found = []
    for packed in (True, False):
        trainer = make_trainer(tmp_path, student_tok, teachers, examples, teacher_mode="select", max_steps=1,
                               per_device_train_batch_size=8, scaling="fixed")  # fmt: skip
        trainer.data_collator = XTokenCollator(student_tok, [student_tok] * 2, packed=packed, max_length=250)
        trainer.train()
        found.append(next(one for one in trainer.state.log_history if "kd" in one))
    assert min(found[1][f"chunks/{seed}"] for seed in (1, 2)) > 0
    for name in ("chunks/1", "chunks/2", "kd/1", "kd/2", "loss"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name
