"""The vector functions of the CPU kernels at every level of this machine, and how a level is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from xtoken import _core
from xtoken.losses.cpu import array

levels = pytest.mark.parametrize("level", _core.cpu_levels())
Floats = NDArray[np.float32]

halves = pytest.mark.parametrize("name", ["bfloat16", "float16"])


def run(name: str, level: str, **fields: Any) -> None:
    """The launcher `name`; NumPy's arrays are fields as they are."""
    given = {
        key: array(torch.from_numpy(value)) if isinstance(value, np.ndarray) else value for key, value in fields.items()
    }
    _core.launch(name, given, level, 1)


def exp(x: Floats, centre: float, temperature: float, rough: bool, level: str) -> tuple[Floats, float]:
    result, unit = np.empty_like(x), np.empty((), np.float64)
    run("exp", level, x=x, centre=centre, temperature=temperature, rough=rough, result=result, unit=unit)
    return result, float(unit)


def log(x: Floats, level: str) -> Floats:
    result = np.empty_like(x)
    run("log", level, x=x, result=result)
    return result


def to_float(x: NDArray[np.int16], name: str, level: str) -> Floats:
    result = np.empty(x.shape, np.float32)
    run("to_float", level, x=x, type=name, count=x.size, result=result)
    return result


def from_float(x: Floats, name: str, level: str) -> NDArray[np.int16]:
    result = np.empty(x.shape, np.int16)
    run("from_float", level, x=x, type=name, result=result)
    return result


@levels
@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 2.5, 1e-6])
@pytest.mark.parametrize("centre", [0.0, 100.0, -3000.0])
def test_exp(centre: float, temperature: float, rough: bool, level: str) -> None:
    x = (centre * temperature + np.linspace(-80, 59, 40_003) * temperature).astype(np.float32)
    got, unit = exp(x, centre * temperature, temperature, rough, level)
    want = np.exp(x.astype(np.float64) / temperature - unit)
    tolerance = (1 + rough) * (1e-7 + 2**-24 * np.abs(x.astype(np.float64) / temperature - centre))
    assert np.all(np.abs(got - want) <= tolerance * want)
    ends = np.array([-np.inf, -1e30, (centre - 250) * temperature, np.nan, centre * temperature], np.float32)
    got, _ = exp(ends, centre * temperature, temperature, rough, level)
    assert got[:3].tolist() == [0, 0, 0]
    assert np.isnan(got[3])
    assert got[4] == 1


@levels
def test_log(level: str) -> None:
    x = np.concatenate([np.exp(np.linspace(-80, 80, 40_001)), np.linspace(0.7, 1.6, 40_001)]).astype(np.float32)
    want = np.log(x.astype(np.float64))
    assert np.all(np.abs(log(x, level) - want) <= 1e-7 * np.maximum(1, np.abs(want)))


@levels
@halves
def test_conversions(name: str, level: str) -> None:
    dtype = getattr(torch, name)
    every = np.arange(65536).astype(np.uint16)
    widened = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
    assert np.array_equal(to_float(every.view(np.int16), name, level), widened, equal_nan=True)
    generator = np.random.default_rng(0)
    finite = widened[np.isfinite(widened)].astype(np.float64)
    x = generator.standard_normal(100_003) * 10.0 ** generator.integers(-12, 6, 100_003)
    x = np.concatenate([x, [65504, 65519.9, 65520, 1e30, 3.4e38], widened, (finite[:-1] + finite[1:]) / 2])
    with np.errstate(all="ignore"):
        x = x.astype(np.float32)
    narrowed = torch.from_numpy(from_float(x, name, level)).view(dtype)
    assert np.array_equal(narrowed.float().numpy(), torch.from_numpy(x).to(dtype).float().numpy(), equal_nan=True)


def test_level_by_name() -> None:
    one = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="level: expected 'portable', 'avx2' or 'avx512', got 'sse'"):
        log(one, "sse")
    with pytest.raises(ValueError, match=r"from_float\.type: expected 'float32', 'bfloat16' or 'float16', got 'int8'"):
        from_float(one, "int8", "portable")


@pytest.mark.parametrize("level", ["portable", "best"])
def test_level_of_the_environment(level: str) -> None:
    command = [sys.executable, "-c", "import _core; print(_core.cpu_level())"]  # by itself: without torch
    environment = {**os.environ, "XTOKEN_CPU_LEVEL": level, "PYTHONPATH": str(Path(_core.__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if level == "portable":
        assert done.stdout.split() == ["portable"]
    else:
        assert "XTOKEN_CPU_LEVEL: expected 'portable', 'avx2' or 'avx512', got 'best'" in done.stderr
