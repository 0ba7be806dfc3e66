"""What a training run reports: sums of the losses' parts, losses that are not finite, and where the time goes.

All of it is added up where the losses are and read when something is logged, so that no step waits for the device.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from xtoken.alignment import to_device
from xtoken.alignment.alignment import as_tensor
from xtoken.losses.diagnostics import NAMES as DIAGNOSES
from xtoken.losses.logits import LinearLogits, Parts

COUNTS = ("chunks", "unsupervised", "distrusted", "weights")
"""Sums over chunks among the losses' parts, for each teacher."""

SHARES = {"distrusted": "distrusted", "weights": "certainty"}
"""How some of `COUNTS` are called in logs, as shares of the chunks."""

REPORTED = ("agreement", "teacher_mass", "projected_outside", "teacher_flat", "starts_left_out")
"""How the means of `DIAGNOSES` are called in logs."""


def wide(device: torch.device) -> torch.dtype:
    """The type of sums; MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class Meter:
    """Sums over the calls of a loss; each process has its own, and `summary` brings them together.

    Each teacher has a name, and a weight in the sum KD. `shares` are those of `SHARES` that are reported.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float], shares: Sequence[str] = ()) -> None:
        self.names = list(names)
        self.shares = tuple(shares)
        self.weights = torch.tensor(list(weights), dtype=torch.float64, device="cpu")
        self.steps = 0
        self.calls = 0
        self.tokens = 0
        self.scale: Tensor | float = math.nan  # of the last call
        count = len(names)
        # ce, calls, those with the largest factor; and for each teacher kd, counts, and of those calls that have
        # diagnoses the chunks and the sums over them.
        self._sizes = [3, count, len(COUNTS) * count, count, len(DIAGNOSES) * count]
        self._sums = torch.zeros(sum(self._sizes), dtype=torch.float64, device="cpu")

    def add(self, parts: dict[str, Tensor], tokens: int) -> None:
        """The parts of one call, and the student tokens that it read. Nothing waits for the device that has them."""
        device = parts["ce"].device
        dtype = wide(device)
        counts = torch.stack([to_device(parts[name], device).to(dtype) for name in COUNTS])
        chunks = counts[0]
        diagnoses = torch.stack([parts[name] for name in DIAGNOSES]).to(dtype)
        known = ~diagnoses.isnan().any(0)
        diagnosed = torch.where(known, diagnoses * chunks, 0.0).flatten()
        ce, one = parts["ce"].to(dtype), torch.ones((), dtype=dtype, device=device)
        losses = torch.stack([ce, one, parts["bounded"].to(dtype)]), parts["kd_per_teacher"].to(dtype)
        self._sums = to_device(self._sums.to(dtype), device) + torch.cat(
            [*losses, counts.flatten(), chunks * known, diagnosed]
        )
        self.scale = parts["scale"]
        self.tokens += tokens
        self.calls += 1

    def summary(
        self, add_up: Callable[[Tensor], Tensor], divisors: Sequence[float] | Tensor | None = None
    ) -> dict[str, float]:
        """The means, all processes together; waits for the device.

        ``ce``; ``kd``, the weighted sum; ``bounded``, the share of calls with the largest factor of KD; ``chunks`` a
        step, and where there are any those that labels left out, ``unsupervised``; of the chunks the share that is
        ``distrusted`` (by ``trust_top_k``) and the mean weight ``certainty`` (of ``teacher_weighting``), if wanted;
        ``agreement``, the ``teacher_mass`` inside C, the ``projected_outside`` of C, ``teacher_flat``, the share of
        chunks whose teacher finds all of C equally likely, and ``starts_left_out``, of those whose start has no term.
        With several teachers the latter and ``kd`` also for each, as ``kd/name``.

        `add_up` sums a tensor over the processes, all of which must make the call. The sums of CE and of each teacher's
        KD are divided by `divisors`, by default the steps, for parts that are already means over their step.
        """
        sums = add_up(torch.nn.functional.pad(self._sums.cpu().double(), (0, 1), value=float(self.tokens)))
        (ce, calls, bounded), kd, counted, diagnosed, diagnoses, tokens = sums.cpu().double().split([*self._sizes, 1])
        steps, count = max(self.steps, 1), len(self.names)
        by = torch.full((1 + count,), steps, device="cpu") if divisors is None else as_tensor(divisors).cpu()
        means = torch.cat([ce[None], kd]) / by.clamp_min(1)
        results = {"ce": float(means[0]), "kd": float(self.weights @ means[1:])}
        results["bounded"] = float(bounded / calls) if calls else 0.0
        shares = diagnoses.view(len(DIAGNOSES), count) / diagnosed
        sums_of = dict(zip(COUNTS, counted.view(len(COUNTS), count), strict=True))
        chunks, unsupervised = sums_of["chunks"] / steps, sums_of["unsupervised"] / steps
        for k, name in enumerate(self.names):
            of = {"kd": float(means[1 + k])} if count > 1 else {}
            of["chunks"] = float(chunks[k])
            if float(unsupervised[k]):
                of["unsupervised"] = float(unsupervised[k])
            if float(chunks[k]):
                of.update({SHARES[name]: float((sums_of[name] / sums_of["chunks"])[k]) for name in self.shares})
            if float(diagnosed[k]):
                of.update(zip(REPORTED, shares[:, k].tolist(), strict=True))
            results.update({f"{key}/{name}" if count > 1 else key: value for key, value in of.items()})
        return {**results, "tokens": float(tokens)}


class FiniteCheck:
    """Keeps where a loss was not finite for the first time, on its device, and says so when asked.

    On the CPU, where nothing has to be waited for, `look` says so itself. `names` are of the student and the teachers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._found: Tensor | None = None  # step (0: nothing found), loss, and of each model sample and position

    @torch.no_grad()
    def look(self, total: Tensor, logits: Sequence[Any], step: int) -> None:
        """Looks at one loss, and at the logits that it comes from; `step` is -1 in evaluation."""
        on_host = total.device.type == "cpu"
        if on_host and bool(total.isfinite()):
            return
        dtype = wide(total.device)
        places = [self._first(one, total) for one in logits]
        found = torch.stack([total.new_full((), step), total, *(part for place in places for part in place)])
        before = torch.zeros_like(found, dtype=dtype) if self._found is None else self._found
        self._found = torch.where((before[0] == 0) & ~total.isfinite(), found.to(dtype), before)
        if on_host:
            self.check()

    @staticmethod
    def _first(logits: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Sample and position of the first row with a NaN, -1 if there is none."""
        none = like.new_full((), -1)
        if not isinstance(logits, (Tensor, LinearLogits)):
            return none, none
        given = Parts.of(logits).batched().detached()
        bad = given.rows.amax(-1).isnan()  # which a NaN passes through
        if given.head is not None:  # products with what is infinite, or not a number, are none either
            bad = bad | given.rows.isinf().any(-1) | given.head.amax().isnan() | given.head.amin().isinf()
        row, length, found = bad.flatten().to(torch.uint8).argmax(), bad.shape[-1], bad.any()
        return torch.where(found, row // length, none), torch.where(found, row % length, none)

    def check(self) -> None:
        """Raises ValueError if a loss was not finite, naming model and step; waits for the device."""
        found, self._found = self._found, None
        step, total, *places = (0.0, 0.0) if found is None else found.cpu().tolist()
        if step == 0:
            return
        where = "evaluation" if step < 0 else f"step {int(step)}"
        for name, sample, position in zip(self.names, places[::2], places[1::2], strict=False):
            if sample >= 0:
                row = f"sample {int(sample)} at position {int(position)}"
                raise ValueError(f"{name}: logits are not a number at {where}, first in {row}")
        raise ValueError(f"loss: expected a finite number, got {total} at {where}, from logits that are")


class Stopwatch:
    """Seconds spent in named sections.

    On CUDA a section lasts from when the device reaches its beginning to when it reaches its end, as events say that
    are read later; elsewhere it is the time that the host spends in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: deque[tuple[str, Any, Any]] = deque()  # sections that the device may not have finished
        self._started = time.perf_counter()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a section."""
        started = self._now()
        try:
            yield
        finally:
            self._open.append((name, started, self._now()))
            self._close(wait=False)

    def _close(self, wait: bool) -> None:
        """Adds up the sections that are finished, or waits until all are."""
        on_cuda = self.device.type == "cuda"
        while self._open and (wait or not on_cuda or self._open[0][2].query()):
            name, start, end = self._open.popleft()
            if on_cuda:
                end.synchronize()
            self.seconds[name] += start.elapsed_time(end) / 1000 if on_cuda else end - start

    def skip(self, other: Stopwatch) -> None:
        """Excludes the time since another watch was started from this lap."""
        self._started += time.perf_counter() - other._started

    def lap(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last lap, and those of the sections within it; starts the next. Waits for the device."""
        self._close(wait=True)
        now = time.perf_counter()
        total, self._started = now - self._started, now
        seconds, self.seconds = self.seconds, defaultdict(float)
        return total, seconds
