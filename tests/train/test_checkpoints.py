"""Resuming: from the newest checkpoint that is complete, as if nothing had been, and no step further than the end."""

from __future__ import annotations

import errno
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
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
    lambda folder: [shutil.rmtree(folder), folder.mkdir()], lambda folder: (folder / "model.safetensors").unlink(),
    lambda folder: cut_short(folder / "rng_state.pth"),
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


def test_what_is_complete(tmp_path):
    state, weights = tmp_path / "trainer_state.json", tmp_path / "model-00002-of-00002.safetensors"
    assert checkpoints.fault(tmp_path) == "no trainer_state.json"
    for text in ("[" * 100_000, '{"global_step": []}', "\xff", '{"global_step": 1e999}', '{"global_step": "2"}',
                 '{"global_step": -2}', '{"global_step": 2, "max_steps": null}', '{"global_step": 9, "max_steps": 4}',
                 '{"global_step": 2, "num_train_epochs": "3"}'):  # fmt: skip
        state.write_text(text, encoding="latin-1")
        assert checkpoints.fault(tmp_path) == "trainer_state.json is damaged"
    state.write_text('{"global_step": 2}')
    assert checkpoints.fault(tmp_path) == "no weights of the model"
    save_file({"weight": torch.zeros(1)}, weights)
    assert checkpoints.fault(tmp_path) is None
    index = tmp_path / "model.safetensors.index.json"
    first = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": {"weight": weights.name, "bias": first}}))
    assert checkpoints.fault(tmp_path) == f"no {first}"
    index.write_text("[]")
    assert checkpoints.fault(tmp_path) == "model.safetensors.index.json is damaged"


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "rng_state.pth", "x.index.json", "adapter/model.safetensors"]
)
def test_what_is_no_file(name, tmp_path):
    """Reading it would never end."""
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/null")
    assert checkpoints.fault(tmp_path) == f"{name} is no regular file"


@pytest.mark.parametrize("name", ["trainer_state.json", "x.index.json", "optimizer.pt"])
def test_what_cannot_be_read_is_not_taken_for_damaged(name, tmp_path, monkeypatch):
    """Such as without permission: a run would go on from an older checkpoint, and write over this one."""
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    save_file({"weight": torch.zeros(1)}, checkpoint / "model.safetensors")
    (checkpoint / name).touch()
    opened = io.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(PermissionError, match=f"{checkpoint / name}'$"):
        checkpoints.newest(tmp_path)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_bits_that_are_flipped(name, tmp_path):
    """Whatever torch.load takes, above all other values of a tensor."""
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    torch.save({"moment": torch.full((64,), 0.5)}, tmp_path / name)
    assert checkpoints.fault(tmp_path) is None
    whole = (tmp_path / name).read_bytes()
    middle = whole.index(torch.full((64,), 0.5).numpy().tobytes()) + 130
    for at in (middle, *range(0, len(whole), 37)):
        (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:
            moment = torch.load(tmp_path / name)["moment"]
        except Exception:
            continue
        assert bool((moment == 0.5).all()) or checkpoints.fault(tmp_path) == f"{name} is damaged"


@pytest.mark.parametrize(
    "error",
    [
        Exception("No space left on device (os error 28)"), SafetensorError("No space left on device (os error 28)"),
        RuntimeError("basic_ios::clear: iostream error"), OSError(errno.ENOSPC, "No space left on device"),
    ],
)  # fmt: skip
def test_a_disk_that_is_full_is_told_with_the_folder(error, tmp_path, student_tok, teacher_tok, monkeypatch):
    """As tokenizers, safetensors, torch and Python tell it."""

    def fail(*_: Any) -> None:
        raise error

    trainer = made(tmp_path / "run", student_tok, teacher_tok)
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=f"{tmp_path}/run"):
        trainer.save_model()
    error = ValueError("another")
    with pytest.raises(ValueError, match=r"^another$"):
        trainer.save_model()


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
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
    shutil.copy(whole / "checkpoint-2" / "rng_state.pth", folder)
    (folder / "global_step2").mkdir()  # as DeepSpeed keeps the others
    assert checkpoints.check(folder, weights_only=False)["global_step"] == 2


@pytest.mark.parametrize(
    "held", ["checkpoint-2", "model.safetensors", "adapter_model.safetensors", "pytorch_model.bin"]
)
def test_an_output_with_another_model_is_refused(folders, tmp_path, capsys, held):
    """Nothing is loaded, and nothing of it changes. What holds no model is written to."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "settings.json").write_text("of a run that failed")
    checkpoints.check_output(output, False, None)
    (output / held).mkdir() if held == "checkpoint-2" else (output / held).write_text("somebody's")
    assert main(command(folders, output)) == 1
    said = f"output: {output} holds {held}; give another folder, or resume (--resume) what is in it"
    assert said in capsys.readouterr().err
    if held == "checkpoint-2":  # killed while it was written
        checkpoints.check_output(output, True, None)
    else:
        assert main(command(folders, output, "--resume")) == 1
        assert f"output: {output} holds {held} but no complete checkpoint; give another" in capsys.readouterr().err
    with pytest.raises(ValueError, match="output: "):
        checkpoints.check_output(output, False, str(tmp_path / "other" / "checkpoint-2"))
    checkpoints.check_output(output, False, str(output / "checkpoint-2"))
    assert {one.name for one in output.iterdir()} == {held, "settings.json"}


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


def test_the_end_of_a_run_is_its_best_model_where_that_is_wanted(tmp_path, student_tok, teacher_tok):
    """Also of one that was stopped behind its last checkpoint, before it saved this model."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_ce", "greater_is_better": True,
            "eval_strategy": "steps", "eval_steps": 2}  # fmt: skip
    held_out = encode(SMALL_TEXTS[8:12], student_tok, teacher_tok)
    first, again = (made(tmp_path, student_tok, teacher_tok, held_out=held_out, **best) for _ in range(2))
    first.train()
    assert first.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    want = first.model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in again.model.state_dict().items())


def test_no_checkpoint(tmp_path, student_tok, teacher_tok):
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: expected a complete checkpoint in .*, got none"):
        made(tmp_path, student_tok, teacher_tok).train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match=r"resume_from_checkpoint: no such folder: none"):
        made(tmp_path, student_tok, teacher_tok).train(resume_from_checkpoint="none")
    assert checkpoints.newest(tmp_path / "none") is None


def test_the_command_resumes(folders, tmp_path):
    """A finished run stays as it is: what it has learned, how far it is, what its evaluation says, and which tokens
    begin and end a text, which its student did not know before."""
    arguments = command(folders, tmp_path / "out", "--max_steps", "2", "--save_steps", "1")
    assert main([*arguments, "--resume"]) == 0
    names = ("model.safetensors", "config.json", "generation_config.json")
    before = [(tmp_path / "out" / name).read_bytes() for name in names]
    assert json.loads(before[1])["eos_token_id"] is not None
    leftover = tmp_path / "out" / ".tmpAXHkoH"  # as a killed write of safetensors leaves it
    leftover.touch()
    said = [(one["step"], one["eval_ce"]) for one in history(tmp_path / "out") if "eval_ce" in one]
    assert main([*arguments, "--resume"]) == 0
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == before
    assert not leftover.exists()
    assert [(one["step"], one["eval_ce"]) for one in history(tmp_path / "out") if "eval_ce" in one] == said
