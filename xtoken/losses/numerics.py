"""How every loss reads logits, and the sums that several of them share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from xtoken.alignment.alignment import ranges as ranges

if TYPE_CHECKING:
    from xtoken.alignment import Rows

EPSILON = 1e-10
"""Added to projected masses before a division or a logarithm."""

LOWEST_LOGIT = -1e4
"""Smaller logits count as this one; its probability is zero in every type."""


TEMPORARY_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Logits that plain formulas work on at a time, by device type; their temporaries are of that size."""


def temporary_elements(device: torch.device) -> int:
    """`TEMPORARY_ELEMENTS` of a device."""
    return TEMPORARY_ELEMENTS.get(device.type, TEMPORARY_ELEMENTS["cpu"])


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest type of the tensors, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_number(value: float, name: str) -> None:
    """Raises TypeError for a tensor too, which would get no gradient."""
    if not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_switch(value: bool, name: str) -> None:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_temperature(value: float) -> None:
    """Positive and finite."""
    check_number(value, "temperature")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"temperature: expected a positive finite number, got {value!r}")


def scaled(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Logits as losses read them: none below `LOWEST_LOGIT`, divided by the temperature."""
    logits = logits.to(dtype).clamp_min(LOWEST_LOGIT)
    return logits if temperature == 1.0 else logits / temperature


def log_sums(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """[count]: logsumexp of the values [n] that have the same owner (int64 [n]); -inf where there are none."""
    none = values.new_full((count,), -torch.inf)
    top = none.scatter_reduce(0, owner, values.detach(), "amax")
    sums = torch.zeros_like(none).index_add(0, owner, (values - top[owner]).exp())
    return torch.where(sums == 0, none, sums.masked_fill(sums == 0, 1).log() + top.masked_fill(sums == 0, 0))


def log_likelihood(logits: Tensor, rows: Rows, dtype: torch.dtype, temperature: float = 1.0) -> Tensor:
    """[K]: the sum of the log-probabilities of the tokens that the rows predict."""
    index = rows.index()
    log_p = scaled(logits[index], temperature, dtype).log_softmax(-1)
    return rows.total(log_p.gather(1, rows.realised[index, None])[:, 0], rows.owner())


def log_complement(log_p: Tensor) -> Tensor:
    """``log(1 - p)``, without cancellation near 0 and near 1; 1 - p is at least the type's eps."""
    log_p = log_p.clamp_max(-torch.finfo(log_p.dtype).eps)
    is_large = log_p > -0.6931
    near_one = (-torch.where(is_large, log_p, -1.0).expm1()).log()
    near_zero = (-torch.where(is_large, -1.0, log_p).exp()).log1p()
    return torch.where(is_large, near_one, near_zero)


def sorted_l1(p: Tensor, q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of |P_i - Q_i| over the `count` first ranks, descending, padded with zeros [K]; and its slope in p [K, V].

    The slope of a probability is ``sign(P_i - Q_i)`` at its rank ``i``, of equal ones the mean over all their orders,
    which is that of the signs at the ranks that they share. Signs are whole numbers, so their sums do not depend on the
    order of the additions.
    """
    if count == 0:
        return p.new_zeros(len(p)), torch.zeros_like(p)
    ordered, token = _largest(p, count)
    difference = _first(ordered, count) - _first(_largest(q, count)[0], count)
    sign = _first(difference.sign(), ordered.shape[1])
    distinct = torch.ones_like(token)
    distinct[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = distinct.cumsum(1) - 1
    total = torch.zeros_like(sign).scatter_add(1, group, sign)
    number = torch.zeros_like(sign).scatter_add(1, group, torch.ones_like(sign))
    is_last = p == ordered[:, -1:]  # some may be beyond the ranks
    number.scatter_(1, group[:, -1:], is_last.sum(1, keepdim=True).to(number.dtype))
    shared = (total / number).gather(1, group)
    return difference.abs().sum(1), torch.where(is_last, shared[:, -1:], 0.0).scatter(1, token, shared)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, descending, and their places."""
    if count < values.shape[1]:
        return values.topk(count, dim=1)
    return values.sort(dim=1, descending=True)


def _first(values: Tensor, count: int) -> Tensor:
    """The first `count` columns, zeros where there are fewer."""
    return torch.nn.functional.pad(values[:, :count], (0, max(0, count - values.shape[1])))
