"""What distillation costs on many devices: see docs/scale.md.

    python bench/bench_scale.py                     # some minutes; writes bench/results/scale.json
    python bench/bench_scale.py --only sent plan --ranks 8 --pairs llama3/qwen3

The parts: what a rank of a vocabulary-parallel loss sends for a chunk of real pairs of tokenizers, by the closed forms
of the formulas; alignment by number of tokens; W and the piece index by size of the vocabularies; and those of
`scale_parts.py`: bytes counted in real processes, one that is off from its closed form ends the run; time by rows,
chunks, vocabulary and ranks; a plan for 64 and 512 devices.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import measure
import numpy as np
import scale_parts
import torch
from measure import load_tokenizers, parser, table, timed, write

from xtoken import Aligner, Alignment, PieceIndex, ProjectionMatrix, Vocabulary
from xtoken.losses import Needs, registered
from xtoken.losses.backends import kernels_of
from xtoken.losses.logits import OrderedLogits, Parts
from xtoken.losses.loss import Loss
from xtoken.losses.operator import Call
from xtoken.losses.ordered import in_order
from xtoken.parallel.columns import Columns
from xtoken.parallel.ranks import Ranks

PAIRS = ("llama3/qwen3", "smollm2/qwen3")
"""Student and teacher, by their names in tests/real_tokenizers.py."""

PARTS = ("sent", "alignment", "tables", "traffic", "sequences", "training", "time", "plan")


def one_of(size: int, rank: int) -> Ranks:
    """One of so many ranks, without the others."""
    ranks = Ranks()
    ranks.size, ranks.rank = size, rank
    return ranks


def cut(parts: int, ranks: Ranks, size: int) -> Columns:
    """A vocabulary of `size` where `torch.chunk` cuts one of so many tokens."""
    widths = [len(part) for part in torch.arange(parts).chunk(ranks.size)]
    return Columns.of([*widths, *[0] * (ranks.size - len(widths))], size, ranks)


def in_parts() -> dict[str, type[Loss]]:
    """The losses that take logits in parts."""
    return {name: loss for name, loss in registered().items() if not loss.whole_rows and kernels_of(name, "parallel")}


def formula(loss: Loss, student: Columns, teacher: Columns) -> Any:
    """What the loss computes of logits with these columns, on one of the ranks."""
    chunk = Alignment([[1, 2, 1, 2]], student_ids=[0, 0], teacher_ids=[0, 0])
    nothing = Parts(torch.empty(1, 2, 0))
    call = Call.of(
        loss, nothing, nothing, None if loss.needs is Needs.SAME_TOKENIZER else chunk,
        sizes=(student.size, teacher.size), mask=None, labels=None, reduction="mean", backend="auto",
    )  # fmt: skip
    every: Any = SimpleNamespace(size=teacher.size, largest_columns=lambda top_k: torch.arange(teacher.size))
    prepared = loss.prepare(call, every, every)
    module: Any = kernels_of(loss.name, "parallel")
    return module.InParts(prepared.options, student, teacher, torch.device("cpu"))


def ordered(loss: Loss, W: ProjectionMatrix, pieces: PieceIndex) -> Loss | None:
    """The loss for a teacher whose columns are where the student has them; None for one tokenizer."""
    if loss.needs is Needs.SAME_TOKENIZER:
        return None
    order = (pieces if loss.needs is Needs.PIECES else W).teacher_order()
    return in_order(loss, OrderedLogits(torch.empty(1, 1, len(order)), order), None)[0]


def tables_of(pair: str) -> tuple[ProjectionMatrix, PieceIndex]:
    """W and the pieces of real tokenizers."""
    tokenizers = load_tokenizers(*pair.split("/"))
    W = ProjectionMatrix.build(*(Vocabulary.from_tokenizer(one) for one in tokenizers))
    return W, PieceIndex.build(*tokenizers)


def rows_of(pair: str, W: ProjectionMatrix, pieces: PieceIndex, counts: Sequence[int]) -> list[measure.Row]:
    """One row for each loss, number of ranks and way to cut the teacher."""
    rows = []
    for kind, count in itertools.product(in_parts().values(), counts):
        students, teachers = (W.shape[1],) * 2 if kind.needs is Needs.SAME_TOKENIZER else W.shape
        alone: dict[str, Any] = {"uncommon_top_k": 0, "top_k": None}
        options = {**kind.options(), **{name: alone[name] for name in alone if name in kind.options()}}
        loss = kind.of(W, pieces, **options)
        ways = {
            "whole": (loss, None),
            "in parts": (loss, teachers),
            "in parts, in order": (ordered(loss, W, pieces), students),
        }
        for way, (one, parts) in ways.items():
            if one is None:
                continue
            groups = [one_of(count, rank) for rank in range(count)]
            numbers = [
                formula(
                    one, cut(students, group, students),
                    Columns((0, teachers), Ranks()) if parts is None else cut(parts, group, teachers),
                ).exchanged
                for group in groups
            ]  # fmt: skip
            rows.append({
                "pair": pair, "loss": kind.title, "ranks": count, "teacher": way, "columns": teachers,
                "numbers_a_chunk": round(sum(numbers) / count), "most_of_a_rank": max(numbers),
            })  # fmt: skip
    return rows


def best(run: Callable[[], Any], repeat: int) -> float:
    """Seconds of a processor, the least of some runs."""
    return min(timed(run, time.process_time) for _ in range(repeat))


def alignment(pair: str, lengths: Sequence[int], repeat: int) -> list[measure.Row]:
    """Alignment of one document by its tokens, on one thread."""
    from pydoc_data.topics import topics

    sides = [Vocabulary.from_tokenizer(one) for one in load_tokenizers(*pair.split("/"))]
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = [np.array(side.encode(text)) for side in sides]
    rows = []
    for length in lengths:
        times = -(-length // len(ids[0]))
        share = length / (times * len(ids[0]))
        given = [np.tile(one, times)[: round(share * times * len(one))] for one in ids]
        for method in ("bytes", "auto", "dp"):
            aligner = Aligner(*sides, method, num_threads=1)
            chunks = aligner.align(*given).num_chunks
            seconds = best(partial(aligner.align, *given), repeat)
            rows.append({
                "pair": pair, "method": method, "student_tokens": len(given[0]), "chunks": chunks,
                "nanoseconds_a_token": seconds * 1e9 / len(given[0]),
            })  # fmt: skip
    return rows


def tables(pair: str, sizes: Sequence[int], repeat: int) -> list[measure.Row]:
    """W and the piece index of the first tokens of both vocabularies, as texts: cut by the longest that is there."""
    sides = [Vocabulary.from_tokenizer(one) for one in load_tokenizers(*pair.split("/"))]
    rows = []
    for size in sizes:
        both = [Vocabulary([side[k] for k in range(min(size, len(side)))]) for side in sides]
        W = ProjectionMatrix.build(*both)
        rows.append({
            "pair": pair, "student_tokens": len(both[0]), "teacher_tokens": len(both[1]), "entries": len(W.col),
            "W_seconds": best(partial(ProjectionMatrix.build, *both), repeat),
            "pieces_seconds": best(partial(PieceIndex.build, *both), repeat),
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Runs the parts and writes the results."""
    options = parser(__doc__, "scale.json")
    options.add_argument("--pairs", nargs="+", default=PAIRS, metavar="STUDENT/TEACHER", help=f"default: {PAIRS}")
    options.add_argument("--ranks", nargs="+", type=int, default=(8,), help="of what is sent; default: 8")
    options.add_argument("--lengths", nargs="+", type=int, default=[2**14, 2**17, 2**20], help="tokens of a document")
    options.add_argument("--tokens", nargs="+", type=int, default=[2**14, 2**15, 2**16, 2**17], help="of a vocabulary")
    options.add_argument("--rows", type=int, nargs="+", default=[128, 512])
    options.add_argument("--sizes", type=int, nargs="+", default=[4000, 16000], help="columns")
    options.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="processes")
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    given = options.parse_args(arguments)
    if "plan" in given.only and "sent" not in given.only:
        options.error("--only plan needs sent")
    torch.set_num_threads(1)
    result: measure.Row = {"machine": measure.machine("torch", rows=given.rows, sizes=given.sizes)}

    def on_each(function: Any, *more: Any, least: int = 2) -> list[measure.Row]:
        worlds = [world for world in given.worlds if world >= least]
        runs = [(world, lambda rank, world=world: function(rank, world, *more)) for world in worlds]
        return [row for world, run in runs for row in scale_parts.on_processes(world, run)]

    few, sizes = given.rows[0], given.sizes
    parts: dict[str, Callable[[], list[measure.Row]]] = {
        "sent": lambda: [row for pair in given.pairs for row in rows_of(pair, *tables_of(pair), given.ranks)],
        "alignment": lambda: alignment(given.pairs[0], given.lengths, given.repeat),
        "tables": lambda: tables(given.pairs[0], given.tokens, given.repeat),
        "traffic": lambda: on_each(scale_parts.traffic_of_losses, few, sizes),
        "sequences": lambda: on_each(scale_parts.traffic_of_sequences, few, sizes),
        "training": lambda: on_each(scale_parts.training_traffic),
        "time": lambda: on_each(scale_parts.time_of_losses, given.rows, sizes, given.repeat, least=1),
        "plan": lambda: scale_parts.plans(result["sent"]),
    }
    for name in (name for name in PARTS if name in given.only):
        result[name] = parts[name]()
        print(f"\n{name}\n{table(result[name])}", flush=True)
        for row in result[name]:
            counted = row.get("bytes_a_chunk", row.get("bytes"))
            if counted != row.get("by_formula"):
                raise AssertionError(f"counted {counted} bytes, but the formula says {row['by_formula']}: {row}")
    if "plan" in given.only:
        crossings = [{"loss_share": share, "parameters": scale_parts.crossover(share)} for share in (0.01, 0.05, 0.2)]
        result["crossover"] = crossings
        print(f"\n{table(crossings)}")
    write(given.output, result)


if __name__ == "__main__":
    main()
