"""Toy texts, tokenizers and models for `reproduce.py`, and what is measured of the models.

Texts are sums in words mixed with sentences, or short functions in the manner of Python. Tokenizers cut them as those
of real models do: numbers packed (Llama 3) or digit by digit (Qwen3, Gemma 3); indentation with the last space given to
the word (Llama 3) or as one run (Gemma 3).
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
HEADS = 4

# --- text


class Problem(NamedTuple):
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


class Corpus(Protocol):
    """Texts to train on, some of which are problems, and problems that are held out."""

    def batch(self, draw: random.Random, count: int) -> list[str]: ...
    def problems(self, count: int) -> list[Problem]: ...


PEOPLE = ["Ann", "Ben", "Eva", "Ida", "Jon", "Kim", "Leo", "Mia", "Noa", "Oli", "Pia", "Sam", "Tom", "Uma", "Zoe"]
THINGS = ["apples", "books", "cards", "coins", "cups", "eggs", "keys", "nuts", "pens", "stones"]
PLUS = ("got", "found", "bought")
PLACES = ["garden", "kitchen", "forest", "market", "river", "school", "station", "village"]
ADJECTIVES = ["old", "small", "quiet", "bright", "heavy", "green", "clean", "warm"]
VERBS = ["walks", "runs", "looks", "writes", "waits", "sings", "reads", "talks"]


class Sums:
    """Sums in words and sentences without numbers. A share of all pairs of summands is held out of training."""

    def __init__(self, share: float = 0.75) -> None:
        self.share = share
        pairs = [(a, b) for a in range(50, 90) for b in range(10, 50)]
        random.Random(0).shuffle(pairs)
        self.held_out, self.training = pairs[: len(pairs) // 8], pairs[len(pairs) // 8 :]

    def problem(self, draw: random.Random, pairs: Sequence[tuple[int, int]]) -> Problem:
        (a, b), person, thing = draw.choice(pairs), draw.choice(PEOPLE), draw.choice(THINGS)
        return Problem(f"{person} had {a} {thing}, {draw.choice(PLUS)} {b}. Now", f" {a + b}.")

    def sentence(self, draw: random.Random) -> str:
        place, thing = draw.choice(PLACES), draw.choice(THINGS)
        return f"{draw.choice(PEOPLE)} {draw.choice(VERBS)} to the {draw.choice(ADJECTIVES)} {place} with {thing}."

    def batch(self, draw: random.Random, count: int) -> list[str]:
        problems = [self.problem(draw, self.training).text for _ in range(round(count * self.share))]
        return problems + [self.sentence(draw) for _ in range(count - len(problems))]

    def problems(self, count: int) -> list[Problem]:
        """Held-out ones, always the same."""
        draw = random.Random(1)
        return [self.problem(draw, self.held_out) for _ in range(count)]


class NoisySums(Sums):
    """Of the sums to train with, a share has the answer of another one."""

    def __init__(self, wrong: float) -> None:
        super().__init__()
        self.wrong = wrong

    def problem(self, draw: random.Random, pairs: Sequence[tuple[int, int]]) -> Problem:
        problem = super().problem(draw, pairs)
        if pairs is self.training and draw.random() < self.wrong:
            others = [answer for a, b in pairs if (answer := f" {a + b}.") != problem.answer]
            problem = problem._replace(answer=draw.choice(others))
        return problem


class MixedSums(Sums):
    """Half of the sentences between the sums have a number, which says nothing."""

    def sentence(self, draw: random.Random) -> str:
        sentence = super().sentence(draw)
        if draw.random() < 0.5:
            before, thing = sentence.rsplit(" ", 1)
            sentence = f"{before} {draw.randrange(1, 200)} {thing}"
        return sentence


class FewSums:
    """The same few texts over and over."""

    def __init__(self, texts: int = 1500) -> None:
        self.count, self.source = texts, Sums()
        self.texts: list[str] = []

    def batch(self, draw: random.Random, count: int) -> list[str]:
        if not self.texts:
            self.texts = self.source.batch(draw, self.count)
        return draw.sample(self.texts, count)

    def problems(self, count: int) -> list[Problem]:
        return self.source.problems(count)


class Functions:
    """Functions with nested blocks, of which a "while" or "with" is the innermost. What is in it and after it follows
    from what is before: it acts on the nearest variable, one level deeper, and the argument is returned."""

    NAMES = ("cups", "eggs", "keys", "nuts", "pens", "rows", "sums", "tags")

    def __init__(self) -> None:
        names = self.NAMES
        chains = [(a, b, c) for a in names for b in names for c in names if len({a, b, c}) == 3]
        random.Random(0).shuffle(chains)
        self.held_out, self.training = chains[: len(chains) // 8], chains[len(chains) // 8 :]

    def problem(self, draw: random.Random, chains: Sequence[tuple[str, str, str]]) -> Problem:
        argument, outer, inner = draw.choice(chains)
        lines = [f"def {draw.choice(VERBS)}({argument}):"]
        if draw.random() < 0.5:
            lines.append(draw.choice([f"    for {outer} in {argument}:", f"    if {outer}:"]))
        indent = " " * 4 * len(lines)
        lines.append(f"{indent}{draw.choice(('while', 'with'))} {inner}:")
        prompt = "".join(line + "\n" for line in lines)
        return Problem(prompt, f"{indent}    print({inner})\n    return {argument}\n")

    def batch(self, draw: random.Random, count: int) -> list[str]:
        return [self.problem(draw, self.training).text for _ in range(count)]

    def problems(self, count: int) -> list[Problem]:
        draw = random.Random(1)
        return [self.problem(draw, self.held_out) for _ in range(count)]


# --- tokenizers

# The pre-tokenizer of Llama 3, of how many digits one piece may have; and one that takes runs of spaces as they are.
PACKED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RUNS = r" {2,}|\n+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+| "
SPACE = "Ġ"
"""How byte-level vocabularies write a space."""


def build_tokenizer(
    pattern: str, vocabulary: int, corpus: Sequence[str], digits: int = 1, spaces: int = 1
) -> tokenizers.Tokenizer:
    """Byte-level BPE over words; all numbers of up to so many digits and all runs of so many spaces are tokens."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
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
    numbers = [f"{number:0{length}d}" for length in range(2, digits + 1) for number in range(10**length)]
    for token in [*numbers, *(SPACE * length for length in range(2, spaces + 1))]:
        if token not in ids:
            ids[token] = len(ids)
            merges.append((token[:-1], token[-1]))
    built = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, ignore_merges=True))
    built.pre_tokenizer = split
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<|begin|>", "<|end|>"])
    return built


def sums_tokenizer(digits: int, vocabulary: int, seed: int) -> tokenizers.Tokenizer:
    text, draw = Sums(), random.Random(seed)
    corpus = [text.sentence(draw) if i % 2 else text.problem(draw, text.training).prompt for i in range(2000)]
    return build_tokenizer(PACKED.replace("DIGITS", str(digits)), vocabulary, corpus, digits=digits)


def code_tokenizer(pattern: str, vocabulary: int, seed: int) -> tokenizers.Tokenizer:
    corpus = Functions().batch(random.Random(seed), 2000)
    return build_tokenizer(pattern.replace("DIGITS", "3"), vocabulary, corpus, spaces=16)


class World(NamedTuple):
    """A pair of tokenizers, and what a teacher with the second one learns from."""

    text: Corpus
    student: tokenizers.Tokenizer
    teacher: tokenizers.Tokenizer
    steps: int
    """Of the teacher."""
    form: Callable[[str], bool] | None = None
    """Which tokens are of the form that an answer's second token has; None: what counts is its first token as it is.
    See `measures`."""


def tokens(tokenizer: tokenizers.Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]


def is_packed(token: str) -> bool:
    return len(token) > 1 and token.isdigit()


@cache
def world(name: str) -> World:
    """One of "split", "whole" (what the teacher does with numbers), "mixed" (split, among other numbers), "code"."""
    if name == "code":
        return World(Functions(), code_tokenizer(PACKED, 150, seed=1), code_tokenizer(RUNS, 130, seed=2), 600)
    packs = sums_tokenizer(3, 300, seed=1)
    if name == "whole":  # whole numbers are harder to learn: 79 % after 3000 steps
        return World(Sums(), packs, sums_tokenizer(3, 220, seed=2), 5000, is_packed)
    text = {"split": Sums, "mixed": MixedSums}[name]()
    return World(text, packs, sums_tokenizer(1, 220, seed=2), 3000, is_packed)


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


@dataclass(frozen=True)
class Shape:
    """Of a model and its training."""

    steps: int
    width: int = 64
    layers: int = 2
    batch: int = 32
    learning_rate: float = 1e-2


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

    @torch.no_grad()
    def take(self, other: Transformers, share: float = 1.0) -> None:
        """Moves the weights by so much towards those of other models, or of the only one."""
        for own, given in zip(self.parameters(), other.parameters(), strict=True):
            own.lerp_(given, share)


def transformers(count: int, tokenizer: tokenizers.Tokenizer, shape: Shape, seed: int) -> Transformers:
    return Transformers(count, tokenizer.get_vocab_size(), shape.layers, shape.width, seed)


def optimizer(model: Transformers, shape: Shape) -> tuple[torch.optim.Optimizer, Any]:
    """With warm-up, then a cosine to zero."""
    adam = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    warm = max(1, shape.steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / shape.steps))

    return adam, torch.optim.lr_scheduler.LambdaLR(adam, factor)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


# --- what is measured


@torch.no_grad()
def accuracy(model: Transformers, tokenizer: tokenizers.Tokenizer, problems: Sequence[Problem]) -> list[float]:
    """Share of problems that each model answers greedily with the right text, however it spells it.

    An answer has time for as many tokens as characters; what is no longer the beginning of the right one is given up.
    """
    (begin,) = tokenizer.encode("<|begin|>").ids
    prompts = [[begin, *one.ids] for one in tokenizer.encode_batch([problem.prompt for problem in problems])]
    wanted = [problem.answer for problem in problems]
    most = max(map(len, wanted))
    width = max(map(len, prompts)) + most
    padded = torch.tensor([prompt + [begin] * (width - len(prompt)) for prompt in prompts])
    ids = padded.repeat(len(model.token), 1, 1)
    first = torch.tensor(list(map(len, prompts)))
    undecided = torch.ones(ids.shape[:2], dtype=torch.bool)
    right = [0] * len(ids)
    for step in range(most):
        rows = undecided.any(0).nonzero()[:, 0]
        if not len(rows):
            break
        at = (first[rows] + step).expand(len(ids), -1)[..., None]
        hidden = model.hidden(ids[:, rows, : int(at.max())]).take_along_dim(at[..., None] - 1, dim=2)
        ids[:, rows] = ids[:, rows].scatter(2, at, model.logits(hidden).argmax(-1))
        places = undecided.nonzero().tolist()
        answers = [ids[one, row, len(prompts[row]) : len(prompts[row]) + step + 1].tolist() for one, row in places]
        for (one, row), answer in zip(places, tokenizer.decode_batch(answers), strict=True):
            is_right = answer.startswith(wanted[row])
            right[one] += is_right
            undecided[one, row] = not is_right and wanted[row].startswith(answer)
    return [count / len(problems) for count in right]


MEASURES = ("exact match", "probability", "log-likelihood", "form")


@torch.no_grad()
def measures(model: Transformers, world: World, problems: Sequence[Problem]) -> dict[str, list[float]]:
    """By the names of `MEASURES`, of each model: `accuracy`; mean probability and log-likelihood (nats) of the right
    answer in the usual tokens; and its form: the probability of all numerals of several digits together where the
    answer has one, or of the right white space where the answer begins with it."""
    tokenizer = world.student
    read = encode(tokenizer, [problem.text for problem in problems])
    first = torch.tensor([1 + len(one.ids) for one in tokenizer.encode_batch([one.prompt for one in problems])])
    length = torch.tensor([len(row) - 1 for row in read.rows]) - first
    place = (first[:, None] + torch.arange(int(length.max()))).clamp_max(read.ids.shape[1] - 1)  # [problems, tokens]
    rows = model.hidden(read.ids).take_along_dim(place[None, ..., None] - 1, 2)
    log_probs = model.logits(rows).log_softmax(-1)
    chosen = log_probs.take_along_dim(read.ids.gather(1, place)[None, ..., None], 3)[..., 0]
    is_answer = torch.arange(place.shape[1]) < length[:, None]
    total = chosen.masked_fill(~is_answer, 0).sum(2)
    if world.form is None:
        form = chosen[:, :, 0].exp()
    else:
        is_of_form = torch.tensor(list(map(world.form, tokens(tokenizer))))
        form = log_probs[:, :, 1].exp()[..., is_of_form].sum(-1)
    values = (total.exp().mean(1).tolist(), total.mean(1).tolist(), form.mean(1).tolist())
    return dict(zip(MEASURES, (accuracy(model, tokenizer, problems), *values), strict=True))
