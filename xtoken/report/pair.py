"""What there is to know about a pair of tokenizers, and its page."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from xtoken.alignment import Aligner
from xtoken.alignment.pretty import in_chunks
from xtoken.audit import LossChoice, choose_loss, coverage_audit
from xtoken.losses import registered
from xtoken.notebook import html_list
from xtoken.pieces import PieceIndex
from xtoken.projection import ROW_KINDS, ProjectionMatrix
from xtoken.terminal import printable
from xtoken.vocabulary import TokenizerLike, Vocabulary, check_several
from xtoken.vocabulary.long_texts import encode_texts

from .page import packed, render, save

MEASURED = "truth.json"
"""In this folder: biases under the truth test, by pair; `bench/truth.py` writes it."""

LONGEST = 2000
"""Characters of a text that is shown; of longer ones the rest is left out, and the page says so."""

GROUPS_OPEN, GROUPS = 20, 200
"""Groups of merged events, the commonest ones: in sight, and in all."""

TOKENS = 12
"""Tokens of a group that are listed for each side."""

SAMPLES = (
    ("Numbers", "In 2024, 1,024 of 65,536 readers paid $19.99: 201 on 12/31, 823 later. 3.14159 is 100% irrational."),
    (
        "Python",
        "def total(prices):\n    for price in prices:\n        if price > 100:\n            yield price * 0.9\n",
    ),
    ("Prose", "The quick brown fox doesn't jump over the lazy dog; it wouldn't dream of it, unfortunately."),
    (
        "Markdown",
        "## Results\n\n| loss | score |\n| --- | ---: |\n| none | 44.1 |\n\n* **bold**, `code`,  two spaces\n",
    ),
    ("Languages", "Der Hund schläft. Le chien n'aboie pas. Собака спит. 狗在睡觉。 犬は眠っています。 الكلب نائم."),
    ("Emoji", "Done 🎉🎉 👩‍👩‍👧 naïve café ½ ≤ 𝛼"),
)


@dataclass(frozen=True)
class Chunk:
    """Equal text in both tokenizations; of unaligned tokens there is one side only."""

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    is_aligned: bool = True


@dataclass(frozen=True)
class AlignedText:
    """A text, as both tokenizers cut it."""

    title: str
    chunks: tuple[Chunk, ...]
    left_out: int = 0
    """Characters at its end that are not shown."""

    @property
    def tokens(self) -> tuple[int, int]:
        """How many the student and the teacher make of it."""
        return sum(len(one.student) for one in self.chunks), sum(len(one.teacher) for one in self.chunks)


@dataclass(frozen=True)
class PairReport:
    """The result of `pair_report`: `save` writes the page, `html` is its text; notebooks show it."""

    names: tuple[str, str]
    student: Vocabulary
    teacher: Vocabulary
    choice: LossChoice
    """The recommendation, and the coverage by class that it rests on."""
    projection: ProjectionMatrix
    pieces: PieceIndex
    texts: tuple[AlignedText, ...]
    truth: dict[str, Any] | None
    """Biases by loss and kind of text (see docs/losses.md), if the truth test was run for these vocabularies."""

    def __repr__(self) -> str:
        student, teacher = self.names
        return f"PairReport({student!r} from {teacher!r}, loss={self.choice.loss!r}, {len(self.texts)} texts)"

    def _repr_html_(self) -> str:
        return html_list(repr(self), (*self.choice.reasons, "save(path) writes the page"))

    @property
    def html(self) -> str:
        """The page."""
        return render("pair.html", report=self, **self._facts())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page, complete or not at all. OSError if it cannot."""
        save(self.html, path)

    def _facts(self) -> dict[str, Any]:
        matrix = self.projection
        sizes = matrix.row_ptr.diff()
        reached = torch.zeros(matrix.shape[1], dtype=torch.bool, device="cpu")
        reached[matrix.col.long()] = True
        is_text = torch.from_numpy(self.teacher.is_text)
        histogram = torch.bincount(sizes, minlength=2).tolist()
        return {
            "loss_title": registered()[self.choice.loss].title,
            "rows": [
                {"pieces": k, "count": count, "share": count / max(1, len(sizes))} for k, count in enumerate(histogram)
            ],
            "unreached": int((~reached & is_text).sum()),
            "teacher_tokens": int(is_text.sum()),
            "merged": self.pieces.merged(),
            "groups_open": GROUPS_OPEN,
            "groups_shown": GROUPS,
            "tokens_shown": TOKENS,
            "tables": packed(self._tables()),
        }

    def _tables(self) -> dict[str, Any]:
        """What the page searches: the texts of all tokens, and the rows of W."""
        matrix = self.projection
        ends = matrix.row_ptr.tolist()
        weights = [round(weight, 5) for weight in matrix.weight.tolist()]
        patterns: dict[tuple[float, ...], int] = {}
        pattern = [patterns.setdefault(tuple(weights[a:b]), len(patterns)) for a, b in itertools.pairwise(ends)]
        return {
            "student": shown(self.student),
            "teacher": shown(self.teacher),
            "is_text": self.teacher.is_text.astype(int).tolist(),
            "columns": matrix.col.tolist(),
            "patterns": list(patterns),
            "pattern": pattern,
            "kinds": ROW_KINDS,
            "kind": matrix.kind.tolist(),
        }


def pair_report(
    student_tok: TokenizerLike,
    teacher_tok: TokenizerLike,
    *,
    names: tuple[str, str] = ("student", "teacher"),
    texts: Sequence[str] = (),
    corpus: Iterable[str] | None = None,
    projection: ProjectionMatrix | None = None,
    pieces: PieceIndex | None = None,
) -> PairReport:
    """A page about a pair of tokenizers: which loss and why, what W and the merged events hold, texts in both.

    Parameters
    ----------
    student_tok, teacher_tok
        Tokenizers, as for `Vocabulary.from_tokenizer`.
    names : (str, str)
        What the page calls them.
    texts : sequence of str
        Texts to show in both tokenizations, before the samples that come with the library; of each the first
        2,000 characters.
    corpus : iterable of str, optional
        Texts by which the coverage of classes is weighted, as in `coverage_audit`; `texts` do not count.
    projection, pieces : optional
        Those of the pair, if they have been made before.

    Returns
    -------
    PairReport

    Raises
    ------
    ValueError, TypeError
        As `coverage_audit`; if `projection` or `pieces` belong to other tokenizers; if `texts` is one string.

    Examples
    --------
    >>> student, teacher = Vocabulary([b"1", b"9", b"19", b" a"]), Vocabulary([b"1", b"9", b" ", b"a"])
    >>> report = pair_report(student, teacher, texts=["19 a"])
    >>> [(chunk.student, chunk.teacher) for chunk in report.texts[0].chunks]
    [(('19',), ('1', '9')), ((' a',), (' ', 'a'))]
    """
    check_several(texts, "texts")
    student, teacher = Vocabulary.from_tokenizer(student_tok), Vocabulary.from_tokenizer(teacher_tok)
    if projection is None:
        projection = ProjectionMatrix.build(student, teacher)
    if pieces is None:
        pieces = PieceIndex.build(student, teacher)
    else:
        pieces.check_tokenizers(student, teacher)
    report = coverage_audit(student, teacher, projection, corpus=corpus)
    choice = choose_loss(student, teacher, projection, report=report, pieces=pieces)
    own = [(f"Text {k + 1}", text) for k, text in enumerate(texts)]
    samples = SAMPLES if student.tokenizer is not None and teacher.tokenizer is not None else ()
    aligner = Aligner(student, teacher)
    shown_texts = tuple(aligned(aligner, title, text) for title, text in [*own, *samples])
    return PairReport(names, student, teacher, choice, projection, pieces, shown_texts, measured(student, teacher))


def aligned(aligner: Aligner, title: str, text: str) -> AlignedText:
    """A text in both tokenizations, chunk by chunk."""
    sides = (aligner.student, aligner.teacher)
    ids = [
        side.encode(text[:LONGEST]) if side.tokenizer is None
        else encode_texts(side.tokenizer, [text[:LONGEST]])[0]
        for side in sides
    ]  # fmt: skip
    alignment = aligner.align(*ids)
    student, teacher = ([visible(side[i]) for i in tokens] for side, tokens in zip(sides, ids, strict=True))
    cells = in_chunks(alignment.spans.tolist(), student, teacher)
    chunks = tuple(Chunk(tuple(ours), tuple(theirs), is_aligned) for ours, theirs, is_aligned in cells)
    return AlignedText(title, chunks, max(0, len(text) - LONGEST))


def visible(token: bytes) -> str:
    """A token's text, on one line: what does not print, and bytes that are not UTF-8, escaped."""
    return printable(token.decode("utf-8", "backslashreplace"))


def shown(vocabulary: Vocabulary) -> list[str]:
    """The text of every token, as `visible`."""
    return [visible(vocabulary[i]) for i in range(len(vocabulary))]


def digest(vocabulary: Vocabulary) -> str:
    """Of the tokens that stand for text, whatever their ids: how `MEASURED` names a vocabulary."""
    sums = sorted(hashlib.sha256(vocabulary[i]).digest() for i in vocabulary.is_text.nonzero()[0].tolist())
    return hashlib.sha256(b"".join(sums)).hexdigest()[:32]


def measured(student: Vocabulary, teacher: Vocabulary) -> dict[str, Any] | None:
    """What the truth test has found for a pair; None if it was not run."""
    file = resources.files(__package__).joinpath(MEASURED)
    pairs: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["pairs"]
    return pairs.get(f"{digest(student)}/{digest(teacher)}")
