"""Two stages of bench/gpu.py, each a process: every loss on small inputs, and every loss timed.

    python bench/gpu_parts.py small [--device cpu]
    python bench/gpu_parts.py speed [--device cpu] [--rows 4096] [--seconds 120]

``small`` compares with the plain formulas. ``speed`` prints JSON, a line a step: the losses in bfloat16, forward and
backward; their plain formulas (`Loss.losses`) and torch.compile of these; cross-entropy; and, where it is installed,
Liger's JSD of one vocabulary as an orientation. Bandwidth is that of traffic that cannot be avoided (each logit read
once, each gradient written once), next to the one measured for a copy.
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

import torch
from cases import NUMBERS, Case, Pair, cases, choices, forward_backward, one_to_one, problem_of
from measure import Row, median_seconds, peak_growth, timed
from torch import Tensor

import xtoken
from xtoken.losses.backends import backends_with
from xtoken.losses.loss import registered

STEP_SECONDS = 40
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


@functools.cache
def pair_of(students: int, teachers: int) -> Pair:
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


def makers(device: str) -> dict[str, Maker]:
    """What is timed, by name; compiled formulas last, since they take longest and may fail."""
    found: dict[str, Maker] = {}
    singles = [case for case in cases() if not case.name.endswith(NUMBERS)]
    first = list({case.loss: case for case in reversed(singles)}.values())[::-1]
    for case in singles:
        found[case.name] = partial(kernel_step, case)
    found["torch cross_entropy"] = cross_entropy_step
    for case in first:
        found[f"{case.loss.title} with labels"] = partial(kernel_step, case, labelled=True)
    found["XTokenLoss with one projection"] = criterion_step
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
    if importlib.util.find_spec("liger_kernel") is None:
        show({"missing": ["liger-kernel is not installed"]})
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
            seconds, traffic, peak = tried(make, device, rows, vocabulary)
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
        }
    raise MemoryError("out of memory with one row")


def tried(make: Maker, device: str, rows: int, vocabulary: tuple[int, int]) -> tuple[float, int, int | None]:
    """Seconds, bytes moved and peak memory; whatever it allocated is free afterwards."""
    generator = torch.Generator(device).manual_seed(0)
    z, y = (torch.randn(rows + 1, size, generator=generator, device=device).bfloat16() for size in vocabulary)
    run, traffic = make(z, y)
    return seconds_of(run, device), traffic, peak_growth(run, device)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("part", choices=["small", "speed"])
    arguments.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments.add_argument("--rows", type=int, default=4096)
    arguments.add_argument("--vocabulary", type=int, nargs=2, default=[128256, 151936], help="of student and teacher")
    arguments.add_argument("--seconds", type=float, default=600, help="no step begins when most of them are over")
    options = arguments.parse_args()
    if options.part == "small":
        small(options.device)
    else:
        speed(options.device, options.rows, tuple(options.vocabulary), options.seconds)


if __name__ == "__main__":
    main()
