"""Teachers behind a server: its answers are the model's own, and whatever it does wrong is an error or tried again."""

from __future__ import annotations

import logging
import random
import socket
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from default_losses import DEFAULT
from fake_server import FakeServer
from small import (
    SMALL_TEXTS,
    assert_same,
    command,
    encode,
    history,
    make_model,
    make_teacher,
    make_trainer,
    run_one_step,
)  # fmt: skip

from xtoken import ServedModel, TeacherCache, TeacherCacheWriter, TopKLogits, cache_teacher, client
from xtoken.cli import main
from xtoken.losses import Needs
from xtoken.train import TeacherModel, XTokenCollator
from xtoken.train.serving import Asked

LOSS = DEFAULT[Needs.PROJECTION]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens; not for this machine


@pytest.fixture(scope="module")
def model(teacher_tok) -> Any:
    return make_model(len(teacher_tok), 1).eval()


@pytest.fixture(params=["vllm", "sglang"])
def server(request, model, teacher_tok):
    with FakeServer(model, teacher_tok, owner=request.param) as running:
        yield running


@pytest.fixture
def vllm(model, teacher_tok):
    with FakeServer(model, teacher_tok) as running:
        yield running


def rows_of(tokenizer: Any, count: int = 4) -> list[list[int]]:
    return [tokenizer(text).input_ids for text in SMALL_TEXTS[:count]]


def served(server: FakeServer, tokenizer: Any, **options: Any) -> ServedModel:
    return ServedModel(f"{server.url}/v1", tokenizer, **{"patience": 0.0, "logprobs": 5, **options})


def test_log_probabilities_are_the_models_own(server, model, teacher_tok):
    """The k largest and that of the token that comes, at each position but the last, of which nothing is known."""
    remote = served(server, teacher_tok)
    for ids, future in zip(rows := rows_of(teacher_tok), remote.ask(rows), strict=True):
        got = future.result()
        with torch.no_grad():
            want = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        assert got.ids.shape == (len(ids), 6)
        for t, token in enumerate(ids[1:]):
            listed = {i for i in got.ids[t].tolist() if i >= 0}
            assert listed == {*want[t].topk(5).indices.tolist(), token}
            places = got.ids[t] >= 0
            torch.testing.assert_close(got.logprobs[t, places], want[t, got.ids[t, places]], rtol=1e-5, atol=1e-6)
        assert got.ids[-1].tolist() == [-1] * 6
    assert remote.positions == 255
    assert remote.ask([[], [3]])[0].result().ids.shape == (0, 6)
    assert remote.ask([[3]])[0].result().ids.tolist() == [[-1] * 6]


def test_requests_in_flight(vllm, teacher_tok):
    """As many as are allowed, no more; equal texts once; results in order."""
    remote = served(vllm, teacher_tok, requests=3)
    vllm.gate, vllm.most_in_flight = threading.Barrier(3, timeout=60).wait, 0
    rows = [[5, k, 7] for k in range(9)]
    futures = remote.ask([*rows, rows[4]])
    assert futures[4] is futures[9]
    for row, future in zip(rows, futures, strict=False):
        assert row[1] in future.result().ids[0]
    assert (vllm.most_in_flight, sorted(vllm.asked[1:])) == (3, rows)
    vllm.gate = None
    assert [row[1] in got.ids[0] for row, got in zip(rows, remote.each(rows), strict=True)] == [True] * 9


def test_what_may_be_over_soon_is_tried_again(server, teacher_tok, caplog):
    """And the pauses leave the random numbers of training alone."""
    before = random.getstate()
    remote = served(server, teacher_tok, requests=1, patience=120.0)
    (want,) = remote.ask([[5, 6, 7]])
    want.result()
    server.faults.extend(["503", "drop", "429", "garbage", "cut", "500"])
    with caplog.at_level(logging.WARNING):
        (got,) = remote.ask([[5, 6, 7, 8]])
        assert torch.equal(got.result().ids[:2], want.result().ids[:2])
    counts = {"HTTP 503": 1, "HTTP 429": 1, "HTTP 500": 1, "connections lost": 1, "answers that are no JSON": 1}
    assert remote.client.faults == {**counts, "answers cut short": 1}
    assert random.getstate() == before
    (told,) = [one.message for one in caplog.records if one.name == "xtoken.client"]
    assert told.startswith(f"{server.url}: HTTP 503: overloaded; requests are sent again for up to 120 s each")


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (
            "503",
            ConnectionError,
            r"no usable answer \(tries: 1, over 0 s\); the last: HTTP 503: overloaded",
        ),
        ("drop", ConnectionError, "the last: connections lost"),
        ("garbage", ConnectionError, "the last: answers that are no JSON: <html>Bad gateway</html>"),
        ("cut", ConnectionError, "the last: answers cut short"),
        ("400", ValueError, "HTTP 400: overloaded"),
        ("401", ValueError, "HTTP 401: overloaded; another key must be given"),
        ("redirect", ValueError, "HTTP 307: it sends us to http://127.0.0.1:9/elsewhere; give that as url"),
        ("form", ValueError, "answers with no "),
        ("short", ValueError, "log-probabilities of 2 tokens for a text of 3"),
        ("nan", ValueError, "no logarithms of probabilities at position 1"),
        ("positive", ValueError, "no logarithms of probabilities at position 1"),
        ("sum", ValueError, "probabilities that sum to more than 1 at position 1"),
        ("fewer", ValueError, "1 log-probabilities at position 1, expected 5"),
    ],
)
def test_wrong_answers(server, teacher_tok, fault, error, message):
    remote = served(server, teacher_tok, key="s3cret")
    server.faults.append(fault)
    (future,) = remote.ask([[5, 6, 7]])
    with pytest.raises(error, match=message) as caught:
        future.result()
    assert server.url in str(caught.value)
    assert server.keys == {"Bearer s3cret"}
    assert "s3cret" not in str(caught.value)
    assert remote.ask([[5, 6, 8]])[0].result().ids.shape == (3, 6)  # the next one is answered


def test_a_key_goes_nowhere_else(vllm, model, teacher_tok):
    with FakeServer(model, teacher_tok) as other:
        vllm.moved = other.url
        with pytest.raises(ValueError, match=f"HTTP 302: it sends us to {other.url}/v1/models; give that as url"):
            served(vllm, teacher_tok, key="s3cret")
        assert (vllm.keys, other.keys) == ({"Bearer s3cret"}, set())


def test_other_tokens_than_were_sent(vllm, teacher_tok, caplog):
    remote = served(vllm, teacher_tok)
    vllm.faults.append("other")
    with pytest.raises(ValueError, match="no log-probability of token 6, which was sent, at position 1"):
        remote.ask([[5, 6, 7]])[0].result()
    vllm.faults.append("beyond")
    got = remote.ask([[5, 6, 7]])[0].result()
    assert (got.ids[0] < 0).sum() == 1 == got.logprobs[0].isinf().sum()
    assert (
        f"lists token 1000000, but the tokenizer has {len(teacher_tok)}; such tokens count to the rest" in caplog.text
    )


def test_an_answer_that_is_shifted(model, teacher_tok):
    """vLLM's lists the tokens that stand there, of 5 likeliest; SGLang's says their log-probability twice."""
    for owner, logprobs, message in (
        ("vllm", 5, "of token 6, which was sent, at position 1"),
        ("sglang", 10**6, "for token 6 at position 1, but -.* among the likeliest"),
    ):
        with FakeServer(model, teacher_tok, owner=owner) as server:
            remote = served(server, teacher_tok, logprobs=logprobs)
            server.faults.append("shifted")
            with pytest.raises(ValueError, match=f"answers with .*{message}"):
                remote.ask([[5, 6, 7, 8]])[0].result()


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 8.0])
def test_a_shifted_answer_does_not_fill_a_cache(sharpness, model, teacher_tok, tmp_path):
    """Whichever way. A right one does, whether its teacher knows the text, its own tokens alone or nothing."""
    ids = torch.tensor(rows_of(teacher_tok, 8)[0] * 4)[:120]
    noise = torch.randn(len(ids), len(teacher_tok), generator=torch.Generator().manual_seed(0))
    known = torch.rand(len(ids), generator=torch.Generator().manual_seed(1)) < 0.5

    def answer(of: torch.Tensor, with_own: bool = True) -> Any:
        """What vLLM would list of a teacher that knows, of half of its tokens, `of` them."""
        logits = noise + sharpness * known[:, None] * torch.nn.functional.one_hot(of, len(teacher_tok))
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(5)
        listed = [dict(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        for entry, row, own in zip(listed, logprobs, of.tolist(), strict=True):
            if with_own:
                entry.setdefault(own, float(row[own]))
        return [None, *listed[:-1]]

    following = ids.roll(-1)
    with TeacherCacheWriter(tmp_path, teacher_tok, 3) as writer:
        for shift, where in ((1, "t"), (-1, r"t \+ 2")):
            shifted = answer(following.roll(shift))
            if sharpness:
                with pytest.raises(ValueError, match=f"predict token t . 1, but all .* list token {where}: the answer"):
                    writer.add(ids, TopKLogits.from_vllm(shifted))
        for right in (answer(following), answer(following, False), answer(ids, False), answer(ids.roll(-2), False)):
            writer.add(ids, TopKLogits.from_vllm(right))


def test_a_server_without_a_tokenizer(model, teacher_tok, caplog):
    with FakeServer(model, None) as running:
        assert served(running, teacher_tok).ask([[5, 6]])[0].result().ids[0, 0] == 6
    assert "does not say what its tokens spell, so that its tokenizer could not be compared" in caplog.text


@pytest.mark.parametrize("fault", ["hold", "drip"])
def test_an_answer_that_does_not_come(vllm, teacher_tok, fault):
    remote = served(vllm, teacher_tok)
    remote.client.timeout = 0.2
    over = threading.Event()
    if fault == "hold":
        vllm.gate = over.wait
    else:
        vllm.faults.append(fault)
    try:
        with pytest.raises(ConnectionError, match="the last: time-outs"):
            remote.ask([[5, 6, 7]])[0].result()
    finally:
        over.set()


def test_what_is_queued_fails_too(vllm, teacher_tok):
    """When one request has failed for good, the rest are not sent one after the other."""
    remote = served(vllm, teacher_tok, requests=1)
    vllm.faults.append("400")
    over = threading.Event()
    vllm.gate = lambda: over.wait(60)
    futures = remote.ask([[5, 6, k] for k in range(9)])
    over.set()
    for future in futures:
        with pytest.raises(ValueError, match="HTTP 400"):
            future.result()
    assert len(vllm.asked) == 2


def test_what_fails_late_does_not_fail_what_is_asked_next(vllm, teacher_tok):
    """A request that is still in flight when another has failed for good, and fails then: who goes on behind the
    failure asks for its text anew, and for others."""
    remote = served(vllm, teacher_tok, requests=2)
    begun, over, answered = (threading.Event() for _ in range(3))
    vllm.gate = lambda: begun.set() or over.wait(60)
    vllm.faults.extend(["503", "503"])
    (late,) = remote.ask([[5, 6, 8]])
    assert begun.wait(60)
    vllm.gate = None
    (early,) = remote.ask([[5, 6, 7]])
    with pytest.raises(ConnectionError):
        early.result()
    vllm.gate = lambda: answered.wait(60)
    futures = remote.ask([[5, 6, 8], *([5, 6, k] for k in range(9, 19))])
    assert futures[0] is not late
    over.set()
    with pytest.raises(ConnectionError):
        late.result()
    answered.set()
    assert all(one.result().ids.shape == (3, 6) for one in futures)


def test_a_server_that_does_not_fit(model, student_tok, teacher_tok):
    """Seen before anything is trained."""
    cases: list[tuple[dict[str, Any], Any, dict[str, Any], str]] = [
        ({}, teacher_tok, {"model": "big"}, "model: http://.* does not serve 'big', but 'tiny'"),
        ({"others": ("b",)}, teacher_tok, {}, "expected the name of one of those that http://.* serves: 'tiny', 'b'"),
        ({"max_logprobs": 3}, teacher_tok, {}, r"gives at most 3 log-probabilities a token, asked for 5: start it with "
                                               "--max-logprobs 5, or ask for 3"),
        ({}, student_tok, {}, "tokenizer: expected the one of .*tiny.*, got one with tokens that it does not know"),
        ({}, teacher_tok, {"logprobs": 0}, "logprobs: expected at least 1, got 0"),
        ({}, teacher_tok, {"requests": 0}, "requests: expected at least 1, got 0"),
        ({}, teacher_tok, {"timeout": 0.0}, "timeout: expected seconds, at least 0.001, got 0.0"),
        ({}, teacher_tok, {"patience": -1.0}, "patience: expected seconds, at least 0, got -1.0"),
        ({}, teacher_tok, {"key": "a\nb"}, "key: expected printable ASCII characters"),
    ]  # fmt: skip
    for made, tokenizer, options, message in cases:
        with FakeServer(model, teacher_tok, **made) as running, pytest.raises(ValueError, match=message):
            served(running, tokenizer, **options)
    with FakeServer(make_model(len(student_tok), 1), student_tok) as running:
        with pytest.raises(
            ValueError, match=r"tokenizer: expected the one of .*, but \d+ of 63 tokens are others there"
        ):
            served(running, teacher_tok)
        with pytest.raises(ValueError, match=r"expected the API of OpenAI as vLLM and SGLang have it, but .*HTTP 404"):
            ServedModel(f"{running.url}/api", student_tok)
    for url, message in (
        ("ftp://127.0.0.1", "url: expected http://host:port"),
        ("127.0.0.1:80", "url: expected http://host:port"),
        ("http://127.0.0.1:1a", "url: expected http://host:port"),
        ("http://127.0.0.1/a b", "url: expected http://host:port"),
        ("http://me:pass@127.0.0.1", "url: expected no name, password or query in it, got them for 127.0.0.1"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            ServedModel(url, teacher_tok)
        assert "pass@" not in str(caught.value)


def test_a_server_that_is_away(teacher_tok, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            ConnectionError, match=rf"{url}/v1/models: no usable answer .*; the last: connections refused"
        ):
            ServedModel(url, teacher_tok, patience=0.05)


def test_texts_that_cannot_be_sent(vllm, teacher_tok):
    remote, size = served(vllm, teacher_tok), len(teacher_tok)
    with pytest.raises(
        ValueError, match=r"expected at most 255 tokens, one fewer than the max_model_len of .*, got 256"
    ):
        remote.ask([[5] * 256])
    with pytest.raises(ValueError, match=f"rows: expected token ids of 0 to {size - 1}, got {size}"):
        remote.ask([[5, size]])
    with pytest.raises(
        ValueError, match="attention_mask: expected tokens without a gap for a server, got one in row 0"
    ):
        Asked(remote, {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 0, 1]])})
    assert len(vllm.asked) == 1


def teachers_of(student_tok: Any, teacher_tok: Any, server: FakeServer | None, **options: Any) -> list[TeacherModel]:
    """A teacher of another tokenizer, local or served with all of its vocabulary."""
    local = make_teacher(student_tok, teacher_tok)
    if server is None:
        return [local]
    remote = served(server, teacher_tok, **{"logprobs": 10**6, **options})
    return [TeacherModel(local.objective, remote, name=local.name)]


def test_a_step_is_that_of_the_local_model(server, student_tok, teacher_tok, tmp_path):
    """With the whole vocabulary; each text is sent once, without padding, however the step is cut."""
    examples = encode(SMALL_TEXTS[:4], student_tok, teacher_tok)
    want = run_one_step(tmp_path, student_tok, teachers_of(student_tok, teacher_tok, None), examples)
    teachers = teachers_of(student_tok, teacher_tok, server)
    server.asked.clear()
    assert_same(run_one_step(tmp_path, student_tok, teachers, examples), want)
    assert sorted(server.asked) == sorted(example["teachers"][0]["ids"] for example in examples)


def test_a_served_model_is_enough(vllm, student_tok, teacher_tok, tmp_path):
    """Its name and its tokenizer are those of the teacher."""
    teacher = TeacherModel.build(served(vllm, teacher_tok), student_tok, cache=str(tmp_path))
    assert (teacher.name, teacher.tokenizer, teacher.limits.positions) == ("tiny", teacher_tok, 255)
    assert teacher.reasons
    with pytest.raises(
        ValueError, match="tiny: trust_top_k: expected at most 5, the log-probabilities that its server"
    ):
        TeacherModel.build(served(vllm, teacher_tok), student_tok, cache=str(tmp_path), trust_top_k=6)


def test_steps_are_asked_for_ahead(vllm, student_tok, teacher_tok, tmp_path):
    """All micro-batches of a step and of the next; and evaluation asks for its batches."""
    examples, held_out = (encode(SMALL_TEXTS[k : k + 8], student_tok, teacher_tok) for k in (0, 8))
    teachers = teachers_of(student_tok, teacher_tok, vllm, logprobs=5, requests=8)
    vllm.gate = threading.Barrier(8, timeout=60).wait
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 8}
    trainer = make_trainer(tmp_path, student_tok, teachers, examples, held_out, **cut)
    trainer.train()
    assert 0.0 < trainer.state.log_history[0]["time_teacher"] <= 1.0
    assert trainer.evaluate()["eval_kd"] > 0.0
    assert (vllm.most_in_flight, len(vllm.asked)) == (8, 1 + 2 * 8)


def test_an_error_does_not_wait_for_what_was_asked_before():
    never: Future[Any] = Future()
    failed: Future[Any] = Future()
    failed.set_exception(ValueError("wrong"))
    served: Any = SimpleNamespace(vocabulary=SimpleNamespace(roles={}), logprobs=2, ask=lambda rows: [never, failed])
    with pytest.raises(ValueError, match="wrong"):
        Asked(served, {"input_ids": torch.ones(2, 3, dtype=torch.int64)}).logits()


def test_packed_rows_are_sent_apart(vllm, student_tok, teacher_tok):
    examples = encode(SMALL_TEXTS[:5], student_tok, teacher_tok)
    collator = XTokenCollator(student_tok, [teacher_tok], packed=True, max_length=100)
    batch = collator(examples)
    entry = batch["teachers"][0]
    assert len(entry["input_ids"]) < len(examples)
    (teacher,) = teachers_of(student_tok, teacher_tok, vllm, logprobs=5)
    vllm.asked.clear()
    logits = teacher.logits(entry, batch)
    texts = [example["teachers"][0]["ids"] for example in examples]
    assert sorted(vllm.asked) == sorted(texts)
    found = {tuple(ids): got for ids, got in zip(texts, teacher.served.each(texts), strict=True)}
    for row, ids in enumerate(entry["input_ids"].tolist()):
        for text, got in found.items():
            for at in range(len(ids) - len(text) + 1):
                if tuple(ids[at : at + len(text)]) == text:
                    assert torch.equal(logits.ids[row, at : at + len(text)], got.ids)
                    found = {key: value for key, value in found.items() if key != text}
    assert not found


def test_rows_without_a_chunk_are_not_sent(vllm, student_tok, teacher_tok, tmp_path):
    """Such as those that go to another teacher, or have no label."""
    examples = encode(SMALL_TEXTS[:4], student_tok, teacher_tok)
    examples[1]["teachers"][0]["spans"] = []
    examples[2]["labels"] = [-100] * len(examples[2]["labels"])
    want = run_one_step(tmp_path, student_tok, teachers_of(student_tok, teacher_tok, None), examples)
    teachers = teachers_of(student_tok, teacher_tok, vllm)
    vllm.asked.clear()
    assert_same(run_one_step(tmp_path, student_tok, teachers, examples), want)
    assert sorted(vllm.asked) == sorted(examples[k]["teachers"][0]["ids"] for k in (0, 3))


def test_a_run_that_a_server_stops_goes_on(vllm, student_tok, teacher_tok, tmp_path, caplog):
    """The error names the server; from the checkpoint before it the run ends as if nothing had been."""
    examples = encode(SMALL_TEXTS[:8], student_tok, teacher_tok)
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def trainer(name: str) -> Any:
        teachers = teachers_of(student_tok, teacher_tok, vllm, logprobs=5)
        return make_trainer(tmp_path / name, student_tok, teachers, examples, **options)

    whole, stopped = trainer("whole"), trainer("stopped")
    whole.train()
    vllm.faults.extend([""] * 8 + ["503"] * 8)
    with pytest.raises(ConnectionError, match=rf"{vllm.url}/v1/completions: no usable answer .*HTTP 503"):
        stopped.train()
    assert stopped.state.global_step == 2
    vllm.faults.clear()
    resumed = trainer("stopped")
    vllm.faults.append("500")
    resumed.teachers[0].served.client.patience = 120.0
    resumed.train(resume_from_checkpoint=True)
    logs = [[one["kd"] for one in run.state.log_history if "kd" in one] for run in (whole, resumed)]
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert f"{vllm.url}: requests were sent again: 1 x HTTP 500" in caplog.text


def test_a_cache_from_a_server(vllm, model, teacher_tok, tmp_path):
    """That of the model itself; stopped by an error it goes on where it was."""
    rows = rows_of(teacher_tok, 12)
    want = cache_teacher(model, teacher_tok, rows, tmp_path / "local", top_k=5)
    remote = served(vllm, teacher_tok, requests=2)
    vllm.faults.extend([""] * 8 + ["503"] * 8)
    with pytest.raises(ConnectionError, match="HTTP 503"):
        cache_teacher(remote, teacher_tok, rows, tmp_path / "served", top_k=5, shard_tokens=100)
    kept = len(list((tmp_path / "served").glob("shard-*")))
    assert kept > 0
    vllm.faults.clear()
    vllm.asked.clear()
    got = cache_teacher(remote, teacher_tok, rows, tmp_path / "served", top_k=5, shard_tokens=100, resume=True)
    assert len(vllm.asked) < len(rows) == len(got)
    for k in range(len(rows)):
        assert torch.equal(got[k].logits.ids[:-1], want[k].logits.ids[:-1])
        torch.testing.assert_close(got[k].logits.logprobs[:-1], want[k].logits.logprobs[:-1], rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match=r"top_k: expected at most 5, .* got 6"):
        cache_teacher(remote, teacher_tok, rows, tmp_path / "more", top_k=6)
    with pytest.raises(ValueError, match=r"max_length: expected at most 255, .* got 256"):
        cache_teacher(remote, teacher_tok, rows, tmp_path / "longer", top_k=5, max_length=256)


@pytest.mark.slow
def test_commands(vllm, teacher_tok, folders, tmp_path, capsys, monkeypatch):
    """`xtoken train --teacher_url` and `xtoken cache-teacher --url` need the teacher's tokenizer alone, and its key."""
    named = tmp_path / "named"
    teacher_tok.save_pretrained(named)
    monkeypatch.setenv("XTOKEN_TEACHER_KEY", "s3cret")
    here = ["--teacher", "tiny", "--teacher_tokenizer", str(named), "--teacher_url", vllm.url, "--loss", LOSS]
    options = command(folders, tmp_path / "out", "--max_steps", "4", "--teacher_logprobs", "10", *here)
    del options[options.index(folders["teacher"]) - 1 : options.index(folders["teacher"]) + 1]
    assert main(options) == 0
    logged = [one["eval_kd"] for one in history(tmp_path / "out") if "eval_kd" in one]
    assert logged[-1] < logged[0]
    said = capsys.readouterr()
    assert "--max_teacher_length 255: longer rows have no position in a model" in said.out
    assert main([*options, "--teacher_cache", "some"]) == 1
    assert "--teacher_url: expected it, or --teacher_cache, for tiny, got both" in capsys.readouterr().err
    assert main([*options, "--teacher_url", "none"]) == 1
    assert "teacher_url: expected one, or one for each" in capsys.readouterr().err
    caching = ["cache-teacher", "--teacher", "tiny", "--tokenizer", str(named), "--url", vllm.url, "--logprobs", "10"]
    caching += ["--data", folders["test"], "--output", str(tmp_path / "logprobs")]
    vllm.max_logprobs = 3
    assert main(caching) == 1
    assert "start it with --max-logprobs 10, or ask for 3" in capsys.readouterr().err
    vllm.max_logprobs = 10
    assert main([*caching, "--resume"]) == 0
    documents = len(Path(folders["test"]).read_text().splitlines())
    assert f"{documents} documents, 10 log-probabilities a token" in capsys.readouterr().out
    assert len(TeacherCache(tmp_path / "logprobs", teacher_tok)) == documents
    assert vllm.keys == {"Bearer s3cret"}
