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

import argparse
import json
import random
from collections.abc import Callable
from typing import Any

import torch
from measure import Row, load_tokenizers, machine, median_seconds, parser, peak_growth, table, timed, write_rows
from real_tokenizers import encode
from torch import Tensor

import xtoken
from xtoken import _core, reference
from xtoken.losses import cpu
from xtoken.losses.backends import register_backend

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def numbers_text(seed: int, words: int) -> str:
    """Words with many numbers between them."""
    draw = random.Random(seed)
    nouns = ["readers", "tokens", "prices", "seconds", "students", "miles", "books", "errors"]
    return " ".join(f"{draw.randint(0, 10 ** draw.randint(1, 7)):,} {draw.choice(nouns)}," for _ in range(words))


def alignments(tokenizers: list[Any], rows: int) -> dict[str, xtoken.Alignment]:
    """Chunks of one token on each side; and those of a text full of numbers, cut to so many student tokens."""
    start = torch.arange(1, rows + 1, dtype=torch.int32)
    spans = torch.stack([start, start + 1, start, start + 1], 1)[:-1]
    nothing = torch.zeros(1, 2 * rows, dtype=torch.int64)  # chunks of one token need no ids
    ones = xtoken.Alignment(spans, [0, len(spans)], nothing, nothing)
    text = numbers_text(0, rows)
    ids = [encode(tokenizer, text) for tokenizer in tokenizers]
    mixed = xtoken.Aligner(*tokenizers).align(*ids)
    fits = (mixed.spans[:, 1] <= rows) & (mixed.spans[:, 3] <= 2 * rows)
    spans = mixed.spans[fits]
    numbers = xtoken.Alignment(spans, [0, len(spans)], *(torch.tensor(one)[None] for one in ids))
    return {"1-to-1": ones, "numbers": numbers}


def copy_rate(repeat: int) -> float:
    """Bytes read and written in a second by a copy of a quarter of a gigabyte, into memory in use."""
    source = torch.ones(2**26)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), repeat)


def measure_linear(options: argparse.Namespace) -> list[Row]:
    """Memory of `linear_pkl_loss` against that of the logits and their gradient."""
    rows, width = options.linear_rows, options.linear_width
    size = options.vocabulary or 128256
    ids = torch.arange(size, dtype=torch.int32)
    W = xtoken.ProjectionMatrix(torch.arange(size + 1), ids, torch.ones(size), size)
    start = torch.arange(1, rows, dtype=torch.int32)
    cut = xtoken.Alignment(torch.stack([start, start + 1, start, start + 1], 1))
    torch.manual_seed(0)
    hidden = torch.randn(1, rows, width)
    head = torch.randn(size, width) / width**0.5
    teacher = torch.randn(1, rows, size, dtype=torch.bfloat16)

    def step() -> None:
        leaves = hidden.detach().requires_grad_(), head.detach().requires_grad_()
        xtoken.linear_pkl_loss(*leaves, teacher, cut, W, top_k=None).backward()

    grown = None

    def watched() -> None:
        nonlocal grown
        grown = peak_growth(step)

    seconds = timed(watched)
    materialised = 2 * rows * size * hidden.element_size()
    extra = None if grown is None else (grown - hidden.nbytes - head.nbytes) / materialised
    row = {"loss": f"linear P-KL, {rows} rows of {width}", "type": "fp32", "level": _core.cpu_level(),
           "threads": torch.get_num_threads(), "ms_per_row": 1e3 * seconds / rows,
           "memory_of_materialised": extra}  # fmt: skip
    print(json.dumps(row), flush=True)
    return [row]


def measure(options: argparse.Namespace) -> list[Row]:
    tokenizers = load_tokenizers("llama3", "qwen3")
    W = xtoken.ProjectionMatrix.build(*tokenizers)
    sizes = W.shape if options.vocabulary is None else (options.vocabulary, options.vocabulary)
    if options.vocabulary is not None:
        W = small_projection(W, options.vocabulary)
    cut = alignments(tokenizers, options.rows)
    vocabularies = [xtoken.Vocabulary.from_tokenizer(tokenizer) for tokenizer in tokenizers]
    if options.vocabulary is not None:
        vocabularies = [xtoken.Vocabulary([v[i] for i in range(options.vocabulary)]) for v in vocabularies]
        cut = {name: cut_ids(one, options.vocabulary) for name, one in cut.items()}
    pieces = xtoken.PieceIndex.build(*vocabularies) if wanted("prefix KL, numbers", options.only) else None
    generator = torch.Generator().manual_seed(0)
    columns = torch.randperm(sizes[1], generator=generator)[: min(8192, sizes[1] // 2)].sort().values
    losses: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
        "P-KL all columns": ("1-to-1", xtoken.pkl_loss, {"projection": W, "top_k": None}),
        "P-KL 8192 columns": ("1-to-1", xtoken.pkl_loss, {"projection": W, "columns": columns}),
        "P-KL all columns, numbers": ("numbers", xtoken.pkl_loss, {"projection": W, "top_k": None, "merge": "mean"}),
        "prefix KL": ("1-to-1", xtoken.prefix_kl_loss, {"pieces": pieces}),
        "prefix KL, numbers": ("numbers", xtoken.prefix_kl_loss, {"pieces": pieces}),
        "GOLD": ("1-to-1", xtoken.gold_loss, {"projection": W}),
        "H-KL": ("1-to-1", xtoken.hkl_loss, {"projection": W}),
        "ULD": ("1-to-1", xtoken.uld_loss, {}),
        "KD (Llama 3 to itself)": ("1-to-1", xtoken.kd_loss, {}),
    }
    rows = []
    for type_name in options.types:
        dtype = TYPES[type_name]
        student = (3 * torch.randn(1, options.rows, sizes[0], generator=generator)).to(dtype)
        teacher = (3 * torch.randn(1, 2 * options.rows, sizes[1], generator=generator)).to(dtype)
        labels = torch.randint(sizes[0], (options.rows,), generator=generator)

        def cross_entropy(student: Tensor = student, labels: Tensor = labels) -> None:
            leaf = student[0].detach().requires_grad_()
            torch.nn.functional.cross_entropy(leaf, labels).backward()

        baseline, rate = {}, {}
        for threads in options.threads:
            torch.set_num_threads(threads)
            baseline[threads], rate[threads] = median_seconds(cross_entropy, options.repeat), copy_rate(options.repeat)
            rows.append({"loss": "torch cross_entropy", "type": type_name, "threads": threads,
                         "ms_per_row": 1e3 * baseline[threads] / options.rows})  # fmt: skip
        for name, (chunks, function, arguments) in losses.items():
            if not wanted(name, options.only):
                continue
            same = function is xtoken.kd_loss
            y = student.flip(1) if same else teacher
            one = cut[chunks]
            bytes_moved = 2 * student.nbytes + y.nbytes * used_share(one, y)
            if arguments.get("columns") is not None:
                bytes_moved -= y.nbytes * used_share(one, y) * (1 - len(columns) / sizes[1])
            for threads in options.threads:
                torch.set_num_threads(threads)
                plain = reference_seconds(function, student, y, one, arguments, options.reference_rows)
                floor = bytes_moved / rate[threads]
                for level in options.levels:
                    backend = f"cpu:{level}"
                    register_backend(cpu.backend(backend, level))

                    def step(function=function, student=student, y=y, one=one, arguments=arguments, backend=backend):
                        leaf = student.detach().requires_grad_()
                        loss = function(leaf, y, one, backend=backend, **arguments)
                        loss.backward()
                        return leaf.grad

                    seconds = median_seconds(step, options.repeat)
                    grown = peak_growth(step)
                    row = {
                        "loss": name,
                        "type": type_name,
                        "level": level,
                        "threads": threads,
                        "ms_per_row": 1e3 * seconds / options.rows,
                        "of_cross_entropy": seconds / baseline[threads],
                        "times_reference": None if plain is None else plain * options.rows / seconds,
                        "floor_ms_per_row": 1e3 * floor / options.rows,
                        "floor_share": floor / seconds,
                        "megabytes_beyond_gradient": None if grown is None else (grown - student.nbytes) / 1e6,
                    }
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    return rows


def wanted(name: str, only: list[str] | None) -> bool:
    """Whether a loss of that name is measured."""
    return not only or any(part in name for part in only)


def cut_ids(alignment: xtoken.Alignment, size: int) -> xtoken.Alignment:
    """The same with ids below the size."""
    ids = (alignment.student_ids, alignment.teacher_ids)
    return xtoken.Alignment(alignment.spans, alignment.offsets, *(one.clamp(max=size - 1) for one in ids))


def used_share(alignment: xtoken.Alignment, teacher: Tensor) -> float:
    """Share of the teacher's rows that chunks use."""
    lengths = alignment.spans[:, 3] - alignment.spans[:, 2]
    return float(lengths.sum()) / teacher.shape[1]


def reference_seconds(
    function: Callable[..., Any], student: Tensor, teacher: Tensor, alignment: xtoken.Alignment,
    arguments: dict[str, Any], count: int,
) -> float | None:  # fmt: skip
    """Seconds a student row of the plain formulas; and a check of the default backend against them."""
    if count == 0:
        return None
    few = alignment.spans[:count]
    rows = int(few[-1, 1])
    z, y = student[0, :rows].float(), teacher[0, : int(few[-1, 3])].float()
    assert alignment.student_ids is not None
    assert alignment.teacher_ids is not None
    one = xtoken.Alignment(few, None, alignment.student_ids[0], alignment.teacher_ids[0])
    chunks = reference.Chunks.of(one, len(z), len(y), realised=True)
    W = arguments.get("projection")

    def run() -> Tensor:
        leaf = z.detach().requires_grad_()
        if function is xtoken.pkl_loss:
            columns = arguments.get("columns")
            columns = torch.arange(W.shape[1]) if columns is None else columns
            merge = arguments.get("merge", "first")
            losses = reference.pkl(leaf, y, chunks, reference.restrict(W, columns), columns, merge=merge)
        elif function is xtoken.prefix_kl_loss:
            losses = reference.prefix(leaf, y, chunks, arguments["pieces"].data)
        elif function is xtoken.uld_loss:
            losses = reference.uld(leaf, y, chunks)
        elif function is xtoken.kd_loss:
            losses = reference.kd(leaf, y, chunks)
        else:
            weight = 1.0 if function is xtoken.gold_loss else 0.6
            losses = sum(reference.gold(leaf, y, chunks, reference.common_pairs(W, weight)))  # type: ignore
        losses.mean().backward()
        return losses.detach().mean()

    want = run()
    got = function(z, y, one, **arguments)
    assert abs(float(got - want)) <= 1e-4 * abs(float(want)) + 1e-5, f"wrong loss: {float(got)}, not {float(want)}"
    return median_seconds(run, 2) / rows


def small_projection(W: xtoken.ProjectionMatrix, size: int) -> xtoken.ProjectionMatrix:
    """The corner [size, size] of W."""
    keep = (W.row_index < size) & (W.col < size)
    counts = torch.bincount(W.row_index[keep], minlength=size)[:size]
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return xtoken.ProjectionMatrix(row_ptr, W.col[keep], W.weight[keep], size)


def main() -> None:
    arguments = parser(__doc__, "losses.json")
    arguments.add_argument("--rows", type=int, default=512)
    arguments.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--repeat", type=int, default=5)
    arguments.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    arguments.add_argument("--levels", nargs="+", default=_core.cpu_levels(), choices=_core.cpu_levels())
    arguments.add_argument("--only", nargs="+", help="parts of the names of losses")
    arguments.add_argument("--reference-rows", type=int, default=32, help="chunks of the plain formulas; 0: leave out")
    arguments.add_argument("--linear", action="store_true", help="only the memory of linear_pkl_loss")
    arguments.add_argument("--linear-rows", type=int, default=4096)
    arguments.add_argument("--linear-width", type=int, default=2048)
    arguments.add_argument("--vocabulary", type=int, help="cut both vocabularies to this size (for a quick look)")
    options = arguments.parse_args()
    torch.set_num_threads(max(options.threads))
    rows = measure_linear(options) if options.linear else measure(options)
    names = ("loss", "type", "level", "threads", "ms_per_row", "of_cross_entropy", "times_reference", "floor_share",
             "megabytes_beyond_gradient", "memory_of_materialised")  # fmt: skip
    print(table(rows, names))
    write_rows(options.output, machine("torch", rows=options.rows), rows, ("loss", "type", "level", "threads"))


if __name__ == "__main__":
    main()
