"""The truth test: does a loss leave a student alone that already knows the truth, and if not, where does it lead?

Of a finite set of texts both exact models are known (`exact.py`): with real tokenizers, and without training anything.
Some rows of the student are free, everything else is exact; they follow the gradient of the mean loss of the chunks
that use them until nothing moves. Reported as total variations from the truth:

* ``bias``: where rows end that start at the truth; ``beside_ce``: the same for the sum of cross-entropy and the loss;
* ``taught``: where they end if at first all tokens that ever come are equally likely, which is ``ignorance`` away.

Results go to bench/results/truth.json, and a picture beside it.

    python bench/truth.py                     # everything, about ten minutes on two cores
    python bench/truth.py --pairs llama3/gemma3 --kinds Python Markdown
    python bench/truth.py --losses LOSS --merge    # these rows anew, among those that are there
    python bench/truth.py --page              # only what the pages of `xtoken report` show of the results

What the pages show is in xtoken/report/truth.json: for each pair of vocabularies the bias of each loss and kind.
"""

from __future__ import annotations

import functools
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import Case, Pair, choices
from exact import FLOOR, Problem, Whole, World
from measure import RESULTS, ROOT, Row, load_tokenizers, machine, parser, table, write
from torch import Tensor
from truth_texts import KINDS

from xtoken import PieceIndex, ProjectionMatrix, Vocabulary
from xtoken.losses.loss import registered
from xtoken.report.pair import MEASURED, digest

PAIRS = {
    "llama3/qwen3": "Llama 3 from Qwen3",
    "qwen3/llama3": "Qwen3 from Llama 3",
    "llama3/gemma3": "Llama 3 from Gemma 3",
    "gemma3/llama3": "Gemma 3 from Llama 3",
    "llama3/mistral": "Llama 3 from Mistral SentencePiece",
    "smollm2/gemma3": "SmolLM2 from Gemma 3",
    "qwen3/o200k": "Qwen3 from o200k",
    "o200k/qwen3": "o200k from Qwen3",
    "llama3/llama3": "Llama 3 from itself",
}
"""Student and teacher; the names are those of tests/real_tokenizers.py."""

ROWS = 6
"""Rows of the student where chunks start, and as many inside chunks, that are looked at for a pair and a kind."""


def forms() -> list[Case]:
    """Every registered loss as it is, and with each other word that an option of it takes."""
    found = []
    for loss in registered().values():
        found.append(Case(loss.title, loss))
        for option, words in choices(loss).items():
            found += [Case(f"{loss.title} {word}", loss, {option: word}) for word in words[1:]]
    return found


# --- where a loss leads


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Total variation of distributions given by log-probabilities [..., V]."""
    return (a.double().exp() - b.double().exp()).abs().sum(-1) / 2


class Led(NamedTuple):
    """What happens to rows [rows] of log-probabilities."""

    loss: Tensor
    """Where they start."""
    push: Tensor
    """Half of the L1 norm of its gradient there: how much probability a step of size 1 moves."""
    end: Tensor
    """float [rows, V]"""
    moved: Tensor
    """How far rows moved in the last steps before they were made small."""


def lead(
    problem: Problem,
    case: Case,
    start: Tensor,
    beside: bool = False,
    steps: int = 120,
    every: int = 10,
    still: float = 1e-4,
) -> Led:
    """Follows the natural gradient: ``p <- p (1 - dL/dz / p)``, within factors of 4; of the loss, or of the loss beside
    cross-entropy.

    For a likelihood that is the step of expectation maximisation, which needs no step size. And it leaves tokens that
    the loss does not tell apart in their proportion. For losses with kinks, steps become small in the second half, and
    a row ends where its loss was least.
    """
    z = end = checked = start.float()
    least = push = loss = torch.zeros(0)
    moved = torch.zeros(len(z), dtype=torch.float64)
    for step in range(steps):
        z = z.detach().requires_grad_()
        losses = problem.losses(case, z)
        if beside:
            losses = losses + cross_entropy(problem.truth, z)
        (gradient,) = torch.autograd.grad(losses.sum(), z)
        z, losses = z.detach(), losses.detach()
        if step == 0:
            loss, least, push = losses, losses, gradient.abs().sum(-1) / 2
        is_less = losses < least - 1e-6
        end, least = torch.where(is_less[:, None], z, end), torch.where(is_less, losses, least)
        if step % every == 0 and step and 2 * step <= steps:
            checked, moved = end, distance(end, checked)
            if bool((moved < still).all()):
                break
        size = 1.0 if 2 * step < steps else 0.01 ** (2 * step / steps - 1)
        factor = (1 - size * gradient / z.exp()).clamp(0.25, 4)
        z = (z + factor.log()).log_softmax(-1).clamp_min(-30)
    return Led(loss, push, end, moved)


def cross_entropy(truth: Tensor, z: Tensor) -> Tensor:
    """[rows]: of rows of logits on the texts, less its minimum."""
    return (truth.exp() * (truth - z.log_softmax(-1))).sum(-1).to(z.dtype)


def ignorance(truth: Tensor) -> Tensor:
    """Log-probabilities that give all tokens that ever come the same."""
    return torch.where(truth > FLOOR + 1, 0.0, FLOOR).log_softmax(-1)


# --- what is reported


def mean(values: Tensor, weight: Tensor) -> float:
    return float((values.double() * weight).sum() / weight.sum())


def shown(token: bytes) -> str:
    return token.decode("utf-8", "backslashreplace").replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")


def movers(problem: Problem, row: int, end: Tensor, student: Vocabulary, most: int = 4) -> list[str]:
    """The tokens that move most, in words."""
    before, after = problem.truth[row].exp(), end[row].double().exp()
    ids = (after - before).abs().topk(min(most, len(before))).indices.tolist()
    return [f"{shown(student[problem.ids.student[i]])} {before[i]:.3f} -> {after[i]:.3f}" for i in ids]


def report(problem: Problem, case: Case, student: Vocabulary) -> Iterator[Row]:
    """Of the rows at starts of chunks and of those inside: means over texts, the worst row, and what moves in it."""
    led, unknowing = lead(problem, case, problem.truth), ignorance(problem.truth)
    values = {
        "truth": led.loss,
        "push": led.push,
        "bias": distance(led.end, problem.truth),
        "beside_ce": distance(lead(problem, case, problem.truth, beside=True).end, problem.truth),
        "ignorance": distance(unknowing, problem.truth),
        "taught": distance(lead(problem, case, unknowing).end, problem.truth),
        "events_apart": problem.event_distance(),
    }
    for sort in ("start", "inner"):
        rows = [i for i, context in enumerate(problem.contexts) if context.is_start == (sort == "start")]
        if not rows:
            continue
        weight = torch.tensor([float(problem.contexts[i].texts) for i in rows], dtype=torch.float64)
        worst = max(rows, key=lambda i: float(values["bias"][i]))
        yield {
            "sort": sort,
            "rows": len(rows),
            "texts": int(weight.sum()),
            **{name: round(mean(value[rows], weight), 6) for name, value in values.items()},
            "worst": round(float(values["bias"][worst]), 6),
            "still_moving": round(float(led.moved[rows].max()), 6),
            "movers": movers(problem, worst, led.end, student),
        }


def measure_pair(pair: str, kinds: Sequence[str], names: Sequence[str]) -> list[Row]:
    """These forms of losses for a pair and kinds of text."""
    torch.set_num_threads(1)
    student, teacher = map(Vocabulary.from_tokenizer, load_tokenizers(*pair.split("/")))
    whole = Whole(Pair(ProjectionMatrix.build(student, teacher), PieceIndex.build(student, teacher)))
    is_one = student.fingerprint() == teacher.fingerprint()
    found: list[Row] = []
    for kind in kinds:
        world = World.of(student, teacher, KINDS[kind]())
        problem = Problem(world, world.contexts(ROWS, ROWS), whole)
        for case in forms():
            if case.name in names and (is_one or not case.same_tokenizer):
                needs = case.loss.needs.name.lower()
                facts = {"pair": pair, "title": PAIRS[pair], "kind": kind, "loss": case.name, "needs": needs}
                found += [facts | row for row in report(problem, case, student)]
    return found


def merged(held: Row, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of a result file with these in place of those of the same losses and texts, and of what runs it is."""

    def key(row: Row) -> tuple[str, ...]:
        return row["pair"], row["kind"], row["loss"]

    new = {key(row) for row in rows}
    kept = [{"commit": held["machine"]["commit"], **row} for row in held["rows"] if key(row) not in new]
    run = {name: held[name] for name in ("machine", "minutes")}
    return [*kept, *rows], [*held.get("earlier", []), run]


def plot(rows: Sequence[Row], path: Path) -> None:
    """The bias of each loss by pair and kind, in the worse of the two sorts of rows; not of losses of one tokenizer."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    worst: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        cells = worst.setdefault(row["loss"], {})
        key = (row["pair"], row["kind"])
        cells[key] = max(row["bias"], cells.get(key, 0))
    pairs, kinds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("pair", "kind"))
    worst = {loss: cells for loss, cells in worst.items() if len(cells) == len(pairs) * len(kinds)}
    columns = 3
    lines = -(-len(worst) // columns)
    figure = Figure(figsize=(4.2 * columns, 0.8 + (0.6 + 0.3 * len(pairs)) * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(worst) :]:
        axes.set_axis_off()
    for i, (axes, (loss, cells)) in enumerate(zip(grid.flat, worst.items(), strict=False)):
        values = [[cells.get((pair, kind), math.nan) for kind in kinds] for pair in pairs]
        axes.imshow(values, vmin=0, vmax=1, cmap="Reds", aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                if value == value:
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color="wk"[value < 0.6])
        axes.set_title(loss, fontsize=9)
        axes.set_xticks(range(len(kinds)), kinds, fontsize=6)
        axes.set_yticks(range(len(pairs)), [PAIRS[pair] if i % columns == 0 else "" for pair in pairs], fontsize=6)
    figure.savefig(path, dpi=110)


def for_pages(rows: Sequence[Row]) -> dict[str, Any]:
    """By pair the bias of each loss and kind, in rows where chunks start / inside chunks."""
    pairs: dict[str, Any] = {}
    for row in rows:
        pair = pairs.setdefault(row["pair"], {"title": row["title"], "kinds": [], "bias": {}})
        if row["kind"] not in pair["kinds"]:
            pair["kinds"].append(row["kind"])
        cells = pair["bias"].setdefault(row["loss"], {}).setdefault(row["kind"], {})
        cells[row["sort"]] = f"{row['bias']:.3f}"
    for pair in pairs.values():
        for loss, kinds in pair["bias"].items():
            shown = {
                kind: " / ".join(cells.get(sort, "-") for sort in ("start", "inner")) for kind, cells in kinds.items()
            }
            pair["bias"][loss] = shown
    return pairs


def write_for_pages(rows: Sequence[Row]) -> None:
    """Writes them where the pages look, under the vocabularies' digests."""
    found = for_pages(rows)
    names = sorted({name for pair in found for name in pair.split("/")})
    sides = zip(names, load_tokenizers(*names), strict=True)
    digests = {name: digest(Vocabulary.from_tokenizer(tokenizer)) for name, tokenizer in sides}
    pairs = {"/".join(digests[name] for name in pair.split("/")): facts for pair, facts in found.items()}
    text = json.dumps({"pairs": pairs}, indent=1, ensure_ascii=False)
    (ROOT / "xtoken" / "report" / MEASURED).write_text(text + "\n")


def main() -> None:
    arguments = parser(__doc__, "truth.json")
    for name, known in (("pairs", PAIRS), ("kinds", KINDS), ("losses", [case.name for case in forms()])):
        arguments.add_argument(f"--{name}", nargs="+", default=list(known), choices=known, metavar=name[:-1].upper())
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--merge", action="store_true", help="keep what the output has of other losses and texts")
    arguments.add_argument("--page", action="store_true", help="measure nothing")
    options = arguments.parse_args()
    if options.page:
        return write_for_pages(json.loads(options.output.read_text())["rows"])
    started = time.perf_counter()
    run = functools.partial(measure_pair, kinds=options.kinds, names=options.losses)
    rows: list[Row] = []
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        run_all = map if options.processes == 1 else pool.map
        for pair, found in zip(options.pairs, run_all(run, options.pairs), strict=True):
            rows += found
            print(f"{time.perf_counter() - started:6.0f} s  {pair}", flush=True)
    minutes = (time.perf_counter() - started) / 60
    facts = machine("torch", python=platform.python_version(), processes=options.processes)
    rows = [{**row, "commit": facts["commit"]} for row in rows]
    earlier: list[Row] = []
    if options.merge:
        rows, earlier = merged(json.loads(options.output.read_text()), rows)
    write(options.output, {"machine": facts, "minutes": minutes, "earlier": earlier, "rows": rows})
    print(table(rows, [name for name in rows[0] if name not in ("title", "needs", "movers", "commit")]))
    plot(rows, options.output.with_suffix(".png"))
    if options.output == RESULTS / "truth.json":
        write_for_pages(rows)
    return None


if __name__ == "__main__":
    main()
