"""H-KL: the options that it is tried with, and pairs of a dominant weight."""

from collections.abc import Callable
from typing import Any

import pytest
import test_gold
from harness import Case, make_case
from steps import Step, loss_of
from torch import Tensor

from xtoken import hkl_loss, reference

VARIANTS: dict[str, dict[str, Any]] = {**test_gold.VARIANTS, "wider": {"min_weight": 0.4}}
FEW_VARIANTS = test_gold.FEW_VARIANTS


def truth(case: Case, z: Tensor, y: Tensor, chunks: Any, min_weight: float = 0.6, **options: Any) -> Tensor:
    pairs = reference.common_pairs(case.projection, min_weight)
    common, uncommon = reference.ranked(z, y, chunks, pairs, **options)
    return common + uncommon


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"uncommon_top_k": -1}, ValueError, "uncommon_top_k: expected an integer of at least 0, got -1"),
        ({"uncommon_top_k": None}, ValueError, "uncommon_top_k: expected an integer of at least 0, got None"),
        ({"min_weight": 0.0}, ValueError, r"min_weight: expected a number in \(0, 1\], got 0.0"),
        ({"min_weight": 1.5}, ValueError, r"min_weight: expected a number in \(0, 1\], got 1.5"),
        ({"projection": None}, TypeError, "projection: expected an xtoken.ProjectionMatrix, got NoneType"),
    ],
)
def test_bad_options(options: dict[str, Any], exception: type[Exception], message: str) -> None:
    case = make_case()
    call = {"projection": case.projection, **options}
    with pytest.raises(exception, match=message):
        hkl_loss(case.student, case.teacher, case.alignment, **call)


DEVICE_STEPS: dict[str, Callable[[Step], Any]] = {
    "cut": lambda s: loss_of(s, "hkl", uncommon_top_k=20, reduction="sum"),
    "agree": lambda s: loss_of(s, "hkl", agree=True, beta=0.5),
}
