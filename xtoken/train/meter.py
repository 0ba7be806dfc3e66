"""What a training run reports: sums of the losses' parts, and where the time goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

DIAGNOSES = ("agreement", "mass", "outside")


class Meter:
    """Sums over the calls of a loss; each process has its own, and `summary` brings them together.

    Parameters
    ----------
    names : sequence of str
        One for each teacher.
    weights : sequence of float
        Of the teachers' losses in the sum KD.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float]) -> None:
        self.names = list(names)
        self.weights = torch.tensor(list(weights), dtype=torch.float64)
        self.steps = 0
        self.scale = math.nan
        self._losses = torch.zeros(1 + len(names), dtype=torch.float64)  # ce, and kd of each teacher
        self._chunks = torch.zeros(len(names), dtype=torch.float64)
        # Sums over chunks, and over how many: not every call has them.
        self._diagnoses = torch.zeros(len(DIAGNOSES), len(names), dtype=torch.float64)
        self._diagnosed = torch.zeros(len(names), dtype=torch.float64)
        self._tokens = torch.zeros(1, dtype=torch.float64)

    def add(self, parts: dict[str, Tensor], tokens: int) -> None:
        """The parts of one call, and the student tokens that it read."""
        self._losses += torch.cat([parts["ce"][None].double(), parts["kd_per_teacher"].double()]).cpu()
        chunks = parts["chunks"].double().cpu()
        diagnoses = torch.stack([parts[name] for name in DIAGNOSES]).double().cpu()
        known = ~diagnoses.isnan().any(0)
        self._chunks += chunks
        self._diagnosed += chunks * known
        self._diagnoses += torch.where(known, diagnoses * chunks, 0.0)
        self._tokens += tokens
        self.scale = float(parts["scale"])

    def summary(self, add_up: Callable[[Tensor], Tensor], divisors: Sequence[float] | None = None) -> dict[str, float]:
        """The means, all processes together.

        Parameters
        ----------
        add_up : callable
            Sums a tensor over the processes; all of them must make the call.
        divisors : sequence of 1 + M numbers, optional
            What to divide the sums of CE and of each teacher's KD by. Default: the steps, for parts that are already
            means over their step.

        Returns
        -------
        dict
            ``ce``; ``kd``, the weighted sum; ``chunks`` a step, ``agreement``, the ``teacher_mass`` inside C and the
            ``projected_outside`` of C. With several teachers these and ``kd`` also for each, as ``kd/name``.
        """
        table = [self._losses, self._chunks, self._diagnosed, self._diagnoses.flatten(), self._tokens]
        sums = add_up(torch.cat(table)).cpu().split([len(part) for part in table])
        losses, chunks, diagnosed, diagnoses, tokens = sums
        steps = max(self.steps, 1)
        count = len(self.names)
        means = losses / torch.tensor([steps] * (1 + count) if divisors is None else divisors).clamp_min(1)
        results = {"ce": float(means[0]), "kd": float(self.weights @ means[1:])}
        shares = diagnoses.view(len(DIAGNOSES), count) / diagnosed
        for k, name in enumerate(self.names):
            suffix = f"/{name}" if count > 1 else ""
            if suffix:
                results[f"kd{suffix}"] = float(means[1 + k])
            results[f"chunks{suffix}"] = float(chunks[k]) / steps
            if float(diagnosed[k]):
                keys = f"agreement{suffix}", f"teacher_mass{suffix}", f"projected_outside{suffix}"
                results.update(zip(keys, shares[:, k].tolist(), strict=True))
        return {**results, "tokens": float(tokens)}


class Stopwatch:
    """Seconds spent in named sections; the clock is read after the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._started = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a section."""
        started = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    def skip(self, other: Stopwatch) -> None:
        """Leaves the time since another watch was started out of this lap."""
        self._started += self._now() - other._started

    def lap(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last lap, and those of the sections within it; starts the next lap."""
        now = self._now()
        total, self._started = now - self._started, now
        seconds, self.seconds = self.seconds, {}
        return total, seconds
