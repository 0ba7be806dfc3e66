"""Whether a model keeps the examples of a packed row apart: tried out on the model itself, since many do not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import base_of
from .limits import most_positions, text_config

LENGTHS = ((23, 9, 17, 15), (11, 25, 13, 15))
"""Tokens of the examples of two rows: kernels that take one packed row may not take two."""

NOISE = 4.0
"""How many times as much as rounding a difference must be to count."""

FLOOR = 1e-5
"""Differences below this share of the largest logit are rounding."""

PACKED = "expected rows of one example each (packed=False)"
"""Begins to say that a model does not keep the examples of a row apart."""


def is_packed(side: Any) -> bool:
    """Whether a row of the batch has several examples: positions that begin again, at a token that is not masked."""
    positions, mask = side.get("position_ids"), side.get("attention_mask")
    if positions is None:
        return False
    begins = positions == 0 if mask is None else (positions == 0) & (mask != 0)
    return bool((begins.sum(-1) > 1).any())


def packing_fault(model: nn.Module, ids: Tensor, longest: int = 0, masked: bool = False) -> str | None:
    """Why examples must not share a row of this model; None: each has the logits that it has alone.

    Two things are looked at: whether logits change with what the example before says, and whether they are those of the
    example alone. What rounding does (experts see other tokens with them; other shapes) is measured by the same
    change where it must not matter, behind the tokens looked at. The model is in evaluation mode meanwhile, so nothing
    is drawn at random; deterministic.

    Parameters
    ----------
    model : nn.Module
        As the Trainer calls it.
    ids : int64 [n]
        Tokens to write examples with.
    longest : int
        Tokens of a row in training; rows as long as that are tried where attention works in chunks of fewer.
    masked : bool
        Whether rows come with an ``attention_mask``.
    """
    parameters = inspect.signature(base_of(model).forward).parameters.values()
    if not any(one.name == "position_ids" or one.kind is one.VAR_KEYWORD for one in parameters):
        return "it takes no position_ids, which say where an example begins"
    device = next((one.device for one in model.parameters()), ids.device)
    factor = 1
    chunk = getattr(text_config(model), "attention_chunk_size", None)  # beyond which attention does not reach
    if chunk is not None and chunk < longest:
        factor = -(-min(longest, chunk + 64) // sum(LENGTHS[0]))
    whole = factor * sum(LENGTHS[0])
    whole = min(whole, most_positions(model) or whole)
    before = [[max(1, n * whole // sum(row)) for n in row[:-1]] for row in LENGTHS]
    sizes = [[*row, whole - sum(row)] for row in before]
    ids = ids.unique().cpu()

    def tokens(seed: int, length: int) -> Tensor:
        place = torch.arange(length, device="cpu") + 1000 * seed + 1
        return ids[(place * place * 7919 + place * 104729) % 2147483647 % len(ids)]

    widest = [_eps(one.dtype) for one in model.parameters()]

    def logits(examples: Sequence[Tensor], positions: Sequence[Tensor] | None = None) -> Tensor:
        given = {"input_ids": torch.stack(list(examples)).to(device)}
        if positions is not None:
            given["position_ids"] = torch.stack(list(positions)).to(device)
            if masked:
                given["attention_mask"] = torch.ones_like(given["input_ids"])
        found = model(**given, use_cache=False).logits.detach()
        widest.append(_eps(found.dtype))
        rows: Tensor = found.float().cpu()
        return rows

    def packed(variant: int) -> list[Tensor]:
        """Of the second and the fourth example of each row, behind one that says something else in each variant."""
        rows = [torch.cat([tokens(10 * r + k + (0 if k % 2 else 100 * variant), n) for k, n in enumerate(row)])
                for r, row in enumerate(sizes)]  # fmt: skip
        found = logits(rows, [torch.cat([torch.arange(n, device="cpu") for n in row]) for row in sizes])
        return [found[r].split(row)[k] for r, row in enumerate(sizes) for k in (1, 3)]

    half = whole // 4 * 2

    def plain(variant: int, length: int = half) -> list[Tensor]:
        """Of the first half of two rows of one example each, in two parts."""
        rows = [torch.cat([tokens(50 + r, half), tokens(60 + r + 100 * variant, length)]) for r in range(2)]
        return list(logits(rows)[:, :half].reshape(4, half // 2, -1).unbind())

    with in_evaluation(model):
        with_others = packed(0)
        alone = [logits([tokens(10 * r + k, row[k])])[0] for r, row in enumerate(sizes) for k in (1, 3)]
        expected = plain(0)
        seen, seen_noise = _difference(with_others, packed(1)), _difference(expected, plain(1))
        moved, moved_noise = _difference(with_others, alone), _difference(expected, plain(0, 0))
    eps = max(widest)
    if seen_noise > max(16 * eps, FLOOR):
        return f"its logits change with the tokens behind, by {seen_noise:.2g} of the largest"
    if seen > max(NOISE * seen_noise, FLOOR):
        return f"an example's logits change with the example before it, by {seen:.2g} of the largest"
    if moved > max(NOISE * moved_noise, 8 * eps, 10 * FLOOR):
        return f"an example's logits are not those that it has alone, by {moved:.2g} of the largest"
    return None


def _difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest of each example, as a share of its largest logit; the median over the examples.

    A choice of experts that falls otherwise by rounding is in some of them; what an example sees too much is in all.
    """
    shares = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(some, others, strict=True)]
    return sorted(shares)[(len(shares) - 1) // 2]


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradient; afterwards each module is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()  # where torch 2.6 keeps weights cast without gradient, for backward too
        for module, was_training in before:
            module.training = was_training
