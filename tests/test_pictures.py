"""Pictures: what is drawn is what is there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import xtoken

pytest.importorskip("matplotlib").use("agg")
pyplot = pytest.importorskip("matplotlib.pyplot")

Pair = tuple[xtoken.Vocabulary, xtoken.Vocabulary]


@pytest.fixture(scope="module")
def pair() -> Pair:
    student = xtoken.Vocabulary([b"1", b"9", b"19", b"$ a", b"\xff"])
    return student, xtoken.Vocabulary([b"1", b"9", b"$", b" a", b" "])


@pytest.fixture(autouse=True)
def figures() -> Any:
    yield
    for number in pyplot.get_fignums():
        pyplot.figure(number).canvas.draw()  # texts that cannot be drawn fail here
    pyplot.close("all")


def heights(axes: Any) -> dict[str, list[float]]:
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}


def test_rows_of_w_by_kind(pair: Pair) -> None:
    assert heights(xtoken.ProjectionMatrix.build(*pair).plot()) == {
        "none": [1, 0, 0],
        "exact": [0, 2, 0],
        "pieces": [0, 0, 2],
    }


def test_pieces_of_both_sides(pair: Pair) -> None:
    axes = xtoken.PieceIndex.build(*pair).plot()
    assert heights(axes) == {"student": [0, 3, 2], "teacher": [0, 5, 0]}
    assert axes.get_yscale() == "log"


def test_many_entries_share_the_last_bar() -> None:
    W = xtoken.ProjectionMatrix.from_topk([list(range(12)), [0] + [-1] * 11], [[1 / 12] * 12, [1.0] * 12], 12)
    axes = W.plot()
    assert heights(axes) == {"given": [0, 1, 0, 0, 0, 0, 0, 0, 1]}
    assert axes.get_xticklabels()[-1].get_text() == "8 or more"


def test_audits(pair: Pair) -> None:
    choice = xtoken.choose_loss(*pair)
    assert choice.report is not None
    axes = choice.plot(pyplot.subplots()[1])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:2] == ["digits_1*", "digits_2*"]
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    row = choice.report.classes["digits_2"]
    assert widths["split"][names.index("digits_2*")] == row.share("split") == 1.0
    assert [sum(parts) for parts in zip(*widths.values(), strict=True)] == pytest.approx([1.0] * len(names))
    with pytest.raises(ValueError, match="there is no report to draw: teacher and student share one tokenizer"):
        xtoken.choose_loss(pair[0], pair[0]).plot()


def test_alignments(pair: Pair) -> None:
    student, teacher = [2, 3, 0, 3], [0, 1, 2, 3, 0, 2, 3]
    alignment = xtoken.Aligner(*pair).align(student, teacher)
    drawn = [text.get_text() for text in alignment.plot(*pair).texts]
    assert drawn == ["19", "1", "9", "$·a", "$", "·a", "1", "1", "$·a", "$", "·a"]
    axes = alignment.plot(*pair, first=1, chunks=2)
    assert [text.get_text() for text in axes.texts] == ["$·a", "$", "·a", "1", "1"]
    assert axes.get_title() == "chunks 1 to 2 of 4"
    for first, chunks in ((4, 1), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=f"first, chunks: expected chunks of 4, got {chunks} from {first}"):
            alignment.plot(*pair, first=first, chunks=chunks)
    with pytest.raises(ValueError, match="plot: this sample has no chunks to draw"):
        xtoken.Aligner(*pair).align([], []).plot(*pair)
    small = xtoken.Vocabulary([b"1"])
    for draw in (alignment.plot, alignment.pretty):
        with pytest.raises(
            ValueError, match=r"student_tok: expected ids in 0 \.\.\. 0, got 3; are both sides swapped\?"
        ):
            draw(small, pair[1])


def test_tokens_in_no_chunk_are_grey(pair: Pair) -> None:
    alignment = xtoken.Alignment([[1, 2, 0, 1]], [0, 1], [[0, 1, 3]], [[1, 4]])
    axes = alignment.plot(*pair)
    texts = [text.get_text() for text in axes.texts]
    colors = [bar.get_facecolor()[:3] for bar in axes.patches]
    assert texts == ["1", "9", "9", "$·a", "·"]
    assert colors[0] == colors[3] == colors[4] != colors[1] == colors[2]


def test_without_matplotlib(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    W, index, choice = xtoken.ProjectionMatrix.build(*pair), xtoken.PieceIndex.build(*pair), xtoken.choose_loss(*pair)
    alignment = xtoken.Aligner(*pair).align([2], [0, 1])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for draw in (W.plot, index.plot, choice.plot, lambda: alignment.plot(*pair)):
        with pytest.raises(ImportError, match=r"plots need matplotlib; run: pip install 'xtoken\[plot\]'"):
            draw()


def test_pictures_of_the_documentation(tmp_path: Any) -> None:
    docs = Path(__file__).parents[1] / "docs"
    spec = importlib.util.spec_from_file_location("documentation_pictures", docs / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.draw(tmp_path)
    page = (docs / "method.md").read_text()
    for drawn in tmp_path.iterdir():
        assert (docs / drawn.name).exists()
        assert f"({drawn.name})" in page
    assert len(list(tmp_path.iterdir())) == len(list(docs.glob("method-*.png"))) == page.count("](method-")
