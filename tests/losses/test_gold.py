"""GOLD: the options that it is tried with, and pairs of weight 1."""

from typing import Any

from harness import Case
from torch import Tensor

from xtoken import reference

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "reverse": {"reverse": True},
    "temperature": {"temperature": 2.5},
    "cut": {"uncommon_top_k": 5},
}
FEW_VARIANTS: dict[str, dict[str, Any]] = {
    "cut": {"uncommon_top_k": 20},
    "reverse": {"reverse": True},
}


def truth(case: Case, z: Tensor, y: Tensor, chunks: Any, **options: Any) -> Tensor:
    pairs = reference.common_pairs(case.projection, 1.0)
    common, uncommon = reference.ranked(z, y, chunks, pairs, **options)
    return common + uncommon
