"""Every benchmark runs, at its smallest."""

from __future__ import annotations

import importlib
import json
import math
import mmap
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from old_versions import needs_bands, needs_fsdp
from small_tokenizers import byte_level
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xtoken import demo
from xtoken.losses import backends
from xtoken.losses.loss import Needs, registered

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
cases, measure, reproduce, toy = map(importlib.import_module, ("cases", "measure", "reproduce", "toy"))


def test_machine_without_git(monkeypatch, tmp_path):
    assert measure.commit() is None or len(measure.commit().removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.machine("torch", rows=3).keys() == {"commit", "xtoken", "torch", "processor", "rows"}
    assert measure.commit() is None


def test_a_commit_says_where_files_differ_from_it(monkeypatch, tmp_path):
    def git(*words: str) -> None:
        given = ["-c", "user.name=a", "-c", "user.email=a", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *given, *words], cwd=tmp_path, check=True)

    monkeypatch.setattr(measure, "ROOT", tmp_path)
    files = [tmp_path / name for name in ("bench/results/a.json", "README.md", "code.py")]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.write_text("before")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    dirty = []
    for file in files:
        file.write_text("after")
        dirty.append(measure.commit().endswith("-dirty"))
    assert dirty == [False, False, True]


def test_peak_growth_sees_memory_that_is_free_again():
    if measure.process_memory("VmRSS") is None:
        pytest.skip("the system does not tell")

    def touch_new_pages():  # of the system: what malloc has free may count already
        with mmap.mmap(-1, 2**25) as pages:
            for first in range(0, 2**25, mmap.PAGESIZE):
                pages[first] = 1

    assert 2**24 <= measure.peak_growth(touch_new_pages) < 2**28
    assert measure.peak_growth(lambda: None) < 2**22


def test_median_seconds_leaves_the_warm_up_out():
    times = iter([5.0, 1.0, 3.0])
    runs = []
    assert measure.median_seconds(lambda: runs.append(0), 3, lambda run: run() or next(times), warm=2) == 3.0
    assert len(runs) == 5


def test_rows_of_the_same_machine_stay(tmp_path):
    path = tmp_path / "folder" / "rows.json"
    measure.write_rows(path, {"commit": "a"}, [{"loss": "x", "ms": 1}, {"loss": "y", "ms": 1}], ("loss",))
    measure.write_rows(path, {"commit": "a"}, [{"loss": "x", "ms": 2}], ("loss",))
    assert json.loads(path.read_text())["rows"] == [{"loss": "y", "ms": 1}, {"loss": "x", "ms": 2}]
    measure.write_rows(path, {"commit": "b"}, [{"loss": "x", "ms": 3}], ("loss",))
    assert json.loads(path.read_text()) == {"machine": {"commit": "b"}, "rows": [{"loss": "x", "ms": 3}]}


def test_table():
    assert measure.table([{"a": 1, "b": 0.123456}, {"a": 2}]) == "| a | b |\n| --- | --- |\n| 1 | 0.123 |\n| 2 |  |"


def test_cases_are_those_of_the_register():
    found = cases.cases()
    assert {case.loss for case in found} == set(registered().values())
    assert len({case.name for case in found}) == len(found)
    assert all(case.name.startswith(case.loss.title) for case in found)


@pytest.fixture
def main(monkeypatch, capsys, tokenizer):
    """Calls a script's main function in this process, with the tokenizers of the session unless others are given; what
    it prints."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))

    def call(name, *arguments, load=tokenizer):
        module = importlib.import_module(name)
        if hasattr(module, "load_tokenizers"):
            monkeypatch.setattr(module, "load_tokenizers", lambda *names: [load(name) for name in names])
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    yield call
    torch.set_num_threads(threads)


def small_pair() -> Callable[[str], Any]:
    """What loads a small tokenizer by its name, in place of a real one; the student's has more tokens."""
    text = "Some words, 12 or 345 of them, and the spaces   between.\n    return them\n"
    return lambda name: byte_level(400 if name == "llama3" else 300, [text])


@pytest.mark.slow
def test_bench_align(main, tmp_path, monkeypatch):
    bench_align = importlib.import_module("bench_align")
    monkeypatch.setattr(bench_align, "in_own_process", lambda run, _, **given: getattr(bench_align, run)(**given))
    output = tmp_path / "align.json"
    small = ("--lengths", 256, "--tokens", 4000, "--threads", 1, "--repeat", 1, "--hostile-tokens", 30)
    printed = main("bench_align", "--student", "llama3", "--teacher", "smollm2", *small, "--output", output)
    results = json.loads(output.read_text())
    assert [row["method"] for row in results["rows"]] == ["bytes", "auto", "dp"]
    assert all(row["million_tokens_per_second"] > 0 for row in results["rows"])
    assert "| llama3 / smollm2 | 256 | 1 | dp |" in printed
    assert {row["case"] for row in results["hostile"]} == set(bench_align.hostile_cases(10))
    assert results["machine"]["xtoken"]


@pytest.mark.slow
def test_bench_align_on_hostile_input():
    """As a process of its own, as the script starts it."""
    part = {"run": "measure_hostile", "name": "random a, b", "method": "dp", "size": 60}
    command = [sys.executable, str(BENCH / "bench_align.py"), "--part", json.dumps(part)]
    row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (row["student_tokens"], row["teacher_tokens"], row["optimal"]) == (60, 60, True)
    assert row["chunks"] > 20


@pytest.mark.slow
def test_bench_losses(main, tmp_path):
    output = tmp_path / "losses.json"
    small = ("--rows", 12, "--vocabulary", 3000, "--threads", 1, "--output", output)
    printed = main("bench_losses", *small, "--repeat", 1, "--reference-rows", 4)
    rows = json.loads(output.read_text())["rows"]
    measured = [row for row in rows if "level" in row]
    for loss in registered().values():
        assert any(row["loss"].startswith(loss.title) for row in measured)
    assert all(row["ms_per_row"] > 0 and row["times_reference"] > 0 for row in measured)
    assert all(row["floor_share"] > 0 for row in measured)
    assert "| torch cross_entropy | fp32 |" in printed
    title = next(iter(registered().values())).title
    main("bench_losses", *small, "--linear", "--linear-rows", 12, "--linear-width", 8, "--only", title)
    kept = json.loads(output.read_text())["rows"]
    assert kept[: len(rows)] == rows
    assert kept[-1]["loss"] == f"linear {title}, 12 rows of 8"


def test_bench_train(tmp_path, monkeypatch):
    """With small vocabularies; those of Llama 3 and Qwen3 take long to load."""
    bench_train = importlib.import_module("bench_train")
    text = bench_train.numbers_text(0, 300)
    monkeypatch.setattr(bench_train, "load_tokenizers", lambda *_: [byte_level(size, [text]) for size in (400, 300)])
    output = tmp_path / "train.json"
    threads = torch.get_num_threads()
    bench_train.main(["--rows", "2", "--length", "80", "--hidden", "8", "--threads", "1", "--output", str(output)])
    torch.set_num_threads(threads)
    rows = json.loads(output.read_text())["rows"]
    assert [row["scaling"] for row in rows] == ["fixed", "dynamic"]
    assert all(row["seconds_on"] > 0 and row["seconds_off"] > 0 for row in rows)
    assert all(row["logits_bytes"] > 8 * 2 * 80 * 300 for row in rows)


@pytest.mark.slow
def test_bench_corpus(main, tmp_path):
    """With small vocabularies, as in what follows; those of Llama 3 and Qwen3 take long to load."""
    output = tmp_path / "corpus.json"
    main("bench_corpus", "--megabytes", 0.1, "--repeat", 1, "--output", output, load=small_pair())
    (row,) = json.loads(output.read_text())["rows"]
    assert row["megabytes"] == pytest.approx(0.1, abs=0.01)
    assert row["share_of_tokenizing_throughput"] > 0


@pytest.mark.slow
@needs_fsdp
def test_bench_scale(main, tmp_path):
    """What is counted is what the formulas say, or the script ends."""
    output = tmp_path / "scale.json"
    sizes = ("--rows", 4, "--sizes", 100, "--worlds", 1, 2, "--repeat", 1, "--lengths", 500, 1000, "--tokens", 300, 600)
    main("bench_scale", *sizes, "--pairs", "llama3/qwen3", "--output", output, load=small_pair())
    found = json.loads(output.read_text())
    assert all(row["nanoseconds_a_token"] > 0 and row["chunks"] > 100 for row in found["alignment"])
    assert [row["entries"] > 200 and row["pieces_seconds"] > 0 for row in found["tables"]] == [True] * 2
    assert all(row["bytes"] == row["by_formula"] > 8 and row["chunks_on_several"] for row in found["sequences"])
    assert {row["teacher"] for row in found["traffic"]} == {"whole", "in parts", "cut elsewhere"}
    assert all(row["bytes_a_chunk"] == row["by_formula"] > 0 for row in found["traffic"])
    assert all(row["bytes"] == row["by_formula"] > 0 for row in found["training"])
    assert {row["ranks"] for row in found["time"]} == {1, 2}
    assert [row["devices"] for row in found["plan"]] == [64] * 4 + [512] * 4


@pytest.mark.wide
@pytest.mark.slow
def test_bench_engines(main, tmp_path):
    pytest.importorskip("ray", reason="xtoken[ray] is not installed")
    output = tmp_path / "engines.json"
    pair = ("--student", "wordpiece", "--teacher", "unigram")
    main("bench_engines", "--megabytes", 0.4, "--repeat", 1, *pair, "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert [row["engine"] for row in rows] == ["local", "ray"]
    assert all(row["megabytes_per_processor_second"] > 0 for row in rows)


@pytest.mark.slow
def test_bench_cache(main, tmp_path, monkeypatch):
    """With a teacher of few words; the one of the demo takes long to load."""
    words = PreTrainedTokenizerFast(tokenizer_object=toy.world("split").student)

    def teacher(input_ids):
        return SimpleNamespace(logits=3 * torch.randn(*input_ids.shape, len(words)))

    monkeypatch.setattr(demo, "load_teacher", lambda: (teacher, words))
    output = tmp_path / "cache.json"
    few, many = 4, len(words) - 100
    printed = main("bench_cache", "--passages", 2, "--top-k", few, many, "--output", output)
    little, most = json.loads(output.read_text())["rows"]
    assert little["kl_nats_per_token"] > 0.3
    assert 0 <= most["kl_nats_per_token"] < 1e-4
    assert "| 4 |" in printed


@pytest.mark.slow
def test_bench_quantized(main, tmp_path):
    """With a small random teacher; what is not installed is left out."""
    words = PreTrainedTokenizerFast(tokenizer_object=toy.world("split").student, eos_token="</s>")
    # logits that differ, so that those of 8 bits do too
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    output = tmp_path / "quantized.json"
    given = "--teacher", tmp_path / "teacher", "--passages", 2, "--output", output
    main("bench_quantized", *given, "--kinds", "none:float32", "int8:float32")
    full, *others = json.loads(output.read_text())["rows"]
    assert full["KL, nats a token"] == pytest.approx(0, abs=1e-6)
    assert full["same first choice"] == 1
    for row in others:
        assert row["MB"] < full["MB"]
        assert 0 < row["KL, nats a token"] < 0.01


@pytest.mark.slow
def test_events(main, tmp_path):
    """With small vocabularies; those of the pair take long to calibrate."""
    printed = main(
        "events",
        "--pairs",
        "llama3/qwen3",
        "--size",
        4000,
        "--output",
        tmp_path / "events.json",
        load=small_pair(),
    )
    results = json.loads((tmp_path / "events.json").read_text())
    assert [row["text"] for row in results["rows"]] == ["Python", "READMEs", "C++", "JavaScript, CSS, JSON", "manual"]
    assert all(row["differing_percent"] <= row["differing_percent_before"] for row in results["rows"])
    assert "| llama3/qwen3 | manual |" in printed


@pytest.mark.parametrize("on_policy", [(), ("--on-policy", "0.5")])
def test_train_real(tmp_path, monkeypatch, capsys, on_policy):
    """The data, the options and the table; training itself is tested with small models."""
    train_real = importlib.import_module("train_real")

    def train(arguments):
        options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
        lines = [json.loads(line) for line in Path(options["--eval_data"]).read_text().splitlines()]
        assert len(lines) == 3
        assert all(line["text"] for line in lines)
        rows = [json.loads(line) for line in Path(options["--data"]).read_text().splitlines()]
        given = arguments[arguments.index("--on_policy") + 1] if "--on_policy" in arguments else None
        assert given == (on_policy[1] if on_policy else None)
        assert all(set(row) == ({"prompt", "completion"} if on_policy else {"text"}) for row in rows)
        output = Path(options["--output"])
        output.mkdir()
        history = [{"step": 2, "eval_ce": 1.5, "eval_kd": 0.5, "eval_agreement": 0.25}]
        (output / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        return 0

    monkeypatch.setattr(train_real, "demo_pair", lambda folder: ["--student", "S", "--teacher", "T"])
    monkeypatch.setattr(train_real.cli, "main", train)
    output = tmp_path / "real.json"
    monkeypatch.setattr(
        sys,
        "argv",
        ["train_real.py", "demo", "--steps", "2", "--held-out-passages", "3", "--output", str(output), *on_policy],
    )
    train_real.main()
    assert "| 2 | 1.500 | 0.500 | 0.250 |" in capsys.readouterr().out
    assert json.loads(output.read_text())["pair"] == "demo"
    assert json.loads(output.read_text())["on_policy"] == (0.5 if on_policy else 0)


@pytest.fixture(scope="module")
def finding():
    return reproduce.Finding.of()


@pytest.mark.slow
@needs_bands
def test_reproduce(main, tmp_path, capsys, finding):
    output = tmp_path / "reproduce.json"
    fixed = ("--threads", torch.get_num_threads(), "--output", output)
    few = ("--quick", "--steps", 12, "--teacher-steps", 12, "--problems", 20)
    expected = f"{finding.whole} below half of CE: 0.0 and 0.0%; {finding.chosen} above twice {finding.split}"
    with pytest.raises(SystemExit, match=re.escape(f"The finding is absent. Expected {expected}")):
        main("reproduce", *fixed, *few)  # so few steps show nothing
    results = json.loads(output.read_text())
    advised = reproduce.arms()[finding.split].case.loss.name
    assert f"coverage_audit recommends {advised}" in capsys.readouterr().out
    assert [(run["setting"], run["seed"]) for run in results["runs"]] == [("plenty", seed) for seed in range(3)]
    arms = results["runs"][0]["arms"]
    assert set(arms) == {"CE", *finding}
    assert all(len(arm[measure]) == 6 for arm in arms.values() for measure in toy.MEASURES)
    with pytest.raises(SystemExit):
        main("reproduce", *fixed, *few, "--resume")
    again = capsys.readouterr().out
    assert json.loads(output.read_text())["runs"] == results["runs"]
    table = main("reproduce", *fixed, "--report")
    assert f"| {finding.chosen} |" in table
    assert table in again
    with pytest.raises(SystemExit, match="has runs of plenty in another shape"):
        main("reproduce", *fixed, *few, "--resume", "--steps", 13)


@pytest.mark.wide
def test_reproduce_continues_a_student(main, tmp_path):
    """Every loss from the same start, in processes of their own; averaged weights too."""
    output = tmp_path / "reproduce.json"
    weighted = [name for name in reproduce.WEIGHTED if name.endswith("x4")]
    few = ("--seeds", 1, "--steps", 12, "--teacher-steps", 4, "--problems", 8, "--losses", "CE", *weighted)
    printed = main("reproduce", "--settings", "random", "code", *few, "--workers", 2, "--output", output)
    results = json.loads(output.read_text())
    continued, code = results["runs"]
    assert (continued["setting"], continued["seed"]) == ("random", 3)
    assert (code["setting"], set(code["arms"])) == ("code", {"CE", *weighted})
    assert list(continued["arms"]) == ["start", "CE", *weighted]
    assert set(results["teachers"]) == {"split", "code"}
    likelihoods = {arm: measured["log-likelihood"] for arm, measured in continued["arms"].items()}
    assert len(likelihoods["start"]) == 1
    assert all(len(found) == 3 and found[-1] != likelihoods["start"][0] for found in list(likelihoods.values())[1:])
    assert len({found[-1] for found in likelihoods.values()}) == 4  # every loss teaches something else
    averaged = continued["arms"]["CE"]["log-likelihood" + reproduce.EMA]
    assert averaged != likelihoods["CE"][-1:]
    assert "over start" in printed


def test_the_finding_is_about_three_losses(finding):
    assert len({"CE", *finding}) == 4
    assert set(finding) <= set(reproduce.MAIN)


@pytest.mark.parametrize(
    ("role", "end", "absent"),
    [
        ("chosen", 0.6, ""),
        ("whole", 0.25, "{whole} below half of CE: 25.0 and 45.0%"),
        ("chosen", 0.1, "{chosen} above twice {split}: 10.0 and 5.0%"),
    ],
)
def test_reproduce_tells_whether_the_finding_is_there(finding, role, end, absent):
    ends = {"CE": 0.45, finding.whole: 0.0, finding.split: 0.05, finding.chosen: 0.6, getattr(finding, role): end}
    run = {"setting": "plenty", "seed": 0, "arms": {arm: {"exact match": [0.0, end]} for arm, end in ends.items()}}
    assert finding.lacking({"runs": [run]}) == ([absent.format(**finding._asdict())] if absent else [])


def test_leads_are_of_the_same_seed_and_claimed_by_their_error():
    ends = {"CE": [0.1, 0.5, 0.3], "better": [0.2, 0.61, 0.4], "noisy": [0.5, 0.1, 0.5], "other": [0.9]}
    runs = [
        {"setting": "rare", "seed": seed, "arms": {arm: {"probability": [at - 0.1, at, at + 0.1]}}}
        for arm, found in ends.items()
        for seed, at in enumerate(found)
    ]
    found = reproduce.values({"runs": runs}, "rare")
    assert found["better"]["probability"] == pytest.approx({0: 0.2, 1: 0.61, 2: 0.4})
    better, noisy = (reproduce.Lead.of(found, arm, "CE", "probability") for arm in ("better", "noisy"))
    assert better == pytest.approx((0.31 / 3, 0.01 / 3))
    assert better.is_claimed
    assert better.text(100) == "**+10.3 ± 0.3**"
    assert not noisy.is_claimed
    assert noisy.mean == pytest.approx(0.2 / 3)
    assert reproduce.Lead.of(found, "other", "CE", "probability") is None
    assert "| better | 3 | 40.3 | **+10.3 ± 0.3** |" in reproduce.report({"runs": runs, "teachers": {"mixed": 1.0}})


def test_arms_of_reproduce():
    """Every registered loss that goes with two tokenizers, by the names that the recorded results have."""
    recorded = json.loads((BENCH / "results" / "reproduce.json").read_text())["runs"]
    arms = reproduce.arms()
    assert {name for one in recorded for name in one["arms"]} <= {"start", "CE", *arms}
    wanted = {loss for loss in registered().values() if loss.needs is not Needs.SAME_TOKENIZER}
    assert {arm.case.loss for arm in arms.values() if arm.is_main} == wanted
    assert set(reproduce.totals("split")) == {"CE", *arms}
    for setting in reproduce.SETTINGS.values():
        assert {*setting.losses, *setting.variants} <= {"CE", *arms}


@pytest.mark.parametrize(("scale", "factor"), [("x4", 4.0), ("", 1.5), ("max 4", 1.5), ("max 16", 1.5)])
def test_scales_of_reproduce(scale, factor):
    """Cross-entropy is log 5 here, as many nats as a distance has hundredths: a bound of 16 is far."""
    logits, ids = torch.zeros(1, 4, 5), torch.tensor([[1, 2, 3, 4]])
    batch = toy.Encoded(ids, ids, ids.tolist())
    ce = math.log(5)
    for distance, bounded in (
        (ce / 1.5, factor),
        (ce / 100, {"max 4": 4.0, "max 16": 16.0, "x4": 4.0}.get(scale, 100)),
    ):
        total = reproduce.total_loss(
            logits, batch, logits, None, distil=lambda *_, at=distance: torch.tensor(at), scale=reproduce.SCALES[scale]
        )
        assert total.item() == pytest.approx(ce + bounded * distance)


def test_toy_counts_right_answers():
    """A model that knows one answer by heart is right on that problem alone; the model beside it learns nothing."""
    text, tokenizer = toy.Sums(), toy.world("split").student
    assert not set(text.held_out) & set(text.training)
    known, *others = text.problems(40)
    others = [problem for problem in others if problem.answer != known.answer]
    shape = toy.Shape(60, width=32, layers=1)
    model = toy.transformers(2, tokenizer, shape, seed=0)
    adam, _ = toy.optimizer(model, shape)
    batch = toy.encode(tokenizer, [known.text])
    for _ in range(shape.steps):
        adam.zero_grad()
        toy.cross_entropy(model(batch.ids)[0], batch.labels).backward()
        adam.step()
        assert not model.token.grad[1].any()
    assert toy.accuracy(model, tokenizer, [known]) == [1.0, 0.0]
    assert toy.accuracy(model, tokenizer, others)[0] == 0.0
    assert toy.accuracy(model, tokenizer, [known, *others]) == [1 / (1 + len(others)), 0.0]


@pytest.mark.parametrize("name", ["split", "code"])
def test_toy_measures_the_right_answer_alone(name):
    """Token by token, for two models and answers of several lengths."""
    world = toy.world(name)
    problems = world.text.problems(12)
    assert len({len(problem.answer) for problem in problems}) > 1
    model = toy.transformers(2, world.student, toy.Shape(1, width=32, layers=1), seed=0)
    with torch.no_grad():
        model.token[1] *= 3
    probability, likelihood, form = torch.zeros(3, 2)
    place = 1 if name == "split" else 0
    packed = torch.tensor([bool(re.fullmatch("[0-9]{2,3}", token)) for token in toy.tokens(world.student)])
    for problem in problems:
        ids = world.student.encode(f"<|begin|>{problem.prompt}").ids
        answer = world.student.encode(problem.answer).ids
        total = torch.zeros(2)
        for step, token in enumerate(answer):
            row = model(torch.tensor([ids]))[:, 0, -1].detach().log_softmax(-1)
            if step == place:
                form += (row[:, packed] if name == "split" else row[:, [token]]).exp().sum(1) / len(problems)
            total += row[:, token]
            ids.append(token)
        probability += total.exp() / len(problems)
        likelihood += total / len(problems)
    want = dict(zip(toy.MEASURES[1:], (probability, likelihood, form), strict=True))
    got = toy.measures(model, world, problems)
    for measure, values in want.items():
        assert got[measure] == pytest.approx(values.tolist(), rel=1e-3), measure
    assert probability[0] > 0


def test_noisy_sums_are_wrong_in_training_only():
    text = toy.NoisySums(0.5)
    problems = [text.problem(random.Random(seed), text.training) for seed in range(400)]
    right = [sum(map(int, re.findall("[0-9]+", one.prompt))) == int(one.answer.strip(" .")) for one in problems]
    assert 160 < sum(right) < 240
    assert text.problems(50) == toy.Sums().problems(50)


def test_mixed_sums_have_other_numbers():
    lines = toy.MixedSums(0.25).batch(random.Random(0), 400)
    assert sum(" Now " in line for line in lines) == 100
    assert 120 < sum(bool(re.search(r" \d+ \w+\.$", line)) for line in lines) < 180


def test_toy_code_is_cut_as_real_tokenizers_do():
    """The student leaves the last space of a line's beginning to the word; the teacher's run has all of it. Both know
    both runs, and what is right is right in Python too."""
    world = toy.world("code")
    problem = next(one for one in world.text.problems(50) if one.answer.startswith(" " * 12))
    student, teacher = ([one.decode([i]) for i in one.encode(problem.answer).ids] for one in world[1:3])
    assert student[:2] == [" " * 11, " print"]
    assert teacher[:2] == [" " * 12, "print"]
    for tokenizer in world[1:3]:
        assert all(tokenizer.token_to_id(toy.SPACE * count) is not None for count in range(1, 17))
    for one in world.text.problems(50):
        compile(one.text.replace("with", "while"), "toy", "exec")


@pytest.mark.slow
def test_truth(main, tmp_path):
    truth = importlib.import_module("truth")
    output = tmp_path / "truth.json"
    names = [case.name for case in truth.forms()][:2]
    some = ("--kinds", "numbers", "--losses", *names, "--processes", 1)
    main("truth", "--pairs", "llama3/qwen3", *some, "--output", output, load=small_pair())
    rows = json.loads(output.read_text())["rows"]
    assert [row["loss"] for row in rows if row["sort"] == "start"] == names
    assert all(0 <= row["bias"] <= row["worst"] <= 1 for row in rows)
    assert output.with_suffix(".png").stat().st_size > 5000


def test_real(main, tmp_path, monkeypatch):
    """With small random models and tokenizers; on the real texts, of which few are read."""
    real, real_texts = map(importlib.import_module, ("real", "real_texts"))
    words = real_texts.Texts(["Total 12 of 345, then 67.\n" * 4] * 8, ["Was 89 of 100, or 2024.\n"] * 3)
    code = real_texts.Texts(["def f(x):\n    return x\n"] * 8, ["if x:\n    y = 1\n"] * 3)
    monkeypatch.setattr(real_texts, "numbers", lambda: words)
    monkeypatch.setattr(real_texts, "python", lambda: code)

    def model(size):
        """Its tokenizer has no token of several digits."""
        tokenizer = byte_level(size, [re.sub("[0-9]", "", text) for text in (*words.training, *code.training)])
        tokenizer.add_special_tokens(["<|endoftext|>", "<bos>"])
        config = LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=2,
        )  # fmt: skip
        return LlamaForCausalLM(config).requires_grad_(False), tokenizer

    monkeypatch.setattr(real, "load_smollm2", lambda: model(290))
    monkeypatch.setattr(real, "load_gemma3", lambda: (model(280)[0].bfloat16(), model(280)[1]))
    output = tmp_path / "real.json"
    on_pieces = next(one for one in registered().values() if one.needs is Needs.PIECES)
    small = ("--steps", 2, "--policy-steps", 1, "--adaptation-steps", 2, "--functions", 2, "--written-tokens", 4)
    kept = ("--seeds", 1, "--sums", 2, "--output", output, "--start", tmp_path / "start.pt")
    main("real", *small, *kept, "--losses", "CE", f"{on_pieces.title}, not calibrated")
    before = json.loads(output.read_text())
    assert [run["setting"] for run in before["runs"]] == list(real.SETTINGS)
    printed = main("real", *small, *kept, "--resume", "--losses", "CE", on_pieces.title, "--parts", "numbers", "policy")
    after = json.loads(output.read_text())
    for old, new in zip(before["runs"], after["runs"], strict=True):
        assert new["arms"].items() >= old["arms"].items()
    numbers, _, code_run, policy = after["runs"]
    assert set(numbers["arms"]) == {"CE", f"{on_pieces.title}, not calibrated", on_pieces.title}
    assert set(policy["arms"]) == set(numbers["arms"]) - {"CE"}
    ends = [arm["curve"][-1] for arm in numbers["arms"].values()]
    assert all(0 < end["mass on numerals"] + end["mass on digits"] < 1 for end in ends)
    assert len({end["nats a number"] for end in ends}) > 1
    assert after["starts"]["numbers"] == after["starts"]["numbers-gemma"]
    assert code_run["arms"]["CE"]["curve"][-1]["nats a token of white space"] > 0
    assert f"| {on_pieces.title} |" in printed
    assert output.with_suffix(".png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="has runs of another size"):
        main("real", *small, *kept, "--steps", 3, "--resume")
    with pytest.raises(SystemExit, match="expected titles of"):
        main("real", *small, *kept, "--losses", "nothing")


def test_real_reads_numbers():
    """A model that knows what follows a number alone: the first token of each number and all else are even."""
    real = importlib.import_module("real")
    tokenizer = byte_level(280, ["a text of words"])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    packed = real.with_digits(tokenizer, 3)
    assert [packed.id_to_token(k) for k in packed.encode("a 1234 321").ids] == ["a", "Ġ", "123", "4", "Ġ", "321"]
    reader = real.Reader(packed, "<|endoftext|>")
    size = packed.get_vocab_size()

    def predict(ids):
        logits = torch.zeros(*ids.shape, size)
        logits[..., packed.token_to_id("4")] = torch.where(ids == packed.token_to_id("123"), 100.0, 0.0)
        return logits

    found = real.read_numbers(predict, reader, ["a 1234 7 321", "a a"])
    even = torch.tensor(size).log()
    assert found.nats == pytest.approx([float(even), float(even)])  # 7 is no number of several digits
    shares = torch.tensor([1100, 10, size - 1110]) / size
    assert torch.allclose(found.first, shares.expand(2, 3), rtol=1e-3)
    assert found.other.tolist() == pytest.approx([float(even)] * 7)
    assert real.read_numbers(predict, reader, ["a 1234 7 321"], last=True).nats == pytest.approx([float(even)])


def test_real_reads_code():
    """White space is told from other tokens, and the first token of a text does not count."""
    real = importlib.import_module("real")
    tokenizer = byte_level(270, ["a:\n    b\n"])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    reader = real.Reader(tokenizer, "<|endoftext|>")
    (row,) = reader.rows(["ab \nb"])

    def predict(ids):
        logits = torch.zeros(*ids.shape, tokenizer.get_vocab_size())
        logits[..., tokenizer.token_to_id("b")] = 100.0
        return logits

    assert len(row) == 6
    found = real.code_measures(predict, reader, ["ab \nb"])
    assert found == pytest.approx(
        {"nats a byte": 50.0, "nats a token of white space": 100.0, "nats a token elsewhere": 0.0}, abs=1e-3
    )


def test_bodies_that_parse():
    parses = importlib.import_module("real_texts").parses
    head = 'def f(x):\n    """Doc."""'
    assert parses(head, "\n    return x\n\n\ndef")
    assert parses(head, "\n\n    return x\n    y")  # the line that is not whole does not count
    assert not parses(head, "\n    return (x\n    y = 1\n")
    assert not parses(head, "\n   return x\n")
    assert not parses(head, "\n\ndef g():\n    pass\n")
    assert not parses(head, "")
