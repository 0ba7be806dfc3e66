"""Models as hidden states and output layer, with what they do to their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from comparer import assert_close
from default_losses import default_loss

from xtoken import Teacher, TeacherOrder
from xtoken.losses import Needs
from xtoken.losses.logits import Parts
from xtoken.train import TeacherModel, linear_logits, ordered_layer

SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "gpt2": transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2),
    "gemma2": transformers.Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=1, final_logit_softcapping=0.5),
    "cohere": transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "granite": transformers.GraniteConfig(**SMALL, logits_scaling=6.0),
    "recurrent gemma": transformers.RecurrentGemmaConfig(
        **SMALL, num_key_value_heads=1, logits_soft_cap=0.5, block_types=["attention"], attention_window_size=16
    ),
    "phi": transformers.PhiConfig(**SMALL),  # a bias
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).train()
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(3.0)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_as_the_models_logits(name):
    """The loss and the gradients of all weights too."""
    model = made(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.arange(24).view(2, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # With its cache RecurrentGemma of transformers 4 has other gradients.
    logits = model(**inputs, use_cache=False).logits
    linear = linear_logits(model, **inputs)
    assert model.training
    assert_close(Parts.of(linear).source(50).rows(0, 24).view_as(logits), logits.detach(), rtol=1e-5, atol=1e-6)
    teacher = torch.randn(2, 12, 50, generator=torch.Generator().manual_seed(1))
    loss, found = default_loss(Needs.SAME_TOKENIZER), []
    for student in (logits, linear):
        model.zero_grad()
        loss(student, teacher).backward()
        found.append([one.grad.clone() for one in model.parameters() if one.grad is not None])
    for got, want in zip(*found, strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_gradients_under_autocast():
    """Of the first call too, which reads the weights without gradient before."""
    model = made("llama")
    with torch.autocast("cpu", torch.bfloat16):
        linear = linear_logits(model, torch.arange(12)[None])
    linear.hidden.square().sum().backward()
    without = [name for name, one in model.named_parameters() if one.grad is None]
    assert without == ["lm_head.weight"]


def test_what_else_a_model_does_to_its_logits(monkeypatch):
    model = made("llama")
    forward = type(model).forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        outputs.logits = outputs.logits + outputs.logits.sigmoid()
        return outputs

    monkeypatch.setattr(type(model), "forward", changed)
    with pytest.raises(
        ValueError,
        match=r"scaled and capped by the configuration, got others, which differ by .* use the logits of Llama",
    ):
        linear_logits(model, torch.arange(12)[None])
    with pytest.raises(
        ValueError, match="model: expected an output layer, as models of transformers have one, got Lin"
    ):
        linear_logits(torch.nn.Linear(2, 2), torch.arange(12)[None])


@pytest.mark.parametrize("name", CONFIGS)
def test_an_output_layer_in_another_order(name: str) -> None:
    """The model's logits, scaled and capped, column for column; tied weights stay as they are."""
    model, order = made(name).eval(), TeacherOrder(torch.randperm(48, generator=torch.Generator().manual_seed(2)))
    ids = torch.arange(24).view(2, 12)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layer = ordered_layer(model, order)
    with torch.no_grad():
        want = model(ids).logits
        hidden = linear_logits(model, ids).hidden
        given = layer(hidden)
    want = torch.cat([want[..., order.tokens], want[..., 48:]], -1)
    assert given.order is order
    assert isinstance(given.logits, torch.Tensor)
    assert_close(given.logits, want, rtol=1e-5, atol=1e-6)
    rows = Parts.of(layer.linear(hidden).logits).source(50).rows(0, 24)
    assert_close(rows.view_as(want), want, rtol=1e-5, atol=1e-6)
    assert not any(one.requires_grad for one in layer.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_output_layers_that_stay_in_their_order() -> None:
    model = made("llama")
    with pytest.raises(ValueError, match="model: expected a row for every token that the order needs, got 50 rows for"):
        ordered_layer(model, TeacherOrder(torch.arange(60).flip(0)))
    assert len(ordered_layer(model, TeacherOrder(torch.cat([torch.arange(50).flip(0), torch.arange(50, 60)]))).weight)
    with pytest.raises(ValueError, match="expected an output layer, as models of transformers have one, got Linear"):
        ordered_layer(torch.nn.Linear(2, 2), TeacherOrder([0, 1]))

    class Packed(torch.nn.Linear):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return super().forward(rows)

    packed = made("llama")
    packed.lm_head = Packed(16, 50, bias=False)
    with pytest.raises(ValueError, match="model: expected a linear output layer, got Packed; its logits stay in"):
        ordered_layer(packed, TeacherOrder(range(50)))


def test_lora_on_the_output_layer_stays_in_its_order() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(made("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="expected an output layer without adapters, which can be merged, got one wit"):
        ordered_layer(model, TeacherOrder(range(50)))
    model = model.merge_and_unload()
    assert torch.equal(ordered_layer(model, TeacherOrder(range(50))).weight, model.lm_head.weight)


def test_a_teacher_of_a_trainer_keeps_its_order() -> None:
    model, order = made("llama"), TeacherOrder(range(50))
    model.set_output_embeddings(ordered_layer(model, order))
    ids = torch.arange(12)[None]
    with pytest.raises(
        ValueError, match="teacher: expected logits in its tokenizer's order, got OrderedLogits: an ord"
    ):
        TeacherModel(Teacher(), model).logits({"input_ids": ids}, {"input_ids": ids})
