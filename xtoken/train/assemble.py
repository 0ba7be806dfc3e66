"""What `XTokenTrainer` and `xtoken train` make of names: the student, and teachers with a loss and what it needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from xtoken.vocabulary import Vocabulary

from . import adapters
from .config import XTokenConfig
from .itself import StudentTeacher
from .prepare import build_objective, check_losses, one_each, weights_of
from .teachers import TeacherModel, load_model

SELF = "self"
"""The name of a teacher that is the student; a folder of that name is ./self."""


def load_student(source: str | os.PathLike[str], args: XTokenConfig) -> tuple[Any, Any]:
    """The student and its tokenizer, with adapters and in 8 or 4 bits as `args` say; what `load_model` raises.

    Raises ValueError for a folder with an adapter.
    """
    if adapters.is_adapter(source):
        raise ValueError(
            f"student: expected a model, got the adapter in {source}; one that has been merged (lora_merge) can be "
            "trained on"
        )
    place = {} if args.student_quantization is None else {"device": args.device}
    student, tokenizer = load_model(
        source, dtype=args.student_dtype, trust_remote_code=args.trust_remote_code, may_shard=True,
        quantization_config=args.student_quantization, **place,
    )  # fmt: skip
    return (student if args.lora_rank is None else adapters.add_lora(student, args)), tokenizer


def build_teachers(
    teachers: Any,
    student_tok: Any,
    args: XTokenConfig,
    *,
    models: Sequence[Any] | None = None,
    texts: Iterable[str] | Callable[[], Iterable[str]] = (),
) -> list[TeacherModel]:
    """Teachers as they are, and those given by name or as a model by `TeacherModel.build` and `args`; "self" is
    `TeacherModel.of_student`.

    Parameters
    ----------
    teachers : TeacherModel, path, str, model, or a sequence of these
    student_tok : tokenizer
        As for `Vocabulary.from_tokenizer`; only looked at if a teacher is to be built.
    args : XTokenConfig
        Losses and weights in it are for the teachers that are built.
    models : sequence, optional
        For each teacher what `TeacherModel.build` takes as ``model``; default: all are loaded.
    texts
        As for `build_objective`.

    Raises ValueError for more or fewer losses, weights or systems than teachers to build, for options that none of the
    losses has, and for an average without "self"; and what `TeacherModel.build` raises.
    """
    is_one = isinstance(teachers, (str, os.PathLike, TeacherModel)) or not isinstance(teachers, Iterable)
    given = [teachers] if is_one else list(teachers)
    named = [k for k, one in enumerate(given) if not isinstance(one, TeacherModel)]
    if not named:
        return given
    losses, weights = one_each(args.loss, "auto", len(named), "loss"), weights_of(args.teacher_weight, len(named))
    tops, systems = (
        one_each(getattr(args, name), none, len(named), name)
        for name, none in (("trust_top_k", 0), ("teacher_system", "none"))
    )
    if args.teacher_average is not None and SELF not in [given[k] for k in named]:
        raise ValueError(f"teacher_average: expected a teacher {SELF!r} with it, got none")
    quantized = one_each(args.teacher_quantization, "none", len(named), "teacher_quantization")
    student = Vocabulary.from_tokenizer(student_tok)
    with args.main_process_first(desc="W and audit"):  # the others find them in the cache
        for k, loss, weight, quantization, top, system in zip(
            named, losses, weights, quantized, tops, systems, strict=True
        ):
            how: dict[str, Any] = {
                "loss": loss, "weight": weight, "loss_options": args.loss_options, "gamma": args.gamma,
                "learn_projection": args.learn_projection, "texts": texts, "cache": args.cache,
                "trust_top_k": top or None,
            }  # fmt: skip
            if given[k] == SELF:
                given[k] = _of_student(student_tok, args.teacher_average, **how)
            else:
                given[k] = TeacherModel.build(
                    given[k], student, model="load" if models is None else models[k], dtype=args.teacher_dtype,
                    device=args.teacher_device or args.device, trust_remote_code=args.trust_remote_code,
                    quantization_config=quantization, chat_template=args.chat_template, is_one_of_several=True, **how,
                )  # fmt: skip
            given[k].system = None if system == "none" else system
    check_losses([given[k].objective.loss for k in named], args.loss_options, args.learn_projection)
    names = [one.name for one in given]
    for k in named:
        if given[k].name in names[:k]:
            given[k].name = f"{given[k].name}-{k + 1}"
    return given


def _of_student(student_tok: Any, average: float | None, **how: Any) -> StudentTeacher:
    vocabulary = Vocabulary.from_tokenizer(student_tok)
    objective, reasons = build_objective(vocabulary, vocabulary, **how)
    made = StudentTeacher(objective, average, SELF, None)
    made.read_as(student_tok)
    made.reasons = reasons
    return made
