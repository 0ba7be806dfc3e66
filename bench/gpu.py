"""Everything that needs a GPU, in one command of a few minutes: build, tests, sanitizer, speed.

Stages: the CUDA kernels are built for this GPU; tests marked `cuda` run; the losses are timed against plain formulas
(`xtoken.reference`), torch.compile of them, and, where it is installed, Liger's JSD of one vocabulary as an
orientation; compute-sanitizer looks for bad accesses and for races in a small set of calls. Bandwidth is that of
traffic that cannot be avoided (each logit read once, each gradient written once), next to the one measured for a copy.

A stage whose tool is missing is left out, and says so; nothing is downloaded. Each stage, and each step that is timed,
has a limit of its own, after which all of its processes are ended, and what was measured before it is kept. Where the
build fails, older kernels are not measured in place of these. Results go to bench/results/gpu-NAME.json after every
stage; the exit status is 0 if no stage failed, 1 if one did, 2 where there is no GPU.

    python bench/gpu.py [--rows 4096] [--minutes 8] [--skip build sanitizer]
"""

from __future__ import annotations

import argparse
import functools
import importlib
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, ROOT, commit, median_seconds, peak_growth, timed, write
from torch import Tensor

STAGES = ("build", "tests", "speed", "memcheck", "racecheck")
SHARES = {"build": 120, "tests": 110, "speed": 120, "memcheck": 65, "racecheck": 65}
"""Seconds that a stage may take of the usual eight minutes; what one leaves over goes to those after it."""

STEP_LIMIT = 40
"""Seconds that a step may take to be timed, with its compilation where it has one."""

PLAIN = "P-KL all columns, plain formulas"
COMPILED = "P-KL all columns, torch.compile of the plain formulas"


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


def command(stage: str, options: argparse.Namespace, architecture: str) -> tuple[list[str], dict[str, str]]:
    """What a stage runs, and what it adds to the environment; MissingTool if it cannot."""
    part = [sys.executable, str(Path(__file__).resolve()), "--device", options.device, "--rows", str(options.rows)]
    part += ["--vocabulary", *map(str, options.vocabulary)]
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
        return [*run, *part, "--part", "small"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [*part, "--part", "speed"], {}


def run_stage(stage: str, options: argparse.Namespace, architecture: str, seconds: float) -> dict[str, Any]:
    """Runs a stage in a process of its own, for so many seconds at most; its outcome, with what it printed last."""
    try:
        arguments, environment = command(stage, options, architecture)
    except MissingTool as missing:
        return {"status": "left out", "reason": str(missing)}
    if seconds < 5:
        return {"status": "left out", "reason": "no time is left; see --minutes"}
    started = time.perf_counter()
    status, printed, errors = finished(arguments, environment, seconds)
    result: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 1)}
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


def collected(printed: str) -> dict[str, Any]:
    """What `speed` has printed, as far as it came: one JSON object a line, rows being those with a name."""
    result: dict[str, Any] = {"rows": []}
    for line in printed.splitlines():
        try:
            one = json.loads(line)
        except json.JSONDecodeError:  # of somebody else, or cut off
            continue
        if isinstance(one, dict):
            result.update(one) if "name" not in one else result["rows"].append(one)
    return result


# ---- parts: what runs under the sanitizer, and what is timed ----


def projection(students: int, teachers: int) -> Any:
    """Much like Llama 3 to Qwen3: 85 % of the students have one exact partner, the others two to four pieces."""
    import xtoken

    generator = torch.Generator().manual_seed(0)
    counts = torch.where(torch.rand(students, generator=generator) < 0.85, 1, 2)
    counts += (counts > 1) * torch.randint(0, 3, (students,), generator=generator)
    row = torch.arange(students).repeat_interleave(counts)
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    position = torch.arange(len(row)) - row_ptr[row]
    col = torch.randperm(students, generator=generator)[row] % (teachers - 28) + 7 * position
    weight = 0.1**position
    total = torch.zeros(students).index_add_(0, row, weight)
    return xtoken.ProjectionMatrix(row_ptr, col.int(), weight / total[row], teachers)


@functools.cache
def pieces(students: int, teachers: int) -> Any:
    """Much like Llama 3 to Qwen3: four students in five have a partner, and tokens without one begin with one."""
    import xtoken

    partners = int(0.8 * min(students, teachers))
    words = [str(i).translate(str.maketrans("0123456789", "abcdefghij")).encode() for i in range(partners - 10)]
    common = [*(b"%d" % digit for digit in range(10)), *words]
    sides = []
    for size, mark in ((students, b"0"), (teachers, b"1")):
        others = size - partners  # of which most share a few words
        longer = [words[i * i // others // 4] + mark + str(i).encode() for i in range(others)]
        sides.append(xtoken.Vocabulary([*common, *longer]))
    return xtoken.PieceIndex.build(*sides)


def alignment(rows: int) -> Any:
    """Chunks of one token on each side, rows of them."""
    import xtoken

    start = torch.arange(1, rows + 1, dtype=torch.int32)
    ids = [0] * (rows + 1)
    return xtoken.Alignment(torch.stack([start, start + 1, start, start + 1], 1), None, ids, ids)


def chunks_of_several(index: Any) -> Any:
    """Each side's first token without a partner against its pieces."""
    import xtoken

    tokens, known = [], []
    for side in (index.student, index.teacher):
        tokens.append(int((side.ptr.diff() > 1).nonzero()[0]))
        known.append(side.pieces[side.ptr[tokens[-1]] : side.ptr[tokens[-1] + 1]].tolist())
    middle = 1 + len(known[0])
    spans = [[1, 2, 1, middle], [2, 2 + len(known[1]), middle, middle + 1]]
    return xtoken.Alignment(spans, None, [0, tokens[0], *known[1]], [0, *known[0], tokens[1]])


def check_kernels(device: str) -> None:
    """Raises the import's own error where the kernels do not load: the package itself would go on without them."""
    if device == "cuda":
        importlib.import_module("xtoken._cuda")


def small(options: argparse.Namespace) -> None:
    """Every loss, forward and backward, on vocabularies of a few hundred tokens; compared with the plain formulas."""
    import xtoken

    check_kernels(options.device)
    W, chunks, index = projection(333, 401), alignment(7), pieces(333, 401)
    longer = chunks_of_several(index)
    labels = torch.arange(8).to(options.device)
    pairs = torch.tensor([[k, k + 2, k, k + 2] for k in range(1, 7, 2)], dtype=torch.int32)
    realised = xtoken.Alignment(pairs, student_ids=torch.arange(8), teacher_ids=torch.arange(8))
    backend = "cuda" if options.device == "cuda" else "auto"
    calls = {
        "pkl": lambda z, y, **kw: xtoken.pkl_loss(z, y, chunks, W, top_k=None, **kw),
        "pkl mean": lambda z, y, **kw: xtoken.pkl_loss(z, y, chunks, W, top_k=100, merge="mean", **kw),
        "pkl labels": lambda z, y, **kw: sum(xtoken.pkl_loss(z, y, chunks, W, labels=labels, **kw)),
        "pkl chain": lambda z, y, **kw: xtoken.pkl_loss(z, y, realised, W, merge="chain", reverse=True, **kw),
        "uld": lambda z, y, **kw: xtoken.uld_loss(z, y, chunks, **kw),
        "gold": lambda z, y, **kw: xtoken.gold_loss(z, y, chunks, W, **kw),
        "hkl": lambda z, y, **kw: xtoken.hkl_loss(z, y, chunks, W, **kw),
        "gold labels": lambda z, y, **kw: sum(xtoken.gold_loss(z, y, chunks, W, labels=labels, **kw)),
        "kd": lambda z, y, **kw: xtoken.kd_loss(z, z.detach().flip(-1), chunks, **kw),
        "kd labels": lambda z, y, **kw: sum(xtoken.kd_loss(z, z.detach().flip(-1), labels=labels, top_k=100, **kw)),
        # whose parts have different factors: backward goes over the gradient again
        "all": lambda z, y, **kw: xtoken.XTokenLoss([xtoken.Teacher(W)], **kw)(z, labels, y, chunks)[0],
        "prefix": lambda z, y, **kw: sum(xtoken.prefix_kl_loss(z, y, chunks, index, labels=labels, **kw)),
        "prefix, inside tokens": lambda z, y, **kw: xtoken.prefix_kl_loss(z, y, longer, index, **kw),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(8, 333, generator=generator).to(options.device, dtype).requires_grad_()
        y = torch.randn(8, 401, generator=generator).to(options.device, dtype)
        for name, call in calls.items():
            loss = call(z, y, backend=backend)
            loss.backward()
            got = float(loss.detach())
            want = float(call(z, y, backend="reference").detach())
            if not abs(got - want) <= 0.02 * abs(want) + 1e-3:
                raise SystemExit(f"{name}, {dtype}: {got}, and {want} by the plain formulas")
    print("small set: ran and compared")


def seconds_of(run: Callable[[], Any], device: str, together: int = 5) -> float:
    """Median seconds of a run that is warm; on a GPU of a few in a row, so that it does not wait for Python."""

    def by_events(run: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(together):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / together

    return median_seconds(run, repeat=7, timer=timed if device == "cpu" else by_events, warm=2)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside the block after so many seconds."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"not finished after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def copy_bandwidth(device: str, elements: int) -> float:
    """Bytes read and written a second by a copy of so many floats."""
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def steps(z: Tensor, y: Tensor) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed: forward and backward by name, each with the bytes that it cannot avoid to move."""
    import xtoken
    from xtoken import reference

    W, chunks = projection(z.shape[-1], y.shape[-1]), alignment(z.shape[0] - 1).to(z.device)
    index = pieces(z.shape[-1], y.shape[-1])
    kw: dict[str, Any] = {"backend": "cuda" if z.device.type == "cuda" else "auto"}
    columns = torch.arange(y.shape[-1], device=z.device)
    rows = reference.Chunks.of(chunks, z.shape[0], y.shape[0], z.device)
    entries = reference.restrict(W, columns)
    traffic = 2 * z.nbytes + y.nbytes

    def step(loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            leaf = z.detach().requires_grad_()
            loss(leaf).backward()

        return run

    def plain(leaf: Tensor) -> Tensor:
        return reference.pkl(leaf, y, rows, entries, columns).mean()

    labels = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    same = z.detach().roll(1, 0)
    result = {
        "P-KL all columns": (step(lambda leaf: xtoken.pkl_loss(leaf, y, chunks, W, top_k=None, **kw)), traffic),
        "P-KL 8192 columns": (step(lambda leaf: xtoken.pkl_loss(leaf, y, chunks, W, top_k=8192, **kw)), traffic),
        "GOLD": (step(lambda leaf: xtoken.gold_loss(leaf, y, chunks, W, **kw)), traffic),
        "H-KL": (step(lambda leaf: xtoken.hkl_loss(leaf, y, chunks, W, **kw)), traffic),
        "ULD": (step(lambda leaf: xtoken.uld_loss(leaf, y, chunks, **kw)), traffic),
        "prefix KL": (step(lambda leaf: xtoken.prefix_kl_loss(leaf, y, chunks, index, **kw)), traffic),
        "KD": (step(lambda leaf: xtoken.kd_loss(leaf, same, chunks, **kw)), 3 * z.nbytes),
        "torch cross_entropy": (
            step(lambda leaf: torch.nn.functional.cross_entropy(leaf.float(), labels)), 2 * z.nbytes
        ),
        PLAIN: (step(plain), traffic),
        COMPILED: (step(torch.compile(plain)), traffic),
    }  # fmt: skip
    if importlib.util.find_spec("liger_kernel") is not None and z.device.type == "cuda":
        from liger_kernel.transformers.jsd import LigerJSD

        jsd = LigerJSD(beta=0.5)
        target = functools.cache(lambda: same.log_softmax(-1))  # only if this step is the one that is timed
        result["Liger JSD, one vocabulary"] = (step(lambda leaf: jsd(leaf.log_softmax(-1), target())), 3 * z.nbytes)
    result["KD with labels"] = (
        step(lambda leaf: sum(xtoken.kd_loss(leaf, same, chunks, labels=labels, **kw))),  # type: ignore[return-value]
        3 * z.nbytes,
    )
    criterion = xtoken.XTokenLoss([xtoken.Teacher(W)], diagnostics=False, **kw)
    result["cross-entropy and P-KL 8192 columns, dynamic scaling"] = (
        step(lambda leaf: criterion(leaf, labels, y, chunks)[0]),
        traffic,
    )
    return result


def speed(options: argparse.Namespace) -> None:
    """Prints the times of `steps` as they come, each as JSON on a line; on fewer rows where memory is short."""

    def show(result: dict[str, Any]) -> None:
        print(json.dumps(result), flush=True)

    device = options.device
    check_kernels(device)
    copied = copy_bandwidth(device, 2**28 if device == "cuda" else 2**20)
    show({"copy_gigabytes_per_second": copied / 1e9})
    names = list(steps(*(torch.zeros(2, v, device=device) for v in options.vocabulary)))
    if not any("Liger" in name for name in names):
        show({"missing": ["liger-kernel is not installed"]})
    fitting = options.rows
    for name in sorted(names, key=lambda name: name == COMPILED):  # last: it takes longest, and may fail
        try:
            with limited(STEP_LIMIT):
                # compiled for as many rows as the formulas fitted in: each number of them is a compilation
                result = measured(name, options.device, fitting if name == COMPILED else options.rows, options, copied)
            fitting = result["rows"] if name == PLAIN else fitting
            show({"name": name, **result})
        except Exception as error:  # one of the competitors' failures must not end the others
            show({"name": name, "failed": f"{type(error).__name__}: {error}"[:500]})


def measured(name: str, device: str, rows: int, options: argparse.Namespace, copied: float) -> dict[str, Any]:
    """Time, bandwidth and memory of a step, with so many rows or as many as fit."""
    while rows >= 1:
        if device == "cuda":
            torch.cuda.empty_cache()
        try:
            generator = torch.Generator(device).manual_seed(0)
            z, y = (
                torch.randn(rows + 1, size, generator=generator, device=device).bfloat16()
                for size in options.vocabulary
            )
            run, traffic = steps(z, y)[name]
            seconds = seconds_of(run, device)
            peak = peak_growth(run, device)
        except torch.OutOfMemoryError:
            rows //= 2
            # What is left of the try must not be in the next one's way.
            z = y = run = None  # type: ignore[assignment]
            continue
        return {
            "rows": rows,
            "ms": 1e3 * seconds,
            "us_per_row": 1e6 * seconds / rows,
            "gigabytes_per_second": traffic / seconds / 1e9,
            "of_copy": traffic / seconds / copied,
            "peak_megabytes": None if peak is None else peak / 1e6,
        }
    raise MemoryError("out of memory with one row")


def table(rows: list[dict[str, Any]]) -> str:
    """The measured rows as a Markdown table."""
    lines = ["| step (bf16) | rows | ms | µs a row | GB/s | of copy | peak MB |", "| --- |" + " ---: |" * 6]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | failed: {row['failed'][:80]} |" + " |" * 5)
            continue
        peak = "" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:.0f}"
        numbers = f"{row['ms']:.3g} | {row['us_per_row']:.3g} | {row['gigabytes_per_second']:.0f}"
        lines.append(f"| {row['name']} | {row['rows']} | {numbers} | {row['of_copy']:.0%} | {peak} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="rows of logits that are timed")
    parser.add_argument("--vocabulary", type=int, nargs=2, default=[128256, 151936], help="of student and teacher")
    parser.add_argument("--minutes", type=float, default=8, help="no stage goes on after this")
    parser.add_argument("--skip", nargs="+", default=[], choices=STAGES)
    parser.add_argument("--part", choices=["small", "speed"], help="one part, in this process")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="of --part")
    parser.add_argument("--output", help="instead of bench/results/gpu-NAME.json")
    options = parser.parse_args(arguments)
    reason = None if options.part and options.device == "cpu" else no_gpu()
    if reason is not None:
        print(f"gpu: no GPU to measure on: {reason}", file=sys.stderr)
        return 2
    if options.part == "small":
        small(options)
        return 0
    if options.part == "speed":
        speed(options)
        return 0
    end = time.perf_counter() + 60 * options.minutes
    properties = torch.cuda.get_device_properties(0)
    architecture = f"{properties.major}{properties.minor}"
    slug = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    output = Path(options.output or RESULTS / f"gpu-{slug}.json")
    results: dict[str, Any] = {"machine": machine(properties)}
    left = [stage for stage in STAGES if stage not in options.skip]
    while left:
        share = (end - time.perf_counter()) * SHARES[left[0]] / sum(SHARES[stage] for stage in left)
        stage = left.pop(0)
        if results.get("build", {}).get("status") == "failed":
            outcome = {"status": "left out", "reason": "the build failed"}
        else:
            outcome = run_stage(stage, options, architecture, share)
        results[stage] = outcome
        write(output, results)
        print(f"{stage}: {outcome['status']}{': ' + outcome['reason'] if 'reason' in outcome else ''}", flush=True)
        if outcome["status"] == "failed":
            print("\n".join(outcome.get("output", [])), flush=True)
        if "copy_gigabytes_per_second" in outcome:
            print(f"copy: {outcome['copy_gigabytes_per_second']:.0f} GB/s", flush=True)
        if outcome.get("rows"):
            print(table(outcome["rows"]), flush=True)
    print(f"written: {output}")
    return int(any(results[stage]["status"] == "failed" for stage in STAGES if stage in results))


def machine(properties: Any) -> dict[str, Any]:
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
