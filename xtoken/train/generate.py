"""Drawing completions: from a model of transformers, in any number of processes, or from a vLLM server of the student,
which is sent its weights, or its adapter, every so many steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from xtoken.client import RefusedError
from xtoken.served import ServedModel
from xtoken.vocabulary.roles import filler

from .adapters import base_of
from .limits import Limits
from .packing import in_evaluation
from .reader import Reader

KEY = "XTOKEN_GENERATION_KEY"
"""Environment variable with the key of that server."""


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


@dataclass
class ModelWriter:
    """Writes completions with a model; ValueError if it cannot generate."""

    model: Callable[[], Any]
    """Gives the model when it is needed: with whatever shards it, without what else wraps it."""
    reader: Reader
    limits: Limits
    device: torch.device
    sampling: Sampling
    batch_size: int
    """Completions that are written at once."""
    most: Callable[[int], int] | None = None
    """For a sharded model, which all processes must call equally often: the largest of their numbers."""

    def __post_init__(self) -> None:
        model, vocabulary = self.model(), self.reader.vocabulary
        if not hasattr(model, "generate"):
            raise ValueError(
                f"on_policy: expected a model of transformers, which can generate, as the {self.reader.name}, got "
                f"{type(model).__name__}"
            )
        self.ends = end_ids(self.reader, model)
        self.pad = filler(vocabulary.roles) or 0
        self.size = len(vocabulary) if self.limits.rows is None else min(self.limits.rows, len(vocabulary))

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
        written: list[list[int]] = output[:, width:].tolist()
        ends = [next((k for k, i in enumerate(row) if i in self.ends), len(row)) for row in written]
        return [row[: end + 1] for row, end in zip(written, ends, strict=True)]  # without the padding behind it


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
    places = [model, base_of(model)]  # peft copies its own to the model within
    own = [one.generation_config for one in places]
    for one in places:
        one.generation_config = GenerationConfig()
    try:
        with in_evaluation(model):
            yield
    finally:
        for one, config in zip(places, own, strict=True):
            one.generation_config = config


@dataclass
class ServerWriter:
    """Writes completions with a server: token ids go out and come back, nothing is decoded; ValueError if it is no
    vLLM."""

    served: ServedModel
    sampling: Sampling
    ends: Sequence[int]
    """Tokens after which nothing more is written."""
    rows: int | None = None
    """Of the model's output layer, where the server knows no more of the tokenizer than that."""

    def __post_init__(self) -> None:
        if self.served.is_sglang:
            raise ValueError(f"generation_url: expected a server of vLLM, got SGLang at {self.served.client.url}")
        self.model = self.served.model
        self.size = len(self.served.vocabulary)
        beyond = range(self.size, self.size if self.rows is None else self.rows)
        self._asked: dict[str, Any] = {
            "max_tokens": self.sampling.max_new_tokens, "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": self.ends, "return_token_ids": True,
            "logit_bias": {str(i): -100.0 for i in beyond} or None,
        }  # fmt: skip

    def write(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """The tokens of a completion of each prompt, with the end token if it has come to it; see `ModelWriter.write`.

        Raises ValueError for an answer that cannot be right, ConnectionError if there is none.
        """
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts)).tolist()
        pairs = zip(prompts, seeds, strict=True)
        futures: list[Future[list[int]]] = [self.served.client.submit(self._written, *pair) for pair in pairs]
        return [one.result() for one in futures]

    def _written(self, prompt: Sequence[int], seed: int) -> list[int]:
        content = {**self._asked, "model": self.model, "prompt": list(prompt), "seed": seed}
        where = self.served.client.url
        try:
            answer = self.served.client.call("/v1/completions", content)
            choice = answer["choices"][0]
            ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        except RefusedError as error:
            raise ValueError(f"generation_url: {error}") from error
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"generation_url: {where} answers with no completion in its form: {error!r}") from error
        if ids is None:
            raise ValueError(f"generation_url: {where} gives no token_ids; vLLM does from 0.10.2 on")
        if reason not in ("stop", "length") or not len(ids) <= self.sampling.max_new_tokens:
            raise ValueError(f"generation_url: {where} gives {len(ids)} tokens, which end by {reason!r}")
        if ids and not 0 <= min(ids) <= max(ids) < self.size:
            raise ValueError(
                f"generation_url: {where} gives token {max(ids)}, but the tokenizer has {self.size}; is it another's?"
            )
        return list(ids)


class Weights:
    """Sends the student's weights to its server, through a folder that both see: before anything is written, and at the
    steps that `every` divides.

    An adapter of PEFT is loaded as such, so that the server must serve the model that it is for. It has another name
    each time, since the server keeps what it has computed with an adapter of the same name.
    """

    def __init__(self, trainer: Any, writer: ServerWriter, folder: Path, every: int) -> None:
        self.trainer, self.writer, self.folder, self.every = trainer, writer, folder.resolve(), every
        self._sent: int | None = None
        self._name = broadcast_object_list([f"xtoken-{uuid4().hex[:8]}"])[0]

    def send(self, step: int) -> None:
        """Sends them if it is time; every process must make the call.

        Raises ValueError if the server does not take weights, saying how it is to be started.
        """
        if self._sent is not None and step >= self._sent and step % self.every:
            return
        self._sent = step
        accelerator = self.trainer.accelerator
        model = accelerator.unwrap_model(self.trainer.model_wrapped, keep_torch_compile=False)
        state = accelerator.get_state_dict(self.trainer.model_wrapped)
        is_adapted, name = hasattr(model, "peft_config"), f"{self._name}-{step}"
        if self.trainer.args.should_save:
            model.save_pretrained(self.folder, state_dict=state)
            if is_adapted:
                self._load_adapter(name)
            else:
                self._load_weights()
        if is_adapted:
            self.writer.model = name
        accelerator.wait_for_everyone()

    def _load_weights(self) -> None:
        how = "start it with VLLM_SERVER_DEV_MODE=1, on a file system that both see"
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}, how)
        answer = self._call("/reset_prefix_cache", {}, how)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ValueError(f"generation_url: {self.writer.served.client.url} cannot drop what it has cached")

    def _load_adapter(self, name: str) -> None:
        how = "start it with --enable-lora, --max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self.folder)}, how)
        if self.writer.model != self.writer.served.model:
            self._call("/v1/unload_lora_adapter", {"lora_name": self.writer.model}, how)

    def _call(self, path: str, content: dict[str, Any], how: str) -> Any:
        try:
            return self.writer.served.client.call(path, content, is_json=False)
        except RefusedError as error:
            raise ValueError(f"generation_url: it takes no weights ({error}); {how}") from error
