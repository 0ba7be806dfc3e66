"""A server in the test's process that scores token ids with a small model, as vLLM or SGLang would; and its faults."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class FakeServer(AbstractContextManager["FakeServer"]):
    """Serves `model` under `name`; the texts of its tokens are those of `tokenizer`, None: not known to it.

    Attributes
    ----------
    faults : deque of str
        What goes wrong with the next requests for log-probabilities, one each ("": nothing).
    gate : callable, optional
        Called in each such request, before it is answered.
    asked : list of lists of int
        The texts that were sent.
    most_in_flight : int
    keys : set of str
        Headers ``Authorization`` that were sent.
    moved : str
        Where it sends those who ask what it serves, if not empty.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str = "tiny", *, owner: str = "vllm", max_logprobs: int = 10**6,
        max_model_len: int | None = 256, others: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.name, self.owner = model.eval(), tokenizer, name, owner
        self.max_logprobs, self.max_model_len, self.others = max_logprobs, max_model_len, others
        self.faults: deque[str] = deque()
        self.gate: Callable[[], Any] | None = None
        self.asked: list[list[int]] = []
        self.most_in_flight = self.in_flight = 0
        self.keys: set[str] = set()
        self.moved = ""
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        vars(self._server)["fake"] = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def cards(self) -> list[dict[str, Any]]:
        """What it says of its models."""
        names = (self.name, *self.others)
        return [{"id": name, "owned_by": self.owner, "max_model_len": self.max_model_len} for name in names]

    def listed(self, ids: list[int], k: int) -> list[dict[int, float] | None]:
        """For each token what vLLM lists: the token itself, and the k likeliest in its place."""
        with self.lock, torch.inference_mode():
            logprobs = self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        top = logprobs.topk(min(k, logprobs.shape[-1]))
        found: list[dict[int, float] | None] = [None]
        for t, token in enumerate(ids[1:]):
            entry = {token: float(logprobs[t, token])}
            entry.update(zip(top.indices[t].tolist(), top.values[t].tolist(), strict=True))
            found.append(entry)
        return found


def _descending(pair: tuple[int, float]) -> tuple[bool, float]:
    return pair[1] == pair[1], -pair[1]  # what is not a number comes first


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Of one that does not wait for its answer, nothing is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def fake(self) -> FakeServer:
        found: FakeServer = vars(self.server)["fake"]
        return found

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, content: Any, status: int = 200, cut: int = 0, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        self.close_connection = self.close_connection or cut > 0

    def refuse(self, message: str, status: int = 400, **headers: str) -> None:
        self.send({"error": {"message": message, "type": "BadRequestError", "code": status}}, status, **headers)

    def do_GET(self) -> None:
        self.fake.keys.add(self.headers.get("Authorization", ""))
        if self.fake.moved:
            return self.send(b"", 302, Location=self.fake.moved + self.path)
        if self.path != "/v1/models":
            return self.refuse("Not Found", 404)
        return self.send({"object": "list", "data": self.fake.cards()})

    def do_POST(self) -> None:
        fake, content = self.fake, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != ("/generate" if fake.owner == "sglang" else "/v1/completions"):
            return self.refuse("Not Found", 404)
        with fake.lock:
            fault = fake.faults.popleft() if fake.faults else ""
            fake.keys.add(self.headers.get("Authorization", ""))
            fake.asked.append(content["input_ids" if fake.owner == "sglang" else "prompt"])
            fake.in_flight += 1
            fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
        try:
            if fake.gate is not None:
                fake.gate()
        finally:
            with fake.lock:
                fake.in_flight -= 1
        if fault and self.fail(fault):
            return None
        return self.from_sglang(content, fault) if fake.owner == "sglang" else self.from_vllm(content, fault)

    def fail(self, fault: str) -> bool:
        """Answers wrongly, if the fault is one of the connection or of HTTP."""
        if fault.isdigit():
            self.refuse("overloaded", int(fault), Retry_After="0")
        elif fault == "drop":
            self.close_connection = True
        elif fault == "garbage":
            self.send(b"<html>Bad gateway</html>")
        elif fault == "cut":
            self.send({"choices": []}, cut=4)
        elif fault == "redirect":
            self.send(b"", 307, Location="http://127.0.0.1:9/elsewhere")
        elif fault == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b" ")
                    time.sleep(0.02)
            except OSError:
                self.close_connection = True
        elif fault == "form":
            self.send({"choices": [{"text": "a"}], "meta_info": {"input_top_logprobs": None}})
        else:
            return False
        return True

    @staticmethod
    def spoil(listed: list[dict[int, float] | None], fault: str) -> list[dict[int, float] | None]:
        """Log-probabilities that cannot be right."""
        first = listed[1] if len(listed) > 1 else None
        if first is None:
            return listed
        realised, likeliest = next(iter(first)), max(first, key=first.__getitem__)
        if fault == "short":
            return listed[:-1]
        if fault in ("nan", "positive"):
            first[likeliest] = {"nan": float("nan"), "positive": 0.5}[fault]
        elif fault == "sum":
            first.update(dict.fromkeys(first, -0.5))
        elif fault == "fewer":
            listed[1] = {realised: first[realised]}
        elif fault == "other":
            listed[1] = {i: value for i, value in first.items() if i != realised}
        elif fault == "shifted":
            listed[1:] = [*listed[2:], first]
        elif fault == "beyond":
            first[10**6] = first.pop(min((i for i in first if i != realised), key=first.__getitem__))
        return listed

    def from_vllm(self, content: dict[str, Any], fault: str) -> None:
        fake, ids, k = self.fake, content["prompt"], content["prompt_logprobs"]
        size = fake.model.config.vocab_size
        if content["model"] not in (fake.name, *fake.others):
            return self.refuse(f"The model `{content['model']}` does not exist.", 404)
        if k > fake.max_logprobs:
            return self.refuse(
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {fake.max_logprobs}"
            )
        if max(ids) >= size:
            return self.refuse(f"Token id {max(ids)} is out of vocabulary")
        if fake.max_model_len is not None and len(ids) + content["max_tokens"] > fake.max_model_len:
            return self.refuse(f"This model's maximum context length is {fake.max_model_len} tokens.")
        entries: list[Any] = []
        for listed in self.spoil(fake.listed(ids, k), fault):
            entries.append(listed and {
                str(i): {"logprob": value, "rank": 1, "decoded_token": fake.tokenizer and fake.tokenizer.decode([i])}
                for i, value in listed.items()
            })  # fmt: skip
        return self.send({"choices": [{"index": 0, "text": "x", "prompt_logprobs": entries}]})

    def from_sglang(self, content: dict[str, Any], fault: str) -> None:
        fake, ids, k = self.fake, content["input_ids"], content["top_logprobs_num"]
        with_text = content["return_text_in_logprobs"]
        text = fake.tokenizer.decode if with_text else lambda ids: None
        listed = self.spoil(fake.listed(ids, k), fault if fault != "shifted" else "")
        realised = [[entry and next(iter(entry.values())), i, text([i])] for i, entry in zip(ids, listed, strict=False)]
        top = [
            entry and [[value, i, text([i])] for i, value in sorted(entry.items(), key=_descending)[:k]]
            for entry in (listed if fault != "shifted" else self.spoil(listed, fault))
        ]
        return self.send({"text": "x", "meta_info": {"input_token_logprobs": realised, "input_top_logprobs": top}})
