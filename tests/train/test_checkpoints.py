"""Resuming: from the newest checkpoint that is complete, as if nothing had been, and no step further than the end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SMALL_TEXTS, command, encode, history, make_teacher, make_trainer

from xtoken.cli import main
from xtoken.train import checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory, student_tok, teacher_tok) -> Path:
    """A run of four steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    made(folder, student_tok, teacher_tok).train()
    return folder


def made(folder: Path, student_tok: Any, teacher_tok: Any, **options: Any) -> Any:
    examples = encode(SMALL_TEXTS[:8], student_tok, teacher_tok)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **options}
    return make_trainer(folder, student_tok, [make_teacher(student_tok, teacher_tok)], examples, **options)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("change", [
    lambda folder: (folder / "trainer_state.json").unlink(), lambda folder: cut_short(folder / "trainer_state.json"),
    lambda folder: cut_short(folder / "model.safetensors"), lambda folder: cut_short(folder / "optimizer.pt"),
    lambda folder: [shutil.rmtree(folder), folder.mkdir()],
])  # fmt: skip
def test_a_checkpoint_that_was_not_written_to_its_end(
    whole, tmp_path, student_tok, teacher_tok, change, caplog, threads
):
    """The one before is taken and said; the end is that of the undisturbed run, and what was left is written over."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoint-4" / "leftover").touch()
    change(folder / "checkpoint-4")
    assert checkpoints.newest(folder) == folder / "checkpoint-2"
    assert f"{folder / 'checkpoint-4'} is left out: it was not written to its end" in caplog.text
    with pytest.raises(ValueError, match="checkpoint-4 was not written to its end: "):
        made(folder, student_tok, teacher_tok).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    trainer = made(folder, student_tok, teacher_tok)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    want = torch.load(whole / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    got = torch.load(folder / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert all(torch.equal(got[k]["exp_avg"], want[k]["exp_avg"]) for k in want)
    assert not (folder / "checkpoint-4" / "leftover").exists()


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_optimizer_or_scheduler(whole, tmp_path, student_tok, teacher_tok, missing):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(whole / "checkpoint-2", folder)
    (folder / missing).unlink()
    with pytest.raises(
        ValueError, match=rf"checkpoint-2 has no {missing}, so that .* resume_weights_only=True goes on"
    ):
        made(tmp_path, student_tok, teacher_tok).train(resume_from_checkpoint=True)
    trainer = made(tmp_path, student_tok, teacher_tok, resume_weights_only=True)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    (folder / "global_step2").mkdir()  # as DeepSpeed keeps both
    assert checkpoints.check(folder, weights_only=False)["global_step"] == 2


def test_a_run_at_its_end(whole, tmp_path, student_tok, teacher_tok):
    """Makes no step and changes nothing; with more steps to do it goes on."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    trainer = made(folder, student_tok, teacher_tok)
    assert trainer.train(resume_from_checkpoint=True).global_step == trainer.state.global_step == 4
    from safetensors.torch import load_file

    want = load_file(whole / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in want.items())
    assert len(list(folder.iterdir())) == 2
    further = made(folder, student_tok, teacher_tok, max_steps=5)
    assert further.train(resume_from_checkpoint=True).global_step == 5
    state = {"global_step": 6, "max_steps": 6, "num_train_epochs": 3}
    assert checkpoints.is_finished(state, -1, 3.0)
    assert not checkpoints.is_finished(state, -1, 4.0)
    assert not checkpoints.is_finished({**state, "global_step": 5}, -1, 3.0)


def test_no_checkpoint(tmp_path, student_tok, teacher_tok):
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: expected a complete checkpoint in .*, got none"):
        made(tmp_path, student_tok, teacher_tok).train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match=r"resume_from_checkpoint: no such folder: none"):
        made(tmp_path, student_tok, teacher_tok).train(resume_from_checkpoint="none")
    assert checkpoints.newest(tmp_path / "none") is None


def test_the_command_resumes(folders, tmp_path):
    """A finished run stays as it is: what it has learned, how far it is, what its evaluation says."""
    arguments = command(folders, tmp_path / "out", "--max_steps", "2", "--save_steps", "1")
    assert main([*arguments, "--resume"]) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    said = [(one["step"], one["eval_ce"]) for one in history(tmp_path / "out") if "eval_ce" in one]
    assert main([*arguments, "--resume"]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [(one["step"], one["eval_ce"]) for one in history(tmp_path / "out") if "eval_ce" in one] == said
