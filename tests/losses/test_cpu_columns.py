"""Column sets of the CPU kernels: as the reference chooses them, ties and all."""

import math

import pytest
import torch
from harness import BACKENDS, DTYPES
from torch import Tensor

from xtoken import reference
from xtoken.losses import backends

cpu = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def column_set(backend: str, logits: Tensor, top_k: int | None) -> Tensor:
    return backends.select(backend, torch.device("cpu")).column_set(logits, top_k)


@cpu
@dtypes
@pytest.mark.parametrize("kind", ["distinct", "tied", "equal", "zeros", "infinite", "nan"])
def test_as_the_reference(kind: str, dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4501, generator=generator)
    if kind == "tied":
        logits = (4 * logits).round() / 4
    elif kind == "equal":
        logits = torch.full_like(logits, -2.5)
    elif kind == "zeros":  # of both signs, among few others
        logits = torch.where(logits > 2, logits, torch.where(logits > 0, 0.0, -0.0))
    elif kind == "infinite":
        logits[:, :, ::3] = -math.inf
        logits[0, 1, 5::500] = math.inf
    elif kind == "nan":
        logits[1, 2, 3::100] = math.nan
        logits[0, 0, 7::100] = math.nan
    logits = logits.to(dtype)
    for top_k in (1, 2, 15, 16, 17, 1000, 3001, 4500, 4501, 9000, None):
        got = column_set(backend, logits, top_k)
        assert torch.equal(got, reference.column_set(logits, top_k)), top_k


@cpu
def test_strides_and_small_sizes(backend: str) -> None:
    logits = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(0))
    for view in (logits[:, 1:, 2:], logits.transpose(0, 1), logits.transpose(1, 2), logits[:1, :1, :1], logits[:0]):
        for top_k in (1, 7):
            assert torch.equal(column_set(backend, view, top_k), reference.column_set(view, top_k))
    double = logits.double()
    assert torch.equal(column_set(backend, double, 7), reference.column_set(double, 7))


@cpu
def test_threads_do_not_change_the_result(backend: str) -> None:
    logits = torch.randn(1, 5, 20_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = reference.column_set(logits, 3000)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(column_set(backend, logits, 3000), want)
    torch.set_num_threads(1)
