"""How a training run went, and its page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtoken.remote import check_regular
from xtoken.storage import named, write_atomically

from .page import render, save

STATE = "trainer_state.json"
"""What Hugging Face's Trainer keeps of a run: in its folder at the end, in a checkpoint before."""

SETTINGS = "settings.json"
SAMPLES = "samples.jsonl"
"""What `xtoken train` writes into its folder."""

FIRST = ("loss", "ce", "kd", "agreement", "kd_scale", "learning_rate", "grad_norm")
"""Metrics that come first, in this order."""

SHOWN = 50
"""Samples that are shown, the last ones."""

WIDTH, HEIGHT = 420, 210
LEFT, BOTTOM, TOP = 62, 24, 8
"""Of a plot, in pixels."""


@dataclass(frozen=True)
class Curve:
    """A metric over the steps."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class RunReport:
    """The result of `run_report`: `save` writes the page, `html` is its text."""

    name: str
    steps: int
    curves: dict[str, list[Curve]]
    """By the plot that they are in: a metric of training, of evaluation and of each teacher."""
    not_finite: int
    """Values that are left out of the curves since they are not finite."""
    settings: dict[str, Any]
    samples: list[dict[str, Any]]
    source: str
    """The file that the curves are from."""

    def __repr__(self) -> str:
        return f"RunReport({self.name!r}, {self.steps} steps, {len(self.curves)} metrics, {len(self.samples)} samples)"

    @property
    def html(self) -> str:
        """The page."""
        plots = {name: Plot(curves) for name, curves in self.curves.items()}
        return render("run.html", report=self, plots=plots, shown=self.samples[-SHOWN:])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page, complete or not at all. OSError if it cannot."""
        save(self.html, path)


def begin_run(folder: str | os.PathLike[str], settings: dict[str, Any], resumed: str | os.PathLike[str] | None) -> None:
    """Writes the settings of a run, and takes away the samples of an earlier one: all, or those that it has shown
    after the checkpoint that is `resumed`, since they come again, and what was cut when it was killed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    steps = _state(Path(resumed) / STATE)[0] if resumed else 0
    kept = [one for one in _samples(folder / SAMPLES) if one["step"] <= steps] if resumed else []
    write_atomically(folder / SETTINGS, json.dumps(settings, indent=1, default=str).encode())
    if kept:
        write_atomically(folder / SAMPLES, b"".join(map(_line, kept)))
    else:
        (folder / SAMPLES).unlink(missing_ok=True)


def add_sample(folder: str | os.PathLike[str], **sample: Any) -> None:
    """Adds a completion to those of a run: step, prompt, completion, tokens, ended."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with named(folder / SAMPLES), open(folder / SAMPLES, "ab") as file:
        file.write(_line(sample))


def _line(sample: dict[str, Any]) -> bytes:
    return json.dumps(sample).encode() + b"\n"


class Plot:
    """Where the lines of some curves go, in pixels."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        steps = [step for curve in curves for step in curve.steps]
        values = [value for curve in curves for value in curve.values]
        x, y = _scale(steps, LEFT, WIDTH - 8), _scale(values, HEIGHT - BOTTOM, TOP)
        self.width, self.height = WIDTH, HEIGHT
        self.frame = LEFT, TOP, WIDTH - 8, HEIGHT - BOTTOM
        places = ((curve, zip(curve.steps, curve.values, strict=True)) for curve in curves)
        self.lines = [(curve, " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in pairs)) for curve, pairs in places]
        self.x_ticks = [(x(value), f"{value:g}") for value in dict.fromkeys((min(steps), max(steps)))]
        low, high = min(values), max(values)
        self.y_ticks = [(y(value), f"{value:.4g}") for value in dict.fromkeys((low, (low + high) / 2, high))]


def _scale(values: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    """From the values of an axis to pixels; a single value lies in the middle."""
    low, high = min(values), max(values)
    return lambda value: first + ((value - low) / (high - low) if high > low else 0.5) * (last - first)


def run_report(folder: str | os.PathLike[str]) -> RunReport:
    """A page about a run of `xtoken train`, or of any Trainer of Hugging Face: curves, settings, samples.

    Parameters
    ----------
    folder : path
        The run's output folder, or one of its checkpoints. Its settings and samples are there if `xtoken train` has
        written it.

    Returns
    -------
    RunReport

    Raises
    ------
    FileNotFoundError
        If there is no ``trainer_state.json``, in the folder or in a checkpoint.
    ValueError
        If a file of the run is damaged; the message names it.
    """
    folder = Path(folder)
    found = [one / STATE for one in (folder, *checkpoints_in(folder)) if (one / STATE).exists()]
    if not found:
        raise FileNotFoundError(f"{folder}: expected a training run, with {STATE} in it or in a checkpoint")
    # A run that goes on has a checkpoint that is newer than what it left in its folder when it ended before.
    steps, curves, not_finite, path = max((_state(one) for one in found[:2]), key=lambda state: state[0])
    root = folder.resolve().parent if folder.resolve().name.startswith("checkpoint-") else folder
    settings = _json(root / SETTINGS) if (root / SETTINGS).exists() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{root / SETTINGS}: expected options and their values")
    samples = _samples(root / SAMPLES)
    return RunReport(folder.resolve().name, steps, curves, not_finite, settings, samples, str(path))


def _state(path: Path) -> tuple[int, dict[str, list[Curve]], int, Path]:
    """Steps, curves, how many values are not finite, and the file."""
    state = _json(path)
    try:
        return int(state["global_step"]), *_curves(state["log_history"]), path
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: expected the state of a Trainer, with a log_history: {error!r}") from None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [one for one in folder.glob("checkpoint-*") if one.is_dir() and one.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda one: -int(one.name.rpartition("-")[2]))


def _json(path: Path) -> Any:
    check_regular(path)
    try:
        with named(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None


def _samples(path: Path) -> list[dict[str, Any]]:
    """Completions that the run has shown; a last line that is cut, as by a run that was killed, does not count."""
    if not path.exists():
        return []
    check_regular(path)
    with named(path):
        lines = path.read_bytes().split(b"\n")
    samples = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            sample = json.loads(line)
            samples.append({name: sample[name] for name in ("step", "prompt", "completion", "tokens", "ended")})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: damaged: {error!r}") from None
    return samples


def _curves(history: Sequence[dict[str, Any]]) -> tuple[dict[str, list[Curve]], int]:
    """Each metric of the history, by its name without ``eval_`` and without a teacher's; and how many values are not
    finite."""
    keys = [key for key in dict.fromkeys(key for entry in history for key in entry) if key not in ("step", "epoch")]
    plots: dict[str, list[Curve]] = {}
    not_finite = 0
    for key in keys:
        known = [
            (float(entry["step"]), float(entry[key]))
            for entry in history
            if "step" in entry and isinstance(entry.get(key), (int, float))
        ]
        finite = [(step, value) for step, value in known if math.isfinite(step) and math.isfinite(value)]
        not_finite += len(known) - len(finite)
        if finite:
            steps, values = zip(*finite, strict=True)
            plots.setdefault(key.removeprefix("eval_").split("/")[0], []).append(Curve(key, steps, values))
    several = {name: curves for name, curves in plots.items() if any(len(curve.steps) > 1 for curve in curves)}
    order = [*(name for name in FIRST if name in several), *(name for name in several if name not in FIRST)]
    return {name: several[name] for name in order}, not_finite
