"""Encoded examples: every chunk lies in what is trained on, and nothing else is in the loss."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from typing import Any

import numpy as np
import pytest
from chats import joined, pieces_of, trained_text
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import TEXTS, encode
from small import SMALL_TEXTS, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from xtoken import Aligner, Vocabulary
from xtoken.train import EncodedDataset, ExampleEncoder

WORDS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        [
            " ",
            "\n",
            "\n\n",
            "12345",
            " the book",
            "they read it. ",
            "ß",
            "👩‍👩‍👧",
            "</",
            "user",
            "[INST]",
            "assistant\n",
        ]
    ),
)
CONTENTS = st.lists(WORDS, max_size=6).map("".join)
TALKS = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3)
NAMES = ("llama3", "qwen3", "gemma3", "mistral")


def spelled(ids, vocabulary):
    return b"".join(vocabulary[i] for i in ids)


@pytest.mark.parametrize("student_name", NAMES)
def test_random_conversations(student_name, small_chat_tok):
    others = [name for name in NAMES if name != student_name]
    toks = [small_chat_tok(name) for name in (student_name, *others)]
    encoders = {on: ExampleEncoder(toks[0], toks[1:], train_on=on) for on in ("all", "completion", "assistant")}
    student = encoders["all"].student.vocabulary
    specials = [name for tok in toks for name in (*tok.all_special_tokens, "think>", "<|")]

    @settings(max_examples=60, deadline=None)
    @given(talk=TALKS, train_on=st.sampled_from(["all", "completion", "assistant"]))
    def check(talk, train_on):
        messages = [
            {
                "role": role,
                "content": content if not any(one in content for one in [*specials, "think>", "<|"]) else "x",
            }
            for turn in talk
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        encoder = encoders[train_on]
        (examples,) = encoder.encode([{"messages": messages}])
        trained = [
            message["content"].strip()
            for k, message in enumerate(messages)
            if train_on == "all" or (k % 2 == 1 and (train_on == "assistant" or k == len(messages) - 1))
        ]
        if not any(trained):
            assert not examples
            return
        (example,) = examples
        ids, labels = example["student_ids"], example["labels"]
        ends = {student.roles[role] for role in ("eos", "end_of_turn") if role in student.roles}
        wanted = labels != -100
        assert (labels[wanted] == ids[wanted]).all()
        # The labels, cut at the ends of turns, are the contents, but for white space that tokens join to them.
        turns: list[list[int]] = [[]]
        for i in labels[wanted].tolist():
            turns[-1].append(i)
            if i in ends:
                turns.append([])
        said = [spelled([i for i in turn if i not in ends], student).decode().split() for turn in turns]
        expected = [text.split() for text in trained]
        if student_name == "mistral":  # nothing ends its questions
            said, expected = ([["".join(itertools.chain(*turns))]] for turns in (said, expected))
        assert [turn for turn in said if turn] == [turn for turn in expected if turn]
        for m, part in enumerate(example["teachers"]):
            other = encoder.teachers[m].vocabulary
            spans = part["spans"]
            assert (spans[1:, 0::2] >= spans[:-1, 1::2]).all()
            assert (spans[:, 0::2] > 0).all()
            covered = np.zeros(len(ids), bool)
            for (a, b, c, d), (ours, theirs) in zip(spans.tolist(), pieces_of(example, student, other, m), strict=True):
                covered[a:b] = True
                if ids[a] in ends:
                    assert b - a == d - c == 1
                    assert part["ids"][c] in {other.roles.get(role) for role in ("eos", "end_of_turn")}
                else:
                    assert ours == theirs
            assert not (covered & ~wanted).any()

    check()


@pytest.mark.parametrize("names", [("llama3", "qwen3"), ("gemma3", "llama3")])
def test_chunks_of_contents_between_special_tokens_are_complete(names, small_chat_tok):
    student, teacher = map(small_chat_tok, names)
    encoder = ExampleEncoder(student, [teacher], train_on="assistant")
    vocabularies = encoder.student.vocabulary, encoder.teachers[0].vocabulary
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text.strip()}]}
        for text in SMALL_TEXTS
    ]
    for row, (example,) in zip(rows, encoder.encode(rows), strict=True):
        chunks = pieces_of(example, *vocabularies)
        assert joined(chunks[:-1]) == row["messages"][1]["content"]
        assert trained_text(example, vocabularies[0]) == joined(chunks)


def make_family(name):
    """A small tokenizer of a family, trained on `SMALL_TEXTS`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if name == "wordpiece":
        tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tok.normalizer, tok.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    elif name == "unigram":
        tok = Tokenizer(models.Unigram())
        tok.normalizer, tok.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    elif name == "sentencepiece":
        tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.ByteFallback()
        special = ["<unk>", *(f"<0x{k:02X}>" for k in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    else:
        tok = make_tokenizer(450, "", "<s>").backend_tokenizer
        if name == "neox":
            tok.normalizer, tok.post_processor = normalizers.NFC(), processors.ByteLevel(trim_offsets=True)
        if name == "added":
            tok.add_tokens(["readers paid", AddedToken(" they ", normalized=False)])
        return tok
    tok.train_from_iterator(SMALL_TEXTS, trainer)
    spec = json.loads(tok.to_str())  # pieces that stand for bytes are no special tokens
    spec["added_tokens"] = [one for one in spec["added_tokens"] if not one["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(spec))


FAMILIES = ("byte-level", "neox", "added", "sentencepiece", "unigram", "wordpiece")


@pytest.mark.parametrize("student_name", FAMILIES)
def test_text_is_aligned_as_the_aligner_does(student_name):
    """Whatever a tokenizer changes, and whatever its offsets are: there is one aligner."""
    body = SMALL_TEXTS[2]
    texts = [
        "e\u0301 " + body,
        body + "Å ﬁ ½ 日 " + body.upper(),
        f"  {body}\n",
        "<s>" + body + " A\u030a",
        *TEXTS.values(),
    ]
    student = make_family(student_name)
    for tok in (make_family(name) for name in FAMILIES if name != student_name):
        encoder = ExampleEncoder(student, [tok], add_end=False)
        aligner = Aligner(student, tok)
        for text, examples in zip(texts, encoder.encode([{"text": text} for text in texts]), strict=True):
            ids = [np.array(one.encode(text, add_special_tokens=False).ids) for one in (student, tok)]
            is_text = encoder.student.vocabulary.is_text[ids[0]]
            if not is_text[1:].any():  # every word is unknown
                assert not examples
                continue
            part = examples[0]["teachers"][0]
            assert [examples[0]["student_ids"].tolist(), part["ids"].tolist()] == [one.tolist() for one in ids]
            expected = aligner.align(*ids, *(np.ones(len(one), bool) for one in ids))
            wanted = [span for span in expected.spans[expected.predicted].tolist() if is_text[span[0] : span[1]].all()]
            spans = part["spans"][(part["spans"][:, ::2] > 0).all(axis=1)].tolist()
            assert [span for span in spans if is_text[span[0] : span[1]].all()] == wanted


@pytest.mark.parametrize("pair", [("llama3", "qwen3"), ("smollm2", "llama3")])
def test_text_of_real_tokenizers(pair, tokenizer):
    student, teacher = map(tokenizer, pair)
    encoder = ExampleEncoder(student, [teacher], add_end=False)
    aligner = Aligner(encoder.student.vocabulary, encoder.teachers[0].vocabulary, "bytes")
    for text, (example,) in zip(
        TEXTS.values(), encoder.encode([{"text": text} for text in TEXTS.values()]), strict=True
    ):
        ids = [encode(tok, text) for tok in (student, teacher)]
        assert example["student_ids"].tolist() == ids[0]
        assert example["labels"].tolist() == [-100, *ids[0][1:]]
        assert example["teachers"][0]["ids"].tolist() == ids[1]
        expected = aligner.align(*ids)
        assert example["teachers"][0]["spans"].tolist() == expected.spans.tolist()


@pytest.mark.parametrize("names", [("neox", "byte-level"), ("byte-level", "neox"), ("sentencepiece", "neox")])
def test_a_character_that_is_changed_costs_its_own_neighbourhood_in_a_chat(names):
    """In each of the turns, also at their edges, which white space joins to the template."""
    from transformers import PreTrainedTokenizerFast

    def chunks(content):
        toks = [PreTrainedTokenizerFast(tokenizer_object=make_family(name)) for name in names]
        toks[0].chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} /{% endfor %}"
        toks[1].chat_template = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
        encoder = ExampleEncoder(toks[0], toks[1:], train_on="assistant")
        row = {"messages": [{"role": role, "content": content} for role in ("user", "assistant") * 2]}
        ((example,),) = encoder.encode([row])
        return pieces_of(example, encoder.student.vocabulary, encoder.teachers[0].vocabulary)

    plain, changed = SMALL_TEXTS[1].strip(), SMALL_TEXTS[1].strip().replace("book", "bo\u0308ok")
    best, found = chunks(plain), chunks(changed)
    assert all(ours == theirs for ours, theirs in found)
    assert 0 <= 2 * len(plain) - len(joined(best)) <= 4
    assert 0 < 2 * len(changed) - len(joined(found)) < 24
    assert found[0] == best[0]
    assert found[-1] == best[-1]


def test_tokenizers_that_change_the_text(tokenizer, teacher_tok):
    """Only chunks with equal bytes are kept."""
    encoder = ExampleEncoder(tokenizer("unigram"), [teacher_tok], add_end=False)
    texts = ["the ﬁrst line", "Größe and 12", "emoji 👍🏽 here", "  two  spaces "]
    for text, (example,) in zip(texts, encoder.encode([{"text": text} for text in texts]), strict=True):
        chunks = pieces_of(example, encoder.student.vocabulary, encoder.teachers[0].vocabulary)
        assert all(a == b for a, b in chunks)
        assert all(a.decode("utf-8", "ignore") in text for a, _ in chunks)
    assert sum(len(example["teachers"][0]["spans"]) for (example,) in encoder.encode([{"text": texts[1]}])) >= 2


def with_bos(tok):
    """The tokenizer with a post-processor that puts its first special token before a text."""
    from tokenizers import processors

    bos = tok.convert_ids_to_tokens(0)
    copy = type(tok)(
        tokenizer_object=type(tok.backend_tokenizer).from_str(tok.backend_tokenizer.to_str()), eos_token="</s>"
    )
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return copy


def test_beginning_and_end_of_a_text(student_tok, teacher_tok):
    (example,) = ExampleEncoder(with_bos(student_tok), [teacher_tok]).encode([{"text": "they read it"}])[0]
    plain, theirs = (tok.encode("they read it", add_special_tokens=False) for tok in (student_tok, teacher_tok))
    assert example["student_ids"].tolist() == [0, *plain, student_tok.eos_token_id]
    assert example["labels"].tolist() == [-100, *plain, student_tok.eos_token_id]
    assert example["teachers"][0]["ids"].tolist() == [*theirs, teacher_tok.eos_token_id]
    spans = example["teachers"][0]["spans"].tolist()
    assert spans[0][::2] == [1, 0]  # nothing predicts the teacher's first token, but it is before the next one
    assert spans[-1] == [len(plain) + 1, len(plain) + 2, len(theirs), len(theirs) + 1]
    (example,) = ExampleEncoder(student_tok, [teacher_tok], add_end=False).encode([{"text": "they read it"}])[0]
    assert example["student_ids"].tolist() == plain


def test_prompt_and_completion(student_tok, teacher_tok):
    def trained(prompt, completion, train_on="completion"):
        encoder = ExampleEncoder(student_tok, [teacher_tok], train_on=train_on)
        (example,) = encoder.encode([{"prompt": prompt, "completion": completion}])[0]
        vocabularies = encoder.student.vocabulary, encoder.teachers[0].vocabulary
        assert trained_text(example, vocabularies[0]).endswith("</s>")
        return trained_text(example, vocabularies[0])[:-4], joined(pieces_of(example, *vocabularies)[:-1])

    assert trained("In 1990,", " readers paid") == (" readers paid", " readers paid")
    assert trained("In 1990, ", "readers paid") == (" readers paid", " readers paid")
    assert trained("In 19", "90 readers") == ("0 readers", "0 readers")  # the student's "199" is of both
    assert trained("", "readers paid")[0].endswith("ers paid")  # nothing predicts the first token
    labels, chunks = trained("In 1990,", " readers paid", "all")
    assert labels.endswith(" 1990, readers paid")
    assert chunks == labels


def test_several_teachers_and_the_students_own_tokenizer(student_tok, teacher_tok, small_chat_tok):
    toks = [teacher_tok, student_tok, small_chat_tok("qwen3")]
    (example,) = ExampleEncoder(student_tok, toks).encode([{"text": SMALL_TEXTS[0]}])[0]
    assert [part["ids"] is None for part in example["teachers"]] == [False, True, False]
    assert example["teachers"][1]["spans"] is None
    other = type(student_tok)(tokenizer_object=student_tok.backend_tokenizer)
    other.chat_template = "{{ messages }}"
    assert ExampleEncoder(student_tok, [other]).teachers[0] is not None  # its own template, so ids of its own


@pytest.mark.parametrize("limits", [(20, None), (9, 12), (None, 22), (11, 16)])
def test_long_texts_are_cut_into_examples_that_all_models_read_alike(limits, student_tok, teacher_tok, small_chat_tok):
    toks = [with_bos(teacher_tok), small_chat_tok("mistral")]
    encoder = ExampleEncoder(with_bos(student_tok), toks, max_length=limits[0], max_teacher_length=limits[1])
    vocabularies = [encoder.student.vocabulary, *(side.vocabulary for side in encoder.teachers)]
    for text, examples in zip(SMALL_TEXTS, encoder.encode([{"text": text} for text in SMALL_TEXTS]), strict=True):
        assert len(examples) > 1
        texts = []
        for example in examples:
            rows = [example["student_ids"], *(part["ids"] for part in example["teachers"])]
            assert all(
                limit is None or len(row) <= limit for limit, row in zip((*limits, limits[1]), rows, strict=True)
            )
            spelling = {vocabulary.decode(row) for vocabulary, row in zip(vocabularies, rows, strict=True)}
            assert len(spelling) == 1
            texts.append(spelling.pop().decode())
            assert (rows[0][0], rows[1][0]) == (0, 0)
            for m in (0, 1):
                spans = example["teachers"][m]["spans"]
                assert all(
                    a == b for a, b in pieces_of(example, vocabularies[0], vocabularies[m + 1], m) if a != b"</s>"
                )
                assert spans[0, 0] == 1 or m == 1
                assert spans[-1, 1] == len(rows[0])
        assert "".join(texts) == text


def test_long_conversations_lose_their_end(small_chat_tok):
    student, teacher = small_chat_tok("llama3"), small_chat_tok("qwen3")
    messages = [{"role": "user", "content": "they read it"}, {"role": "assistant", "content": SMALL_TEXTS[0]}]
    rows = [{"messages": messages}, {"prompt": SMALL_TEXTS[1], "completion": SMALL_TEXTS[2]}]
    whole = ExampleEncoder(student, [teacher], train_on="assistant").encode(rows)
    lengths = [len(one["student_ids"]) for (one,) in whole]
    cut = ExampleEncoder(student, [teacher], train_on="assistant", max_length=min(lengths) - 5).encode(rows)
    for (long,), (short,) in zip(whole, cut, strict=True):
        count = len(short["student_ids"])
        assert count <= min(lengths) - 5
        assert short["student_ids"].tolist() == long["student_ids"][:count].tolist()
        assert short["labels"].tolist() == long["labels"][:count].tolist()
        spans = long["teachers"][0]["spans"]
        assert short["teachers"][0]["spans"].tolist() == spans[spans[:, 1] <= count].tolist()
        assert short["teachers"][0]["spans"][-1, 3] == len(short["teachers"][0]["ids"])
    assert ExampleEncoder(student, [teacher], train_on="assistant", max_length=10).encode(rows) == [[], []]
    alone = ExampleEncoder(student, [], max_length=10).encode(rows)
    assert [len(example["student_ids"]) for (example,) in alone] == [10, 10]


def test_what_is_cut_is_told(small_chat_tok, student_tok, caplog):
    """Of a teacher that reads the student's ids the limit is the student's too; each teacher may have its own."""
    student, other = small_chat_tok("llama3"), small_chat_tok("qwen3")
    messages = [{"role": "user", "content": "they read it"}, {"role": "assistant", "content": SMALL_TEXTS[0]}]
    rows = [{"messages": messages}] * 2
    encoder = ExampleEncoder(student, [other, student, other], max_teacher_length=[40, 35, None], train_on="assistant")
    ((example,), _) = encoder.encode(rows)
    assert len(example["student_ids"]) <= 35
    assert len(example["teachers"][0]["ids"]) <= 40
    assert encoder.report.counts == {"rows that lose what is beyond a length limit": 2}
    (told,) = caplog.messages
    assert told.startswith("row 0: ")
    assert "tokens of the student, at most 35" in told
    with pytest.raises(
        ValueError, match="rows: 2 of 2 are lost to rows that lose what is beyond a length limit, first"
    ):
        EncodedDataset(rows, ExampleEncoder(student, [other], train_on="assistant", max_teacher_length=9))
    with pytest.raises(ValueError, match="max_teacher_length: expected one for each of 1 teachers, got 2"):
        ExampleEncoder(student, [other], max_teacher_length=[9, 9])
    caplog.clear()
    encoder = ExampleEncoder(student_tok, [other], max_length=20)
    EncodedDataset([{"text": text} for text in SMALL_TEXTS], encoder)
    assert not caplog.messages  # long texts become several examples


def test_nothing_to_train_on(student_tok, teacher_tok, small_chat_tok):
    encoder = ExampleEncoder(small_chat_tok("qwen3"), [teacher_tok], add_end=False)
    assert encoder.encode([]) == []
    assert encoder.encode([{"text": ""}, {"text": "a"}, {"prompt": "a", "completion": ""}]) == [[], [], []]


def test_bad_input(student_tok, teacher_tok):
    with pytest.raises(ValueError, match="train_on: expected"):
        ExampleEncoder(student_tok, [], train_on="some")
    for name in ("max_length", "max_teacher_length"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 2, got 1"):
            ExampleEncoder(student_tok, [], **{name: 1})
    with pytest.raises(ValueError, match="teacher 0: expected a tokenizer that encodes text"):
        ExampleEncoder(student_tok, [Vocabulary([b"a"])])
    encoder = ExampleEncoder(student_tok, [teacher_tok], text_column="body")
    for row in ({"text": "a"}, {"body": 3}, {}, {"prompt": "a"}):
        with pytest.raises(
            ValueError,
            match=r"row 1: expected messages, conversations, prompt and completion, or text in 'body' \(te",
        ):
            encoder.encode([{"body": "fine"}, row])


def test_rows_are_counted_from_the_first(small_chat_tok, student_tok):
    encoder = ExampleEncoder(small_chat_tok("gemma3"), [small_chat_tok("llama3")])
    fine = {"messages": [{"role": "user", "content": "who?"}]}
    with pytest.raises(ValueError, match="row 7: student: its chat template refuses the messages"):
        encoder.encode([fine, {"messages": [*fine["messages"], {"role": "tool", "content": "a"}]}], 6)
    with pytest.raises(ValueError, match=r"row 6: .*surrogates not allowed"):
        encoder.encode([{"text": "a\ud800b"}], 6)


def test_encoders_can_be_sent_to_workers(small_chat_tok):
    encoder = ExampleEncoder(small_chat_tok("llama3"), [small_chat_tok("qwen3")])
    rows = [{"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "they read it"}]}]
    expected, found = encoder.encode(rows), pickle.loads(pickle.dumps(encoder)).encode(rows)
    assert found[0][0]["student_ids"].tolist() == expected[0][0]["student_ids"].tolist()
    assert found[0][0]["teachers"][0]["spans"].tolist() == expected[0][0]["teachers"][0]["spans"].tolist()


def test_tokenizers_by_path(student_tok, teacher_tok, tmp_path):
    teacher_tok.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    row = {"text": SMALL_TEXTS[0]}
    (found,), (expected,) = (
        ExampleEncoder(student_tok, [teacher], add_end=False).encode([row])[0]
        for teacher in (tmp_path / "tokenizer.json", teacher_tok)
    )
    assert found["teachers"][0]["spans"].tolist() == expected["teachers"][0]["spans"].tolist()


def test_padding_and_truncation_of_the_tokenizer_take_no_part(student_tok, teacher_tok):
    backend = type(student_tok.backend_tokenizer).from_str(student_tok.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    rows = [{"text": text} for text in SMALL_TEXTS[:2]]
    cut = type(student_tok)(tokenizer_object=backend, eos_token="</s>")
    found, expected = (ExampleEncoder(tok, [teacher_tok]).encode(rows) for tok in (cut, student_tok))
    assert [one["student_ids"].tolist() for (one,) in found] == [one["student_ids"].tolist() for (one,) in expected]
    assert backend.truncation is not None


def of_words(pieces, **options):
    """A tokenizer that cuts at white space, with the pieces of words that it knows."""
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, **options))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def test_a_content_that_is_the_teachers_last_token(student_tok):
    """With the space before it, which is a token of its own to the student, and nothing behind it."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "7"}]
    toks = [copy.deepcopy(student_tok), PreTrainedTokenizerFast(tokenizer_object=of_words(["[UNK]", "7"]))]
    for tok in toks:
        tok.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (example,) = ExampleEncoder(toks[0], toks[1:]).encode([{"messages": talk}])[0]
    assert trained_text(example, Vocabulary.from_tokenizer(toks[0])) == "a7</s>"
    assert example["teachers"][0]["ids"].tolist() == [0, 0, 0, 1]


def test_special_tokens_before_a_text_whatever_the_tokenizer_knows(student_tok):
    """One of digits knows no letters, and has no token for the unknown."""
    digits = Tokenizer(models.BPE({"<s>": 0, **{str(k): k + 1 for k in range(10)}, "</s>": 11}, []))
    digits.add_special_tokens(["<s>", "</s>"])
    digits.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 11)]
    )
    (example,) = ExampleEncoder(digits, [student_tok]).encode([{"text": "17"}])[0]
    assert example["student_ids"].tolist() == [0, 0, 2, 8, 11]


def test_a_tokenizer_that_cannot_encode_a_text(student_tok):
    encoder = ExampleEncoder(student_tok, [of_words(["a"], unk_token="[UNK]")])
    assert encoder.encode([{"text": "a a"}])
    with pytest.raises(ValueError, match=r"tokenizer: it cannot encode some .*: Missing \[UNK\] token"):
        encoder.encode([{"text": "a b"}])


def test_tokens_beyond_the_end_of_a_text(student_tok):
    """Where BPE with a prefix falls back on bytes, also on those of the prefix, and counts them as characters."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), " ", "a", "##a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    teacher = Tokenizer(models.BPE(vocab, [], continuing_subword_prefix="##", byte_fallback=True))
    encoder = ExampleEncoder(student_tok, [teacher])
    assert encoder.encode([{"text": "aa"}])
    with pytest.raises(ValueError, match=r"row 1: teacher 0: its tokenizer has tokens at characters up to . of a text"):
        encoder.encode([{"text": "aa"}, {"text": "aé"}])


@pytest.mark.parametrize("text", ["a", "12"])
def test_a_text_of_one_token_behind_nothing(text, caplog):
    """It is the first token of its row, which nothing predicts: not a pair of tokenizers that share no text."""
    student, teacher = make_tokenizer(400, "{1,3}", "<s>"), make_tokenizer(380, "", "<b>")
    for add_end, name in ((True, "teacher 0"), (False, "student")):
        encoder = ExampleEncoder(student, [teacher], add_end=add_end)
        encoder.encode([{"text": text}, {"text": SMALL_TEXTS[0]}, {"text": text}])
        assert encoder.report.counts == {f"texts of one piece with no token before it for {name}": 2}
        assert "row 0: its text is one piece, and the tokenizer puts no token before it" in caplog.text
        assert "share no piece" not in caplog.text
