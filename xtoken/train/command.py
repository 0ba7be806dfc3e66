"""``xtoken train``: distils from one or several teachers into a student; a script to read, copy and change.

Everything that `transformers.TrainingArguments` takes is an option too: ``--learning_rate``, ``--bf16``,
``--gradient_accumulation_steps``, ``--fsdp``, ``--deepspeed``, ``--report_to tensorboard`` ... On several devices:
``torchrun --nproc-per-node 8 -m xtoken train ...`` or ``accelerate launch -m xtoken train ...``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from accelerate.state import AcceleratorState, PartialState
from torch.utils.data import ConcatDataset
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from xtoken.losses import registered
from xtoken.outputs import check_apart, check_folder
from xtoken.report.run import begin_run
from xtoken.served import KEY, ServedModel
from xtoken.storage import FolderLock, read_yaml
from xtoken.teacher_cache import TeacherCache
from xtoken.terminal import did_you_mean, is_terminal, one_line
from xtoken.vocabulary.sources import check_source

from . import adapters
from .assemble import SELF, build_teachers, encoding_of, examples_of, student_of
from .cached import CachedExamples
from .chat import ChatTemplate, use_template
from .checkpoints import check_output, newest
from .config import XTokenConfig
from .data import has_chats, is_path, load_examples, text_sample
from .encode import ExampleEncoder
from .limits import most_positions
from .option import option
from .plot import PlotCallback
from .prepare import check_losses, one_each, option_kinds, weights_of
from .table import open_data
from .teachers import load_model, load_tokenizer
from .trainer import XTokenTrainer

EXAMPLE = (
    "Example: xtoken train --student meta-llama/Llama-3.2-1B --teacher Qwen/Qwen3-4B --data corpus.jsonl --output out"
)
LOSSES = "options of the losses"


class Parser(HfArgumentParser):
    """Says what is wrong in one line, and what may be meant."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {one_line(message)} ({self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, [str(one) for one in action.choices or ()])
            raise


@dataclass
class TrainArguments:
    """What to train on what; see ``--help``."""

    student: str | None = option(None, "the student: a folder, a Hub id or a GGUF file")
    teacher: list[str] | None = option(
        None, "a teacher, likewise, or self for the student itself; may be repeated", action="extend"
    )
    data: list[str] | None = option(
        None, "files to train on, a folder of `xtoken align`, or datasets of the Hub: org/set, org/set:split, "
        "org/set:configuration:split", action="extend",
    )  # fmt: skip
    eval_data: list[str] | None = option(None, "likewise, to evaluate on, before and after", action="extend")
    streaming: bool = option(False, "read a dataset of the Hub to train on as it is needed; needs --max_steps")
    teacher_cache: list[str] | None = option(
        None, "folder of `xtoken cache-teacher` in place of running the teacher; one for each, or none for one that "
        "runs", action="extend",
    )  # fmt: skip
    teacher_url: list[str] | None = option(
        None, "server of vLLM or SGLang in place of running the teacher, http://host:port/v1, which knows it by the "
        "name that --teacher says; one for each, or none for one that runs; its key is $XTOKEN_TEACHER_KEY",
        action="extend",
    )  # fmt: skip
    teacher_tokenizer: list[str] | None = option(
        None, "tokenizer of a served teacher whose name only the server knows; one for each, or none", action="extend"
    )
    teacher_logprobs: int = option(20, "log-probabilities a token from a server; vLLM's --max-logprobs allows more")
    teacher_requests: int = option(16, "requests to a server in flight, of each process")
    teacher_timeout: float = option(600.0, "seconds in which a server must answer")
    teacher_patience: float = option(300.0, "seconds in which a request is sent again after errors")
    lora_merge: bool = option(
        False,
        "at the end merge the adapters (--lora_rank) into the student: the output folder holds it as a run without "
        "them does, and its folder adapter the adapter; default: the output folder holds the adapter alone",
    )
    resume: bool = option(False, "continue from the newest complete checkpoint in the output folder, if there is one")
    plot: bool = option(False, "draw curves into the output folder (needs matplotlib)")


def loss_arguments() -> dict[str, dict[str, Any]]:
    """For argparse: every option of a loss that is a number, a word or a switch, as the losses' functions say it."""
    texts: dict[str, dict[str, list[str]]] = {}  # the losses by what they say of it
    defaults: dict[str, dict[str, Any]] = {}
    kinds: dict[str, dict[Any, None]] = {}  # of all losses that have an option of the name, in order
    for loss, one in registered().items():
        options = one.options()
        for name, own in option_kinds(loss).items():
            default = options[name]
            if not all(isinstance(kind, str) or kind in (bool, int, float) for kind in own):
                continue
            defaults.setdefault(name, {})[loss] = "all" if default is None else default
            kinds.setdefault(name, {}).update(dict.fromkeys(own))
            said = re.search(rf"^    {name} : .*\n\s*([^.]*\.)", one.function().__doc__ or "", re.MULTILINE)
            text = " ".join(said[1].replace("``", "").replace("%", "%%").split()) if said else ""
            texts.setdefault(name, {}).setdefault(text, []).append(loss)
    found = {}
    for name, of in defaults.items():
        shared = len(set(of.values())) == 1
        shown = {loss: loss if shared else f"{loss} (default {default})" for loss, default in of.items()}
        parts = [f"{text} For {', '.join(shown[one] for one in losses)}" for text, losses in texts[name].items()]
        text = ". ".join(parts) + (f"; default {next(iter(of.values()))}" if shared else "")
        found[name] = {"help": text, **_reading(list(kinds[name]))}
    return found


def _reading(kinds: list[Any]) -> dict[str, Any]:
    """For argparse: how a value of one of these kinds is read."""
    if all(isinstance(kind, str) for kind in kinds):
        return {"choices": kinds}
    if kinds == [bool]:
        return {"type": string_to_bool, "nargs": "?", "const": True}
    return {"type": kinds[0] if len(kinds) == 1 else _number_or_word}


def _number_or_word(text: str) -> int | float | str:
    """Where losses give an option of the same name different kinds."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _parser() -> Parser:
    parser = Parser(
        (TrainArguments, XTokenConfig), prog="xtoken train", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --student STUDENT --teacher TEACHER --data FILE ... --output FOLDER [option ...]",
    )  # fmt: skip
    parser.add_argument("--help-all", action="help", help="show this, with all options of transformers")
    parser.add_argument("--config", help="YAML file with options by name; those of the command line come before it")
    group = parser.add_argument_group(LOSSES, "each for the losses that have it; 0 columns are all")
    for name, said in loss_arguments().items():
        group.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **said)
    of_loss = next(one for one in parser._actions if one.dest == "loss")
    of_loss.choices = ["auto", *registered()]  # also those that were registered after the configuration was imported
    parser.set_defaults(logging_steps=10, disable_tqdm=not is_terminal(sys.stderr))
    return parser


def own_help() -> str:
    """The help without the options of transformers: the content of ``help.txt``, which ``xtoken train --help`` prints,
    since it takes seconds to make."""
    parser, own = _parser(), vars(XTokenConfig)["__annotations__"]
    left_out = {"help", "help_all", *({one.name for one in fields(TrainingArguments)} - own.keys())}
    others = "Underscores may be hyphens. Options of transformers.TrainingArguments: xtoken train --help-all"
    description = str(parser.description).strip().replace("``", "")
    lines = [parser.format_usage().strip(), "", *description.splitlines(), "", EXAMPLE, "", others, ""]
    for action in parser._actions:
        if action.dest in left_out:
            continue
        names = [one for one in action.option_strings if "-" not in one[2:]]
        words = f" {{{','.join(map(str, action.choices))}}}" if action.choices else " VALUE"
        words = "" if action.nargs in (0, "?") else f"{words} ..." if action.nargs in ("+", "*") else words
        is_said = action.default in (None, False) or isinstance(action.default, list) or "default" in str(action.help)
        said = f"{action.help}" + ("" if is_said else f"; default {action.default}")
        lines += [f"  {', '.join(names)}{words}"]
        lines += textwrap.wrap(said.replace("%%", "%"), 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str]) -> tuple[TrainArguments, XTokenConfig]:
    """Options from the command line, and for those not given there from the YAML file that ``--config`` names."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    chosen, given = first.parse_known_args(arguments)
    parser = _parser()
    if chosen.config:
        given = [*_from_yaml(chosen.config, parser, given), *given]
    options, config, others, *unknown = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
    if unknown[0]:
        word = next((one for one in unknown[0] if one.startswith("-")), unknown[0][0])
        parser.error(f"no such option: {word}{did_you_mean(word.split('=')[0], [*parser._option_string_actions])}")
    known: Any = config.loss_options or {}
    given_options = {name: one for name, one in vars(others).items() if name != "config" and one is not None}
    config.loss_options = {**known, **given_options}
    for name in ("student", "teacher", "data"):
        if not getattr(options, name):
            raise ValueError(f"--{name}: expected one")
    if not {"-o", "--output", "--output_dir", "--output-dir"} & {one.split("=")[0] for one in given}:
        raise ValueError("--output: expected a folder")
    return options, config


def check(options: TrainArguments, config: XTokenConfig) -> None:
    """Raises ValueError, before models are loaded, for more or fewer losses than teachers, an option of no loss, and
    options that lack another, or do not go with it; OSError for an output that cannot be written, and for models that
    are not there."""
    check_folder(str(config.output_dir))
    check_source(str(options.student), "--student")
    for source in tokenizers_of(options):
        check_source(source, "--teacher")
    check_apart(str(config.output_dir), [str(options.student), *(options.teacher or [])])
    count = len(options.teacher or [])
    given: Any = config.loss_options
    if config.on_policy and any(folder != "none" for folder in options.teacher_cache or ()):
        raise ValueError(
            "on_policy: expected teachers that run, since a cache has nothing of new text, got --teacher_cache"
        )
    if all(url == "none" for url in options.teacher_url or ()):
        for name in ("teacher_logprobs", "teacher_requests", "teacher_timeout", "teacher_patience"):
            if getattr(options, name) != getattr(TrainArguments, name):
                raise ValueError(f"--{name}: expected --teacher_url with it, got none")
    evaluates = {"eval_strategy": config.eval_strategy != "no", "do_eval": config.do_eval,
                 "eval_on_start": config.eval_on_start}  # fmt: skip
    for name in (name for name, is_given in evaluates.items() if is_given and not options.eval_data):
        raise ValueError(f"--{name}: expected --eval_data with it, got none")
    if config.do_predict:
        raise ValueError("--do_predict: expected it left out, since nothing is predicted; --eval_data is evaluated on")
    if options.lora_merge and config.lora_rank is None:
        raise ValueError("--lora_merge: expected --lora_rank with it, got none")
    if options.lora_merge and config.push_to_hub:
        raise ValueError(
            "--lora_merge: expected it without --push_to_hub, which sends the adapter before it is merged; send the "
            f"output when the run is over: hf upload REPOSITORY {config.output_dir}"
        )
    weights_of(config.teacher_weight, count)
    for name in ("trust_top_k", "teacher_system"):
        one_each(getattr(config, name), None, count, name)
    if "auto" not in one_each(config.loss, "auto", count, "loss"):
        check_losses(config.loss or [], given, config.learn_projection)


def open_all(options: TrainArguments, config: XTokenConfig) -> tuple[list[Any], list[Any]]:
    """What is trained and evaluated on: paths, and datasets of Hugging Face.

    Raises ValueError or FileNotFoundError, before models are loaded, for what is not there, and if rows are chats and
    the tokenizer of the student or a teacher has no template for them.
    """
    train = [open_data(one, "data", "train", options.streaming) for one in options.data or []]
    held_out = [open_data(one, "eval_data") for one in options.eval_data or []]
    if options.streaming and (len(train) > 1 or is_path(train[0]) or options.teacher_cache):
        raise ValueError("--streaming: expected one dataset of the Hub in --data, and no --teacher_cache")
    if config.dataset_num_proc is not None and all(map(is_path, [*train, *held_out])):
        raise ValueError(
            "--dataset_num_proc: expected a dataset of the Hub with it, since files are read by one process"
        )
    if has_chats([*train, *held_out], config.text_column):
        for source in dict.fromkeys([str(options.student), *tokenizers_of(options)]):
            if source == SELF:
                continue
            tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
            use_template(tokenizer, config.chat_template)
            ChatTemplate(tokenizer, source)
    return train, held_out


def tokenizers_of(options: TrainArguments) -> list[str]:
    """What each teacher's tokenizer is loaded from; raises ValueError for one that is only for a server."""
    teachers = options.teacher or []
    urls = one_each(options.teacher_url, "none", len(teachers), "teacher_url")
    given = one_each(options.teacher_tokenizer, "none", len(teachers), "teacher_tokenizer")
    for teacher, url, tokenizer in zip(teachers, urls, given, strict=True):
        if url == "none" and tokenizer != "none":
            raise ValueError(f"--teacher_tokenizer: expected none for {teacher}, which has no --teacher_url")
    return [teacher if one == "none" else one for teacher, one in zip(teachers, given, strict=True)]


def teacher_models(options: TrainArguments, config: XTokenConfig, folders: Sequence[str]) -> list[Any]:
    """What `build_teachers` takes as the model of each teacher: a server, None for a cache, or "load"; raises
    ValueError, or FileNotFoundError for a cache that is not there."""
    teachers = options.teacher or []
    urls = one_each(options.teacher_url, "none", len(teachers), "teacher_url")
    models: list[Any] = []
    for name, source, url, folder in zip(teachers, tokenizers_of(options), urls, folders, strict=True):
        if name == SELF and (url, folder) != ("none", "none"):
            raise ValueError(f"--teacher {SELF}: expected neither --teacher_url nor --teacher_cache for the student")
        if url != "none" and folder != "none":
            raise ValueError(f"--teacher_url: expected it, or --teacher_cache, for {name}, got both")
        if folder != "none" and not os.path.isdir(folder):
            raise FileNotFoundError(f"--teacher_cache: no such folder: {folder}")
        if url == "none":
            models.append("load" if folder == "none" else None)
            continue
        tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
        models.append(
            ServedModel(
                url, tokenizer, name, logprobs=options.teacher_logprobs, requests=options.teacher_requests,
                timeout=options.teacher_timeout, patience=options.teacher_patience, key=os.environ.get(KEY),
            )
        )  # fmt: skip
    return models


def _from_yaml(path: str, parser: argparse.ArgumentParser, given: Sequence[str]) -> list[str]:
    """The options of a file that are not given already, as on a command line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config: no such file: {path}")
    values = read_yaml(Path(path), f"--config: {path}")
    if not isinstance(values, dict):
        raise ValueError(f"--config: expected options and their values in {path}, got {type(values).__name__}")
    actions = [action for action in parser._actions if action.nargs != 0]
    names = {option: action for action in actions for option in action.option_strings}
    present = {names[option].dest for option in (argument.split("=")[0] for argument in given) if option in names}
    arguments = []
    for name, value in values.items():
        action = names.get(f"--{name}")
        if action is None:
            raise ValueError(f"--config: {path} has an unknown option: {name}")
        if value is None or action.dest in present:
            continue
        several = value if isinstance(value, list) else [value]
        if None in several:
            raise ValueError(f"--config: {name}: expected a value, got null")
        arguments += [f"--{name}", *(_as_argument(one, action.choices or ()) for one in several)]
    return arguments


def _as_argument(value: Any, choices: Iterable[Any]) -> str:
    """A value of YAML as text, where on, off, yes and no are booleans."""
    if isinstance(value, bool):
        words = ("on", "yes") if value else ("off", "no")
        return next((word for word in choices if word in words), str(value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def settings_of(options: TrainArguments, config: XTokenConfig) -> dict[str, Any]:
    """The options that differ from those of a command that names only student, teacher, data and output; without
    secrets."""
    device = ["--use_cpu"] if config.use_cpu else []
    with _kept_processes():
        least = parse(["--student", "-", "--teacher", "-", "--data", "-", "--output", str(config.output_dir), *device])
    usual, values = ({**vars(one), **other.to_dict()} for one, other in (least, (options, config)))
    usual["use_cpu"] = False
    return {name: value for name, value in values.items() if not name.endswith("_token") and value != usual[name]}


@contextlib.contextmanager
def _kept_processes() -> Iterator[None]:
    """Keeps what accelerate knows of processes and devices, which all arguments of a Trainer set anew."""
    states = PartialState._shared_state, AcceleratorState._shared_state
    kept = [dict(one) for one in states]
    try:
        yield
    finally:
        for state, one in zip(states, kept, strict=True):
            state.clear()
            state.update(one)


def main(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Runs ``xtoken train``; returns what became of it, in the first process alone."""
    options, config = parse(arguments)
    check(options, config)
    data, eval_data = open_all(options, config)
    folders = one_each(options.teacher_cache, "none", len(options.teacher or []), "teacher_cache")
    models = teacher_models(options, config, folders)
    folder = str(config.output_dir)
    last = newest(folder) if options.resume else None
    begun = last or config.resume_from_checkpoint
    check_output(Path(folder), options.resume, begun)
    student, student_tok = student_of(str(options.student), None, config)
    teachers = build_teachers(
        options.teacher, student_tok, config, models=models,
        texts=lambda: text_sample(data, config.text_column, student_tok), tell=print,
    )  # fmt: skip
    teacher_toks = [one.tokenizer for one in teachers]
    caches = [
        None if folder == "none" else TeacherCache(folder, one.tokenizer)
        for folder, one in zip(folders, teachers, strict=True)
    ]
    encoding = encoding_of(config, most_positions(student), teachers)
    for name in ("max_length", "max_teacher_length"):
        if encoding[name] != getattr(config, name) and config.process_index == 0:
            print(f"--{name} {encoding[name]}: longer rows have no position in a model")
    is_cached = any(cache is not None for cache in caches)
    times = {cache.now for cache in caches if cache is not None and cache.now is not None}
    if len(times) > 1:
        raise ValueError(f"--teacher_cache: chat templates have written different times into them: {sorted(times)}")

    encoding.update(name_documents=is_cached, now=next(iter(times), None))

    def examples(data: Sequence[Any], with_prompts: bool = False) -> Any:
        files = [one for one in data if is_path(one)]
        encoding["with_prompts"] = with_prompts
        parts: list[Any] = [load_examples(files, student_tok, teacher_toks, **encoding)] if files else []
        make = functools.partial(ExampleEncoder, student_tok, teacher_toks, **encoding)
        parts += [examples_of(one, lambda _: make(), config) for one in data if not is_path(one)]
        loaded = ConcatDataset(parts) if len(parts) > 1 else parts[0] if parts else None
        return CachedExamples(loaded, caches) if is_cached and loaded is not None else loaded

    train, held_out = examples(data, bool(config.on_policy)), examples(eval_data)
    config.eval_on_start = held_out is not None and last is None
    callbacks = [PlotCallback()] if options.plot else []
    settings = settings_of(options, config)
    trainer = XTokenTrainer(student, config, teachers, None, train, held_out, student_tok, callbacks=callbacks)
    with contextlib.nullcontext() if config.process_index else FolderLock(Path(folder)):
        if config.process_index == 0:
            check_output(Path(folder), options.resume, begun)  # again, since another run may have ended meanwhile
            for leftover in Path(folder).glob(".tmp" + "[0-9A-Za-z]" * 6):  # of safetensors, killed while it wrote
                leftover.unlink()
            begin_run(folder, settings, begun)
        trainer.train(resume_from_checkpoint=begun)
        trainer.save_model()  # before an evaluation in another type (bf16_full_eval), which rounds the weights
        evaluated = {entry["step"] for entry in trainer.state.log_history if "eval_ce" in entry}
        if held_out is not None and trainer.state.global_step not in evaluated:
            trainer.evaluate()
        trainer.save_state()
        if options.lora_merge and config.should_save:
            stored, _ = load_model(
                str(options.student), dtype=config.student_dtype, trust_remote_code=config.trust_remote_code
            )
            adapters.save_merged(stored, Path(folder), trainer.model)
    if config.process_index:
        return None
    return {"output": folder, "steps": trainer.state.global_step, "log": trainer.state.log_history}


if __name__ == "__main__":
    print(own_help(), end="")
