"""Which loss teaches a student whose teacher cuts text otherwise: the paper's finding in small, and its situation.

Students pack up to three digits into a token (the rule of Llama 3), their teachers write numbers digit by digit, and
both read sums in words. All students of a setting and a seed start from the same weights and read the same batches;
only the loss differs. `SETTINGS` has them all: text from which cross-entropy alone learns everything (``plenty``,
``little``, ``mirror``); text whose answers are wrong, so that the teacher knows more than the text (``scratch``,
``continued``, ``random``; ``right`` beside them); and, as in the paper, students that can add and go on with text in
which sums are rare or absent (``rare``, ``absent``). In ``code`` it is white space that both cut differently.

Measured on held-out problems (`toy.measures`): exact match of greedy answers, which jumps, and what does not:
probability and log-likelihood of the right answer, and its form, such as the mass on numerals of several digits. At
checkpoints, and for the moving average of the weights (EMA). A value is the mean of a setting's last checkpoints; leads
over cross-entropy alone and over the start are means over the seeds of differences within a seed, with standard errors,
and bold where they are more than three of these.

A loss D is added to cross-entropy in one of several ways, the last word of its name: CE + 4 D ("x4"); with the paper's
dynamic scaling, CE + (CE / |D|) D, the ratio held constant (no word); or the ratio bounded, as `xtoken.XTokenLoss` does
it ("max 4"). A seed's runs are added to bench/results/reproduce.json as they are done.

    python bench/reproduce.py [--settings scratch rare ...] [--seeds 8] [--losses CE ...] [--workers 2] [--resume]
    python bench/reproduce.py --report     # only table and plot of the runs that the JSON has
    python bench/reproduce.py --quick      # three seeds of four students, half of the steps; build/reproduce_quick.json

The quick run has the losses of which the finding speaks, which are the recommended ones: exit status 1 if the loss for
a teacher that keeps numbers whole does not collapse where they are split, or if what `xtoken.choose_loss` names there
is not above what the paper's rule does (`xtoken.coverage_audit`). The median of its seeds is compared: a student may
learn next to nothing, and which one does depends on how the processor rounds.

A rule that was written down before the first run: "teacher" becomes the default of ``weighting`` if in ``scratch``,
``continued`` and ``random`` its probability of the right answer is above that of "none" by more than two standard
errors, both x4, and in ``right`` not below it by more than two. The weights were found on seeds 0, 1 and 2, so the
seeds there begin with 3.

Another rule, written down before its first run too, for other options of the losses that split numbers need
(``--variants``; `OPTIONS`): a value becomes the default if its probability of the right answer, x4, is above the
default's by more than two standard errors in at least two of ``scratch``, ``continued``, ``right``, ``rare``,
``absent`` and ``code``, and in none of them below by as much.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import toy
from cases import Case, Pair, choices
from measure import RESULTS, ROOT, machine, parser, table, write
from torch import Tensor
from toy import IGNORED, MEASURES, Encoded, FewSums, Functions, MixedSums, NoisySums, Shape, Sums, Transformers

import xtoken
from xtoken.losses.criterion import DEFAULT_MAX_SCALE
from xtoken.losses.loss import Needs, registered

EMA = ", EMA"
"""How measures of averaged weights are named."""
GAMMAS = (0.1, 0.0)
"""Of W: the paper's default, and no weight for later pieces."""
ADJUSTED: dict[str, tuple[Any, ...]] = {"temperature": (2.0,), "reverse": (True,), "beta": (0.5,)}
"""Values of options that are no words, beside their defaults."""

# --- losses


class Scale(NamedTuple):
    """What a distillation loss is multiplied by."""

    factor: float | None = None
    """None: CE / |D|."""
    bound: float = math.inf


FACTOR = "x4"
SCALES = {
    "": Scale(),
    FACTOR: Scale(4.0),
    f"max {DEFAULT_MAX_SCALE:g}": Scale(bound=DEFAULT_MAX_SCALE),
    "max 16": Scale(bound=16.0),
}
"""By the last word of an arm's name."""


class Arm(NamedTuple):
    """A loss with a word for each of its choices, the gamma of its W, and its scale."""

    case: Case
    gamma: float
    is_main: bool
    """Whether its words are the defaults."""
    scale: str

    @property
    def is_default(self) -> bool:
        """Whether gamma is the default too."""
        return self.is_main and self.gamma == GAMMAS[0]


def arms() -> dict[str, Arm]:
    """Every registered loss that two tokenizers allow, in all its forms, named by its words. Where the weights of W are
    part of the loss, so that they can be trained, gamma varies too; others only ask which tokens W pairs. With a fixed
    factor also the loss as it is but for one option that is no word."""
    found = {}
    for loss in registered().values():
        if loss.needs is Needs.SAME_TOKENIZER:
            continue
        words = choices(loss)
        gammas = GAMMAS if loss.trains_projection else GAMMAS[:1]
        for chosen, gamma, scale in itertools.product(itertools.product(*words.values()), gammas, SCALES):
            shown = [f"{gamma:g}"] if loss.trains_projection else []
            words_of = [word for word in chosen if word != "none"]
            name = " ".join(filter(None, [loss.title, *words_of[:1], *shown, *words_of[1:], scale]))
            is_main = all(word == values[0] for word, values in zip(chosen, words.values(), strict=True))
            found[name] = Arm(Case(name, loss, dict(zip(words, chosen, strict=True))), gamma, is_main, scale)
    for name, arm in list(found.items()):
        if arm.is_default and arm.scale == FACTOR:
            for option in arm.case.loss.options():
                for value in ADJUSTED.get(option, ()):
                    adjusted = f"{name.removesuffix(FACTOR)}{option}={value} {FACTOR}"
                    case = replace(arm.case, name=adjusted, options={**arm.case.options, option: value})
                    found[adjusted] = Arm(case, arm.gamma, False, FACTOR)
    return found


def named(is_wanted: Callable[[Arm], bool]) -> list[str]:
    return [name for name, arm in arms().items() if is_wanted(arm)]


MAIN = ["CE", *named(lambda arm: arm.is_main and arm.scale == "")]
"""Each loss as it is, with the paper's scaling."""
VARIANTS = named(lambda arm: not arm.is_main and arm.scale == "")
"""Their other forms."""
WEIGHTED = named(
    lambda arm: (
        "weighting" in arm.case.loss.options()
        and arm.scale in (FACTOR, f"max {DEFAULT_MAX_SCALE:g}")
        and not ADJUSTED.keys() & arm.case.options.keys()
    )
)
"""With and without the weights of what is inside a chunk."""
FIXED = ["CE", *named(lambda arm: arm.scale == FACTOR and (arm.is_main or arm.case.name in WEIGHTED))]
"""Each loss with a fixed factor."""
OPTIONS = named(
    lambda arm: (
        arm.scale == FACTOR
        and not arm.is_default
        and arm.case.name not in WEIGHTED
        and (arm.case.loss.trains_projection or "weighting" in arm.case.loss.options())
    )
)
"""Of the losses that split numbers need, other values of each option but the weights."""
PAPER = named(lambda arm: arm.is_main and arm.scale == "" and arm.case.loss.needs is Needs.PROJECTION)
"""Those of W with the paper's scaling, which is what the paper has them for."""

Total = Callable[[Tensor, Encoded, Tensor, xtoken.Alignment], Tensor]


def total_loss(
    logits: Tensor, batch: Encoded, teacher_logits: Tensor, chunks: xtoken.Alignment, *,
    distil: Callable[[Tensor, Tensor, xtoken.Alignment], Tensor] | None, scale: Scale,
) -> Tensor:  # fmt: skip
    """Cross-entropy and the scaled distillation loss, as `xtoken.XTokenLoss` with one teacher adds them."""
    ce = toy.cross_entropy(logits, batch.labels)
    if distil is None:
        return ce
    distance = distil(logits, teacher_logits, chunks)
    if scale.factor is not None:
        return ce + scale.factor * distance
    return ce + (ce / distance.abs()).detach().nan_to_num(0, 0, 0).clamp_max(scale.bound) * distance


@cache
def totals(world: str) -> dict[str, Total]:
    """What each arm minimises, of (student logits, batch, teacher logits, alignment)."""
    _, student, teacher, *_ = toy.world(world)
    pieces = xtoken.PieceIndex.build(student, teacher)
    pairs = {gamma: Pair(xtoken.ProjectionMatrix.build(student, teacher, gamma=gamma), pieces) for gamma in GAMMAS}
    found: dict[str, Total] = {"CE": partial(total_loss, distil=None, scale=Scale())}
    for name, arm in arms().items():
        distil = partial(arm.case, pair=pairs[arm.gamma])
        found[name] = partial(total_loss, distil=distil, scale=SCALES[arm.scale])
    return found


# --- settings


def right_sums() -> toy.Corpus:
    return NoisySums(0.0)


def mixed_sums() -> toy.Corpus:
    return MixedSums()


FULL, BRIEF, START = Shape(1200), Shape(220, width=48), Shape(800, width=48)
GENTLE = Shape(220, width=48, batch=16, learning_rate=3e-3)


@dataclass(frozen=True)
class Setting:
    """What students of a setting are and read."""

    title: str
    world: str
    """See `toy.world`; its text is also what students learn from before they continue."""
    corpus: Callable[[], toy.Corpus]
    losses: Sequence[str]
    seeds: int
    first_seed: int = 0
    shape: Shape = FULL
    start: Shape | None = None
    """Of the training with cross-entropy alone from which students continue; None: from scratch."""
    start_corpus: Callable[[], toy.Corpus] = right_sums
    checkpoints: Sequence[float] = (0.8, 0.9, 1.0)
    """Shares of the steps."""
    last: int = 3
    """A value is the mean of so many last checkpoints."""
    problems: int = 200
    ce_on_sums: bool = True
    variants: Sequence[str] = field(default=())
    """Losses for ``--variants``."""


SIXTHS = tuple(i / 6 for i in range(1, 7))
FIRST = partial(Setting, losses=MAIN, seeds=2, checkpoints=SIXTHS, last=1, problems=400)
LATER = partial(Setting, seeds=8, first_seed=3)
NOISY = partial(LATER, world="split", shape=BRIEF, start=START)
PAPERS = partial(
    LATER, world="mixed", shape=GENTLE, start=START, start_corpus=mixed_sums, losses=[*FIXED, *PAPER], variants=OPTIONS
)
SETTINGS = {
    "plenty": FIRST("the teacher splits digits, plenty of text", "split", Sums, variants=VARIANTS),
    "little": FIRST("the teacher splits digits, little text", "split", FewSums, variants=VARIANTS),
    "mirror": FIRST("the teacher keeps numbers whole, plenty of text", "whole", Sums),
    "scratch": NOISY(
        title="half of the answers wrong, from scratch",
        corpus=partial(NoisySums, 0.5),
        losses=[*FIXED, *PAPER],
        shape=Shape(500, width=48),
        start=None,
        variants=OPTIONS,
    ),
    "continued": NOISY(
        title="half of the answers wrong, continued",
        corpus=partial(NoisySums, 0.5),
        losses=[*FIXED, *PAPER],
        variants=OPTIONS,
    ),
    "random": NOISY(
        title="all answers wrong, no cross-entropy on sums, continued",
        corpus=partial(NoisySums, 1.0),
        losses=["CE", *WEIGHTED],
        ce_on_sums=False,
    ),
    "right": NOISY(title="all answers right, continued", corpus=right_sums, losses=["CE", *WEIGHTED], variants=OPTIONS),
    "rare": PAPERS(title="one text in ten is a sum, continued", corpus=partial(MixedSums, 0.1)),
    "absent": PAPERS(title="no sums, continued", corpus=partial(MixedSums, 0.0)),
    "code": LATER(
        title="indented code, from scratch",
        world="code",
        corpus=Functions,
        losses=[*FIXED, *PAPER],
        shape=Shape(150, width=48, batch=16),
        variants=OPTIONS,
    ),
}


# --- training


def train(
    model: Transformers, losses: Sequence[Total], corpus: toy.Corpus, world: toy.World, shape: Shape, seed: int,
    guide: Transformers | None = None, ce_on_sums: bool = True,
) -> Iterator[int]:  # fmt: skip
    """Trains each model with its loss, in place, or without a guide by cross-entropy; yields after each step how many
    are done."""
    adam, schedule = toy.optimizer(model, shape)
    aligner = xtoken.Aligner(world.student, world.teacher, num_threads=1)
    draw = random.Random(seed)
    for step in range(1, shape.steps + 1):
        lines = corpus.batch(draw, shape.batch)
        batch = toy.encode(world.student, lines)
        if not ce_on_sums:
            is_sum = torch.tensor([any(map(str.isdigit, line)) for line in lines])
            batch = batch._replace(labels=batch.labels.masked_fill(is_sum[:, None], IGNORED))
        if guide is None:
            found = [toy.cross_entropy(logits, batch.labels) for logits in model(batch.ids)]
        else:
            read = toy.encode(world.teacher, lines)
            chunks, teacher_logits = aligner.align(batch.rows, read.rows), guide(read.ids)[0]
            pairs = zip(model(batch.ids).unbind(), losses, strict=True)
            found = [total(logits, batch, teacher_logits, chunks) for logits, total in pairs]
        adam.zero_grad()
        torch.stack(found).sum().backward()
        model.clip_gradients()
        adam.step()
        schedule.step()
        yield step


def train_teacher(
    name: str, steps: int | None, problems: int, log: Callable[[str], None]
) -> tuple[Transformers, float]:
    """A model that learns from text alone, and its exact match."""
    world = toy.world(name)
    shape = Shape(steps or world.steps)
    model = toy.transformers(1, world.teacher, shape, seed=100)
    reader = world._replace(student=world.teacher)
    for step in train(model, [], world.text, reader, shape, seed=100):
        if step % max(1, shape.steps // 4) == 0:
            (right,) = toy.accuracy(model, world.teacher, world.text.problems(problems))
            log(f"  teacher, step {step}: exact match {right:.1%}")
    return model.requires_grad_(False), right


@cache
def started(world: str, corpus: Callable[[], toy.Corpus], shape: Shape, seed: int) -> Transformers:
    """What continued students start from."""
    model = toy.transformers(1, toy.world(world).student, shape, seed)
    for _ in train(model, [], corpus(), toy.world(world), shape, 2000 + seed):
        pass
    return model


class Job(NamedTuple):
    """A run: students of one setting and seed."""

    name: str
    setting: Setting
    seed: int
    losses: list[str]
    guide: Transformers
    threads: int


def run(job: Job) -> dict[str, Any]:
    """Measures of every arm, and of the common start, by name: a list by checkpoint, and of averaged weights one."""
    torch.set_num_threads(job.threads)
    cpu = time.process_time()
    setting, world = job.setting, toy.world(job.setting.world)
    shape = setting.shape
    problems = world.text.problems(setting.problems)
    model = toy.transformers(len(job.losses), world.student, shape, job.seed)
    found: dict[str, dict[str, list[float]]] = {}

    def record(names: Iterable[str], models: Transformers, suffix: str = "") -> None:
        for measure, values in toy.measures(models, world, problems).items():
            for name, value in zip(names, values, strict=True):
                found.setdefault(name, {}).setdefault(measure + suffix, []).append(value)

    if setting.start is not None:
        first = started(setting.world, setting.start_corpus, setting.start, job.seed)
        record(["start"], first)
        model.take(first)
    averaged = toy.transformers(len(job.losses), world.student, shape, job.seed)
    averaged.take(model)
    losses = [totals(setting.world)[name] for name in job.losses]
    at = {round(shape.steps * share) for share in setting.checkpoints}
    for step in train(model, losses, setting.corpus(), world, shape, 1000 + job.seed, job.guide, setting.ce_on_sums):
        averaged.take(model, min(1.0, 10 / shape.steps))
        if step in at:
            record(job.losses, model)
    record(job.losses, averaged, EMA)
    return {"setting": job.name, "seed": job.seed, "cpu_seconds": time.process_time() - cpu, "arms": found}


# --- report


class Finding(NamedTuple):
    """The arms of which the finding speaks: the recommended losses."""

    whole: str
    """By the paper's rule for a teacher that keeps numbers whole."""
    split: str
    """By the same rule for one that splits them."""
    chosen: str
    """For the latter by `xtoken.choose_loss`."""

    @classmethod
    def of(cls) -> Finding:
        pairs = [toy.world(name)[1:3] for name in ("whole", "split")]
        whole, split = (xtoken.coverage_audit(*pair) for pair in pairs)
        chosen = xtoken.choose_loss(*pairs[1], report=split).loss
        names = {arms()[name].case.loss.name: name for name in reversed(MAIN[1:])}
        return cls(names[whole.recommendation], names[split.recommendation], names[chosen])

    def lacking(self, results: dict[str, Any]) -> list[str]:
        """What of it the median seed of a quick run does not show; in the whole run the margins are tens of points."""
        found = values(results, "plenty")
        ends = {arm: 100 * statistics.median(found[arm]["exact match"].values()) for arm in ("CE", *self)}
        ce, whole, split, chosen = ends.values()
        claims = {
            f"{self.whole} below half of CE: {whole:.1f} and {ce:.1f}%": whole < ce / 2,
            f"{self.chosen} above twice {self.split}: {chosen:.1f} and {split:.1f}%": chosen > 2 * split,
        }
        return [claim for claim, holds in claims.items() if not holds]


Values = dict[str, dict[str, dict[int, float]]]
"""By arm, measure and seed."""


def values(results: dict[str, Any], setting: str) -> Values:
    """Means of the last checkpoints."""
    found: Values = {}
    for one in results["runs"]:
        if one["setting"] == setting:
            for arm, measured in one["arms"].items():
                for measure, at in measured.items():
                    last = at[-SETTINGS[setting].last :]
                    found.setdefault(arm, {}).setdefault(measure, {})[one["seed"]] = statistics.fmean(last)
    return found


class Lead(NamedTuple):
    """The mean over the seeds of differences within a seed, with its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, found: Values, arm: str, other: str, measure: str) -> Lead | None:
        """None where no two seeds have both."""
        ours, theirs = (found.get(name, {}).get(measure, {}) for name in (arm, other))
        leads = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if arm == other or len(leads) < 2:
            return None
        return cls(statistics.fmean(leads), statistics.stdev(leads) / len(leads) ** 0.5)

    @property
    def is_claimed(self) -> bool:
        return abs(self.mean) > 3 * self.error

    def text(self, unit: float) -> str:
        shown = f"{self.mean * unit:+.1f} ± {self.error * unit:.1f}"
        return f"**{shown}**" if self.is_claimed else shown


def unit(measure: str) -> float:
    """Of what is shown: percent, but nats as they are."""
    return 1.0 if measure.startswith("log") else 100.0


def report(results: dict[str, Any]) -> str:
    """By setting a table of all measures with their leads over cross-entropy alone, and over the start."""
    parts = []
    for name, setting in SETTINGS.items():
        found = values(results, name)
        if not found:
            continue
        shown = [
            one for measure in MEASURES for one in (measure, measure + EMA) if any(one in m for m in found.values())
        ]
        rows = []
        for arm, measured in sorted(found.items(), key=lambda item: -statistics.fmean(item[1][shown[0]].values())):
            row: dict[str, Any] = {"loss": arm, "seeds": max(map(len, measured.values()))}
            for measure in shown:
                ours = measured.get(measure, {})
                row[measure] = f"{statistics.fmean(ours.values()) * unit(measure):.1f}" if ours else ""
                for other, title in (("CE", "over CE"), ("start", "over start")):
                    if other in found and not measure.endswith(EMA):
                        lead = Lead.of(found, arm, other, measure)
                        row[f"{measure} {title}"] = lead.text(unit(measure)) if lead else ""
            rows.append(row)
        teacher = results["teachers"][setting.world]
        title = setting.title[0].upper() + setting.title[1:]
        parts.append(f"{name}: {title} (the teacher itself: {teacher:.1%})\n\n{table(rows)}")
    return "\n\n".join(parts)


def plot(results: dict[str, Any], path: Path) -> None:
    """Above, where exact match was measured on the way: its curves, with a band from the least to the most. Below, the
    probability of the right answer at the end, with standard errors."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    found = {name: one for name in SETTINGS if (one := values(results, name))}
    above = [name for name in found if SETTINGS[name].last == 1]
    below = [name for name in found if name not in above]
    rows = [names[i : i + 4] for names in (above, below) for i in range(0, len(names), 4)]
    columns = max(map(len, rows))
    figure = Figure(figsize=(4.5 * columns, 4 * len(rows)), layout="constrained")
    for axes, name in zip(figure.subplots(len(rows), columns, squeeze=False).flat, _places(rows, columns), strict=True):
        axes.set_visible(name is not None)
        if name in above:
            _curves(axes, results, name)
        elif name is not None:
            _dots(axes, found[name])
        axes.set_title(SETTINGS[name].title if name else "", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _places(rows: Sequence[Sequence[str]], columns: int) -> list[str | None]:
    """Rows of one length, one after the other."""
    return [name for row in rows for name in [*row, *[None] * (columns - len(row))]]


def _curves(axes: Any, results: dict[str, Any], setting: str) -> None:
    from matplotlib import colormaps

    found = values(results, setting)
    for arm in sorted(set(found) & set(MAIN), key=lambda arm: -statistics.fmean(found[arm]["exact match"].values())):
        curves = [
            one["arms"][arm]["exact match"]
            for one in results["runs"]
            if one["setting"] == setting and arm in one["arms"]
        ]
        at = list(zip(*curves, strict=True))
        steps = [SETTINGS[setting].shape.steps * share for share in SETTINGS[setting].checkpoints]
        color = colormaps["tab20"](MAIN.index(arm))
        axes.plot(steps, [100 * statistics.fmean(one) for one in at], label=arm, color=color)
        band = [[100 * edge(one) for one in at] for edge in (min, max)]
        axes.fill_between(steps, *band, color=color, alpha=0.12, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("exact match, %")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def _dots(axes: Any, found: Values) -> None:
    means = {arm: list(measured["probability"].values()) for arm, measured in found.items() if arm not in OPTIONS}
    ordered = sorted(means, key=lambda arm: statistics.fmean(means[arm]))
    for place, arm in enumerate(ordered):
        error = statistics.stdev(means[arm]) / len(means[arm]) ** 0.5 if len(means[arm]) > 1 else 0.0
        axes.errorbar(100 * statistics.fmean(means[arm]), place, xerr=100 * error, fmt="o", color="C0", markersize=4)
    axes.set_yticks(range(len(ordered)), ordered, fontsize=7)
    for arm, style in (("start", ":"), ("CE", "--")):
        if arm in means:
            axes.axvline(100 * statistics.fmean(means[arm]), color="gray", linestyle=style, linewidth=0.8)
    axes.set_xlabel("probability of the right answer, %")


# --- runs


def jobs_of(
    options: Namespace, settings: dict[str, Setting], results: dict[str, Any]
) -> list[tuple[str, int, list[str]]]:
    """Settings, seeds and losses that the results do not have yet; all settings of a seed before the next one."""
    done = {(one["setting"], one["seed"], arm) for one in results["runs"] for arm in one["arms"]}
    found = []
    for index in range(max(options.seeds or setting.seeds for setting in settings.values())):
        for name, setting in settings.items():
            seed = setting.first_seed + index
            wanted = [*setting.losses, *(setting.variants if options.variants else ())]
            losses = [one for one in options.losses or wanted if (name, seed, one) not in done]
            if index < (options.seeds or setting.seeds) and losses:
                found.append((name, seed, losses))
    return found


def measure(options: Namespace, settings: dict[str, Setting]) -> dict[str, Any]:
    """Writes the output file after each run; with --resume, runs what it does not have yet."""
    started = time.perf_counter()

    def log(message: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {message}", flush=True)

    results: dict[str, Any] = {"machine": {}, "shapes": {}, "teachers": {}, "runs": []}
    if options.resume and options.output.exists():
        results = json.loads(options.output.read_text())
    for name, setting in settings.items():
        shape = {
            "students": asdict(setting.shape),
            "start": setting.start and asdict(setting.start),
            "problems": setting.problems,
        }
        if results["shapes"].setdefault(name, shape) != shape:
            raise SystemExit(f"{options.output} has runs of {name} in another shape; move it away")
    about = machine("torch", threads=options.threads, workers=options.workers)
    jobs = []
    guides: dict[str, Transformers] = {}
    for name, seed, losses in jobs_of(options, settings, results):
        setting = settings[name]
        if setting.world not in guides:
            advice = xtoken.coverage_audit(*toy.world(setting.world)[1:3]).recommendation
            log(f"{setting.title}; coverage_audit recommends {advice}")
            guide, right = train_teacher(setting.world, options.teacher_steps, setting.problems, log)
            guides[setting.world], results["teachers"][setting.world] = guide, right
        jobs.append(Job(name, setting, seed, losses, guides[setting.world], options.threads))

    def done(one: dict[str, Any]) -> None:
        results["runs"].append(one | {"commit": about["commit"]})
        results["machine"] = about
        write(options.output, results)
        ends = [f"{arm} {100 * at['exact match'][-1]:.1f}" for arm, at in one["arms"].items()]
        log(f"{one['setting']}, seed {one['seed']}, {one['cpu_seconds']:.0f} s of CPU: {', '.join(ends)}")

    if options.workers == 1:
        for job in jobs:
            done(run(job))
    else:
        with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
            for one in pool.map(run, jobs):
                done(one)
    return results


def limited(shape: Shape, steps: int | None) -> Shape:
    return replace(shape, steps=min(shape.steps, steps or shape.steps))


def main() -> None:
    arguments = parser(__doc__, "reproduce.json")
    arguments.set_defaults(output=None)
    arguments.add_argument("--quick", action="store_true", help="three seeds of four students; checks the finding")
    arguments.add_argument("--report", action="store_true", help="no runs: table and plot of those that --output has")
    arguments.add_argument("--resume", action="store_true", help="keep the runs that --output has")
    arguments.add_argument("--variants", action="store_true", help="also the losses' other forms")
    arguments.add_argument("--seeds", type=int, help="of each setting; default: its own number")
    arguments.add_argument("--workers", type=int, help="processes; default: 2, or 1 with --quick")
    arguments.add_argument("--threads", type=int, help="of a process; default: 1, or 2 with --quick")
    arguments.add_argument("--steps", type=int, help="of the students, at most")
    arguments.add_argument("--teacher-steps", type=int, help="of every teacher")
    arguments.add_argument("--problems", type=int, help="held-out ones, at most")
    arguments.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments.add_argument(
        "--losses", nargs="+", choices=["CE", *arms()], metavar="NAME", help="only these, as in the first column"
    )
    options = arguments.parse_args()
    if options.quick and "plenty" not in options.settings:
        arguments.error("--settings: expected plenty with --quick")
    options.workers = options.workers or (1 if options.quick else 2)
    options.threads = options.threads or (2 if options.quick else 1)
    torch.set_num_threads(options.threads)
    if options.output is None:
        options.output = ROOT / "build" / "reproduce_quick.json" if options.quick else RESULTS / "reproduce.json"
    settings = {name: SETTINGS[name] for name in options.settings}
    finding = Finding.of() if options.quick else None
    if finding:
        options.teacher_steps = options.teacher_steps or 2000
        brief = replace(SETTINGS["plenty"], shape=Shape(600), losses=["CE", *finding], seeds=3)
        settings = {"plenty": brief}
    for name, setting in settings.items():
        start = setting.start and limited(setting.start, options.steps)
        problems = min(setting.problems, options.problems or setting.problems)
        settings[name] = replace(setting, shape=limited(setting.shape, options.steps), start=start, problems=problems)
    results = json.loads(options.output.read_text()) if options.report else measure(options, settings)
    print(report(results))
    plot(results, options.output.with_suffix(".png"))
    if finding and (absent := finding.lacking(results)):
        raise SystemExit(f"\nThe finding is absent. Expected {'; '.join(absent)}")


if __name__ == "__main__":
    main()
