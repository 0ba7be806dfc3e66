"""A real vLLM server on the CPU: its answers are the model's own, and a student learns from them.

Runs where `make vllm` has set up vLLM, in build/vllm, or where $XTOKEN_VLLM says what Python has it.
"""

from __future__ import annotations

import copy
import functools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import SMALL_TEXTS, command, history, make_config, make_model

from xtoken import ServedModel, Teacher, TeacherCache
from xtoken.cli import main
from xtoken.train import TeacherModel, XTokenTrainer

INSTALLED = Path(__file__).parents[2] / "build" / "vllm"
PYTHON = Path(os.environ.get("XTOKEN_VLLM") or INSTALLED / "bin" / "python")
MOST_SECONDS = 600.0
"""For a server to come up."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "XTOKEN_VLLM" not in os.environ and not (INSTALLED / "ready").exists(),
        reason="no vLLM; `make vllm` installs it",
    ),
]


@pytest.fixture(scope="module")
def tiny(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Folder, model and tokenizer: a random Llama, peaked, with heads of 64 (vLLM takes none of 16)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tok = tmp_path_factory.mktemp("vllm") / "tiny", tokenizer("smollm2")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(20)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder, model, tok


@pytest.fixture(scope="module")
def server(tiny: tuple[Path, Any, Any]) -> Iterator[str]:
    """The url of a vLLM server."""
    with running(tiny[0]) as url:
        yield url


@pytest.fixture(scope="module")
def server_of_adapters(tiny: tuple[Path, Any, Any]) -> Iterator[str]:
    """Another, since vLLM 0.32 with adapters ends when it is asked for log-probabilities of several texts at once."""
    with running(tiny[0], "--enable-lora", "--max-lora-rank", "8") as url:
        yield url


@contextmanager
def running(folder: Path, *more: str) -> Iterator[str]:
    """A server; what it has said comes with the failure if it does not come up, or ends."""
    log = folder.parent / f"server{len(more)}.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    environment.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    environment.update(VLLM_SERVER_DEV_MODE="1", VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")  # for weights of a student
    arguments = ["--model", str(folder), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    arguments += ["--max-model-len", "256", "--max-logprobs", "32", "--enforce-eager", "--api-key", "s3cret"]
    arguments += more
    with open(log, "wb") as said:
        process = subprocess.Popen(
            [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *arguments],
            stdout=said, stderr=subprocess.STDOUT, env=environment, cwd=folder.parent, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + MOST_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"vLLM did not come up:\n{log.read_text(errors='replace')[-8000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
        if process.poll() is not None:
            pytest.fail(f"vLLM has ended:\n{log.read_text(errors='replace')[-8000:]}")
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def test_log_probabilities_are_the_models_own(server, tiny):
    _, model, tok = tiny
    remote = ServedModel(server, tok, key="s3cret", logprobs=32)
    assert (remote.model, remote.positions) == (str(tiny[0]), 255)
    rows = [*(tok(text).input_ids for text in SMALL_TEXTS[:6]), [int(k) for k in torch.arange(1, 49152, 193)]]
    assert len(rows[-1]) == 255
    for ids, got in zip(rows, remote.each(rows), strict=True):
        with torch.no_grad():
            want = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for t, token in enumerate(ids[1:]):
            listed = [i for i in got.ids[t].tolist() if i >= 0]
            assert token in listed
            assert len(set(listed) & set(want[t].topk(32).indices.tolist())) >= 31  # of near ties
            torch.testing.assert_close(got.logprobs[t, : len(listed)], want[t, listed], rtol=1e-4, atol=1e-4)


def test_what_it_refuses(server, tiny, student_tok):
    """Its own words are understood."""
    tok = tiny[2]
    with pytest.raises(
        ValueError, match=r"gives at most 32 log-probabilities a token, asked for 33: start it with --max"
    ):
        ServedModel(server, tok, key="s3cret", logprobs=33)
    with pytest.raises(ValueError, match=r"HTTP 401: .*; no key was given"):
        ServedModel(server, tok)
    with pytest.raises(ValueError, match=r"model: .* does not serve 'other', but '.*tiny'"):
        ServedModel(server, tok, "other", key="s3cret")
    with pytest.raises(ValueError, match=r"tokenizer: expected the one of .*, but \d+ of \d+ tokens are others there"):
        ServedModel(server, student_tok, key="s3cret")
    remote = ServedModel(server, tok, key="s3cret")
    remote.positions = None
    with pytest.raises(ValueError, match="does not take a text of 256 tokens: max_tokens must be at least 1"):
        remote.ask([[5] * 256])[0].result()
    with pytest.raises(
        ValueError, match=r"tokenizer: .* with tokens that it does not know: Token id 49152 is out of voc"
    ):
        remote._scored([5, 49152])


def test_commands(server, tiny, folders, tmp_path, monkeypatch, capsys):
    """Training from it, and from a cache that it fills, sees the same of the held-out texts."""
    monkeypatch.setenv("XTOKEN_TEACHER_KEY", "s3cret")
    here = {**folders, "teacher": str(tiny[0])}
    cache = str(tmp_path / "logprobs")
    caching = ["cache-teacher", "--teacher", here["teacher"], "--url", server, "--logprobs", "32", "--output", cache]
    assert main([*caching, "--data", here["train"], here["test"]]) == 0
    assert len(TeacherCache(cache, tiny[2])) == 24
    evaluated = []
    for name, more in (
        ("live", ["--teacher_url", server, "--teacher_logprobs", "32"]),
        ("cached", ["--teacher_cache", cache]),
    ):
        assert main(command(here, tmp_path / name, "--max_steps", "3", *more)) == 0
        evaluated.append([one["eval_kd"] for one in history(tmp_path / name) if "eval_kd" in one])
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-2)
    assert evaluated[0][-1] < evaluated[0][0]


@pytest.mark.parametrize("adapted", [True, False])
def test_it_writes_what_the_student_would(server_of_adapters, tiny, tmp_path, monkeypatch, adapted):
    """The likeliest tokens of each step's weights, or of each step's adapter; the last tests, since weights change."""
    monkeypatch.setenv("XTOKEN_GENERATION_KEY", "s3cret")
    _, model, tok = tiny
    rows = [{"prompt": " ".join(SMALL_TEXTS[k : k + 2])} for k in range(4)]
    drawn = []
    for url in (None, server_of_adapters):
        student = copy.deepcopy(model)
        if adapted:
            torch.manual_seed(0)
            config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
            student = get_peft_model(student, config)
        args = make_config(
            tmp_path / str(url is None), on_policy=1.0, max_new_tokens=8, generation_temperature=0.0, max_steps=3,
            generation_url=url, learning_rate=0.05,
        )  # fmt: skip
        teacher = TeacherModel(Teacher(), make_model(len(tok), 1), tok)
        trainer = XTokenTrainer(student, args, [teacher], None, rows, None, tok)
        found: list[Any] = []
        trainer._counts = functools.partial(_kept, found, trainer._counts)  # type: ignore[method-assign]
        trainer.train()
        drawn.append(found)
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][2]


def _kept(found: list[Any], counts: Any, batch: Any) -> Any:
    found.append(sorted(batch["host"].batch["input_ids"].tolist()))
    return counts(batch)
