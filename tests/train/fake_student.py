"""A server in the test's process that writes completions as vLLM would, and takes weights and adapters as it does."""

from __future__ import annotations

import io
import json
from typing import Any

import torch
from fake_server import FakeServer, _Handler
from peft import PeftModel
from transformers import LlamaForCausalLM


class FakeStudent(FakeServer):
    """A `FakeServer` that writes too, the likeliest tokens.

    Attributes
    ----------
    takes_weights : bool
    changed : dict of str to Any
        Of an answer's first choice.
    received : list of str
        The paths of what came with weights.
    adapters : dict of str to model
    """

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        self.takes_weights = True
        self.changed: dict[str, Any] = {}
        self.received: list[str] = []
        self.adapters: dict[str, Any] = {}
        self._server.RequestHandlerClass = _Writing

    def __enter__(self) -> FakeStudent:
        super().__enter__()
        return self

    def cards(self) -> list[dict[str, Any]]:
        """Adapters are models too."""
        return [*super().cards(), *({"id": name, "owned_by": "vllm", "parent": self.name} for name in self.adapters)]

    def write(self, content: dict[str, Any]) -> dict[str, Any]:
        """The first choice of an answer."""
        ids: list[int] = list(content["prompt"])
        written: list[int] = []
        model = self.adapters.get(content["model"], self.model).eval()
        while len(written) < content["max_tokens"] and not (set(written[-1:]) & set(content["stop_token_ids"])):
            with self.lock, torch.no_grad():
                logits = model(input_ids=torch.tensor([ids + written])).logits[0, -1]
            for token, bias in (content["logit_bias"] or {}).items():
                logits[int(token)] += bias
            written.append(int(logits.argmax()))
        reason = "stop" if set(written[-1:]) & set(content["stop_token_ids"]) else "length"
        return {"index": 0, "token_ids": written, "finish_reason": reason, **self.changed}


class _Writing(_Handler):
    @property
    def fake(self) -> FakeStudent:
        found: FakeStudent = vars(self.server)["fake"]
        return found

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        content, fake = json.loads(body), self.fake
        if "return_token_ids" in content:
            assert content["model"] in (fake.name, *fake.adapters)
            return self.send({"choices": [fake.write(content)]})
        if self.path in ("/v1/completions", "/generate"):
            self.rfile = io.BytesIO(body)
            return super().do_POST()
        if not fake.takes_weights:
            return self.refuse("Not Found", 404)
        fake.received.append(self.path)
        if self.path == "/collective_rpc":
            assert content["method"] == "reload_weights"
            fake.model = LlamaForCausalLM.from_pretrained(content["kwargs"]["weights_path"])
            return self.send({"results": [None]})
        if self.path == "/reset_prefix_cache":
            return self.send({"success": True})
        if self.path == "/v1/load_lora_adapter":
            base = LlamaForCausalLM(fake.model.config)
            base.load_state_dict(fake.model.state_dict())
            fake.adapters[content["lora_name"]] = PeftModel.from_pretrained(base, content["lora_path"])
            return self.send(b"Success: LoRA adapter added successfully.")
        assert self.path == "/v1/unload_lora_adapter"
        del fake.adapters[content["lora_name"]]
        return self.send(b"Success: LoRA adapter removed successfully.")
