"""Stages of bench/gpu.py, each a process: losses compared on small and on real inputs, timed, and profiled.

    python bench/gpu_parts.py small [--device cpu]
    python bench/gpu_parts.py compare [--device cpu] [--rows 48]
    python bench/gpu_parts.py speed [--device cpu] [--rows 4096] [--seconds 120]
    python bench/gpu_parts.py counters [--device cpu] [--rows 1024] [--loss pkl]

``small`` calls every loss that has kernels two or three times, for a sanitizer. ``compare`` is the comparison of
`xtoken check` on the vocabularies of Llama 3 and Qwen3, with their W and pieces and a text full of numbers. ``speed``
prints JSON, a line a step: the losses in bfloat16, forward and backward, as steps and as replays of a CUDA graph, which
do not wait for Python; their plain formulas (`Loss.losses`) and torch.compile of these; cross-entropy; and, where it is
installed, Liger's JSD of one vocabulary as an orientation; and what the clock is while a step runs. Bandwidth is that
of traffic that cannot be avoided (each logit read once, each gradient written once), next to the one measured for a
copy. ``counters`` runs a loss once with its kernels between two marks for a profiler, and prints which those were, as
JSON.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from functools import partial
from typing import Any
from unittest import mock

import real_pair
import torch
from cases import NUMBERS, Case, Pair, cases, forward_backward, one_to_one, problem_of
from measure import Row, median_seconds, peak_growth, timed
from torch import Tensor

import xtoken
from xtoken.check import DTYPES, LABELS, LEAST_ROWS, TRAINED, Call, Inputs, Run, calls_of, finding
from xtoken.losses.backends import backends_with, kernels_of
from xtoken.losses.cases import forms, made_up_pair
from xtoken.losses.cuda import Kernels
from xtoken.losses.loss import Needs, registered

PLAIN = ", plain formula"
COMPILED = ", torch.compile of the plain formula"

STEP_SECONDS = {COMPILED: 60, PLAIN: 4, "": 3}
"""What must be left of ``--seconds`` for a step to begin, by how its name ends: so long it may take."""

LONG_SECONDS = 0.02
"""A step that takes longer is not repeated as often."""

# ---- a pair of vocabularies


REAL = (128256, 151936)
"""Widths of the logits of Llama 3 and Qwen3."""

real = functools.cache(real_pair.load)


@functools.cache
def pair_of(students: int, teachers: int) -> Pair:
    """Of Llama 3 and Qwen3 where the logits are as wide as theirs, else something like it."""
    if (students, teachers) == REAL:
        return real()[0]
    return made_up_pair(students, teachers)


def backend_for(case: Case, device: str) -> str:
    """The kernels for CUDA, where the loss has some: an error if they cannot take the call."""
    return "cuda" if device == "cuda" and "cuda" in backends_with(case.loss.name) else "auto"


def check_kernels(device: str) -> None:
    """Raises an error where the kernels do not load, or cannot run: the package itself would go on without them."""
    if device == "cuda":
        importlib.import_module("xtoken._cuda")
        xtoken.select_backend("cuda", device)


def with_kernels() -> list[str]:
    """The names of the losses that have kernels for CUDA, in a build that has them or not."""
    return [name for name in registered() if kernels_of(name, "cuda") is not None]


# ---- small

SMALL = (17001, 17389)
"""Vocabularies with rows longer than what a block of the kernels has in flight, even of 16 bits."""

BLOCKS = 2
"""Of every launch, so that a block has several chunks and rows in turn."""


def small(device: str) -> None:
    """Every kernel in two types, forward and backward, as often as a sanitizer has time for; nothing is compared."""
    check_kernels(device)
    launch, launched = Kernels.launch, 0

    def narrow(self: Kernels, memory: Any, name: str, fields: Any, blocks: int | None = None) -> None:
        nonlocal launched
        launched += 1
        launch(self, memory, name, fields, BLOCKS if blocks is None else min(blocks, BLOCKS))

    inputs = Inputs.random(made_up_pair(*SMALL), SMALL, LEAST_ROWS, torch.device(device), SMALL)
    with mock.patch.object(Kernels, "launch", narrow):
        for call, dtype in small_calls():
            print(f"{call.name}, {call.case.name or 'as usual'}, {call.extra}, {dtype}", flush=True)
            Run(call, inputs, dtype, "auto").step()
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{launched} launches")


def small_calls() -> list[tuple[Call, torch.dtype]]:
    """Each loss with labels, as usual in bfloat16, and with another merge in float32; with a trained W."""
    found = []
    for name in with_kernels():
        usual, *others = forms(registered()[name])
        other = next((case for case in others if "merge" in case.options), usual)
        found += [(Call(name, usual, LABELS), torch.bfloat16), (Call(name, other, LABELS), torch.float32)]
        if registered()[name].trains_projection:
            found.append((Call(name, usual, TRAINED), torch.bfloat16))
    return found


# ---- compare


def compare(device: str, rows: int, names: Sequence[str] | None = None) -> None:
    """Every loss that has kernels as `xtoken check` calls it, with the real pair, which lacks what some others need;
    prints JSON, a line a comparison; exits with 1 if one is too far off."""
    check_kernels(device)
    pair, aligned = real()
    assert aligned.student_ids is not None
    assert aligned.teacher_ids is not None
    spans = aligned.spans[aligned.spans[:, 1] <= rows]
    ids = aligned.student_ids[:rows], aligned.teacher_ids[: int(spans[:, 3].max())]
    inputs = Inputs.of(pair, xtoken.Alignment(spans, None, *ids), REAL, torch.device(device))
    wrong: list[str] = []
    kernels = [name for name in registered() if xtoken.select_backend("auto", device, name) != "reference"]
    for name in kernels if names is None else names:
        for call in calls_of(registered()[name], "auto", torch.device(device)):
            for dtype in DTYPES:
                found = finding(call, inputs, dtype)
                row: Row = {"name": found.title, **asdict(found)}
                if not found.passed:
                    row["failed"] = str(found)
                    wrong.append(str(found))
                print(json.dumps(row), flush=True)
    if wrong:
        raise SystemExit("\n".join(wrong))


# ---- counters


SHARED = {"mark_rows", "cross_entropy", "scale"}
"""Kernels that all losses have in common."""


def counters(device: str, rows: int, losses: Sequence[str]) -> None:
    """Forward and backward of these losses, where a profiler sees the first launch of each of their own kernels.

    Prints, as JSON, a line a case, which those were, in their order.
    """
    check_kernels(device)
    launch = Kernels.launch
    for case in single_cases():
        if case.loss.name not in losses:
            continue
        seen: list[str] = []

        def watched(self: Kernels, memory: Any, name: str, *rest: Any, seen: list[str] = seen) -> None:
            if name in SHARED or name in seen:
                return launch(self, memory, name, *rest)
            seen.append(name)
            torch.cuda.profiler.start()
            launch(self, memory, name, *rest)
            return torch.cuda.profiler.stop()

        run, _ = kernel_step(case, *logits(device, rows, REAL))
        run()
        with mock.patch.object(Kernels, "launch", watched):
            run()
        print(json.dumps({"name": case.name, "rows": rows, "launched": seen}), flush=True)


# ---- speed


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Median seconds of a run that is warm; on a GPU of a few in a row, so that short ones do not wait for Python."""

    def by_events(run: Callable[[], Any], together: int = 1) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(together):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / together

    timer = timed if device == "cpu" else by_events
    run()
    if timer(run) > LONG_SECONDS:
        return median_seconds(run, repeat=3, timer=timer, warm=0)
    return median_seconds(run, repeat=7, timer=timed if device == "cpu" else partial(by_events, together=5))


def copy_bandwidth(device: str, elements: int) -> float:
    """Bytes read and written a second by a copy of so many floats."""
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


Step = tuple[Callable[[], Any], int]
"""Forward and backward, and the bytes that these cannot avoid to move."""

Maker = Callable[[Tensor, Tensor], Step]
"""Makes a step for logits of student [N, V_s] and teacher [N, V_t]."""


def single_cases() -> list[Case]:
    """Of chunks of single tokens."""
    return [case for case in cases() if not case.name.endswith(NUMBERS)]


def lacking(pair: Pair) -> set[str]:
    """The titles of losses that look at the text of tokens, where the pair's pieces have none."""
    has_text = pair.pieces is not None and pair.pieces.text is not None
    found = {loss.title for loss in registered().values() if any(field.name == "text" for field in fields(loss))}
    return set() if has_text else found


def makers(device: str, left_out: set[str]) -> dict[str, Maker]:
    """What is timed, by name, but for the losses with these titles.

    Kernels first, and what they are compared with; then losses that are formulas alone; compiled formulas last, since
    they take longest and may fail.
    """
    timed_cases = [case for case in single_cases() if case.loss.title not in left_out]
    fast = [case for case in timed_cases if case.loss.name in with_kernels()]
    first, formulas = (
        list({case.loss: case for case in reversed(some)}.values())[::-1]
        for some in (fast, [case for case in timed_cases if case not in fast])
    )
    found: dict[str, Maker] = {case.name: partial(kernel_step, case) for case in fast}
    found["torch cross_entropy"] = cross_entropy_step
    found.update({f"{case.loss.title} with labels": partial(kernel_step, case, labelled=True) for case in first})
    found["XTokenLoss with one projection"] = criterion_step
    for case in first:
        if case.loss.is_default and not case.same_tokenizer:
            found[f"{case.name}, teacher's order"] = partial(ordered_step, case)
    if importlib.util.find_spec("liger_kernel") is not None and device == "cuda":
        found["Liger JSD, one vocabulary"] = liger_step
    found.update({case.name + PLAIN: partial(formula_step, case, compiled=False) for case in first})
    found.update({case.name: partial(kernel_step, case) for case in formulas})
    found.update({case.name + COMPILED: partial(formula_step, case, compiled=True) for case in [*first, *formulas]})
    return found


def teacher_of(case: Case, z: Tensor, y: Tensor) -> Tensor:
    return z.roll(1, 0) if case.same_tokenizer else y


def kernel_step(case: Case, z: Tensor, y: Tensor, labelled: bool = False) -> Step:
    teacher, pair = teacher_of(case, z, y), pair_of(z.shape[1], y.shape[1])
    chunks = one_to_one(len(z) - 1).to(z.device)
    backend = backend_for(case, z.device.type)
    call: Callable[..., Any] = partial(case, teacher=teacher, chunks=chunks, pair=pair, backend=backend)
    if labelled:
        call = partial(with_labels, call, labels=torch.zeros(len(z), dtype=torch.int64, device=z.device))
    return forward_backward(call, z), 2 * z.nbytes + teacher.nbytes


def with_labels(call: Callable[..., tuple[Tensor, Tensor]], student: Tensor, **arguments: Any) -> Tensor:
    """Loss and cross-entropy."""
    loss, cross_entropy = call(student, **arguments)
    return loss + cross_entropy


def ordered_step(case: Case, z: Tensor, y: Tensor) -> Step:
    """With the teacher's columns where the student has those of their partners."""
    pair = pair_of(z.shape[1], y.shape[1])
    made = pair.projection if case.loss.needs is Needs.PROJECTION else pair.pieces
    assert made is not None
    order = made.teacher_order()
    index = torch.cat([order.tokens, torch.arange(len(order), y.shape[1])]).to(y.device)
    teacher = xtoken.OrderedLogits(y[:, index], order)
    chunks, backend = one_to_one(len(z) - 1).to(z.device), backend_for(case, z.device.type)
    call: Callable[..., Any] = partial(case, teacher=teacher, chunks=chunks, pair=pair, backend=backend)
    return forward_backward(call, z), 2 * z.nbytes + y.nbytes


def formula_step(case: Case, z: Tensor, y: Tensor, compiled: bool) -> Step:
    teacher, pair = teacher_of(case, z, y), pair_of(z.shape[1], y.shape[1])
    problem = problem_of(case, z, teacher, one_to_one(len(z) - 1).to(z.device), pair)

    def formula(leaf: Tensor) -> Tensor:  # of columns that stand for tokens, as the call takes them
        losses: Tensor = problem.options.losses(leaf[:, : problem.student.shape[2]], problem.teacher[0], problem.chunks)
        return losses.mean()

    return forward_backward(torch.compile(formula) if compiled else formula, z), 2 * z.nbytes + teacher.nbytes


def cross_entropy_step(z: Tensor, y: Tensor) -> Step:
    labels = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    return forward_backward(lambda leaf: torch.nn.functional.cross_entropy(leaf.float(), labels), z), 2 * z.nbytes


def criterion_step(z: Tensor, y: Tensor) -> Step:
    labels, chunks = torch.zeros(len(z), dtype=torch.int64, device=z.device), one_to_one(len(z) - 1).to(z.device)
    teacher = xtoken.Teacher(pair_of(z.shape[1], y.shape[1]).projection)
    criterion = xtoken.XTokenLoss([teacher], diagnostics=False)
    return forward_backward(lambda leaf: criterion(leaf, labels, y, chunks)[0], z), 2 * z.nbytes + y.nbytes


def liger_step(z: Tensor, y: Tensor) -> Step:
    jsd = importlib.import_module("liger_kernel.transformers.jsd").LigerJSD(beta=0.5)
    target = z.roll(1, 0).log_softmax(-1)
    return forward_backward(lambda leaf: jsd(leaf.log_softmax(-1), target), z), 3 * z.nbytes


def speed(device: str, most_rows: int, vocabulary: tuple[int, int], seconds: float) -> None:
    """Prints the times of all steps as they come, each as JSON on a line; on fewer rows where memory is short."""

    def show(result: Row) -> None:
        print(json.dumps(result), flush=True)

    end = time.perf_counter() + seconds
    check_kernels(device)
    copied = copy_bandwidth(device, 2**28 if device == "cuda" else 2**20)
    show({"copy_gigabytes_per_second": copied / 1e9})
    wanted = {"liger_kernel": "liger-kernel is not installed"}
    missing = [text for name, text in wanted.items() if importlib.util.find_spec(name) is None]
    if device == "cuda" and shutil.which("nvidia-smi") is None:
        missing.append("nvidia-smi is not on the path: no clocks")
    left_out = lacking(pair_of(*vocabulary))
    if left_out:
        missing.append(f"the stored pair has not the text of tokens: no {', '.join(sorted(left_out))}")
    show({"missing": missing})
    fitted: dict[str, int] = {}
    for name, make in makers(device, left_out).items():
        needed = next(seconds for ending, seconds in STEP_SECONDS.items() if name.endswith(ending))
        if time.perf_counter() > end - needed:
            show({"name": name, "failed": "left out: no time is left"})
            continue
        # compiled for as many rows as the formula fitted in: each number of them is a compilation
        rows = fitted.get(name.replace(COMPILED, PLAIN), most_rows)
        try:
            result = measured(make, device, rows, vocabulary, copied)
        except Exception as error:  # one of the competitors' failures must not end the others
            show({"name": name, "failed": f"{type(error).__name__}: {error}"[:500]})
        else:
            fitted[name] = result["rows"]
            show({"name": name, **result})


def measured(make: Maker, device: str, rows: int, vocabulary: tuple[int, int], copied: float) -> Row:
    """Time, bandwidth and memory of a step, with so many rows or as many as fit."""
    while rows >= 1:
        if device == "cuda":
            torch.cuda.empty_cache()
        try:
            seconds, more, traffic, peak = tried(make, device, rows, vocabulary)
        except torch.OutOfMemoryError:
            rows //= 2
            continue
        return {
            "rows": rows,
            "ms": 1e3 * seconds,
            "us_per_row": 1e6 * seconds / rows,
            "gigabytes_per_second": traffic / seconds / 1e9,
            "of_copy": traffic / seconds / copied,
            "peak_megabytes": None if peak is None else peak / 1e6,
            **more,
        }
    raise MemoryError("out of memory with one row")


def logits(device: str, rows: int, vocabulary: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of student and teacher, bfloat16, with a row that nothing reads."""
    generator = torch.Generator(device).manual_seed(0)
    z, y = (torch.randn(rows + 1, size, generator=generator, device=device).bfloat16() for size in vocabulary)
    return z, y


def tried(make: Maker, device: str, rows: int, vocabulary: tuple[int, int]) -> tuple[float, Row, int, int | None]:
    """Seconds of a step, and what only a GPU tells; bytes moved, peak memory. What it allocated is free afterwards."""
    run, traffic = make(*logits(device, rows, vocabulary))
    seconds, peak = seconds_of(run, device), peak_growth(run, device)
    return seconds, {"replay_ms": None} if device == "cpu" else {**clocks(run), **replayed(run)}, traffic, peak


def clocks(run: Callable[[], Any]) -> Row:
    """Of the multiprocessors, and the power drawn, while steps run; nothing where the driver's nvidia-smi is not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    asked = "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"
    device = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    with subprocess.Popen([program, device, *asked], stdout=subprocess.PIPE, text=True) as query:
        while query.poll() is None:
            run()
            torch.cuda.synchronize()
        assert query.stdout is not None
        return clocks_of(query.stdout.read())


def clocks_of(printed: str) -> Row:
    """What nvidia-smi says of a device: megahertz and watts, a part that it does not know left out."""
    found: Row = {}
    for name, value in zip(("sm_clock_mhz", "power_watts"), printed.strip().split(", "), strict=False):
        with suppress(ValueError):
            found[name] = float(value)
    return found


def replayed(run: Callable[[], Any]) -> Row:
    """Median time of a replay of the step as a CUDA graph; why not, if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return {"replay_ms": None, "not_captured": str(error)[:300]}
    return {"replay_ms": 1e3 * seconds_of(graph.replay, "cuda")}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("part", choices=["small", "compare", "speed", "counters"])
    arguments.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments.add_argument("--rows", type=int, help="default: 4096, to compare 48, for counters 1024")
    arguments.add_argument("--vocabulary", type=int, nargs=2, default=[128256, 151936], help="of student and teacher")
    arguments.add_argument("--loss", nargs="+", default=with_kernels(), help="of counters; default: all with kernels")
    arguments.add_argument("--seconds", type=float, default=600, help="no step begins when most of them are over")
    options = arguments.parse_args()
    if options.part == "small":
        small(options.device)
    elif options.part == "compare":
        compare(options.device, options.rows or 48)
    elif options.part == "counters":
        counters(options.device, options.rows or 1024, options.loss)
    else:
        speed(options.device, options.rows or 4096, tuple(options.vocabulary), options.seconds)


if __name__ == "__main__":
    main()
