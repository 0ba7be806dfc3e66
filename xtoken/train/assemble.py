"""What `XTokenTrainer` and `xtoken train` make of names: the student, and teachers with a loss and what it needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from xtoken.vocabulary import Vocabulary

from . import adapters
from .config import XTokenConfig
from .prepare import check_losses, one_each, weights_of
from .teachers import TeacherModel, load_model


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
    """Teachers as they are, and those given by name or as a model by `TeacherModel.build` and `args`.

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

    Raises ValueError for more or fewer losses or weights than teachers to build, and for options that none of the
    losses has; and what `TeacherModel.build` raises.
    """
    is_one = isinstance(teachers, (str, os.PathLike, TeacherModel)) or not isinstance(teachers, Iterable)
    given = [teachers] if is_one else list(teachers)
    named = [k for k, one in enumerate(given) if not isinstance(one, TeacherModel)]
    if not named:
        return given
    losses, weights = one_each(args.loss, "auto", len(named), "loss"), weights_of(args.teacher_weight, len(named))
    quantized = one_each(args.teacher_quantization, "none", len(named), "teacher_quantization")
    student = Vocabulary.from_tokenizer(student_tok)
    with args.main_process_first(desc="W and audit"):  # the others find them in the cache
        for k, loss, weight, quantization in zip(named, losses, weights, quantized, strict=True):
            given[k] = TeacherModel.build(
                given[k], student, model="load" if models is None else models[k], dtype=args.teacher_dtype,
                device=args.teacher_device or args.device, trust_remote_code=args.trust_remote_code,
                quantization_config=quantization,
                chat_template=args.chat_template, is_one_of_several=True, loss=loss, weight=weight,
                loss_options=args.loss_options, gamma=args.gamma, learn_projection=args.learn_projection,
                texts=texts, cache=args.cache,
            )  # fmt: skip
    check_losses([given[k].objective.loss for k in named], args.loss_options, args.learn_projection)
    names = [one.name for one in given]
    for k in named:
        if given[k].name in names[:k]:
            given[k].name = f"{given[k].name}-{k + 1}"
    return given
