"""However a batch is cut into micro-batches and over processes, its gradient is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comparer import assert_close
from small import SMALL_TEXTS, encode, make_teacher, make_trainer, run_one_step

CUTS = [(8, 1), (4, 2), (2, 4)]


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_close(got[name], value, rtol=1e-4, atol=2e-6 * float(value.abs().max()) + 1e-9)


@pytest.fixture(scope="module")
def examples(student_tok, teacher_tok) -> Any:
    return encode(SMALL_TEXTS[:8], student_tok, teacher_tok, None)


def gradients(folder: Path, student_tok: Any, teacher_tok: Any, examples: Any, learnable: bool = False, **options: Any):
    teachers = [
        make_teacher(student_tok, teacher_tok, learnable=learnable),
        make_teacher(student_tok, None, 2, name="twin"),
    ]
    return run_one_step(folder, student_tok, teachers, examples, **options)


def cut(size: int, accumulated: int) -> dict[str, int]:
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}


def test_micro_batches(tmp_path, student_tok, teacher_tok, examples):
    """1 x 8, 2 x 4 and 4 x 2 examples; labels and chunks differ between the examples."""
    whole, *rest = [
        gradients(tmp_path, student_tok, teacher_tok, examples, learnable=True, scaling="fixed", **cut(*sizes))
        for sizes in CUTS
    ]
    assert float(whole["W0"].abs().max()) > 0
    for one in rest:
        assert_same(one, whole)


def test_dynamic_scaling_is_one_factor_a_step(tmp_path, student_tok, teacher_tok, examples):
    """Steps 2, 3, ... take the ratio of the step before, whatever the cut."""
    teachers = [make_teacher(student_tok, teacher_tok)]
    scales = {}
    for size, accumulated in [(8, 1), (4, 2), (2, 4)]:
        trainer = make_trainer(
            tmp_path, student_tok, teachers, [{**one, "teachers": one["teachers"][:1]} for one in examples],
            max_steps=3, optim="sgd", learning_rate=1e-9, lr_scheduler_type="constant", **cut(size, accumulated),
        )  # fmt: skip
        trainer.train()
        scales[size] = [one["kd_scale"] for one in trainer.state.log_history if "kd_scale" in one]
        ratios = [one["ce"] / one["kd"] for one in trainer.state.log_history if "kd_scale" in one]
    # The model hardly changes, so all ratios are the same but that of the first micro-batch.
    assert scales[8] == pytest.approx([ratios[0]] * 3, rel=1e-5)
    for size in (4, 2):
        assert scales[size][0] != pytest.approx(ratios[0], rel=1e-5)
        assert scales[size][1:] == pytest.approx([ratios[0]] * 2, rel=1e-5)


def test_two_processes(tmp_path, student_tok, teacher_tok, examples):
    """Two processes on gloo, with and without accumulation, fixed and dynamic, and W's gradient averaged."""
    cases = [
        {"scaling": "fixed", "learnable": True, **cut(4, 1)},
        {"scaling": "fixed", "learnable": True, **cut(2, 2)},
        {"scaling": "dynamic", **cut(4, 1)},
    ]
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(here / "two_processes.py"), str(tmp_path), json.dumps(cases)]
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    for k, one in enumerate(cases):
        want = gradients(tmp_path, student_tok, teacher_tok, examples, **{**one, **cut(8, 1)})
        assert_same(torch.load(tmp_path / f"{k}.pt"), want)
