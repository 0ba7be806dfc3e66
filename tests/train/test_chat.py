"""Contents are found in what each model's own chat template writes; the rest never enters the loss."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from chats import joined, pieces_of, trained_text

from xtoken.train import EncodedDataset, ExampleEncoder
from xtoken.train.chat import ChatTemplate, take_apart

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1234 + 8765?"},
    {"role": "assistant", "content": "It is 9999, größer als 8765."},
    {"role": "user", "content": "And in Chinese?"},
    {"role": "assistant", "content": "是 9999。"},
]
CALL = [
    {"role": "user", "content": "Weather in Köln?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln am Rhein", "days": 3}}}
        ],
    },
    {"role": "tool", "content": '{"sky": "clear"}'},
    {"role": "assistant", "content": "Clear skies."},
]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city"}}]
REASONED = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>\nEarlier thoughts.\n</think>\n\nFour."},
    {"role": "user", "content": "3 + 3?"},
    {"role": "assistant", "content": "<think>\nThree and three.\n</think>\n\nSix."},
]


ENCODERS: dict[tuple[int, int, str], ExampleEncoder] = {}


def encode(student, teacher, row, train_on="assistant"):
    """The one example of a row, its chunks and the student's vocabulary."""
    key = (id(student), id(teacher), train_on)
    if key not in ENCODERS:  # of tokenizers that live as long as the session
        ENCODERS[key] = ExampleEncoder(student, [teacher], train_on=train_on)
    encoder = ENCODERS[key]
    (examples,) = encoder.encode([row])
    (example,) = examples
    vocabularies = encoder.student.vocabulary, encoder.teachers[0].vocabulary
    return example, pieces_of(example, *vocabularies), vocabularies[0]


CLOSE = {"llama3": "<|eot_id|>", "qwen3": "<|im_end|>", "smollm2": "<|im_end|>", "gemma3": "<end_of_turn>"}
PAIRS = [("llama3", "qwen3"), ("qwen3", "llama3"), ("smollm2", "qwen3")]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_contents_and_ends_of_turns_are_aligned(student, teacher, chat_tok):
    names = student, teacher
    student, teacher = chat_tok(student), chat_tok(teacher)
    example, chunks, vocabulary = encode(student, teacher, {"messages": TALK})
    close, their_close = CLOSE[names[0]], CLOSE[names[1]]
    answers = [message["content"] for message in TALK if message["role"] == "assistant"]
    assert trained_text(example, vocabulary) == close.join(answers) + close
    assert joined(chunks) == close.join(answers) + close
    assert joined(chunks, 1) == their_close.join(answers) + their_close
    assert all(a == b for a, b in chunks if a != close.encode())


def test_which_turns_are_trained_on(small_chat_tok):
    close = CLOSE["qwen3"]
    student, teacher = small_chat_tok("qwen3"), small_chat_tok("gemma3")

    def trained(train_on, row=None):
        example, chunks, vocabulary = encode(student, teacher, row or {"messages": TALK}, train_on)
        return trained_text(example, vocabulary), joined(chunks)

    contents = [message["content"] for message in TALK]
    assert trained("completion") == (contents[4] + close, contents[4] + close)
    assert trained("assistant")[0] == contents[2] + close + contents[4] + close
    labels, chunks = trained("all")
    assert labels == "".join(content + close for content in contents)
    # Gemma puts the system prompt into the question, so that no end of a turn stands behind it.
    assert chunks == contents[0] + "".join(content + close for content in contents[1:])
    halves = {"prompt": TALK[:2], "completion": TALK[2:]}
    assert trained("completion", halves)[0] == contents[2] + close + contents[4] + close
    assert trained("completion", {"prompt": TALK[:4], "completion": TALK[4:]})[0] == contents[4] + close


def test_a_message_says_that_it_is_not_trained_on(small_chat_tok):
    student, teacher = small_chat_tok("qwen3"), small_chat_tok("gemma3")

    def trained(flags, train_on="assistant"):
        messages = [{**message, **flags.get(k, {})} for k, message in enumerate(TALK)]
        example, _, vocabulary = encode(student, teacher, {"messages": messages}, train_on)
        return trained_text(example, vocabulary)

    close, contents = CLOSE["qwen3"], [message["content"] for message in TALK]
    for no, yes in (({"weight": 0}, {"weight": 1}), ({"train": False}, {"train": True}), ({"weight": 0.0}, {})):
        assert trained({2: no, 4: yes}) == contents[4] + close
        assert trained({2: yes, 4: no}) == contents[2] + close
        assert trained({1: yes, 2: {"weight": None}}) == contents[2] + close + contents[4] + close
        assert trained(dict.fromkeys((0, 1, 3), no), "all") == contents[2] + close + contents[4] + close
    with pytest.raises(ValueError, match=r"row 0: messages: expected 0 or 1, or false or true, as weight, got 0\.5"):
        trained({2: {"weight": 0.5}})


def test_end_tokens_of_different_roles_are_labels_but_no_chunk(small_chat_tok):
    student, teacher = (
        small_chat_tok("mistral"),
        small_chat_tok("gemma3"),
    )  # </s> only ends texts, <end_of_turn> only turns
    example, chunks, vocabulary = encode(student, teacher, {"messages": TALK[1:]})
    assert (example["labels"] == vocabulary.roles["eos"]).sum() == 2
    assert "</s>" not in joined(chunks)
    _, chunks, _ = encode(student, small_chat_tok("qwen3"), {"messages": TALK[1:]})  # <|im_end|> ends both
    assert [theirs for ours, theirs in chunks if ours == b"</s>"] == [b"<|im_end|>"] * 2
    example, _, vocabulary = encode(student, teacher, {"messages": TALK[1:]}, "all")
    assert (example["labels"] == vocabulary.roles["eos"]).sum() == 2  # nothing ends a question in this format


def test_reasoning_that_both_templates_write_is_aligned(chat_tok):
    student, teacher = chat_tok("qwen3"), chat_tok("llama3")
    example, chunks, vocabulary = encode(student, teacher, {"messages": REASONED})
    # Qwen drops the reasoning of earlier turns, Llama keeps it: nothing of it is in the loss.
    assert trained_text(example, vocabulary) == "Four.<|im_end|><think>Three and three.\n</think>Six.<|im_end|>"
    # Llama joins the bracket of a tag to the line end behind it, Qwen does not.
    assert joined(chunks) == "Four.<|im_end|>Three and three.\nSix.<|im_end|>"
    example, chunks, vocabulary = encode(teacher, student, {"messages": REASONED})
    assert joined(chunks) == "Four.<|eot_id|><think>\nThree and three.\n</think>\n\nSix.<|eot_id|>"
    assert trained_text(example, vocabulary) == "<think>\nEarlier thoughts.\n</think>\n\n" + joined(chunks)


def test_reasoning_in_a_field_of_its_own(chat_tok):
    student = chat_tok("qwen3")
    messages = [REASONED[2], {"role": "assistant", "reasoning_content": "Three and three.", "content": "Six."}]
    example, chunks, vocabulary = encode(student, chat_tok("llama3"), {"messages": messages})
    # The tokens that end with the template's line ends are the student's to write all the same.
    assert trained_text(example, vocabulary) == "<think>Three and three.\n</think>Six.<|im_end|>"
    assert joined(chunks) == "Six.<|im_end|>"  # this Llama does not write that field


def test_a_reasoning_block_that_the_template_adds_is_no_content(chat_tok):
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Four."}]
    example, chunks, vocabulary = encode(chat_tok("qwen3"), chat_tok("llama3"), {"messages": messages})
    assert "<think>\n\n</think>" in chat_tok("qwen3").decode(example["student_ids"])
    assert trained_text(example, vocabulary) == joined(chunks) == "Four.<|im_end|>"


def test_tool_calls_align_where_both_templates_write_the_same(chat_tok):
    row = {"messages": CALL, "tools": TOOLS}
    arguments = 'get_weather {"city": "Köln am Rhein", "days": 3'
    example, chunks, vocabulary = encode(chat_tok("qwen3"), chat_tok("llama3"), row)
    # Qwen joins both closing braces to a line end, so that no token of Llama is the same text.
    assert trained_text(example, vocabulary) == arguments + "}}\n<|im_end|>Clear skies.<|im_end|>"
    assert joined(chunks) == arguments + "<|im_end|>Clear skies.<|im_end|>"
    assert joined(chunks, 1) == arguments + "<|eot_id|>Clear skies.<|eot_id|>"
    row["messages"] = [*CALL[:2], {"role": "tool", "content": ' a "quoted" \n'}, CALL[3]]
    _, chunks, _ = encode(chat_tok("qwen3"), chat_tok("llama3"), row, "all")
    assert '> "quoted"<' in joined(chunks)  # of " a" one template strips the space


def calls(*arguments: Any) -> dict[str, Any]:
    functions = [{"name": f"f{k}", "arguments": one} for k, one in enumerate(arguments)]
    return {"messages": [CALL[0], {"role": "assistant", "tool_calls": [{"function": one} for one in functions]}]}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"q": 'x"y\n', "n": [1, -2.5, True, {"deep": " b "}]},
            r'{"q": "x\"y\n", "n": [1, -2.5, true, {"deep": " b "}]}',
        ),
        ({"n": 7}, '{"n": 7}'),
        ({"is_on": False}, '{"is_on": false}'),
        ({}, "{}"),
    ],
)
def test_arguments_of_any_type_are_aligned_as_json(small_chat_tok, arguments, text):
    """Numbers, truth values, keys and brackets too, up to the brace that closes the call."""
    example, chunks, vocabulary = encode(small_chat_tok("qwen3"), small_chat_tok("llama3"), calls(arguments))
    assert trained_text(example, vocabulary) == joined(chunks) == "f0" + text + "}<|im_end|>"
    assert joined(chunks, 1) == "f0" + text + "}<|eot_id|>"


def test_several_calls_of_one_message(small_chat_tok):
    example, chunks, vocabulary = encode(small_chat_tok("qwen3"), small_chat_tok("qwen3x"), calls({}, {"n": 7}, {}))
    assert trained_text(example, vocabulary) == joined(chunks) == 'f0{}}f1{"n": 7}}f2{}}<|im_end|>'


def test_arguments_that_a_template_does_not_write_as_json(small_chat_tok):
    """Values are aligned where they are the same text; what stands between them is the student's alone."""
    student = small_chat_tok("qwen3")
    row = calls({"city": "Köln", "days": 3, "units": {"is_metric": True}, "quoted": 'x"y'})
    for template, aligned in (
        ("{% for key, value in call.arguments.items() %}<{{ key }}>{{ value }}</{{ key }}>{% endfor %}", "Köln3"),
        ("{{ call.arguments | tojson(indent=1) }}", "Köln3"),
        ("{{ call.arguments | tojson(ensure_ascii=True) }}", "3"),  # the same JSON but for one letter
    ):
        teacher = type(student)(tokenizer_object=small_chat_tok("llama3").backend_tokenizer, eos_token="<|eot_id|>")
        teacher.chat_template = (
            "{% for m in messages %}<{{ m.role }}> {{ m.content }}"
            "{% for one in m.tool_calls or [] %}{% set call = one.function %}{{ call.name }}: "
            + template
            + "{% endfor %}"
            "<|eot_id|>{% endfor %}"
        )
        encoder = ExampleEncoder(student, [teacher], train_on="assistant")
        ((example,),) = encoder.encode([row])
        vocabulary = encoder.student.vocabulary
        text = r'{"city": "Köln", "days": 3, "units": {"is_metric": true}, "quoted": "x\"y"}'
        assert trained_text(example, vocabulary) == "f0" + text + "<|im_end|>"
        chunks = pieces_of(example, vocabulary, encoder.teachers[0].vocabulary)
        assert all(ours == theirs for ours, theirs in chunks[:-1])
        assert joined(chunks) == f"f0{aligned}<|im_end|>"


def test_arguments_that_are_text_stay_as_they_are(small_chat_tok):
    """Where a template writes them as they are they are aligned; where it quotes them they are not."""
    student = small_chat_tok("qwen3")
    row = calls('{"n": 7}')
    example, chunks, vocabulary = encode(student, small_chat_tok("llama3"), row)
    assert trained_text(example, vocabulary) == joined(chunks) == "f0<|im_end|>"


def test_contents_that_look_like_the_template(small_chat_tok):
    for content in ("assistant", "user\nuser", "a", "xtoken0piece0end", "[INST] b [/INST]"):
        messages = [{"role": "user", "content": "assistant"}, {"role": "assistant", "content": content}]
        _, chunks, _ = encode(small_chat_tok("llama3"), small_chat_tok("mistral"), {"messages": messages}, "all")
        assert joined(chunks) == "assistant" + content + "<|eot_id|>"


def test_special_tokens_in_contents_are_left_out(chat_tok):
    messages = [TALK[1], {"role": "assistant", "content": "one<|eot_id|>two<|im_end|>three"}]
    example, chunks, vocabulary = encode(chat_tok("llama3"), chat_tok("qwen3"), {"messages": messages})
    assert [theirs for ours, theirs in chunks if ours == b"<|eot_id|>"] == [b"<|im_end|>"]
    assert joined(chunks) == "onetwothree<|eot_id|>"
    assert trained_text(example, vocabulary) == "onetwo<|im_end|>three<|eot_id|>"  # for Llama that is text


def test_white_space_at_the_edges_is_the_templates(chat_tok):
    messages = [TALK[1], {"role": "assistant", "content": "\n\n  four  \nfive \n"}]
    example, chunks, vocabulary = encode(chat_tok("smollm2"), chat_tok("llama3"), {"messages": messages})
    assert trained_text(example, vocabulary) == " four  \nfive<|im_end|>"
    assert joined(chunks) == "  \nfive<|im_end|>"  # Llama strips what smollm2 joins to the first word


def test_missing_template_is_named(small_chat_tok, teacher_tok):
    encoder = ExampleEncoder(small_chat_tok("llama3"), [teacher_tok])
    with pytest.raises(ValueError, match=r"teacher 0: tokenizer .* has no chat template"):
        encoder.encode([{"messages": TALK}])
    with pytest.raises(ValueError, match="student: tokenizer Tokenizer has no chat template"):
        ChatTemplate(teacher_tok.backend_tokenizer, "student")


def test_bad_messages(small_chat_tok):
    student, teacher = small_chat_tok("llama3"), small_chat_tok("gemma3")
    with pytest.raises(ValueError, match="teacher 0: its chat template refuses the messages: only user and assistant"):
        encode(student, teacher, {"messages": CALL})
    for messages in (["hello"], [{"content": "hello"}], [{"role": 3, "content": "hello"}]):
        with pytest.raises(ValueError, match="row 0: messages: expected a mapping with a role"):
            encode(student, teacher, {"messages": messages})


def test_contents_that_are_no_text(small_chat_tok, caplog):
    """A template that takes texts writes a list as Python does; what no model is shown is told."""
    text, picture = {"type": "text", "text": "so"}, {"type": "image_url", "image_url": {"url": "x.png"}}
    parts = CONFORMING.replace("m.content", "m.content | map(attribute='text', default='') | join")
    takes_parts, takes_text = (with_text(small_chat_tok(name), parts) for name in ("qwen3", "qwen3x"))
    takes_text.chat_template = CONFORMING
    row = {"messages": [{"role": "user", "content": [text]}, {"role": "assistant", "content": [text]}]}
    for student, teacher, name in ((takes_text, takes_parts, "student"), (takes_parts, takes_text, "teacher 0")):
        with pytest.raises(ValueError, match=f"row 0: {name}: its chat template takes a text as content, and writes "):
            ExampleEncoder(student, [teacher]).encode([row])
    row["messages"][0]["content"] = [picture, text]
    encoder = ExampleEncoder(takes_parts, [with_text(small_chat_tok("qwen3x"), parts)], train_on="assistant")
    assert trained_text(encoder.encode([row])[0][0], encoder.student.vocabulary) == "so<|im_end|>"
    assert caplog.messages[0].startswith("row 0, turn 0: a part of type 'image_url', which no model is shown")
    for options in ("{}", [1]):
        with pytest.raises(ValueError, match="row 0: chat_template_kwargs: expected a mapping from names, got "):
            encoder.encode([{**row, "chat_template_kwargs": options}])


def test_parts_of_a_content_and_repeated_contents():
    parts = [{"type": "text", "text": " x "}, {"type": "text", "text": "y"}]
    messages = [{"role": "user", "name": "Ann", "content": parts}]
    conversation = take_apart(messages)
    assert (conversation.pieces, conversation.owners) == (["x", "y"], [0, 0])

    class Twice:
        chat_template = "twice"

        def apply_chat_template(self, messages, **options):
            parts = [part["text"] for message in messages for part in message["content"]]
            return "|".join(["", *parts, *parts, ""])

    text, places, _ = ChatTemplate(Twice(), "student").render(conversation)
    assert [(text[place.start : place.end], place.is_verbatim) for place in places] == [("x", True), ("y", True)]


def test_a_template_that_writes_contents_otherwise(small_chat_tok):
    student = small_chat_tok("llama3")
    teacher = type(student)(tokenizer_object=student.backend_tokenizer, eos_token="<|eot_id|>")
    teacher.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content | upper }}<|eot_id|>{% endfor %}"
    messages = [TALK[1], {"role": "assistant", "content": "OK 12."}, TALK[3], TALK[4]]
    _, chunks, _ = encode(student, teacher, {"messages": messages}, "all")
    assert joined(chunks).replace("<|eot_id|>", "") == "OK 12.是 9999。"


TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CONFORMING = "{% for m in messages %}" + TURN + "{% endfor %}"
WRITING = {  # before each turn, by what it reads
    "a word": "{% if '/no_think' in messages[0].content %}(quiet){% endif %}",
    "its length": "{{ m.content | length }} characters: ",
    "how it ends": "{{ '?' if m.content.endswith('?') else '!' }}",
    "how it begins and ends": "[{{ m.content[0] }}.{{ m.content[-1] }}]",
    "whether it is known": "{% if m.content == 'Fine.' %}(known){% endif %}",
    "whether others are equal": "{{ messages | map(attribute='content') | unique | list | length }}",
    "its length, for a limit": "{% if m.content | length > 5 %}(long){% endif %}",
}
READING = {name: CONFORMING.replace(TURN, before + TURN) for name, before in WRITING.items()}
SAYING = {
    "words": ["Why /no_think", "Because.", "Fine.", "No?"],
    "the same": ["Fine.", "Fine.", "Fine.", "Fine."],
    "of the template": ["user", "assistant\nuser", "characters", "(quiet)"],
    "for private use": ["\U00100003 a", "b\U00100000", "cd", "\U000f0000\U00100001"],
}


def conversation(contents: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]


def with_text(tok: Any, template: str, **special: str) -> Any:
    """The tokenizer with another template."""
    copy = type(tok)(tokenizer_object=tok.backend_tokenizer, **{"eos_token": tok.eos_token, **special})
    copy.chat_template = template
    return copy


@pytest.mark.parametrize("saying", SAYING.values(), ids=SAYING)
@pytest.mark.parametrize("reading", READING.values(), ids=READING)
def test_templates_that_read_what_they_write(reading, saying, small_chat_tok):
    reader, other = with_text(small_chat_tok("qwen3"), reading), with_text(small_chat_tok("qwen3x"), CONFORMING)
    for student, teacher in ((reader, other), (other, reader)):
        encoder = ExampleEncoder(student, [teacher], train_on="assistant")
        (examples,) = encoder.encode([{"messages": conversation(saying)}])
        if not examples:
            assert encoder.report.counts["turns without a label"] == 2
            continue
        (example,) = examples
        vocabulary = encoder.student.vocabulary
        answers = "".join(content + "<|im_end|>" for content in saying[1::2])
        if not (encoder.report.counts and student is reader):  # else it has been said
            assert trained_text(example, vocabulary) == answers
        if not encoder.report.counts:
            assert joined(pieces_of(example, vocabulary, encoder.teachers[0].vocabulary)) == answers
        # What is labelled is in the turn of an assistant, behind its header.
        ids, labels = example["student_ids"].tolist(), example["labels"].tolist()
        for k in (k for k in range(1, len(ids)) if labels[k] != -100 and labels[k - 1] == -100):
            assert student.decode(ids[:k]).endswith("assistant\n")


def test_most_of_these_are_found(small_chat_tok):
    """Only contents that a template compares as a whole, and that stand in it too, cannot be told."""
    lost = {
        (reading, saying)
        for reading, template in READING.items()
        for saying, contents in SAYING.items()
        if ChatTemplate(with_text(small_chat_tok("qwen3"), template), "student").render(
            take_apart(conversation(contents))
        )[2]
    }
    assert lost == {("whether it is known", "the same"), ("whether it is known", "words")}


@pytest.mark.parametrize("head", ["Last: {{ messages[-1].content }}", "{{ messages[1].content }}, then: "])
def test_a_content_that_is_written_twice_counts_in_its_turn(head, small_chat_tok, caplog):
    student, teacher = with_text(small_chat_tok("qwen3"), head + CONFORMING), small_chat_tok("qwen3x")
    encoder = ExampleEncoder(student, [teacher], train_on="assistant")
    ((example,),) = encoder.encode([{"messages": conversation(["So", "so", "So", "so"])}])
    ids, labels = example["student_ids"].tolist(), example["labels"].tolist()
    starts = [k for k in range(1, len(ids)) if labels[k] != -100 and labels[k - 1] == -100]
    assert [student.decode(ids[:k])[-11:] for k in starts] == [">assistant\n"] * 2
    assert trained_text(example, encoder.student.vocabulary) == "so<|im_end|>so<|im_end|>"
    (told,) = caplog.messages
    assert told.startswith(f"row 0, turn {3 if 'Last' in head else 1}: for the student its chat template writes")


LOSING = {
    "its chat template leaves the content out": CONFORMING.replace("in messages", "in messages if m.role == 'user'"),
    "its chat template writes the content otherwise": CONFORMING.replace("m.content", "m.content | upper"),
    "cannot be told from other text": "{% for m in messages %}{{ 1 if m.content == 'so' }}so" + TURN + "{% endfor %}",
}


@pytest.mark.parametrize("reason", LOSING)
def test_turns_without_a_label_and_teachers_without_a_chunk_are_told(reason, small_chat_tok, caplog):
    loser, keeper = with_text(small_chat_tok("qwen3"), LOSING[reason]), small_chat_tok("qwen3x")
    rows = [{"messages": conversation(["Why", "so"])}] * 3
    with pytest.raises(
        ValueError, match="rows: 3 of 3 are lost to turns without a label, first row 0, turn 1: .*" + reason
    ):
        EncodedDataset(rows, ExampleEncoder(loser, [keeper], train_on="assistant"))
    with pytest.raises(
        ValueError,
        match="3 of 3 are lost to turns or texts without a chunk for teacher 0, first row 0, turn 1: .*" + reason,
    ):
        EncodedDataset(rows, ExampleEncoder(keeper, [loser], train_on="assistant"))
    caplog.clear()
    fine = {"messages": [{"role": "user", "content": "Why"}], "prompt": None}
    encoder = ExampleEncoder(keeper, [loser], train_on="all")
    EncodedDataset([*rows[:1], *[{"text": "they read it"}] * 3, fine], encoder)
    assert encoder.report.counts["turns or texts without a chunk for teacher 0"] == (
        3 if "upper" in LOSING[reason] else 1
    )
    assert all("row 0" in one or one.startswith("of 5 rows") for one in caplog.messages)


@pytest.mark.parametrize("spaced", ["student", "teacher"])
def test_a_space_that_one_template_writes_before_contents_is_told(spaced, small_chat_tok, caplog):
    """Nothing of " they" is "they": a label, but no chunk."""
    tok, row = small_chat_tok("qwen3"), {"messages": conversation(["Why", "they read it", "So", "they read on"])}
    plain, told = (with_text(tok, CONFORMING.replace("\n{{", mark)) for mark in (":{{", ": {{"))
    student, teacher = (told, plain) if spaced == "student" else (plain, told)
    encoder = ExampleEncoder(student, [teacher], train_on="assistant")
    for (example,) in encoder.encode([row] * 2):
        first = " they" if spaced == "student" else "they"
        text = f"{first} read it<|im_end|>{first} read on<|im_end|>"
        assert trained_text(example, encoder.student.vocabulary) == text
        chunks = pieces_of(example, *[encoder.student.vocabulary] * 2)
        assert joined(chunks) == joined(chunks, 1) == text.replace(first, "")
    assert encoder.report.counts == {"turns whose first token is in no chunk for teacher 0": 4}
    (message,) = caplog.messages
    assert message.startswith("row 0, turn 1: its first token is in no chunk for teacher 0, whose tokens begin otherwi")
    encoder = ExampleEncoder(told, [with_text(tok, told.chat_template + " ")], train_on="assistant")
    encoder.encode([row])
    assert not encoder.report.counts


def test_empty_turns_are_told(small_chat_tok, caplog):
    encoder = ExampleEncoder(small_chat_tok("qwen3"), [small_chat_tok("qwen3x")], train_on="assistant")
    ((example,),) = encoder.encode([{"messages": conversation(["Why", " \n", "So", "so"])}])
    assert trained_text(example, encoder.student.vocabulary) == "so<|im_end|>"
    assert caplog.messages[0].startswith("row 0, turn 1: no label, since it has no content")


def test_time_stands_still(small_chat_tok):
    """In all formats, wherever they come from; another time is another text."""
    template = "{% set f = '%d %b %Y' %}<{{ strftime_now(f) }}, {{ strftime_now('%H:%M:%S') }}, %H>\n" + CONFORMING
    student, teacher = (with_text(small_chat_tok(name), template) for name in ("qwen3", "qwen3x"))
    row, times = {"messages": conversation(["Why", "so"])}, [datetime(2031, 2, 3, 4, 5, second) for second in (6, 7)]
    for now in times:
        encoder = ExampleEncoder(student, [teacher], train_on="assistant", now=now)
        ((example,),) = encoder.encode([row])
        text = student.decode(example["student_ids"])
        assert text.startswith(f"<03 Feb 2031, 04:05:0{now.second}, %H>\n<|im_start|>user")
        assert joined(pieces_of(example, encoder.student.vocabulary, encoder.teachers[0].vocabulary)) == "so<|im_end|>"
    encoder = ExampleEncoder(student, [teacher])
    written = encoder.now.strftime("<%d %b %Y, %H:%M:%S, %%H>")
    assert student.decode(encoder.encode([row])[0][0]["student_ids"]).startswith(written)


@pytest.mark.parametrize("format", ["%_d|%-H|%^b", "100%%d %d", "%%%Y%%", "%e %p %T"])
def test_formats_of_time_are_those_of_python(format, small_chat_tok):
    now = datetime(2031, 2, 3, 4, 5, 6)
    row = {"messages": conversation(["Why", "so"])}
    for template, options in (
        ("{{ strftime_now('" + format + "') }}", {}),
        ("{{ strftime_now(how) }}", {"how": format}),
    ):
        student = with_text(small_chat_tok("qwen3"), template + CONFORMING)
        encoder = ExampleEncoder(student, [small_chat_tok("qwen3x")], now=now)
        ((example,),) = encoder.encode([{**row, "chat_template_kwargs": options}])
        assert student.decode(example["student_ids"]).startswith(now.strftime(format) + "<|im_start|>")
    student = with_text(small_chat_tok("qwen3"), "{{ strftime_now('%5Y') }}" + CONFORMING)
    with pytest.raises(ValueError, match=r"row 0: student: .*expected a known format of time, got %5Y"):
        ExampleEncoder(student, [small_chat_tok("qwen3x")], now=now).encode([row])


def test_turns_that_the_next_one_ends(small_chat_tok, caplog):
    """The mark of the next turn is what a student must write to stop; the last turn gets the end token."""
    toks = [small_chat_tok(name) for name in ("qwen3", "llama3")]
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    student = with_text(toks[0], template)
    row = {"messages": conversation(["Why", "so", "and", "so on"])}
    encoder = ExampleEncoder(student, toks[1:], train_on="assistant")
    ((example,),) = encoder.encode([row])
    assert trained_text(example, encoder.student.vocabulary) == "so<|im_start|>so on<|im_end|>"
    chunks = pieces_of(example, encoder.student.vocabulary, encoder.teachers[0].vocabulary)
    assert joined(chunks, 1) == "soso on<|eot_id|>"
    assert caplog.messages[0].startswith(
        "row 0, turn 3: the chat template of the student ends it with no token, so '<|im_end|>'"
    )
    encoder = ExampleEncoder(student, toks[1:], train_on="assistant", add_end=False)
    ((example,),) = encoder.encode([row])
    assert trained_text(example, encoder.student.vocabulary) == "so<|im_start|>so on"
    assert "row 0, turn 3: nothing supervises its end" in caplog.messages[-1]


def test_turns_that_nothing_ends(student_tok, small_chat_tok, caplog):
    student = type(student_tok)(tokenizer_object=small_chat_tok("qwen3").backend_tokenizer)
    student.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}(over)"
    rows = [{"messages": conversation(["Why", "so"])}]
    encoder = ExampleEncoder(student, [small_chat_tok("qwen3x")], train_on="assistant")
    with pytest.raises(ValueError, match="1 of 1 are lost to turns whose end nothing supervises, first row 0, turn 1"):
        EncodedDataset(rows, encoder)
    EncodedDataset([*rows, {"text": "they read it"}], encoder)
    assert caplog.messages[-1] == "of 2 rows: 1 turns whose end nothing supervises"
