"""The coverage audit: known answers on real vocabularies, classes, weights, errors."""

from __future__ import annotations

import json
import re

import pytest
from old_versions import needs_mistral
from small_tokenizers import byte_level

from xtoken import Aligner, PieceIndex, ProjectionMatrix, Vocabulary, choose_loss, coverage_audit
from xtoken.audit import CLASSES, token_class
from xtoken.cli import main
from xtoken.report.pair import LONGEST, aligned


@pytest.mark.parametrize(
    ("teacher", "two", "three", "recommendation"), [("qwen3", 0, 0, "pkl"), ("o200k", 100, 1000, "hkl")]
)
def test_known_answers(teacher, two, three, recommendation, vocabulary):
    report = coverage_audit(vocabulary("llama3"), vocabulary(teacher))
    digits = report.classes["digits_2"], report.classes["digits_3"]
    assert [row.count for row in digits] == [100, 1000]
    assert [row.exact for row in digits] == [two, three]
    repeated = 10 if recommendation == "pkl" else 0  # "77" is projected onto "7" alone
    assert [row.split for row in digits] == [100 - two - repeated, 1000 - three - repeated]
    assert report.classes["digits_1"].exact == 10
    assert report.recommendation == recommendation
    assert sum(row.count for row in report.classes.values()) == 128256
    assert report.classes["invalid_utf8"].count == 1352
    assert f"digits_3: {three:,} of 1,000 tokens are in GOLD's common set" in report.reasons[2]


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (b"7", "digits_1"),
        (b" 7", "digits_1"),
        (b"42", "digits_2"),
        (b"123", "digits_3"),
        (b"12345", "digits_4_or_more"),
        (b" the", "ascii_letters"),
        (b"x1", "ascii_letters"),
        (b"'s", "ascii_letters"),
        (b"();\n", "ascii_punctuation"),
        (b"1.", "ascii_punctuation"),
        (b" ", "white_space"),
        (b"\t\n", "white_space"),
        (b"", "white_space"),
        ("\u00a0".encode(), "white_space"),
        ("é".encode(), "other_scripts"),
        (" 知识".encode(), "other_scripts"),
        ("😀".encode(), "other_multi_byte"),
        ("٢".encode(), "other_multi_byte"),
        (b"\xe4", "invalid_utf8"),
    ],
)
def test_classes(token, name):
    assert token_class(token, True) == name
    assert token_class(token, False) == "special"
    assert name in CLASSES


@pytest.fixture
def pair() -> tuple[Vocabulary, Vocabulary]:
    student = Vocabulary([b"1", b"12", b"a", b"ab", b"<s>", b"\xff"], roles={"bos": 4})
    return student, Vocabulary([b"1", b"2", b"a", b"b"])


def test_report(pair):
    report = coverage_audit(*pair)
    assert report.recommendation == "pkl"
    row = report.classes["digits_2"]
    assert (row.count, row.exact, row.common, row.split, row.unmapped) == (
        1,
        0,
        0,
        1,
        0,
    )  # "1" itself is nearer to "1"
    letters = report.classes["ascii_letters"]
    assert (letters.count, letters.exact, letters.split) == (2, 1, 1)
    assert report.classes["special"].unmapped == 1
    assert report.classes["invalid_utf8"].share("unmapped") == 1.0
    assert report.classes["digits_3"].share("exact") == 1.0  # nothing to lose
    lines = str(report).splitlines()
    assert lines[2].split() == ["digits_2*", "1", "0.0%", "0.0%", "100.0%", "0.0%"]
    assert "the paper's rule: pkl" in lines
    parsed = json.loads(report.to_json())
    assert parsed["recommendation"] == "pkl"
    assert parsed["classes"]["digits_2"]["count"] == 1


@pytest.mark.parametrize(
    ("critical", "learn", "loss", "paper", "reason"),
    [
        ("digits_1", False, "hkl", "hkl", "the critical tokens keep their partners"),
        ("digits_2", False, "prefix", "pkl", "prefix KL ends above P-KL"),
        ("digits_2", True, "pkl", "pkl", "the one whose W can be trained"),
        ("digits_1", True, "hkl", "hkl", "the critical tokens keep their partners"),
    ],
)
def test_choice(pair, critical, learn, loss, paper, reason):
    """The paper's rule, but for the loss that it takes where critical tokens are lost."""
    choice = choose_loss(*pair, critical=critical, learn_projection=learn)
    assert (choice.loss, choice.paper) == (loss, paper)
    assert choice.report == coverage_audit(*pair, critical=critical)
    assert reason in choice.reasons[-1]
    assert str(choice).startswith(str(choice.report))
    assert f"\nrecommended loss: {loss}\n  " in str(choice)
    facts = json.loads(choice.to_json())
    assert (facts["loss"], facts["recommendation"], facts["loss_reasons"]) == (loss, paper, list(choice.reasons))
    assert choose_loss(*pair, report=choice.report).loss == {"pkl": "prefix"}.get(paper, paper)


@pytest.mark.parametrize(("differing", "loss"), [(9, "hkl"), (10, "hkl"), (11, "prefix")])
def test_choice_where_the_cut_differs(pair, differing, loss):
    """H-KL is for pairs that cut text alike, whatever the paper's rule says; but W is trained where it says so."""
    facts = json.dumps({"texts": 1, "bytes": 1, "chunks": 1000, "differing": differing, "left": 0, "groups": []})
    built = PieceIndex.build(*pair, texts=())
    pieces = PieceIndex(built.data, {**built.metadata, "calibration": facts})
    choice = choose_loss(*pair, critical="digits_1", pieces=pieces)
    assert (choice.loss, choice.paper) == (loss, "hkl")
    assert ("1.1 % of the chunks" in choice.reasons[0]) == (loss == "prefix")
    assert choose_loss(*pair, critical="digits_1", pieces=pieces, learn_projection=True).loss == "hkl"


def test_choice_for_a_shared_tokenizer(pair):
    choice = choose_loss(pair[0], Vocabulary([pair[0][i] for i in range(len(pair[0]))]))
    assert (choice.loss, choice.paper, choice.report) == ("kd", None, None)
    assert str(choice) == "recommended loss: kd\n  teacher and student share one tokenizer"
    assert json.loads(choice.to_json())["loss"] == "kd"
    assert choose_loss(pair[0], pair[0], report=coverage_audit(pair[0], pair[0])).paper == "hkl"


def test_critical_classes_and_expressions(pair):
    assert coverage_audit(*pair, critical="digits_1").recommendation == "hkl"
    assert coverage_audit(*pair, critical=["ascii_letters"]).recommendation == "pkl"
    assert coverage_audit(*pair, critical=re.compile("a+")).recommendation == "hkl"
    report = coverage_audit(*pair, critical="a.?")
    assert report.recommendation == "pkl"
    assert report.classes["critical"].count == 2


def test_corpus_weights(tokenizer, vocabulary):
    report = coverage_audit(vocabulary("llama3"), vocabulary("qwen3"), corpus=["In 2024 and 7", "1234"])
    assert report.weighted
    assert report.classes["digits_3"].count == 2  # 202, 123
    assert report.classes["digits_1"].count == 3  # 4, 7, 4
    assert report.classes["digits_3"].exact == 0
    assert report.classes["digits_2"].count == 0


def test_a_tokenizer_that_cuts_and_pads_is_shown_whole_texts(tmp_path, capsys):
    """As many files of tokenizers on the Hub tell it to."""
    text = "the value of the name " * 600
    made = byte_level(300, [text])
    count = len(made.encode(text).ids)
    made.enable_truncation(3)
    made.enable_padding(length=5000)
    report = coverage_audit(made, byte_level(280, [text]), corpus=[text] * 3)
    assert sum(row.count for row in report.classes.values()) == 3 * count
    shown = aligned(Aligner(made, made), "text", text)
    assert "".join("".join(chunk.student) for chunk in shown.chunks) == text[:LONGEST]
    made.save(str(tmp_path / "tokenizer.json"))
    assert main(["show", "--student", str(tmp_path), "--teacher", str(tmp_path), "the value", "--json"]) == 0
    assert "".join(json.loads(capsys.readouterr().out)["student_tokens"]) == "the value"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"critical": ["digits_9"]}, "critical: unknown classes"),
        ({"critical": "("}, "no regular expression"),
        ({"critical": "zzz"}, "matches no token"),
        ({"corpus": ["a"]}, "corpus: the student's vocabulary has no tokenizer"),
        ({"projection": ProjectionMatrix.from_topk([[0]], [[1.0]], 4)}, r"projection: expected shape \[6, 4\]"),
        ({"projection": ProjectionMatrix.build(Vocabulary([b"x"] * 6), Vocabulary([b"1", b"2", b"a", b"b"]))},
         "projection: built for another student tokenizer"),
    ],
)  # fmt: skip
def test_bad_input(arguments, match, pair):
    with pytest.raises(ValueError, match=match):
        coverage_audit(*pair, **arguments)


def test_one_text_is_no_corpus(pair):
    with pytest.raises(TypeError, match="corpus: expected several texts, got one str"):
        coverage_audit(*pair, corpus="2024")


@needs_mistral
def test_command(tokenizer, tmp_path, capsys):
    files = [str(tmp_path / f"{name}.json") for name in ("smollm2", "mistral")]
    for name, file in zip(("smollm2", "mistral"), files, strict=True):
        tokenizer(name).backend_tokenizer.save(file)
    assert main(["audit", "--student", files[0], "--teacher", files[1], "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["recommendation"], facts["loss"]) == ("hkl", "prefix")  # white space is cut differently
    assert main(["audit", "--student", files[0], "--teacher", files[1], "--critical", "special"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("\nthe paper's rule: pkl\n") < printed.index("\nrecommended loss: prefix\n")


def test_byte_tokens_of_a_text_that_another_token_has_do_not_count(vocabulary):
    """SentencePiece has "<0x31>" beside "1"; only that is ever written, so it is the one that needs a partner."""
    student = Vocabulary([b"1", b"2", b"1", b"\xe4", b"a"], kinds=["byte", "byte", "normal", "byte", "normal"])
    report = coverage_audit(student, Vocabulary([b"a", b"1"]))
    facts = {name: (row.count, row.exact) for name, row in report.classes.items() if row.count}
    assert facts == {"digits_1": (2, 1), "ascii_letters": (1, 1), "invalid_utf8": (1, 0)}
    assert coverage_audit(student, Vocabulary([b"a", b"1"]), critical=re.compile("1")).classes["critical"].count == 1
    report = coverage_audit(vocabulary("mistral"), vocabulary("llama3"))
    assert (report.classes["digits_1"].count, report.classes["digits_1"].exact) == (10, 10)
    assert report.recommendation == "hkl"
    texts = ["In 1995 a reader paid 7 $ for it."]
    report = coverage_audit(vocabulary("mistral"), vocabulary("llama3"), corpus=texts)
    assert report.classes["digits_1"].share("exact") == report.classes["white_space"].share("exact") == 1.0
