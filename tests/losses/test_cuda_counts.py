"""Bytes that the CUDA kernels move, counted on the emulator: bfloat16, one chunk of a token, Llama 3 to Qwen3."""

from __future__ import annotations

import functools
import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import emulated
import pytest
import torch
from cuda_emulator.emulator import Traffic
from harness import backends_of, distinct
from torch import Tensor

from xtoken.losses.cases import Case
from xtoken.losses.cuda import Kernels

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
cases, real_pair = (importlib.import_module(name) for name in ("cases", "real_pair"))

real = functools.cache(real_pair.load)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not())),
]

SIZES = (128256, 151936)
FIRST = {case.loss.name: case for case in reversed(cases.cases())}
CASES = [FIRST[name] for name in distinct() if "emulated" in backends_of(name)]
ROWS, MULTIPROCESSORS = 4096, 132
"""Of the call that the bytes are reckoned for: tables are read once for all rows, a workspace is a block's own."""


@dataclass
class Moved:
    """What kernels have moved of one row of each kind, and of all else."""

    student: int
    teacher: int
    seen: dict[str, list[Traffic]] = field(
        default_factory=lambda: {name: [] for name in ("student", "teacher", "gradient", "workspace", "tables")}
    )

    def add(self, call: emulated.CopiedMemory) -> None:
        kinds = {self.student: "student", self.teacher: "teacher"}
        for address, inside in call.inside.items():
            kind = "workspace" if inside.data_ptr() == address else kinds.get(address, "tables")
            self.seen[kind].append(call.memory.traffic(inside))
        for outside, inside in call.results:
            if outside.dtype == torch.bfloat16:
                self.seen["gradient"].append(call.memory.traffic(inside))

    def bytes(self, kind: str, what: str) -> int:
        return sum(getattr(one, what) for one in self.seen[kind])


@pytest.fixture(scope="module")
def logits() -> tuple[Tensor, Tensor]:
    """With a row behind the one that predicts the chunk, which nothing reads."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2.5 * torch.randn(2, size, generator=generator) for size in SIZES)
    return student.bfloat16(), teacher.bfloat16()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_bytes_of_a_row(case: Case, logits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.15 times the least from memory where L2 holds the rows that are worked on; four passes where not."""
    student = logits[0].clone().requires_grad_()
    teacher = student.detach().roll(1, 0).clone() if case.same_tokenizer else logits[1]
    moved = Moved(student.data_ptr(), teacher.data_ptr())
    monkeypatch.setattr(
        emulated.CopiedMemory, "give_back", lambda call: moved.add(call)
    )  # numbers are other tests' business
    monkeypatch.setattr(Kernels, "other_rows", lambda *given: None)
    case(student, teacher, cases.one_to_one(1), real()[0], backend="emulated").backward()
    z, y = student.nbytes // 2, teacher.nbytes // 2
    gradient = moved.bytes("gradient", "written")
    least = z + y + z
    blocks = MULTIPROCESSORS * moved.bytes("workspace", "different") + moved.bytes("tables", "different")
    memory = moved.bytes("student", "different") + moved.bytes("teacher", "different") + gradient + blocks / ROWS
    passes = {kind: moved.bytes(kind, "read") / size for kind, size in (("student", z), ("teacher", y))}
    rows = moved.bytes("student", "read") + moved.bytes("teacher", "read") + gradient
    everything = sum(moved.bytes(kind, what) for kind in moved.seen for what in ("read", "written"))
    print(
        f"| {case.name} | {least / 1e3:.0f} | {memory / 1e3:.0f} | {passes['student']:.2f} | {passes['teacher']:.2f} |"
        f" {rows / 1e3:.0f} | {everything / 1e3:.0f} |"
    )
    assert least <= memory * 1.001
    assert memory <= 1.15 * least
    assert rows <= 4 * (z + y)
