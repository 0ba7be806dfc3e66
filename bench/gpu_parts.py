"""Stages of bench/gpu.py, each a process: losses compared on small and on real inputs, timed, and profiled.

    python bench/gpu_parts.py small [--device cpu]
    python bench/gpu_parts.py compare [--device cpu] [--rows 48]
    python bench/gpu_parts.py speed [--device cpu] [--rows 4096] [--seconds 120]
    python bench/gpu_parts.py counters [--device cpu] [--rows 1024]

``small`` compares with the plain formulas. ``compare`` does so with the vocabularies of Llama 3 and Qwen3, their W and
pieces and a text full of numbers, in every type, launched as users get it, against float64. ``speed`` prints JSON, a
line a step: the losses in bfloat16, forward and backward, as steps and as replays of a CUDA graph, which do not wait
for Python; their plain formulas (`Loss.losses`) and torch.compile of these; cross-entropy; and, where it is installed,
Liger's JSD of one vocabulary as an orientation; and what the clock is while a step runs. Bandwidth is that of traffic
that cannot be avoided (each logit read once, each gradient written once), next to the one measured for a copy.
``counters`` runs each loss once between two marks for a profiler, and prints which kernels it launched, as JSON.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import real_pair
import torch
from cases import NUMBERS, Case, Pair, cases, choices, forward_backward, one_to_one, problem_of
from measure import Row, median_seconds, peak_growth, timed
from torch import Tensor

import xtoken
from xtoken.losses.backends import backends_with
from xtoken.losses.cuda import Kernels
from xtoken.losses.loss import Needs, registered

STEP_SECONDS = 20
"""What must be left of ``--seconds`` for a step to begin: so long may its compilation take."""

PLAIN = ", plain formula"
COMPILED = ", torch.compile of the plain formula"

# ---- a pair of vocabularies


def projection(students: int, teachers: int) -> xtoken.ProjectionMatrix:
    """Much like Llama 3 to Qwen3: 85 % of the students have one exact partner, the others two to four pieces."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.where(torch.rand(students, generator=generator) < 0.85, 1, 2)
    counts += (counts > 1) * torch.randint(0, 3, (students,), generator=generator)
    row = torch.arange(students).repeat_interleave(counts)
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    position = torch.arange(len(row)) - row_ptr[row]
    col = torch.randperm(students, generator=generator)[row] % (teachers - 28) + 7 * position
    weight = 0.1**position
    total = torch.zeros(students).index_add_(0, row, weight)
    return xtoken.ProjectionMatrix(row_ptr, col.int(), weight / total[row], teachers)


def pieces(students: int, teachers: int) -> xtoken.PieceIndex:
    """Much like Llama 3 to Qwen3: four students in five have a partner, and tokens without one begin with one."""
    partners = int(0.8 * min(students, teachers))
    words = [str(i).translate(str.maketrans("0123456789", "abcdefghij")).encode() for i in range(partners - 10)]
    common = [*(b"%d" % digit for digit in range(10)), *words]
    sides = []
    for size, mark in ((students, b"0"), (teachers, b"1")):
        others = size - partners  # of which most share a few words
        longer = [words[i * i // others // 4] + mark + str(i).encode() for i in range(others)]
        sides.append(xtoken.Vocabulary([*common, *longer]))
    return xtoken.PieceIndex.build(*sides)


REAL = (128256, 151936)
"""Widths of the logits of Llama 3 and Qwen3."""

real = functools.cache(real_pair.load)


@functools.cache
def pair_of(students: int, teachers: int) -> Pair:
    """Of Llama 3 and Qwen3 where the logits are as wide as theirs, else something like it."""
    if (students, teachers) == REAL:
        return real()[0]
    return Pair(projection(students, teachers), pieces(students, teachers))


def chunks_of_several(index: xtoken.PieceIndex) -> xtoken.Alignment:
    """Each side's first token without a partner against its pieces."""
    tokens, known = [], []
    for side in (index.student, index.teacher):
        tokens.append(int((side.ptr.diff() > 1).nonzero()[0]))
        known.append(side.pieces[side.ptr[tokens[-1]] : side.ptr[tokens[-1] + 1]].tolist())
    middle = 1 + len(known[0])
    spans = [[1, 2, 1, middle], [2, 2 + len(known[1]), middle, middle + 1]]
    return xtoken.Alignment(spans, None, [0, tokens[0], *known[1]], [0, *known[0], tokens[1]])


def backend_for(case: Case, device: str) -> str:
    """The kernels for CUDA, where the loss has some: an error if they cannot take the call."""
    return "cuda" if device == "cuda" and "cuda" in backends_with(case.loss.name) else "auto"


def check_kernels(device: str) -> None:
    """Raises the import's own error where the kernels do not load: the package itself would go on without them."""
    if device == "cuda":
        importlib.import_module("xtoken._cuda")


# ---- small


def forms() -> Iterator[Case]:
    """Every loss with its defaults, and with each other word, switch and small number of columns in turn."""
    for loss in registered().values():
        others: dict[str, tuple[Any, ...]] = {name: values[1:] for name, values in choices(loss).items()}
        for name, default in loss.options().items():
            if isinstance(default, bool):
                others[name] = (not default,)
            elif name.endswith("top_k"):
                others[name] = (100,)
        yield Case(loss.name, loss)
        for name, values in others.items():
            yield from (Case(f"{loss.name}, {name}={value}", loss, {name: value}) for value in values)


def small(device: str) -> None:
    """Every loss, forward and backward, on vocabularies of a few hundred tokens; compared with the plain formulas."""
    check_kernels(device)
    pair = pair_of(333, 401)
    ones, longer = one_to_one(7), chunks_of_several(pieces(333, 401))
    labels = torch.arange(8).to(device)
    teachers = [xtoken.Teacher(pair.projection)]

    def criterion(student: Tensor, teacher: Tensor, backend: str = "auto") -> Tensor:
        """Its parts have different factors: backward goes over the gradient again."""
        total: Tensor = xtoken.XTokenLoss(teachers, backend=backend)(student, labels, teacher, ones)[0]
        return total

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(8, 333, generator=generator).to(device, dtype).requires_grad_()
        y = torch.randn(8, 401, generator=generator).to(device, dtype)
        calls: dict[str, Callable[..., Tensor]] = {"criterion": partial(criterion, teacher=y)}
        for case in forms():
            call = partial(case, teacher=z.detach().flip(-1) if case.same_tokenizer else y, pair=pair)
            call = partial(call, backend=backend_for(case, device))
            calls[case.name] = partial(call, chunks=ones if case.same_tokenizer else longer)
            if not case.options:
                calls[f"{case.name}, one to one"] = partial(call, chunks=ones)
                calls[f"{case.name}, labels"] = partial(with_labels, call, chunks=ones, labels=labels)
        for name, run in calls.items():
            loss = run(z)
            loss.backward()
            got, want = float(loss.detach()), float(run(z, backend="reference").detach())
            if not abs(got - want) <= 0.02 * abs(want) + 1e-3:
                raise SystemExit(f"{name}, {dtype}: {got}, and {want} by the plain formula")
    print("small set: ran and compared")


def with_labels(call: Callable[..., tuple[Tensor, Tensor]], student: Tensor, **arguments: Any) -> Tensor:
    """Loss and cross-entropy."""
    loss, cross_entropy = call(student, **arguments)
    return loss + cross_entropy


# ---- compare

TOLERANCE = 2, 1e-5
"""Times the error of the plain formulas in the type of the logits, and beside it: CUDA's fast exponentials have one."""


def compare(device: str, rows: int) -> None:
    """Every loss in every type at the real size; prints JSON, a line a comparison; exits with 1 if one is too far off.

    An error is the largest of the losses, or the norm of the gradient's, relative to that of the truth.
    """
    check_kernels(device)
    pair, aligned = real()
    fits = aligned.spans[:, 1] <= rows
    numbers = xtoken.Alignment(aligned.spans[fits], None, aligned.student_ids, aligned.teacher_ids)
    generator = torch.Generator(device).manual_seed(0)
    lengths = rows + 1, int(numbers.spans[:, 3].max()) + 1
    z64, y64 = (
        3 * torch.randn(length, width, generator=generator, device=device, dtype=torch.float64)
        for length, width in zip(lengths, REAL, strict=True)
    )
    worst: list[str] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        z, y = z64.to(dtype), y64.to(dtype)
        for case in cases():
            teacher = z.roll(1, 0) if case.same_tokenizer else y
            chunks = one_to_one(rows - 1) if case.same_tokenizer else numbers
            call = partial(case, chunks=chunks.to(device), pair=pair)
            truth = outcome(call, z.double(), teacher.double(), "reference")
            plain = outcome(call, z, teacher, "reference")
            got = outcome(call, z, teacher, backend_for(case, device))
            row: Row = {"name": case.name, "type": str(dtype).removeprefix("torch.")}
            for k, what in enumerate(("loss", "gradient")):
                error, least = (relative_error(one[k], truth[k]) for one in (got, plain))
                row |= {f"{what}_error": error, f"{what}_error_of_plain": least}
                if not error <= TOLERANCE[0] * least + TOLERANCE[1]:
                    row["failed"] = f"{what}: {error:.2e}, plain formula {least:.2e}"
                    worst.append(f"{case.name}, {dtype}: {row['failed']}")
            print(json.dumps(row), flush=True)
    if worst:
        raise SystemExit("\n".join(worst))


def outcome(call: Callable[..., Tensor], z: Tensor, y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    leaf = z.detach().requires_grad_()
    loss = call(leaf, y, backend=backend, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def relative_error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


# ---- counters


def counters(device: str, rows: int) -> None:
    """Forward and backward of each loss, where a profiler sees the first launch of each kernel, of shared ones once.

    Prints, as JSON, a line a loss, which those were, in their order.
    """
    check_kernels(device)
    launch, shared = Kernels.launch, {"mark_rows", "cross_entropy", "scale"}
    done: set[tuple[str, str]] = set()
    for case_name, make in kernel_makers().items():
        seen: list[str] = []

        def watched(self: Kernels, memory: Any, name: str, *rest: Any) -> None:
            key = ("" if name in shared else case_name, name)  # noqa: B023 - used in this turn only
            if key in done:
                return launch(self, memory, name, *rest)
            done.add(key)
            seen.append(name)  # noqa: B023
            torch.cuda.profiler.start()
            launch(self, memory, name, *rest)
            return torch.cuda.profiler.stop()

        run, _ = make(*logits(device, rows, REAL))
        run()
        Kernels.launch = watched  # type: ignore[method-assign,assignment]
        run()
        Kernels.launch = launch  # type: ignore[method-assign]
        print(json.dumps({"name": case_name, "rows": rows, "launched": seen}), flush=True)


# ---- speed


def seconds_of(run: Callable[[], Any], device: str, together: int = 5) -> float:
    """Median seconds of a run that is warm; on a GPU of a few in a row, so that it does not wait for Python."""

    def by_events(run: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(together):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / together

    return median_seconds(run, repeat=7, timer=timed if device == "cpu" else by_events, warm=2)


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


def kernel_makers() -> dict[str, Maker]:
    return {case.name: partial(kernel_step, case) for case in single_cases()}


def makers(device: str) -> dict[str, Maker]:
    """What is timed, by name; compiled formulas last, since they take longest and may fail."""
    found = kernel_makers()
    singles = single_cases()
    first = list({case.loss: case for case in reversed(singles)}.values())[::-1]
    found["torch cross_entropy"] = cross_entropy_step
    for case in first:
        found[f"{case.loss.title} with labels"] = partial(kernel_step, case, labelled=True)
    found["XTokenLoss with one projection"] = criterion_step
    for case in first:
        if case.loss.is_default and not case.same_tokenizer:
            found[f"{case.name}, teacher's order"] = partial(ordered_step, case)
    if importlib.util.find_spec("liger_kernel") is not None and device == "cuda":
        found["Liger JSD, one vocabulary"] = liger_step
    for ending in (PLAIN, COMPILED):
        found.update({case.name + ending: partial(formula_step, case, compiled=ending == COMPILED) for case in first})
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

    def formula(leaf: Tensor) -> Tensor:
        losses: Tensor = problem.options.losses(leaf, teacher, problem.chunks)
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
    wanted |= {"pynvml": "pynvml is not installed: no clocks"} if device == "cuda" else {}
    show({"missing": [text for name, text in wanted.items() if importlib.util.find_spec(name) is None]})
    fitted: dict[str, int] = {}
    for name, make in makers(device).items():
        if time.perf_counter() > end - STEP_SECONDS:
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
    """Of the multiprocessors, and the power drawn, while a few steps run; nothing where pynvml is not installed."""
    if importlib.util.find_spec("pynvml") is None:
        return {}
    for _ in range(3):
        run()
    found: Row = {"sm_clock_mhz": torch.cuda.clock_rate(), "power_watts": torch.cuda.power_draw() / 1e3}
    torch.cuda.synchronize()
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
    arguments.add_argument("--seconds", type=float, default=600, help="no step begins when most of them are over")
    options = arguments.parse_args()
    if options.part == "small":
        small(options.device)
    elif options.part == "compare":
        compare(options.device, options.rows or 48)
    elif options.part == "counters":
        counters(options.device, options.rows or 1024)
    else:
        speed(options.device, options.rows or 4096, tuple(options.vocabulary), options.seconds)


if __name__ == "__main__":
    main()
