"""Draws the pictures of method.md beside it, from a pair of toy vocabularies: ``python docs/pictures.py``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import xtoken

DIGITS = [b"1", b"2", b"9"]
NUMERALS = [b"".join(chosen) for count in (1, 2, 3) for chosen in itertools.product(DIGITS, repeat=count)]
WORDS = [b"In", b" ", b" readers"]
STUDENT = xtoken.Vocabulary([b"<s>", *WORDS, *NUMERALS], roles={"bos": 0})
TEACHER = xtoken.Vocabulary([*WORDS, *DIGITS])
BLUE, ORANGE = "#4c78a8", "#f58518"


def chunks(figure: Any) -> None:
    """Both tokenizations of a text, chunk above chunk."""
    texts = [b"<s>", b"In", b" ", b"199", b"2", b" readers"], [b"In", b" ", b"1", b"9", b"9", b"2", b" readers"]
    ids = [
        [[tok[i] for i in range(len(tok))].index(one) for one in text]
        for tok, text in zip((STUDENT, TEACHER), texts, strict=True)
    ]
    alignment = xtoken.Aligner(STUDENT, TEACHER).align(*ids)
    alignment.plot(STUDENT, TEACHER, axes=figure.subplots()).set_title("")


def projection(figure: Any) -> None:
    """Rows of W as lines from student tokens to teacher tokens."""
    W, axes = xtoken.ProjectionMatrix.build(STUDENT, TEACHER), figure.subplots()
    shown = [STUDENT[i] for i in range(len(STUDENT))]
    for place, token in enumerate([b" readers", b"9", b"19", b"199"]):
        axes.text(-0.03, -place, repr(token.decode()), ha="right", va="center")
        for column, weight in zip(*W.row(shown.index(token)), strict=True):
            end = -0.6 * int(column) + 0.3
            axes.plot([0, 1], [-place, end], color=BLUE, linewidth=0.6 + 4 * float(weight), alpha=0.7)
            axes.text(
                0.3,
                -place + 0.3 * (end + place),
                f"{float(weight):.3f}",
                fontsize=8,
                ha="center",
                backgroundcolor="white",
            )
    for i in range(len(TEACHER)):
        axes.text(1.03, -0.6 * i + 0.3, repr(TEACHER[i].decode()), ha="left", va="center")
    axes.set(xlim=(-0.2, 1.2))
    axes.axis("off")


def audit(figure: Any) -> None:
    """How many tokens of each class keep a partner of their own."""
    xtoken.coverage_audit(STUDENT, TEACHER).plot(figure.subplots()).set_title("")


def projected(figure: Any) -> None:
    """One position: the student's probabilities, the same times W, the teacher's."""
    p, W = _student(), xtoken.ProjectionMatrix.build(STUDENT, TEACHER)
    moved = torch.zeros(len(TEACHER))
    for i, mass in enumerate(p):
        columns, weights = W.row(i)
        moved[columns.long()] += mass * weights
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    shown = [i for i in range(len(STUDENT)) if p[i] > 0.02]
    left.bar([STUDENT[i].decode() for i in shown], [float(p[i]) for i in shown], color=BLUE)
    left.set_title("student: p (tokens above 2 %)", fontsize="medium")
    _pairs(right, [one.decode() for one in DIGITS], moved[-3:].tolist(), [0.8, 0.15, 0.05])
    right.set_title("p W, and the teacher's q", fontsize="medium")


def events(figure: Any) -> None:
    """Each place where the teacher writes a digit, what comes next by both."""
    p, written = _student(), [b"1", b"9", b"9"]
    teacher = [[0.8, 0.15, 0.05], [0.1, 0.1, 0.75, 0.05], [0.1, 0.2, 0.65, 0.05]]  # the last: something else
    for k, axes in enumerate(figure.subplots(1, 3, sharey=True)):
        before = b"".join(written[:k])
        shown = dict(zip((STUDENT[i] for i in range(len(STUDENT))), p.tolist(), strict=True))
        mass = [sum(one for token, one in shown.items() if token.startswith(before + digit)) for digit in DIGITS]
        mass += [shown[before]] if before else []
        names = [*(one.decode() for one in DIGITS), "ends"][: len(mass)]
        _pairs(axes, names, [one / sum(mass) for one in mass], teacher[k])
        axes.set_title(f"after {before.decode()!r}" if k else "at the start", fontsize="medium")


def _student() -> Any:
    """Probabilities of the student's next token where "199" comes."""
    scores = torch.full((len(STUDENT),), 0.2)
    for i in range(len(STUDENT)):
        scores[i] += {b"1": 2, b"12": 3, b"19": 4, b"199": 16, b"192": 5, b"2": 3, b"211": 2}.get(STUDENT[i], 0)
    scores[: 1 + len(WORDS)] = 0
    return scores / scores.sum()


def _pairs(axes: Any, names: list[str], student: list[float], teacher: list[float]) -> None:
    for shift, label, values, color in ((-0.2, "student", student, BLUE), (0.2, "teacher", teacher, ORANGE)):
        axes.bar([place + shift for place in range(len(names))], values, 0.4, label=label, color=color)
    axes.set_xticks(range(len(names)), names)
    axes.legend(fontsize="small")


PICTURES: dict[Callable[[Any], None], tuple[float, float]] = {
    chunks: (6, 1.6), projection: (6, 3), audit: (7, 3.2), projected: (9, 2.8), events: (9, 2.6),
}  # fmt: skip
"""With their sizes in inches."""


def draw(folder: Path) -> None:
    """Writes all of them as ``method-NAME.png``."""
    for picture, size in PICTURES.items():
        figure = Figure(figsize=size, layout="constrained")
        picture(figure)
        figure.savefig(folder / f"method-{picture.__name__}.png", dpi=100)


if __name__ == "__main__":
    draw(Path(__file__).parent)
