"""The CUDA kernels compile without warnings and spills; the configuration says what is built."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import xtoken.config

ROOT = Path(__file__).parents[1]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


cuda_resources = load_script("cuda_resources")
needs_nvcc = pytest.mark.skipif(
    cuda_resources.find_nvcc() is None, reason="no nvcc on this machine: CUDA kernels are not compiled"
)

needs_nvdisasm = pytest.mark.skipif(
    None in (cuda_resources.find_nvcc(), cuda_resources.find_tool("nvdisasm")),
    reason="no nvcc, or no nvdisasm, on this machine: CUDA kernels are not disassembled",
)

COMPILED = pytest.mark.parametrize(
    ("arch", "which"),
    [("120", "usual"), pytest.param("80", "all", marks=pytest.mark.wide)],
)
"""Kernels of the type and the options that are counted, on the newest architecture; for .ci/run all of them, which take
nvcc three times as long, on the oldest. It builds a wheel for another, bench/cuda_resources.py for all."""

OTHERS = {"cross_entropy_kernel", "ranked_forward_kernel", "ranked_backward_kernel", "scale_kernel"}
"""Kernels whose passes have no ceiling."""

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6xtoken4cuda12_GLOBAL__N_19kd_kernelIffEEvi' for 'sm_90'
ptxas info    : Function properties for _ZN6xtoken4cuda12_GLOBAL__N_19kd_kernelIffEEvi
    64 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 64 bytes cumulative stack size, 480 bytes smem
ptxas info    : Compiling entry function '_Z5plainv' for 'sm_90'
ptxas info    : Function properties for _Z5plainv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 0 barriers
"""


def test_the_report_of_the_compiler_is_understood():
    kd, plain = cuda_resources.parse("kd.cu", REPORT, {"kd_kernel": 512})
    assert (kd.registers, kd.shared, kd.stack, kd.spilled, kd.threads) == (64, 480, 64, 20, 512)
    assert (kd.register_bound, kd.occupancy) == (128, 0.5)
    assert (plain.registers, plain.spilled, plain.threads, plain.register_bound) == (20, 0, 1024, 64)
    assert "| kd.cu | kd_kernel<float, float> | 90 | 64 / 128 | 480 | 64 | 20 | 512 | 50% |" in cuda_resources.table(
        [kd]
    )


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "arch", "share"),
    [
        (128, 0, 512, "90", 0.25),
        (65, 0, 512, "90", 0.25),
        (32, 100 << 10, 256, "90", 0.25),
        (40, 0, 1024, "120", 2 / 3),
    ],
)
def test_occupancy(registers, shared, threads, arch, share):
    kernel = cuda_resources.Resources("x.cu", "x", arch, registers, shared, 0, 0, threads)
    assert kernel.occupancy == share


def test_launch_bounds_are_read_from_the_sources():
    bounds = cuda_resources.launch_bounds()
    assert bounds["pkl_kernel"] == bounds["ranked_forward_kernel"] == 512


def test_every_architecture_has_limits():
    archs, _ = cuda_resources.build_settings()
    assert {"80", "120"} <= set(archs) <= set(cuda_resources.LIMITS)


def test_show_config_lists_the_architectures(monkeypatch, capsys):
    built = types.SimpleNamespace(architectures="80,90", cuda_version=13000)
    monkeypatch.setitem(sys.modules, "xtoken._cuda", built)
    xtoken.show_config()
    assert "sm_80, sm_90; PTX of 80 for others (CUDA 13.0)" in capsys.readouterr().out


def test_show_config_says_why_there_are_no_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "xtoken._cuda", None)
    assert "XTOKEN_CUDA=1 pip install builds them" in xtoken.config.config()["CUDA kernels"]


LISTING = """
.text._Z6streamPf:
.L_x_1:
        /*0010*/                   DEPBAR.LE SB0, 0x3 ;                  /* 0x000080c00000791a */
                                                                         /* 0x000fc80000000000 */
.L_x_2:
        /*0020*/                   FADD R0, R0, R1 ;                     /* 0x0000000100007221 */
                                                                         /* 0x000fc80000000000 */
        /*0030*/              @!P0 BRA `(.L_x_2) ;                       /* 0xfffffffc00c48947 */
                                                                         /* 0x000fea000383ffff */
        /*0040*/               @P0 LDGSTS.E.BYPASS.128 [R9], [R4.64] ;   /* 0x0000000004090fae */
                                                                         /* 0x0001e2000b901c46 */
        /*0050*/                   LDGDEPBAR ;                           /* 0x00000000000079af */
                                                                         /* 0x000e220000000000 */
        /*0060*/              @!P0 BRA `(.L_x_1) ;                       /* 0xfffffffc00c48947 */
                                                                         /* 0x000fea000383ffff */
"""
WAITS_FOR_ALL = LISTING.replace("0x000fc80000000000", "0x001fc80000000000", 1)
"""Of scoreboard 0: the first instruction of the loop."""


@pytest.mark.parametrize(
    ("listing", "ahead"),
    [
        (LISTING, 3),
        (WAITS_FOR_ALL, 0),
        (LISTING.replace("SB0, 0x3", "SB1, 0x3"), 0),
        (LISTING.replace("0x3 ;", "0x1 ;"), 1),
    ],
)
def test_copies_in_flight_are_read_from_the_machine_code(listing, ahead):
    assert cuda_resources.copying_loops(listing) == [("_Z6streamPf", 6, 6, 1, 0, ahead)]


def test_the_shortest_way_through_a_loop():
    branches = [
        ("@P0 BRA", ".L_far"),
        ("BRA.U !UP1,", ".L_near"),
        ("FADD R0, R0, R1", ""),
        ("BRA", ".L_far"),
        (".L_near: FMUL R0, R0, R1", ""),
        ("@P1 EXIT", ""),
        (".L_far: FADD R0, R0, R2", ""),
        ("@P2 BRA", ".L_begin"),
    ]
    code = [(16 * n, f"{text} `({label})" if label else text, 0) for n, (text, label) in enumerate(branches)]
    labels = {".L_begin": 0, ".L_near": 4, ".L_far": 6}
    assert cuda_resources.shortest_way(code, labels, 0, 7) == 3
    assert cuda_resources.shortest_way(code, labels, 0, 7, [{2, 3}]) == 6
    assert cuda_resources.shortest_way(code, labels, 0, 7, [{1, 2}, {5}]) == 6
    assert cuda_resources.shortest_way(code[:1] + code[2:], {**labels, ".L_far": 5}, 1, 6) == 4


def test_the_table_of_loops():
    report = f"{REPORT}loop of '_Z6streamPf' for 'sm_90': 41 20 1 2 3\n"
    (loop,) = cuda_resources.loops("scale", report)
    assert (loop.instructions, loop.least, loop.copies, loop.stores, loop.ahead) == (41, 20, 1, 2, 3)
    assert "| scale | stream | 90 | 3 | 20 of 41 (1w) |" in cuda_resources.loop_table([loop])


def test_the_usual_passes_are_found_among_the_loops():
    def loop(least, copies, stores):
        return cuda_resources.Loop("x", "kernel<T>", "90", 2 * least, least, copies, stores, 3)

    loops = [loop(256, 1, 0), loop(1, 3, 0), loop(2, 1, 0), loop(512, 3, 0), loop(3, 1, 1)]
    usual = cuda_resources.UsualPasses("kernel<T>", "z1 y3.2 z1w", 250.0)
    assert [(side, one.least) for side, one in usual.find(loops)] == [("z", 256), ("y", 512), ("z", 3)]
    assert usual.thousands(loops) == pytest.approx(128.256 + 2 * 151.936 + 128.256 * 3 / 256)
    with pytest.raises(LookupError, match="no loop is the pass y3"):
        cuda_resources.UsualPasses("kernel<T>", "z1w y3", 1.0).find(loops)


@pytest.mark.parametrize(
    ("wanted", "version", "has_nvcc", "is_built", "why"),
    [
        ("", "cuda: Optional[str] = '13.0'\nhip = None", True, True, "torch has CUDA 13.0"),
        ("", "cuda: Optional[str] = '13.0'", False, False, "nvcc is not found"),
        ("", "cuda: Optional[str] = None\nhip = '6.2'", True, False, "no torch with CUDA"),
        ("", None, True, False, "no torch with CUDA"),
        ("1", None, True, True, "XTOKEN_CUDA=1"),
        ("0", "cuda = '12.8'", True, False, "XTOKEN_CUDA=0"),
    ],
)
def test_kernels_are_built_for_a_torch_with_cuda(
    wanted: str, version: str | None, has_nvcc: bool, is_built: bool, why: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XTOKEN_CUDA", wanted)
    if version is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\n{version}\n")
    rules = (ROOT / "setup.py").read_text().split("\nNVCC = ")[0]
    found: dict[str, Any] = {}
    exec(rules, found)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("sys.path", [])
    found["find_nvcc"] = lambda: "/opt/cuda/bin/nvcc" if has_nvcc else None
    assert found["cuda_compiler"]() == ("/opt/cuda/bin/nvcc" if is_built else None)
    assert why in capsys.readouterr().err


@needs_nvcc
@pytest.mark.slow
@COMPILED
def test_kernels_compile_without_warnings_and_stay_in_registers(arch, which):
    kernels = cuda_resources.resources([arch], which=which)
    sources = {cuda_resources.name_of(path) for path in (ROOT / "csrc").rglob("*.cu")}
    assert {(k.source, k.arch) for k in kernels} == {(source, arch) for source in sources}
    print(cuda_resources.table(kernels))
    wrong = [k for k in kernels if k.spilled or k.registers > k.register_bound]
    assert not wrong, f"spills, or more registers than fit:\n{cuda_resources.table(wrong)}"


@needs_nvdisasm
@pytest.mark.slow
@COMPILED
def test_loops_over_rows_keep_copies_in_flight(arch, which):
    """In the machine code of every kernel that works on rows, which are those with launch bounds."""
    loops = cuda_resources.row_loops([arch], which=which)
    print(cuda_resources.loop_table(loops))
    assert {(loop.kernel.split("<")[0], loop.arch) for loop in loops} == {
        (name, arch) for name in cuda_resources.launch_bounds()
    }
    shallow = [loop for loop in loops if loop.ahead < 3]
    assert not shallow, f"loops that wait for memory:\n{cuda_resources.loop_table(shallow)}"


@needs_nvdisasm
@pytest.mark.slow
@COMPILED
def test_passes_over_rows_take_no_more_instructions_than_documented(arch, which):
    loops = cuda_resources.row_loops([arch], which=which)
    print(cuda_resources.instruction_table(loops))
    usual = cuda_resources.usual_passes()
    assert {one.kernel.split("<")[0] for one in usual} >= {loop.kernel.split("<")[0] for loop in loops} - OTHERS
    for one in usual:
        own = [loop for loop in loops if loop.kernel == one.kernel]
        assert one.thousands(own) <= one.ceiling, f"{one.kernel} on {arch}:\n{cuda_resources.loop_table(own)}"


@needs_nvdisasm
@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 2, 3])
def test_a_loop_that_waits_is_seen(ahead, tmp_path, monkeypatch):
    lines = [
        '#include "cuda/platform.cuh"',
        "__global__ void stream(const uint4* in, float* out, int n) {",
        "    XTOKEN_SHARED(slots, uint4[4][32]);",
        "    float sum = 0;",
        "#pragma unroll 1",
        "    for (int i = 0; i < n; ++i) {",
        f"        xtoken::cuda::wait_copies<{ahead}>();",
        "        uint32_t words[4];",
        "        xtoken::cuda::read_copied(slots[i % 4] + threadIdx.x, words);",
        "        xtoken::cuda::copy_async<16>(slots[i % 4] + threadIdx.x, in + i);",
        "        xtoken::cuda::commit_copies();",
        "        sum += __uint_as_float(words[0]);",
        "    }",
        "    out[threadIdx.x] = sum;",
        "}",
    ]
    (tmp_path / "stream.cu").write_text("\n".join(lines))
    monkeypatch.setattr(cuda_resources, "SOURCES", tmp_path)
    monkeypatch.setattr(cuda_resources, "REPORTS", tmp_path)
    (loop,) = cuda_resources.row_loops(["90"])
    assert loop.ahead == ahead


@needs_nvcc
@pytest.mark.slow
def test_a_kernel_that_spills_is_seen(tmp_path, monkeypatch):
    lines = [
        '#include "cuda/platform.cuh"',
        "__global__ void __launch_bounds__(1024) greedy(const float* in, float* out, int n) {",
        "    float x[96];",
        "#pragma unroll",
        "    for (int i = 0; i < 96; ++i) x[i] = in[i * 1024 + threadIdx.x];",
        "    for (int k = 0; k < n; ++k) {",
        "#pragma unroll",
        "        for (int i = 0; i < 96; ++i) x[i] = x[i] * x[(i + 1) % 96] + x[(i + 7) % 96];",
        "    }",
        "#pragma unroll",
        "    for (int i = 0; i < 96; ++i) out[i * 1024 + threadIdx.x] = x[i];",
        "}",
    ]
    (tmp_path / "greedy.cu").write_text("\n".join(lines))
    monkeypatch.setattr(cuda_resources, "SOURCES", tmp_path)
    monkeypatch.setattr(cuda_resources, "REPORTS", tmp_path)
    (kernel,) = cuda_resources.resources(["90"])
    assert kernel.kernel == "greedy"
    assert kernel.spilled > 0
    assert kernel.threads == 1024


@needs_nvcc
@pytest.mark.slow
def test_warnings_are_errors(tmp_path, monkeypatch):
    (tmp_path / "unused.cu").write_text("__global__ void kernel() { int unused; }\n")
    monkeypatch.setattr(cuda_resources, "SOURCES", tmp_path)
    monkeypatch.setattr(cuda_resources, "REPORTS", tmp_path)
    with pytest.raises(RuntimeError, match=r"unused\.cu does not compile for sm_90"):
        cuda_resources.resources(["90"])
