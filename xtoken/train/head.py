"""Hidden states and output layer of a model in place of its logits, as `linear_*` losses take them."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from xtoken.losses import LinearLogits
from xtoken.losses.logits import Parts

TOKENS = 8
"""Of the first row, with which a model's logits are compared once."""

_SEEN: WeakSet[nn.Module] = WeakSet()


def linear_logits(model: Any, input_ids: Tensor, **inputs: Any) -> LinearLogits:
    """``model(input_ids, **inputs).logits`` as hidden states and output layer, for a teacher or a ``linear_*`` loss.

    Softcap and scale are read from the configuration: ``final_logit_softcapping`` (Gemma), ``logit_scale`` (Cohere),
    ``logits_scaling`` (Granite), ``lm_head_multiplier`` and ``output_multiplier``. The first call of a model also
    computes its logits of a few tokens, in evaluation mode. Gradients go through all of it.

    Raises ValueError if these logits are others, since the model does something else to them; or if it has no body and
    output layer to be told apart.
    """
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    name = type(model).__name__
    if body is None or body is model or getattr(head, "weight", None) is None:
        raise ValueError(f"model: expected a body and an output layer, as transformers has them, got {name}")
    if model not in _SEEN:
        was_training = model.training
        try:
            few = input_ids[:1, :TOKENS]
            with torch.no_grad():
                made = _made(model.eval(), body, head, input_ids=few)
                want = model(input_ids=few, use_cache=False).logits.float()
                got = Parts.of(made).source(want.shape[-1]).rows(0, few.shape[1]).view_as(want).float()
        finally:
            model.train(was_training)
        eps = torch.finfo(made.hidden.dtype).eps
        off = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
        if not off <= max(16 * eps, 1e-4):
            raise ValueError(
                f"model: expected logits that are the output layer's, scaled and capped by the configuration; those of "
                f"{name} differ by {off:.2g} of the largest; use its logits"
            )
        _SEEN.add(model)
    return _made(model, body, head, input_ids=input_ids, **inputs)


def _made(model: Any, body: Any, head: Any, **inputs: Any) -> LinearLogits:
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    hidden = body(**inputs, use_cache=False)[0]
    softcap = getattr(config, "final_logit_softcapping", None)
    return LinearLogits(hidden, head.weight, getattr(head, "bias", None), softcap, scale)
