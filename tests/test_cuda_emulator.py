"""The emulator of CUDA: correct kernels pass in every order, and each planted fault is reported."""

from __future__ import annotations

import ctypes
import math
import re

import pytest
import torch
from cuda_emulator.emulator import ERRORS, FOLDER, Emulator, Traffic, build, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=f"the emulator {why_not()}")]

SCHEDULES = [("forward", 0), ("reverse", 0), *((order, seed) for order in ("random", "one_ahead") for seed in range(3))]


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return Emulator(build("faults", [FOLDER / "faults.cu"]))


class Kernels:
    """Launches kernels of faults.cu on n inputs; the outputs start without values, the counter with `counted`."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        emulator.functions.last_failure.restype = ctypes.c_char_p

    def launch(
        self, name: str, inputs: torch.Tensor, grid: int = 1, block: int = 64, shared: int = 0, counted: int = 0
    ) -> torch.Tensor:
        with self.emulator.memory() as memory:
            n = inputs.numel()
            out = memory.empty((n,), torch.float32, "out")
            count = memory.copy(torch.tensor([counted]), "count")
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (memory.copy(inputs, "in"), out, count)]
            code = self.emulator.functions.launch(name.encode(), grid, block, shared, *pointers, n)
            if code == -1:
                raise RuntimeError(self.emulator.functions.last_failure().decode())
            assert code == 0, f"CUDA error {code}"
            return out.clone()


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{s[0]}-{s[1]}")
def kernels(emulator: Emulator, request: pytest.FixtureRequest) -> Kernels:
    emulator.set_order(*request.param)
    return Kernels(emulator)


def numbers(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


# ---- correct kernels ----


@pytest.mark.parametrize(("n", "block"), [(5000, 256), (7, 32), (1000, 1024)])
def test_sums_through_shuffles_and_shared_memory(kernels, n, block):
    out = kernels.launch("block_sum", numbers(n), grid=3, block=block)
    assert torch.allclose(out[:3], numbers(n).sum(), atol=1e-3)


def test_dynamic_shared_memory(kernels):
    assert torch.equal(kernels.launch("reverse", numbers(500), shared=2000), numbers(500).flip(0))


def test_vector_loads_and_stores(kernels):
    assert torch.equal(kernels.launch("reverse_by_four", numbers(500), grid=2), numbers(500).flip(0))


def test_asynchronous_copies(kernels):
    assert torch.equal(kernels.launch("reverse_by_copies", numbers(2500), grid=2, shared=2048), numbers(2500).flip(0))


def test_traffic_is_counted(emulator):
    with emulator.memory() as memory:
        x, out, count = (memory.copy(t) for t in (numbers(500), numbers(500), torch.tensor([0])))
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, out, count)]
        assert emulator.functions.launch(b"reverse_by_four", 2, 64, 0, *pointers, 500) == 0
        assert memory.traffic(x) == Traffic(read=2000, written=0, different=2016)
        assert memory.traffic(out) == Traffic(read=0, written=2000, different=2016)
        assert memory.traffic(count) == Traffic(read=0, written=0, different=0)


def test_memory_may_be_shown_after_an_error(emulator):
    with emulator.memory() as memory:
        values = memory.empty((2,), torch.float32)
        values[0] = 1.5
        memory.mark_written(values[:1])
        with pytest.raises(RuntimeError, match="nobody wrote 4 of 8 bytes"):
            memory.result(values)
    assert repr(values) == "tensor([1.5000,    nan])"


def test_atomics_and_the_last_block(kernels):
    out = kernels.launch("count_positive", numbers(999), grid=5)
    assert out[0] == (numbers(999) > 0).sum()


def test_a_warp_barrier_orders_its_lanes(kernels):
    out = kernels.launch("rotate_warp", numbers(128), block=128)
    assert torch.equal(out, numbers(128).view(4, 32).roll(1, dims=1).flatten())


def test_one_warp_may_work_while_others_wait(kernels):
    out = kernels.launch("first_warp_scans", numbers(96), block=96)
    assert torch.allclose(out, numbers(96)[:32].cumsum(0).repeat(3), atol=1e-5)


def test_votes(kernels):
    x = numbers(64)
    out = kernels.launch("votes", x)
    lanes = (x > 0)[:32]
    expected = [(x > 0).any(), (x > 0).all(), (x > 0).sum(), lanes.sum(), 1 + lanes.int().argmax(), 1]
    assert out[:6].tolist() == [float(v) for v in expected]


@pytest.mark.parametrize("multiprocessors", [1, 2, 3])
@pytest.mark.parametrize("grid", [2, 3])
def test_each_chunk_is_taken_once(kernels, emulator, grid, multiprocessors):
    """By blocks side by side of equal or very unequal speed, and by blocks that start when others have ended."""
    emulator.set_multiprocessors(multiprocessors)
    out = kernels.launch("take_chunks", torch.zeros(64), grid=grid)
    emulator.set_multiprocessors(2)
    taken = out[32 : 32 + grid].int().tolist()
    assert out[:16].int().bincount(minlength=grid).tolist() == taken
    assert sum(taken) == 16
    if multiprocessors == 1 or emulator.order == "one_ahead":  # the others come too late
        assert sorted(taken) == [0] * (grid - 1) + [16]
    elif emulator.order in ("forward", "reverse"):
        assert min(taken[:multiprocessors] if emulator.order == "forward" else taken[-multiprocessors:]) >= 5


def test_blocks_are_of_unequal_speed(emulator):
    """In the order `random`, so that the queue is not dealt out evenly by chance."""
    most = set()
    for seed in range(6):
        emulator.set_order("random", seed)
        most.add(int(Kernels(emulator).launch("take_chunks", torch.zeros(64), grid=2)[32:34].max()))
    assert min(most) <= 10
    assert max(most) >= 14


def test_a_queue_that_is_not_emptied_is_seen(kernels):
    out = kernels.launch("take_chunks", torch.zeros(64), grid=2, counted=3)
    assert out[:3].isnan().all()
    assert not out[3:16].isnan().any()


@pytest.mark.parametrize("errors", ERRORS)
def test_errors_of_approximate_functions(emulator, errors):
    """They lie where they are told to, within what CUDA documents."""
    x = torch.cat([torch.linspace(0.001, 4.0, 500), torch.tensor([0.0, 1e-40, 0.0, 1.0, 0.0])])
    emulator.set_errors(errors)
    got = Kernels(emulator).launch("approximate", x).double().view(-1, 5)
    emulator.set_errors("none")
    x = x.double().view(-1, 5)
    exact = torch.stack([x[:, 0].exp2(), x[:, 1].log2(), x[:, 2].exp(), x[:, 3].log(), x[:, 4] / 3], 1)
    assert got[-1].tolist() == [1.0, -math.inf, 1.0, 0.0, 0.0]
    error, exact = (got - exact)[:-1], exact[:-1].abs()
    bound = torch.tensor([2.5, 2.0, 2.5, 1.5, 2.5], dtype=torch.float64) * 2**-23 * exact
    near = (x[:-1, 1] > 0.5) & (x[:-1, 1] < 2.0)
    bound[:, 1] = torch.where(near, 2**-22, bound[:, 1])
    assert bool((error.abs() <= bound).all())
    above, below = bool((error > 0).any()), bool((error < 0).any())
    assert (above, below) == {"above": (True, False), "below": (False, True)}.get(errors, (True, True))
    assert errors == "none" or bool((error.abs() > bound / 10).all())


# ---- faults ----


def test_a_store_that_would_not_be_seen_is_refused(tmp_path):
    source = tmp_path / "unseen.cu"
    source.write_text(
        '#include "cuda/platform.cuh"\n'
        "struct Pair { float a, b; };\n"
        "__attribute__((noinline)) Pair pair(float x) { return {x, x}; }\n"
        "__global__ void kernel(Pair* out) { *out = pair(1); }\n"
        "void* use() { return reinterpret_cast<void*>(kernel); }\n"
    )
    with pytest.raises(RuntimeError, match=r"unseen.*would not see these stores: .*pair"):
        build("unseen", [source])


FAULTS = [
    ("missing_barrier", r"race: read of 4 bytes at shared 'values' \+ \d+ .*; write by|race: write .*; read by", {}),
    ("missing_second_barrier", r"race: (write|read) of 4 bytes at shared 'value' \+ 0", {}),
    ("race_in_shared", r"race: (write|read) of 4 bytes at shared 'sum' \+ 0", {}),
    ("race_in_warp", r"race: (write|read) of 4 bytes at shared 'values'", {"block": 32}),
    ("race_between_blocks", r"race between blocks: write of 4 bytes at 'out' \+ 0 ", {"grid": 2}),
    ("missing_fence", r"race between blocks: read of 4 bytes at 'out' \+ \d", {"grid": 3}),
    ("atomic_and_plain", r"race: (write|atomic update) of 4 bytes at 'count' \+ 0", {}),
    ("barrier_after_exit", r"divergent barrier: ", {}),
    ("barrier_in_branch", r"divergent barrier: .* is at another barrier", {}),
    ("barrier_against_warp", r"divergent barrier: block \(0,0,0\) waits for ever: ", {}),
    ("shuffle_without_lane", r"divergent (warp|barrier): ", {"block": 32}),
    ("shuffle_outside_mask", r"divergent warp: .* reads lane \d+, which takes no part", {"block": 32}),
    ("store_out_of_bounds", r"out of bounds: write of 4 bytes at 0 bytes past the end of 'out' \(256 bytes\)", {}),
    ("half_store_out_of_bounds", r"out of bounds: write of 2 bytes at 0 bytes past the end of 'out' \(256 bytes\)", {}),
    ("load_out_of_bounds", r"out of bounds: read of 16 bytes at 0 bytes past the end of 'in' ", {}),
    ("load_misaligned", r"misaligned: read of 16 bytes at 'in' \+ 4", {}),
    ("shared_out_of_bounds", r"out of bounds: read .* at 0 bytes past the end of shared 'values'", {"block": 32}),
    ("dynamic_out_of_bounds", r"out of bounds: write .* at 0 bytes past the end of shared 'dynamic'", {"shared": 256}),
    ("null_pointer", r"out of bounds: write of 4 bytes at a null pointer", {}),
    ("uninitialised_shared", r"uninitialised: read of 4 bytes at shared 'values' \+ 252 .*: nobody wrote there", {}),
    ("left_by_previous_block", r"uninitialised: read of 4 bytes at shared 'value' .* of block \(1,0,0\)", {"grid": 2}),
    ("uninitialised_global", r"uninitialised: read of 4 bytes at 'out' \+ \d", {}),
    ("take_chunks_not_atomically", r"race between blocks: (read|write) of 8 bytes at 'count' \+ 0", {"grid": 2}),
    ("take_chunks_apart", r"divergent barrier: |race", {"grid": 2}),
    ("read_only_of_written", r"read-only: read-only load of 4 bytes at 'out' ", {}),
    ("copy_read_too_early", r"asynchronous copy: read of 4 bytes at shared 'slots' .*: nobody has waited for the", {}),
    ("copy_without_wait", r"asynchronous copy: read of 4 bytes at shared 'slots' .*: nobody has waited for the", {}),
    ("copy_not_committed", r"asynchronous copy: read of \d+ bytes at shared 'slots' .*: nobody has waited for", {}),
    ("copy_over_a_copy", r"asynchronous copy: write of 16 bytes at shared 'slots' .*: nobody has waited for", {}),
    ("copy_of_a_neighbour", r"(race|asynchronous copy): (read|write) of \d+ bytes at shared 'slots'", {}),
    ("copy_of_what_changes", r"asynchronous copy: of 16 bytes from 'out' .*: its source was written meanwhile", {}),
    ("copy_never_waited_for", r"asynchronous copy: of 16 bytes from 'in' .*: its thread ends without a wait", {}),
    ("copy_misaligned", r"misaligned: read of 16 bytes at 'in' \+ \d", {}),
    ("copy_to_misaligned", r"misaligned: write of 16 bytes at shared 'slots' \+ \d", {}),
    ("copy_out_of_bounds", r"out of bounds: read of 16 bytes at \d+ bytes past the end of 'in'", {}),
    ("copy_from_shared", r"asynchronous copy: of 16 bytes from shared .*: from what is not global memory", {}),
    ("copy_to_global", r"asynchronous copy: of 16 bytes from 'in' .*: to what is not shared memory", {}),
    ("too_much_shared", r"shared memory: 'values' makes 49156 static bytes", {}),
    ("trapped", r"trap: called by thread", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "message", "sizes"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_reported(kernels, name, message, sizes):
    with pytest.raises(RuntimeError, match=message) as error:
        kernels.launch(name, torch.zeros(64) if "chunks" in name else numbers(64), **sizes)
    report = str(error.value)
    assert re.match(rf"CUDA emulator: kernel .*{name}, grid \(\d,1,1\), block \(\d+,1,1\), order ", report)
    if name != "too_much_shared":
        assert "faults.cu:" in report or name == "barrier_against_warp"


def test_a_report_names_lines(emulator):
    emulator.set_order("forward")
    lines = (FOLDER / "faults.cu").read_text().splitlines()
    with pytest.raises(RuntimeError) as error:
        Kernels(emulator).launch("store_out_of_bounds", numbers(64))
    line = int(re.search(r"faults\.cu:(\d+)", str(error.value)).group(1))
    assert "a.out[i] = 0" in lines[line - 1]


def test_launches_work_again_after_a_fault(kernels):
    for name in ("barrier_in_branch", "store_out_of_bounds"):
        with pytest.raises(RuntimeError):
            kernels.launch(name, numbers(64))
    assert torch.equal(kernels.launch("reverse", numbers(64), shared=256), numbers(64).flip(0))
