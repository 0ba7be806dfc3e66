"""The paper's finding in small: which loss teaches a student that packs digits, when its teacher splits them.

A teacher that writes numbers digit by digit, and students whose tokenizer packs up to three digits (the rule of
Llama 3), read sums in words, mixed with sentences without numbers. All students of a setting and a seed start from the
same weights and read the same batches; only the loss differs. Settings: ``plenty``, every batch is new; ``little``,
the same few texts over and over, which cross-entropy alone overfits; and ``mirror``, plenty of text and a teacher that
keeps numbers whole as the student does. What counts: greedy answers to held-out sums, exact match, on the way and at
the end. A guess that knows one of the two summands is right in 2.5 %.

Every distillation loss D is added to cross-entropy with the paper's dynamic scaling, CE + (CE / |D|) D, the ratio held
constant: that of `xtoken.XTokenLoss` with ``max_scale=inf``, or with the bound that ``--max-scale`` gives. Results go
to bench/results/reproduce.json and .png, the table to the screen.

    python bench/reproduce.py [--seeds 3] [--threads 2] [--settings plenty little mirror] [--resume]
    python bench/reproduce.py --report     # only table and plot of the runs that the JSON has
    python bench/reproduce.py --quick      # one seed, four students, fewer steps; results to build/reproduce_quick.json

The whole run has every registered loss in all its forms. The quick one has those of which the finding speaks, which are
the recommended ones: exit status 1 if the loss for a teacher that keeps numbers whole does not collapse where they are
split, or if what `xtoken.choose_loss` names there is not above what the paper's rule does (`xtoken.coverage_audit`).
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from cases import Case, Pair, choices
from measure import RESULTS, ROOT, machine, parser, write
from tokenizers import decoders, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

import xtoken
from xtoken.losses.loss import Needs, registered

# The pre-tokenizer of Llama 3; the teacher's differs in the digits that one piece may have.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IGNORED = -100
HEADS = 4
GAMMAS = (0.1, 0.0)
"""Of W: the paper's default, and no weight for later pieces."""


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    steps: int = 1200
    batch: int = 32
    first: tuple[int, int] = (50, 90)  # the summands' ranges, half open
    second: tuple[int, int] = (10, 50)
    texts: int = 1500  # of the regime "little"
    evaluations: int = 6
    problems: int = 400
    student_layers: int = 2
    student_width: int = 64
    teacher_layers: int = 2
    teacher_width: int = 64
    teacher_steps: int = 3000
    mirror_teacher_steps: int = 5000  # whole numbers are harder to learn: 79 % after 3000 steps
    learning_rate: float = 1e-2


# --- text


class Problem(NamedTuple):
    prompt: str
    answer: int

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}."


PEOPLE = ["Ann", "Ben", "Eva", "Ida", "Jon", "Kim", "Leo", "Mia", "Noa", "Oli", "Pia", "Sam", "Tom", "Uma", "Zoe"]
THINGS = ["apples", "books", "cards", "coins", "cups", "eggs", "keys", "nuts", "pens", "stones"]
PLUS = ("got", "found", "bought")
PLACES = ["garden", "kitchen", "forest", "market", "river", "school", "station", "village"]
ADJECTIVES = ["old", "small", "quiet", "bright", "heavy", "green", "clean", "warm"]
VERBS = ["walks", "runs", "looks", "writes", "waits", "sings", "reads", "talks"]


class Text:
    """Sums in words and sentences without numbers. A share of all pairs of summands is held out of training."""

    def __init__(self, size: Size) -> None:
        pairs = [(a, b) for a in range(*size.first) for b in range(*size.second)]
        random.Random(0).shuffle(pairs)
        self.held_out, self.training = pairs[: len(pairs) // 8], pairs[len(pairs) // 8 :]

    def problem(self, draw: random.Random, pairs: Sequence[tuple[int, int]]) -> Problem:
        (a, b), person, thing = draw.choice(pairs), draw.choice(PEOPLE), draw.choice(THINGS)
        return Problem(f"{person} had {a} {thing}, {draw.choice(PLUS)} {b}. Now", a + b)

    def sentence(self, draw: random.Random) -> str:
        place, thing = draw.choice(PLACES), draw.choice(THINGS)
        return f"{draw.choice(PEOPLE)} {draw.choice(VERBS)} to the {draw.choice(ADJECTIVES)} {place} with {thing}."

    def batch(self, draw: random.Random, count: int, share: float = 0.75) -> list[str]:
        problems = [self.problem(draw, self.training).text for _ in range(round(count * share))]
        return problems + [self.sentence(draw) for _ in range(count - len(problems))]

    def problems(self, count: int) -> list[Problem]:
        """Held-out ones, always the same."""
        draw = random.Random(1)
        return [self.problem(draw, self.held_out) for _ in range(count)]


# --- tokenizers


def build_tokenizer(digits: int, vocabulary: int, seed: int, text: Text) -> tokenizers.Tokenizer:
    """Byte-level BPE over words, and all numbers of up to so many digits as tokens of their own."""
    draw = random.Random(seed)
    corpus = [text.sentence(draw) if i % 2 else text.problem(draw, text.training).prompt for i in range(2000)]
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT.replace("DIGITS", str(digits))), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = split
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=list("0123456789"), show_progress=False)
    words.train_from_iterator([re.sub("[0-9]", "", line) for line in corpus], trainer)
    learned = json.loads(words.to_str())["model"]
    ids = dict(learned["vocab"])
    merges = [tuple(pair) for pair in learned["merges"]]
    for length in range(2, digits + 1):
        for number in range(10**length):
            token = f"{number:0{length}d}"
            ids[token] = len(ids)
            merges.append((token[:-1], token[-1]))
    built = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, ignore_merges=True))
    built.pre_tokenizer = split
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<|begin|>", "<|end|>"])
    return built


class Encoded(NamedTuple):
    """Right-padded ids [B, T], and labels with -100 at the padding."""

    ids: Tensor
    labels: Tensor
    rows: list[list[int]]


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> Encoded:
    begin, end = tokenizer.encode("<|begin|><|end|>").ids
    rows = [[begin, *one.ids, end] for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=end)
    lengths = torch.tensor([len(row) for row in rows])
    return Encoded(ids, ids.masked_fill(torch.arange(ids.shape[1]) >= lengths[:, None], IGNORED), rows)


# --- models


class Transformers(nn.Module):
    """`count` language models of one shape, side by side: ids [B, T] in, logits [count, B, T, V] out.

    All start from the same weights. Nothing in them mixes models, so each trains as if it were alone.
    """

    def __init__(self, count: int, vocabulary: int, layers: int, width: int, seed: int, length: int = 64) -> None:
        super().__init__()
        self.width, self.vocabulary = width, vocabulary
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int, scale: float) -> nn.Parameter:
            one = scale * torch.randn(*shape, generator=generator)
            return nn.Parameter(one.expand(count, *shape).clone())

        self.token = weight(vocabulary, width, scale=width**-0.5)
        self.position = weight(length, width, scale=0.02)
        scale, small = width**-0.5, (2 * layers * width) ** -0.5
        self.weights = nn.ParameterList()
        for _ in range(layers):
            shapes = ((3 * width, scale), (width, small), (4 * width, scale))
            self.weights.extend(weight(width, size, scale=value) for size, value in shapes)
            self.weights.append(weight(4 * width, width, scale=small / 2))

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.hidden(ids))

    def hidden(self, ids: Tensor) -> Tensor:
        """What the output layer sees [count, B, T, width], of ids [B, T] or [count, B, T]."""
        count, width = len(self.token), self.width
        samples, length = ids.shape[-2:]
        first = torch.arange(count)[:, None, None] * self.vocabulary
        x: Tensor = F.embedding(ids + first, self.token.flatten(0, 1)) * width**0.5 + self.position[:, None, :length]
        x = x.flatten(1, 2)  # [count, B T, width], as a product of matrices wants it
        heads = (count * samples, length, 3, HEADS, width // HEADS)
        layers = iter(self.weights)
        for qkv, out, up, down in zip(layers, layers, layers, layers, strict=True):
            query, key, value = (self._normed(x) @ qkv).view(heads).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + mixed.transpose(1, 2).reshape(x.shape) @ out
            x = x + F.gelu(self._normed(x) @ up) @ down
        return x.view(count, samples, length, width)

    def logits(self, hidden: Tensor) -> Tensor:
        rows: Tensor = self._normed(hidden).flatten(1, 2) @ self.token.mT
        return rows.reshape(*hidden.shape[:-1], self.vocabulary)

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,))

    def clip_gradients(self, limit: float = 1.0) -> None:
        """Bounds the norm of each model's gradient."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
        for grad in grads:
            grad.mul_((limit / norm.clamp_min(limit)).view(-1, *[1] * (grad.ndim - 1)))


def optimizer(model: Transformers, size: Size, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    adam = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return adam, torch.optim.lr_scheduler.LambdaLR(adam, factor)


@torch.no_grad()
def accuracy(model: Transformers, tokenizer: tokenizers.Tokenizer, problems: Sequence[Problem]) -> list[float]:
    """Share of problems that each model answers, greedily, with the right number and a full stop.

    However it spells them: an answer has time for as many tokens as characters.
    """
    (begin,) = tokenizer.encode("<|begin|>").ids
    prompts = [[begin, *one.ids] for one in tokenizer.encode_batch([problem.prompt for problem in problems])]
    wanted = [f" {problem.answer}." for problem in problems]
    most = max(map(len, wanted))
    width = max(map(len, prompts)) + most
    padded = torch.tensor([prompt + [begin] * (width - len(prompt)) for prompt in prompts])
    ids = padded.repeat(len(model.token), 1, 1)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts]).expand(len(ids), -1)
    for step in range(most):
        at = (last + step)[..., None]
        hidden = model.hidden(ids).take_along_dim(at[..., None], dim=2)
        ids.scatter_(2, at + 1, model.logits(hidden).argmax(-1))
    shares = []
    for rows in ids.tolist():
        answers = [row[len(prompt) : len(prompt) + most] for row, prompt in zip(rows, prompts, strict=True)]
        pairs = zip(tokenizer.decode_batch(answers), wanted, strict=True)
        shares.append(statistics.fmean(answer.startswith(want) for answer, want in pairs))
    return shares


# --- training

Distance = Callable[[Tensor, Tensor, xtoken.Alignment], Tensor]


class Arm(NamedTuple):
    """A loss with a word for each of its choices, and the gamma of its W."""

    case: Case
    gamma: float
    is_main: bool
    """Whether its words are the defaults."""


def arms() -> dict[str, Arm]:
    """Every registered loss that two tokenizers allow, in all its forms, named by its words. Where the weights of W are
    part of the loss, so that they can be trained, gamma varies too; others only ask which tokens W pairs."""
    found = {}
    for loss in registered().values():
        if loss.needs is Needs.SAME_TOKENIZER:
            continue
        words = choices(loss)
        for chosen in itertools.product(*words.values()):
            for gamma in GAMMAS if loss.trains_projection else GAMMAS[:1]:
                shown = [f"{gamma:g}"] if loss.trains_projection else []
                words_of = [word for word in chosen if word != "none"]
                name = " ".join([loss.title, *words_of[:1], *shown, *words_of[1:]])
                is_main = all(word == values[0] for word, values in zip(chosen, words.values(), strict=True))
                found[name] = Arm(Case(name, loss, dict(zip(words, chosen, strict=True))), gamma, is_main)
    return found


def methods(student: tokenizers.Tokenizer, teacher: tokenizers.Tokenizer) -> dict[str, Distance | None]:
    """By name: the distillation loss of (student logits, teacher logits, alignment)."""
    pieces = xtoken.PieceIndex.build(student, teacher)
    pairs = {gamma: Pair(xtoken.ProjectionMatrix.build(student, teacher, gamma=gamma), pieces) for gamma in GAMMAS}
    return {"CE": None, **{name: partial(arm.case, pair=pairs[arm.gamma]) for name, arm in arms().items()}}


def train_teacher(
    tokenizer: tokenizers.Tokenizer, text: Text, size: Size, steps: int, log: Callable[[str], None]
) -> tuple[Transformers, float]:
    """A model that learns from text alone, and its accuracy."""
    model = Transformers(1, tokenizer.get_vocab_size(), size.teacher_layers, size.teacher_width, seed=100)
    adam, schedule = optimizer(model, size, steps)
    draw = random.Random(100)
    for step in range(steps):
        batch = encode(tokenizer, text.batch(draw, size.batch))
        loss = cross_entropy(model(batch.ids)[0], batch.labels)
        adam.zero_grad()
        loss.backward()
        model.clip_gradients()
        adam.step()
        schedule.step()
        if (step + 1) % (steps // 4) == 0:
            (right,) = accuracy(model, tokenizer, text.problems(size.problems))
            log(f"  teacher, step {step + 1}: loss {loss.item():.3f}, exact match {right:.1%}")
    return model.requires_grad_(False), right


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def total_loss(
    logits: Tensor,
    batch: Encoded,
    teacher_logits: Tensor,
    chunks: xtoken.Alignment,
    distil: Distance | None,
    max_scale: float = math.inf,
) -> Tensor:
    """CE + (CE / |D|) D, the ratio bounded and held constant: the total of `xtoken.XTokenLoss` with one teacher."""
    ce = cross_entropy(logits, batch.labels)
    if distil is None:
        return ce
    distance = distil(logits, teacher_logits, chunks)
    return ce + (ce / distance.abs()).detach().nan_to_num(0, 0, 0).clamp_max(max_scale) * distance


def train_students(
    losses: dict[str, Distance | None], student: tokenizers.Tokenizer, teacher: tokenizers.Tokenizer,
    guide: Transformers, text: Text, size: Size, little: bool, seed: int, max_scale: float = math.inf,
) -> dict[str, list[float]]:  # fmt: skip
    """Trains one student with each loss, side by side; accuracies on the way, by loss."""
    model = Transformers(len(losses), student.get_vocab_size(), size.student_layers, size.student_width, seed=seed)
    adam, schedule = optimizer(model, size, size.steps)
    aligner = xtoken.Aligner(student, teacher, num_threads=1)
    draw = random.Random(1000 + seed)
    texts = text.batch(draw, size.texts) if little else []
    curves: dict[str, list[float]] = {name: [] for name in losses}
    for step in range(size.steps):
        lines = draw.sample(texts, size.batch) if little else text.batch(draw, size.batch)
        batch, read = encode(student, lines), encode(teacher, lines)
        chunks = aligner.align(batch.rows, read.rows)
        teacher_logits = guide(read.ids)[0]
        totals = [
            total_loss(logits, batch, teacher_logits, chunks, distil, max_scale)
            for logits, distil in zip(model(batch.ids).unbind(), losses.values(), strict=True)
        ]
        adam.zero_grad()
        torch.stack(totals).sum().backward()
        model.clip_gradients()
        adam.step()
        schedule.step()
        if (step + 1) % (size.steps // size.evaluations) == 0:
            for name, right in zip(losses, accuracy(model, student, text.problems(size.problems)), strict=True):
                curves[name].append(right)
    return curves


# --- report

SETTINGS = {
    "plenty": "the teacher splits digits, plenty of text",
    "little": "the teacher splits digits, little text",
    "mirror": "the teacher keeps numbers whole, plenty of text",
}
MAIN = ["CE", *(name for name, arm in arms().items() if arm.is_main)]
"""Losses that all settings compare."""
VARIANTS = [name for name in arms() if name not in MAIN]
"""Their other forms, which run last."""
PLANS = {
    "main": {"plenty": MAIN, "little": MAIN, "mirror": MAIN},
    "variants": {"plenty": VARIANTS, "little": VARIANTS},
}


class World(NamedTuple):
    """What all runs of a size have in common; teachers by the digits that a token of theirs may have."""

    text: Text
    student: tokenizers.Tokenizer
    teachers: dict[int, tokenizers.Tokenizer]

    @classmethod
    def of(cls, size: Size) -> World:
        text = Text(size)
        teachers = {digits: build_tokenizer(digits, 220, seed=2, text=text) for digits in (1, 3)}
        return cls(text, build_tokenizer(3, 300, seed=1, text=text), teachers)


class Finding(NamedTuple):
    """The arms of which the finding speaks: the recommended losses."""

    whole: str
    """By the paper's rule for a teacher that keeps numbers whole."""
    split: str
    """By the same rule for one that splits them."""
    chosen: str
    """For the latter by `xtoken.choose_loss`."""

    @classmethod
    def of(cls, world: World) -> Finding:
        whole, split = (xtoken.coverage_audit(world.student, world.teachers[digits]) for digits in (3, 1))
        chosen = xtoken.choose_loss(world.student, world.teachers[1], report=split).loss
        names = {arm.case.loss.name: name for name, arm in reversed(arms().items()) if arm.is_main}
        return cls(names[whole.recommendation], names[split.recommendation], names[chosen])

    def lacking(self, results: dict[str, Any]) -> list[str]:
        """What of it a quick run does not show; in the whole run the margins are tens of points, in every seed."""
        ends = {method: 100 * final(curves) for method, curves in collect(results, "plenty").items()}
        ce, whole, split, chosen = (ends[name] for name in ("CE", *self))
        claims = {
            f"{self.whole} below half of CE: {whole:.1f} and {ce:.1f}%": whole < ce / 2,
            f"{self.chosen} above twice {self.split}: {chosen:.1f} and {split:.1f}%": chosen > 2 * split,
        }
        return [claim for claim, holds in claims.items() if not holds]


def key(run: dict[str, Any]) -> tuple[str, int]:
    return run["setting"], run["seed"]


def collect(results: dict[str, Any], setting: str) -> dict[str, dict[int, list[float]]]:
    """Curves of a setting by loss and seed."""
    curves: dict[str, dict[int, list[float]]] = {}
    for run in results["runs"]:
        if run["setting"] == setting:
            for method, curve in run["curves"].items():
                curves.setdefault(method, {})[run["seed"]] = curve
    return curves


def final(curves: dict[int, list[float]]) -> float:
    return statistics.fmean(curve[-1] for curve in curves.values())


def table(results: dict[str, Any]) -> str:
    """Exact match in percent after the last step, mean and range over the seeds; and the lead over CE alone.

    The lead is the mean over seeds of the difference to the CE student of the same seed, with its standard error.
    """
    lines = []
    for setting, title in SETTINGS.items():
        curves = collect(results, setting)
        if not curves:
            continue
        teacher = results["teachers"][setting]
        lines += ["", f"{title[0].upper()}{title[1:]} (the teacher itself: {teacher:.1%})", ""]
        lines += ["| loss | exact match, % | range | over CE, points | seeds |", "| --- | --- | --- | --- | --- |"]
        for method, found in sorted(curves.items(), key=lambda item: -final(item[1])):
            ends = [100 * curve[-1] for curve in found.values()]
            leads = [100 * (curve[-1] - curves["CE"][seed][-1]) for seed, curve in found.items()]
            error = f" ± {statistics.stdev(leads) / len(leads) ** 0.5:.1f}" if len(leads) > 1 else ""
            lead = "" if method == "CE" else f"{statistics.fmean(leads):+.1f}{error}"
            cells = (method, f"{statistics.fmean(ends):.1f}", f"{min(ends):.1f} to {max(ends):.1f}", lead, len(ends))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Curves of the mean over the seeds, with a band from the least to the most."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    settings = [setting for setting in SETTINGS if collect(results, setting)]
    figure = Figure(figsize=(5 * len(settings), 4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
        curves = collect(results, setting)
        for method in sorted(set(curves) & set(MAIN), key=lambda name: -final(curves[name])):
            columns = list(zip(*curves[method].values(), strict=True))
            steps = [results["size"]["steps"] * (i + 1) // len(columns) for i in range(len(columns))]
            color = f"C{MAIN.index(method)}"
            means = [100 * statistics.fmean(column) for column in columns]
            axes.plot(steps, means, label=method, color=color)
            band = [[100 * edge(column) for column in columns] for edge in (min, max)]
            axes.fill_between(steps, *band, color=color, alpha=0.12, linewidth=0)
        axes.set_title(SETTINGS[setting], fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("exact match on held-out sums, %")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def measure(options: Namespace, size: Size, world: World, plans: dict[str, dict[str, list[str]]]) -> dict[str, Any]:
    """Writes the output file after each setting and seed; with --resume, runs what it does not have yet."""
    started = time.perf_counter()

    def log(message: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {message}", flush=True)

    facts = {"size": asdict(size), "machine": machine("torch", threads=options.threads)}
    results: dict[str, Any] = {**json.loads(json.dumps(facts)), "teachers": {}, "runs": []}
    if options.resume and options.output.exists():
        found = json.loads(options.output.read_text())
        if found["size"] != results["size"]:
            raise SystemExit(f"{options.output} has runs of another size; move it away")
        results = found
    text, student, teachers = world
    guides: dict[int, tuple[Transformers, float]] = {}
    for plan in plans.values():
        for seed in range(options.seeds):
            for setting, wanted in plan.items():
                done = {name for run in results["runs"] if key(run) == (setting, seed) for name in run["curves"]}
                names = [name for name in wanted if name not in done and name in (options.losses or wanted)]
                if not names or setting not in options.settings:
                    continue
                digits = 3 if setting == "mirror" else 1
                if digits not in guides:
                    advice = xtoken.coverage_audit(student, teachers[digits]).recommendation
                    log(f"{SETTINGS[setting]}; coverage_audit recommends {advice}")
                    steps = size.mirror_teacher_steps if setting == "mirror" else size.teacher_steps
                    guides[digits] = train_teacher(teachers[digits], text, size, steps, log)
                guide, results["teachers"][setting] = guides[digits]
                losses = methods(student, teachers[digits])
                cpu = time.process_time()
                curves = train_students(
                    {name: losses[name] for name in names},
                    student, teachers[digits], guide, text, size, setting == "little", seed,
                    options.max_scale,
                )  # fmt: skip
                run = {"setting": setting, "seed": seed, "cpu_seconds": time.process_time() - cpu, "curves": curves}
                results["runs"].append(run)
                log(f"{setting}, seed {seed}: " + ", ".join(f"{name} {one[-1]:.1%}" for name, one in curves.items()))
                write(options.output, results)
    results["minutes"] = results.get("minutes", 0) + (time.perf_counter() - started) / 60
    write(options.output, results)
    return results


def main() -> None:
    arguments = parser(__doc__, "reproduce.json")
    arguments.set_defaults(output=None)
    arguments.add_argument("--quick", action="store_true", help="one seed, four students; checks the finding")
    arguments.add_argument("--report", action="store_true", help="no runs: table and plot of those that --output has")
    arguments.add_argument("--resume", action="store_true", help="keep the runs that --output has")
    arguments.add_argument("--seeds", type=int)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--steps", type=int, help="of the students")
    arguments.add_argument("--max-scale", type=float, default=math.inf, help="bound of the dynamic factor")
    arguments.add_argument("--teacher-steps", type=int, help="of every teacher")
    arguments.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments.add_argument(
        "--plans", nargs="+", default=list(PLANS), choices=list(PLANS), help="losses as they are, their other forms"
    )
    arguments.add_argument(
        "--losses",
        nargs="+",
        choices=[*MAIN, *VARIANTS],
        metavar="NAME",
        help="only these, as in the table's first column",
    )
    options = arguments.parse_args()
    if options.quick and "plenty" not in options.settings:
        arguments.error("--settings: expected plenty with --quick")
    torch.set_num_threads(options.threads)
    options.seeds = options.seeds or (1 if options.quick else 3)
    if options.output is None:
        options.output = ROOT / "build" / "reproduce_quick.json" if options.quick else RESULTS / "reproduce.json"
    size = Size(steps=900, teacher_steps=2000) if options.quick else Size()
    if options.steps:
        size = replace(size, steps=options.steps)
    if options.teacher_steps:
        size = replace(size, teacher_steps=options.teacher_steps, mirror_teacher_steps=options.teacher_steps)
    world = World.of(size)
    finding = Finding.of(world) if options.quick else None
    plans = {"quick": {"plenty": ["CE", *finding]}} if finding else {name: PLANS[name] for name in options.plans}
    results = json.loads(options.output.read_text()) if options.report else measure(options, size, world, plans)
    print(table(results))
    plot(results, options.output.with_suffix(".png"))
    if finding and (absent := finding.lacking(results)):
        raise SystemExit(f"\nThe finding is absent. Expected {'; '.join(absent)}")


if __name__ == "__main__":
    main()
