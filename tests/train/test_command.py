"""``xtoken train`` from the command line, on tiny models."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from accelerate.state import PartialState
from default_losses import DEFAULT, OTHER
from safetensors.torch import load_file
from small import command, history
from transformers import TrainingArguments

from xtoken import Vocabulary
from xtoken.cli import main
from xtoken.losses import Loss, Needs, registered
from xtoken.losses.cases import changes
from xtoken.losses.criterion import SCALINGS
from xtoken.losses.loss import REGISTER
from xtoken.storage import LOCK, FolderLock
from xtoken.train.chat import use_template
from xtoken.train.command import check, loss_arguments, open_all, own_help, parse, settings_of
from xtoken.train.example import TRAIN_ON
from xtoken.train.prepare import build_objective, check_loss_options, one_each, weights_of

pytestmark = pytest.mark.slow

UNAIDED, PROJECTED, PIECES, SHARED = (DEFAULT[needs] for needs in Needs)
ALL = ["--student", "S", "--teacher", "T", "--output", "out"]


def test_auto(folders, tmp_path, capsys):
    """Numbers are cut otherwise: by pieces, and the audit says why. The student learns, is saved, and can be loaded."""
    output = tmp_path / "out"
    assert main(command(folders, output, "--max_steps", "8", "--plot")) == 0
    printed = capsys.readouterr().out
    assert f"teacher teacher: {PIECES}, weight 1\n" in printed
    assert "  PieceIndex(" in printed
    assert "common set, less than 99%" in printed
    first, *_, last = [entry for entry in history(output) if "eval_ce" in entry]
    assert last["eval_ce"] < first["eval_ce"]
    assert last["eval_kd"] < first["eval_kd"]
    assert {path.name for path in output.glob("*.png")} == {"losses.png", "projection.png", "speed.png"}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(output).num_parameters() > 0
    assert len(AutoTokenizer.from_pretrained(output)) > 0
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_student_is_saved_as_it_was_trained(folders, tmp_path):
    """The evaluation at the end rounds the model's own weights, if it is to be in another type."""
    output = tmp_path / "out"
    more = ["--max_steps", "1", "--bf16_full_eval", "true", "--loss", UNAIDED]
    assert main(command(folders, output, *more)) == 0
    assert {one["step"] for one in history(output) if "eval_ce" in one} == {0, 1}
    assert {one.dtype for one in load_file(output / "model.safetensors").values()} == {torch.float32}


def test_a_chat_template_that_is_not_there(folders, tmp_path, student_tok):
    """Is missed also by a tokenizer that has its own."""
    for template in (None, "{{ messages }}"):
        student_tok = type(student_tok)(tokenizer_object=student_tok.backend_tokenizer)
        student_tok.chat_template = template
        with pytest.raises(FileNotFoundError, match="--chat_template: expected a file, or a template with its braces"):
            use_template(student_tok, "none.jinja")
        use_template(student_tok, "{{ 1 }}")
        assert student_tok.chat_template == (template or "{{ 1 }}")


def test_chat_template(folders, tmp_path, capsys):
    """For tokenizers that have none; without it nothing is loaded. A teacher's cache keeps the time that it writes."""
    data, template = tmp_path / "chat.jsonl", tmp_path / "chat.jinja"
    text = "{{ strftime_now('%c, %f') }}{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    row = {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "they read it"}]}
    data.write_text(json.dumps(row) + "\n")
    template.write_text(text)
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        for file in Path(folders[name]).glob("token*"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    alone = ["train", "--student", f"{tmp_path}/student", "--teacher", f"{tmp_path}/teacher", "--data", str(data)]
    assert main([*alone, "--output", f"{tmp_path}/out"]) == 1
    assert "has no chat template, so it cannot read messages; set its chat_template (--chat_template)" in (
        capsys.readouterr().err
    )
    caching = [
        "cache-teacher",
        "--teacher",
        f"{tmp_path}/teacher",
        "--data",
        str(data),
        "--output",
        f"{tmp_path}/cache",
    ]
    assert main(caching) == 1
    assert "teacher: tokenizer" in capsys.readouterr().err
    assert main([*alone, "--output", f"{tmp_path}/out", "--chat_template", "none.jinja"]) == 1
    assert (
        "--chat_template: expected a file, or a template with its braces, got 'none.jinja'" in capsys.readouterr().err
    )
    assert main([*caching, "--chat-template", text, "--teacher", folders["teacher"]]) == 0
    for output, given in ((tmp_path / "file", str(template)), (tmp_path / "text", text)):
        arguments = command(folders, output, "--chat_template", given, "--train_on", "assistant")
        for option in ("--data", "--eval_data"):
            arguments[arguments.index(option) + 1] = str(data)
        assert main([*arguments, "--max_steps", "1", "--teacher_cache", f"{tmp_path}/cache"]) == 0
        assert (output / "chat_template.jinja").read_text() == text


def test_settings_leave_the_processes_as_they_are(monkeypatch, tmp_path):
    """Other arguments of a Trainer, made to compare with, would have each process of torchrun train by itself."""
    options, config = parse([*ALL, "--data", "D", "--output", str(tmp_path), "--use_cpu", "--max_steps", "3"])
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    monkeypatch.setitem(PartialState._shared_state, "process_index", 1)
    settings = settings_of(options, config)
    assert (config.world_size, config.process_index) == (2, 1)
    assert settings == {"student": "S", "teacher": ["T"], "data": ["D"], "use_cpu": True, "max_steps": 3}


def test_processes_do_not_train_each_by_itself(monkeypatch, tmp_path):
    """As those of torchrun would on a CPU without `--use_cpu`, where accelerate takes each to be the only one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    set_up = TrainingArguments.__post_init__

    def alone(self):
        set_up(self)
        monkeypatch.setenv("LOCAL_RANK", "1")

    monkeypatch.setattr(TrainingArguments, "__post_init__", alone)
    with pytest.raises(ValueError, match="use_cpu: expected True for the 2 processes that were started"):
        parse([*ALL, "--data", "D", "--output", str(tmp_path)])


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("xtoken.train.command.main", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "xtoken train: interrupted; what is complete stays, go on with --resume\n"


def test_two_teachers_from_a_file_and_resuming(folders, tmp_path, capsys):
    output = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"teacher: [{folders['teacher']}, {folders['twin']}]\nteacher_weight: [0.2]\nlearn_projection: true\n"
        "max_steps: 4\nsave_steps: 2\nscaling: fixed\nlearning_rate: 1.0\naccelerator_config: {split_batches: false}\n"
    )
    arguments = command(folders, output, "--config", str(recipe), "--loss", "auto")
    del arguments[3:5]  # the teacher, which the file has
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"teacher teacher: {PROJECTED}, weight 0.8" in printed
    assert f"teacher twin: {SHARED}, weight 0.2" in printed
    assert "teacher and student share one tokenizer" in printed
    assert (output / "checkpoint-4" / "projection-teacher.safetensors").exists()
    assert history(output)[-1]["eval_kd/twin"] > 0
    assert main([*arguments, "--resume", "--max_steps", "6"]) == 0
    steps = [entry["step"] for entry in history(output) if "ce" in entry]
    assert steps == [2, 4, 6]
    assert [entry["learning_rate"] < 1e-2 for entry in history(output) if "learning_rate" in entry] == [True] * 3
    settings = json.loads((output / "settings.json").read_text())
    assert {"student", "teacher", "data", "learn_projection", "learning_rate", "max_steps"} < settings.keys()
    assert settings["learning_rate"] == 0.003  # of the command line, not of the file
    assert not settings.keys() & {"report_to", "debug", "loss_options", "output_dir", "weight_decay", "hub_token"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--student: expected one"),
        (["--student", "S"], "--teacher: expected one"),
        (["--student", "S", "--teacher", "T"], "--data: expected one"),
        (["--student", "S", "--teacher", "T", "--data", "D"], "--output: expected a folder"),
        (
            [*ALL, "--teacher", "U", "--data", ".", "--loss", PIECES, SHARED, "--reverse", "--merge", "mean"],
            f"merge: none of the chosen losses has it: {PIECES}, {SHARED}",
        ),
        (
            [*ALL, "--data", ".", "--loss", UNAIDED, "--learn_projection"],
            f"learn_projection: none of the chosen losses can train W: {UNAIDED}",
        ),
        ([*ALL, "--data", ".", "--eval_data", "none.txt"], "--eval_data: no file matches none.txt"),
        ([*ALL, "--data", "none.jsonl", "--eval_data", "."], "--data: no file matches none.jsonl"),
        (["--config", "list.yaml"], "--config: expected options and their values in list.yaml, got list"),
        (["--config", "odd.yaml"], "--config: odd.yaml has an unknown option: colour"),
        (["--config", "null.yaml"], "--config: teacher_system: expected a value, got null"),
        (["--config", "cut.yaml"], "--config: cut.yaml: not YAML: "),
        (["--config", "bytes.yaml"], "--config: bytes.yaml: not YAML: "),
        ([*ALL, "--data", ".", "--teacher_quantization", "cut.yaml"], "quantization: cut.yaml: not YAML: "),
        ([*ALL, "--data", ".", "--on_policy", "1", "--teacher_cache", "c"], "on_policy: expected teachers that run"),
        ([*ALL, "--data", ".", "--eval_strategy", "steps"], "--eval_strategy: expected --eval_data with it, got none"),
        ([*ALL, "--data", ".", "--do_eval"], "--do_eval: expected --eval_data with it, got none"),
        ([*ALL, "--data", ".", "--eval_on_start"], "--eval_on_start: expected --eval_data with it, got none"),
        ([*ALL, "--data", ".", "--do_predict"], "--do_predict: expected it left out, since nothing is predicted"),
        ([*ALL, "--data", ".", "--dataset_num_proc", "2"], "--dataset_num_proc: expected a dataset of the Hub with it"),
        ([*ALL, "--data", ".", "--teacher_logprobs", "5"], "--teacher_logprobs: expected --teacher_url with it"),
        ([*ALL, "--data", ".", "--teacher_requests", "5"], "--teacher_requests: expected --teacher_url with it"),
        ([*ALL, "--data", ".", "--teacher_timeout", "5"], "--teacher_timeout: expected --teacher_url with it"),
        ([*ALL, "--data", ".", "--teacher_patience", "5"], "--teacher_patience: expected --teacher_url with it"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("[1, 2]")
    Path("odd.yaml").write_text("colour: red")
    Path("null.yaml").write_text("teacher_system: [null]")
    Path("cut.yaml").write_text("- colour: {red")
    Path("bytes.yaml").write_bytes(b"\xff: 1")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        looked_at(arguments)


def test_a_run_that_cannot_begin_writes_nothing(folders, tmp_path, capsys):
    more = ["--teacher", folders["twin"], "--teacher_mode", "average"]
    assert main(command(folders, tmp_path / "out", *more)) == 1
    assert "teacher_mode: expected teachers with one tokenizer for 'average'" in capsys.readouterr().err
    assert not any((tmp_path / "out").glob("*"))


def test_two_runs_do_not_write_into_one_folder(folders, tmp_path, capsys):
    output, arguments = tmp_path / "out", command(folders, tmp_path / "out", "--max_steps", "1", "--loss", UNAIDED)
    with FolderLock(output):
        assert main(arguments) == 1
        assert f"output: another run writes to {output}; wait for its end" in capsys.readouterr().err
        assert [one.name for one in output.iterdir()] == [LOCK]
    assert main(arguments) == 0
    assert not (output / LOCK).exists()


def test_words_of_yaml(tmp_path, monkeypatch):
    """Null is as if absent, on and no are words where they are choices, and an option has all its names."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        "output: a\non_policy: 0.5\ntop_p: 0.5\ngeneration-temperature: 2\nfused: on\nsave_strategy: no\n"
        "cache: null\npacked: yes\ngeneration_url: null\nloss_options: {top_k: 0}\nbf16: off\nlearning_rate: 1e-3\n"
    )
    _, config = parse(["--student", "S", "--teacher", "T", "--data", ".", "--config", "run.yaml"])
    assert (config.output_dir, config.generation_top_p, config.generation_temperature) == ("a", 0.5, 2.0)
    assert (config.fused, config.save_strategy, config.packed, config.bf16) == ("on", "no", True, False)
    assert (config.cache, config.generation_url, config.learning_rate) == (None, None, 1e-3)
    _, config = parse([*ALL, "--data", ".", "--config", "run.yaml", "--generation_top_p", "0.7"])
    assert (config.output_dir, config.generation_top_p) == ("out", 0.7)


def looked_at(arguments):
    options, config = parse(arguments)
    check(options, config)
    return open_all(options, config)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("--loss", "best", ["auto", *registered()]), ("--merge", "last", ["first", "mean", "chain"]),
     ("--train_on", "user", TRAIN_ON), ("--scaling", "static", SCALINGS)],
)  # fmt: skip
def test_choices(capsys, option, value, expected):
    with pytest.raises(SystemExit, match="2"):
        parse([*ALL, "--data", ".", option, value])
    error = capsys.readouterr().err
    assert f"argument {option}: invalid choice: '{value}'" in error.replace("/--train-on", "")
    assert all(name in error.split("choose from")[1] for name in expected)


def test_options_of_losses():
    """Those that somebody asked for, in the losses' own types; the losses' functions have the defaults."""
    given = ["--temperature", "2", "--top-k", "0", "--reverse", "--uncommon_top_k", "5", "--support", "reachable"]
    _, config = parse([*ALL, "--data", ".", *given])
    want = {"temperature": 2.0, "top_k": 0, "reverse": True, "uncommon_top_k": 5, "support": "reachable"}
    assert config.loss_options == want
    assert parse([*ALL, "--data", "."])[1].loss_options == {}
    arguments = loss_arguments()
    for loss in registered().values():
        assert {name for name, one in loss.options().items() if not isinstance(one, type(None))} <= arguments.keys()
    assert "columns" not in arguments  # a tensor
    said = arguments["top_k"]["help"]
    assert f"in any row of teacher_logits (lower ids first among equals). For {PROJECTED} (default 8192). " in said
    assert f"both sides are normalised over them. For {SHARED} (default all). Only so many of the shared" in said


@dataclass(frozen=True)
class Other(Loss):
    """A loss whose options have names of others, and take something else."""

    merge: str
    beta: int
    top_k: int

    @classmethod
    def function(cls):
        def other_loss(*, merge: Literal["sum", "max"] = "sum", beta: int = 3, top_k: int = 8):
            """Nothing.

            merge : "sum" or "max"
            """

        return other_loss


def test_options_of_one_name_may_take_something_else(monkeypatch):
    """What one loss takes is not refused for another, and 0 is None only where None is taken."""
    monkeypatch.setitem(REGISTER, "another", Other)
    monkeypatch.setattr(Other, "needs", Needs.NOTHING, raising=False)
    given = [*ALL, "--data", ".", "--loss", "another", "--merge", "max", "--beta", "2", "--top_k", "0"]
    assert parse(given)[1].loss_options == {"merge": "max", "beta": 2, "top_k": 0}
    assert parse([*ALL, "--data", ".", "--merge", "chain", "--beta", "0.5"])[1].loss_options["beta"] == 0.5
    with pytest.raises(ValueError, match="loss_options: expected a number or an integer for 'beta', got 'much'"):
        check_loss_options({"beta": "much"})
    check_loss_options({"beta": 0.5, "merge": "max"})
    student, teacher = Vocabulary([b"a"]), Vocabulary([b"a", b"b"])
    made, _ = build_objective(student, teacher, loss="another", loss_options={"top_k": 0})
    assert made.options == {"top_k": 0}
    assert changes(Other)["top_k"] == (100,)


def test_no_loss_has_the_option(folders, tmp_path, capsys):
    """Which is known when the audit has chosen."""
    assert main(command(folders, tmp_path / "out", "--merge", "mean")) == 1
    assert f"xtoken train: merge: none of the chosen losses has it: {PIECES}\n" in capsys.readouterr().err
    assert main(command(folders, tmp_path / "out", "--gamma", "0.5")) == 1
    assert f"xtoken train: gamma: none of the chosen losses has a W: {PIECES}\n" in capsys.readouterr().err
    for name in ("student", "teacher"):
        assert main(command(folders, Path(folders[name]))) == 1
        assert f"output: expected another place than {folders[name]}, which is read" in capsys.readouterr().err


def test_errors_are_one_line(folders, tmp_path, capsys):
    assert main(command(folders, tmp_path / "out", "--loss", PROJECTED, OTHER)) == 1
    error = capsys.readouterr().err
    assert error == "xtoken train: loss: expected one, or one for each of the 1 teachers, got 2\n"
    assert main(command(folders, tmp_path / "out", "--student", "./none.gguf")) == 1
    assert capsys.readouterr().err == "xtoken train: --student: no such file or folder: ./none.gguf\n"
    for option, value in (("--teacher", "./none"), ("--teacher_cache", "none/cache"), ("--config", "none.yaml")):
        assert main(command(folders, tmp_path / "out", option, value)) == 1
        assert re.search(rf"xtoken train: {option}: no such [ a-z]+: {value}\n$", capsys.readouterr().err)


def test_teachers_of_the_same_name(folders, tmp_path, capsys):
    """Two folders of one name get two names. With ``--json`` the result is all that is printed."""
    again = tmp_path / "teacher"
    again.symlink_to(folders["teacher"])
    arguments = command(folders, tmp_path / "out", "--teacher", str(again), "--max_steps", "1", "--loss", UNAIDED)
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["output"], printed["steps"]) == (str(tmp_path / "out"), 1)
    assert printed["log"] == history(tmp_path / "out")
    assert {"eval_kd/teacher", "eval_kd/teacher-2"} <= printed["log"][-1].keys()


def test_weights_and_losses():
    assert weights_of(None, 1) == [1.0]
    assert weights_of(None, 2) == [0.5, 0.5]
    assert weights_of(None, 2, selects=True) == [1.0, 1.0]
    assert weights_of([0.2], 2) == [0.8, 0.2]
    assert weights_of([0.3], 1) == [0.3]
    with pytest.raises(ValueError, match="teacher_weight: expected one for each of the 3 teachers, got 1"):
        weights_of([0.3], 3)
    assert one_each(None, "auto", 2, "loss") == ["auto", "auto"]
    assert one_each([PROJECTED, SHARED], "auto", 2, "loss") == [PROJECTED, SHARED]


def test_help(capsys):
    """What is printed at once is the help of the options that are not those of transformers."""
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed == own_help(), "run: python -m xtoken.train.command > xtoken/train/help.txt"
    assert "--teacher_weight" in printed
    assert "--fsdp" not in re.findall(r"^  (--\w+)", printed, re.MULTILINE)
    assert main(["train", "--help-all"]) == 0
    printed = capsys.readouterr().out
    for name in ("--student", "--teacher_weight", "--teacher-weight", "--fsdp", "--gradient_accumulation_steps"):
        assert name in printed


def test_words_that_are_almost_options(capsys):
    assert main(["train", *ALL, "--data", ".", "--loss", "atuo"]) == 2
    assert "did you mean auto? (xtoken train --help)" in capsys.readouterr().err
    assert main(["train", *ALL, "--data", ".", "--learning_raet=1"]) == 2
    wanted = "no such option: --learning_raet=1; did you mean --learning_rate? (xtoken train --help)\n"
    assert capsys.readouterr().err == f"xtoken train: {wanted}"


@pytest.mark.parametrize("more", [(PIECES,), (PROJECTED, "--merge", "chain")])
def test_losses_that_need_the_token_ids(folders, tmp_path, capsys, more):
    assert main(command(folders, tmp_path / "out", "--max_steps", "2", "--loss", *more)) == 0
    assert f"teacher teacher: {more[0]}, weight 1" in capsys.readouterr().out
    assert all(entry["eval_kd"] > 0 for entry in history(tmp_path / "out") if "eval_kd" in entry)
