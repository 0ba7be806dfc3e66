"""Everything that needs a GPU, in one command of a few minutes: build, tests, sanitizer, speed.

Stages: the CUDA kernels are built for this GPU; every loss is compared with float64 at the real size, and timed; ncu
reads its counters, and where its warps wait; tests marked `cuda` run; compute-sanitizer looks for bad accesses, races,
barriers that not all threads reach and memory that nobody wrote, side by side, in a small set of calls. What they run
is in bench/gpu_parts.py.

A stage whose tool is missing is left out, and says so; nothing is downloaded. Each stage has a limit of its own, after
which all of its processes are ended, and what was measured before it is kept. Where the build fails, older kernels are
not measured in place of these. Results go to gpu-NAME.json in the output folder after every stage, beside logs.txt with
all that the stages printed, and tests.xml; the exit status is 0 if no stage failed, 1 if one did, 2 where there is no
GPU. Docs quote the copy in bench/results.

    python bench/gpu.py [--output build/gpu] [--rows 4096] [--minutes 8] [--skip build racecheck | --only speed]
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, Row, commit, table, write

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
STAGES = {"build": 190, "compare": 43, "speed": 55, "counters": 90, "tests": 40, **dict.fromkeys(SANITIZERS, 12)}
"""Seconds that a stage may take unless ``--minutes`` says otherwise; what one leaves over goes to those after it. The
sanitizers, which run side by side, have theirs together."""

COLUMNS = ("name", "rows", "ms", "replay_ms", "us_per_row", "of_copy", "peak_megabytes", "failed")
"""Of the table of times."""

COUNTERS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes.sum.per_second": "bytes_per_second",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "smsp__inst_executed.sum": "warp_instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_active_percent",
    "sm__inst_executed.avg.pct_of_peak_sustained_elapsed": "issue_percent",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "special_functions_percent",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed": "l1_wavefronts_percent",
    "lts__t_sector_hit_rate.pct": "l2_hit_percent",
    "l1tex__t_sector_hit_rate.pct": "l1_hit_percent",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
}
"""Of ncu, by their name in the results; and of the reasons why warps wait all that it names."""
STALLED = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
SECTIONS = ("WarpStateStats", "LaunchStats")
"""Of ncu, for what is no counter of its own."""
LOWEST = "80"
"""The lowest of ``XTOKEN_CUDA_ARCHS`` in cmake/Cuda.cmake."""

LOGS = "logs.txt"

LEAST_SECONDS = 5
"""With less left, a stage does not begin."""


class MissingTool(Exception):
    """A stage cannot run here; the text says what it needs."""


def no_gpu() -> str | None:
    """Why there is no GPU to work on; None if there is one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; nvidia-smi shows whether the driver does"
    return None


def tool(name: str) -> str:
    """A program of the CUDA toolkit: on the path, in CUDA_HOME, or where its installer puts it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise MissingTool(f"{name} is not on the path, nor in $CUDA_HOME/bin or /usr/local/cuda/bin")
    return found


def commands(
    stage: str, options: argparse.Namespace, architecture: str, seconds: float
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What a stage runs, in turn and by name, and what it adds to the environment; MissingTool if it cannot."""
    parts = [sys.executable, str(Path(__file__).resolve().with_name("gpu_parts.py"))]
    if stage != "build" and not any((ROOT / "xtoken").glob("_cuda.*.so")):
        raise MissingTool("xtoken._cuda is not built")
    if stage == "build":
        tool("nvcc")
        # As in wheels: PTX of the lowest architecture, from which code for this GPU is assembled.
        targets = ";".join(sorted({LOWEST, architecture}, key=int))
        environment = {"XTOKEN_CUDA": "1", "XTOKEN_CUDA_ARCHS": targets, "XTOKEN_BUILD_DIR": "build/gpu"}
        return {stage: [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]}, environment
    if stage == "tests":
        if importlib.util.find_spec("pytest") is None:
            raise MissingTool("pytest is not installed")
        # Names as they begin, and a traceback of what hangs, so that the last lines tell where.
        pytest = ["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=40"]
        pytest += ["-n", "6"] if importlib.util.find_spec("xdist") is not None else []
        pytest += ["--no-tokenizers"] if importlib.util.find_spec("llama_models") is None else []
        pytest += [f"--junitxml={Path(options.output).resolve() / 'tests.xml'}"]
        return {stage: [sys.executable, *pytest, "-m", "cuda", "tests/losses"]}, {}
    if stage in SANITIZERS:
        run = [tool("compute-sanitizer"), "--tool", stage, "--error-exitcode", "9", "--kernel-regex", "kns=xtoken"]
        run += ["--report-api-errors", "no"] if stage == "memcheck" else []  # calls that torch only tries
        # One allocation a tensor: otherwise an access past one tensor hits the next in torch's pool.
        return {stage: [*run, *parts, "small"]}, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if stage == "compare":
        return {stage: [*parts, "compare"]}, {}
    if stage == "counters":
        from gpu_parts import with_kernels  # not before xtoken is built

        run = [tool("ncu"), "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
        run += ["--print-units", "base", "--kernel-name-base", "demangled", "--kernel-name", "regex:xtoken"]
        run += [word for name in SECTIONS for word in ("--section", name)]
        run += ["--metrics", ",".join(name for name in COUNTERS if "." in name)]
        return {loss: [*run, *parts, "counters", "--loss", loss] for loss in with_kernels()}, {}
    sizes = ["--rows", str(options.rows), "--vocabulary", *map(str, options.vocabulary)]
    return {stage: [*parts, "speed", *sizes, "--seconds", f"{seconds - 10:.0f}"]}, {}  # its start takes a few


def run_stage(stage: str, options: argparse.Namespace, architecture: str, seconds: float) -> Row:
    """Runs a stage in processes of its own, for so many seconds at most; its outcome, with what it printed last."""
    try:
        runs, environment = commands(stage, options, architecture, seconds)
    except MissingTool as missing:
        return {"status": "left out", "reason": str(missing)}
    if seconds < LEAST_SECONDS:
        return {"status": "left out", "reason": "no time is left; see --minutes"}
    started = time.perf_counter()
    result: Row = {"kernels": []} if stage == "counters" else {}
    reasons: list[str] = []
    last: list[str] = []
    for name, arguments in runs.items():
        # one that hangs leaves time to the others
        limit = max(0.0, min(started + seconds - time.perf_counter(), 2 * seconds / len(runs)))
        status, printed, errors = finished(arguments, environment, limit)
        log(options, stage if name == stage else f"{stage} of {name}", printed + errors)
        if stage in {"speed", "compare"}:
            result = collected(printed)
        if stage == "counters":
            result["kernels"] += counted(printed, collected(printed)["rows"])
        if status != 0:
            reason = f"not finished after {limit:.0f} seconds" if status is None else f"exit status {status}"
            reasons.append(reason if name == stage else f"{name}: {reason}")
        if status != 0 or not reasons:
            last = (printed + errors).strip().splitlines()[-15:]
    shown = {} if result else {"output": last[-3:]}
    result["seconds"] = round(time.perf_counter() - started, 1)
    if not reasons:
        return {"status": "passed", **result, **shown}
    unsupported = [line for line in last if "Device not supported" in line]
    if unsupported:  # the sanitizer's word for a machine on which it cannot work
        return {"status": "left out", "reason": unsupported[0].strip("= ")}
    return {"status": "failed", "reason": "; ".join(reasons), **result, "output": last}


def log(options: argparse.Namespace, title: str, printed: str) -> None:
    """Adds to the log of all stages."""
    with (Path(options.output) / LOGS).open("a") as file:
        file.write(f"==== {title}\n{printed}\n")


def finished(arguments: list[str], environment: dict[str, str], seconds: float) -> tuple[int | None, str, str]:
    """Runs a command: its exit status, None if it was ended with all processes that it had started; what it printed.

    Printed to files: a pipe would be waited for as long as one of the processes holds it.
    """
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    given = {**os.environ, "PATH": programs, "PYTHONPATH": search, "PYTHONUNBUFFERED": "1", **environment}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=given, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        status: int | None = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # one that hangs in the driver does not end, and is left
                process.wait(5)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return status, texts[0], texts[1]


def collected(printed: str) -> Row:
    """What `speed` has printed, as far as it came: one JSON object a line, rows being those with a name."""
    result: Row = {"rows": []}
    for line in printed.splitlines():
        try:
            one = json.loads(line)
        except json.JSONDecodeError:  # of somebody else, or cut off
            continue
        if isinstance(one, dict) and "name" in one:
            result["rows"].append(one)
        elif isinstance(one, dict):
            result.update(one)
    return result


def counted(printed: str, steps: list[Row]) -> list[Row]:
    """What ncu has printed as CSV, a row a kernel; named by the launches that steps have printed, if all are there."""
    lines = printed.splitlines()
    begin = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    kernels = [one for one in csv.DictReader(line for line in lines[begin:] if line.startswith('"')) if one["ID"]]
    names = [(step["name"], step["rows"], launched) for step in steps for launched in step["launched"]]
    if len(names) != len(kernels):
        names = [("", 0, one["Kernel Name"]) for one in kernels]
    found = [
        {"name": name, "rows": rows, "kernel": launched, **values_of(one)}
        for (name, rows, launched), one in zip(names, kernels, strict=True)
    ]
    for row in found:
        if row["rows"] and {"bytes_read", "bytes_written"} <= row.keys():
            row["bytes_per_row"] = (row["bytes_read"] + row["bytes_written"]) / row["rows"]
    return found


def values_of(kernel: dict[str, str]) -> Row:
    """The counters of a kernel, and its warps' waits in cycles an instruction."""
    found: Row = {}
    for name, value in kernel.items():
        stalled = STALLED.match(name)
        wanted = f"stalled_{stalled[1]}" if stalled else COUNTERS.get(name)
        with suppress(ValueError):
            if wanted is not None:
                found[wanted] = float(value.replace(",", ""))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="rows of logits that are timed")
    parser.add_argument("--vocabulary", type=int, nargs=2, default=[128256, 151936], help="of student and teacher")
    parser.add_argument("--minutes", type=float, help="no stage goes on after this; default: 8, less without a stage")
    parser.add_argument("--skip", nargs="+", default=[], choices=STAGES)
    parser.add_argument("--only", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--output", default=str(ROOT / "build" / "gpu"), help="folder for results and logs")
    options = parser.parse_args(arguments)
    reason = no_gpu()
    if reason is not None:
        print(f"gpu: no GPU to measure on: {reason}", file=sys.stderr)
        return 2
    properties = torch.cuda.get_device_properties(0)
    architecture = f"{properties.major}{properties.minor}"
    slug = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    Path(options.output).mkdir(parents=True, exist_ok=True)
    output = Path(options.output) / f"gpu-{slug}.json"
    (Path(options.output) / LOGS).unlink(missing_ok=True)
    results: Row = {"machine": machine(properties)}
    stages = [stage for stage in STAGES if stage in options.only and stage not in options.skip]
    minutes = sum(STAGES[stage] for stage in stages) / 60 if options.minutes is None else options.minutes
    end = time.perf_counter() + 60 * minutes
    together = [stage for stage in stages if stage in SANITIZERS]
    turns = [one for one in (*([stage] for stage in stages if stage not in together), together) if one]
    for k, turn in enumerate(turns):
        later = [STAGES[stage] for one in turns[k:] for stage in one]
        share = (end - time.perf_counter()) * sum(STAGES[stage] for stage in turn) / sum(later)
        if results.get("build", {}).get("status") == "failed":
            outcomes = [{"status": "left out", "reason": "the build failed"} for _ in turn]
        else:
            with ThreadPoolExecutor() as pool:
                mapped = pool.map if len(turn) > 1 else map  # an interrupt reaches only this thread
                given = map(itertools.repeat, (options, architecture, share))
                outcomes = list(mapped(run_stage, turn, *given))
        results.update(zip(turn, outcomes, strict=True))
        write(output, results)
        for stage in turn:
            tell(stage, results[stage])
    print(f"written: {output}")
    return int(any(results[stage]["status"] == "failed" for stage in stages))


def tell(stage: str, outcome: Row) -> None:
    """Prints the outcome of a stage."""
    print(f"{stage}: {outcome['status']}{': ' + outcome['reason'] if 'reason' in outcome else ''}", flush=True)
    if outcome["status"] == "failed":
        print("\n".join(outcome.get("output", [])), flush=True)
    if "copy_gigabytes_per_second" in outcome:
        print(f"copy: {outcome['copy_gigabytes_per_second']:.0f} GB/s", flush=True)
    if stage == "speed" and outcome.get("rows"):
        print(table(outcome["rows"], COLUMNS), flush=True)


def machine(properties: Any) -> Row:
    """What the results hold for."""
    return {
        "commit": commit(),
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": properties.total_memory / 1e9,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    sys.exit(main())
