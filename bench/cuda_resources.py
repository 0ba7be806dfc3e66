"""What every CUDA kernel takes of a multiprocessor, on each architecture: a table, from the compiler's own report.

Registers of a thread, static shared memory of a block, bytes of stack and of registers spilled to it, the block size
that the kernel is compiled for (`__launch_bounds__`), and which share of the multiprocessor's threads such blocks fill.
`--loops` prints the machine code's loops over rows in its place: how many instructions each has, and how many copies
from memory are in flight while it works on what came before. `--rows` prints how many instructions of a warp the usual
passes over a row take at least, beside what csrc/cuda/README.md says that they may. Both need NVIDIA's disassembler,
nvdisasm.
Compiles the .cu files of csrc with the flags and for the architectures of cmake/Cuda.cmake; reports are kept in
build/cuda_resources until a source changes. `--usual` leaves out kernels of other types than bfloat16 and of options
that are seldom used, which takes a third of the time. No GPU is needed.

    python bench/cuda_resources.py [--archs 90 120] [--files ranked cuda/scale] [--usual] [--loops | --rows]
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
REPORTS = ROOT / "build" / "cuda_resources"

DEFAULT_THREADS = 1024
"""A kernel without launch bounds must run with the largest block."""


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ programming guide, table of compute capabilities)."""

    threads: int
    blocks: int
    shared_kb: int
    registers: int = 65536


LIMITS = {
    "80": Multiprocessor(2048, 32, 164),
    "86": Multiprocessor(1536, 16, 100),
    "87": Multiprocessor(1536, 16, 164),
    "89": Multiprocessor(1536, 24, 100),
    "90": Multiprocessor(2048, 32, 228),
    "100": Multiprocessor(2048, 32, 228),
    "103": Multiprocessor(2048, 32, 228),
    "120": Multiprocessor(1536, 24, 100),
    "121": Multiprocessor(1536, 24, 100),
}


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture; sizes in bytes."""

    source: str
    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spilled: int
    threads: int

    @property
    def register_bound(self) -> int:
        """Registers that a thread may have for one block of `threads` to fit."""
        return min(255, LIMITS[self.arch].registers // self.threads // 8 * 8)

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's threads that blocks of `threads` fill, without dynamic shared memory."""
        limits = LIMITS[self.arch]
        warps = -(-self.threads // 32)
        warp_registers = -(-self.registers * 32 // 256) * 256
        by_registers = limits.registers // (warp_registers * warps)
        by_shared = limits.shared_kb * 1024 // (self.shared + 1024)  # the system keeps 1 KB a block
        blocks = min(limits.threads // self.threads, limits.blocks, by_registers, by_shared)
        return blocks * self.threads / limits.threads


@dataclass(frozen=True)
class Loop:
    """A loop over a row in the machine code of one kernel on one architecture."""

    source: str
    kernel: str
    arch: str
    instructions: int
    least: int
    """Instructions on the shortest way through it that copies a vector ahead, and gathers if there are gathers."""
    copies: int
    """Instructions that start an asynchronous copy."""
    stores: int
    """Instructions that write to global memory."""
    ahead: int
    """Asynchronous copies of a thread that stay in flight when it waits for the oldest; 0: it waits for all."""


ROW_SIZES = {"z": 128256, "y": 151936}
"""Elements of a row of the student's and of the teacher's logits: Llama 3 and Qwen3."""


@dataclass(frozen=True)
class UsualPasses:
    """A kernel's passes over rows in a usual call, as csrc/cuda/README.md lists them."""

    kernel: str
    passes: str
    """Of the loops in the code's order: ``z3w.2`` is over the student's row (y: the teacher's), has three instructions
    that start a copy, writes, and is the second such after the pass before."""
    ceiling: float
    """Thousands of a warp's instructions a row, at most."""

    def find(self, loops: Sequence[Loop]) -> list[tuple[str, Loop]]:
        """The loop of each pass, with "z" or "y"."""
        found, begin = [], 0
        for name in self.passes.split():
            parts = re.fullmatch(r"([zy])(\d+)(w?)(?:\.(\d+))?", name)
            assert parts is not None, f"{self.kernel}: {name} is no pass"
            fitting = [
                n
                for n, loop in enumerate(loops)
                if n >= begin and (loop.copies, loop.stores > 0) == (int(parts[2]), parts[3] == "w")
            ]
            place = int(parts[4] or 1) - 1
            if place >= len(fitting):
                raise LookupError(f"{self.kernel}: no loop is the pass {name}:\n{loop_table(loops)}")
            found.append((parts[1], loops[fitting[place]]))
            begin = fitting[place] + 1
        return found

    def thousands(self, loops: Sequence[Loop]) -> float:
        """Thousands of a warp's instructions for a row, on the shortest way through each pass."""
        elements = 8 * 32  # of a warp, each time
        return sum(loop.least * ROW_SIZES[side] / elements for side, loop in self.find(loops)) / 1000


def usual_passes() -> list[UsualPasses]:
    """The table of csrc/cuda/README.md."""
    text = (ROOT / "csrc" / "cuda" / "README.md").read_text()
    found = re.findall(r"^\| `(\w+<.*>)`.*? \| ((?:[zy]\d+w?(?:\.\d+)? ?)+) \| .*?([\d.]+) \|$", text, re.MULTILINE)
    return [UsualPasses(kernel, passes.strip(), float(ceiling)) for kernel, passes, ceiling in found]


def find_tool(name: str) -> str | None:
    """A program of CUDA's toolkit, from the same places as setup.py's nvcc, or from NVIDIA's packages for pip."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    packages = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
    folders = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join([*folders, *map(str, packages)]))


def find_nvcc() -> str | None:
    """CUDA's compiler."""
    return find_tool("nvcc")


def build_settings() -> tuple[list[str], list[str]]:
    """Architectures and compiler flags of cmake/Cuda.cmake."""
    text = (ROOT / "cmake" / "Cuda.cmake").read_text()
    archs = re.search(r'set\(XTOKEN_CUDA_ARCHS "([\d;]+)"', text)
    flags = re.search(r"set\(XTOKEN_CUDA_FLAGS ([^)]+)\)", text)
    assert archs is not None, "cmake/Cuda.cmake sets no XTOKEN_CUDA_ARCHS"
    assert flags is not None, "cmake/Cuda.cmake sets no XTOKEN_CUDA_FLAGS"
    return archs[1].split(";"), flags[1].split()


def ptx_arch() -> str:
    """The architecture whose PTX all others are assembled from."""
    return min(build_settings()[0], key=int)


def launch_bounds() -> dict[str, int]:
    """Threads of a block by the kernel's name, as written in its `__launch_bounds__`: a number or a constant."""
    texts = [path.read_text() for path in sorted(SOURCES.rglob("*")) if path.suffix in {".h", ".cuh", ".cu"}]
    constants = {name: int(value) for t in texts for name, value in re.findall(r"constexpr \w+ (\w+) = (\d+);", t)}
    bounds = {}
    for text in texts:
        for bound, name in re.findall(r"__launch_bounds__\((\w+)[^)]*\)\s*(?:void\s+)?(\w+)\(", text):
            bounds[name] = int(bound) if bound.isdigit() else constants[bound]
    return bounds


def name_of(source: Path) -> str:
    """A source as the table names it: a loss's by its folder, cuda/scale for cuda/scale.cu."""
    name = source.relative_to(SOURCES).with_suffix("").as_posix()
    return name.removeprefix("losses/").removesuffix("/cuda")


def compiled(command: Sequence[str], source: Path, arch: str, target: Path) -> str:
    """What the compiler says; its result is there whole or not at all."""
    unfinished = target.with_name(f"unfinished.{target.name}")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stdout}{done.stderr}")
    unfinished.replace(target)
    return done.stderr


def compiler_report(nvcc: str, source: Path, arch: str, which: str) -> str:
    """What ptxas says of the source's kernels on an architecture, and, where there is nvdisasm, a line for each of
    their `copying_loops`; compiled only if a source or a flag has changed, and to PTX once for all architectures."""
    nvdisasm = find_tool("nvdisasm")
    flags = [*build_settings()[1], "-Werror=all-warnings"]
    command = [nvcc, "-std=c++17", *flags, f"-I{ROOT / 'csrc'}", "-ptx", f"-arch=compute_{ptx_arch()}", str(source)]
    command += ["-DXTOKEN_USUAL_ALONE"] if which == "usual" else []
    digest = hashlib.sha256(" ".join([*command, str(nvdisasm)]).encode())
    for path in [source, Path(__file__), *sorted(SOURCES.rglob("*.cuh")), *sorted(SOURCES.rglob("*.h"))]:
        digest.update(path.read_bytes())
    name, end = f"{name_of(source).replace('/', '_')}-{which}", digest.hexdigest()[:16]
    report, ptx, cubin = (REPORTS / f"{name}.{part}" for part in (f"{arch}.{end}.txt", f"{end}.ptx", f"{arch}.cubin"))
    if not report.exists():
        REPORTS.mkdir(parents=True, exist_ok=True)
        if not ptx.exists():
            compiled(command, source, arch, ptx)
        text = compiled([nvcc, *flags, "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", str(ptx)], source, arch, cubin)
        if nvdisasm:
            listing = subprocess.run([nvdisasm, "-hex", "-c", cubin], capture_output=True, text=True, check=True)
            text += "".join(
                f"loop of '{kernel}' for 'sm_{arch}': {' '.join(map(str, counts))}\n"
                for kernel, *counts in copying_loops(listing.stdout)
            )
        cubin.unlink()
        for old in {*REPORTS.glob(f"{name}.{arch}.*.txt"), *REPORTS.glob(f"{name}.*.ptx")} - {ptx}:
            old.unlink()
        report.write_text(text)
    return report.read_text()


INSTRUCTION = re.compile(
    r"\s*/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/\n\s*/\* 0x([0-9a-f]{16}) \*/"
)
"""Of nvdisasm's listing: address, text, and the upper half of the encoding, which names the scoreboards."""

LABEL = re.compile(r"^(\.L\w+):(?=\s*\n(?:\.L\w+:\s*\n)*\s*/\*([0-9a-f]{4,})\*/)", re.MULTILINE)
"""A label and the address of the instruction after it."""


def copying_loops(listing: str) -> list[tuple[str, int, int, int, int, int]]:
    """The innermost loops of nvdisasm's listing that start groups of copies: kernel, and the counts of `Loop`.

    Loops inside of them that start copies one by one, where tables are not aligned, count in `instructions` alone.
    """
    found = []
    for function in listing.split("\n.text.")[1:]:
        code = [(int(m[1], 16), m[2], int(m[3], 16)) for m in INSTRUCTION.finditer(function)]
        place = {address: n for n, (address, _, _) in enumerate(code)}
        labels = {m[1]: place[int(m[2], 16)] for m in LABEL.finditer(function)}
        groups = [n for n, (_, text, _) in enumerate(code) if "LDGDEPBAR" in text]
        jumps = {
            n: labels.get(text.rpartition("`(")[2].rstrip(")"), n + 1)
            for n, (_, text, _) in enumerate(code)
            if "BRA" in text
        }
        ends = [-1]
        for last, first in jumps.items():
            # what reaches back into or over a loop is one around it, or its rare code that stands elsewhere
            if first > ends[-1] and any(first <= n <= last for n in groups):
                ends.append(last)
                body = code[first : last + 1]
                inner = [range(to, n + 1) for n, to in jumps.items() if first < to <= n < last]
                single = {n for one in inner if not any(group in one for group in groups) for n in one}
                copies = {n for n in range(first, last + 1) if "LDGSTS" in code[n][1] and n not in single}
                gathers = {n for n in range(first, last + 1) if "LDG.E.U16" in code[n][1]}
                least = shortest_way(code, labels, first, last, [some for some in (copies, gathers) if some])
                stores = sum(re.search(r"\bSTG\b", text) is not None for _, text, _ in body)
                kernel = function[: function.index(":")]
                found.append((kernel, len(body), least, len(copies), stores, copies_ahead(body)))
    return found


def shortest_way(
    code: Sequence[tuple[int, str, int]],
    labels: Mapping[str, int],
    first: int,
    last: int,
    through: Sequence[Collection[int]] = (),
) -> int:
    """Instructions on the shortest way from one to another, both with it, through one of each of some."""
    start = (first, frozenset[int]())  # which of `through` have been passed before
    steps, reached = {start: 1}, deque([start])
    while reached:
        at, before = reached.popleft()
        passed = before | {n for n, some in enumerate(through) if at in some}
        if at == last and len(passed) == len(through):
            return steps[at, before]
        text = code[at][1]
        following = [at + 1]
        if "BRA" in text:
            target = labels.get(text.rpartition("`(")[2].rstrip(")"), at + 1)
            is_conditional = text.startswith("@") or re.search(r"BRA(\.DIV|\S* .*\bU?P\d)", text) is not None
            following = [at + 1, target] if is_conditional else [target]
        elif re.match(r"(EXIT|RET)\b", text):
            following = []
        for one in following:
            if first <= one <= last and (one, passed) not in steps:
                steps[one, passed] = steps[at, before] + 1
                reached.append((one, passed))
    raise ValueError(f"no way leads from {code[first][0]:#x} to {code[last][0]:#x}")


def copies_ahead(body: Sequence[tuple[int, str, int]]) -> int:
    """Groups of copies that are in flight after the loop's waits for them, by their scoreboard."""
    groups = {encoding >> 46 & 7 for _, text, encoding in body if "LDGDEPBAR" in text}
    if len(groups) != 1:
        return 0
    (board,) = groups
    waits = [re.search(rf"DEPBAR\.LE SB{board}, (0x[0-9a-f]+)", text) for _, text, _ in body]
    ahead = [int(wait[1], 16) for wait in waits if wait]
    # an ordinary wait for the scoreboard is for all that it counts
    ahead += [0 for _, _, encoding in body if encoding >> 52 >> board & 1]
    return min(ahead, default=0)


@functools.cache
def readable(mangled: str) -> str:
    """A kernel's name with its template arguments, without name spaces and parameters."""
    tool = shutil.which("c++filt")
    if tool is None:
        return mangled
    name = subprocess.run([tool, mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name).removeprefix("void ")
    depth = 0
    for at, letter in enumerate(name):  # the parameters begin at the first parenthesis outside of < >
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:at]
    return name


def loops(source: str, report: str) -> list[Loop]:
    """The loops of one report."""
    lines = re.findall(r"^loop of '(\S+)' for 'sm_(\d+)': ([\d ]+)$", report, re.MULTILINE)
    return [Loop(source, readable(name), arch, *map(int, counts.split())) for name, arch, counts in lines]


def parse(source: str, report: str, bounds: dict[str, int]) -> list[Resources]:
    """The kernels of one report."""
    kernels = []
    for part in report.split("Compiling entry function ")[1:]:
        found = re.match(r"'(\S+)' for 'sm_(\d+)'", part)
        assert found is not None, f"a report that this script does not know:\n{part[:200]}"
        name = readable(found[1])

        def number(pattern: str, text: str = part) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        kernels.append(
            Resources(
                source=source,
                kernel=name,
                arch=found[2],
                registers=number(r"Used (\d+) registers"),
                shared=number(r"(\d+) bytes smem"),
                stack=number(r"(\d+) bytes stack frame"),
                spilled=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                threads=bounds.get(name.split("<")[0], DEFAULT_THREADS),
            )
        )
    return kernels


def reports(
    archs: Sequence[str] | None = None, files: Sequence[str] | None = None, which: str = "all"
) -> dict[str, str]:
    """`compiler_report` of each source, for the architectures of cmake/Cuda.cmake unless given; `which`: "all" kernels,
    or the "usual" alone."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc is not on the path, nor in $CUDA_HOME/bin or /usr/local/cuda/bin")
    sources = [path for path in sorted(SOURCES.rglob("*.cu")) if files is None or name_of(path) in files]
    wanted = archs or build_settings()[0]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = pool.map(lambda source: "".join(compiler_report(nvcc, source, arch, which) for arch in wanted), sources)
        return dict(zip(map(name_of, sources), texts, strict=True))


def resources(
    archs: Sequence[str] | None = None, files: Sequence[str] | None = None, which: str = "all"
) -> list[Resources]:
    """All kernels on all architectures, sources compiled side by side."""
    bounds = launch_bounds()
    return [kernel for name, report in reports(archs, files, which).items() for kernel in parse(name, report, bounds)]


def row_loops(archs: Sequence[str] | None = None, files: Sequence[str] | None = None, which: str = "all") -> list[Loop]:
    """The loops over rows of all kernels on all architectures."""
    if find_tool("nvdisasm") is None:
        raise RuntimeError("there is no nvdisasm: it comes with CUDA's toolkit, or from pip as nvidia-cuda-nvdisasm")
    return [loop for name, report in reports(archs, files, which).items() for loop in loops(name, report)]


def table(kernels: Sequence[Resources]) -> str:
    """The resources as a Markdown table."""
    lines = ["| source | kernel | arch | registers | shared B | stack B | spilled B | threads | occupancy |"]
    lines.append("| --- " * 3 + "| ---: " * 6 + "|")
    for k in kernels:
        sizes = f"{k.registers} / {k.register_bound} | {k.shared} | {k.stack} | {k.spilled} | {k.threads}"
        lines.append(f"| {k.source} | {k.kernel} | {k.arch} | {sizes} | {k.occupancy:.0%} |")
    return "\n".join(lines)


def loop_table(found: Sequence[Loop]) -> str:
    """The loops as a Markdown table, a line a kernel."""
    lines = [
        "| source | kernel | arch | copies in flight | its loops: instructions at least, in all; copies, stores |",
        "| --- | --- | --- | ---: | --- |",
    ]
    for (source, kernel, arch), group in itertools.groupby(found, lambda loop: (loop.source, loop.kernel, loop.arch)):
        own = list(group)
        counts = ", ".join(f"{one.least} of {one.instructions} ({one.copies}{'w' * (one.stores > 0)})" for one in own)
        lines.append(f"| {source} | {kernel} | {arch} | {min(loop.ahead for loop in own)} | {counts} |")
    return "\n".join(lines)


def instruction_table(found: Sequence[Loop]) -> str:
    """`usual_passes` as a Markdown table, a line a kernel and architecture."""
    lines = [
        "| kernel | arch | instructions of 8 elements in its passes, at least (of) | thousands a row | at most |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for usual in usual_passes():
        for arch in sorted({loop.arch for loop in found if loop.kernel == usual.kernel}, key=int):
            own = [loop for loop in found if (loop.kernel, loop.arch) == (usual.kernel, arch)]
            passes = ", ".join(f"{side}: {one.least} ({one.instructions})" for side, one in usual.find(own))
            lines.append(f"| {usual.kernel} | {arch} | {passes} | {usual.thousands(own):.0f} | {usual.ceiling:g} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=sorted(LIMITS), help="instead of those of cmake/Cuda.cmake")
    parser.add_argument("--files", nargs="+", help="names of sources as in the table; all unless given")
    parser.add_argument(
        "--usual", dest="which", action="store_const", const="usual", default="all", help="no other type or option"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--loops", action="store_true", help="of the machine code, in place of the resources")
    shown.add_argument("--rows", action="store_true", help="instructions of the passes over a row, in their place")
    options = parser.parse_args()
    chosen = options.archs, options.files, options.which
    try:
        if options.loops:
            print(loop_table(row_loops(*chosen)))
        elif options.rows:
            print(instruction_table(row_loops(*chosen)))
        else:
            print(table(resources(*chosen)))
    except RuntimeError as error:
        print(f"cuda_resources: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
