"""`xtoken check`: every loss that this build would use, compared with float64 on this machine, and timed.

A kernel passes if its error against the formula in float64, on the same rounded inputs, is at most twice that of the
formula in the type of the logits plus a floor (`FLOORS`). Truth is computed on the same device, by torch alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .alignment import Alignment
from .losses.backends import IGNORED, check_backend, select_backend, why_not
from .losses.call import check_choice
from .losses.cases import REAL, Case, Pair, forms, made_up_pair, one_to_one, text_of
from .losses.criterion import Teacher, XTokenLoss
from .losses.loss import Loss, Needs, registered
from .projection import LearnableProjection
from .terminal import to_json

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ROWS = {"cpu": 8, "cuda": 64}
"""Of logits, by device type; a row does not depend on how many there are, and those of a GPU are repeated."""

LEAST_ROWS = 8
"""With fewer there are no chunks of several tokens."""

BYTES_A_ROW = 25e6
"""Of a GPU's memory, at most."""

PADDING = (64, 267)
"""Columns of the logits beyond the vocabularies of student and teacher; Qwen3 has 267."""

REPETITIONS = 2
"""Timed calls after the first, whose results have to be right too."""


FLOORS = {"loss": 1e-5, "sum": 1e-5, "row": 1e-5, "W": 1e-5, "column": 1e-3}
"""What is added to twice the error of the formula in the same type. Errors are relative to the largest loss of a chunk;
to the sum of all; to the norm of a row's gradient; to that of the gradient of W; and to an element of the gradient, of
which the median of a column's rows is taken. Exponentials of GPUs have errors of 1e-5."""

RANKED_ROW = 1e-2
"""For the gradient's rows of a loss that compares by rank (`Loss.by_rank`): rounding alone can exchange two ranks."""


@dataclass(frozen=True)
class CheckFinding:
    """A loss in one form and one type: what differs most from float64, measured by what it may differ."""

    loss: str
    form: str
    """What is not as by default: ``"merge=mean"``, or ``"labels"``; "" for all defaults."""
    dtype: str
    backend: str
    error: float
    tolerance: float
    where: str
    """Which number differs most, with what came and what was expected; or the error that the call has raised."""
    milliseconds_per_row: float | None
    """Forward and backward; of the student's rows."""
    repeats: bool
    """Whether further calls gave the same bits."""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance < math.inf

    @property
    def is_judged(self) -> bool:
        """Whether a kernel ran. The plain formula is what kernels are judged by; it is only seen to be finite."""
        return self.backend != "reference"

    @property
    def used(self) -> float:
        """The share of the tolerance that the error takes."""
        return _share(self.error, self.tolerance)

    @property
    def title(self) -> str:
        """The loss and its form."""
        return registered()[self.loss].title + (f" with {self.form}" if self.form else "")

    def __str__(self) -> str:
        name = f"{self.title}, {self.dtype}, backend {self.backend!r}"
        return f"{name}: {self.where}; error {self.error:.1e}, tolerance {self.tolerance:.1e}"


@dataclass
class CheckReport:
    """What `self_test` has found."""

    device: str
    """With its name, if it has one."""
    note: str = ""
    """Why losses do without kernels there, "" if they do not."""
    rows: int = 0
    """Different rows of logits a call."""
    seconds: float = 0.0
    findings: list[CheckFinding] = field(default_factory=list)

    @property
    def wrong(self) -> list[CheckFinding]:
        return [one for one in self.findings if not one.passed]

    @property
    def passed(self) -> bool:
        """Whether something was compared, and nothing was wrong."""
        return bool(self.findings) and not self.wrong

    def groups(self) -> list[list[CheckFinding]]:
        """The findings of each loss and type."""
        found: dict[tuple[str, str], list[CheckFinding]] = {}
        for one in self.findings:
            found.setdefault((one.loss, one.dtype), []).append(one)
        return list(found.values())

    def summary(self) -> str:
        """What is wrong, line by line, and the verdict."""
        lines = [f"WRONG: {one}" for one in self.wrong]
        calls, of = len(self.findings), f"{self.device}, {self.rows} rows, {self.seconds:.0f} s"
        if not self.passed:
            return "\n".join([*lines, f"{len(self.wrong)} of {calls} calls are wrong ({of})"])
        plain = sum(not one.is_judged for one in self.findings)
        formulas = f"{plain} of plain formulas, which kernels are judged by, are finite"
        if plain == calls:
            return f"no kernel ran; all {formulas} ({of})"
        return f"all {calls - plain} calls agree with float64" + (f"; {formulas}" if plain else "") + f" ({of})"

    def __str__(self) -> str:
        return "\n".join(filter(None, [self.note, heading(), *map(line_of, self.groups()), self.summary()]))

    def to_json(self) -> str:
        """All findings, also those that the table joins in a line."""
        from .config import config

        facts = {name: value for name, value in asdict(self).items() if name != "findings"}
        findings = [{**asdict(one), "passed": one.passed} for one in self.findings]
        whole = {"machine": config(), **facts, "passed": self.passed, "findings": findings}
        return to_json(whole)


COLUMNS = "{:<9} {:<10} {:>5}  {:>8} {:>9}  {:>9}  {}"


def in_columns(title: str, *others: object) -> str:
    """A line of the table, whose first column is as wide as the longest title of a loss."""
    width = max(12, *(len(loss.title) for loss in registered().values()))
    return f"{title:<{width}} {COLUMNS.format(*others)}"


def heading() -> str:
    """Of the table: calls are the forms of a loss, and error, tolerance and verdict those of the worst."""
    return in_columns("loss", "type", "backend", "calls", "error", "tolerance", "ms a row", "verdict")


def line_of(group: Sequence[CheckFinding]) -> str:
    """The findings of a loss in one type as a line of the table; the time is that of its defaults."""
    worst, wrong = max(group, key=lambda one: one.used), sum(not one.passed for one in group)
    time_of = group[0].milliseconds_per_row
    verdict = f"WRONG ({wrong} of {len(group)})" if wrong else "ok" if worst.is_judged else "formula"
    return in_columns(
        registered()[worst.loss].title, worst.dtype, worst.backend, len(group), f"{worst.error:.1e}",
        f"{worst.tolerance:.1e}", "" if time_of is None else f"{time_of:.3f}", verdict,
    )  # fmt: skip


def self_test(
    device: torch.device | str | None = None,
    losses: Sequence[str] | None = None,
    *,
    rows: int | None = None,
    sizes: tuple[int, int] = REAL,
    backend: str = "auto",
    tell: Callable[[str], object] | None = None,
) -> CheckReport:
    """Compares losses and gradients with float64, with the kernels and launches that a call on a device gets.

    Logits are random, W and pieces those of two made-up vocabularies of the sizes of Llama 3's and Qwen3's. A loss with
    kernels is called in each type of logits with its defaults and with each of its options changed in turn, with
    labels, with chunks left out by a mask, with weights of W that are trained, and inside of `XTokenLoss`; one without
    by its defaults only. On a GPU rows are repeated until every block has several.

    Parameters
    ----------
    device : torch.device, optional
        Default: the current CUDA device if there is one, else the CPU.
    losses : sequence of str, optional
        Names of registered losses. Default: all.
    rows : int, optional
        Different rows of logits. Default: 64, on a GPU with little free memory fewer; on the CPU 8.
    sizes : (int, int)
        Of the two vocabularies.
    backend : str
        See `select_backend`.
    tell : callable, optional
        Called with each line of the table when it is known.

    Returns
    -------
    CheckReport
        Print it; ``report.passed`` is the verdict.

    Raises
    ------
    ValueError
        For a loss or a backend that is not registered, a device that is not there, or fewer than 8 rows.
    RuntimeError
        If a backend that is named lacks a loss.

    Notes
    -----
    On the CPU it takes a minute of one core and 0.6 GB. A GPU's memory is taken for about 20 MB a row, 1.3 GB in all
    (counted on the CPU, with blocks of rows as large as a GPU's).
    """
    names = tuple(registered()) if losses is None else tuple(losses)
    for name in names:
        check_choice(name, "losses", tuple(registered()))
    check_backend(backend)
    if rows is not None and rows < LEAST_ROWS:
        raise ValueError(f"rows: expected at least {LEAST_ROWS}, got {rows}")
    where = found_device(device)
    count = _rows_for(where) if rows is None else rows
    report = CheckReport(_described(where), _note(where, backend), count)
    say = tell if tell is not None else lambda line: None
    started = time.perf_counter()
    for line in filter(None, [report.note, heading()]):
        say(line)
    pair = made_up_pair(*sizes)
    widths = sizes[0] + PADDING[0], sizes[1] + PADDING[1]
    inputs = Inputs.random(pair, sizes, count, where, widths)
    for name in names:
        calls = calls_of(registered()[name], backend, where)
        for dtype in DTYPES:
            group = [finding(call, inputs, dtype, backend) for call in calls]
            report.findings.extend(group)
            say(line_of(group))
    report.seconds = time.perf_counter() - started
    say(report.summary())
    return report


class Lesson(NamedTuple):
    """What a run has of a teacher: its loss, and of the logits of student and teacher the widths and types."""

    teacher: Teacher
    widths: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]


def check_lessons(
    lessons: Sequence[Lesson], device: torch.device, backend: str = "auto", rows: int = 16
) -> CheckReport:
    """`self_test` of the losses of a run that have kernels, as `XTokenLoss` calls them, with its W, pieces, options."""
    started = time.perf_counter()
    findings = []
    for teacher, widths, (dtype, teacher_dtype) in lessons:
        if select_backend(backend, device, teacher.loss) == "reference":
            continue
        loss, projection = registered()[teacher.loss], teacher.projection
        is_trained = isinstance(projection, LearnableProjection)
        pair = Pair(projection.projection() if is_trained else projection, teacher.pieces)
        inputs = Inputs.random(pair, teacher.shape or widths, rows, device, widths)
        case = Case("", loss, teacher.options)
        for extra in (CRITERION, TRAINED) if is_trained else (CRITERION,):
            findings.append(finding(Call(teacher.loss, case, extra, teacher_dtype), inputs, dtype, backend))
    return CheckReport(_described(device), _note(device, backend), rows, time.perf_counter() - started, findings)


def found_device(device: torch.device | str | None) -> torch.device:
    """A device that is there, by default a GPU if there is one; ValueError for others."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected 'cpu' or a device such as 'cuda:0', got {device!r}") from error
    if where.type == "cuda":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if there == 0 or (where.index or 0) >= there:
            raise ValueError(f"device: expected one that torch finds, of which there are {there}, got {device!r}")
        return torch.device("cuda", torch.cuda.current_device()) if where.index is None else where
    return where


def _described(device: torch.device) -> str:
    return f"{device}, {torch.cuda.get_device_properties(device).name}" if device.type == "cuda" else str(device)


def _note(device: torch.device, backend: str) -> str:
    reason = why_not("cuda", device) if device.type == "cuda" and backend == "auto" else None
    return "" if reason is None else f"losses on {device} are computed in plain PyTorch: {reason}"


def _rows_for(device: torch.device) -> int:
    """As many rows as `ROWS` says, on a GPU at most as many as fit in half of its free memory."""
    count = ROWS.get(device.type, ROWS["cpu"])
    if device.type != "cuda":
        return count
    return max(LEAST_ROWS, min(count, int(torch.cuda.mem_get_info(device)[0] / 2 / BYTES_A_ROW)))


# ---- calls


@dataclass(frozen=True)
class Call:
    """A loss in one form, as a step of training calls it.

    `extra` is "" or one of `EXTRAS`: labels from the same pass; chunks that a mask on the device leaves out; weights of
    W that get a gradient; a teacher whose logits have another type (bfloat16, beside it float32); `XTokenLoss` with
    such a teacher. `teacher_dtype` is the type of the teacher's logits, by default that of the student's.
    """

    name: str
    case: Case
    extra: str = ""
    teacher_dtype: torch.dtype | None = None

    def types(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Of the logits of student and teacher, for a student of this type."""
        if self.extra == MIXED:
            return dtype, torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
        return dtype, dtype if self.teacher_dtype is None else self.teacher_dtype


LABELS, MASKED, TRAINED, MIXED, CRITERION = "labels", "masked chunks", "trained W", "two types", "XTokenLoss"
EXTRAS = (LABELS, MASKED, TRAINED, MIXED, CRITERION)


def calls_of(loss: type[Loss], backend: str, device: torch.device) -> list[Call]:
    """All forms of a loss if it has kernels there; else its defaults, since options are then torch's business alone."""
    first, *others = forms(loss)
    if select_backend(backend, device, loss.name) == "reference":
        return [Call(loss.name, first)]
    extras = [extra for extra in EXTRAS if extra != TRAINED or loss.trains_projection]
    return [*(Call(loss.name, one) for one in (first, *others)), *(Call(loss.name, first, extra) for extra in extras)]


@dataclass(frozen=True)
class Inputs:
    """Logits in float64, and what else a call takes, on one device; rows are repeated as `copies` samples."""

    student: Tensor  # [T_s, V_student]
    teacher: Tensor  # [T_t, >= V_teacher]
    chunks: Alignment
    labels: Tensor  # int64 [T_s]
    pair: Pair
    copies: int

    @classmethod
    def random(
        cls, pair: Pair, sizes: tuple[int, int], rows: int, device: torch.device, widths: tuple[int, int]
    ) -> Inputs:
        """Chunks of a random text, and logits of so many rows, at least as wide as the vocabularies."""
        wide = max(sizes[0], widths[0]), max(sizes[1], widths[1])
        return cls.of(pair, text_of(pair, sizes, rows), wide, device)

    @classmethod
    def of(cls, pair: Pair, chunks: Alignment, widths: tuple[int, int], device: torch.device) -> Inputs:
        """For these chunks, of one sample with token ids."""
        assert chunks.student_ids is not None
        assert chunks.teacher_ids is not None
        generator = torch.Generator().manual_seed(0)
        student, teacher = (
            3 * torch.randn(len(ids), width, generator=generator, dtype=torch.float64, device="cpu")
            for ids, width in zip((chunks.student_ids, chunks.teacher_ids), widths, strict=True)
        )
        labels = chunks.student_ids.clone()
        labels[3::5] = IGNORED
        blocks = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
        wanted = 1 + blocks / max(1, len(chunks.spans))
        copies = 1 if blocks == 0 else 2 ** math.ceil(math.log2(wanted))  # by which sums are divided without rounding
        return cls(student.to(device), teacher.to(device), chunks, labels.to(device), pair, copies)

    def repeated(self, copies: int, same_tokenizer: bool) -> tuple[Alignment, Tensor]:
        """The chunks of so many samples, on the device, and their labels."""
        one = one_to_one(len(self.student) - 1) if same_tokenizer else self.chunks
        assert one.student_ids is not None
        assert one.teacher_ids is not None
        chunks = Alignment(
            one.spans.repeat(copies, 1), torch.arange(copies + 1, device="cpu") * len(one.spans),
            one.student_ids.repeat(copies, 1), one.teacher_ids.repeat(copies, 1),
        )  # fmt: skip
        return chunks.to(self.student.device), self.labels.repeat(copies, 1)


class Outcome(NamedTuple):
    """What a call gives, for each sample."""

    losses: Tensor  # [samples, K]
    sums: Tensor  # [n], of one sample: of the losses, with labels also of the cross-entropy
    gradient: Tensor  # [samples, T_s, columns]
    weight_gradient: Tensor | None  # [nnz], of one sample


class Run:
    """A call on logits rounded to the types of a student of `dtype`, for so many samples; `exact`: in float64."""

    def __init__(
        self, call: Call, inputs: Inputs, dtype: torch.dtype, backend: str, copies: int = 1, exact: bool = False
    ) -> None:
        self.call, self.backend, self.copies = call, backend, copies
        given = inputs.student, inputs.student.roll(1, 0) if call.case.same_tokenizer else inputs.teacher
        student, teacher = (
            one.to(own).to(torch.float64 if exact else own) for one, own in zip(given, call.types(dtype), strict=True)
        )
        self.student, self.teacher = student.repeat(copies, 1, 1), teacher.repeat(copies, 1, 1)
        self.chunks, self.labels = inputs.repeated(copies, call.case.same_tokenizer)
        self.pair, self.weight = inputs.pair, None
        if call.extra == MASKED:
            self.chunks = self.chunks.supervised(self.labels)
        if call.extra == TRAINED:
            W, wide = inputs.pair.projection, torch.float64 if exact else torch.float32
            self.weight = W.weight.detach().to(student.device, wide).clone().requires_grad_()
            self.pair = inputs.pair._replace(
                projection=SimpleNamespace(row_ptr=W.row_ptr, col=W.col, weight=self.weight, shape=W.shape)
            )

    def outcome(self) -> Outcome:
        with torch.no_grad():
            losses: Tensor = self._loss(self.student, reduction="none")
        return Outcome(losses.view(self.copies, -1), *self.step())

    def step(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Forward and backward; all but the losses of an outcome."""
        leaf = self.student.detach().requires_grad_()
        if self.call.extra == CRITERION:
            total = self.copies * self._criterion(leaf)  # whose mean is over all samples
            sums = total[None]
        elif self.call.extra == LABELS:
            sums = torch.stack(self._loss(leaf, labels=self.labels, reduction="sum"))
            total = sums[0] + 0.7 * sums[1]
        else:
            total = self._loss(leaf, reduction="sum")
            sums = total[None]
        leaves = [leaf] if self.weight is None else [leaf, self.weight]
        gradient, *others = torch.autograd.grad(total, leaves)
        return sums.detach() / self.copies, gradient, others[0] / self.copies if others else None

    def _loss(self, student: Tensor, **more: Any) -> Any:
        return self.call.case(student, self.teacher, self.chunks, self.pair, backend=self.backend, **more)

    def _criterion(self, student: Tensor) -> Tensor:
        case = self.call.case
        projection = self.pair.projection if case.loss.needs is Needs.PROJECTION else None
        pieces = self.pair.pieces if case.loss.needs is Needs.PIECES else None
        teacher = Teacher(projection, self.call.name, pieces=pieces, **case.options)
        criterion = XTokenLoss([teacher], diagnostics=False, backend=self.backend)
        chunks = None if case.same_tokenizer else self.chunks
        total: Tensor = criterion(student, self.labels, self.teacher, chunks)[0]
        return total


# ---- comparison


class Deviation(NamedTuple):
    """The largest error of a kind, and which number has it."""

    error: float
    where: str


def finding(call: Call, inputs: Inputs, dtype: torch.dtype, backend: str = "auto") -> CheckFinding:
    """Compares a call in one type of logits."""
    device = inputs.student.device
    name = select_backend(backend, device, call.name)
    form = ", ".join(filter(None, [call.case.name, call.extra]))
    known = call.name, form, str(dtype).removeprefix("torch."), name
    truth = Run(call, inputs, dtype, "reference", exact=True).outcome()
    try:
        run = Run(call, inputs, dtype, backend, inputs.copies)
        got = run.outcome()
        found = deviations(got, truth)
        seconds, repeats = [], True
        for _ in range(1 if name == "reference" else REPETITIONS):
            started = _now(device)
            again = run.step()
            seconds.append(_now(device) - started)
            if not all(_same(a, b) for a, b in zip(again, got[1:], strict=True)):
                repeats = False
                found = _worse(found, deviations(Outcome(got.losses, *again), truth))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a kernel that does not run; it is what there is to report
        return CheckFinding(*known, math.inf, 0.0, f"{type(error).__name__}: {error}", None, False)
    plain = found if name == "reference" else deviations(Run(call, inputs, dtype, "reference").outcome(), truth)
    floors = {**FLOORS, "row": RANKED_ROW} if call.case.loss.by_rank else FLOORS
    tolerance = {kind: 2 * plain[kind].error + floors[kind] for kind in found}
    kind = max(found, key=lambda one: _share(found[one].error, tolerance[one]))
    milliseconds = 1e3 * statistics.median(seconds) / run.student[..., 0].numel()
    return CheckFinding(*known, found[kind].error, tolerance[kind], found[kind].where, milliseconds, repeats)


def _share(error: float, tolerance: float) -> float:
    return error / tolerance if error <= tolerance < math.inf else math.inf


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _worse(one: dict[str, Deviation], other: dict[str, Deviation]) -> dict[str, Deviation]:
    return {kind: max(one[kind], other[kind], key=lambda found: found.error) for kind in one}


def deviations(got: Outcome, truth: Outcome) -> dict[str, Deviation]:
    """The largest relative errors by their kind, see `FLOORS`; infinite for what is not finite."""
    of_sums = _largest(got.sums, truth.sums, "loss" if len(truth.sums) == 1 else "loss or cross-entropy")
    found = {**dict.fromkeys(("loss", "row", "column"), Deviation(0.0, "")), "sum": of_sums}
    if truth.weight_gradient is not None and got.weight_gradient is not None:
        errors = (got.weight_gradient.double() - truth.weight_gradient).abs()
        place = f"gradient of W, entry {_at(errors, got.weight_gradient, truth.weight_gradient)}"
        found["W"] = Deviation(float(_relative(errors.norm(), truth.weight_gradient.norm())), place)
    want, norms = truth.gradient[0], truth.gradient[0].norm(dim=1)
    for sample, (losses, gradient) in enumerate(zip(got.losses, got.gradient, strict=True)):
        of = f" of sample {sample}" if len(got.losses) > 1 else ""
        of_sample = _of_gradient(gradient, want, norms, of)
        of_sample["loss"] = _largest(losses, truth.losses[0], f"loss{of}, chunk")
        found = _worse(found, {**found, **of_sample})
    return found


def _largest(got: Tensor, want: Tensor, what: str) -> Deviation:
    """The largest error, relative to the largest number that is wanted."""
    errors = _relative((got.double() - want).abs(), want.abs().max())
    place = int(errors.argmax())
    at = f" {place}" if len(want) > 1 else ""
    return Deviation(float(errors[place]), f"{what}{at}: {float(got[place]):.6g}, expected {float(want[place]):.6g}")


def _of_gradient(got: Tensor, want: Tensor, norms: Tensor, of: str) -> dict[str, Deviation]:
    """Of the worst row, and of the worst column; what is nothing in this type is not looked at for itself."""
    errors, least = (got.double() - want).abs(), torch.finfo(got.dtype).smallest_normal
    rows = _relative(errors.norm(dim=1), norms + least)
    row = int(rows.argmax())
    by_row = f"gradient{of}, row {row}, column {_at(errors[row], got[row], want[row])}"
    used = norms > 0
    if not used.any():
        return {"row": Deviation(float(rows[row]), by_row), "column": Deviation(0.0, "")}
    least_of_row = 1e-9 * norms[used, None] + least  # nor are elements that are nothing beside their row
    columns = _relative(errors[used], want[used].abs() + least_of_row).median(dim=0)[0]
    column = int(columns.argmax())
    worst = _at(errors[:, column], got[:, column], want[:, column])
    by_column = f"gradient{of}, column {column}, most of its rows, row {worst}"
    return {"row": Deviation(float(rows[row]), by_row), "column": Deviation(float(columns[column]), by_column)}


def _relative(errors: Tensor, of: Tensor) -> Tensor:
    """Errors divided by `of`; infinite where they are no numbers, or not 0 for 0."""
    return torch.where(errors == 0, 0.0, errors / of).nan_to_num(nan=math.inf, posinf=math.inf)


def _at(errors: Tensor, got: Tensor, want: Tensor) -> str:
    place = int(errors.nan_to_num(nan=math.inf).argmax())
    return f"{place}: {float(got[place]):.6g}, expected {float(want[place]):.6g}"
