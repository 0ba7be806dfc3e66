"""Speed and memory of the losses, against the plain formulas and against torch's own cross-entropy.

Logits are random, of the real vocabularies of Llama 3 and Qwen3. Every row of the table is the public function, forward
and backward, N student rows; `cross_entropy` is torch's, forward and backward, on the same logits. The plain formulas
(`xtoken.reference`, differentiated by autograd) run on fewer rows, since they hold many copies of them. The result is
compared with theirs first. The byte floor is the time that a copy in memory takes for as many bytes as the loss has to
read (logits) and write (gradient), on as many threads. Results go to bench/results/losses.json, beside those that
earlier runs of the same commit and machine left there for other types, levels, threads and losses.

    python bench/bench_losses.py [--rows 512] [--threads 1 2] [--repeat 5] [--levels avx512 avx2] [--types fp32]
    python bench/bench_losses.py --linear
"""

from __future__ import annotations

import json
import random
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from cases import NUMBERS, Case, Pair, cases, forward_backward, one_to_one
from measure import Row, load_tokenizers, machine, median_seconds, parser, peak_growth, table, write_rows
from real_tokenizers import encode
from torch import Tensor

import xtoken
from xtoken import Vocabulary, _core
from xtoken.losses import cpu, gradient_memory
from xtoken.losses.backends import backends_with, register_backend
from xtoken.losses.logits import Parts
from xtoken.losses.loss import Needs

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def numbers_text(seed: int, words: int) -> str:
    """Words with many numbers between them."""
    draw = random.Random(seed)
    nouns = ["readers", "tokens", "prices", "seconds", "students", "miles", "books", "errors"]
    return " ".join(f"{draw.randint(0, 10 ** draw.randint(1, 7)):,} {draw.choice(nouns)}," for _ in range(words))


def pair_of(student: Vocabulary, teacher: Vocabulary, wanted: Sequence[Case]) -> Pair:
    """What the wanted losses need."""
    needs = {case.loss.needs for case in wanted}
    return Pair(
        xtoken.ProjectionMatrix.build(student, teacher) if Needs.PROJECTION in needs else None,
        xtoken.PieceIndex.build(student, teacher) if Needs.PIECES in needs else None,
    )


def numbers_alignment(student: Vocabulary, teacher: Vocabulary, rows: int) -> xtoken.Alignment:
    """The chunks of a text full of numbers, as far as so many student tokens and twice as many of the teacher's go."""
    ids = [encode(side.tokenizer, numbers_text(0, rows)) for side in (student, teacher)]
    whole = xtoken.Aligner(student, teacher).align(*ids)
    fits = (whole.spans[:, 1] <= rows) & (whole.spans[:, 3] <= 2 * rows)
    return xtoken.Alignment(whole.spans[fits], None, *map(torch.tensor, ids))


def below(alignment: xtoken.Alignment, size: int) -> xtoken.Alignment:
    """The same with ids below the size."""
    assert alignment.student_ids is not None
    assert alignment.teacher_ids is not None
    ids = alignment.student_ids.clamp(max=size - 1), alignment.teacher_ids.clamp(max=size - 1)
    return xtoken.Alignment(alignment.spans, None, *ids)


def copy_rate(repeat: int) -> float:
    """Bytes read and written in a second by a copy of a quarter of a gigabyte, into memory in use."""
    source = torch.ones(2**26)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), repeat)


def measure_linear(options: Namespace, wanted: Sequence[Case]) -> list[Row]:
    """Memory of each loss from hidden states, its first variant, against that of the logits and their gradient."""
    rows, width, size = options.linear_rows, options.linear_width, options.vocabulary or 128256
    vocabulary = Vocabulary([b"%d" % i for i in range(size)])
    pair = pair_of(vocabulary, vocabulary, wanted)
    torch.manual_seed(0)
    hidden = torch.randn(rows, width)
    head = torch.randn(size, width) / width**0.5
    teacher = torch.randn(rows, size, dtype=torch.bfloat16)
    materialised = 2 * rows * size * hidden.element_size()
    rows_of_table = []
    first = [case for k, case in enumerate(wanted) if case.loss not in [other.loss for other in wanted[:k]]]
    for case in first:

        def step(case: Case = case) -> None:
            student = xtoken.LinearLogits(hidden.detach().requires_grad_(), head.detach().requires_grad_())
            case(student, teacher, one_to_one(rows - 1), pair).backward()

        started = time.perf_counter()
        grown = peak_growth(step)
        seconds = time.perf_counter() - started
        row = {"loss": f"linear {case.loss.title}, {rows} rows of {width}", "type": "fp32",
               "level": _core.cpu_level(), "threads": torch.get_num_threads(), "ms_per_row": 1e3 * seconds / rows,
               "memory_of_materialised":
               None if grown is None else (grown - hidden.nbytes - head.nbytes) / materialised}  # fmt: skip
        rows_of_table.append(row)
        print(json.dumps(row), flush=True)
    return rows_of_table


def measure(options: Namespace, wanted: Sequence[Case]) -> list[Row]:
    student_side, teacher_side = map(Vocabulary.from_tokenizer, load_tokenizers("llama3", "qwen3"))
    numbers = numbers_alignment(student_side, teacher_side, options.rows)
    if options.vocabulary is not None:
        sides = (Vocabulary([side[i] for i in range(options.vocabulary)]) for side in (student_side, teacher_side))
        student_side, teacher_side = sides
        numbers = below(numbers, options.vocabulary)
    pair = pair_of(student_side, teacher_side, wanted)
    ones = one_to_one(options.rows - 1)
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for type_name in options.types:
        z, y = (
            (3 * torch.randn(count, len(side), generator=generator)).to(TYPES[type_name])
            for count, side in ((options.rows, student_side), (2 * options.rows, teacher_side))
        )
        labels = torch.randint(len(student_side), (options.rows,), generator=generator)
        cross_entropy = forward_backward(partial(torch.nn.functional.cross_entropy, target=labels), z)
        baseline, rate = {}, {}
        for threads in options.threads:
            torch.set_num_threads(threads)
            baseline[threads], rate[threads] = median_seconds(cross_entropy, options.repeat), copy_rate(options.repeat)
            rows.append({"loss": "torch cross_entropy", "type": type_name, "threads": threads,
                         "ms_per_row": 1e3 * baseline[threads] / options.rows})  # fmt: skip
        for wanted_case in wanted:
            chunks = numbers if wanted_case.name.endswith(NUMBERS) else ones
            teacher = z.flip(0) if wanted_case.same_tokenizer else y
            case = with_columns(wanted_case, teacher, pair)
            columns = case.options.get("columns")
            used = teacher.nbytes * used_share(chunks, teacher)
            moved = 2 * z.nbytes + used * (1 if columns is None else len(columns) / teacher.shape[1])
            for threads in options.threads:
                torch.set_num_threads(threads)
                plain = reference_seconds(case, z, teacher, chunks, pair, options.reference_rows)
                floor = moved / rate[threads]
                for level, backend in backends_of(case, options.levels).items():
                    call = partial(case, teacher=teacher, chunks=chunks, pair=pair, backend=backend)
                    step = forward_backward(call, z)
                    seconds = median_seconds(step, options.repeat)
                    gradient_memory.release()
                    grown = peak_growth(step)
                    row = {
                        "loss": case.name + " (Llama 3 to itself)" * case.same_tokenizer,
                        "type": type_name,
                        "level": level,
                        "threads": threads,
                        "ms_per_row": 1e3 * seconds / options.rows,
                        "of_cross_entropy": seconds / baseline[threads],
                        "times_reference": None if plain is None else plain * options.rows / seconds,
                        "floor_ms_per_row": 1e3 * floor / options.rows,
                        "floor_share": floor / seconds,
                        "megabytes_beyond_gradient": None if grown is None else (grown - z.nbytes) / 1e6,
                    }
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    return rows


def backends_of(case: Case, levels: Sequence[str]) -> dict[str, str]:
    """Backends that compute the loss, by level; without kernels of its own that is its formula alone."""
    for level in levels:
        register_backend(cpu.backend(f"cpu:{level}", level))
    known = backends_with(case.loss.name)
    return {level: f"cpu:{level}" for level in levels if f"cpu:{level}" in known} or {"formula": "reference"}


def with_columns(case: Case, teacher: Tensor, pair: Pair) -> Case:
    """The same with the teacher's columns that it would choose in every call, so that their choice is not timed."""
    loss = case.loss.of(*pair, **{**case.loss.options(), **case.options})
    source = Parts.of(teacher).batched().source(teacher.shape[1])
    chosen = loss.chosen(source, teacher.device, "auto")
    return replace(case, options={name: getattr(chosen, name) for name in case.loss.options()})


def used_share(alignment: xtoken.Alignment, teacher: Tensor) -> float:
    """Share of the teacher's rows that chunks use."""
    lengths = alignment.spans[:, 3] - alignment.spans[:, 2]
    return float(lengths.sum()) / teacher.shape[0]


def reference_seconds(
    case: Case, student: Tensor, teacher: Tensor, alignment: xtoken.Alignment, pair: Pair, count: int
) -> float | None:
    """Seconds a student row of the plain formulas; and a check of the default backend against them."""
    if count == 0:
        return None
    assert alignment.student_ids is not None
    assert alignment.teacher_ids is not None
    few = alignment.spans[:count]
    z, y = student[: int(few[-1, 1])].float(), teacher[: int(few[-1, 3])].float()
    one = xtoken.Alignment(few, None, alignment.student_ids, alignment.teacher_ids)
    got, want = (float(case(z, y, one, pair, backend=backend)) for backend in ("auto", "reference"))
    assert abs(got - want) <= 1e-4 * abs(want) + 1e-5, f"wrong loss: {got}, not {want}"
    return median_seconds(forward_backward(lambda leaf: case(leaf, y, one, pair, backend="reference"), z), 2) / len(z)


def main() -> None:
    arguments = parser(__doc__, "losses.json")
    arguments.add_argument("--rows", type=int, default=512)
    arguments.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--repeat", type=int, default=5)
    arguments.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    arguments.add_argument("--levels", nargs="+", default=_core.cpu_levels(), choices=_core.cpu_levels())
    arguments.add_argument("--only", nargs="+", help="parts of the names of losses")
    arguments.add_argument("--reference-rows", type=int, default=32, help="chunks of the plain formulas; 0: leave out")
    arguments.add_argument("--linear", action="store_true", help="only the memory of losses from hidden states")
    arguments.add_argument("--linear-rows", type=int, default=4096)
    arguments.add_argument("--linear-width", type=int, default=2048)
    arguments.add_argument("--vocabulary", type=int, help="cut both vocabularies to this size (for a quick look)")
    options = arguments.parse_args()
    torch.set_num_threads(max(options.threads))
    wanted = [case for case in cases() if not options.only or any(part in case.name for part in options.only)]
    rows = measure_linear(options, wanted) if options.linear else measure(options, wanted)
    names = ("loss", "type", "level", "threads", "ms_per_row", "of_cross_entropy", "times_reference", "floor_share",
             "megabytes_beyond_gradient", "memory_of_materialised")  # fmt: skip
    print(table(rows, names))
    write_rows(options.output, machine("torch", rows=options.rows), rows, ("loss", "type", "level", "threads"))


if __name__ == "__main__":
    main()
