"""bench/gpu.py as far as it goes without a GPU: what it says then, its stages on a fake device, its parts."""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from xtoken import PieceIndex, ProjectionMatrix
from xtoken.check import CheckFinding, calls_of
from xtoken.losses.backends import backends_with
from xtoken.losses.cases import made_up_pair
from xtoken.losses.loss import registered

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"
sys.path.insert(0, str(SCRIPT.parent))
gpu, parts, real_pair = (importlib.import_module(name) for name in ("gpu", "gpu_parts", "real_pair"))
numbers_alignment = importlib.import_module("bench_losses").numbers_alignment
OPTIONS = argparse.Namespace(rows=6, vocabulary=[300, 350], output=".")
RESULT = "gpu-fake-gpu-9000.json"


@pytest.fixture(autouse=True)
def logs_elsewhere(monkeypatch, tmp_path):
    """Stages write what they print to a folder of the test's."""
    monkeypatch.setattr(OPTIONS, "output", str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: no GPU to measure on: torch ")


@pytest.fixture
def fake_device(monkeypatch):
    """A GPU that torch believes in, and stages that run a line of Python each."""
    properties = SimpleNamespace(name="Fake GPU 9000", major=9, minor=0, multi_processor_count=1, total_memory=2**34)
    monkeypatch.setattr(gpu, "no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    lines = dict.fromkeys(gpu.STAGES, "print('fine')")
    row = {"name": "one", "rows": 4, "ms": 0.5, "replay_ms": 0.25, "us_per_row": 125.0, "of_copy": 0.5}
    rows = [{**row, "peak_megabytes": 1.0}, {"name": "other", "failed": "OutOfMemoryError"}]
    printed = "\n".join(map(json.dumps, [{"copy_gigabytes_per_second": 3000.0}, *rows]))
    lines["speed"] = f"print({printed!r}, flush=True)"
    monkeypatch.setattr(gpu, "commands", lambda stage, *_: ({stage: [sys.executable, "-c", lines[stage]]}, {}))
    return lines


@pytest.fixture
def built(monkeypatch, tmp_path):
    """A folder with kernels that are built."""
    (tmp_path / "xtoken").mkdir()
    (tmp_path / "xtoken" / "_cuda.abi3.so").touch()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)


def test_results_of_a_fake_device_are_written(fake_device, tmp_path, capsys):
    output = tmp_path / RESULT
    assert gpu.main(["--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "memcheck: passed\n" in printed
    assert "copy: 3000 GB/s" in printed
    assert "| one | 4 | 0.5 | 0.25 | 125 | 0.5 | 1 |  |" in printed
    assert "| other |  |  |  |  |  |  | OutOfMemoryError |" in printed
    results = json.loads(output.read_text())
    assert results["machine"]["gpu"] == "Fake GPU 9000"
    assert [results[stage]["status"] for stage in gpu.STAGES] == ["passed"] * len(gpu.STAGES)
    logs = (tmp_path / gpu.LOGS).read_text()
    assert logs.startswith("==== build\nfine\n\n==== compare\nfine\n")
    assert sorted(re.findall("==== (.+)", logs)) == sorted(gpu.STAGES)


def test_a_stage_that_fails_is_shown_and_the_others_run(fake_device, tmp_path, capsys):
    fake_device["racecheck"] = "print('RACECHECK SUMMARY: 1 hazard'); raise SystemExit(9)"
    output = tmp_path / RESULT
    assert gpu.main(["--output", str(tmp_path), "--skip", "build"]) == 1
    printed = capsys.readouterr().out
    assert "racecheck: failed: exit status 9\nRACECHECK SUMMARY: 1 hazard\nsynccheck: " in printed
    assert "build" not in json.loads(output.read_text())


@pytest.fixture
def late(monkeypatch, tmp_path):
    """A file; once it is there, however long that takes, the time of the process that is waited for is up."""
    wait, over = subprocess.Popen.wait, tmp_path / "over"

    def wait_for_it(process, timeout=None):
        if process in waited_for:
            return wait(process, timeout)
        waited_for.append(process)
        while not over.exists() and process.poll() is None:
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(process.args, timeout)

    waited_for: list[subprocess.Popen] = []
    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_it)
    return over


@pytest.mark.slow
def test_a_stage_that_takes_too_long_is_ended(fake_device, late):
    fake_device["speed"] += f"; import pathlib, time; pathlib.Path({str(late)!r}).touch(); time.sleep(600)"
    result = gpu.run_stage("speed", OPTIONS, "90", 5.0)
    assert gpu.run_stage("tests", OPTIONS, "90", 4.0)["status"] == "left out"
    assert (result["status"], result["reason"]) == ("failed", "not finished after 5 seconds")
    assert [row["name"] for row in result["rows"]] == ["one", "other"]


@pytest.mark.slow
def test_processes_of_a_stage_end_with_it(tmp_path, late):
    """One that holds what the stage prints to would keep a pipe open. It has a lock until it ends."""
    lock, lived_on = tmp_path / "lock", tmp_path / "lived on"
    child = "\n".join([
        "import fcntl, pathlib, time",
        f"lock = open({str(lock)!r}, 'w')",
        "fcntl.flock(lock, fcntl.LOCK_EX)",
        f"pathlib.Path({str(late)!r}).touch()",
        "time.sleep(60)",
        f"pathlib.Path({str(lived_on)!r}).touch()",
    ])  # fmt: skip
    parent = f"import subprocess, sys; print('begun'); subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.finished([sys.executable, "-c", parent], {}, 2.0) == (None, "begun\n", "")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
    assert not lived_on.exists()


def test_after_a_build_that_fails_older_kernels_are_left_alone(fake_device, tmp_path):
    fake_device["build"] = "raise SystemExit('nvcc: no')"
    output = tmp_path / RESULT
    assert gpu.main(["--output", str(tmp_path)]) == 1
    results = json.loads(output.read_text())
    assert results["build"]["output"] == ["nvcc: no"]
    assert all(results[stage] == {"status": "left out", "reason": "the build failed"} for stage in list(gpu.STAGES)[1:])


def test_a_sanitizer_that_cannot_work_here_is_left_out(fake_device):
    fake_device["memcheck"] = "print('========= Error: Device not supported. Use ...'); raise SystemExit(1)"
    result = gpu.run_stage("memcheck", OPTIONS, "90", 60.0)
    assert result == {"status": "left out", "reason": "Error: Device not supported. Use ..."}


def test_time_that_is_left_over_goes_to_later_stages(fake_device, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(gpu, "run_stage", lambda stage, *rest: given.update({stage: rest[-1]}) or {"status": "passed"})
    shares = gpu.STAGES
    gpu.main(["--output", str(tmp_path), "--minutes", "8", "--skip", "racecheck"])
    assert given["build"] == pytest.approx(480 * shares["build"] / (sum(shares.values()) - shares["racecheck"]), abs=1)
    assert given["initcheck"] == given["memcheck"] == pytest.approx(480, abs=2)  # side by side
    assert sum(shares.values()) <= 480
    gpu.main(["--output", str(tmp_path), "--skip", "build"])
    assert given["compare"] == pytest.approx(shares["compare"], abs=1)
    assert sum(shares.values()) - shares["build"] <= 276
    given.clear()
    gpu.main(["--output", str(tmp_path), "--only", "speed", "tests"])
    assert list(given) == ["speed", "tests"]


def test_a_machine_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    properties = SimpleNamespace(name="x", major=9, minor=0, multi_processor_count=1, total_memory=2**34)
    assert gpu.machine(properties)["commit"] is None


def test_kernels_that_do_not_load_are_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "xtoken._cuda", None)
    parts.check_kernels("cpu")
    with pytest.raises(ImportError):
        parts.check_kernels("cuda")


def test_results_are_written_after_every_stage(fake_device, tmp_path, monkeypatch):
    output = tmp_path / RESULT
    run_stage = gpu.run_stage

    def interrupted(stage, *rest):
        if stage == "memcheck":
            raise KeyboardInterrupt
        return run_stage(stage, *rest)

    monkeypatch.setattr(gpu, "run_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--output", str(tmp_path)])
    assert list(json.loads(output.read_text())) == ["machine", "build", "compare", "speed", "counters", "tests"]


def test_without_kernels_only_the_build_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    result = gpu.run_stage("speed", OPTIONS, "90", 60.0)
    assert result == {"status": "left out", "reason": "xtoken._cuda is not built"}


@pytest.mark.parametrize(("stage", "name"), [("build", "nvcc"), ("memcheck", "compute-sanitizer")])
def test_a_missing_tool_leaves_the_stage_out(monkeypatch, built, stage, name):
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    result = gpu.run_stage(stage, OPTIONS, "90", 60.0)
    assert result["status"] == "left out"
    assert result["reason"].startswith(f"{name} is not on the path")


def test_commands_of_the_stages(monkeypatch, built):
    monkeypatch.setattr(gpu, "tool", lambda name: f"/cuda/bin/{name}")

    def command(stage, architecture="90"):
        runs, environment = gpu.commands(stage, OPTIONS, architecture, 60.0)
        assert list(runs) == [stage]
        return runs[stage], environment

    build, environment = command("build")
    assert build[1:] == ["setup.py", "--quiet", "build_ext", "--inplace"]
    assert (environment["XTOKEN_CUDA"], environment["XTOKEN_CUDA_ARCHS"]) == ("1", "80;90")
    assert command("build", "80")[1]["XTOKEN_CUDA_ARCHS"] == "80"
    assert f'set(XTOKEN_CUDA_ARCHS "{gpu.LOWEST};' in (SCRIPT.parents[1] / "cmake" / "Cuda.cmake").read_text()
    memcheck, _ = command("memcheck")
    assert memcheck[:3] == ["/cuda/bin/compute-sanitizer", "--tool", "memcheck"]
    assert memcheck[-2:] == [str(SCRIPT.with_name("gpu_parts.py")), "small"]
    speed, _ = command("speed")
    assert speed[2:] == ["speed", "--rows", "6", "--vocabulary", "300", "350", "--seconds", "50"]
    tests, _ = command("tests")
    assert tests[-3:] == ["-m", "cuda", "tests/losses"]
    assert f"--junitxml={Path(OPTIONS.output) / 'tests.xml'}" in tests


def test_each_loss_with_kernels_is_profiled_by_itself(monkeypatch, built):
    monkeypatch.setattr(gpu, "tool", lambda name: f"/cuda/bin/{name}")
    runs, _ = gpu.commands("counters", OPTIONS, "90", 60.0)
    assert list(runs) == [name for name in registered() if "cpu" in backends_with(name)]
    for name, counters in runs.items():
        assert counters[:3] == ["/cuda/bin/ncu", "--clock-control", "none"]
        assert "--csv" in counters
        assert counters[-4:] == [str(SCRIPT.with_name("gpu_parts.py")), "counters", "--loss", name]


STALLED = "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
RAW = f"""==PROF== Disconnected
"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","{STALLED}","other"
"","","byte","byte","inst","%"
"0","void first_kernel<float>","1,234","6","0.5","7"
"1","second_kernel","10","no data","1","7"
"""
STEP = {"name": "one", "rows": 8, "launched": ["first", "second"]}


def test_counters_of_a_profile():
    """As ncu prints them: a line of units below the names, and what it says before."""
    first, second = gpu.counted(RAW, [STEP])
    assert first == {
        "name": "one", "rows": 8, "kernel": "first", "bytes_read": 1234.0, "bytes_written": 6.0, "bytes_per_row": 155.0,
        "stalled_barrier": 0.5,
    }  # fmt: skip
    assert second == {"name": "one", "rows": 8, "kernel": "second", "bytes_read": 10.0, "stalled_barrier": 1.0}
    assert [row["kernel"] for row in gpu.counted(RAW, [])] == ["void first_kernel<float>", "second_kernel"]


def test_a_loss_that_is_not_profiled_costs_only_itself(monkeypatch, tmp_path):
    """Of one that does not end, and of one that fails, nothing is kept."""
    good = (0, f"{json.dumps(STEP)}\n{RAW}", "")
    ends = {"slow": (None, "", ""), "a": good, "bad": (1, "", "no kernels\n"), "c": good}
    monkeypatch.setattr(gpu, "commands", lambda *_: ({loss: [loss] for loss in ends}, {}))
    monkeypatch.setattr(gpu, "finished", lambda arguments, *_: ends[arguments[0]])
    result = gpu.run_stage("counters", OPTIONS, "90", 60.0)
    assert (result["status"], result["output"]) == ("failed", ["no kernels"])
    assert result["reason"] == "slow: not finished after 30 seconds; bad: exit status 1"
    assert [row["kernel"] for row in result["kernels"]] == ["first", "second"] * 2
    assert "==== counters of bad\nno kernels\n" in (tmp_path / gpu.LOGS).read_text()


@pytest.mark.slow
def test_the_real_pair_is_compared(monkeypatch, capsys):
    monkeypatch.setattr(parts, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(parts, "calls_of", lambda *given: calls_of(*given)[:1])
    parts.compare("cpu", rows=8)
    rows = gpu.collected(capsys.readouterr().out)["rows"]
    assert [row["loss"] for row in rows] == [name for name in registered() if "cpu" in backends_with(name)]
    assert all("failed" not in row for row in rows)


def test_a_wrong_loss_at_the_real_size_is_an_error(monkeypatch, capsys):
    name = next(iter(registered()))

    def wrong(call, inputs, dtype):
        return CheckFinding(name, call.case.name, str(dtype), "cuda", 1.0, 0.5, "loss: 2, expected 1", 1.0, True)

    monkeypatch.setattr(parts, "finding", wrong)
    with pytest.raises(SystemExit, match=r"torch.bfloat16, backend 'cuda': loss: 2, expected 1; error 1.0e"):
        parts.compare("cpu", 8, [name])
    assert all("failed" in row for row in gpu.collected(capsys.readouterr().out)["rows"])


def test_the_stored_pair_is_the_real_one(vocabulary):
    pair, aligned = real_pair.load()
    student, teacher = vocabulary("llama3"), vocabulary("qwen3")
    W, pieces = ProjectionMatrix.build(student, teacher), PieceIndex.build(student, teacher, texts=())
    assert W.shape == pair.projection.shape
    for name in ("row_ptr", "col", "weight"):
        assert torch.equal(getattr(W, name), getattr(pair.projection, name))
    for ours, theirs in ((pieces.student, pair.pieces.student), (pieces.teacher, pair.pieces.teacher)):
        assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("length", "ptr", "pieces"))
    events = [torch.cat([one.student.event, one.teacher.event]) for one in (pieces, pair.pieces)]
    assert len(torch.stack(events).unique(dim=1).T) == pieces.events == pair.pieces.events
    assert torch.equal(aligned.spans, numbers_alignment(student, teacher, real_pair.ALIGNED_TOKENS).spans)


def test_the_small_set_has_every_loss_with_kernels_in_two_types(capsys):
    parts.small("cpu")
    *lines, launches = capsys.readouterr().out.splitlines()
    assert launches == "0 launches"
    for name in parts.with_kernels():
        assert f"{name}, as usual, labels, torch.bfloat16" in lines
        assert any(line.startswith(f"{name}, ") and line.endswith("torch.float32") for line in lines)
    assert "pkl, merge=mean, labels, torch.float32" in lines
    assert "pkl, as usual, trained W, torch.bfloat16" in lines


def speed(capsys, rows=6, seconds=600.0):
    """What it prints."""
    parts.speed("cpu", rows, (300, 350), seconds)
    return gpu.collected(capsys.readouterr().out)


@pytest.mark.slow
def test_speed_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # the compiler's time is not this test's
    monkeypatch.setattr(parts, "pair_of", lambda *widths: made_up_pair(*(size - 7 for size in widths)))  # padded logits
    result = speed(capsys)
    names = [row["name"] for row in result["rows"]]
    fast = [registered()[name].title for name in parts.with_kernels()]
    for loss in registered().values():
        assert any(name.startswith(loss.title) and not name.endswith(parts.COMPILED) for name in names)
        assert (f"{loss.title} with labels" in names) == (loss.title in fast)
    one, formula = fast[-1], next(loss.title for loss in registered().values() if loss.title not in fast)
    order = (one, "torch cross_entropy", f"{one} with labels", f"{one}{parts.PLAIN}", formula)
    places = [names.index(name) for name in order]
    assert places == sorted(places)
    assert names[-1].endswith(parts.COMPILED)
    assert sum(name.endswith("teacher's order") for name in names) == 2
    assert all(row["ms"] > 0 and row["rows"] == 6 and row["replay_ms"] is None for row in result["rows"])
    assert result["copy_gigabytes_per_second"] > 0
    assert result["missing"] == ["liger-kernel is not installed"]


@pytest.mark.parametrize(
    ("printed", "row"),
    [
        ("1980, 269.32\n", {"sm_clock_mhz": 1980.0, "power_watts": 269.32}),
        ("1410, [N/A]\n", {"sm_clock_mhz": 1410.0}),
        ("No devices were found\n", {}),
    ],
)
def test_clocks_of_nvidia_smi(printed, row):
    assert parts.clocks_of(printed) == row


def test_clocks_are_asked_while_steps_run(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "1980, $1"\nsleep 0.2\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0-1"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    steps: list[float] = []

    def step() -> None:
        time.sleep(0.01)
        steps.append(time.perf_counter())

    assert parts.clocks(step) == {"sm_clock_mhz": 1980.0}
    assert steps


def test_losses_that_the_stored_pair_has_too_little_for_are_named_once(monkeypatch, capsys):
    made_up = parts.pair_of(300, 350)
    data = made_up._replace(pieces=PieceIndex(made_up.pieces.data))
    monkeypatch.setattr(parts, "pair_of", lambda *_: data)
    result = speed(capsys, seconds=0.0)
    reason, _, titles = result["missing"][-1].partition(": no ")
    assert reason == "the stored pair has not the text of tokens"
    left_out = titles.split(", ")
    assert set(left_out) < {loss.title for loss in registered().values() if loss.name not in parts.with_kernels()}
    assert not any(row["name"].startswith(tuple(left_out)) for row in result["rows"])


def test_speed_begins_no_step_when_time_is_short(capsys):
    rows = speed(capsys, seconds=min(parts.STEP_SECONDS.values()) - 1)["rows"]
    assert rows
    assert all(row["failed"] == "left out: no time is left" for row in rows)


def test_speed_takes_fewer_rows_where_memory_is_short(monkeypatch, capsys):
    tried: list[int] = []

    def make(z, y):
        def run():
            if not tried or tried[-1] != len(z) - 1:
                tried.append(len(z) - 1)
            if len(z) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return run, 100

    def broken(z, y):
        raise ValueError("no")

    makers = {"broken": broken, f"a{parts.PLAIN}": make, f"a{parts.COMPILED}": make}
    monkeypatch.setattr(parts, "makers", lambda *_: makers)
    failed, *rows = speed(capsys)["rows"]
    assert failed == {"name": "broken", "failed": "ValueError: no"}
    assert [row["rows"] for row in rows] == [1, 1]
    assert tried == [6, 3, 1]  # the compiled formula begins where the plain one ended
