"""Should a loss weight what is inside a chunk by the teacher's probability of what the text has before it?

The tokenizers, models and texts of ``reproduce.py``, with smaller students, where the teacher knows more than the text:
it answers every sum, and the texts of most settings have wrong answers, each that of another sum. All students of a
setting and a seed start from the same weights and read the same batches. "Continued" ones start from a student that
learned from right answers with cross-entropy alone. What counts, on held-out sums and as the mean of what the student
is after 80, 90 and 100 % of its steps: the share of greedy answers that are right, and the probability of the right
answer. Results go to bench/results/weighting.json, the table to the screen.

The rule, written down before the first run: "teacher" becomes the default of ``weighting`` if in each setting with
wrong answers its probability of the right answer is above that of "none" by more than two standard errors, and where
all answers are right not below it by more than two. Both beside cross-entropy with a factor of 4, means over the seeds,
errors of the differences within a seed. The weights were found on seeds 0, 1 and 2, so the seeds here begin with 3.
Eight seeds did not decide it: with the events of an earlier version they said no, with those of today just yes. So the
default stays "none" until sixteen seeds, ``--seeds 16 --resume``, say the same; docs/losses.md has the table.

    python bench/weighting.py [--seeds 8] [--threads 1] [--settings scratch continued random right] [--resume]
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import reproduce
import tokenizers
import torch
from cases import Case, Pair
from measure import machine, parser, table, write
from reproduce import IGNORED, Encoded, Problem, Size, Text, Transformers, World
from torch import Tensor

import xtoken
from xtoken.losses.criterion import DEFAULT_MAX_SCALE
from xtoken.losses.loss import Needs, registered

FIRST_SEED = 3
FACTOR = 4.0
START_STEPS = 800
"""Of the students from which others continue."""
SIZE = Size(student_width=48, steps=500, problems=200)


class Setting(NamedTuple):
    title: str
    wrong: float
    """Share of sums with a wrong answer."""
    continued_steps: int | None = None
    """None: from scratch."""
    ce_on_sums: bool = True


SETTINGS = {
    "scratch": Setting("half of the answers wrong, from scratch", 0.5),
    "continued": Setting("half of the answers wrong, continued", 0.5, 220),
    "random": Setting("all answers wrong, no cross-entropy on sums, continued", 1.0, 220, ce_on_sums=False),
    "right": Setting("all answers right, continued", 0.0, 220),
}
WEIGHTED = next(loss for loss in registered().values() if "weighting" in loss.options())
PROJECTED = next(loss for loss in registered().values() if loss.needs is Needs.PROJECTION and loss.is_default)
NONE, TEACHER = f"{WEIGHTED.title} x4, none", f"{WEIGHTED.title} x4, teacher"
MEASURES = ("exact match", "probability")


class NoisyText(Text):
    """Of the sums to train with, a share has the answer of another one."""

    def __init__(self, size: Size, wrong: float) -> None:
        super().__init__(size)
        self.wrong = wrong

    def problem(self, draw: random.Random, pairs: Sequence[tuple[int, int]]) -> Problem:
        problem = super().problem(draw, pairs)
        if pairs is self.training and draw.random() < self.wrong:
            others = [a + b for a, b in pairs if a + b != problem.answer]
            problem = problem._replace(answer=draw.choice(others))
        return problem


Total = Callable[[Tensor, Encoded, Tensor, xtoken.Alignment], Tensor]


def arms(student: tokenizers.Tokenizer, teacher: tokenizers.Tokenizer) -> dict[str, Total]:
    """The losses to compare, of (student logits, batch, teacher logits, alignment)."""
    pair = Pair(xtoken.ProjectionMatrix.build(student, teacher), xtoken.PieceIndex.build(student, teacher))

    def distance(case: Case) -> reproduce.Distance:
        return lambda logits, guide, chunks: case(logits, guide, chunks, pair)

    def fixed(
        logits: Tensor, batch: Encoded, guide: Tensor, chunks: xtoken.Alignment, distil: reproduce.Distance
    ) -> Tensor:
        return reproduce.cross_entropy(logits, batch.labels) + FACTOR * distil(logits, guide, chunks)

    none, by_teacher = (distance(Case(words, WEIGHTED, {"weighting": words})) for words in ("none", "teacher"))
    dynamic = partial(reproduce.total_loss, max_scale=DEFAULT_MAX_SCALE)
    return {
        "CE": partial(reproduce.total_loss, distil=None),
        f"{PROJECTED.title} x4": partial(fixed, distil=distance(Case(PROJECTED.title, PROJECTED))),
        NONE: partial(fixed, distil=none),
        TEACHER: partial(fixed, distil=by_teacher),
        f"{WEIGHTED.title} dynamic, none": partial(dynamic, distil=none),
        f"{WEIGHTED.title} dynamic, teacher": partial(dynamic, distil=by_teacher),
    }


@torch.no_grad()
def probability(model: Transformers, tokenizer: tokenizers.Tokenizer, problems: Sequence[Problem]) -> list[float]:
    """Mean over the problems of each model's probability of the right answer and a full stop, in the usual tokens."""
    read = reproduce.encode(tokenizer, [problem.text for problem in problems])
    first = torch.tensor([1 + len(tokenizer.encode(problem.prompt).ids) for problem in problems])
    end = torch.tensor([len(row) - 1 for row in read.rows])
    place = torch.arange(1, read.ids.shape[1])
    is_answer = (place >= first[:, None]) & (place < end[:, None])
    chosen = model(read.ids)[:, :, :-1].log_softmax(-1).take_along_dim(read.ids[None, :, 1:, None], 3)[..., 0]
    means: list[float] = chosen.masked_fill(~is_answer, 0).sum(2).exp().mean(1).tolist()
    return means


def measures(model: Transformers, tokenizer: tokenizers.Tokenizer, problems: Sequence[Problem]) -> Tensor:
    """[2, models]: by `MEASURES`."""
    return torch.tensor([measure(model, tokenizer, problems) for measure in (reproduce.accuracy, probability)])


class Trial(NamedTuple):
    """What all runs have in common."""

    size: Size
    start_steps: int
    world: World
    guide: Transformers
    losses: dict[str, Total]

    @property
    def problems(self) -> list[Problem]:
        return self.world.text.problems(self.size.problems)

    def train(self, model: Transformers, totals: Sequence[Total], setting: Setting, steps: int, seed: int) -> Tensor:
        """Trains each model with its loss, in place; [2, models]: mean measures of the last fifth."""
        student, teacher = self.world.student, self.world.teachers[1]
        text = NoisyText(self.size, setting.wrong)
        adam, schedule = reproduce.optimizer(model, self.size, steps)
        aligner = xtoken.Aligner(student, teacher, num_threads=1)
        draw = random.Random(seed)
        found = []
        for step in range(1, steps + 1):
            lines = text.batch(draw, self.size.batch)
            batch, read = reproduce.encode(student, lines), reproduce.encode(teacher, lines)
            chunks = aligner.align(batch.rows, read.rows)
            if not setting.ce_on_sums:
                is_sum = torch.tensor([any(map(str.isdigit, line)) for line in lines])
                batch = batch._replace(labels=batch.labels.masked_fill(is_sum[:, None], IGNORED))
            guide = self.guide(read.ids)[0]
            losses = [
                total(logits, batch, guide, chunks) for logits, total in zip(model(batch.ids), totals, strict=True)
            ]
            adam.zero_grad()
            torch.stack(losses).sum().backward()
            model.clip_gradients()
            adam.step()
            schedule.step()
            if step in (steps * 8 // 10, steps * 9 // 10, steps):
                found.append(measures(model, student, self.problems))
        return torch.stack(found).mean(0)

    def fresh(self, count: int, seed: int) -> Transformers:
        size = self.size
        return Transformers(
            count, self.world.student.get_vocab_size(), size.student_layers, size.student_width, seed=seed
        )

    def start(self, seed: int) -> Transformers:
        """What continued students start from."""
        model = self.fresh(1, seed)
        self.train(model, [self.losses["CE"]], SETTINGS["right"], self.start_steps, 2000 + seed)
        return model

    def run(self, setting: Setting, seed: int, start: Transformers | None) -> dict[str, Any]:
        """Measures of every arm at the end and of the common start, by name."""
        model = self.fresh(len(self.losses), seed)
        steps = self.size.steps
        if start is not None:
            steps = min(steps, setting.continued_steps or steps)
            for own, first in zip(model.parameters(), start.parameters(), strict=True):
                own.data.copy_(first.data.expand_as(own))
        begin = measures(model, self.world.student, self.problems)[:, :1]
        ends = self.train(model, list(self.losses.values()), setting, steps, 1000 + seed)
        values = torch.cat([begin, ends], 1).T.tolist()
        arms = zip(("start", *self.losses), values, strict=True)
        return {name: dict(zip(MEASURES, row, strict=True)) for name, row in arms}


def mean(values: Sequence[float]) -> str:
    """In percent, with the standard error if there is one."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{error}"


def report(runs: Sequence[dict[str, Any]]) -> str:
    """By setting and arm the measures; and of the weights, what they add to the same loss without them."""
    rows = []
    for name, setting in SETTINGS.items():
        found = [run["arms"] for run in runs if run["setting"] == name]
        for arm in found[0] if found else ():
            row = {"setting": setting.title if arm == "start" else "", "loss": arm}
            other = arm.replace("teacher", "none")
            for measure in MEASURES:
                row[measure] = mean([100 * arms[arm][measure] for arms in found])
                leads = [100 * (arms[arm][measure] - arms[other][measure]) for arms in found]
                row[f"{measure}, over none"] = mean(leads) if arm != other else ""
            rows.append(row | {"seeds": len(found)})
    return table(rows)


def main() -> None:
    arguments = parser(__doc__, "weighting.json")
    arguments.add_argument("--seeds", type=int, default=8)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments.add_argument("--steps", type=int, default=START_STEPS, help="of students, at most")
    arguments.add_argument("--teacher-steps", type=int, default=SIZE.teacher_steps)
    arguments.add_argument("--problems", type=int, default=SIZE.problems, help="held-out sums")
    arguments.add_argument("--resume", action="store_true", help="keep the runs that --output has")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()

    def log(message: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {message}", flush=True)

    steps, start_steps = min(SIZE.steps, options.steps), min(START_STEPS, options.steps)
    size = replace(SIZE, steps=steps, teacher_steps=options.teacher_steps, problems=options.problems)
    facts = {"size": asdict(size) | {"start_steps": start_steps}}
    facts["machine"] = machine("torch", threads=options.threads)
    results: dict[str, Any] = {**json.loads(json.dumps(facts)), "runs": []}
    if options.resume and options.output.exists():
        found = json.loads(options.output.read_text())
        if found["size"] != results["size"]:
            raise SystemExit(f"{options.output} has runs of another size; move it away")
        results = found
    done = {(run["setting"], run["seed"]) for run in results["runs"]}
    world = World.of(size)
    guide, results["teacher"] = reproduce.train_teacher(world.teachers[1], world.text, size, size.teacher_steps, log)
    trial = Trial(size, start_steps, world, guide, arms(world.student, world.teachers[1]))
    for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
        start = None
        for name in options.settings:
            if (name, seed) in done:
                continue
            setting = SETTINGS[name]
            cpu = time.process_time()
            if setting.continued_steps and start is None:
                start = trial.start(seed)
            found = trial.run(setting, seed, start if setting.continued_steps else None)
            seconds = time.process_time() - cpu
            results["runs"].append({"setting": name, "seed": seed, "cpu_seconds": seconds, "arms": found})
            write(options.output, results)
            log(f"{name}, seed {seed}: {seconds:.0f} s of CPU")
    print(report(results["runs"]))


if __name__ == "__main__":
    main()
