"""Threads and memory of the CPU kernels: callers in parallel, forks, scratch."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from default_losses import DEFAULT
from harness import OPERATIONS, Case, backends_of, distinct, make_case
from torch import Tensor

from xtoken.losses import Needs, registered

KERNELS = [name for name in distinct() if "cpu" in backends_of(name)]
CALLS: list[tuple[str, dict[str, Any]]] = [
    *((name, dict([*registered()[name].variants.values()][-1])) for name in KERNELS),
    *((name, OPERATIONS[name].few(200)) for name in KERNELS if OPERATIONS[name].few(200)),
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def case_of(seed: int) -> Case:
    return make_case(500, 410, samples=3, seed=seed)


def results(case: Case) -> list[Tensor]:
    """Losses of every operation, and their gradients; of one also with labels."""
    found = []
    labels = (case.student[..., 0].abs() * 100).long() % 400
    for operation, options in [*CALLS, (DEFAULT[Needs.SAME_TOKENIZER], {"labels": labels})]:
        student = case.student.float().requires_grad_()
        out = OPERATIONS[operation].public(case, student, case.teacher.float(), backend="cpu", **options)
        loss = out[0] + out[1] if "labels" in options else out
        found += [loss.detach(), *torch.autograd.grad(loss, student)]
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_callers_in_several_threads() -> None:
    cases = [case_of(seed) for seed in range(4)]
    want = [results(case) for case in cases]
    start = threading.Barrier(4)

    def caller(k: int) -> bool:
        torch.set_num_threads(3)
        start.wait(timeout=60)
        return all(same(results(cases[k]), want[k]) for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(caller, range(4), timeout=120)) == [True] * 4


def in_child(case: Case, want: list[Tensor], code: Any) -> None:
    torch.set_num_threads(1)  # its OpenMP would wait for the parent's threads for ever
    torch.get_num_threads = lambda: 3  # what the kernels ask for
    code.value = 1 if same(results(case), want) and same(results(case), want) else 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("busy", [False, True])
def test_after_a_fork(busy: bool) -> None:
    """The child has none of its parent's threads, and perhaps a lock that one of them held."""
    case = case_of(0)
    want = results(case)
    context = multiprocessing.get_context("fork")
    stop = threading.Event()

    def keep_busy() -> None:
        with torch.no_grad():
            while not stop.is_set():
                name = DEFAULT[Needs.PROJECTION]
                options = {**OPERATIONS[name].few(None), "backend": "cpu"}
                OPERATIONS[name].public(case, case.student.float(), case.teacher.float(), **options)

    other = threading.Thread(target=keep_busy)
    if busy:
        other.start()
    try:
        for _ in range(3):
            code = context.Value("i", 0)
            child = context.Process(target=in_child, args=(case, want, code))
            child.start()
            child.join(timeout=60)
            hung = child.is_alive()
            if hung:
                child.kill()
                child.join()
            assert not hung, "the child hangs"
            assert (child.exitcode, code.value) == (0, 1)
    finally:
        stop.set()
        if busy:
            other.join()
    assert same(results(case), want)


MEASURE = """
import json, re, sys
from pathlib import Path
import torch, xtoken
from xtoken.losses import Needs, gradient_memory, registered
from xtoken.losses.backends import backends_with

V = 40_000

def status(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def run(loss, options, student, teacher, labels):
    rows = student.shape[1]
    start = torch.arange(1, rows, dtype=torch.int32)
    alignment = xtoken.Alignment(torch.stack([start, start + 1, start, start + 1], 1))
    leaf = student.requires_grad_()
    arguments = {Needs.SAME_TOKENIZER: [], Needs.NOTHING: [alignment], Needs.PROJECTION: [alignment, W]}[loss.needs]
    loss, ce = loss.function()(leaf, teacher, *arguments, labels=labels, backend="cpu", **options)
    loss.backward()  # of the cross-entropy nothing: its gradient is taken back, which needs the logits again
    student.grad = None

torch.set_num_threads(2)
ids = torch.arange(V)
W = xtoken.ProjectionMatrix.from_topk(
    torch.stack([ids, (ids + 1) % V], 1), torch.tensor([[0.9, 0.1], [1, 0]]).repeat(V // 2, 1), teacher_vocab_size=V
)
rows = int(sys.argv[1])
student, teacher = torch.randn(1, rows, V), torch.randn(1, rows, V)
labels = torch.randint(V, (1, rows))
found = {}
for name, loss in registered().items():
    if loss.needs is Needs.PIECES or "cpu" not in backends_with(name):  # no vocabularies here
        continue
    variants = list(loss.variants.values())
    tried = {"": variants[0]}
    if "top_k" in loss.options():
        tried = {"": {**variants[0], "top_k": None}, ", subset": {**variants[-1], "top_k": 8192}}
    for key, options in tried.items():
        run(loss, options, student[:, :8].clone(), teacher[:, :8].clone(), labels[:, :8])
        gradient_memory.release()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        run(loss, options, student, teacher, labels)
        found[name + key] = status("VmHWM") - before - student.nbytes
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process")
@pytest.mark.slow
def test_memory_beyond_the_gradient_does_not_grow_with_the_rows() -> None:
    """After a call with 8 rows, one with 300 takes its gradient (48 MB) and next to nothing else."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back to the system
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "300"], env=environment, capture_output=True, text=True, timeout=600, check=True
    )
    found = json.loads(done.stdout)
    assert len(found) >= len(KERNELS)
    for name, extra in found.items():
        assert extra < 6 * 2**20, f"{name}: {extra / 2**20:.1f} MB"
