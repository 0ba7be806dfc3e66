"""Curves of a training run, as PNG files or to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from xtoken.plot import require_matplotlib

FIGURES: dict[str, tuple[tuple[str, str], ...]] = {
    "losses": (("ce", "cross-entropy, nats a token"), ("kd", "distillation, nats a chunk")),
    "projection": (
        ("agreement", "chunks with the same first choice, share"),
        ("projected_outside", "student's probability outside the columns"),
    ),
    "speed": (("tokens_per_second", "student tokens a second"), ("time_", "share of the time")),
}
"""Name of each file, and of each panel the prefix of the metrics in it and its label."""


def plot_curves(history: Sequence[dict[str, Any]], folder: str | os.PathLike[str]) -> list[Path]:
    """Draws the metrics in ``trainer.state.log_history``, those of training and of evaluation in one panel.

    The folder receives those of ``losses.png``, ``projection.png`` and ``speed.png`` of which anything is known.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for name, panels in FIGURES.items():
        figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
        if _draw(history, panels, figure.subplots(1, len(panels), squeeze=False)[0]):
            written.append(Path(folder) / f"{name}.png")
            figure.savefig(written[-1], dpi=120)
    return written


def draw_curves(history: Sequence[dict[str, Any]], figure: str = "losses") -> Any:
    """Draws one of `FIGURES` into a new figure of pyplot, and returns its axes, an array of one a panel.

    Raises ValueError if there is no such figure, or nothing is known of it.
    """
    if figure not in FIGURES:
        raise ValueError(f"figure: expected one of {', '.join(map(repr, FIGURES))}, got {figure!r}")
    require_matplotlib()
    from matplotlib import pyplot

    panels = FIGURES[figure]
    made, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained", squeeze=False)
    if not _draw(history, panels, axes[0]):
        pyplot.close(made)
        raise ValueError(f"figure: nothing is known of {figure!r} yet; metrics are kept every logging_steps")
    return axes[0]


def _draw(history: Sequence[dict[str, Any]], panels: Sequence[tuple[str, str]], places: Any) -> bool:
    """Draws into one axes a panel; whether anything was known."""
    for axes, (prefix, label) in zip(places, panels, strict=True):
        for key, steps, values in _curves(history, prefix):
            axes.plot(steps, values, "o--" if key.startswith("eval_") else "-", label=key, markersize=3)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    return any(axes.lines for axes in places)


def _curves(history: Sequence[dict[str, Any]], prefix: str) -> list[tuple[str, list[float], list[float]]]:
    """Each metric that is the prefix, of a teacher (``prefix/name``), or begins with a prefix that ends in ``_``."""
    curves = []
    for key in dict.fromkeys(key for entry in history for key in entry):
        base = key.removeprefix("eval_")
        if base.split("/")[0] == prefix or (prefix.endswith("_") and base.startswith(prefix)):
            known = [entry for entry in history if key in entry]
            curves.append((key, [entry["step"] for entry in known], [entry[key] for entry in known]))
    return curves


class PlotCallback(TrainerCallback):
    """Draws the curves into the output folder after each evaluation, and at the end."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            plot_curves(state.log_history, args.output_dir)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_evaluate(args, state, control)
