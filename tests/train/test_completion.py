"""Completions as examples: the student's tokens as they were drawn, and what each teacher reads of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from chats import pieces_of, trained_text
from hypothesis import example as also
from hypothesis import given, settings
from hypothesis import strategies as st

from xtoken.train import ExampleEncoder
from xtoken.train.completion import Completion, of_sampled, of_text, read_prompt
from xtoken.train.example import prompt_of

CHAT = {
    "messages": [
        {"role": "user", "content": "How many books?"},
        {"role": "assistant", "content": "In 1914, 126"},
        {"role": "user", "content": "And readers?"},
        {"role": "assistant", "content": "not this"},
    ]
}
TEXT = {"prompt": "In 1914, 126 ", "completion": "not this"}
OTHERS = ("qwen3", "gemma3", "mistral")


@pytest.fixture(scope="module")
def encoder(small_chat_tok) -> ExampleEncoder:
    """A student with the template of Llama 3, teachers with others."""
    return ExampleEncoder(small_chat_tok("llama3"), [small_chat_tok(name) for name in OTHERS])


def byte_ids(encoder: ExampleEncoder, *parts: bytes | str) -> list[int]:
    """Bytes a token each, as the tokenizer would never write them; parts that are strings are tokens."""
    tokens = encoder.student.tokens
    found = []
    for part in parts:
        found += [tokens.index(part.encode())] if isinstance(part, str) else [tokens.index(bytes([b])) for b in part]
    return found


def sampled(encoder: ExampleEncoder, row: Any, ids: list[int], ended: bool) -> dict[str, Any]:
    prompt = read_prompt(prompt_of(row) or {}, encoder.student)
    (example,) = of_sampled(encoder, [Completion(prompt, ids, ended)])
    assert example["student_ids"].tolist() == [*prompt.ids, *ids]
    assert example["labels"].tolist() == [-100] * len(prompt.ids) + ids
    assert (example["ce_labels"] == -100).all()
    for entry in example["teachers"]:
        assert (entry["spans"][:, 0] >= len(prompt.ids)).all()
        assert (entry["spans"][1:, 0::2] >= entry["spans"][:-1, 1::2]).all()
    return example


def chunks(encoder: ExampleEncoder, example: dict[str, Any], name: str) -> list[bytes]:
    """What the chunks of a teacher spell, on both sides; its end as END."""
    k = OTHERS.index(name)
    side = encoder.teachers[k]
    assert side is not None
    found = []
    for ours, theirs in pieces_of(example, encoder.student.vocabulary, side.vocabulary, k):
        is_end = ours == b"<|eot_id|>"
        assert theirs in ([b"<|im_end|>", b"<end_of_turn>", b"</s>", b"<eos>"] if is_end else [ours])
        found.append(b"END" if is_end else ours)
    return found


def read(encoder: ExampleEncoder, example: dict[str, Any], name: str) -> bytes:
    return b"".join(tokens_of(encoder, example, name))


def tokens_of(encoder: ExampleEncoder, example: dict[str, Any], name: str) -> list[bytes]:
    side = encoder.teachers[OTHERS.index(name)]
    assert side is not None
    return [side.tokens[i] for i in example["teachers"][OTHERS.index(name)]["ids"]]


@pytest.mark.parametrize("row", [CHAT, TEXT], ids=["chat", "text"])
@pytest.mark.parametrize("name", OTHERS)
def test_random_tokens(encoder, row, name):
    """Whatever was drawn: chunks spell the same on both sides, and all of a text that both can read, but for what the
    teacher has in one token with the end of the prompt."""
    is_text = (~encoder.student.is_special).nonzero()[0].tolist()

    @settings(max_examples=30, deadline=None)
    @also(ids=[291], ended=False)  # "an", which the teacher has with the space before it
    @given(
        ids=st.lists(st.one_of(st.sampled_from(is_text), st.integers(0, len(encoder.student.tokens) - 1)), max_size=12),
        ended=st.booleans(),
    )
    def check(ids: list[int], ended: bool) -> None:
        ids = [*ids, *byte_ids(encoder, "<|eot_id|>")] if ended else ids
        example = sampled(encoder, row, ids, ended)
        found = chunks(encoder, example, name)
        raw = encoder.student.vocabulary.decode(ids[: len(ids) - ended])
        content = b"".join(one for one in found if one != b"END")
        assert content in raw or encoder.student.is_special[ids[: len(ids) - ended]].any() or not _is_text(raw)
        special = [encoder.student.tokens[i] for i in ids if encoder.student.is_special[i]]
        if _is_text(raw) and raw == raw.decode().strip().encode() and len(special) == ended and b"<" not in raw:
            begins_inside = _begins_inside(tokens_of(encoder, example, name), raw)
            assert content == raw or (raw.endswith(content) and (row is TEXT or begins_inside))

    check()


def _begins_inside(tokens: list[bytes], text: bytes) -> bool:
    """Whether the last such text in the tokens begins inside of one of them."""
    return b"".join(tokens).rindex(text) not in itertools.accumulate(map(len, tokens), initial=0)


def _is_text(raw: bytes) -> bool:
    return raw.decode("utf-8", "ignore").encode() == raw


def test_a_character_that_is_cut(encoder):
    """What is there of it is in no chunk, and no teacher reads it."""
    example = sampled(encoder, CHAT, byte_ids(encoder, b"caf\xc3"), False)
    for name in OTHERS:
        assert b"".join(chunks(encoder, example, name)) == b"caf"
        assert b"\xc3" not in read(encoder, example, name).replace("é".encode(), b"")
    whole = sampled(encoder, CHAT, byte_ids(encoder, "café".encode(), "<|eot_id|>"), True)
    assert b"".join(chunks(encoder, whole, "mistral")) == "caféEND".encode()
    broken = sampled(encoder, CHAT, byte_ids(encoder, b"caf\xc3", "<|eot_id|>"), True)
    assert b"".join(chunks(encoder, broken, "mistral")) == b"caf"  # its end follows something else
    inner = sampled(encoder, CHAT, byte_ids(encoder, b"caf\xc3 or not"), False)
    assert b"".join(chunks(encoder, inner, "gemma3")) == b"caf or not"
    assert "caf\ufffd or not".encode() in read(encoder, inner, "gemma3")


@pytest.mark.parametrize("name", OTHERS)
def test_ends(encoder, name):
    """An end is compared where it was drawn, for an empty completion too; not behind what the teacher does not read."""
    end = byte_ids(encoder, "<|eot_id|>")
    assert chunks(encoder, sampled(encoder, CHAT, end, True), name) == [b"END"]
    assert chunks(encoder, sampled(encoder, CHAT, [*byte_ids(encoder, b"no"), *end], True), name)[-1] == b"END"
    assert b"END" not in chunks(encoder, sampled(encoder, CHAT, byte_ids(encoder, b"no"), False), name)
    spaced = chunks(encoder, sampled(encoder, CHAT, [*byte_ids(encoder, b"no\n\n"), *end], True), name)
    blank = chunks(encoder, sampled(encoder, CHAT, [*byte_ids(encoder, b"\n"), *end], True), name)
    special = chunks(
        encoder, sampled(encoder, CHAT, [*byte_ids(encoder, b"no", "<|begin_of_text|>"), *end], True), name
    )
    assert b"".join(spaced) == (b"no" if name == "gemma3" else b"noEND")  # whose template trims
    assert blank == ([] if name != "mistral" else blank)
    assert b"".join(special) == b"no"
    assert chunks(encoder, sampled(encoder, CHAT, [], False), name) == []


def test_special_tokens_in_the_middle(encoder):
    """They are labels, and stand in no chunk; no chunk reaches over them."""
    ids = byte_ids(encoder, b"12", "<|start_header_id|>", b"34", "<|eot_id|>")
    example = sampled(encoder, CHAT, ids, True)
    for name in OTHERS:
        assert b"1234" in read(encoder, example, name)
        found = chunks(encoder, example, name)
        assert b"".join(found) == b"1234END"
        assert not any(b"23" in one for one in found)


def test_reasoning_and_calls_are_text(encoder, small_chat_tok):
    """A template that writes a reasoning anew still has it; a call in tags is what was written."""
    text = b"<think>\nTwo and 2.\n</think>\n\nSo 4."
    example = sampled(encoder, CHAT, byte_ids(encoder, text, "<|eot_id|>"), True)
    assert text in read(encoder, example, "qwen3")
    assert b"".join(chunks(encoder, example, "qwen3")).replace(b"\n", b"") == text.replace(b"\n", b"") + b"END"
    assert b"".join(chunks(encoder, example, "gemma3")).replace(b"\n", b"") == text.replace(b"\n", b"") + b"END"
    call = b'<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    example = sampled(encoder, CHAT, byte_ids(encoder, call, "<|eot_id|>"), True)
    for name in OTHERS:
        assert b"".join(chunks(encoder, example, name)) == call + b"END"


def test_a_reasoning_that_the_prompt_has_opened(small_chat_tok):
    """Other templates read the tag as part of the completion."""
    opened = small_chat_tok("llama3")
    template = opened.chat_template
    opened.chat_template = template.replace(
        '"<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}',
        '"<|start_header_id|>assistant<|end_header_id|>\\n\\n<think>\\n" }}{% endif %}',
    )
    try:
        encoder = ExampleEncoder(opened, [small_chat_tok(name) for name in OTHERS])
        example = sampled(encoder, CHAT, byte_ids(encoder, b"Two.\n</think>\n\n4", "<|eot_id|>"), True)
        assert opened.decode(example["student_ids"].tolist()).count("<think>") == 1
    finally:
        opened.chat_template = template
    for name in OTHERS:
        assert b"<think>\nTwo.\n</think>\n\n4" in read(encoder, example, name)
        assert b"".join(chunks(encoder, example, name)).replace(b"\n", b"") == b"Two.</think>4END"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"messages": CHAT["messages"][:1]}, CHAT["messages"][:1]),
        ({"messages": CHAT["messages"][:2]}, CHAT["messages"][:1]),
        ({"prompt": CHAT["messages"][:3], "completion": CHAT["messages"][3:]}, CHAT["messages"][:3]),
        ({"prompt": CHAT["messages"][:3]}, CHAT["messages"][:3]),
        ({"prompt": "12 ", "completion": "3"}, "12"),
        ({"prompt": "12"}, "12"),
        ({"prompt": " ", "completion": "3"}, None),
        ({"messages": CHAT["messages"][1:2]}, None),
        ({"text": "12"}, None),
        ({"prompt": 1}, None),
    ],
)
def test_prompts(row, prompt):
    """The last turn is the completion if it is the assistant's."""
    found = prompt_of(row)
    assert (found or {}).get("messages", (found or {}).get("prompt")) == prompt


def test_prompts_of_examples(small_chat_tok):
    """Examples bring them along only if that is wanted; a prompt alone has no labels; a row that is cut keeps it."""
    toks = small_chat_tok("llama3"), [small_chat_tok("qwen3")]
    rows = [CHAT, {"prompt": CHAT["messages"][:1]}, {"prompt": "one book"}, {"text": "one book"}]
    assert all("prompt" not in one for row in ExampleEncoder(*toks).encode([CHAT, rows[-1]]) for one in row)
    found = ExampleEncoder(*toks, with_prompts=True).encode(rows)
    assert [one.get("prompt") for (one,) in found] == [prompt_of(row) for row in rows]
    assert [bool((one["labels"] != -100).any()) for (one,) in found] == [True, False, False, True]
    assert all(len(one["teachers"][0]["ids"]) for (one,) in found)
    ((short,),) = ExampleEncoder(*toks, with_prompts=True, max_length=4, train_on="assistant").encode([CHAT])
    assert (short["labels"] == -100).all()
    assert len(short["student_ids"]) == 4
    with pytest.raises(ValueError, match="row 0: expected messages, conversations, prompt and completion, or text"):
        ExampleEncoder(*toks).encode(rows[2:3])


def test_lengths(encoder, small_chat_tok):
    """A teacher that reads more tokens than it has positions for loses the end."""
    toks = small_chat_tok("llama3"), [small_chat_tok("qwen3")]
    whole = ExampleEncoder(*toks)
    ids = byte_ids(whole, b"one book or two books", "<|eot_id|>")
    full = sampled(whole, TEXT, ids, True)["teachers"][0]
    short = ExampleEncoder(*toks, max_teacher_length=len(full["ids"]) - 4)
    cut = sampled(short, TEXT, ids, True)["teachers"][0]
    assert np.array_equal(cut["ids"], full["ids"][:-4])
    assert 0 < len(cut["spans"]) < len(full["spans"])
    assert cut["spans"].max() <= max(len(cut["ids"]), len(ids) + 40)


def test_routes_and_systems(small_chat_tok):
    """A teacher that a row does not go to reads nothing of its completion; one that is told more reads that too."""
    student, teachers = small_chat_tok("llama3"), [small_chat_tok(name) for name in OTHERS[:2]]
    encoder = ExampleEncoder(
        student,
        teachers,
        teacher_systems=["Be brief.", None],
        teacher_column="to",
        teacher_names=OTHERS[:2],
        with_prompts=True,
    )
    prompt = read_prompt(prompt_of(CHAT) or {}, encoder.student)
    completion = Completion(prompt, byte_ids(encoder, b"12", "<|eot_id|>"), True, [True, False])
    (example,) = of_sampled(encoder, [completion])
    assert example["route"] == [True, False]
    assert b"Be brief." in read(encoder, example, "qwen3")
    assert chunks(encoder, example, "qwen3")[-1] == b"END"
    assert len(example["teachers"][1]["spans"]) == 0
    teacher = encoder.teachers[0]
    assert teacher is not None
    prompt = read_prompt(prompt_of(CHAT) or {}, teacher)
    assert b"Be brief." in b"".join(teacher.tokens[i] for i in prompt.ids)
    written = of_text(encoder, completion._replace(prompt=prompt, ids=prompt.ids[:4], ended=False), teacher)
    assert written is not None
    assert written["route"] == [True, False]


def test_what_a_teacher_writes_is_data(encoder, small_chat_tok):
    """Encoded like any other row; a text without an end does not teach to end."""
    for row in (CHAT, TEXT):
        teacher = encoder.teachers[0]
        prompt = read_prompt(prompt_of(row), teacher)
        ids = teacher.backend.encode("two books", add_special_tokens=False).ids
        end = [teacher.tokens.index(b"<|im_end|>" if row is CHAT else b"<|endoftext|>")]
        for ended in (True, False):
            example = of_text(encoder, Completion(prompt, [*ids, *(end if ended else [])], ended), teacher)
            text = trained_text(example, encoder.student.vocabulary)
            assert ("two books" + "<|eot_id|>" * ended) in text
            assert text.endswith("<|eot_id|>") == ended
            assert example is not None
            assert "ce_labels" not in example
    student, teachers = encoder.student.tokenizer, [one.tokenizer for one in encoder.teachers]
    strict = ExampleEncoder(student, teachers, train_on="completion", with_prompts=True)
    assert of_text(strict, Completion(read_prompt(prompt_of(TEXT), teacher), end, True), teacher) is None
