"""XTokenConfig: the Trainer's arguments and those of the distillation."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from xtoken.losses import registered
from xtoken.losses.backends import check_backend
from xtoken.losses.call import check_choice
from xtoken.losses.criterion import DEFAULT_MAX_SCALE, SCALINGS

from .adapters import AdapterArguments
from .example import TRAIN_ON
from .fused import CHOICES
from .option import option
from .prepare import check_device, check_dtype, check_loss_options
from .quantized import quantization_config

TEACHER_MODES = ("sum", "select", "average", "entropy")

GENERATION = (
    "generation_url", "sync_every", "max_new_tokens", "num_generations", "generation_temperature", "generation_top_p",
)  # fmt: skip
"""Options of completions that are written in training."""

LISTS = (
    "loss", "teacher_weight", "teacher_system", "trust_top_k", "teacher_quantization", "lora_target_modules",
    "lora_modules_to_save",
)  # fmt: skip
"""Options of which one value may be given as it is."""

REFUSED: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "since the teachers' inputs are no columns of the student"),
    "label_smoothing_factor": (0.0, "since cross-entropy is computed without; what the teacher says is smooth"),
    "label_names": (["labels"], "since the collator and the losses know them by that"),
    "average_tokens_across_devices": (True, "since sums are divided by the labels and chunks of all processes"),
    "past_index": (-1, "since no cache of the student is kept"),
}
"""Options of TrainingArguments that would do nothing: what they have to be, and why."""

LEFT = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE")
"""Variables by which the TrainingArguments of transformers 4 tell accelerate what they want, and that they leave there:
the next training of the process would be in their type, and compiled."""


@contextlib.contextmanager
def environment(changed: Mapping[str, str]) -> Iterator[None]:
    """With these variables; afterwards those of `LEFT` are as before."""
    before = variables()
    os.environ.update(changed)
    try:
        yield
    finally:
        for name in LEFT:
            os.environ.pop(name, None)
        os.environ.update(before)


def variables() -> dict[str, str]:
    """Those of `LEFT` that are set."""
    return {name: os.environ[name] for name in LEFT if name in os.environ}


@dataclass
class XTokenConfig(AdapterArguments, TrainingArguments):
    """`transformers.TrainingArguments`, `AdapterArguments` and the following.

    Parameters
    ----------
    scaling : "dynamic" or "fixed"
        Factor s of the distillation term, as in `xtoken.XTokenLoss`. "dynamic" is ``CE / |KD|`` of the whole step, all
        processes together, and at most `max_scale`. With gradient accumulation that is not known until the step's last
        micro-batch, so it is the ratio of the previous step (and in the first step that of its first micro-batch): one
        factor for all micro-batches of a step, however the step is cut. Where all is written on policy there is no CE,
        and the factor is that of the last step that had both; 1 until there is one.
    max_scale : float
        Bound of the dynamic factor; ``inf`` is the paper's rule.
    ce_weight, kd_weight : float
        Weights of cross-entropy and distillation, >= 0.
    teacher_mode : "sum", "select", "average" or "entropy"
        Several teachers: the weighted sum of their losses; for each sample the loss of the teacher that predicts it
        best (least cross-entropy a student token of aligned text), which waits for the device once a micro-batch; the
        weighted mean of their probabilities as one teacher (they must share a tokenizer, and have one loss with the
        same options); or the weighted sum, with each chunk's loss also weighted by how sure its teacher is beside the
        others (``teacher_weighting="entropy"`` of `xtoken.XTokenLoss`).
    teacher_column : str, optional
        Field of the rows that says which teachers a row goes to, as for `ExampleEncoder`; names are those of the
        TeacherModels. Not with "average". A teacher runs only for the rows of a micro-batch that it has chunks of.
    trust_top_k : list of int, optional
        For teachers that are built by name: of `xtoken.Teacher`, one for all or one each; 0 for none.
    teacher_system : list of str, optional
        For those, too, what each alone is told, see `ExampleEncoder`; one for all or one each; "none" for none.
    teacher_average : float, optional
        Makes the teacher "self" a moving average of the student; see `TeacherModel.of_student`.
    projection_learning_rate : float
        Learning rate of trainable weights of W, which are neither decayed nor clipped.
    loss_backend : str
        See `xtoken.select_backend`.
    self_test : "auto", "on" or "off"
        Whether `XTokenTrainer.train` begins with a comparison of this run's losses with float64, in its types and with
        its W, pieces and options, on the device of the run, which takes a second or two there; it stops if one is
        wrong. "auto": on CUDA. See `xtoken.self_test` for more.
    fused : "auto", "on" or "off"
        Whether the losses get hidden states and output layer, of the student and of teachers that compute here, and
        make logits a block of rows at a time, so that logits of a whole micro-batch never exist. "auto" does so where
        they would take an eighth of the device's memory (see `xtoken.train.fused.logit_bytes`), if the model lets it;
        it says once what it does and why. "on" raises ValueError for a student whose output layer does not let it.
    on_policy : float or "teacher"
        For which share of the rows with a prompt the student itself writes the completion, anew each time: 0 to 1. What
        it has written is trained on by the distillation alone (``ce_labels``), its tokens as they were drawn; each
        teacher reads it by its own template. Rows that go to no teacher stay as they are. "teacher": the first teacher
        that can generate writes them all, and what it writes is data like any other. A row that is nothing but a prompt
        is always completed. The prompt is what comes before the last turn, if that is the assistant's. ValueError if
        the student is to write, but nothing is distilled; and for options of generation without `on_policy`.
    max_new_tokens : int
        Most tokens of a completion. Rows whose prompt leaves no room for them are trained on as they are, and those
        that are nothing but a prompt are left out.
    generation_temperature, generation_top_p : float
        How completions are drawn; a temperature of 0 takes the most probable token.
    num_generations : int
        Completions of each prompt. A batch has as many more rows.
    generation_url : str, optional
        A vLLM server of the student that writes its completions, ``http://host:port/v1``. It is sent the student's
        weights, or its adapter, through the folder ``generation`` in `output_dir`, which it must see too: started with
        ``VLLM_SERVER_DEV_MODE=1``, or for adapters with ``--enable-lora`` and
        ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``. Its key is ``$XTOKEN_GENERATION_KEY``.
    sync_every : int
        Steps from one time that it is sent them to the next. A run that goes on from a checkpoint between two begins
        with newer weights than the server had there.
    resume_weights_only : bool
        Whether a checkpoint without optimizer or scheduler is good enough to go on from, with new ones.
    loss, teacher_weight : sequence, optional
        For teachers that are given by name: one loss for all or one each, "auto" (the default) being what
        `xtoken.choose_loss` recommends; and weights, see `weights_of`.
    loss_options : dict, optional
        Options of the losses by name, such as ``{"temperature": 2.0}``, for each loss that has them.
    gamma : float
        Of `ProjectionMatrix.build`.
    learn_projection : bool
        Whether the weights of W are trained, with a loss that can.
    student_dtype, teacher_dtype, teacher_device, trust_remote_code
        How models are loaded that are given by name; see `load_model`.
    teacher_quantization : sequence of str, optional
        Weights of those teachers in 8 or 4 bits, one for all or one each, "none" for none; see
        `xtoken.train.quantized.quantization_config`.
    chat_template : str, optional
        For tokenizers that have none; see `use_template`.
    cache : path, optional
        Folder for W, audits and pieces; see `cache_folder`.
    train_on, max_length, max_teacher_length, text_column
        For rows that are not encoded yet; see `ExampleEncoder`. No model gets more tokens than it has positions.
    dataset_num_proc : int, optional
        Processes that encode a `datasets.Dataset`; see `EncodedTable`.
    packed : bool
        Whether the default collator puts several examples into one row; see `XTokenCollator`.

    A single value stands for a sequence of it (`LISTS`).

    Raises ValueError for unknown choices, and for what would have no effect here, or a wrong one (`REFUSED`).

    Notes
    -----
    Defaults that differ from those of TrainingArguments: ``remove_unused_columns=False``, ``label_names=["labels"]``,
    every process reads its own batches (``dispatch_batches=False``), and nothing waits for the device without need:
    ``logging_nan_inf_filter=False``, since a loss that is not finite is an error, and ``non_blocking=True`` for pinned
    batches, unless ``accelerator_config`` says otherwise.
    """

    output_dir: str | None = option(None, "folder for checkpoints, the student and the log", aliases=["--output", "-o"])
    scaling: str = option("dynamic", "factor of the distillation", choices=SCALINGS)
    max_scale: float = option(DEFAULT_MAX_SCALE, "bound of the dynamic factor; inf: none")
    ce_weight: float = option(1.0, "weight of the cross-entropy")
    kd_weight: float = option(1.0, "weight of the distillation")
    teacher_mode: str = option("sum", "several teachers", choices=TEACHER_MODES)
    teacher_column: str | None = option(None, "field of the data with the names of the teachers that a row goes to")
    trust_top_k: list[int] | None = option(
        None,
        "leave out chunks with a token that is not among a teacher's so many most probable; one for all "
        "teachers or one each; 0 (default): none",
        action="extend",
    )
    teacher_system: list[str] | None = option(
        None,
        "what a teacher alone is told, at the beginning of a chat's system message; one for all teachers "
        "or one each, or none for one that is told nothing more",
        action="extend",
    )
    teacher_average: float | None = option(
        None, "with --teacher self: a moving average of the student, such as 0.999; default: its beginning"
    )
    projection_learning_rate: float = option(1e-2, "learning rate of trainable weights of W")
    loss_backend: str = option("auto", "backend of the losses")
    self_test: str = option(
        "auto", "compare the losses of this run with float64 first; auto: on a GPU", choices=CHOICES
    )
    fused: str = option("auto", "losses from hidden states and output layer", choices=CHOICES)
    on_policy: str = option("0", "share of the prompts whose completions the student writes; or: teacher")
    max_new_tokens: int = option(256, "most tokens of a completion written in training")
    generation_temperature: float = option(1.0, "of these completions; 0: greedy")
    generation_top_p: float = option(1.0, "they are drawn from the tokens of this probability", aliases=["--top_p"])
    num_generations: int = option(1, "completions of each of these prompts")
    generation_url: str | None = option(None, "vLLM server of the student that writes them, http://host:port/v1")
    sync_every: int = option(1, "steps after which it is sent the student's weights again")
    resume_weights_only: bool = option(
        False, "also resume from a checkpoint without optimizer or scheduler, with new ones"
    )
    loss: list[str] | None = option(
        None, "one for all teachers or one each; auto: what xtoken.choose_loss recommends (default)",
        action="extend", choices=("auto", *registered()),
    )  # fmt: skip
    teacher_weight: list[float] | None = option(
        None,
        "weight of each teacher's loss; one fewer than teachers: the first has what is missing to 1; "
        "default 1 for one teacher, or each with --teacher_mode select; else equal shares of 1",
        action="extend",
    )
    loss_options: dict[str, Any] | str | None = option(None, "options of the losses, as JSON")
    gamma: float = option(0.1, "factor of W from one piece of a token to the next")
    learn_projection: bool = option(False, "train the weights of W too, with a loss that can")
    student_dtype: str = option("float32", "type of the student's weights")
    teacher_dtype: str = option("auto", "type of the teachers' weights; auto: as stored")
    teacher_device: str | None = option(None, "device of the teachers; default: the student's; auto: spread")
    teacher_quantization: list[str] | None = option(
        None,
        "teachers in 8 or 4 bits: int8, int4 (torchao), llm.int8, nf4, fp4 (bitsandbytes), none; JSON or "
        "a file (.json, .yaml) with the fields of a quantization_config of transformers; one for all or one each",
        action="extend",
    )
    trust_remote_code: bool = option(False, "run code that comes with models")
    chat_template: str | None = option(None, "for tokenizers that have none: a file with a chat template, or its text")
    cache: str | None = option(None, "folder for W, audits and pieces; default: $XTOKEN_CACHE or ~/.cache/xtoken")
    train_on: str = option("all", "turns that are trained on", choices=TRAIN_ON)
    max_length: int | None = option(1024, "student tokens of an example; longer texts are cut into several")
    max_teacher_length: int | None = option(None, "tokens of an example for each teacher; default: no limit")
    text_column: str = option("text", "field with the text of a document")
    dataset_num_proc: int | None = option(
        None, "processes that encode a dataset of the Hub; default: this one, with threads"
    )
    packed: bool = option(False, "put several examples into one row of max_length tokens")
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "leave as it is"})
    logging_nan_inf_filter: bool = option(False, "leave out losses that are not finite")
    remove_unused_columns: bool = option(False, "must be False: it would drop the teachers")

    _VALID_DICT_FIELDS = (*TrainingArguments._VALID_DICT_FIELDS, "loss_options")

    def __post_init__(self) -> None:
        for name in LISTS:
            if isinstance(one := getattr(self, name), (str, int, float, Mapping)):
                setattr(self, name, [one])
        self.check_adapters()
        for name in ("student_dtype", "teacher_dtype"):
            check_dtype(getattr(self, name), name)
        if self.teacher_device is not None:
            check_device(self.teacher_device, "teacher_device")
        check_backend(self.loss_backend, "loss_backend")
        for quantization in self.teacher_quantization or []:
            quantization_config(quantization)
        check_choice(self.scaling, "scaling", SCALINGS)
        if self.scaling == "fixed" and self.max_scale not in (DEFAULT_MAX_SCALE, float("inf")):
            raise ValueError(
                f"max_scale: expected scaling='dynamic' with it, whose factor it bounds, got {self.max_scale}"
            )
        check_choice(self.teacher_mode, "teacher_mode", TEACHER_MODES)
        if self.teacher_column is not None and self.teacher_mode == "average":
            raise ValueError("teacher_column: expected None for teacher_mode='average', which makes all teachers one")
        check_choice(self.fused, "fused", CHOICES)
        check_choice(self.self_test, "self_test", CHOICES)
        check_choice(self.train_on, "train_on", TRAIN_ON)
        for loss in self.loss or []:
            check_choice(loss, "loss", ("auto", *registered()))
        self._check_generation()
        # Where an earlier version of transformers has another default, nobody has asked for it.
        defaults = {one.name: one.default for one in fields(self)}
        for name, (expected, reason) in REFUSED.items():
            if name in defaults and (value := getattr(self, name)) not in (expected, defaults[name], None):
                raise ValueError(f"{name}: expected {expected}, {reason}; got {value!r}")
        for name in self._VALID_DICT_FIELDS:
            if isinstance(value := getattr(self, name, None), str) and value.startswith("{"):
                try:
                    json.loads(value)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{name}: expected JSON, got {value!r}: {error}") from error
        given = self.accelerator_config
        with environment({}):
            super().__post_init__()
            self.accelerate_variables = variables()
        started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
        if started > 1 and self.world_size == 1:
            raise ValueError(
                f"use_cpu: expected True for the {started} processes that were started, since there is no GPU: else "
                "each would train by itself"
            )
        if isinstance(self.loss_options, str):
            raise ValueError(f"loss_options: expected a JSON object, got {self.loss_options!r}")
        check_loss_options(self.loss_options)
        config: Any = self.accelerator_config
        if config.dispatch_batches:
            raise ValueError("dispatch_batches: expected False, since chunks cannot be sent between processes")
        split = [name for name in ("cp_size", "sp_size") if getattr(self.parallelism_config, name, 1) > 1]
        if split:
            raise ValueError(f"parallelism_config: expected rows that one device has whole, got {split[0]} above 1")
        if config.dispatch_batches is None:
            config.dispatch_batches = False
        if given is None or (isinstance(given, dict) and "non_blocking" not in given):
            config.non_blocking = self.dataloader_pin_memory

    def _check_generation(self) -> None:
        given: Any = self.on_policy
        if given != "teacher":
            try:
                self.on_policy = given = float(given)  # type: ignore[assignment]
            except (TypeError, ValueError):
                given = -1.0
            if not 0.0 <= given <= 1.0:
                raise ValueError(f"on_policy: expected a share from 0 to 1, or 'teacher', got {self.on_policy!r}")
        for name in ("max_new_tokens", "num_generations", "sync_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name}: expected an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        temperature, top_p = self.generation_temperature, self.generation_top_p
        if not isinstance(temperature, (int, float)) or not 0.0 <= temperature < float("inf"):
            raise ValueError(f"generation_temperature: expected a number >= 0, got {temperature!r}")
        if not isinstance(top_p, (int, float)) or not 0.0 < top_p <= 1.0:
            raise ValueError(f"generation_top_p: expected a share above 0, at most 1, got {top_p!r}")
        changed = {one.name for one in fields(self) if getattr(self, one.name) != one.default}
        for name in GENERATION:
            if not given and name in changed:
                raise ValueError(f"{name}: expected on_policy with it, got {getattr(self, name)!r} without")
        if self.generation_url is not None and given == "teacher":
            raise ValueError(
                "generation_url: expected None for on_policy='teacher', for which the student writes nothing"
            )
        if self.generation_url is None and self.sync_every > 1:
            raise ValueError(f"sync_every: expected generation_url with it, got {self.sync_every} without")
        if self.num_generations > 1 and not temperature:
            raise ValueError(
                f"num_generations: expected 1 for generation_temperature=0, with which all are the same, got "
                f"{self.num_generations}"
            )
