"""What objects show in a notebook: well-formed, whole, and escaped."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

import xtoken
from xtoken.notebook import MOST, html_table
from xtoken.report import pair_report

HOSTILE = "<script>&\x1b[31m"


class Cells(HTMLParser):
    """The texts between tags; ends of tags must meet their starts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in {"table", "caption", "tr", "th", "td", "p", "b", "ul", "li"}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def pair() -> tuple[xtoken.Vocabulary, xtoken.Vocabulary]:
    student = xtoken.Vocabulary([b"1", b"9", b"19", b" a", HOSTILE.encode()])
    return student, xtoken.Vocabulary([b"1", b"9", b" ", b"a", *([bytes([c]) for c in HOSTILE.encode()])])


def test_tables_are_cut_and_escaped() -> None:
    cells = Cells(html_table(HOSTILE, ("<b>", "n"), [(HOSTILE, 1234)] * (MOST + 2)))
    assert cells.texts[:3] == ["<script>&\\u001b[31m", "<b>", "n"]
    assert cells.texts.count("1,234") == MOST
    assert cells.texts[-1] == "and 2 more"


def test_a_matrix_shows_its_rows_by_kind(pair: tuple[xtoken.Vocabulary, xtoken.Vocabulary]) -> None:
    matrix = xtoken.ProjectionMatrix.build(*pair, 20)
    texts = Cells(matrix._repr_html_()).texts
    assert texts[0] == repr(matrix)
    sizes = matrix.row_ptr.diff()
    of_kind = sizes[matrix.kind == xtoken.projection.ROW_KINDS.index("pieces")]
    place = texts.index("pieces")
    assert texts[place + 1 : place + 4] == [str(len(of_kind)), *(str(int((of_kind == k).sum())) for k in (1, 2))]


def test_an_alignment_shows_its_chunks(pair: tuple[xtoken.Vocabulary, xtoken.Vocabulary]) -> None:
    alignment = xtoken.Aligner(*pair).align([2, 3] * 30, [0, 1, 2, 3] * 30)
    texts = Cells(alignment._repr_html_()).texts
    assert texts[4:10] == ["0", "0 to 1", "0 to 2", "0", "1 to 2", "2 to 4"]
    assert texts[-1] == "and 40 more"


def test_audits_pieces_and_reports_show_what_they_print(pair: tuple[xtoken.Vocabulary, xtoken.Vocabulary]) -> None:
    choice, pieces = xtoken.choose_loss(*pair), xtoken.PieceIndex.build(*pair)
    texts = Cells(choice._repr_html_()).texts
    assert f"recommended loss: {choice.loss}" in texts
    assert set(choice.reasons) < set(texts)
    assert "digits_2*" in texts
    assert pieces.merged().summary() in Cells(pieces._repr_html_()).texts
    assert set(choice.reasons) < set(Cells(pair_report(*pair)._repr_html_()).texts)
