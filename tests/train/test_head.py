"""Models as hidden states and output layer, with what they do to their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from comparer import assert_close
from default_losses import default_loss

from xtoken.losses import Needs
from xtoken.losses.logits import Parts
from xtoken.train import linear_logits

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
    logits = model(**inputs).logits
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
