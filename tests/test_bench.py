"""Every benchmark runs, at its smallest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_bench_align(tmp_path):
    output = tmp_path / "align.json"
    command = [
        sys.executable,
        str(ROOT / "bench" / "bench_align.py"),
        "--student",
        "llama3",
        "--teacher",
        "smollm2",
        "--lengths",
        "256",
        "--tokens",
        "4000",
        "--threads",
        "1",
        "--repeat",
        "1",
        "--hostile-tokens",
        "0",
        "--output",
        str(output),
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = json.loads(output.read_text())
    assert [row["method"] for row in results["rows"]] == ["bytes", "auto", "dp"]
    assert all(row["million_tokens_per_second"] > 0 for row in results["rows"])
    assert "| llama3 / smollm2 | 256 | 1 | dp |" in printed
    assert results["machine"]["xtoken"]


def test_bench_align_on_hostile_input():
    part = {"run": "measure_hostile", "name": "random a, b", "method": "dp", "size": 60}
    command = [sys.executable, str(ROOT / "bench" / "bench_align.py"), "--part", json.dumps(part)]
    row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (row["student_tokens"], row["teacher_tokens"], row["optimal"]) == (60, 60, True)
    assert row["chunks"] > 20


def test_bench_losses(tmp_path):
    output = tmp_path / "losses.json"
    small = ["--rows", "12", "--threads", "1", "--repeat", "1", "--vocabulary", "3000", "--reference-rows", "4"]
    command = [sys.executable, str(ROOT / "bench" / "bench_losses.py"), *small, "--output", str(output)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = json.loads(output.read_text())["rows"]
    measured = [row for row in rows if "level" in row and "missing" not in row]
    assert {"P-KL all columns", "GOLD", "H-KL", "ULD"} <= {row["loss"] for row in measured}
    assert all(row["ms_per_row"] > 0 and row["times_reference"] > 0 for row in measured)
    assert all(row["floor_share"] > 0 for row in measured)
    assert "| torch cross_entropy | fp32 |" in printed
    linear = [*small[:2], "--linear", "--linear-rows", "12", "--linear-width", "8", "--vocabulary", "3000"]
    subprocess.run([*command[:2], *linear, "--output", str(output)], capture_output=True, text=True, check=True)
    kept = json.loads(output.read_text())["rows"]
    assert kept[: len(rows)] == rows
    assert kept[-1]["loss"].startswith("linear P-KL")


def test_bench_corpus(tmp_path):
    output = tmp_path / "corpus.json"
    command = [sys.executable, str(ROOT / "bench" / "bench_corpus.py"), "--megabytes", "0.1", "--repeat", "1"]
    subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, check=True)
    assert json.loads(output.read_text())


def test_bench_cache(tmp_path):
    output = tmp_path / "cache.json"
    command = [sys.executable, str(ROOT / "bench" / "bench_cache.py"), "--passages", "2", "--top-k", "4", "40000"]
    printed = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, check=True).stdout
    little, most = json.loads(output.read_text())["rows"]
    assert little["kl_nats_per_token"] > 0.3
    assert 0 <= most["kl_nats_per_token"] < 1e-4
    assert "| 4 |" in printed


def test_train_real(tmp_path, monkeypatch, capsys):
    """The data, the options and the table; training itself is tested with small models."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import train_real

    def train(arguments):
        options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
        lines = [json.loads(line) for line in Path(options["--eval_data"]).read_text().splitlines()]
        assert len(lines) == 3
        assert all(line["text"] for line in lines)
        output = Path(options["--output"])
        output.mkdir()
        history = [{"step": 2, "eval_ce": 1.5, "eval_kd": 0.5, "eval_agreement": 0.25}]
        (output / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        return 0

    monkeypatch.setattr(train_real, "demo_pair", lambda folder: ["--student", "S", "--teacher", "T"])
    monkeypatch.setattr(train_real.cli, "main", train)
    output = tmp_path / "real.json"
    monkeypatch.setattr(
        sys, "argv", ["train_real.py", "demo", "--steps", "2", "--held-out-passages", "3", "--output", str(output)]
    )
    train_real.main()
    assert "| 2 | 1.500 | 0.500 | 0.250 |" in capsys.readouterr().out
    assert json.loads(output.read_text())["pair"] == "demo"


def test_reproduce(tmp_path):
    output = tmp_path / "reproduce.json"
    script = [sys.executable, str(ROOT / "bench" / "reproduce.py"), "--output", str(output)]
    few = ["--quick", "--threads", "1", "--steps", "12", "--teacher-steps", "12"]
    first = subprocess.run([*script, *few], capture_output=True, text=True)
    results = json.loads(output.read_text())
    assert "coverage_audit recommends pkl" in first.stdout
    assert first.returncode == 1  # so few steps show nothing
    assert "The finding is absent. Expected GOLD below half of CE: 0.0 and 0.0%; prefix KL above twice" in first.stderr
    assert [(run["setting"], run["seed"]) for run in results["runs"]] == [("plenty", 0)]
    curves = results["runs"][0]["curves"]
    assert {"CE", "GOLD", "prefix KL"} <= set(curves)
    assert all(len(curve) == results["size"]["evaluations"] for curve in curves.values())
    again = subprocess.run([*script, *few, "--resume"], capture_output=True, text=True).stdout
    assert json.loads(output.read_text())["runs"] == results["runs"]
    table = subprocess.run([*script, "--report"], capture_output=True, text=True, check=True).stdout
    assert "| prefix KL |" in table
    assert table in again


@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import reproduce

    return reproduce


@pytest.mark.parametrize(
    ("ends", "absent"),
    [
        ({}, []),
        ({"GOLD": 0.25}, ["GOLD below half of CE: 25.0 and 45.0%"]),
        ({"prefix KL": 0.1}, ["prefix KL above twice P-KL: 10.0 and 5.0%"]),
    ],
)
def test_reproduce_tells_whether_the_finding_is_there(reproduce, ends, absent):
    ends = {"CE": 0.45, "GOLD": 0.0, "P-KL first 0.1 all": 0.05, "prefix KL": 0.6, **ends}
    run = {"setting": "plenty", "seed": 0, "curves": {method: [0.0, end] for method, end in ends.items()}}
    assert reproduce.lacking({"runs": [run]}) == absent


def test_reproduce_counts_right_answers(reproduce):
    """A model that knows one answer by heart is right on that problem alone; the model beside it learns nothing."""
    size = reproduce.Size()
    text = reproduce.Text(size)
    assert not set(text.held_out) & set(text.training)
    tokenizer = reproduce.build_tokenizer(3, 300, seed=1, text=text)
    known, *others = text.problems(40)
    others = [problem for problem in others if problem.answer != known.answer]
    model = reproduce.Transformers(2, tokenizer.get_vocab_size(), layers=1, width=32, seed=0)
    adam, _ = reproduce.optimizer(model, size, steps=60)
    batch = reproduce.encode(tokenizer, [known.text])
    for _ in range(60):
        adam.zero_grad()
        reproduce.cross_entropy(model(batch.ids)[0], batch.labels).backward()
        adam.step()
        assert not model.token.grad[1].any()
    assert reproduce.accuracy(model, tokenizer, [known]) == [1.0, 0.0]
    assert reproduce.accuracy(model, tokenizer, others)[0] == 0.0
