"""Everything that needs a GPU, in one command of a few minutes: build, tests, sanitizer, speed.

Stages: the CUDA kernels are built for this GPU; tests marked `cuda` run; the losses are timed, and compute-sanitizer
looks for bad accesses and for races in a small set of calls, both by bench/gpu_parts.py.

A stage whose tool is missing is left out, and says so; nothing is downloaded. Each stage has a limit of its own, after
which all of its processes are ended, and what was measured before it is kept. Where the build fails, older kernels are
not measured in place of these. Results go to bench/results/gpu-NAME.json after every stage; the exit status is 0 if no
stage failed, 1 if one did, 2 where there is no GPU.

    python bench/gpu.py [--rows 4096] [--minutes 8] [--skip build sanitizer]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, ROOT, Row, commit, table, write

STAGES = {"build": 120, "tests": 110, "speed": 120, "memcheck": 65, "racecheck": 65}
"""Seconds that a stage may take of the usual eight minutes; what one leaves over goes to those after it."""

COLUMNS = ("name", "rows", "ms", "us_per_row", "gigabytes_per_second", "of_copy", "peak_megabytes", "failed")
"""Of the table of times."""

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


def command(
    stage: str, options: argparse.Namespace, architecture: str, seconds: float
) -> tuple[list[str], dict[str, str]]:
    """What a stage runs, and what it adds to the environment; MissingTool if it cannot."""
    parts = [sys.executable, str(Path(__file__).resolve().with_name("gpu_parts.py"))]
    if stage != "build" and not any((ROOT / "xtoken").glob("_cuda.*.so")):
        raise MissingTool("xtoken._cuda is not built")
    if stage == "build":
        tool("nvcc")
        environment = {"XTOKEN_CUDA": "1", "XTOKEN_CUDA_ARCHS": architecture, "XTOKEN_BUILD_DIR": "build/gpu"}
        return [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], environment
    if stage == "tests":
        if importlib.util.find_spec("pytest") is None:
            raise MissingTool("pytest is not installed")
        # Names as they begin, and a traceback of what hangs, so that the last lines tell where.
        pytest = ["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=40"]
        return [sys.executable, *pytest, "-m", "cuda", "tests/losses"], {}
    if stage in {"memcheck", "racecheck"}:
        run = [tool("compute-sanitizer"), "--tool", stage, "--error-exitcode", "9", "--kernel-regex", "kns=xtoken"]
        # One allocation a tensor: otherwise an access past one tensor hits the next in torch's pool.
        return [*run, *parts, "small"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sizes = ["--rows", str(options.rows), "--vocabulary", *map(str, options.vocabulary)]
    return [*parts, "speed", *sizes, "--seconds", f"{seconds - 10:.0f}"], {}  # its start takes a few


def run_stage(stage: str, options: argparse.Namespace, architecture: str, seconds: float) -> Row:
    """Runs a stage in a process of its own, for so many seconds at most; its outcome, with what it printed last."""
    try:
        arguments, environment = command(stage, options, architecture, seconds)
    except MissingTool as missing:
        return {"status": "left out", "reason": str(missing)}
    if seconds < LEAST_SECONDS:
        return {"status": "left out", "reason": "no time is left; see --minutes"}
    started = time.perf_counter()
    status, printed, errors = finished(arguments, environment, seconds)
    result: Row = {"seconds": round(time.perf_counter() - started, 1)}
    if stage == "speed":
        result.update(collected(printed))
    last = (printed + errors).strip().splitlines()[-15:]
    if status == 0:
        return {"status": "passed", **result, **({} if stage == "speed" else {"output": last[-3:]})}
    unsupported = [line for line in last if "Device not supported" in line]
    if unsupported:  # the sanitizer's word for a machine on which it cannot work
        return {"status": "left out", "reason": unsupported[0].strip("= ")}
    reason = f"not finished after {seconds:.0f} seconds" if status is None else f"exit status {status}"
    return {"status": "failed", "reason": reason, **result, "output": last}


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="rows of logits that are timed")
    parser.add_argument("--vocabulary", type=int, nargs=2, default=[128256, 151936], help="of student and teacher")
    parser.add_argument("--minutes", type=float, default=8, help="no stage goes on after this")
    parser.add_argument("--skip", nargs="+", default=[], choices=STAGES)
    parser.add_argument("--output", help="instead of bench/results/gpu-NAME.json")
    options = parser.parse_args(arguments)
    reason = no_gpu()
    if reason is not None:
        print(f"gpu: no GPU to measure on: {reason}", file=sys.stderr)
        return 2
    end = time.perf_counter() + 60 * options.minutes
    properties = torch.cuda.get_device_properties(0)
    architecture = f"{properties.major}{properties.minor}"
    slug = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    output = Path(options.output or RESULTS / f"gpu-{slug}.json")
    results: Row = {"machine": machine(properties)}
    stages = [stage for stage in STAGES if stage not in options.skip]
    for k, stage in enumerate(stages):
        share = (end - time.perf_counter()) * STAGES[stage] / sum(STAGES[one] for one in stages[k:])
        if results.get("build", {}).get("status") == "failed":
            results[stage] = {"status": "left out", "reason": "the build failed"}
        else:
            results[stage] = run_stage(stage, options, architecture, share)
        outcome: Row = results[stage]
        write(output, results)
        print(f"{stage}: {outcome['status']}{': ' + outcome['reason'] if 'reason' in outcome else ''}", flush=True)
        if outcome["status"] == "failed":
            print("\n".join(outcome.get("output", [])), flush=True)
        if "copy_gigabytes_per_second" in outcome:
            print(f"copy: {outcome['copy_gigabytes_per_second']:.0f} GB/s", flush=True)
        if outcome.get("rows"):
            print(table(outcome["rows"], COLUMNS), flush=True)
    print(f"written: {output}")
    return int(any(results[stage]["status"] == "failed" for stage in stages))


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
