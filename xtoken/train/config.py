"""XTokenConfig: the Trainer's arguments and those of the distillation."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from xtoken.losses.call import check_choice
from xtoken.losses.criterion import DEFAULT_MAX_SCALE, SCALINGS

TEACHER_MODES = ("sum", "select", "average", "entropy")

REFUSED: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "since the teachers' inputs are no columns of the student"),
    "label_smoothing_factor": (0.0, "since cross-entropy is computed without; what the teacher says is smooth"),
    "label_names": (["labels"], "since the collator and the losses know them by that"),
    "average_tokens_across_devices": (True, "since sums are divided by the labels and chunks of all processes"),
    "past_index": (-1, "since no cache of the student is kept"),
}
"""Options of TrainingArguments that would do nothing: what they have to be, and why."""


@dataclass
class XTokenConfig(TrainingArguments):
    """`transformers.TrainingArguments` and the following.

    Parameters
    ----------
    scaling : "dynamic" or "fixed"
        Factor s of the distillation term, as in `xtoken.XTokenLoss`. "dynamic" is CE / |KD| of the whole step, all
        processes together, and at most `max_scale`. With gradient accumulation that is not known until the step's last
        micro-batch, so it is the ratio of the previous step (and in the first step that of its first micro-batch): one
        factor for all micro-batches of a step, however the step is cut.
    max_scale : float
        Bound of the dynamic factor; ``inf`` is the paper's rule.
    ce_weight, kd_weight : float
        Weights of cross-entropy and distillation, >= 0.
    teacher_mode : "sum", "select", "average" or "entropy"
        Several teachers: the weighted sum of their losses; for each sample the loss of the teacher that predicts it
        best (least cross-entropy a student token of aligned text), which waits for the device once a micro-batch; the
        weighted mean of their probabilities as one teacher (they must share a tokenizer); or the weighted sum, with
        each chunk's loss also weighted by how sure its teacher is beside the others (``teacher_weighting="entropy"`` of
        `xtoken.XTokenLoss`).
    teacher_column : str, optional
        Field of the rows that says which teachers a row goes to, as for `ExampleEncoder`; names are those of the
        TeacherModels. Not with "average". A teacher runs only for the rows of a micro-batch that it has chunks of.
    projection_learning_rate : float
        Learning rate of trainable weights of W, which are neither decayed nor clipped.
    loss_backend : str
        See `xtoken.select_backend`.
    resume_weights_only : bool
        Whether a checkpoint without optimizer or scheduler is good enough to go on from, with new ones.

    Raises ValueError for unknown choices, and for what would have no effect here, or a wrong one (`REFUSED`).

    Notes
    -----
    Defaults that differ from those of TrainingArguments: ``remove_unused_columns=False``, ``label_names=["labels"]``,
    every process reads its own batches (``dispatch_batches=False``), and nothing waits for the device without need:
    ``logging_nan_inf_filter=False``, since a loss that is not finite is an error, and ``non_blocking=True`` for pinned
    batches, unless ``accelerator_config`` says otherwise.
    """

    output_dir: str | None = field(
        default=None, metadata={"aliases": ["--output"], "help": "folder for checkpoints, the student and the log"}
    )
    scaling: str = field(default="dynamic", metadata={"help": "factor of the distillation", "choices": SCALINGS})
    max_scale: float = field(default=DEFAULT_MAX_SCALE, metadata={"help": "bound of the dynamic factor; inf: none"})
    ce_weight: float = field(default=1.0, metadata={"help": "weight of the cross-entropy"})
    kd_weight: float = field(default=1.0, metadata={"help": "weight of the distillation"})
    teacher_mode: str = field(default="sum", metadata={"help": "several teachers", "choices": TEACHER_MODES})
    teacher_column: str | None = field(
        default=None, metadata={"help": "field of the data with the names of the teachers that a row goes to"}
    )
    projection_learning_rate: float = field(default=1e-2, metadata={"help": "learning rate of trainable weights of W"})
    loss_backend: str = field(default="auto", metadata={"help": "backend of the losses"})
    resume_weights_only: bool = field(
        default=False, metadata={"help": "also resume from a checkpoint without optimizer or scheduler, with new ones"}
    )
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "leave as it is"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "leave out losses that are not finite"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be False: it would drop the teachers"})

    def __post_init__(self) -> None:
        check_choice(self.scaling, "scaling", SCALINGS)
        check_choice(self.teacher_mode, "teacher_mode", TEACHER_MODES)
        if self.teacher_column is not None and self.teacher_mode == "average":
            raise ValueError("teacher_column: expected None for teacher_mode='average', which makes all teachers one")
        # Where an earlier version of transformers has another default, nobody has asked for it.
        defaults = {one.name: one.default for one in fields(self)}
        for name, (expected, reason) in REFUSED.items():
            if name in defaults and (value := getattr(self, name)) not in (expected, defaults[name], None):
                raise ValueError(f"{name}: expected {expected}, {reason}; got {value!r}")
        given: Any = self.accelerator_config
        super().__post_init__()
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
