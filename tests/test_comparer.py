"""The comparer fails when it must."""

import math

import pytest
import torch
from comparer import assert_as_accurate, assert_close, assert_within


def test_accepts_what_is_within() -> None:
    assert_within(torch.tensor([1.0, 2.0]), torch.tensor([1.1, 2.0]), 0.11)
    assert_within(torch.tensor([math.inf]), torch.tensor([math.inf]), 0.0)
    assert_within(torch.zeros(0), torch.zeros(0), 0.0)
    assert_close(torch.tensor([100.0]), torch.tensor([101.0]), rtol=0.01)
    assert_within(torch.tensor(1.0), torch.tensor(1.0), 0.0)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (math.nan, 0.0),
        (0.0, math.nan),
        (math.nan, math.nan),
        (math.inf, 0.0),
        (math.inf, -math.inf),
        (0.0, math.inf),
        (1.2, 1.0),
    ],
)
def test_rejects_nan_infinity_and_differences(got: float, want: float) -> None:
    with pytest.raises(AssertionError):
        assert_within(torch.tensor([0.0, got]), torch.tensor([0.0, want]), 0.1)
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([0.0, got]), torch.tensor([0.0, want]), rtol=0.1)


def test_nan_tolerance_fails() -> None:
    with pytest.raises(AssertionError):
        assert_within(torch.ones(1), torch.zeros(1), math.nan)


def test_names_the_worst_index() -> None:
    got = torch.zeros(2, 3)
    got[0, 1], got[1, 2] = 0.5, 7.0
    with pytest.raises(AssertionError, match=r"grad: 2 of 6 differ; worst at \[1, 2\]: got 7, want 0"):
        assert_within(got, torch.zeros(2, 3), 0.1, "grad")
    got[0, 0] = math.nan
    with pytest.raises(AssertionError, match=r"worst at \[0, 0\]: got nan"):
        assert_within(got, torch.zeros(2, 3), 0.1)


def test_rejects_another_shape() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_within(torch.zeros(3), torch.zeros(3, 1), 1.0)


def test_twice_the_plain_error() -> None:
    truth = torch.zeros(2, dtype=torch.float64)
    plain = torch.tensor([0.0, 1.0])
    assert_as_accurate(torch.tensor([1.9, 0.0]), plain, truth, 0.0)
    with pytest.raises(AssertionError):
        assert_as_accurate(torch.tensor([2.1, 0.0]), plain, truth, 0.0)
    with pytest.raises(AssertionError, match="not finite"):
        assert_as_accurate(torch.zeros(2), torch.tensor([math.nan, 0.0]), truth, 1.0)
