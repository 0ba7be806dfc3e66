"""Alignments and the byte merge."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from old_versions import READS_GGUF, needs_offsets
from real_tokenizers import TEXTS, encode

from xtoken import Aligner, Alignment, Vocabulary, _core

REAL = ("llama3", "qwen3", "o200k", "smollm2", "tekken", "mistral", *(["gemma3"] if READS_GGUF else []))
DUMMY_SPACE = {"mistral"}  # tokenizers that put a space in front of the text
PAIRS = list(itertools.permutations(REAL, 2))
UNORDERED_PAIRS = list(itertools.combinations(REAL, 2))


def finest_cut(student: list[bytes], teacher: list[bytes], starts: tuple[int, int] = (0, 0)) -> list[list[int]]:
    """Chunks by definition: cut where both sides have a boundary at the same byte. Tokens must not be empty.

    `starts` are the bytes of the text at which the sides begin: -1 for one with a dummy space. Either may end early."""
    ends: list[dict[int, int]] = []
    for position, tokens in zip(starts, (student, teacher), strict=True):
        ends.append({position: 0})
        for i, token in enumerate(tokens):
            position += len(token)
            ends[-1][position] = i + 1
    shared = sorted(ends[0].keys() & ends[1].keys())
    return [[ends[0][a], ends[0][b], ends[1][a], ends[1][b]] for a, b in itertools.pairwise(shared)]


class Corpus:
    """The same texts in every real tokenizer."""

    def __init__(self, tokenizer, vocabulary) -> None:
        rng = random.Random(0)
        # SmolLM2 has no token for some bytes and drops them; what that costs has a test of its own.
        spellable = {token for token in vocabulary("smollm2") if len(token) == 1}
        noise = b"".join(rng.choices(sorted(spellable), k=600))
        self.texts = [*TEXTS.values(), noise.decode("latin-1"), noise.decode("utf-8", "replace")]
        self.ids, self.tokens = {}, {}
        for name in REAL:
            v = vocabulary(name)
            # Bytes that are not UTF-8 have no encoding by a tokenizer; any spelling in its tokens will do.
            spelled = _core.LongestMatch(v._core).encode(noise)
            self.ids[name] = [*(encode(tokenizer(name), text) for text in self.texts), spelled]
            self.tokens[name] = [[v[i] for i in row] for row in self.ids[name]]

    def starts(self, pair, k: int) -> tuple[int, ...]:
        return tuple(-int(name in DUMMY_SPACE and k < len(self.texts)) for name in pair)


@pytest.fixture(scope="module")
def corpus(tokenizer, vocabulary) -> Corpus:
    return Corpus(tokenizer, vocabulary)


def check_invariants(alignment: Alignment, student: Vocabulary, teacher: Vocabulary, student_ids, teacher_ids) -> None:
    """Spans increase and both sides of every chunk spell the same bytes, or are special tokens of one role."""
    last = [0, 0]
    for a, b, c, d in alignment.spans.tolist():
        assert a >= last[0], "student spans increase"
        assert c >= last[1], "teacher spans increase"
        assert b > a
        assert d > c
        last = [b, d]
        left, right = student_ids[a:b], teacher_ids[c:d]
        if student.kind(left[0]) == "special":
            assert (b - a, d - c) == (1, 1)
            assert teacher.kind(right[0]) == "special"
        else:
            assert student.decode(left) == teacher.decode(right)


def swapped(spans: torch.Tensor) -> list[list[int]]:
    return spans[:, [2, 3, 0, 1]].tolist()


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_real_texts_are_cut_finest(pair, corpus, vocabulary):
    student, teacher = pair
    for k, text in enumerate(corpus.texts):
        for name in pair:
            assert b"".join(corpus.tokens[name][k])[name in DUMMY_SPACE :] == text.encode()
    aligners = [Aligner(vocabulary(student), vocabulary(teacher), method) for method in ("auto", "bytes")]
    for aligner in aligners:
        alignment = aligner.align(corpus.ids[student], corpus.ids[teacher])
        for k in range(len(alignment)):
            spans = alignment.slice(k).spans.tolist()
            assert spans == finest_cut(corpus.tokens[student][k], corpus.tokens[teacher][k], corpus.starts(pair, k))
            if corpus.starts(pair, k) == (0, 0):
                covered = [sum(b - a for a, b, _, _ in spans), sum(d - c for _, _, c, d in spans)]
                assert covered == [len(corpus.ids[name][k]) for name in pair], "every token is aligned"


@pytest.mark.parametrize("pair", UNORDERED_PAIRS, ids="-".join)
def test_truncated_at_different_places(pair, corpus, vocabulary):
    """Either side ends early, each time at another place: chunks as far as both go, and none after.

    Not in the first few tokens: there is too little text to tell a dummy space from one that is meant."""
    rng = random.Random("-".join(pair))
    rows: list[list[list[int]]] = [[], []]
    expected = []
    for k in [*range(len(corpus.texts))] * 4:
        ends = [rng.randint(4, len(corpus.ids[name][k])) for name in pair]
        for side, name, end in zip(rows, pair, ends, strict=True):
            side.append(corpus.ids[name][k][:end])
        tokens = [corpus.tokens[name][k][:end] for name, end in zip(pair, ends, strict=True)]
        expected.append(finest_cut(*tokens, corpus.starts(pair, k)))
    alignment = Aligner(*map(vocabulary, pair)).align(*rows)
    for k, spans in enumerate(expected):
        assert alignment.slice(k).spans.tolist() == spans, rows[0][k]


@pytest.mark.parametrize("pair", UNORDERED_PAIRS, ids="-".join)
def test_one_edit_costs_its_neighbourhood(pair, corpus, tokenizer, vocabulary):
    text = " ".join(corpus.texts[:-2]) * 2
    at = list(range(len(text) // 3, 2 * len(text) // 3, 61))
    edits = [text[:m] + "XY" + text[m + 2 :] for m in at]
    edits += [text[:m] + text[m + 1 :] for m in at] + [text[:m] + " and" + text[m:] for m in at]
    student = [encode(tokenizer(pair[0]), text)] * len(edits)
    teacher = [encode(tokenizer(pair[1]), edit) for edit in edits]
    alignment = Aligner(*map(vocabulary, pair)).align(student, teacher)
    for k, (a, b) in enumerate(zip(student, teacher, strict=True)):
        spans = alignment.slice(k).spans.tolist()
        check_invariants(alignment.slice(k), vocabulary(pair[0]), vocabulary(pair[1]), a, b)
        unaligned = [len(a) - sum(s[1] - s[0] for s in spans), len(b) - sum(s[3] - s[2] for s in spans)]
        assert max(unaligned) <= 6, (unaligned, edits[k][at[k % len(at)] - 9 :][:20])


def test_a_byte_that_one_tokenizer_drops_costs_its_neighbourhood(tokenizer, vocabulary):
    text = "Some text with a \x06 control character, and more."
    ids = [encode(tokenizer(name), text) for name in ("llama3", "smollm2")]
    assert b"\x06" not in vocabulary("smollm2").decode(ids[1])
    spans = Aligner(vocabulary("llama3"), vocabulary("smollm2")).align(*ids).spans
    assert int((spans[:, 1] - spans[:, 0]).sum()) >= len(ids[0]) - 2


def unchanged_text(pair, text: str, tokenizer, vocabulary) -> tuple[list[int], list[int], list[list[int]]]:
    """Ids of both sides, and the chunks by definition: cut where a token ends on both sides at the same character of
    the text, by the tokenizers' own account; keep what reads the same on both sides."""
    ids, ends = [], []
    for name in pair:
        encoded = getattr(tokenizer(name), "backend_tokenizer", tokenizer(name)).encode(text, add_special_tokens=False)
        ids.append(encoded.ids)
        ends.append({0: 0} | {end: i + 1 for i, (_, end) in enumerate(encoded.offsets)})
    chunks = []
    for x, y in itertools.pairwise(sorted(ends[0].keys() & ends[1].keys())):
        (a, b), (c, d) = [(side[x], side[y]) for side in ends]
        if vocabulary(pair[0]).decode(ids[0][a:b]) == vocabulary(pair[1]).decode(ids[1][c:d]):
            chunks.append([a, b, c, d])
    return ids[0], ids[1], chunks


LOWERCASED = "The Cat sat on ONE mat, and Then it Ran to the other side of the House; nobody there Knew why."
COMPOSED = "ﬁrst ½ of the ﬁle, then a ＦＵＬＬ width word, x² and … an end with ﬁve ordinary words ①"


@needs_offsets
@pytest.mark.parametrize("teacher", REAL)
@pytest.mark.parametrize(("student", "text"), [("wordpiece", LOWERCASED), ("unigram", COMPOSED)])
def test_normalising_tokenizers(student, teacher, text, tokenizer, vocabulary):
    pair = (student, teacher)
    a, b, chunks = unchanged_text(pair, text, tokenizer, vocabulary)
    assert 12 < len(chunks) < 20
    v = [vocabulary(name) for name in pair]
    alignment = Aligner(*v).align(a, b)
    # A lone space beside a word that reads differently may pair with the space on its other side: nothing tells which.
    spaces, aligned_spaces = (
        [span for span in spans if v[0].decode(a[span[0] : span[1]]) == b" "]
        for spans in (chunks, alignment.spans.tolist())
    )
    assert [span for span in alignment.spans.tolist() if span not in aligned_spaces] == [
        chunk for chunk in chunks if chunk not in spaces
    ]
    assert len(aligned_spaces) == len(spaces)
    assert Aligner(v[1], v[0]).align(b, a).spans.tolist() == swapped(alignment.spans)


tokens = st.lists(st.text("ab", min_size=1, max_size=3), max_size=12)


@given(tokens, st.lists(st.integers(0, 36), max_size=12))
def test_merge_equals_the_definition(student, cuts):
    text = "".join(student)
    bounds = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    teacher = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert spans_of(student, teacher) == finest_cut([t.encode() for t in student], [t.encode() for t in teacher])


def spans_of(student: list[str], teacher: list[str], method: str = "bytes") -> list[list[int]]:
    """Aligns two sequences of strings, each its own vocabulary; a token in <> is special."""
    sides = []
    for side in (student, teacher):
        names = sorted(set(side))
        kinds = ["special" if name.startswith("<") else "normal" for name in names]
        sides.append((Vocabulary([n.encode() for n in names], kinds), [names.index(t) for t in side]))
    (s, s_ids), (t, t_ids) = sides
    alignment = Aligner(s, t, method).align(s_ids, t_ids)
    check_invariants(alignment, s, t, s_ids, t_ids)
    if method != "dp":  # the paper's order of ties is not symmetric
        assert Aligner(t, s, method).align(t_ids, s_ids).spans.tolist() == swapped(alignment.spans)
    return alignment.spans.tolist()


@given(st.sampled_from(["a", "ab", "é", "=", "\n", " ", "a "]), st.integers(1, 40), st.data())
def test_a_dummy_space_before_text_that_repeats_itself(unit, count, data):
    """Every stretch of such text looks like the one a character further on."""
    text = unit * count + data.draw(st.sampled_from(["", "!", " end"]))
    sides = []
    for whole in (f" {text}" if text[0] != " " else text, text):
        cuts = data.draw(st.sets(st.integers(1, len(whole))))
        sides.append([whole[a:b] for a, b in itertools.pairwise(sorted({0, len(whole), *cuts}))])
    expected = finest_cut(*([token.encode() for token in side] for side in sides), (-(text[0] != " "), 0))
    assert spans_of(*sides) == spans_of(*sides, "auto") == expected


@pytest.mark.parametrize("unit", ["a", "=", "é", "\n", " ", "ab"])
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_real_runs_of_a_character(name, unit, tokenizer, vocabulary):
    pair = ("mistral", name)
    texts = [unit * count + end for count in (10, 37, 200) for end in ("", ". The end.")]
    ids = [[encode(tokenizer(side), text) for text in texts] for side in pair]
    alignment = Aligner(*map(vocabulary, pair)).align(*ids)
    for k, text in enumerate(texts):
        tokens = [[vocabulary(side)[i] for i in row[k]] for side, row in zip(pair, ids, strict=True)]
        starts = [len(text.encode()) - len(b"".join(side)) for side in tokens]
        assert starts == [-1, 0] or unit == " "
        assert alignment.slice(k).spans.tolist() == finest_cut(*tokens, tuple(starts))


@given(st.lists(st.text("ab", max_size=2), max_size=12), st.lists(st.text("ab", max_size=2), max_size=12))
def test_any_two_sequences_give_valid_symmetric_chunks(student, teacher):
    merged = spans_of(student, teacher)
    bridged = spans_of(student, teacher, "auto")
    assert all(span in bridged for span in merged), "auto only adds chunks to those of the byte merge"
    spans_of(student, teacher, "dp")


texts_and_specials = st.lists(st.sampled_from(["a", "b", "ab", "ba", "", "<x>", "<y>"]), max_size=12)


@given(texts_and_specials, texts_and_specials)
def test_one_vocabulary_on_both_sides_is_symmetric_too(student, teacher):
    names = ["a", "b", "ab", "ba", "", "<x>", "<y>"]
    v = Vocabulary([n.encode() for n in names], ["special" if n.startswith("<") else "normal" for n in names])
    ids = [[names.index(token) for token in side] for side in (student, teacher)]
    for method in ("auto", "bytes"):
        aligner = Aligner(v, v, method)
        assert aligner.align(ids[1], ids[0]).spans.tolist() == swapped(aligner.align(*ids).spans)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        pytest.param(["the"], ["theory", "the"], [], id="a truncated token does not match a later one"),
        pytest.param(
            ["In", "\n", "In", "x"], ["In", "In", "z"], [[0, 1, 0, 1], [2, 3, 1, 2]], id="too little text to resume"
        ),
        pytest.param(["The", " Cat", " sat"], ["the", " cat", " sat"], [[2, 3, 2, 3]], id="lower case"),
        pytest.param(["u", "ab", "v"], ["w", "a", "b", "x"], [[1, 2, 1, 3]], id="a combination between edits"),
        pytest.param(["a", "bc"], ["ab", "c"], [[0, 2, 0, 2]], id="many to many stays with the merge"),
    ],
)
def test_auto_bridges_disagreements(student, teacher, expected):
    assert spans_of(student, teacher, "auto") == expected


def test_dp_knows_no_many_to_many_chunks():
    assert spans_of(["x", "a", "bc"], ["x", "ab", "c"], "dp") == [[0, 1, 0, 1]]
    assert spans_of(["abcd"], ["a", "b", "c", "d"], "dp") == [[0, 1, 0, 4]]
    assert spans_of(["abcde"], ["a", "b", "c", "d", "e"], "dp") == []


def test_budget_of_the_dynamic_program():
    rng = random.Random(2)
    student, teacher = [[rng.randrange(2) for _ in range(3000)] for _ in range(2)]
    v = Vocabulary([b"a", b"b"])
    exact, cut = (Aligner(v, v, "dp", cell_budget=budget).align(student, teacher) for budget in (None, 20_000))
    assert exact.optimal.tolist() == [True]
    assert cut.optimal.tolist() == [False]
    check_invariants(cut, v, v, student, teacher)
    assert exact.num_chunks >= cut.num_chunks > 1000


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        pytest.param([], [], [], id="both empty"),
        pytest.param(["a"], [], [], id="one empty"),
        pytest.param(["ab"], ["a", "b"], [[0, 1, 0, 2]], id="one to two"),
        pytest.param(["a", "bc"], ["ab", "c"], [[0, 2, 0, 2]], id="many to many"),
        pytest.param(["<s>", "hello"], ["hello"], [[1, 2, 0, 1]], id="one-sided bos"),
        pytest.param(["<s>", "hi"], ["<s>", "hi"], [[0, 1, 0, 1], [1, 2, 1, 2]], id="equal specials"),
        pytest.param([" ", "hello"], ["hello"], [[1, 2, 0, 1]], id="dummy space apart"),
        pytest.param([" hello", " world"], ["hello", " world"], [[1, 2, 1, 2]], id="dummy space inside"),
        pytest.param(["ab", "c"], ["ab", "cd", "e"], [[0, 1, 0, 1]], id="truncated inside a token"),
        pytest.param(["the"], ["theory", "the"], [], id="a truncated token does not match a later one"),
        pytest.param(
            ["bcd", "ef", "gh"],
            ["a", "bcd", "ef", "gh"],
            [[0, 1, 1, 2], [1, 2, 2, 3], [2, 3, 3, 4]],
            id="cut in front",
        ),
        pytest.param(["", "a", "b"], ["a", "", "b"], [[1, 2, 0, 1], [2, 3, 2, 3]], id="empty tokens stay alone"),
        pytest.param(["see", " cat", " run"], ["see", " dog", " run"], [[0, 1, 0, 1], [2, 3, 2, 3]], id="one edit"),
        pytest.param(["a", "<x>", "b"], ["ab"], [], id="a special inside a token"),
        pytest.param(["end", "<e>"], ["ending", " late", "<e>"], [[1, 2, 2, 3]], id="truncated before eos"),
    ],
)
def test_small_cases(student, teacher, expected):
    assert spans_of(student, teacher) == expected


def test_distant_agreement_is_found():
    rng = random.Random(0)
    words = [f" w{i}" for i in range(2000)]
    noise = ["".join(rng.choice("abcdef") for _ in range(4)) for _ in range(700)]
    student, teacher = words, words[:900] + noise + words[900:]
    spans = spans_of(student, teacher)
    assert len(spans) == len(words)
    assert spans[-1] == [1999, 2000, 2699, 2700]


def test_hostile_input_stays_near_linear():
    rng = random.Random(1)
    sides = [[rng.choice("ab") for _ in range(60_000)] for _ in range(2)]
    v = Vocabulary([b"a", b"b"])
    ids = [["ab".index(t) for t in side] for side in sides]
    started = time.process_time()
    alignment = Aligner(v, v, "bytes").align(*ids)
    assert time.process_time() - started < 5
    assert alignment.num_chunks > 1000
    check_invariants(alignment, v, v, *ids)


def test_roles_pair_whatever_their_text(tokenizer, vocabulary):
    aligner = Aligner(vocabulary("llama3"), vocabulary("qwen3"))
    student = encode(tokenizer("llama3"), "<|begin_of_text|>Yes, 42.<|eot_id|>")
    teacher = encode(tokenizer("qwen3"), "Yes, 42.<|im_end|>")
    alignment = aligner.align(student, teacher)
    assert alignment.spans[0].tolist() == [1, 2, 0, 1]
    assert alignment.spans[-1].tolist() == [len(student) - 1, len(student), len(teacher) - 1, len(teacher)]
    assert bool(alignment.exact[-1])
    assert alignment.predicted.tolist() == [False] + [True] * (alignment.num_chunks - 1)


@pytest.fixture
def toy() -> Aligner:
    student = Vocabulary([b"<s>", b"</s>", b"a", b"b", b"ab", b"<pad>"], roles={"bos": 0, "eos": 1, "pad": 5})
    teacher = Vocabulary([b"</s>", b"a", b"b", b"c"], roles={"eos": 0, "pad": 0})
    return Aligner(student, teacher)


def test_batches_of_every_form_agree(toy):
    student = [[0, 4, 2, 1], [0, 2, 5, 5], [5, 5, 5, 5]]
    teacher = [[1, 2, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    expected = [[1, 2, 0, 2], [2, 3, 2, 3], [3, 4, 3, 4], [1, 2, 0, 1]]
    forms = [
        (student, teacher),
        (np.array(student, dtype=np.int32), np.array(teacher)),
        (torch.tensor(student), torch.tensor(teacher, dtype=torch.int32)),
        ([torch.tensor(s) for s in student], [np.array(t) for t in teacher]),
        ([s[: len(s) - s.count(5)] for s in student], teacher),
    ]
    for form in forms:
        alignment = toy.align(*form)
        assert alignment.spans.tolist() == expected
        assert alignment.offsets.tolist() == [0, 3, 4, 4]
    assert alignment.student_ids.tolist() == [[0, 4, 2, 1], [0, 2, -1, -1], [-1] * 4]
    assert toy.align(student[0], teacher[0]).spans.tolist() == expected[:3]


def test_padding_with_the_end_token_keeps_one_end(toy):
    alignment = toy.align([0, 2, 1], [1, 0, 0, 0])
    assert alignment.spans.tolist() == [[1, 2, 0, 1], [2, 3, 1, 2]]


def test_masks(toy):
    student, teacher = [[2, 3, 2, 3]], [[1, 2, 1, 2]]
    alignment = toy.align(student, teacher, student_mask=[[1, 1, 0, 0]])
    assert alignment.spans.tolist() == [[0, 1, 0, 1], [1, 2, 1, 2]]
    left = toy.align(student, teacher, [[0, 0, 1, 1]], torch.tensor([[False, False, True, True]]))
    assert left.spans.tolist() == [[2, 3, 2, 3], [3, 4, 3, 4]]
    assert left.predicted.tolist() == [False, True]  # the row before the first token is padding
    hole = toy.align([[2, 5, 3]], [[1, 2]], [[1, 0, 1]])
    assert hole.spans.tolist() == [[0, 1, 0, 1], [2, 3, 1, 2]]
    assert hole.predicted.tolist() == [False, False]
    assert toy.align([[4, 5]], [[1, 2]], [[1, 0]]).spans.tolist() == [[0, 1, 0, 2]]
    inside = toy.align([[2, 3]], [[1, 3, 2]], None, [[1, 0, 1]])
    assert inside.spans.tolist() == [[0, 1, 0, 1], [1, 2, 2, 3]]
    straddling = toy.align([[4]], [[1, 3, 2]], None, [[1, 0, 1]])
    assert straddling.num_chunks == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_tokenizers_return(side, tokenizer):
    """A BatchEncoding and the encodings of `tokenizers`, padded or not, give what their ids do."""
    from transformers import PreTrainedTokenizerFast

    texts = ["In 1995, 1,024 readers paid.", "They weren't sorry, were they?"]
    toks = [tokenizer(name) for name in ("llama3", "qwen3")]
    backends = [getattr(tok, "backend_tokenizer", tok) for tok in toks]
    pads = ("<|end_of_text|>", "<|endoftext|>")
    wrapped = [
        PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, padding_side=side)
        for backend, pad in zip(backends, pads, strict=True)
    ]
    aligner = Aligner(*toks)
    plain = aligner.align(*([backend.encode(text).ids for text in texts] for backend in backends))
    forms = [
        [tok(texts) for tok in wrapped],
        [tok(texts, padding=True, return_tensors="pt") for tok in wrapped],
        [dict(tok(texts, padding=True, return_tensors="np")) for tok in wrapped],
        [backend.encode_batch(texts) for backend in backends],
    ]
    for form in forms:
        alignment = aligner.align(*form)
        assert alignment.exact.tolist() == plain.exact.tolist()
        assert alignment.offsets.tolist() == plain.offsets.tolist()
    one = aligner.align(*(backend.encode(texts[0]) for backend in backends))
    assert one.spans.tolist() == aligner.align(*(tok(texts[0]) for tok in wrapped)).spans.tolist()
    assert one.spans.tolist() == plain.spans[: plain.offsets[1]].tolist()
    assert aligner.truncate(*forms[1], 5, 5).student_ids.shape[1] <= 5
    with pytest.raises(ValueError, match="ids: expected a mapping with input_ids, got texts"):
        aligner.align({"texts": texts}, forms[0][1])


def test_masked_ids_are_not_looked_at(toy):
    assert toy.align([[2, -100]], [[1, 999]], [[1, 0]], [[1, 0]]).num_chunks == 1


def test_threads_do_not_change_the_result_and_release_the_gil(tokenizer, vocabulary):
    student = encode(tokenizer("llama3"), " ".join(TEXTS.values()))
    teacher = encode(tokenizer("qwen3"), " ".join(TEXTS.values()))
    copies = 4000
    aligners = [Aligner(vocabulary("llama3"), vocabulary("qwen3"), num_threads=n) for n in (1, 2, 5)]
    ragged = [
        [student[: len(student) - k % 7] for k in range(copies)],
        [teacher[: len(teacher) - k % 5] for k in range(copies)],
    ]
    results = [aligner.align(*ragged) for aligner in aligners]
    for other in results[1:]:
        assert torch.equal(results[0].spans, other.spans)
        assert torch.equal(results[0].offsets, other.offsets)
        assert torch.equal(results[0].predicted, other.predicted)

    beats, stop = [0], threading.Event()

    def beat() -> None:
        while not stop.is_set():
            beats[0] += 1
            time.sleep(0.0005)

    def beats_of_a_call() -> int:
        before = beats[0]
        aligners[0].align(*ids)
        return beats[0] - before

    thread = threading.Thread(target=beat)
    ids = [torch.tensor(side).repeat(60_000 // len(side) * len(side)) for side in (student, teacher)]
    thread.start()
    # If the call held the GIL, the thread would run only as it begins and ends. A busy machine may need several calls.
    released = any(beats_of_a_call() > 5 for _ in range(20))
    stop.set()
    thread.join()
    assert released


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory, which refuses threads on Linux")
def test_threads_that_the_system_refuses_are_done_without():
    """There is room for the stacks of some of them; a machine with fewer threads has no limit to meet."""
    script = (
        "import resource, torch, xtoken\n"
        "S = xtoken.Vocabulary([b'a', b'b'])\n"
        "ids = torch.randint(2, (600, 4000))\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)\n"
        "alignment = xtoken.Aligner(S, S, num_threads=600).align(ids, ids)\n"
        "assert alignment.spans[:, 0].tolist() == [*range(4000)] * 600\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_empty_inputs(toy):
    assert toy.align([], []).spans.shape == (0, 4)
    assert len(toy.align([], [])) == 1
    empty = toy.align(torch.zeros(0, 7, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long))
    assert len(empty) == 0
    assert empty.num_chunks == 0
    assert len(toy.align([[], []], [[], [1]])) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            ([6], [1]),
            ValueError,
            r"student_ids: token id 6 at sample 0, position 0 is outside the vocabulary of 6",
        ),
        (([[2], [2]], [[1], [-3]]), ValueError, r"teacher_ids: token id -3 at sample 1, position 0"),
        (([2**40], [1]), ValueError, "student_ids: token id 1099511627776"),
        (([[2]], [[1], [1]]), ValueError, "teacher_ids: expected 1 samples"),
        (([2], [[1]]), ValueError, "teacher_ids: expected one sample or a batch"),
        (([2.5], [1]), TypeError, "student_ids: expected integers"),
        (
            (torch.zeros(1, 1, 1, dtype=torch.long), [1]),
            ValueError,
            r"student_ids: expected shape \[T\] or \[B, T\]",
        ),
        (([2], [1], [1, 1]), ValueError, "student_mask: expected the shape of student_ids"),
    ],
)
def test_bad_ids(arguments, error, match, toy):
    with pytest.raises(error, match=match):
        toy.align(*arguments)


def test_truncate(toy):
    student, teacher = [[0, 4, 2, 3, 1], [2, 3, 2]], [[1, 2, 1, 2, 0], [1, 2, 1]]
    cut = toy.truncate(student, teacher, 4, 3)
    assert cut.student_ids.tolist() == [[0, 4, 2], [2, 3, 2]]
    assert cut.teacher_ids.tolist() == [[1, 2, 1], [1, 2, 1]]
    assert cut.spans.tolist() == [[1, 2, 0, 2], [2, 3, 2, 3], [0, 1, 0, 1], [1, 2, 1, 2], [2, 3, 2, 3]]
    assert cut.offsets.tolist() == [0, 2, 5]
    assert toy.truncate(student[0], teacher[0], 1, 9).student_ids.tolist() == []
    whole = toy.truncate(student[0], teacher[0], 5, 5)
    assert whole.student_ids.tolist() == student[0]
    assert whole.spans.tolist() == toy.align(student[0], teacher[0]).spans.tolist()
    assert len(toy.truncate(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long), 1, 1)) == 0
    with pytest.raises(ValueError, match="max_student_length, max_teacher_length: expected at least 0"):
        toy.truncate(student, teacher, -1, 3)
    for limits in ((2.5, 3), (3, float("nan")), (True, True)):
        with pytest.raises(TypeError, match="max_student_length, max_teacher_length: expected integers"):
            toy.truncate(student, teacher, *limits)


@pytest.mark.parametrize("limit", [1, 7, 20, 33])
def test_truncated_sides_spell_the_same_text(limit, tokenizer, vocabulary):
    aligner = Aligner(vocabulary("llama3"), vocabulary("qwen3"))
    texts = list(TEXTS.values())
    sides = [[encode(tokenizer(name), text) for text in texts] for name in ("llama3", "qwen3")]
    cut = aligner.truncate(*sides, limit, limit)
    for k, text in enumerate(texts):
        student, teacher = ([i for i in ids[k].tolist() if i >= 0] for ids in (cut.student_ids, cut.teacher_ids))
        assert max(len(student), len(teacher)) <= limit
        assert aligner.student.decode(student) == aligner.teacher.decode(teacher)
        assert text.encode().startswith(aligner.student.decode(student))


def test_bad_options(toy):
    with pytest.raises(ValueError, match="method: expected one of"):
        Aligner(toy.student, toy.teacher, "magic")
    with pytest.raises(ValueError, match="cell_budget: expected at least 0, got -1"):
        Aligner(toy.student, toy.teacher, cell_budget=-1)
    with pytest.raises(ValueError, match="num_threads: expected at least 1"):
        Aligner(toy.student, toy.teacher, num_threads=0)
    for name in ("cell_budget", "num_threads"):
        with pytest.raises(TypeError, match=f"{name}: expected integers"):
            Aligner(toy.student, toy.teacher, **{name: 2.5})


def test_fold_space_punctuation():
    student, teacher = Vocabulary([b"a", b" ,", b" ,b"]), Vocabulary([b"a", b","])
    assert Aligner(student, teacher).align([0, 1], [0, 1]).num_chunks == 1
    folding = Aligner(student, teacher, fold_space_punctuation=True)
    assert folding.align([0, 1], [0, 1]).spans.tolist() == [[0, 1, 0, 1], [1, 2, 1, 2]]
    assert folding.align([0, 2], [0, 1]).num_chunks == 1


def test_alignment_from_spans():
    alignment = Alignment(spans=[[0, 1, 0, 1], [1, 3, 1, 2], [0, 2, 1, 2]], offsets=[0, 2, 3])
    assert len(alignment) == 2
    assert alignment.exact.tolist() == [True, False, False]
    assert alignment.predicted.tolist() == [False, True, False]
    assert alignment.sample_index.tolist() == [0, 0, 1]
    assert alignment.spans.dtype == torch.int32
    assert alignment.offsets.dtype == torch.int64
    assert alignment.chunk_ids().tolist() == [[0, 1, 1], [2, 2, -1]]
    assert alignment.chunk_ids("teacher", 4).tolist() == [[0, 1, -1, -1], [-1, 2, -1, -1]]
    assert alignment.to("cpu").spans.tolist() == alignment.spans.tolist()
    assert alignment.to("meta").spans.device.type == "meta"
    second = alignment.slice(1)
    assert second.spans.tolist() == [[0, 2, 1, 2]]
    assert second.predicted.tolist() == [False]
    joined = Alignment.cat([second, alignment])
    assert joined.offsets.tolist() == [0, 1, 3, 4]
    assert Alignment(spans=[]).chunk_ids(length=2).tolist() == [-1, -1]
    assert "chunks=3" in repr(alignment)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Alignment([[0, 1, 0]]), r"spans: expected shape \[K, 4\]"),
        (lambda: Alignment([[0, 0, 0, 1]]), "spans: chunk 0"),
        (lambda: Alignment([[-1, 1, 0, 1]]), "spans: chunk 0"),
        (lambda: Alignment([[0, 2, 0, 1], [1, 3, 1, 2]]), "spans: chunk 1 .* goes backwards"),
        (lambda: Alignment([[2, 3, 2, 3], [3, 4, 0, 1]]), "spans: chunk 1"),
        (
            lambda: Alignment([[0, 1, 0, 1]], offsets=[0, 2]),
            "offsets: expected a non-decreasing sequence from 0 to 1",
        ),
        (lambda: Alignment([[0, 1, 0, 1]], offsets=[]), r"offsets: expected shape \[B \+ 1\]"),
        (lambda: Alignment([[0, 1, 0, 1]], student_ids=[[1]]), r"student_ids: expected shape \[T\]"),
        (
            lambda: Alignment([[0, 1, 0, 1]], offsets=[0, 1], teacher_ids=[1]),
            r"teacher_ids: expected shape \[1, T\]",
        ),
        (lambda: Alignment([[0, 1, 0, 1]], predicted=[True, True]), r"predicted: expected shape \[1\]"),
        (lambda: Alignment([]).chunk_ids("left"), "side: expected 'student' or 'teacher'"),
        (lambda: Alignment([[0, 2, 0, 1]]).chunk_ids(length=1), "length: chunks reach token 2"),
        (lambda: Alignment([]).slice(1), "slice: expected 0 <= start"),
        (lambda: Alignment.cat([]), "alignments: expected at least one"),
        (
            lambda: Alignment([]).pretty(Vocabulary([]), Vocabulary([])),
            "pretty: this alignment carries no token ids",
        ),
    ],
)
def test_bad_alignments(make, match):
    with pytest.raises(ValueError, match=match):
        make()
    with pytest.raises(TypeError, match="spans: expected integers"):
        Alignment([[0.0, 1.0, 0.0, 1.0]])


def test_supervised_by_definition():
    """A chunk counts if each of its tokens is labelled, on both sides if both have labels."""
    rng = random.Random(0)
    for _ in range(40):
        spans, offsets, lengths = [], [0], [0, 0]
        for _ in range(3):
            ends = [0, 0]
            for _ in range(rng.randrange(5)):
                starts = [end + rng.randrange(2) for end in ends]
                ends = [start + rng.randint(1, 3) for start in starts]
                spans.append([starts[0], ends[0], starts[1], ends[1]])
            offsets.append(len(spans))
            lengths = [max(length, end) for length, end in zip(lengths, ends, strict=True)]
        labels, others = (
            torch.tensor([[rng.choice([-100, 0, 7, 7]) for _ in range(length + 2)] for _ in range(3)])
            for length in lengths
        )
        alignment = Alignment(spans, offsets, predicted=[rng.random() < 0.8 for _ in spans])
        seen = alignment.predicted.tolist()
        rows = [(k, b, c) for k, (b, c) in enumerate(itertools.pairwise(offsets))]
        own, both = [], []
        for sample, first, last in rows:
            for n in range(first, last):
                a, b, c, d = spans[n]
                own.append(seen[n] and -100 not in labels[sample, a:b].tolist())
                both.append(own[n] and -100 not in others[sample, c:d].tolist())
        assert alignment.supervised(labels).predicted.tolist() == own
        assert alignment.supervised(labels, others.int()).predicted.tolist() == both
        assert alignment.supervised(labels).supervised(labels.numpy()).predicted.tolist() == own
        assert alignment.predicted.tolist() == seen
        one = alignment.slice(1)
        assert one.supervised(labels[1]).predicted.tolist() == own[offsets[1] : offsets[2]]
        parts = [alignment.slice(k).supervised(labels[k].tolist()) for k in range(3)]
        assert Alignment.cat(parts).predicted.tolist() == own


def test_the_first_token_of_a_completion_is_supervised(toy):
    """Its row stands in the prompt, so a mask of the aligner would lose it; a chunk that straddles is the prompt's."""
    student, teacher = Vocabulary([b"In", b" 199", b"5", b" ok"]), Vocabulary([b"In", b" ", b"1", b"9", b"5", b"ok"])
    ids, theirs = [[0, 1, 2, 3]], [[0, 1, 2, 3, 3, 4, 1, 5]]
    alignment = Aligner(student, teacher).align(ids, theirs)
    assert alignment.spans.tolist() == [[0, 1, 0, 1], [1, 2, 1, 5], [2, 3, 5, 6], [3, 4, 6, 8]]
    labels = torch.tensor([[-100, -100, 2, 3]])
    assert alignment.supervised(labels).predicted.tolist() == [False, False, True, True]
    masked = Aligner(student, teacher).align(ids, theirs, labels != -100, [[0] * 5 + [1] * 3])
    assert masked.predicted.tolist() == [False, True]
    their_labels = torch.tensor([[-100] * 6 + [1, -100]])
    assert alignment.supervised(labels, their_labels).predicted.tolist() == [False] * 4
    wide = Alignment([[1, 4, 1, 2]])
    for label in ([-100, -100, 1, 1], [-100, 1, -100, 1], [-100, 1, 1, -100]):
        assert wide.supervised(label).predicted.tolist() == [False]
    assert wide.supervised([-100, 1, 1, 1]).predicted.tolist() == [True]
    assert Alignment([]).supervised([]).predicted.tolist() == []


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ((torch.zeros(3, 4, dtype=torch.int64),), ValueError, r"labels: expected shape \[2, T\], got \[3, 4\]"),
        ((torch.zeros(4, dtype=torch.int64),), ValueError, r"labels: expected shape \[2, T\], got \[4\]"),
        (([[0, 0], [0, 0]],), ValueError, r"labels: expected a label for every token .*chunk 1 ends at token 3.*got 2"),
        ((torch.zeros(2, 4),), TypeError, "labels: expected integers, got torch.float32"),
        ((torch.ones(2, 4, dtype=torch.bool),), TypeError, "labels: expected integers, got torch.bool"),
        (([[0] * 4] * 2, [[0]] * 2), ValueError, r"teacher_labels: expected a label .*chunk 1 ends at token 2.*got 1"),
        (([[0] * 4] * 2, [0, 0]), ValueError, r"teacher_labels: expected shape \[2, T\], got \[2\]"),
    ],
)
def test_bad_labels(labels, error, message):
    alignment = Alignment([[0, 1, 0, 1], [1, 3, 1, 2], [0, 2, 0, 1]], [0, 2, 3])
    with pytest.raises(error, match=message):
        alignment.supervised(*labels)
    with pytest.raises(ValueError, match=r"labels: expected shape \[T\] or \[1, T\], got \[2, 3\]"):
        alignment.slice(0).supervised([[0] * 3] * 2)


def test_pretty():
    student = Vocabulary([b"<s>", b"In", b" 2024", b"\n\xe4"], roles={"bos": 0})
    teacher = Vocabulary([b"In", b" ", b"20", b"24", b"\n", b"\xe4"])
    alignment = Aligner(student, teacher).align([[0, 1, 2, 3]], [[0, 1, 2, 3, 4, 5]])
    assert alignment.pretty(student, teacher, color=False).splitlines() == [
        "(<s>) In ·2024   \\n\\xe4 ",
        "      In ·|20|24 \\n|\\xe4",
    ]
    colored = alignment.pretty(student, teacher)
    assert "\x1b[" in colored
    assert len(alignment.pretty(student, teacher, color=False, width=12).splitlines()) > 2


def test_pretty_shows_brackets_of_tokens_in_no_chunk():
    vocabulary = Vocabulary([b"f", b"()", b"g("])
    drawn = Alignment([[0, 1, 0, 1]], None, [0, 1, 2], [0]).pretty(vocabulary, vocabulary, color=False)
    assert drawn.splitlines() == ["f (()|g()", "f        "]
