"""Training from a teacher cache: the same logits as the teacher itself, for every form of data."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from default_losses import DEFAULT
from small import SMALL_TEXTS, command, history, make_model
from transformers.utils.logging import enable_progress_bar

from xtoken import align_corpus, cache_teacher
from xtoken.cli import main
from xtoken.losses import Needs
from xtoken.losses.logits import TopKSource
from xtoken.teacher_cache import TeacherCache, cached_time
from xtoken.train import EncodedDataset, ExampleEncoder, XTokenCollator, load_examples
from xtoken.train.cached import CachedExamples, teacher_documents

CHAT = [
    {"role": "user", "content": "Add 17 and 25."},
    {"role": "assistant", "content": "17 plus 25 is 42."},
    {"role": "user", "content": "And 100 more?"},
    {"role": "assistant", "content": "142."},
]
ROWS = [
    {"text": " ".join(SMALL_TEXTS[:4])},
    {"prompt": "How many in 1999? ", "completion": "There were 113 readers."},
    {"messages": CHAT},
    {"text": SMALL_TEXTS[5]},
]


def dense(logits: Any, size: int) -> torch.Tensor:
    flat = TopKSource(logits.ids, logits.logprobs, logits.tail, size)
    return flat.rows(0, logits.ids.shape[0] * logits.ids.shape[1]).view(*logits.ids.shape[:2], size)


@pytest.mark.parametrize("packed", [False, True])
def test_cached_logits_are_the_teachers_own(small_chat_tok, tmp_path, packed):
    """Whole vocabulary cached: the student's loss sees what the model says, at each row that a chunk uses."""
    student_tok, teacher_tok = small_chat_tok("llama3"), small_chat_tok("qwen3")
    model = make_model(len(teacher_tok), 0).eval()
    cache = cache_teacher(model, teacher_tok, teacher_documents(teacher_tok, iter(ROWS)), tmp_path, top_k=10**6)
    encoder = ExampleEncoder(student_tok, [teacher_tok], name_documents=True)
    examples = CachedExamples(EncodedDataset(ROWS, encoder), [cache])
    assert len(examples) == len(cache) == len(ROWS)
    collator = XTokenCollator(student_tok, [teacher_tok], packed=packed, max_length=300)
    entry = collator([examples[k] for k in range(len(examples))])["teachers"][0]
    given = {name: entry[name] for name in ("input_ids", "attention_mask", "position_ids") if name in entry}
    with torch.no_grad():
        expected = model(**given, use_cache=False).logits.log_softmax(-1)
    got = dense(entry["logits"], len(teacher_tok))
    chunks = entry["alignment"]
    assert len(chunks.spans) > 60
    used = chunks.spans[chunks.predicted].tolist(), chunks.sample_index[chunks.predicted].tolist()
    for (_, _, start, end), sample in zip(*used, strict=True):
        for row in range(start - 1, end - 1):
            torch.testing.assert_close(got[sample, row].exp(), expected[sample, row].exp(), rtol=4e-3, atol=1e-6)


def test_parts_of_a_long_text_read_their_own_rows(small_chat_tok, tmp_path):
    """A text that the student takes in several parts has one document in the cache, with all that came before."""
    student_tok, teacher_tok = small_chat_tok("llama3"), small_chat_tok("qwen3")
    model = make_model(len(teacher_tok), 0).eval()
    cache = cache_teacher(model, teacher_tok, teacher_documents(teacher_tok, iter(ROWS[:1])), tmp_path, top_k=10**6)
    encoder = ExampleEncoder(student_tok, [teacher_tok], max_length=20, name_documents=True)
    examples = CachedExamples(EncodedDataset(ROWS[:1], encoder), [cache])
    assert len(cache) == 1
    assert len(examples) > 3
    whole = cache[0]
    with torch.no_grad():
        expected = model(input_ids=whole.token_ids[None]).logits[0].log_softmax(-1)
    for k in range(len(examples)):
        entry = examples[k]["teachers"][0]
        got = dense(type(entry["logits"])(entry["logits"].ids[None], entry["logits"].logprobs[None]), len(teacher_tok))[
            0
        ]
        assert len(got) == len(entry["ids"])
        for _, _, start, end in entry["spans"][entry["spans"][:, 2] > 0].tolist():
            token = entry["ids"][start]
            at = entry["first"] + start
            assert int(whole.token_ids[at]) == int(token)
            rows = slice(start - 1, end - 1)
            there = slice(at - 1, at - 1 + end - start)
            torch.testing.assert_close(got[rows].exp(), expected[there].exp(), rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize("same", [False, True])
def test_a_served_teacher_without_the_end_token(small_chat_tok, tmp_path, same):
    """Plain `input_ids` in the cache: training finds them, with all chunks, and the same log-probabilities."""
    student_tok, teacher_tok = small_chat_tok("llama3"), small_chat_tok("qwen3")
    student_tok = teacher_tok if same else student_tok
    model = make_model(len(teacher_tok), 0).eval()
    rows: list[dict[str, Any]] = [ROWS[0], ROWS[3]]
    plain = [teacher_tok(row["text"]).input_ids for row in rows]
    whole = list(teacher_documents(teacher_tok, rows))
    assert [ids[:-1] for ids in whole] == plain
    encoded = EncodedDataset(rows, ExampleEncoder(student_tok, [teacher_tok], name_documents=True))
    served, cached = (
        CachedExamples(encoded, [cache_teacher(model, teacher_tok, documents, tmp_path / name, top_k=4)])
        for name, documents in (("served", plain), ("cached", whole))
    )
    for k in range(len(rows)):
        got, expected = served[k]["teachers"][0], cached[k]["teachers"][0]
        assert len(got["logits"].ids) == len(expected["logits"].ids)
        assert torch.equal(got["logits"].logprobs[:-1], expected["logits"].logprobs[:-1])
        assert same or (got["spans"].tolist(), got["ids"].tolist()) == (
            expected["spans"].tolist(),
            expected["ids"].tolist(),
        )


def test_a_cache_that_was_cut(small_chat_tok, tmp_path):
    student_tok, teacher_tok = small_chat_tok("llama3"), small_chat_tok("qwen3")
    model = make_model(len(teacher_tok), 0).eval()
    documents = list(teacher_documents(teacher_tok, iter(ROWS)))
    cache = cache_teacher(model, teacher_tok, documents, tmp_path / "other", top_k=4, max_length=12)
    examples = CachedExamples(
        EncodedDataset(ROWS, ExampleEncoder(student_tok, [teacher_tok], name_documents=True)), [cache]
    )
    entry = examples[0]["teachers"][0]
    assert len(entry["ids"]) == len(entry["logits"].ids) == 12
    assert 0 < len(entry["spans"]) < 12
    assert entry["spans"][:, 3].max() <= 12
    twin = cache_teacher(
        make_model(len(student_tok), 0).eval(),
        student_tok,
        teacher_documents(student_tok, iter(ROWS)),
        tmp_path / "twin",
        top_k=4,
        max_length=12,
    )
    direct = EncodedDataset(ROWS, ExampleEncoder(student_tok, [student_tok], name_documents=True))
    with pytest.raises(ValueError, match=r"example 0: the teacher cache .* was cut at 12 tokens"):
        CachedExamples(direct, [twin])[0]


def test_another_text_is_refused(small_chat_tok, tmp_path):
    student_tok, teacher_tok = small_chat_tok("llama3"), small_chat_tok("qwen3")
    model = make_model(len(teacher_tok), 0).eval()
    cache = cache_teacher(model, teacher_tok, teacher_documents(teacher_tok, iter(ROWS[:2])), tmp_path, top_k=4)
    examples = EncodedDataset(ROWS, ExampleEncoder(student_tok, [teacher_tok], name_documents=True))
    with pytest.raises(
        ValueError,
        match=r"example 2: not in the teacher cache .*; (document 0 begins|none of the first 2 documents begins) with",
    ):
        CachedExamples(examples, [cache])[2]
    with pytest.raises(ValueError, match="caches: expected 1, one a teacher, got 2"):
        CachedExamples(examples, [cache, None])


def test_time_is_part_of_a_cache(small_chat_tok, tmp_path):
    student_tok, teacher_tok = (small_chat_tok(name) for name in ("llama3", "qwen3"))
    dated = type(teacher_tok)(tokenizer_object=teacher_tok.backend_tokenizer, eos_token="<|im_end|>")
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + teacher_tok.chat_template
    rows = [{"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "they read it"}]}]
    model, (now, later) = make_model(len(dated), 0).eval(), (datetime(2031, 2, day) for day in (3, 4))

    def write(now, **more):
        return cache_teacher(model, dated, teacher_documents(dated, rows, now=now), tmp_path, top_k=4, now=now, **more)

    cache = write(now)
    assert cache.now == TeacherCache(tmp_path).now == cached_time(tmp_path) == now
    for time, found in ((cache.now, True), (later, False)):
        encoder = ExampleEncoder(student_tok, [dated], name_documents=True, now=time)
        examples = CachedExamples(EncodedDataset(rows, encoder), [cache])
        if found:
            assert len(examples[0]["teachers"][0]["logits"].ids) == len(examples[0]["teachers"][0]["ids"])
        else:
            with pytest.raises(ValueError, match="not in the teacher cache"):
                examples[0]
    with pytest.raises(ValueError, match="was made with time='2031-02-03T00:00:00', now '2031-02-04T00:00:00'"):
        write(later, resume=True)
    assert cached_time(tmp_path / "none") is None


def test_commands(folders, tmp_path, capsys):
    """`xtoken cache-teacher`, then `xtoken train` without the teacher's weights: nearly the same evaluation. No bars
    are drawn, since this is no terminal."""
    folder = str(tmp_path / "cache")
    enable_progress_bar()
    caching = ["cache-teacher", "--teacher", folders["teacher"], "--data", folders["train"], folders["test"]]
    assert main([*caching, "--output", folder, "--logprobs", "100000", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out).items() >= {"output": folder, "documents": 24}.items()
    assert "%" not in said.err
    assert main([*caching, "--output", folder, "--logprobs", "100000"]) == 1
    assert "is not empty" in capsys.readouterr().err
    evaluations, loss = [], DEFAULT[Needs.PROJECTION]
    for name, more in (("live", []), ("cached", ["--teacher_cache", folder])):
        enable_progress_bar()
        assert main(command(folders, tmp_path / name, "--max_steps", "4", "--loss", loss, "--top_k", "0", *more)) == 0
        assert "%" not in capsys.readouterr().err
        evaluations.append([entry for entry in history(tmp_path / name) if "eval_kd" in entry])
    for live, cached in zip(*evaluations, strict=True):
        assert cached["eval_kd"] == pytest.approx(live["eval_kd"], rel=1e-2)
        assert cached["eval_ce"] == pytest.approx(live["eval_ce"], rel=1e-2)
    assert evaluations[1][-1]["eval_kd"] < evaluations[1][0]["eval_kd"]
    Path(folders["test"]).write_text(json.dumps({"text": "something else"}) + "\n")
    assert main(command(folders, tmp_path / "other", "--max_steps", "1", "--teacher_cache", folder)) == 1
    assert "not in the teacher cache" in capsys.readouterr().err


def test_an_aligned_corpus_finds_its_texts(small_chat_tok, tmp_path):
    """The same log-probabilities as the texts that it was made of, but those of the end, which it does not keep."""
    student_tok, teacher_tok = small_chat_tok("llama3"), small_chat_tok("qwen3")
    model = make_model(len(teacher_tok), 0).eval()
    texts = [{"text": text} for text in ("In 1995 readers paid 1,024.", "Numbers: 7 77 777", "one two three")]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in texts))
    align_corpus(student_tok, teacher_tok, source, tmp_path / "aligned", progress=False)
    cache = cache_teacher(model, teacher_tok, teacher_documents(teacher_tok, iter(texts)), tmp_path / "cache", top_k=9)

    def cached(path, **options):
        loaded = load_examples([str(path)], student_tok, [teacher_tok], name_documents=True, **options)
        return CachedExamples(loaded, [cache])

    whole, aligned = cached(source), cached(tmp_path / "aligned")
    for k in range(len(texts)):
        expected, found = whole[k]["teachers"][0], aligned[k]["teachers"][0]
        assert found["logits"].ids.tolist() == expected["logits"].ids[: len(found["ids"])].tolist()
        assert torch.equal(found["logits"].logprobs, expected["logits"].logprobs[: len(found["ids"])])
        assert len(expected["ids"]) == len(found["ids"]) + 1
    cut = cached(tmp_path / "aligned", max_length=8)[0]["teachers"][0]
    assert len(cut["logits"].ids) == len(cut["ids"]) < len(aligned[0]["teachers"][0]["ids"])


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_template_that_refuses_a_chat_is_the_teachers(small_chat_tok, system, caplog):
    teacher_tok = small_chat_tok("qwen3")
    chats = [
        {"messages": [{"role": "user", "content": "Why"}, {"role": "assistant", "content": content}]}
        for content in ("a", " ")
    ]
    template = teacher_tok.chat_template
    try:
        teacher_tok.chat_template = "{{ raise_exception('not this') }}"
        with pytest.raises(ValueError, match=r"row 0: teacher: its chat template refuses the messages: not this"):
            next(teacher_documents(teacher_tok, chats, system=system))
        teacher_tok.chat_template = "{% for m in messages %}{{ m.role }}</s>{% endfor %}"
        list(teacher_documents(teacher_tok, chats))
    finally:
        teacher_tok.chat_template = template
    assert "row 0, turn 0: no label, since for the teacher its chat template leaves the content out" in caplog.text
    assert "student" not in caplog.text
