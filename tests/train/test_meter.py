"""Sums of metrics over calls, steps and processes; the stopwatch."""

from __future__ import annotations

import math
import time

import pytest
import torch

from xtoken.train.meter import FiniteCheck, Meter, Stopwatch


def parts(ce: float, kd: list[float], chunks: list[int], agreement: list[float]) -> dict[str, torch.Tensor]:
    diagnoses = {
        "agreement": torch.tensor(agreement),
        "mass": torch.tensor(agreement) / 2,
        "outside": torch.zeros(len(kd)) * torch.tensor(agreement),
        "flat": torch.tensor(agreement) / 4,
        "left_out": torch.tensor(agreement) / 8,
    }
    return {
        "ce": torch.tensor(ce),
        "kd_per_teacher": torch.tensor(kd),
        "chunks": torch.tensor(chunks),
        "unsupervised": torch.tensor(chunks) // 20,
        "distrusted": torch.tensor(chunks) // 5,
        "weights": torch.tensor(chunks) * 1.5,
        "scale": torch.tensor(2.0),
        "bounded": torch.tensor(ce == 1.0),
        **diagnoses,
    }


def test_two_teachers():
    meter = Meter(["a", "b"], [1.0, 10.0], ["distrusted", "weights"])
    meter.steps = 2
    meter.add(parts(1.0, [0.5, 0.25], [10, 20], [0.5, math.nan]), 100)
    meter.add(parts(2.0, [0.5, 0.25], [30, 20], [1.0, math.nan]), 50)
    got = meter.summary(lambda sums: 2 * sums)  # as if another process had the same
    assert got["ce"] == 3.0
    assert got["kd"] == pytest.approx(1.0 + 10 * 0.5)
    assert (got["kd/a"], got["kd/b"]) == (1.0, 0.5)
    assert (got["chunks/a"], got["chunks/b"]) == (40.0, 40.0)
    assert (got["unsupervised/a"], got["unsupervised/b"]) == (1.0, 2.0)
    assert (got["distrusted/a"], got["certainty/b"]) == (0.2, 1.5)
    assert got["agreement/a"] == pytest.approx(35 / 40)
    assert got["teacher_mass/a"] == pytest.approx(35 / 80)
    assert got["projected_outside/a"] == 0
    assert got["teacher_flat/a"] == pytest.approx(35 / 160)
    assert got["starts_left_out/a"] == pytest.approx(35 / 320)
    assert "agreement/b" not in got
    assert got["tokens"] == 300
    assert got["bounded"] == 0.5
    assert meter.scale == 2.0


def test_one_teacher_and_divisors():
    meter = Meter(["a"], [0.5])
    meter.add(parts(6.0, [3.0], [4], [1.0]), 10)
    got = meter.summary(lambda sums: sums, [2.0, 4.0])
    assert (got["ce"], got["kd"], got["chunks"]) == (3.0, 0.375, 4.0)
    assert not any("/" in key for key in got)
    assert not {"distrusted", "certainty"} & got.keys()


def test_no_teacher():
    meter = Meter([], [])
    meter.add(parts(6.0, [], [], []), 10)
    assert meter.summary(lambda sums: sums) == {"ce": 6.0, "kd": 0.0, "bounded": 0.0, "tokens": 10.0}


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


def test_stopwatch_on_cuda(monkeypatch):
    """By events: none is waited for before the lap ends, and those that the device has reached are let go of."""
    clock, done = iter(range(100, 200)), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "the stream of cuda:0"
            self.at = next(clock)

        def query(self) -> bool:
            return self.at in done

        def synchronize(self) -> None:
            done.append(self.at)

        def elapsed_time(self, end: Event) -> float:
            assert end.at in done
            return 1000.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    watch = Stopwatch(torch.device("cuda", 0))
    with watch.section("step"), watch.section("loss"):
        pass
    assert done == []
    assert watch.seconds == {}
    done.append(102)
    with watch.section("loss"):
        pass
    assert watch.seconds == {"loss": 1.0}
    assert watch.lap()[1] == {"loss": 2.0, "step": 3.0}
    assert watch.lap()[1] == {}


def test_the_first_loss_that_is_not_finite(monkeypatch):
    """On a device the first one is kept, with the first row of each model that is no number."""
    good, bad = torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)
    bad[1, 2, 4] = math.nan
    check = FiniteCheck(["S", "T", "U"])
    check.look(torch.tensor(1.0), [bad, bad], 1)
    check.check()
    for logits, step, message in (
        ([good, bad, "cached"], 7, "T: logits are not a number at step 7, first in sample 1 at position 2"),
        ([good, good], -1, "loss: expected a finite number, got inf at evaluation, from logits that are"),
    ):
        with pytest.raises(ValueError, match=message):
            check.look(torch.tensor(math.inf), logits, step)
    check.check()
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "device", torch.device("cuda"))  # as if nothing could be looked at yet
        patched.setattr("xtoken.train.meter.wide", lambda _: torch.float64)
        for total, step in ((1.0, 1), (math.nan, 2), (1.0, 3), (math.nan, 4)):
            check.look(torch.tensor(total), [bad, good], step)
    with pytest.raises(ValueError, match="S: logits are not a number at step 2"):
        check.check()
    check.check()
