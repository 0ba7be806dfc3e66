"""Completions by a server of the student: the student's own, as long as it is sent what has changed."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from fake_student import FakeStudent
from peft import LoraConfig, get_peft_model
from small import SMALL_TEXTS, make_config, make_model, make_teacher

from xtoken.train import XTokenTrainer
from xtoken.train.generate import Weights

pytestmark = pytest.mark.slow

ROWS = [{"prompt": text[:20]} for text in SMALL_TEXTS[:8]]


def student_of(tokenizer: Any, adapted: bool) -> tuple[Any, Any]:
    """A student with an output layer that is wider than its tokenizer, and its model without an adapter."""
    base = make_model(len(tokenizer) + 9, 0)
    if not adapted:
        return base, base
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(copy.deepcopy(base), config), base


def drawn(folder: Any, toks: Any, adapted: bool = False, url: str | None = None, **options: Any) -> list[Any]:
    """The student's ids in the batches of a run."""
    student, _ = student_of(toks[0], adapted)
    args = make_config(
        folder, on_policy=1.0, max_new_tokens=6, generation_temperature=0.0, max_steps=4, learning_rate=0.05,
        generation_url=url, **options,
    )  # fmt: skip
    trainer = XTokenTrainer(student, args, [make_teacher(*toks)], None, ROWS, None, toks[0])
    found: list[Any] = []
    counts = trainer._counts

    def keeping(batch: Any) -> Any:
        found.append(batch["host"].batch["input_ids"].tolist())
        return counts(batch)

    trainer._counts = keeping  # type: ignore[method-assign]
    trainer.train()
    return found


@pytest.mark.parametrize("adapted", [False, True])
def test_it_writes_what_the_student_would(tmp_path, student_tok, teacher_tok, adapted):
    """Each step with the weights of that step; with those of a step before, something else."""
    toks = student_tok, teacher_tok
    want = drawn(tmp_path / "own", toks, adapted)
    assert want[0] != want[2]
    with FakeStudent(student_of(student_tok, adapted)[1], student_tok) as server:
        assert drawn(tmp_path / "served", toks, adapted, f"{server.url}/v1") == want
        kinds = (
            ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"] if adapted else ["/collective_rpc", "/reset_prefix"]
        )
        assert [sum(one.startswith(kind) for one in server.received) for kind in kinds] == [4, 3 if adapted else 4]
        assert len(server.adapters) == adapted
        server.received.clear()
        late = drawn(tmp_path / "late", toks, adapted, f"{server.url}/v1", sync_every=3)
        assert sum(one.startswith(kinds[0]) for one in server.received) == 2
        assert late[0] == want[0]
        assert late[1:] != want[1:]


@pytest.mark.parametrize(("start", "sent"), [(0, [0, 3, 6]), (4, [4, 6]), (3, [3, 6])])
def test_a_run_that_goes_on_sends_at_the_same_steps(monkeypatch, tmp_path, start, sent):
    """And at once, since the server may have other weights."""
    done: list[int] = []
    step = start
    accelerator = SimpleNamespace(
        unwrap_model=lambda *_, **__: None, get_state_dict=lambda _: {}, wait_for_everyone=lambda: done.append(step)
    )
    args = SimpleNamespace(should_save=False)
    monkeypatch.setattr("xtoken.train.generate.broadcast_object_list", lambda names: names)
    weights = Weights(SimpleNamespace(accelerator=accelerator, model_wrapped=None, args=args), None, tmp_path, 3)
    for step in range(start, 8):
        weights.send(step)
    assert done == sent


def test_what_is_refused(tmp_path, student_tok, teacher_tok):
    toks = student_tok, teacher_tok
    with FakeStudent(make_model(len(student_tok), 0), student_tok) as server:
        for changed, message in (
            ({"token_ids": None}, "gives no token_ids"),
            ({"token_ids": [1], "finish_reason": "abort"}, "gives 1 tokens, which end by 'abort'"),
            ({"token_ids": [10**6]}, "gives token 1000000, but the tokenizer has 700"),
        ):
            server.changed = changed
            with pytest.raises(ValueError, match=f"generation_url: .*{message}"):
                drawn(tmp_path, toks, url=server.url)
        server.changed, server.takes_weights = {}, False
        with pytest.raises(ValueError, match=r"generation_url: it takes no weights .*404.*VLLM_SERVER_DEV_MODE=1"):
            drawn(tmp_path, toks, url=server.url)
        with pytest.raises(ValueError, match=r"generation_url: it takes no weights .*404.*--enable-lora"):
            drawn(tmp_path, toks, True, server.url)
        with pytest.raises(ValueError, match="tokenizer: expected the one of"):
            drawn(tmp_path, (teacher_tok, student_tok), url=server.url)
        args = make_config(tmp_path, on_policy=1.0, max_new_tokens=255, generation_url=server.url)
        given = make_model(len(student_tok), 0), args, [make_teacher(*toks)], None, ROWS, None, student_tok
        with pytest.raises(ValueError, match="max_new_tokens: expected fewer than the 255 tokens of an example, got"):
            XTokenTrainer(*given)
    sglang = FakeStudent(make_model(len(student_tok), 0), student_tok, owner="sglang")
    with sglang, pytest.raises(ValueError, match="generation_url: expected a server of vLLM, got SGLang"):
        drawn(tmp_path, toks, url=sglang.url)
    for options, message in (
        ({"on_policy": 0}, "generation_url: expected on_policy with it"),
        ({"on_policy": "teacher"}, "generation_url: expected None for on_policy='teacher'"),
        ({"sync_every": 0}, "sync_every: expected at least 1"),
        ({"sync_every": 2, "generation_url": None}, "sync_every: expected generation_url with it, got 2 without"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(tmp_path, **{"generation_url": "http://127.0.0.1:1", "on_policy": 1.0, **options})
