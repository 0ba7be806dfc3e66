"""A system message for one teacher alone: what it reads, what is aligned, and what is said where there is no place."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import joined, pieces_of
from default_losses import default_loss
from small import command, history, make_config, make_model, make_teacher

from xtoken import Vocabulary, cache_teacher
from xtoken.cli import main
from xtoken.losses import Needs
from xtoken.train import CachedExamples, EncodedDataset, ExampleEncoder, XTokenTrainer
from xtoken.train.cached import teacher_documents

SYSTEM = "The answer is 113; say so."
TURNS = [{"role": "user", "content": "How many in 1999?"}, {"role": "assistant", "content": "There were 113 readers."}]
PLAIN, TOLD = {"messages": TURNS}, {"messages": [{"role": "system", "content": "Be short."}, *TURNS]}
PARTS = {"messages": [{"role": "system", "content": [{"type": "text", "text": "Be short."}]}, *TURNS]}


def read(tok: Any, ids: Any) -> str:
    vocabulary = Vocabulary.from_tokenizer(tok)
    return b"".join(vocabulary[i] for i in ids.tolist()).decode()


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral", "llama3"])
def test_what_each_side_reads(small_chat_tok, family):
    """The teacher's text is its template's of the longer conversation; contents are aligned as without."""
    student_tok, teacher_tok = small_chat_tok("qwen3x"), small_chat_tok(family)
    with_it = ExampleEncoder(student_tok, [teacher_tok], teacher_systems=[SYSTEM], train_on="assistant")
    without = ExampleEncoder(student_tok, [teacher_tok], train_on="assistant")
    for row, content in ((PLAIN, SYSTEM), (TOLD, f"{SYSTEM}\n\nBe short.")):
        ((got,),), ((plain,),) = with_it.encode([row]), without.encode([row])
        expected = [{"role": "system", "content": content}, *TURNS]
        want = teacher_tok.apply_chat_template(expected, tokenize=False)
        assert read(teacher_tok, got["teachers"][0]["ids"]).startswith(want)
        assert got["student_ids"].tolist() == plain["student_ids"].tolist()
        assert got["labels"].tolist() == plain["labels"].tolist()
        sides = Vocabulary.from_tokenizer(student_tok), Vocabulary.from_tokenizer(teacher_tok)
        assert pieces_of(got, *sides) == pieces_of(plain, *sides)
        assert "113 readers" in joined(pieces_of(got, *sides))
    assert not with_it.report.counts


def test_all_turns_are_aligned_too(small_chat_tok):
    """With train_on="all" the conversation's own system message is, the teacher's is not."""
    student_tok, teacher_tok = small_chat_tok("qwen3x"), small_chat_tok("qwen3")
    sides = Vocabulary.from_tokenizer(student_tok), Vocabulary.from_tokenizer(teacher_tok)
    ((got,),) = ExampleEncoder(student_tok, [teacher_tok], teacher_systems=[SYSTEM]).encode([TOLD])
    text = joined(pieces_of(got, *sides), 1)
    assert "Be short." in text
    assert "say so" not in text
    empty = {"messages": [{"role": "system", "content": ""}, *TURNS]}
    ((got,),) = ExampleEncoder(student_tok, [teacher_tok], teacher_systems=[SYSTEM]).encode([empty])
    want = teacher_tok.apply_chat_template([{"role": "system", "content": SYSTEM}, *TURNS], tokenize=False)
    assert read(teacher_tok, got["teachers"][0]["ids"]).startswith(want)


def test_contents_in_parts(small_chat_tok):
    """A system message that is a list of parts gets one more; templates that take such lists write both."""
    student_tok = small_chat_tok("gemma3")
    teacher_tok = type(student_tok)(tokenizer_object=student_tok.backend_tokenizer, eos_token="<eos>")
    teacher_tok.chat_template = (
        "{% for m in messages %}<start_of_turn>{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<end_of_turn>{% endfor %}"
    )
    ((got,),) = ExampleEncoder(teacher_tok, [teacher_tok], teacher_systems=[SYSTEM]).encode([PARTS])
    assert f"system: {SYSTEM}\n\nBe short.<end_of_turn>" in read(teacher_tok, got["teachers"][0]["ids"])


def test_templates_without_a_place_for_it(small_chat_tok):
    student_tok, teacher_tok = small_chat_tok("qwen3x"), small_chat_tok("qwen3")
    silent = type(teacher_tok)(tokenizer_object=teacher_tok.backend_tokenizer, eos_token="<|im_end|>")
    silent.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    encoder = ExampleEncoder(student_tok, [silent], teacher_systems=[SYSTEM])
    with pytest.raises(ValueError, match="row 0: teacher 0: its chat template leaves the system message out"):
        encoder.encode([PLAIN])
    silent.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    encoder = ExampleEncoder(student_tok, [silent], teacher_systems=[SYSTEM])
    with pytest.raises(ValueError, match="row 0: teacher 0: its chat template refuses the messages: no system"):
        encoder.encode([PLAIN])
    with pytest.raises(ValueError, match="teacher_systems: expected one for each of 1 teachers, got 2"):
        ExampleEncoder(student_tok, [silent], teacher_systems=[SYSTEM, None])


def test_rows_that_are_no_chats(small_chat_tok, caplog):
    student_tok, teacher_tok = small_chat_tok("qwen3x"), small_chat_tok("qwen3")
    encoder = ExampleEncoder(student_tok, [teacher_tok], teacher_systems=[SYSTEM])
    data = EncodedDataset([PLAIN, {"text": "In 1999."}, {"text": "In 2001."}], encoder)
    assert len(data) == 3
    assert sum("row 1: no chat, so teacher 0 is not told its system message" in one for one in caplog.messages) == 1
    assert "2 rows that are no chats, which teacher 0 reads without its system message" in caplog.text
    with pytest.raises(ValueError, match="rows: all 1 are rows that are no chats, which teacher 0 reads without"):
        EncodedDataset([{"text": "In 1999."}], encoder)


def test_a_twin_with_a_system_message(tmp_path, small_chat_tok):
    """It has the student's tokenizer, but reads ids of its own, compared at the same tokens; from a cache too."""
    tok = small_chat_tok("qwen3")
    teacher = make_teacher(tok, None, name="told")
    teacher.system = SYSTEM
    trainer = XTokenTrainer(
        make_model(len(tok), 0), make_config(tmp_path), [teacher], None, None, [PLAIN, TOLD], tok
    )  # fmt: skip
    got = trainer.evaluate()
    total, count = torch.zeros(()), 0
    for row, content in ((PLAIN, SYSTEM), (TOLD, f"{SYSTEM}\n\nBe short.")):
        theirs = tok.apply_chat_template([{"role": "system", "content": content}, *TURNS], tokenize=False)
        sides = [tok(text, add_special_tokens=False, return_tensors="pt").input_ids
                 for text in (tok.apply_chat_template(row["messages"], tokenize=False), theirs)]  # fmt: skip
        ((example,),) = ExampleEncoder(tok, [tok], teacher_systems=[SYSTEM]).encode([row])
        assert [side[0].tolist() for side in sides] == [
            example["student_ids"].tolist(), example["teachers"][0]["ids"].tolist()
        ]  # fmt: skip
        with torch.no_grad():
            rows = [model(ids).logits[0] for model, ids in zip((trainer.model, teacher.model), sides, strict=True)]
        for t in range(1, len(sides[0][0])):  # the same tokens behind, seen from the end, but for the system message
            if example["labels"][t] == -100:
                continue
            back = len(sides[0][0]) - t
            at = len(sides[1][0]) - back
            assert sides[0][0][t] == sides[1][0][at]
            total = total + default_loss(Needs.SAME_TOKENIZER)(rows[0][t - 1][None], rows[1][at - 1][None], top_k=None)
            count += 1
    assert got["eval_chunks"] == count > 10
    assert got["eval_kd"] == pytest.approx(float(total) / count, rel=1e-4)

    cache = cache_teacher(
        teacher.model, tok, teacher_documents(tok, [PLAIN, TOLD], system=SYSTEM), tmp_path / "cache", top_k=10**6
    )
    encoder = ExampleEncoder(tok, [tok], teacher_systems=[SYSTEM], name_documents=True)
    trainer.eval_dataset = CachedExamples(EncodedDataset([PLAIN, TOLD], encoder), [cache])
    assert trainer.evaluate()["eval_kd"] == pytest.approx(got["eval_kd"], rel=2e-3)
    other = CachedExamples(EncodedDataset([PLAIN], ExampleEncoder(tok, [tok], name_documents=True)), [cache])
    with pytest.raises(ValueError, match="example 0: not in the teacher cache"):
        other[0]


TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


def test_commands(folders, tmp_path, capsys):
    """Two teachers of different use, and a cache of what one is told; options that fit nothing are refused."""
    data = tmp_path / "chats.jsonl"
    rows = [{**PLAIN, "goes_to": "teacher"}, {**TOLD, "goes_to": ["self"]}, {**PLAIN, "goes_to": ["self", "teacher"]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {**folders, "train": str(data), "test": str(data)}
    shared = ["--chat_template", TEMPLATE, "--teacher_column", "goes_to"]
    caching = [
        "cache-teacher",
        "--teacher",
        folders["teacher"],
        "--chat-template",
        TEMPLATE,
        "--teacher-system",
        SYSTEM,
    ]
    folder = str(tmp_path / "cache")
    assert main([*caching, "--data", str(data), "--output", folder, "--logprobs", "60"]) == 0
    uses = [
        "--teacher", "self", "--teacher_average", "0.5", "--trust_top_k", "60", "0", "--teacher_system", SYSTEM, "none",
        "--teacher_mode", "entropy", "--teacher_cache", folder, "none", "--max_steps", "3", *shared,
    ]  # fmt: skip
    assert main(command(given, tmp_path / "out", *uses)) == 0
    log = history(tmp_path / "out")
    first, last = ([one for one in log if "eval_ce" in one][k] for k in (0, -1))
    assert first["eval_kd/self"] == pytest.approx(0.0, abs=1e-6)
    assert last["eval_kd/self"] > 1e-6
    assert 0 < first["eval_distrusted/teacher"] < 1
    assert first["eval_chunks/teacher"] > 10
    assert first["eval_certainty/teacher"] != 1.0
    for wrong, message in (
        (["--teacher_average", "0.5"], "teacher_average: expected a teacher 'self' with it, got none"),
        (["--teacher", "self", "--teacher_quantization", "int8"], "teacher_quantization: expected none for 'self'"),
        (["--trust_top_k", "1", "2"], "trust_top_k: expected one, or one for each of the 1 teachers, got 2"),
        (
            ["--teacher", "self", "--teacher_cache", folder],
            "--teacher self: expected neither --teacher_url nor --teach",
        ),
        (["--teacher_system", "none"], "not in the teacher cache"),
    ):
        more = ["--teacher_cache", folder] if wrong[0] == "--teacher_system" else []
        assert main(command(given, tmp_path / "no", *wrong, *more, "--max_steps", "1", *shared[:2])) == 1
        assert message in capsys.readouterr().err
    assert Path(folder).exists()


def test_a_cache_of_rows_that_are_no_chats(folders, small_chat_tok, tmp_path, capsys):
    """Refused as by training; the output can be used for the command without it. One chat will do."""
    caching = ["cache-teacher", "--teacher", folders["teacher"], "--data", folders["test"], "--logprobs", "4"]
    caching += ["--output", str(tmp_path / "cache")]
    assert main([*caching, "--teacher-system", SYSTEM]) == 1
    assert "are rows that are no chats, which teacher 0 reads without its system message" in capsys.readouterr().err
    assert main(caching) == 0
    tok, text = small_chat_tok("qwen3"), {"text": "In 1999."}
    assert len(list(teacher_documents(tok, [*[text] * 9, PLAIN], system=SYSTEM))) == 10
    read = teacher_documents(tok, itertools.repeat(text), system=SYSTEM)
    with pytest.raises(ValueError, match=r"rows: all .* are rows that are no chats"):
        list(itertools.islice(read, 10_000))
