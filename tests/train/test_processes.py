"""Two processes, with data parallelism, FSDP and DeepSpeed, do what one does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import (
    CHANGED,
    FSDP,
    NO_ORDER,
    SMALL_TEXTS,
    assert_same,
    by_names,
    cut,
    encode,
    held_out,
    make_model,
    run_one_step,
    train_and_resume,
    two_teachers,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(NO_ORDER), reason=NO_ORDER)]

GRADIENTS: list[dict[str, Any]] = [
    {"scaling": "fixed", "learnable": True, **cut(4, 1)},
    {"scaling": "fixed", "learnable": True, **cut(2, 2)},
    {"scaling": "dynamic", **cut(4, 1)},
    {"scaling": "dynamic", "routed": True, "learnable": True, **cut(4, 1)},
    {"scaling": "fixed", "routed": True, "learnable": True, **cut(2, 2)},
    {"scaling": "fixed", "average": 0.5, "steps": 3, **cut(2, 2)},
    {"scaling": "dynamic", "steps": 2, "learnable": True, **cut(2, 2)},
    {"scaling": "dynamic", "silent": True, "learnable": True, **cut(4, 1)},
    {"scaling": "dynamic", "fused": "on", **cut(4, 1)},
    {"scaling": "fixed", "lora_rank": 2, **cut(4, 1)},
    {"scaling": "dynamic", **cut(4, 1), **FSDP},
    {"scaling": "dynamic", "silent": True, "fused": "on", **cut(4, 1), **FSDP},
    {"scaling": "fixed", "learnable": True, "fused": "on", **cut(2, 2), **FSDP},
    {"scaling": "fixed", "lora_rank": 2, "fused": "on", **cut(4, 1), **FSDP},
    {"scaling": "fixed", "learnable": True, **cut(2, 2), **FSDP},
]
HELD_OUT = [(7, False), (5, True)]
"""How many examples, and whether the collator packs; the last round of two batches of two repeats one, or three."""

LOGGED = ("loss", "ce", "kd", "learning_rate")


def launch(folder: Path, **work: Any) -> dict[str, Any]:
    """What two processes on gloo came to."""
    here = Path(__file__).parent
    command = [sys.executable, str(here / "two_processes.py"), str(folder), json.dumps(work)]
    folders = [here, here.parent, here.parent / "parallel", here.parents[1], os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(map(str, folders))
    cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    fsdp = {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}  # as transformers 5 has them anyway
    environment = {**os.environ, **cpu, **fsdp, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    loaded: dict[str, Any] = torch.load(folder / "results.pt")
    return loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def names(folder: Path, student_tok: Any, teacher_tok: Any) -> Path:
    """Models and a dataset by name."""
    datasets = pytest.importorskip("datasets", reason="xtoken[datasets] is not installed")
    for name, tok in (("student", student_tok), ("teacher", teacher_tok)):
        make_model(len(tok), len(name)).save_pretrained(folder / "names" / name)
        tok.save_pretrained(folder / "names" / name)
    datasets.Dataset.from_dict({"text": SMALL_TEXTS}).save_to_disk(folder / "names" / "data")
    return folder / "names"


@pytest.fixture(scope="module")
def results(folder: Path, names: Path) -> dict[str, Any]:
    resumed = {"fsdp": {**cut(2, 2), **FSDP}, "adapters": {"lora_rank": 2, **cut(2, 2), **FSDP}}
    on_policy = {"plain": cut(1, 2), "sharded": {**cut(1, 2), **FSDP}}
    streams = [(is_stream, 4) for is_stream in (False, True)]
    return launch(folder, gradients=GRADIENTS, held_out=HELD_OUT, on_policy=on_policy, resumed=resumed, names=streams)


@pytest.mark.parametrize("case", range(len(GRADIENTS)))
def test_gradients(tmp_path, results, student_tok, teacher_tok, case):
    """With and without accumulation, fixed and dynamic, and W's gradient averaged; of FSDP the gathered ones; also from
    hidden states and output layer, as one process has them from logits."""
    options = {name: value for name, value in GRADIENTS[case].items() if name not in FSDP}
    teachers = two_teachers(student_tok, teacher_tok, options.pop("learnable", False), options.pop("average", None))
    examples = encode(SMALL_TEXTS[:8], student_tok, teacher_tok, None)
    for name, change in CHANGED.items():
        examples = change(examples) if options.pop(name, False) else examples
    accumulated = options["gradient_accumulation_steps"] if options["scaling"] == "dynamic" else 1
    whole = cut(8 // accumulated, accumulated)  # "dynamic" has the factor of the first micro-batch, or of the last step
    want = run_one_step(tmp_path, student_tok, teachers, examples, **{**options, **whole, "fused": "off"})
    assert_same(results["gradients"][case], want)


@pytest.mark.parametrize("case", range(len(HELD_OUT)))
def test_held_out_samples_count_once(tmp_path, results, student_tok, teacher_tok, case):
    """Though both processes have batches of the same size, which takes some samples twice."""
    want = held_out(tmp_path, student_tok, teacher_tok, *HELD_OUT[case])
    got = results["held_out"][case]
    names = [name for name in want if name.startswith(("eval_ce", "eval_kd", "eval_chunks", "eval_agreement"))]
    assert len(names) == 8
    for name in [*names, "eval_loss"]:
        assert got[name] == pytest.approx(want[name], rel=1e-5), name


@pytest.mark.parametrize("is_stream", [False, True])
def test_names_and_datasets(results, names, is_stream):
    """The first process encodes a dataset, and the others read it; of a stream each takes its own batches."""
    want, got = by_names(names, is_stream, 8), results["names"][is_stream]
    assert len(got) == 2
    assert got == [pytest.approx(one, rel=1e-5) for one in want]


def assert_resumed(logs: list[list[dict[str, Any]]]) -> list[list[float]]:
    """That a run which was interrupted has the losses of one which was not, to the last digit; returns them."""
    whole, resumed = ([[entry[name] for name in LOGGED] for entry in log] for log in logs)
    assert len(whole) == 4
    assert resumed == whole
    return whole


def assert_same_losses(got: list[list[float]], tmp_path: Path, student_tok: Any, teacher_tok: Any, **options: Any):
    """Those of one process, but for rounding."""
    want = train_and_resume(tmp_path, student_tok, teacher_tok, **cut(4, 2), **options)[0]
    for ours, theirs in zip(got, want, strict=True):
        assert ours == pytest.approx([theirs[name] for name in LOGGED], rel=1e-3)


def test_fsdp_goes_on_as_if_it_had_not_been_interrupted(tmp_path, results, folder, student_tok, teacher_tok):
    """The same losses, the same student and the same W; and the losses of one process."""
    losses = assert_resumed(results["resumed"]["fsdp"])
    saved = [folder / "fsdp" / run / "checkpoint-4" for run in ("whole", "resumed")]
    for file in ("model.safetensors", "distillation.safetensors", "projection-teacher.safetensors"):
        first, second = (load_file(checkpoint / file) for checkpoint in saved)
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(second[name], value), name
    assert_same_losses(losses, tmp_path, student_tok, teacher_tok)
    shapes = [
        {name: value.shape for name, value in load_file(checkpoint / "model.safetensors").items()}
        for checkpoint in (saved[0], tmp_path / "whole" / "checkpoint-4")
    ]
    assert shapes[0] == shapes[1]


def test_adapters_go_on_under_fsdp(tmp_path, results, folder, student_tok, teacher_tok):
    losses = assert_resumed(results["resumed"]["adapters"])
    saved = [folder / "adapters" / run / "checkpoint-4" / "adapter_model.safetensors" for run in ("whole", "resumed")]
    first, second = map(load_file, saved)
    assert len(first) == 28
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert_same_losses(losses, tmp_path, student_tok, teacher_tok, lora_rank=2)


def test_completions(results):
    """A student that is sharded draws what a whole one does, also while another process has nothing to draw, as in the
    second step."""
    plain, sharded = (results["on_policy"][name] for name in ("plain", "sharded"))
    assert [one["on_policy"] for one in plain] == [0.5] * 4
    for one, other in zip(plain, sharded, strict=True):
        for name in ("ce", "kd", "kd_scale", "chunks", "on_policy", "on_policy_skipped", "completion_length"):
            assert other.get(name) == pytest.approx(one.get(name), rel=1e-4), name


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed(tmp_path, student_tok, teacher_tok):
    """ZeRO-2 and ZeRO-3: the losses of one process, and again after an interruption; teachers stay whole."""
    options = {"optim": "sgd", "learning_rate": 0.1}
    cases = {
        f"zero{stage}": {
            "deepspeed": {
                "zero_optimization": {"stage": stage},
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_allow_untested_optimizer": True,
            },
            "use_cpu": False,
            "ddp_backend": "gloo",
            **cut(2, 2),
            **options,
        }
        for stage in (2, 3)
    }
    results = launch(tmp_path, resumed=cases)
    for name in cases:
        assert_same_losses(assert_resumed(results["resumed"][name]), tmp_path, student_tok, teacher_tok, **options)
    assert results["is_whole"] == [True, False]
