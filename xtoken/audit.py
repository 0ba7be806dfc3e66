"""Coverage audit: do critical tokens, numbers above all, survive the partitions of GOLD and H-KL? What loss then?"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import plot
from .notebook import html_list, html_table
from .pieces import PieceIndex
from .projection import DOMINANT_WEIGHT, EXACT_WEIGHT, ROW_KINDS, ProjectionMatrix, common_pairs
from .vocabulary import TOKEN_KINDS, TokenizerLike, Vocabulary, check_several
from .vocabulary.long_texts import encode_texts

NUMERALS = ("digits_1", "digits_2", "digits_3", "digits_4_or_more")
CLASSES = (
    *NUMERALS,
    *("ascii_letters", "ascii_punctuation", "white_space", "other_scripts", "other_multi_byte"),
    *("invalid_utf8", "special"),
)
"""Classes of tokens. White space beside other characters does not count; a mixed token belongs to the later class of
the others, except that ASCII letters with digits or punctuation are ``ascii_letters``."""

SHARES = ("exact", "common", "split", "unmapped")
"""Fields of `ClassCoverage` that are shown as shares of its count."""

CRITICAL_SHARE = 0.99
"""A critical class must keep at least this share of its tokens in GOLD's common set for H-KL to be recommended."""

TEXTS = 1 << 10
"""Texts of a corpus that are encoded at once."""

MOST_DIFFERING = 0.01
"""Of the chunks of a sample at most this share may begin with different events for H-KL to be recommended."""


@dataclass
class ClassCoverage:
    """What happens to the student tokens of one class: counts of tokens, or with a corpus of occurrences."""

    count: int = 0
    """All of them."""
    exact: int = 0
    """In GOLD's common set: matched one to one, by a row of W with a single weight of 1."""
    common: int = 0
    """In H-KL's wider common set."""
    split: int = 0
    """Projected onto several teacher tokens."""
    unmapped: int = 0
    """With no image in the teacher's vocabulary."""

    def share(self, name: str) -> float:
        """`name` (such as ``"exact"``) as a share of the count; 1 for an empty class."""
        return getattr(self, name) / self.count if self.count else 1.0


@dataclass
class CoverageReport:
    """The result of `coverage_audit`; prints as a table."""

    classes: dict[str, ClassCoverage]
    critical: list[str]
    """Names of the critical classes."""
    recommendation: str
    """``"pkl"`` or ``"hkl"``."""
    reasons: list[str] = field(default_factory=list)
    weighted: bool = False
    """Whether the numbers count occurrences in a corpus."""

    @property
    def keeps_critical(self) -> bool:
        """Whether the critical tokens keep their partners: where the paper's rule says H-KL."""
        return self.recommendation == "hkl"

    def __repr__(self) -> str:
        count = sum(row.count for row in self.classes.values())
        what = f"{len(self.classes)} classes, {count} {self._unit}"
        return f"CoverageReport({what}, critical={self.critical}, recommendation={self.recommendation!r})"

    @property
    def _unit(self) -> str:
        return "occurrences" if self.weighted else "tokens"

    def _rows(self) -> dict[str, ClassCoverage]:
        """The classes by their names, of which critical ones have a star."""
        return {name + "*" * (name in self.critical): row for name, row in self.classes.items()}

    def plot(self, axes: Any = None) -> Any:
        """Draws what happens to each class as shares of its tokens; critical classes have a star. A mark shows the
        share in H-KL's wider common set.

        `axes` are matplotlib's (default: of a new figure), and are returned. ImportError without matplotlib.
        """
        rows = {name: row for name, row in self._rows().items() if row.count}
        parts = {
            "exact": [row.share("exact") for row in rows.values()],
            "partner shared": [(row.count - row.exact - row.split - row.unmapped) / row.count for row in rows.values()],
            "split": [row.share("split") for row in rows.values()],
            "no image": [row.share("unmapped") for row in rows.values()],
        }
        marks = [row.share("common") for row in rows.values()]
        return plot.stacked_shares(axes, parts, list(rows), f"{self._unit} of the student", marks, "H-KL's common set")

    def _repr_html_(self) -> str:
        rows = [
            (name, row.count, *(f"{row.share(key):.1%}" for key in SHARES))
            for name, row in self._rows().items()
            if row.count
        ]
        said = html_list(f"the paper's rule: {self.recommendation}", self.reasons)
        return html_table("Coverage", ("class", self._unit, "exact", "common", "split", "no image"), rows) + said

    def to_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [f"{'class':<20} {self._unit:>11} {'exact':>8} {'common':>8} {'split':>8} {'no image':>8}"]
        for name, row in self._rows().items():
            shares = "".join(f" {row.share(key):8.1%}" for key in SHARES) if row.count else ""
            lines.append(f"{name:<20} {row.count:>11,}{shares}")
        return "\n".join([*lines, f"the paper's rule: {self.recommendation}", *(f"  {one}" for one in self.reasons)])


@dataclass(frozen=True)
class LossChoice:
    """The answer of `choose_loss`; prints as text."""

    loss: str
    """Name of the loss, as for `xtoken.Teacher`."""
    reasons: tuple[str, ...]
    report: CoverageReport | None = None
    """What the answer rests on; a shared tokenizer needs none."""

    @property
    def paper(self) -> str | None:
        """What the paper's rule says, if there is a report."""
        return None if self.report is None else self.report.recommendation

    def _repr_html_(self) -> str:
        advice = html_list(f"recommended loss: {self.loss}", self.reasons)
        return advice if self.report is None else self.report._repr_html_() + advice

    def plot(self, axes: Any = None) -> Any:
        """Draws the report; see `CoverageReport.plot`. ValueError if there is none, as for a shared tokenizer."""
        if self.report is None:
            raise ValueError(f"plot: there is no report to draw: {'; '.join(self.reasons)}")
        return self.report.plot(axes)

    def to_json(self) -> str:
        """The report's fields, ``loss`` and ``loss_reasons`` as a JSON object."""
        facts = {} if self.report is None else asdict(self.report)
        return json.dumps({**facts, "loss": self.loss, "loss_reasons": self.reasons}, indent=2)

    def __str__(self) -> str:
        advice = "\n".join([f"recommended loss: {self.loss}", *(f"  {reason}" for reason in self.reasons)])
        return advice if self.report is None else f"{self.report}\n{advice}"


def coverage_audit(
    student_tok: TokenizerLike,
    teacher_tok: TokenizerLike,
    projection: ProjectionMatrix | None = None,
    *,
    critical: str | Sequence[str] | re.Pattern[str] = NUMERALS,
    corpus: Iterable[str] | None = None,
) -> CoverageReport:
    """Counts, class by class, which student tokens keep a partner in the teacher's vocabulary.

    Byte tokens such as ``<0x31>`` do not count where another token has the same text, which is then written by that.

    Parameters
    ----------
    student_tok, teacher_tok
        Tokenizers, as for `Vocabulary.from_tokenizer`.
    projection : ProjectionMatrix, optional
        W of the pair. Default: built here.
    critical : str, sequence of str, or re.Pattern
        Classes (names in `CLASSES`) that must survive, or one regular expression; the tokens whose whole text it
        matches form the class ``"critical"``.
    corpus : iterable of str, optional
        Texts; tokens then count as often as the student's tokenizer produces them there.

    Returns
    -------
    CoverageReport
        Recommends ``"pkl"`` if any critical class keeps less than 99 % of its tokens in GOLD's common set, since they
        would be matched by rank, not by meaning; else ``"hkl"``.

    Raises
    ------
    ValueError
        If `projection` belongs to other tokenizers, a class is unknown, an expression is malformed or matches no token,
        or `corpus` is given and the student's tokenizer cannot encode text.
    TypeError
        If `corpus` is one string.

    Notes
    -----
    The rule is that of X-Token (arXiv 2605.21699); the classes and the threshold are this library's.
    """
    student, teacher = Vocabulary.from_tokenizer(student_tok), Vocabulary.from_tokenizer(teacher_tok)
    if projection is None:
        projection = ProjectionMatrix.build(student, teacher)
    if projection.shape != (len(student), len(teacher)):
        raise ValueError(
            f"projection: expected shape {[len(student), len(teacher)]}, one row and one column a token, "
            f"got {list(projection.shape)}"
        )
    projection.check_tokenizers(student, teacher)
    classes_of = np.array([token_class(student[i], text) for i, text in enumerate(student.is_text.tolist())], dtype=str)
    is_counted = _may_be_written(student)
    members = {name: (classes_of == name) & is_counted for name in CLASSES}
    wanted = critical_classes(critical)
    if isinstance(wanted, re.Pattern):
        inside = np.zeros(len(student), dtype=bool)
        for i in (student.is_text & is_counted).nonzero()[0].tolist():
            inside[i] = wanted.fullmatch(student[i].decode("utf-8", "replace")) is not None
        if not inside.any():
            raise ValueError(f"critical: {wanted.pattern!r} is no class name and matches no token of the student")
        members["critical"], wanted = inside, ["critical"]

    weight = np.ones(len(student), dtype=np.int64) if corpus is None else _frequencies(student, corpus)
    entries = projection.row_ptr.diff().numpy()
    exact, common = np.zeros((2, len(student)), dtype=bool)
    exact[common_pairs(projection, EXACT_WEIGHT)[0].numpy()] = True
    common[common_pairs(projection, DOMINANT_WEIGHT)[0].numpy()] = True
    kinds = (np.True_, exact, common, entries > 1, entries == 0)  # as the fields of ClassCoverage
    classes = {
        name: ClassCoverage(*(int(weight[inside & kind].sum()) for kind in kinds)) for name, inside in members.items()
    }
    unit = "occurrences" if corpus is not None else "tokens"
    lost = [name for name in wanted if classes[name].share("exact") < CRITICAL_SHARE]
    reasons = [
        f"{name}: {classes[name].exact:,} of {classes[name].count:,} {unit} are in GOLD's common set"
        + (f", less than {CRITICAL_SHARE:.0%}" if name in lost else "")
        for name in wanted
        if classes[name].count
    ]
    partial = int(weight[projection.kind.numpy() == ROW_KINDS.index("partial")].sum())
    if partial:
        reasons.append(
            f"{partial:,} of {int(weight.sum()):,} {unit} are projected onto teacher tokens that do not spell them"
        )
    return CoverageReport(classes, wanted, "pkl" if lost else "hkl", reasons, weighted=corpus is not None)


def _may_be_written(vocabulary: Vocabulary) -> NDArray[np.bool_]:
    """[V]: all tokens but the byte tokens of a text that another token has."""
    is_byte = np.asarray(vocabulary.kinds) == TOKEN_KINDS.index("byte")
    texts = {vocabulary[i] for i in (vocabulary.is_text & ~is_byte).nonzero()[0].tolist()}
    return np.array([not (byte and vocabulary[i] in texts) for i, byte in enumerate(is_byte.tolist())], dtype=bool)


def same_tokens(student: Vocabulary, teacher: Vocabulary) -> bool:
    """Whether both number the same tokens in the same way, so that one model can read the other's ids."""
    return len(student) == len(teacher) and all(student[i] == teacher[i] for i in range(len(student)))


def choose_loss(
    student_tok: TokenizerLike,
    teacher_tok: TokenizerLike,
    projection: ProjectionMatrix | None = None,
    *,
    critical: str | Sequence[str] | re.Pattern[str] = NUMERALS,
    corpus: Iterable[str] | None = None,
    learn_projection: bool = False,
    report: CoverageReport | None = None,
    pieces: PieceIndex | None = None,
) -> LossChoice:
    """Which loss to use for a pair of tokenizers, and why, in words.

    Parameters
    ----------
    student_tok, teacher_tok, projection, critical, corpus
        As for `coverage_audit`.
    learn_projection : bool
        Whether the weights of W are to be trained.
    report : CoverageReport, optional
        The audit of the pair, if it has been made before.
    pieces : PieceIndex, optional
        That of the pair. If the answer is a loss of events, the reasons then say how many of them are merged. Where the
        paper's rule says H-KL it is built, in seconds, if it is not given: it knows how often the tokenizers differ.

    Returns
    -------
    LossChoice
        Its loss is ``"kd"`` if both number the same tokens alike. Where the paper's rule says ``"pkl"``, since critical
        tokens are lost, it is ``"prefix"``, or ``"pkl"`` if W is to be trained. Where that says ``"hkl"`` it is so, but
        ``"prefix"`` if in a sample of text more than 1 % of the chunks begin with different events, as where white
        space is cut differently, and W is not to be trained.

    Raises
    ------
    ValueError, TypeError
        As `coverage_audit`.

    Examples
    --------
    >>> student, teacher = Vocabulary([b"1", b"9", b"19", b" a"]), Vocabulary([b"1", b"9", b" ", b"a"])
    >>> choose_loss(student, teacher).loss, choose_loss(teacher, student).loss, choose_loss(student, student).loss
    ('prefix', 'hkl', 'kd')
    """
    student, teacher = Vocabulary.from_tokenizer(student_tok), Vocabulary.from_tokenizer(teacher_tok)
    if same_tokens(student, teacher):
        return LossChoice("kd", ("teacher and student share one tokenizer",), report)
    if report is None:
        report = coverage_audit(student, teacher, projection, critical=critical, corpus=corpus)
    if report.keeps_critical:
        kept = LossChoice("hkl", ("the critical tokens keep their partners, by which H-KL compares them",), report)
        if learn_projection:
            return kept
        found = (PieceIndex.build(student, teacher) if pieces is None else pieces).merged()
        share = found.differing / max(1, found.chunks)
        if share <= MOST_DIFFERING:
            return kept
        cut = (
            f"the critical tokens keep their partners, but {100 * share:.1f} % of the chunks of a sample are cut so "
            "differently that they begin with other events; there H-KL teaches tokens that the student never writes "
            "(bench/truth.py, and the code of bench/reproduce.py), prefix KL does not"
        )
        return LossChoice("prefix", (cut, found.summary()), report)
    lost = "critical tokens have no partner of their own; GOLD and H-KL would compare them by rank"
    if learn_projection:
        return LossChoice("pkl", (lost, "of the losses that do not, P-KL is the one whose W can be trained"), report)
    measured = (
        "where a teacher splits numbers (bench/reproduce.py), prefix KL ends above P-KL, the paper's answer, with "
        "right answers in the text and with wrong ones"
    )
    merged = () if pieces is None else (pieces.merged().summary(),)
    return LossChoice("prefix", (lost, measured, *merged), report)


def token_class(token: bytes, is_text: bool) -> str:
    """The class (one of `CLASSES`) of a token."""
    if not is_text:
        return "special"
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "invalid_utf8"
    text = text.removeprefix(" ") or " "
    if text.isspace():
        return "white_space"
    if text.isascii():
        if text.isdigit():
            return NUMERALS[min(len(text), len(NUMERALS)) - 1]
        return "ascii_letters" if any(c.isalpha() for c in text) else "ascii_punctuation"
    return "other_scripts" if any(c.isalpha() and not c.isascii() for c in text) else "other_multi_byte"


def critical_classes(critical: str | Sequence[str] | re.Pattern[str]) -> list[str] | re.Pattern[str]:
    """The names of critical classes ("numbers": of numerals), or an expression; ValueError for a malformed one."""
    if critical == "numbers":
        return list(NUMERALS)
    if isinstance(critical, re.Pattern):
        return critical
    if isinstance(critical, str) and critical not in CLASSES:
        try:
            return re.compile(critical)
        except re.error as error:
            raise ValueError(f"critical: {critical!r} is no class name and no regular expression: {error}") from None
    names = [critical] if isinstance(critical, str) else list(critical)
    if unknown := set(names) - set(CLASSES):
        raise ValueError(f"critical: unknown classes {sorted(unknown)}; expected names among {CLASSES}")
    return names


def _frequencies(student: Vocabulary, corpus: Iterable[str]) -> NDArray[np.int64]:
    check_several(corpus, "corpus")
    if student.tokenizer is None:
        raise ValueError("corpus: the student's vocabulary has no tokenizer to encode text with")
    counts = np.zeros(len(student), dtype=np.int64)
    texts = iter(corpus)
    while some := list(itertools.islice(texts, TEXTS)):
        for ids in encode_texts(student.tokenizer, some):
            counts += np.bincount(np.asarray(ids, np.int64), minlength=len(student))
    return counts
