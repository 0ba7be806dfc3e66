"""What a rank of a vocabulary-parallel loss sends for a chunk, of real pairs of tokenizers: see docs/scale.md.

    python bench/bench_scale.py                     # writes bench/results/scale.json
    python bench/bench_scale.py --ranks 8 --pairs llama3/qwen3

The numbers come from the closed forms of the formulas (`InParts.exchanged`), which tests/parallel compares with a
counter of the bytes of real processes; no process is started here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import measure
import torch
from measure import load_tokenizers, parser, table, write_rows

from xtoken import Alignment, PieceIndex, ProjectionMatrix, Vocabulary
from xtoken.losses import Needs, registered
from xtoken.losses.backends import kernels_of
from xtoken.losses.logits import OrderedLogits, Parts
from xtoken.losses.loss import Loss
from xtoken.losses.ordered import in_order
from xtoken.parallel.call import call_of
from xtoken.parallel.columns import Columns
from xtoken.parallel.ranks import Ranks

PAIRS = ("llama3/qwen3", "smollm2/qwen3")
"""Student and teacher, by their names in tests/real_tokenizers.py."""

KEY = ("pair", "loss", "ranks", "teacher")


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
    call = call_of(
        loss, nothing, nothing, None if loss.needs is Needs.SAME_TOKENIZER else chunk, (2, 2),
        sizes=(student.size, teacher.size), mask=None, reduction="mean", backend="auto",
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


def main(arguments: list[str] | None = None) -> None:
    """Runs the pairs and writes the results."""
    options = parser(__doc__, "scale.json")
    options.add_argument("--pairs", nargs="+", default=PAIRS, metavar="STUDENT/TEACHER", help=f"default: {PAIRS}")
    options.add_argument("--ranks", nargs="+", type=int, default=(8,), help="default: 8")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [row for pair in given.pairs for row in rows_of(pair, *tables_of(pair), given.ranks)]
    print(table(rows))
    write_rows(given.output, measure.machine("torch"), rows, KEY)


if __name__ == "__main__":
    main()
