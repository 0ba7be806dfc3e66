"""``xtoken train``: distils from one or several teachers into a student; a script to read, copy and change.

Everything that `transformers.TrainingArguments` takes is an option too: ``--learning_rate``, ``--bf16``,
``--gradient_accumulation_steps``, ``--fsdp``, ``--deepspeed``, ``--report_to tensorboard`` ... On several devices:
``torchrun --nproc-per-node 8 -m xtoken train ...`` or ``accelerate launch -m xtoken train ...``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from xtoken.alignment.pretty import printable
from xtoken.corpus.files import find_files
from xtoken.losses import Needs, Teacher, registered
from xtoken.pieces import PieceIndex
from xtoken.sample import sample_texts
from xtoken.teacher_cache import TeacherCache
from xtoken.vocabulary import Vocabulary

from .cached import CachedExamples
from .chat import ChatTemplate, use_template
from .checkpoints import newest
from .collator import XTokenCollator
from .config import XTokenConfig
from .data import has_chats, load_examples, text_sample
from .example import TRAIN_ON
from .limits import most_positions
from .plot import PlotCallback
from .prepare import cached_choice, cached_projection
from .teachers import TeacherModel, load_model, load_tokenizer
from .trainer import XTokenTrainer


# ruff: noqa: RUF009, since this makes fields
def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainArguments:
    """What to train on what; see ``--help``."""

    student: str | None = _option(None, "the student: a folder, a Hub id or a GGUF file")
    teacher: list[str] | None = _option(None, "a teacher, likewise; may be repeated", action="extend")
    data: list[str] | None = _option(None, "files to train on, or a folder of `xtoken align`", action="extend")
    eval_data: list[str] | None = _option(None, "files to evaluate on, before and after", action="extend")
    loss: list[str] | None = _option(
        None, "one for all teachers or one each; auto: what xtoken.choose_loss recommends (default)",
        action="extend", choices=("auto", *registered()),
    )  # fmt: skip
    teacher_weight: list[float] | None = _option(
        None, "weight of each teacher's loss; one fewer than teachers: the first has what is missing to 1; "
        "default 1 for one teacher, equal shares of 1 for several", action="extend",
    )  # fmt: skip
    gamma: float = _option(0.1, "factor of W from one piece of a token to the next")
    learn_projection: bool = _option(False, "train the weights of W too, with a loss that can")
    train_on: str = _option("all", "turns that are trained on", choices=TRAIN_ON)
    chat_template: str | None = _option(None, "for tokenizers that have none: a file with a chat template, or its text")
    text_column: str = _option("text", "field with the text of a document")
    max_length: int = _option(1024, "student tokens of an example; longer texts are cut into several")
    max_teacher_length: int | None = _option(None, "tokens of an example for each teacher; default: no limit")
    packed: bool = _option(False, "put several examples into one row of max_length tokens")
    student_dtype: str = _option("float32", "type of the student's weights")
    teacher_dtype: str = _option("auto", "type of the teachers' weights; auto: as stored")
    teacher_device: str | None = _option(None, "device of the teachers; default: the student's; auto: spread")
    teacher_cache: list[str] | None = _option(
        None, "folder of `xtoken cache-teacher` in place of running the teacher; one for each, or none for one that "
        "runs", action="extend",
    )  # fmt: skip
    cache: str | None = _option(None, "folder for W and audits; default: $XTOKEN_CACHE or ~/.cache/xtoken")
    trust_remote_code: bool = _option(False, "run code that comes with models")
    resume: bool = _option(False, "continue from the newest complete checkpoint in the output folder, if there is one")
    plot: bool = _option(False, "draw curves into the output folder (needs matplotlib)")
    loss_options: dict[str, Any] = field(default_factory=dict, init=False)
    """Those of `loss_arguments` that are given."""


def loss_arguments() -> dict[str, dict[str, Any]]:
    """For argparse: every option of a loss that is a number, a word or a switch, as the losses' functions say it."""
    found: dict[str, dict[str, Any]] = {}
    defaults: dict[str, dict[str, Any]] = {}
    for loss, one in registered().items():
        hints = get_type_hints(one.function())
        for name, default in one.options().items():
            kinds = [kind for kind in get_args(hints[name]) or (hints[name],) if kind is not NoneType]
            if not all(isinstance(kind, str) or kind in (bool, int, float) for kind in kinds):
                continue
            defaults.setdefault(name, {})[loss] = "all" if default is None else default
            if name in found:
                continue
            said = re.search(rf"^    {name} : .*\n\s*([^.]*\.)", one.function().__doc__ or "", re.MULTILINE)
            found[name] = {"help": " ".join(said[1].replace("``", "").replace("%", "%%").split()) if said else ""}
            if isinstance(kinds[0], str):
                found[name]["choices"] = kinds
            elif kinds == [bool]:
                found[name].update(type=string_to_bool, nargs="?", const=True)
            else:
                found[name]["type"] = kinds[0]
    for name, of in defaults.items():
        shared = len(set(of.values())) == 1
        losses = ", ".join(loss if shared else f"{loss} (default {default})" for loss, default in of.items())
        found[name]["help"] += f" For {losses}" + (f"; default {next(iter(of.values()))}" if shared else "")
    return found


def parse(arguments: Sequence[str]) -> tuple[TrainArguments, XTokenConfig]:
    """Options from the command line, and for those not given there from the YAML file that ``--config`` names."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    chosen, given = first.parse_known_args(arguments)
    parser = HfArgumentParser(
        (TrainArguments, XTokenConfig), prog="xtoken train", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --student STUDENT --teacher TEACHER --data FILE ... --output FOLDER [option ...]",
    )  # fmt: skip
    parser.add_argument("--config", help="YAML file with options by name; those of the command line come before it")
    group = parser.add_argument_group("options of the losses", "each for the losses that have it; 0 columns are all")
    for name, said in loss_arguments().items():
        group.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **said)
    parser.set_defaults(logging_steps=10)
    if chosen.config:
        given = [*_from_yaml(chosen.config, parser, given), *given]
    options, config, others = parser.parse_args_into_dataclasses(given)
    options.loss_options = {name: one for name, one in vars(others).items() if name != "config" and one is not None}
    for name in ("student", "teacher", "data"):
        if not getattr(options, name):
            raise ValueError(f"--{name}: expected one")
    if not {f"--{name}" for name in ("output", "output_dir", "output-dir")} & {one.split("=")[0] for one in given}:
        raise ValueError("--output: expected a folder")
    return options, config


def check(options: TrainArguments) -> None:
    """Raises ValueError or FileNotFoundError, before models are loaded, for an option of no loss or a missing file."""
    if "auto" not in (options.loss or ["auto"]):
        check_losses(options, options.loss or [])
    for path in [*(options.data or []), *(options.eval_data or [])]:
        if not os.path.isdir(path):
            find_files([path])
    check_templates(options)


def check_templates(options: TrainArguments) -> None:
    """Raises ValueError if rows are chats and the tokenizer of the student or a teacher has no template for them."""
    if has_chats([*(options.data or []), *(options.eval_data or [])], options.text_column):
        for source in dict.fromkeys([str(options.student), *(options.teacher or [])]):
            tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
            use_template(tokenizer, options.chat_template)
            ChatTemplate(tokenizer, source)


def check_losses(options: TrainArguments, losses: Sequence[str]) -> None:
    """Raises ValueError for an option that none of the losses has."""
    chosen = [registered()[loss] for loss in losses]
    for name in options.loss_options:
        if not any(name in one.options() for one in chosen):
            raise ValueError(f"--{name}: none of the chosen losses has it: {', '.join(losses)}")
    if options.learn_projection and not any(one.trains_projection for one in chosen):
        raise ValueError(f"--learn_projection: none of the chosen losses can train W: {', '.join(losses)}")


def _from_yaml(path: str, parser: argparse.ArgumentParser, given: Sequence[str]) -> list[str]:
    """The options of a file that are not given already, as on a command line."""
    import yaml

    values = yaml.safe_load(Path(path).read_text())
    if not isinstance(values, dict):
        raise ValueError(f"--config: expected options and their values in {path}, got {type(values).__name__}")
    names = {action.dest: action.option_strings for action in parser._actions}
    present = {argument.split("=")[0] for argument in given}
    arguments = []
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"--config: {path} has an unknown option: {name}")
        if present.isdisjoint(names[name]):
            several = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in several)]
    return arguments


def one_each(values: Sequence[Any] | None, default: Any, count: int, name: str) -> list[Any]:
    """A value for each teacher, from one for all, one for each, or none."""
    values = [default] if values is None else list(values)
    if len(values) not in (1, count):
        raise ValueError(f"--{name}: expected one, or one for each of the {count} teachers, got {len(values)}")
    return values * count if len(values) == 1 else values


def weights_of(given: Sequence[float] | None, count: int) -> list[float]:
    """The teachers' weights; see ``--teacher_weight``."""
    if given is None:
        return [1.0 / count] * count
    if len(given) == count - 1:
        given = [1.0 - sum(given), *given]
    if len(given) != count:
        raise ValueError(f"--teacher_weight: expected one for each of the {count} teachers, got {len(given)}")
    return list(given)


def _lowered(name: str, given: int | None, positions: Sequence[int | None], config: XTokenConfig) -> int | None:
    """The most tokens of an example: as given, or what all models that read it can take; says where it is less."""
    most = min((one for one in (given, *positions) if one is not None), default=None)
    if most != given and config.process_index == 0 and (given is not None or most is not None):
        print(f"--{name} {most}: longer rows have no position in a model")
    return most


def build_teacher(
    source: str, loss: str, weight: float, folder: str, student: Vocabulary, options: TrainArguments,
    device: torch.device,
) -> tuple[TeacherModel, Any, TeacherCache | None, list[str]]:  # fmt: skip
    """A teacher, its tokenizer, its cache if it has one, and what there is to say about it.

    No model is loaded if it is cached, in `folder`; "none" if it is not.
    """
    where, trust = options.teacher_device or device, options.trust_remote_code
    model, cache = None, None
    if folder == "none":
        model, tokenizer = load_model(source, dtype=options.teacher_dtype, device=where, trust_remote_code=trust)
    else:
        tokenizer = load_tokenizer(source, trust_remote_code=trust)
        cache = TeacherCache(folder, tokenizer)
    use_template(tokenizer, options.chat_template)
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    name = os.path.basename(os.path.abspath(source)).removesuffix(".gguf")
    reasons: list[str] = []
    if loss == "auto":
        choice = cached_choice(
            student, vocabulary, options.cache, learn_projection=options.learn_projection, gamma=options.gamma
        )
        loss, reasons = choice.loss, [*(choice.report.reasons if choice.report else ()), *choice.reasons]
    kind = registered()[loss]
    projection: Any = None
    pieces = None
    if kind.needs is Needs.PIECES:
        own = text_sample(options.data or [], options.text_column, student)
        pieces = PieceIndex.build(student, vocabulary, texts=[*sample_texts(student, vocabulary), *own])
        reasons += [pieces.merged().summary()]
    if kind.needs not in (Needs.PIECES, Needs.SAME_TOKENIZER):
        projection = cached_projection(student, vocabulary, options.cache, gamma=options.gamma)
    reasons += [repr(one) for one in (pieces, projection) if one is not None]
    if options.learn_projection and kind.trains_projection:
        projection = projection.learnable()
    given = {name: value for name, value in options.loss_options.items() if name in kind.options()}
    if given.get("top_k") == 0:
        given["top_k"] = None
    objective = Teacher(projection, loss, weight, pieces=pieces, **given)
    said = [f"teacher {name}: {loss}, weight {weight:g}", *(f"  {reason}" for reason in reasons)]
    return TeacherModel(objective, model, vocabulary, name, None if where == "auto" else where), tokenizer, cache, said


def main(arguments: Sequence[str]) -> None:
    """Runs ``xtoken train``."""
    options, config = parse(arguments)
    check(options)
    count = len(options.teacher or [])
    losses, weights = one_each(options.loss, "auto", count, "loss"), weights_of(options.teacher_weight, count)
    folders = one_each(options.teacher_cache, "none", count, "teacher_cache")
    student, student_tok = load_model(
        str(options.student), dtype=options.student_dtype, trust_remote_code=options.trust_remote_code, may_shard=True
    )
    use_template(student_tok, options.chat_template)
    with config.main_process_first(desc="W and audit"):  # the others find them in the cache
        built = [
            build_teacher(*one, Vocabulary.from_tokenizer(student_tok), options, config.device)
            for one in zip(options.teacher or [], losses, weights, folders, strict=True)
        ]
    teachers, teacher_toks, caches = [one[0] for one in built], [one[1] for one in built], [one[2] for one in built]
    check_losses(options, [teacher.objective.loss for teacher in teachers])
    for k, teacher in enumerate(teachers):
        if teacher.name in [one.name for one in teachers[:k]]:
            teacher.name = f"{teacher.name}-{k + 1}"
    if config.process_index == 0:
        print("\n".join(printable(line) for one in built for line in one[3]))
    longest = [most_positions(student), *(one.limits.positions for one in teachers if one.reads_student_ids)]
    max_length = _lowered("max_length", options.max_length, longest, config)
    longest = [one.limits.positions for one in teachers]
    max_teacher_length = _lowered("max_teacher_length", options.max_teacher_length, longest, config)
    is_cached = any(cache is not None for cache in caches)
    times = {cache.now for cache in caches if cache is not None and cache.now is not None}
    if len(times) > 1:
        raise ValueError(f"--teacher_cache: chat templates have written different times into them: {sorted(times)}")

    def examples(files: Sequence[str] | None) -> Any:
        if not files:
            return None
        loaded = load_examples(
            files, student_tok, teacher_toks, text_column=options.text_column, max_length=max_length,
            max_teacher_length=max_teacher_length, train_on=options.train_on, name_documents=is_cached,
            now=next(iter(times), None),
        )  # fmt: skip
        return CachedExamples(loaded, caches) if is_cached else loaded

    train, held_out = examples(options.data), examples(options.eval_data)
    folder = str(config.output_dir)
    last = newest(folder) if options.resume else None
    config.eval_on_start = held_out is not None and last is None
    collator = XTokenCollator(student_tok, teacher_toks, packed=options.packed, max_length=options.max_length)
    callbacks = [PlotCallback()] if options.plot else []
    trainer = XTokenTrainer(student, config, teachers, collator, train, held_out, student_tok, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=last or config.resume_from_checkpoint)
    evaluated = {entry["step"] for entry in trainer.state.log_history if "eval_ce" in entry}
    if held_out is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
