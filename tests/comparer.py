"""The one comparison of numbers for all tests: what is not within its tolerance fails, NaN included."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within(got: Tensor, want: Tensor, tolerance: float | Tensor, what: str = "values") -> None:
    """``|got - want| <= tolerance`` at every index; equal infinities are equal.

    Raises
    ------
    AssertionError
        Naming the worst index, what came, and what was wanted.
    """
    assert got.shape == want.shape, f"{what}: got shape {list(got.shape)}, want {list(want.shape)}"
    if got.numel() == 0:
        return
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    limit = torch.as_tensor(tolerance, dtype=torch.float64).cpu().expand(got.shape)
    error = torch.where(got == want, 0.0, (got - want).abs())
    bad = ~(error <= limit)
    if not bool(bad.any()):
        return
    excess = torch.where(bad, (error - limit).nan_to_num(nan=float("inf"), posinf=float("inf")), -1.0)
    index = [int(i) for i in torch.unravel_index(excess.flatten().argmax(), got.shape)]
    at = tuple(index)
    raise AssertionError(
        f"{what}: {int(bad.sum())} of {got.numel()} differ; worst at {index}: got {got[at].item():.9g}, "
        f"want {want[at].item():.9g}, error {error[at].item():.3g}, tolerance {limit[at].item():.3g}"
    )


def assert_close(got: Tensor, want: Tensor, rtol: float, atol: float = 0.0, what: str = "values") -> None:
    """``|got - want| <= atol + rtol |want|`` at every index."""
    finite = want.detach().double().abs().nan_to_num(nan=0.0, posinf=0.0)
    assert_within(got, want, atol + rtol * finite, what)


def assert_as_accurate(got: Tensor, plain: Tensor, truth: Tensor, floor: float, what: str = "values") -> None:
    """The largest error is at most twice that of the plain computation in the same type, plus ``floor``."""
    plain_error = (plain.detach().double() - truth.detach().double()).abs()
    assert bool(plain_error.isfinite().all()), f"{what}: the plain computation is not finite"
    assert_within(got, truth, 2 * float(plain_error.max() if plain_error.numel() else 0.0) + floor, what)
