"""What `XTokenTrainer` and `xtoken train` make of names and rows: the student, teachers with a loss and what it needs,
examples."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from xtoken.outputs import check_apart
from xtoken.terminal import printable
from xtoken.vocabulary import Vocabulary

from . import adapters
from .chat import use_template
from .config import XTokenConfig
from .data import EncodedDataset, EncodedStream, check_row, is_example, is_path
from .encode import ExampleEncoder
from .itself import StudentTeacher
from .prepare import build_objective, check_losses, one_each, weights_of
from .table import EncodedTable, is_table
from .teachers import TeacherModel, check_teacher, load_model, load_tokenizer

logger = logging.getLogger(__name__)

OF_BUILT = (
    "loss", "loss_options", "teacher_weight", "trust_top_k", "teacher_system", "teacher_quantization",
    "learn_projection", "teacher_average", "gamma",
)  # fmt: skip
"""Options for teachers that are given by name."""

OF_EACH = {"loss": "auto", "trust_top_k": 0, "teacher_system": "none", "teacher_quantization": "none"}
"""Those of which one is given for all, or one for each, and what they are by default."""

SELF = "self"
"""The name of a teacher that is the student; a folder of that name is ./self."""


def student_of(model: Any, tokenizer: Any, args: XTokenConfig, needs_tokenizer: bool = True) -> tuple[Any, Any]:
    """A student as it is, or loaded by its name as `args` say, and its tokenizer: if it is needed, the one that the
    model names.

    Raises ValueError for a folder with an adapter, or that of the output; and what `load_model` raises.
    """
    if isinstance(model, (str, os.PathLike)):
        check_apart(str(args.output_dir), [model], "output_dir")
        if adapters.is_adapter(model):
            raise ValueError(
                f"student: expected a model, got the adapter in {model}; one that has been merged (lora_merge) can be "
                "trained on"
            )
        place = {} if args.student_quantization is None else {"device": args.device}
        model, loaded = load_model(
            model, dtype=args.student_dtype, trust_remote_code=args.trust_remote_code, may_shard=True,
            quantization_config=args.student_quantization, **place,
        )  # fmt: skip
        tokenizer = loaded if tokenizer is None else tokenizer
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if tokenizer is None and needs_tokenizer and name:
        tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    if tokenizer is not None:
        use_template(tokenizer, args.chat_template)
    return model, tokenizer


def build_teachers(
    teachers: Any,
    student_tok: Any,
    args: XTokenConfig,
    *,
    models: Sequence[Any] | None = None,
    texts: Iterable[str] | Callable[[], Iterable[str]] = (),
    tell: Callable[[str], Any] = logger.warning,
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
    tell : function
        Is told for each teacher that is built which loss it has and why, on the first process.

    Raises ValueError for more or fewer losses, weights or systems than teachers to build, for options that none of the
    losses has, for an average without "self", for options of `OF_BUILT` where none is built, and for a teacher in the
    folder of the output; and what `TeacherModel.build` raises.
    """
    is_one = isinstance(teachers, (str, os.PathLike, TeacherModel)) or not isinstance(teachers, Iterable)
    given = [teachers] if is_one else list(teachers)
    for k, one in enumerate(given):
        check_teacher(one, "teachers" if is_one else f"teachers[{k}]")
    named = [k for k, one in enumerate(given) if not isinstance(one, TeacherModel)]
    if not named:
        unused = [
            one.name for one in fields(args)
            if one.name in OF_BUILT and getattr(args, one.name) not in (one.default, {})
        ]  # fmt: skip
        if unused and not any(one.built_by is args for one in given):
            raise ValueError(
                f"{unused[0]}: expected teachers by name with it, since a TeacherModel is built with its own, got none"
            )
        return given
    if student_tok is None:
        raise ValueError("processing_class: expected the student's tokenizer, to build teachers by name, got None")
    check_apart(str(args.output_dir), [given[k] for k in named if is_path(given[k])], "output_dir")
    options: Any = args.loss_options
    losses, tops, systems, quantized = (
        one_each(getattr(args, name), default, len(named), name) for name, default in OF_EACH.items()
    )
    weights = weights_of(args.teacher_weight, len(named), args.teacher_mode == "select")
    if args.teacher_average is not None and SELF not in [given[k] for k in named]:
        raise ValueError(f"teacher_average: expected a teacher {SELF!r} with it, got none")
    if any(given[k] == SELF and one != "none" for k, one in zip(named, quantized, strict=True)):
        raise ValueError(f"teacher_quantization: expected none for {SELF!r}, which is as the student is")
    student = Vocabulary.from_tokenizer(student_tok)
    with args.main_process_first(desc="W and audit"):  # the others find them in the cache
        for k, loss, weight, quantization, top, system in zip(
            named, losses, weights, quantized, tops, systems, strict=True
        ):
            how: dict[str, Any] = {
                "loss": loss, "weight": weight, "loss_options": options, "gamma": args.gamma,
                "learn_projection": args.learn_projection, "texts": texts, "cache": args.cache,
                "trust_top_k": top or None,
            }  # fmt: skip
            if given[k] == SELF:
                objective, reasons = build_objective(student, student, **how)
                given[k] = TeacherModel.of_student(objective, average=args.teacher_average)
                given[k].read_as(student_tok)
                given[k].reasons = reasons
            else:
                given[k] = TeacherModel.build(
                    given[k], student, model="load" if models is None else models[k], dtype=args.teacher_dtype,
                    device=args.teacher_device or args.device, trust_remote_code=args.trust_remote_code,
                    quantization_config=quantization, chat_template=args.chat_template, is_one_of_several=True, **how,
                )  # fmt: skip
            given[k].built_by = args
            given[k].system = None if system == "none" or not system.strip() else system
    check_losses([given[k].objective.loss for k in named], options, args.learn_projection)
    if args.gamma != XTokenConfig.gamma and all(given[k].objective.projection is None for k in named):
        raise ValueError(
            f"gamma: none of the chosen losses has a W: {', '.join(given[k].objective.loss for k in named)}"
        )
    names = [one.name for one in given]
    for k in named:
        if given[k].name in names[:k]:
            given[k].name = f"{given[k].name}-{k + 1}"
        if args.process_index == 0:
            tell("\n".join(printable(line) for line in given[k].summary().splitlines()))
    return given


def check_data(data: Any, name: str) -> None:
    """Raises ValueError for what is neither rows nor examples, and for none of them; streams are not read."""
    if isinstance(data, Mapping):
        for key, one in data.items():
            check_data(one, f"{name}[{key!r}]")
        return
    known = "a list of rows, a dataset, or what rows can be read from one after the other"
    has_items = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if is_path(data):
        raise ValueError(f"{name}: expected {known}, got the text {str(data)!r}; load_examples and datasets read files")
    if hasattr(data, "iterrows"):
        raise ValueError(
            f"{name}: expected {known}, got a {type(data).__name__}; datasets.Dataset.from_pandas reads it"
        )
    if not has_items and not isinstance(data, Iterable):
        call = "; call it, to have its rows" if callable(data) else ""
        raise ValueError(f"{name}: expected {known}, got {type(data).__name__}{call}")
    if has_items and not len(data):
        raise ValueError(f"{name}: expected something to read, got none: an empty {type(data).__name__}")
    if has_items:
        check_row(data[0], name)


def examples_of(data: Any, encoder: Callable[[Any], ExampleEncoder], args: XTokenConfig, name: str = "rows") -> Any:
    """A data set of examples: as it is, or of rows, which are encoded; `name` is for messages.

    A list is encoded at once (`EncodedDataset`), a `datasets.Dataset` by its map with a cache (`EncodedTable`), and
    what has no length as it is read (`EncodedStream`). `encoder` makes one for a row, if there is one to encode.
    """
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        return EncodedStream(data, encoder, name)
    if not len(data) or is_example(data[0]):
        return data
    if not is_table(data):
        return EncodedDataset(data, encoder(data[0]))
    with args.main_process_first(desc="encoding"):  # the others find it in the cache
        return EncodedTable(data, encoder(data[0]), args.dataset_num_proc)


def training_split(data: Any) -> Any:
    """The split of a dict of splits that is trained on, "train" or the only one; says which are left."""
    if not isinstance(data, Mapping):
        return data
    name = "train" if "train" in data else next(iter(data), None)
    if name is None or (name != "train" and len(data) > 1):
        raise ValueError(f"train_dataset: expected a split of the name 'train', or one alone, got {list(data)}")
    if len(data) > 1:
        logger.warning("train_dataset: trained on is the split %r; left are %s", name, [*data.keys() - {name}])
    return data[name]


def encoding_of(args: XTokenConfig, student: int | None, teachers: Sequence[TeacherModel]) -> dict[str, Any]:
    """Options of `ExampleEncoder`. Its limits are those of `args`, or what all models that read an example have
    positions for; `student` are the student's."""
    theirs = [student if isinstance(one, StudentTeacher) else one.limits.positions for one in teachers]
    ours = [student, *(one.limits.positions for one in teachers if one.reads_student_ids)]
    sides = {"max_length": (args.max_length, *ours), "max_teacher_length": (args.max_teacher_length, *theirs)}
    return {
        **{name: min((one for one in side if one is not None), default=None) for name, side in sides.items()},
        "text_column": args.text_column, "train_on": args.train_on, "teacher_column": args.teacher_column,
        "teacher_systems": [one.system for one in teachers], "teacher_names": [one.name for one in teachers],
    }  # fmt: skip
