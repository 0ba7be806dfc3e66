"""Drawing completions from a model of transformers, batch by batch, in any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from xtoken.vocabulary.roles import filler

from .limits import Limits
from .packing import in_evaluation
from .reader import Reader


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; a temperature of 0 takes the most probable token."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


def end_ids(reader: Reader, model: Any = None) -> list[int]:
    """The tokens after which a model writes no more: by their roles, and by its configuration."""
    ends = {i for role, i in reader.vocabulary.roles.items() if role in ("eos", "end_of_turn")}
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends.update([own] if isinstance(own, int) else own or [])
    return sorted(ends)


class ModelWriter:
    """Writes completions with a model.

    Parameters
    ----------
    model : callable
        Gives the model when it is needed: with whatever shards it, without what else wraps it.
    reader : Reader
    limits : Limits
    device : torch.device
    sampling : Sampling
    batch_size : int
        Completions that are written at once.
    most : callable, optional
        For a sharded model, which all processes must call equally often: the largest of their numbers.

    Raises ValueError if the model cannot generate.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        reader: Reader,
        limits: Limits,
        device: torch.device,
        sampling: Sampling,
        batch_size: int,
        most: Callable[[int], int] | None = None,
    ) -> None:
        if not hasattr(model(), "generate"):
            raise ValueError(
                f"on_policy: expected a model of transformers, which can generate, as the {reader.name}, got "
                f"{type(model()).__name__}"
            )
        self.model, self.reader, self.limits, self.device = model, reader, limits, device
        self.sampling, self.batch_size, self.most = sampling, batch_size, most
        self.ends = end_ids(reader, model())
        self.pad = filler(reader.vocabulary.roles) or 0
        self.size = len(reader.vocabulary) if limits.rows is None else min(limits.rows, len(reader.vocabulary))

    def write(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """The tokens of a completion of each prompt, with the end token if it has come to it.

        The same for the same weights, prompts and seed; the generators of random numbers are left as they were.
        """
        order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))  # as little padding as may be
        groups = [order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size)]
        idle = 0 if self.most is None else self.most(len(groups)) - len(groups)
        written: list[list[int]] = [[] for _ in prompts]
        model = self.model()
        with _seeded(seed, self.device), _ready(model):
            for group in groups:
                for k, ids in zip(group, self._generate(model, [prompts[k] for k in group]), strict=True):
                    written[k] = ids
            for _ in range(idle):  # what is drawn for nothing keeps the others company
                self._generate(model, [[self.pad]])
        return written

    def _generate(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        width = max(map(len, prompts))
        rows = [[self.pad] * (width - len(one)) + list(one) for one in prompts]
        mask = [[0] * (width - len(one)) + [1] * len(one) for one in prompts]
        given = {"input_ids": torch.tensor(rows, device="cpu"), "attention_mask": torch.tensor(mask, device="cpu")}
        self.limits.check(given, self.reader.name)
        given["input_ids"] = self.limits.fit(given)
        is_drawn = self.sampling.temperature > 0
        drawn = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens, do_sample=is_drawn, **(drawn if is_drawn else {}),
            eos_token_id=self.ends or None, pad_token_id=min(self.pad, self.size - 1), use_cache=True,
        )  # fmt: skip
        output = model.generate(
            **{name: one.to(self.device) for name, one in given.items()},
            generation_config=config,
            logits_processor=LogitsProcessorList([_WithinVocabulary(self.size)]),
            synced_gpus=self.most is not None,
        )
        return [self._until_end(row) for row in output[:, width:].tolist()]

    def _until_end(self, row: list[int]) -> list[int]:
        """What was written, without the padding behind it."""
        end = next((k for k, i in enumerate(row) if i in self.ends), len(row))
        return row[: end + 1]


class _WithinVocabulary(LogitsProcessor):
    """Rules out what an output layer has beyond the tokens."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        is_token = torch.arange(scores.shape[-1], device=scores.device) < self.size
        return scores.where(is_token, -torch.inf)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of this seed within, those of before after it."""
    on_cpu = device.type == "cpu"
    kept = {"devices": [] if on_cpu else [device.index or 0], "device_type": "cuda" if on_cpu else device.type}
    with torch.random.fork_rng(**kept):
        torch.manual_seed(seed)
        yield


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    """The model without dropout, and without its own ideas of generation (penalties, columns left out)."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with in_evaluation(model):
            yield
    finally:
        model.generation_config = own
