"""The vector functions of the CPU kernels at every level of this machine, and how a level is chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from xtoken import _core

levels = pytest.mark.parametrize("level", _core.cpu_levels())
halves = pytest.mark.parametrize("name", ["bfloat16", "float16"])


@levels
@pytest.mark.parametrize("temperature", [1.0, 0.1, 2.5, 1e-6])
@pytest.mark.parametrize("centre", [0.0, 100.0, -3000.0])
def test_exp(centre: float, temperature: float, level: str) -> None:
    x = (centre * temperature + np.linspace(-80, 59, 40_003) * temperature).astype(np.float32)
    got, unit = _core.cpu_exp(x, centre * temperature, temperature, level)
    want = np.exp(x.astype(np.float64) / temperature - unit)
    tolerance = 1e-7 + 2**-24 * np.abs(x.astype(np.float64) / temperature - centre)
    assert np.all(np.abs(got - want) <= tolerance * want)
    ends = np.array([-np.inf, -1e30, (centre - 250) * temperature, np.nan], np.float32)
    got, _ = _core.cpu_exp(ends, centre * temperature, temperature, level)
    assert got[:3].tolist() == [0, 0, 0]
    assert np.isnan(got[3])


@levels
def test_log(level: str) -> None:
    x = np.concatenate([np.exp(np.linspace(-80, 80, 40_001)), np.linspace(0.7, 1.6, 40_001)]).astype(np.float32)
    want = np.log(x.astype(np.float64))
    assert np.all(np.abs(_core.cpu_log(x, level) - want) <= 1e-7 * np.maximum(1, np.abs(want)))


@levels
@halves
def test_conversions(name: str, level: str) -> None:
    dtype = getattr(torch, name)
    every = np.arange(65536).astype(np.uint16)
    widened = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
    assert np.array_equal(_core.cpu_to_float(every, name, level), widened, equal_nan=True)
    generator = np.random.default_rng(0)
    finite = widened[np.isfinite(widened)].astype(np.float64)
    x = generator.standard_normal(100_003) * 10.0 ** generator.integers(-12, 6, 100_003)
    x = np.concatenate([x, [65504, 65519.9, 65520, 1e30, 3.4e38], widened, (finite[:-1] + finite[1:]) / 2])
    with np.errstate(all="ignore"):
        x = x.astype(np.float32)
    narrowed = torch.from_numpy(_core.cpu_from_float(x, name, level).view(np.int16)).view(dtype)
    assert np.array_equal(narrowed.float().numpy(), torch.from_numpy(x).to(dtype).float().numpy(), equal_nan=True)


def test_level_by_name() -> None:
    one = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="level: expected 'portable', 'avx2' or 'avx512', got 'sse'"):
        _core.cpu_log(one, "sse")
    with pytest.raises(ValueError, match="element: expected 'float32', 'bfloat16' or 'float16', got 'int8'"):
        _core.cpu_from_float(one, "int8", "portable")


@pytest.mark.parametrize("level", ["portable", "best"])
def test_level_of_the_environment(level: str) -> None:
    command = [sys.executable, "-c", "from xtoken import _core; print(_core.cpu_level())"]
    environment = {**os.environ, "XTOKEN_CPU_LEVEL": level}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if level == "portable":
        assert done.stdout.split() == ["portable"]
    else:
        assert "XTOKEN_CPU_LEVEL: expected 'portable', 'avx2' or 'avx512', got 'best'" in done.stderr
