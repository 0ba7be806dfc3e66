"""Hidden states and output layer of a model in place of its logits, as `linear_*` losses take them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from xtoken.losses import LinearLogits, OrderedLogits
from xtoken.losses.logits import Parts, autocasts, scaled_and_capped
from xtoken.teacher_order import TeacherOrder

from .limits import output_layer, text_config
from .packing import in_evaluation

TOKENS = 8
"""With so many of which a model's logits are compared once."""

_SEEN: WeakSet[nn.Module] = WeakSet()


def linear_logits(model: Any, input_ids: Tensor, **inputs: Any) -> LinearLogits:
    """``model(input_ids, **inputs).logits`` as hidden states and output layer, for a teacher or a ``linear_*`` loss.

    Softcap and scale are read from the configuration: ``final_logit_softcapping`` (Gemma), ``logits_soft_cap``
    (RecurrentGemma), ``output_logit_soft_cap`` (xLSTM), ``logit_scale`` (Cohere), ``logits_scaling`` (Granite),
    ``lm_head_multiplier`` and ``output_multiplier``. The first call of a model also computes its logits of a few
    tokens, in evaluation mode. Gradients go through all of it, also those of peft's LoRA on the output layer.

    Raises ValueError if these logits are others, since the model does something else to them; or if its output layer is
    not linear, or quantised, or there is none.
    """
    if model not in _SEEN:
        fault = head_fault(model, input_ids[:1, :TOKENS])
        if fault is not None:
            raise ValueError(f"model: {fault}; use the logits of {type(model).__name__}")
        _SEEN.add(model)
    made: LinearLogits = linear_outputs(model, model, input_ids=input_ids, use_cache=False, **inputs).logits
    return made


def head_fault(model: Any, input_ids: Tensor) -> str | None:
    """Why hidden states and output layer cannot stand for a model's logits; None: they can.

    Computes the logits of ``input_ids`` [B, T] in both ways, in evaluation mode.
    """
    head = output_layer(model)
    if head is None:
        return f"expected an output layer, as models of transformers have one, got {type(model).__name__}"
    if (fault := _layer_fault(head)) is not None:
        return fault
    with in_evaluation(model):
        want = model(input_ids=input_ids, use_cache=False).logits.float()
        try:
            made = linear_outputs(model, model, input_ids=input_ids, use_cache=False).logits
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"expected a forward that does without rows of logits, but it says: {error}"
        if made.hidden.shape[:-1] != want.shape[:-1]:
            return f"expected hidden states of all {list(want.shape[:-1])} tokens, got {list(made.hidden.shape[:-1])}"
        got = Parts.of(made).source(want.shape[-1]).rows(0, want[..., 0].numel()).view_as(want).float()
    eps = torch.finfo(made.hidden.dtype).eps
    off = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
    if off <= max(16 * eps, 1e-4):
        return None
    return (
        "expected logits that are the output layer's, scaled and capped by the configuration, got others, which differ "
        f"by {off:.2g} of the largest"
    )


class OrderedLayer(nn.Module):
    """An output layer whose logits are in a `TeacherOrder`; see `ordered_layer`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, order: TeacherOrder, scale: float, softcap: float | None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.order, self.scale, self.softcap = order, scale, softcap

    def forward(self, hidden: Tensor) -> OrderedLogits:
        """The logits of hidden states [B, T, D] or [T, D]."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return OrderedLogits(scaled_and_capped(logits, self.scale, self.softcap), self.order)

    def linear(self, hidden: Tensor) -> OrderedLogits:
        """The same as `LinearLogits`."""
        return OrderedLogits(LinearLogits(hidden, self.weight, self.bias, self.softcap, self.scale), self.order)


def ordered_layer(model: Any, order: TeacherOrder) -> OrderedLayer:
    """A frozen copy of a teacher's output layer, whose logits come in another order of the tokens.

    It is called with hidden states (``linear_logits(model, ids).hidden``), and scales and caps as the model's
    configuration says. The model stays as it is, also where the layer is tied to its embedding; the copy takes as much
    memory as the layer.

    Raises ValueError for an output layer that is quantised, is no linear layer, or has LoRA that is not merged; if the
    model does more to its logits, see `linear_logits`; or if it has no row for a token that the order does not put
    last.

    Examples
    --------
    ::

        order = W.teacher_order()
        layer = ordered_layer(teacher, order)
        with torch.no_grad():
            teacher_logits = layer(linear_logits(teacher, teacher_ids).hidden)
        total, parts = criterion(student_logits, labels, teacher_logits, alignment)  # an XTokenLoss
    """
    device = next(model.parameters()).device
    fault = head_fault(model, torch.arange(TOKENS, device=device)[None])
    layer, base = _active(output_layer(model))
    if fault is None and _adapters(layer):
        fault = "expected an output layer without adapters, which can be merged, got one with LoRA"
    if fault is not None:
        raise ValueError(f"model: {fault}; its logits stay in the tokenizer's order")
    rows, size = len(base.weight), len(order)
    if (beyond := order.tokens[:rows] >= rows).any():
        token = int(order.tokens[:rows][beyond][0])
        raise ValueError(f"model: expected a row for every token that the order needs, got {rows} rows for {token}")
    index = torch.cat([order.tokens[:rows], torch.arange(size, max(size, rows), device="cpu")]).to(base.weight.device)
    bias = None if base.bias is None else base.bias.detach()[index]
    return OrderedLayer(base.weight.detach()[index], bias, order, *_scale_and_softcap(model))


def _scale_and_softcap(model: Any) -> tuple[float, float | None]:
    """What a model's configuration says about its logits."""
    config = text_config(model)
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return scale, next((cap for name in names if (cap := getattr(config, name, None)) is not None), None)


def linear_outputs(call: Callable[..., Any], model: Any, **inputs: Any) -> Any:
    """``call(**inputs)`` with `LinearLogits` as its ``logits``; `call` is the model, or what wraps it.

    The output layer of the model is given no rows meanwhile, so that no logits are computed. The hidden states leave
    the model beside what the output layer has made of nothing: DDP and FSDP2 find there what backward will go through.
    Weights that FSDP2 has shared out are gathered.
    Raises ValueError if the output layer is not called once.
    """
    head = model.get_output_embeddings()
    read: list[tuple[Tensor, torch.dtype | None]] = []  # what it is given, and the type that autocast has there

    def give_nothing(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = args
        kind = hidden.device.type
        read.append((hidden, torch.get_autocast_dtype(kind) if autocasts(kind) else None))
        return (hidden[..., :0, :], *others)

    def leave(_: Any, args: Any, outputs: Any) -> Any:
        if len(read) == 1:
            outputs.logits = read[0][0], outputs.logits
        return outputs

    hooks = [head.register_forward_pre_hook(give_nothing), model.register_forward_hook(leave, prepend=True)]
    try:
        outputs = call(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if len(read) != 1:
        raise ValueError(f"model: expected one call of its output layer, got {len(read)}")
    gather_head(model)
    scale, softcap = _scale_and_softcap(model)
    ((given, dtype),) = read
    kind = given.device.type
    casts = torch.amp.is_autocast_available(kind)
    with torch.autocast(kind, dtype, enabled=dtype is not None) if casts else nullcontext():
        hidden = outputs.logits[0].to(given.dtype)  # what wraps the model may have cast its results
        outputs.logits = LinearLogits(*_layer(head, hidden), softcap, scale)
    return outputs


def gather_head(model: Any) -> None:
    """Gathers the output layer's weight where FSDP2 has shared it out; all processes must make the call."""
    head = model.get_output_embeddings()
    inner = {id(one) for one in head.modules()}
    # Shared out with the innermost module that FSDP has wrapped; its units come before those inside of them.
    units = [one for one in model.modules() if hasattr(one, "unshard") and not inner.isdisjoint(map(id, one.modules()))]
    for unit in reversed(units):
        if any(hasattr(weight, "full_tensor") for weight in head.parameters()):
            unit.unshard()


def _active(head: Any) -> tuple[Any, Any]:
    """Of an output layer that peft trains a copy of (``modules_to_save``) the one that computes; and that without its
    LoRA."""
    if (copies := getattr(head, "modules_to_save", None)) is not None:
        is_off = head.disable_adapters or not head.active_adapters
        head = head.original_module if is_off else copies[head.active_adapters[0]]
    return head, head.base_layer if hasattr(head, "lora_A") else head


def _adapters(layer: Any) -> list[str]:
    """Names of the active adapters of peft's LoRA on a layer."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _layer_fault(head: Any) -> str | None:
    """Why an output layer is not ``hidden @ weight.T + bias``, or that with LoRA."""
    layer, base = _active(head)
    for name in _adapters(layer):
        if name in layer.lora_variant or layer.lora_B[name].bias is not None:
            return f"expected plain LoRA on the output layer, got {layer}"
    if getattr(type(base), "forward", None) is not nn.Linear.forward:
        return f"expected a linear output layer, got {type(base).__name__}"
    weight = base.weight
    if type(weight) not in (Tensor, nn.Parameter) and not hasattr(weight, "full_tensor"):
        return f"expected a plain weight of the output layer, got {type(weight).__name__}"
    if weight.is_meta:
        return "expected the output layer's weight on a device, got one that is loaded when it is needed"
    return None


def _layer(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias whose product is what the output layer makes of its input.

    LoRA makes both wider: ``h W^T + s (h A^T) B^T`` is ``[h, s h A^T] [W, B]^T``.
    """
    layer, base = _active(head)
    adapters = _adapters(layer)
    weight, bias = base.weight, base.bias
    if hasattr(weight, "full_tensor"):
        raise ValueError("model: expected an output layer that FSDP2 can gather, got one that is shared out otherwise")
    rows, columns = [hidden], [weight]
    for name in adapters:
        first, second = layer.lora_A[name], layer.lora_B[name]
        low = first(layer.lora_dropout[name](hidden.to(first.weight.dtype))) * layer.scaling[name]
        rows.append(low.to(hidden.dtype))
        columns.append(second.weight.to(weight.dtype))
    if not adapters:
        return hidden, weight, bias
    return torch.cat(rows, -1), torch.cat(columns, 1), bias
