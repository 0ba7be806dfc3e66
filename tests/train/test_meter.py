"""Sums of metrics over calls, steps and processes; the stopwatch."""

from __future__ import annotations

import math
import time

import pytest
import torch

from xtoken.train.meter import Meter, Stopwatch


def parts(ce: float, kd: list[float], chunks: list[int], agreement: list[float]) -> dict[str, torch.Tensor]:
    diagnoses = {
        "agreement": torch.tensor(agreement),
        "mass": torch.tensor(agreement) / 2,
        "outside": torch.zeros(len(kd)) * torch.tensor(agreement),
    }
    return {
        "ce": torch.tensor(ce),
        "kd_per_teacher": torch.tensor(kd),
        "chunks": torch.tensor(chunks),
        "scale": torch.tensor(2.0),
        **diagnoses,
    }


def test_two_teachers():
    meter = Meter(["a", "b"], [1.0, 10.0])
    meter.steps = 2
    meter.add(parts(1.0, [0.5, 0.25], [10, 20], [0.5, math.nan]), 100)
    meter.add(parts(2.0, [0.5, 0.25], [30, 20], [1.0, math.nan]), 50)
    got = meter.summary(lambda sums: 2 * sums)  # as if another process had the same
    assert got["ce"] == 3.0
    assert got["kd"] == pytest.approx(1.0 + 10 * 0.5)
    assert (got["kd/a"], got["kd/b"]) == (1.0, 0.5)
    assert (got["chunks/a"], got["chunks/b"]) == (40.0, 40.0)
    assert got["agreement/a"] == pytest.approx(35 / 40)
    assert got["teacher_mass/a"] == pytest.approx(35 / 80)
    assert got["projected_outside/a"] == 0
    assert "agreement/b" not in got
    assert got["tokens"] == 300
    assert meter.scale == 2.0


def test_one_teacher_and_divisors():
    meter = Meter(["a"], [0.5])
    meter.add(parts(6.0, [3.0], [4], [1.0]), 10)
    got = meter.summary(lambda sums: sums, [2.0, 4.0])
    assert (got["ce"], got["kd"], got["chunks"]) == (3.0, 0.375, 4.0)
    assert not any("/" in key for key in got)


def test_no_teacher():
    meter = Meter([], [])
    meter.add(parts(6.0, [], [], []), 10)
    assert meter.summary(lambda sums: sums) == {"ce": 6.0, "kd": 0.0, "tokens": 10.0}


def test_stopwatch(monkeypatch):
    readings = iter(
        [
            *(100.0,),  # the watch starts
            *(101.0, 103.0),  # a section
            *(104.0, 109.0),  # another watch starts, and its time is left out
            *(110.0,),  # the lap ends
            *(111.0,),  # another lap
        ]
    )
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    watch = Stopwatch(torch.device("cpu"))
    with watch.section("a"):
        pass
    watch.skip(Stopwatch(torch.device("cpu")))
    assert watch.lap() == (5.0, {"a": 2.0})
    assert watch.lap() == (1.0, {})
