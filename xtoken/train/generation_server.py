"""Completions from a vLLM server of the student, which is sent its weights, or its adapter, every so many steps."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from accelerate.utils import broadcast_object_list

from xtoken.client import RefusedError
from xtoken.served import ServedModel

from .generate import Sampling

KEY = "XTOKEN_GENERATION_KEY"
"""Environment variable with the key of the server."""


class ServerWriter:
    """Writes completions with a vLLM server: token ids go out and come back, nothing is decoded.

    Parameters
    ----------
    served : ServedModel
    sampling : Sampling
    ends : sequence of int
        Tokens after which nothing more is written.
    rows : int, optional
        Of the model's output layer, where the server knows no more of the tokenizer than that.

    Raises ValueError for a server of another kind.
    """

    def __init__(self, served: ServedModel, sampling: Sampling, ends: Sequence[int], rows: int | None = None) -> None:
        if served.is_sglang:
            raise ValueError(f"generation_url: expected a server of vLLM, got SGLang at {served.client.url}")
        self.served, self.sampling, self.ends = served, sampling, list(ends)
        self.model = served.model
        self.size = len(served.vocabulary)
        beyond = range(self.size, self.size if rows is None else rows)
        self._asked: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "stop_token_ids": self.ends, "return_token_ids": True,
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
    """Sends the student's weights to its server, through a folder that both see.

    An adapter of PEFT is loaded as such, so that the server must serve the model that it is for. It has another name
    each time, since the server keeps what it has computed with an adapter of the same name.

    Parameters
    ----------
    trainer : XTokenTrainer
    writer : ServerWriter
    folder : path
    every : int
        They are sent before anything is written, and at the steps that this divides.
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
