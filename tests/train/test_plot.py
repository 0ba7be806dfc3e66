"""Curves."""

from __future__ import annotations

import importlib.util

import pytest

from xtoken.train.plot import _curves, draw_curves, plot_curves

HISTORY = [
    {"step": 0, "eval_ce": 3.0, "eval_kd/a": 2.0},
    {"step": 1, "ce": 2.5, "kd": 1.0, "kd/a": 1.5, "kd_scale": 2.0, "time_teacher": 0.1},
    {"step": 2, "ce": 2.0, "kd": 0.5, "kd/a": 1.0, "kd_scale": 2.0, "time_teacher": 0.2},
]


def test_curves():
    assert _curves(HISTORY, "kd") == [
        ("eval_kd/a", [0], [2.0]),
        ("kd", [1, 2], [1.0, 0.5]),
        ("kd/a", [1, 2], [1.5, 1.0]),
    ]
    assert [key for key, *_ in _curves(HISTORY, "time_")] == ["time_teacher"]


def test_writes_what_is_known(tmp_path):
    paths = plot_curves(HISTORY, tmp_path / "new")
    assert [path.name for path in paths] == ["losses.png", "speed.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


def test_draws_what_is_known():
    axes = draw_curves(HISTORY, "losses")
    assert [[line.get_label() for line in one.lines] for one in axes] == [
        ["eval_ce", "ce"],
        ["eval_kd/a", "kd", "kd/a"],
    ]
    with pytest.raises(ValueError, match="figure: nothing is known of 'projection' yet"):
        draw_curves(HISTORY, "projection")
    with pytest.raises(ValueError, match="figure: expected one of 'losses', 'projection', 'speed', got 'loss'"):
        draw_curves(HISTORY, "loss")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"plots need matplotlib; run: pip install 'xtoken\[plot\]'"):
        plot_curves(HISTORY, tmp_path)
