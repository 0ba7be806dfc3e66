"""Pages about a pair and about a run: their facts, whatever they are made of, and what they do in a browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_level

import xtoken
from xtoken.cli import main
from xtoken.report import PairReport, pair_report, run_report
from xtoken.report.pair import visible
from xtoken.report.run import add_sample, begin_run

HOSTILE = (
    "<script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\"> & {{ 7 * 7 }} \u202e\x1b[31m"
)
ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def tables_of(html: str) -> dict[str, Any]:
    """What the page searches."""
    found = re.search(r'<script type="application/octet-stream" id="tables">([^<]*)</script>', html)
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


@pytest.fixture(scope="module")
def pair() -> PairReport:
    texts = ["the dog of 19 and 201 cats", "the cat </script> 19 19 201 201 201 <b>", "1 2 3 0"]
    student, teacher = byte_level(300, texts), byte_level(262, texts)
    return pair_report(student, teacher, names=("<i>S", "T & T"), texts=["the dog 201", HOSTILE, "x" * 3000])


def rows_of(tables: dict[str, Any]) -> list[dict[int, float]]:
    """W, as the page has it: of each student token, the weights by teacher token."""
    columns, rows = iter(tables["columns"]), []
    for pattern in tables["pattern"]:
        rows.append({next(columns): weight for weight in tables["patterns"][pattern]})
    assert next(columns, None) is None
    return rows


def test_the_page_holds_w_and_every_token(pair: PairReport) -> None:
    tables = tables_of(pair.html)
    assert [len(tables[side]) for side in ("student", "teacher")] == list(pair.projection.shape)
    for student_id, row in enumerate(rows_of(tables)):
        ids, weights = pair.projection.row(student_id)
        assert list(row) == ids.tolist()
        assert list(row.values()) == pytest.approx(weights.tolist(), abs=1e-5)
    assert all(text.isprintable() for side in ("student", "teacher") for text in tables[side])


def test_nothing_of_a_text_or_a_name_is_markup(pair: PairReport) -> None:
    html = pair.html
    spelled = re.search(r"<h3>Text 2 .*?<div class=\"side\"[^>]*>(.*?)</div>", html, re.DOTALL)
    assert spelled is not None
    assert unescape(re.sub("<[^<>]*>", "", spelled[1])) == visible(HOSTILE.encode()).replace(r"\u202e", r"\xe2\x80\xae")
    for markup in ("<script>document", "<img", "<i>S"):
        assert markup not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert not re.search(r"(src|href)=", html)


def test_texts_are_whole_in_both_tokenizations(pair: PairReport) -> None:
    assert [text.left_out for text in pair.texts[:3]] == [0, 0, 1000]
    for text in pair.texts:
        for chunk in text.chunks:
            assert not chunk.is_aligned or "".join(chunk.student) == "".join(chunk.teacher)
    assert "".join("".join(chunk.student) for chunk in pair.texts[0].chunks) == "the dog 201"


def test_equal_input_gives_equal_bytes(pair: PairReport, tmp_path: Path) -> None:
    for name in ("a", "b"):
        pair.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_pair_without_a_truth_test_says_so(pair: PairReport) -> None:
    assert "It has not been run for this pair" in pair.html


def test_coverage_is_weighted_by_a_corpus() -> None:
    student, teacher = byte_level(300, ["a 19 19 19"]), byte_level(270, ["b"])
    report = pair_report(student, teacher, corpus=["19 19", "19"])
    assert report.choice.report is not None
    assert report.choice.report.weighted
    assert "as they occur in the corpus" in report.html


def test_other_pieces_are_refused() -> None:
    student, teacher = byte_level(300, ["a 19"]), byte_level(270, ["b"])
    with pytest.raises(ValueError, match="tokenizer"):
        pair_report(student, teacher, pieces=xtoken.PieceIndex.build(teacher, student))


def test_one_text_is_not_several() -> None:
    with pytest.raises(TypeError, match="texts: expected several texts, got one str"):
        pair_report(xtoken.Vocabulary([b"a"]), xtoken.Vocabulary([b"a"]), texts="aa")


def test_pages_show_the_results_of_the_truth_test() -> None:
    results = json.loads((ROOT / "bench" / "results" / "truth.json").read_text())["rows"]
    shown = json.loads((ROOT / "xtoken" / "report" / "truth.json").read_text())["pairs"].values()
    count = 0
    for pair in shown:
        for row in results:
            if row["title"] == pair["title"]:
                cell = pair["bias"][row["loss"]][row["kind"]].split(" / ")
                assert cell[row["sort"] != "start"] == f"{row['bias']:.3f}"
                count += 1
    assert count == len(results)


# --- runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three steps with an evaluation, a loss that is not finite, settings and two samples."""
    folder = tmp_path / "run"
    begin_run(folder, {"learning_rate": 1e-3, "data": ["<b>"]}, resumed=None)
    add_sample(folder, step=1, prompt=HOSTILE, completion="four</pre>", tokens=2, ended=True)
    add_sample(folder, step=2, prompt="2 + 2", completion="fi", tokens=1, ended=False)
    history = [
        {"step": 1, "epoch": 0.1, "loss": 3.0, "ce": 2.0, "kd": 1.0},
        {"step": 2, "epoch": 0.2, "loss": float("nan"), "ce": 1.5, "kd": 0.5},
        {"step": 2, "epoch": 0.2, "eval_ce": 1.75, "eval_kd/qwen": 0.25},
        {"step": 3, "epoch": 0.3, "loss": 1.0, "ce": 1.0, "kd": 0.25},
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": history}))
    return folder


def test_a_run_has_curves_settings_and_samples(run: Path) -> None:
    report = run_report(run)
    assert (report.name, report.steps, report.not_finite) == ("run", 3, 1)
    named = {name: [(one.name, one.steps, one.values) for one in curves] for name, curves in report.curves.items()}
    assert named["ce"] == [("ce", (1, 2, 3), (2.0, 1.5, 1.0)), ("eval_ce", (2,), (1.75,))]
    assert [one[0] for one in named["kd"]] == ["kd", "eval_kd/qwen"]
    assert named["loss"][0][1:] == ((1, 3), (3.0, 1.0))
    html = report.html
    assert "1 values are not finite" in html
    assert "<script>document" not in html
    assert "four&lt;/pre&gt;" in html
    assert all(c.isprintable() or c in "\n" for c in html)
    assert r"{{ 7 * 7 }} \u202e\u001b[31m</span>" in html
    assert r"[&#34;\u003cb\u003e&#34;]" in html or r'["\u003cb\u003e"]' in html


def test_samples_of_an_earlier_run_go_unless_it_is_continued(run: Path) -> None:
    """Then those go which it has shown after its checkpoint, and will show again, and one that was cut by its end."""
    checkpoint = run / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1, "log_history": []}')
    with open(run / "samples.jsonl", "ab") as file:
        file.write(b'{"step": 3, "prom')
    begin_run(run, {}, resumed=checkpoint)
    add_sample(run, step=2, prompt="2 + 2", completion="four", tokens=1, ended=True)
    assert [(one["step"], one["completion"]) for one in run_report(run).samples] == [(1, "four</pre>"), (2, "four")]
    begin_run(run, {}, resumed=None)
    assert run_report(run).samples == []


def test_a_run_that_was_stopped_is_read_from_its_newest_checkpoint(run: Path) -> None:
    for step in (9, 10):
        (run / f"checkpoint-{step}").mkdir()
        state = {"global_step": step, "log_history": [{"step": 1, "ce": 1.0}, {"step": step, "ce": 0.5}]}
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert run_report(run).steps == 10, "it goes on, and has been at its end before"
    (run / "trainer_state.json").unlink()
    assert run_report(run).steps == 10
    of_checkpoint = run_report(run / "checkpoint-9")
    assert (of_checkpoint.steps, of_checkpoint.settings["learning_rate"]) == (9, 1e-3)


DAMAGED = [("trainer_state.json", "{}"), ("trainer_state.json", '{"global_step": [], "log_history": []}'),
           ("trainer_state.json", '{"global_step": 1e999, "log_history": []}'),
           ("trainer_state.json", '{"global_step": 1, "log_history": [{"step": "x", "loss": 1}]}'),
           ("trainer_state.json", '{"global_step": 1, "log_history": [{"step": 1, "loss": 1%s}]}' % ("0" * 400)),
           *((name, text) for name in ("trainer_state.json", "settings.json", "samples.jsonl")
             for text in ("[1, 2\n", "[" * 100_000 + "\n", "1" * 5000 + "\n"))]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), DAMAGED)
def test_a_damaged_file_is_named(run: Path, name: str, text: str) -> None:
    (run / name).write_text(text)
    (run / "checkpoint-²").mkdir()  # no number that int() reads
    with pytest.raises(ValueError, match=re.escape(name)):
        run_report(run)


@pytest.mark.parametrize("name", ["trainer_state.json", "settings.json", "samples.jsonl"])
def test_no_file(run: Path, name: str) -> None:
    (run / name).unlink()
    (run / name).symlink_to("/dev/null")
    with pytest.raises(ValueError, match=re.escape(f"{name}: cannot read it: expected a regular file")):
        run_report(run)


def test_a_sample_that_was_cut_by_a_kill_is_left_out(run: Path) -> None:
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"step": 3, "pro')
    assert [one["step"] for one in run_report(run).samples] == [1, 2]


# --- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --student and --teacher"),
        (["--student", "x"], "--teacher: expected one"),
        (["somewhere", "--student", "x", "--teacher", "y"], "expected --student and --teacher or a RUN, got both"),
        (["somewhere", "--data", "x"], "expected --student and --teacher with them"),
        (["nowhere"], "expected a training run"),
        (["nowhere", "-o", "not/there/report.html"], "output: no such folder: "),
    ],
)
def test_errors_of_the_command(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_writes_both_pages(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = []
    for name, size in (("student", 300), ("teacher", 280)):
        byte_level(size, ["a 19 201"]).save(str(tmp_path / f"{name}.json"))
        sides += [f"--{name}", str(tmp_path / f"{name}.json")]
    (tmp_path / "own.txt").write_text("19 201\n")
    output = tmp_path / "page.html"
    data = ["--data", str(tmp_path / "own.txt"), "--text", "201 <b>"]
    assert main(["report", *sides, *data, "-o", str(output)]) == 0
    assert "student.json from teacher.json" in output.read_text()
    assert "as they occur in the corpus" in output.read_text()
    assert main(["report", str(run), "-o", str(output)]) == 0
    assert "Training run run" in output.read_text()


# --- a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip("no browser: one of " + ", ".join(BROWSERS))
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab; nothing may be said on its console, and nothing fetched."""
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    tab.set_default_timeout(120_000)
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    yield tab
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "blob:"))] == []
    tab.close()


def opened(page: Any, report: Any, tmp_path: Path) -> None:
    report.save(tmp_path / "report.html")
    page.goto((tmp_path / "report.html").as_uri())


def test_search_in_a_browser(page: Any, pair: PairReport, tmp_path: Path) -> None:
    opened(page, pair, tmp_path)
    page.wait_for_selector("body[data-ready]")
    sizes = pair.projection.row_ptr.diff().tolist()
    student_id = next(i for i, size in enumerate(sizes) if size == 3 and pair.student[i].isalnum())
    ids, weights = pair.projection.row(student_id)
    page.fill("#query", pair.student[student_id].decode())
    first = page.locator("#hits tr").first
    assert first.locator("td").nth(0).inner_text() == str(student_id)
    becomes = first.locator("td").nth(2)
    heaviest = int(ids[weights.argmax()])
    assert becomes.locator(".token").first.inner_text() == pair.teacher[heaviest].decode().replace(" ", "·")
    assert becomes.locator(".token").count() == len(ids)
    page.fill("#query", f"#{student_id}")
    assert page.locator("#found").inner_text() == "1 row"
    page.check("input[value=teacher]")
    page.fill("#query", "1")
    reaching = {
        i
        for i in range(len(pair.student))
        if any("1" in visible(pair.teacher[j]) for j in pair.projection.row(i)[0].tolist())
    }
    assert page.locator("#found").inner_text().split()[0] == str(len(reaching))
    page.check("input[value=unreached]")
    page.fill("#query", "")
    reached = set(pair.projection.col.tolist())
    missing = [i for i in pair.teacher.is_text.nonzero()[0].tolist() if i not in reached]
    assert page.locator("#found").inner_text().split()[0] == str(len(missing))
    assert page.title() == "<i>S from T & T"


def test_chunks_in_a_browser(page: Any, pair: PairReport, tmp_path: Path) -> None:
    opened(page, pair, tmp_path)
    article = page.locator(".aligned").first
    students, teachers = (article.locator(".side").nth(k).locator(".chunk") for k in (0, 1))
    students.nth(1).hover()
    number = students.nth(1).get_attribute("data-chunk")
    assert article.locator(".lit").count() == 2
    assert {one.get_attribute("data-chunk") for one in article.locator(".lit").all()} == {number}
    students.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    focused = page.evaluate("[document.activeElement.dataset.chunk, document.activeElement.parentNode.ariaLabel]")
    assert focused == [number, "Text 1, T & T"]
    assert teachers.nth(1).get_attribute("tabindex") == "0"
    assert "=" in article.locator(".said").inner_text()


def test_light_dark_and_print_in_a_browser(page: Any, pair: PairReport, tmp_path: Path) -> None:
    opened(page, pair, tmp_path)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(paper)
    page.click("#theme")
    assert light != dark
    assert page.evaluate(paper) == light
    page.emulate_media(media="print")
    assert not page.locator("#search").is_visible()


def test_a_run_in_a_browser(page: Any, run: Path, tmp_path: Path) -> None:
    opened(page, run_report(run), tmp_path)
    assert page.title() == "Training run run"
    assert page.locator("figure").count() == 3
    assert HOSTILE.split("\u202e")[0].strip() in page.locator("pre").last.inner_text()


@pytest.mark.slow
def test_a_real_pair_fits_in_five_megabytes(vocabulary: Any) -> None:
    student, teacher = map(vocabulary, ("llama3", "qwen3"))
    pieces = xtoken.PieceIndex.build(student, teacher, texts=())
    report = pair_report(student, teacher, pieces=pieces)
    html = report.html
    assert len(html.encode()) < 5_000_000
    row = rows_of(tables := tables_of(html))[tables["student"].index("201")]
    assert {tables["teacher"][i]: weight for i, weight in row.items()} == {"2": 0.9009, "0": 0.09009, "1": 0.00901}
    assert report.truth is not None
    assert report.truth["title"] == "Llama 3 from Qwen3"
