"""XTokenTrainer: transformers' Trainer with teachers of other tokenizers."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState
from transformers import trainer as trainer_of_transformers
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

from xtoken.alignment import Alignment, to_device
from xtoken.audit import same_tokens
from xtoken.calibration import MOST_LEFT
from xtoken.check import Lesson, check_lessons
from xtoken.losses import Teacher, XTokenLoss, registered
from xtoken.losses.backends import IGNORED
from xtoken.losses.criterion import ratio
from xtoken.losses.logits import AnyLogits, materialised
from xtoken.once import Once
from xtoken.projection import LearnableProjection
from xtoken.storage import TensorFile
from xtoken.vocabulary import Vocabulary

from . import adapters, checkpoints
from .assemble import build_teachers, check_data, encoding_of, examples_of, student_of, training_split
from .collator import OnHost, XTokenCollator, keep_host
from .config import XTokenConfig, environment
from .data import EncodedStream, Rounds, lengths, text_sample
from .encode import ExampleEncoder
from .ensemble import chunks_of_one, keep, mean_logits, position_alignment, select_best
from .fused import Fused, logit_bytes
from .itself import Averages, StudentTeacher
from .limits import KnownPad, Limits, head_rows, text_config
from .meter import FiniteCheck, Meter, Stopwatch, wide
from .packing import PACKED, packing_fault
from .plot import draw_curves
from .projections import ProjectionSteps
from .rollout import Rollout
from .routing import logits_where_needed, needed_rows, read_by
from .serving import Ahead
from .teachers import check_same_bytes

logger = logging.getLogger(__name__)

STATE_FILE = "distillation.safetensors"
"""In a checkpoint: trained weights of W with Adam's moments, and the last step's factor of the distillation."""

TOLD_AFTER = 100
"""Steps with the largest factor of the distillation, after which it is said that it is no longer CE / |KD|."""

_TAUGHT_NOTHING = {
    "starts_left_out": (
        "%s: %.1f %% of the chunks begin with tokens of different events, or that W does not join, and teach nothing "
        "there; for events, build the PieceIndex with text like this, texts=[*xtoken.sample_texts(student, teacher), "
        "*own]"
    ),
    "teacher_flat": (
        "%s: in %.1f %% of the chunks all tokens that are compared are equally likely to the teacher, which teaches "
        "the uniform distribution there; if its log-probabilities are cached or served, list more of them"
    ),
}
"""What is said of a share of the chunks, by its name in logs."""

_STATE = TensorFile("the distillation of a checkpoint")
_MOMENTS = "moments."  # before the names of moments


class _Ordered(Sampler[int]):
    """A grouping by length whose order is that of seed and epoch, so that a run that goes on finds it again; the
    Trainer's own depends on all random numbers that were drawn before."""

    def __init__(self, sampler: LengthGroupedSampler, trainer: Trainer) -> None:
        self.sampler, self.trainer = sampler, trainer

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        args, epoch = self.trainer.args, int(self.trainer.state.epoch or 0)
        seed = args.seed if args.data_seed is None else args.data_seed
        self.sampler.generator = torch.Generator("cpu").manual_seed(seed + epoch)
        return iter(self.sampler)


@dataclass
class _Step:
    """An optimizer step: what its sums are divided by, on all micro-batches and processes, and what has been done."""

    items: float | Tensor
    chunks: Sequence[float | Tensor]
    micro_batches: int
    done: int = 0
    ce_and_kd: Tensor | float = 0.0


class XTokenTrainer(Trainer):
    """`transformers.Trainer` that distils from one or several teachers, next to cross-entropy.

    The rest is the Trainer's: data parallelism, FSDP, DeepSpeed, gradient accumulation, mixed precision, logging,
    checkpoints, resuming. The sums of CE and of each teacher's KD are divided by the labels and chunks of the whole
    step, all micro-batches and processes together, so that it does not matter how a batch is cut. (A loss may choose
    its ``top_k`` columns by the rows of a micro-batch; ``top_k=None`` takes them all.)

    Parameters
    ----------
    model : PreTrainedModel, PeftModel, or str
        The student, or what `load_model` takes, with its tokenizer.
    args : XTokenConfig, optional
    teachers : one or a sequence of str, path, model or TeacherModel
        Run in inference mode, never trained. `TeacherModel.build` makes those of the first three by `args`: the loss is
        what `xtoken.choose_loss` recommends, unless `args` say otherwise, and what was chosen and why is logged.
    data_collator
        Makes batches with ``input_ids``, ``attention_mask``, ``labels`` (-100 where ignored) and ``teachers``: a list
        with a dict for each teacher, of ``input_ids``, ``attention_mask`` and ``alignment``; or ``alignment`` None
        for a teacher that reads the student's ids. Default: `XTokenCollator`. Chunks with a token whose label is -100
        are left out.
    train_dataset, eval_dataset
        Examples as the collator takes them. For `XTokenCollator` also rows as `ExampleEncoder` takes them: a list,
        encoded at once (`EncodedDataset`); a `datasets.Dataset`, whose examples are kept for the next run
        (`EncodedTable`); or a stream, which may be endless (`EncodedStream`). Of a dict of splits the one called
        "train" is trained on; all of an `eval_dataset` are evaluated.
    processing_class
        The student's tokenizer. Default: that of a model given by name; without a collator also the one that the model
        says it was loaded with. Without one vocabularies are not checked.
    **kwargs
        As for `transformers.Trainer`.

    Raises
    ------
    TypeError, ValueError
        If the arguments are no XTokenConfig; if an output layer is narrower than its tokenizer, or a teacher does not
        go with the student's tokenizer or with the other teachers; and what `TeacherModel.build` raises. In training:
        if a batch would feed a teacher ids of another tokenizer, or logits are not finite; the message names the model
        and the step. On the CPU that is at once; a device is asked when something is logged, evaluated or saved, so the
        steps until then are lost.

    Notes
    -----
    The logged ``loss`` is ``ce_weight CE + kd_weight KD``, in training (with the ``router_loss`` of a mixture of
    experts, for which what fills up packed rows are tokens too) as in `evaluate`. Under ``scaling="dynamic"``
    what is differentiated has the factor s before KD, and a value in which KD hardly shows.
    Logged with the loss: the results of `Meter.summary`, ``kd_scale`` (the factor of KD), ``tokens_per_second`` of
    the student, and ``time_teacher``, ``time_student`` (forward and backward) and ``time_loss`` as shares of the
    time since the last log (on CUDA of the time on the device); agreement and masses are of the logged step only.
    `evaluate` reports ``eval_ce`` and ``eval_kd`` over all held-out labels and chunks, and as ``eval_loss`` their
    weighted sum, without the factor, also with ``dataloader_drop_last``. The samples that several processes repeat to
    fill their last batch do not count; for that a held-out batch has a row for each sample (packing is turned off).

    No micro-batch waits for the device, but with ``teacher_mode="select"``, or a DataLoader that does not come from the
    Trainer: what is counted and checked is read from the batch before it is moved there.

    Trainable weights of W are no part of the model, so nothing wraps or shards them: every process has all of them, and
    an Adam of their own, whose learning rate falls as the student's does. Teachers are not wrapped either. Tested with
    two processes on the CPU: data parallelism, FSDP2, and DeepSpeed's ZeRO-2 and ZeRO-3 where it is installed. FSDP1
    has not been run: torch has it for accelerators only.
    """

    data_collator: Any

    def __init__(
        self,
        model: Any = None,
        args: XTokenConfig | None = None,
        teachers: Any = (),
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = XTokenConfig() if args is None else args
        if not isinstance(args, XTokenConfig):
            raise TypeError(f"args: expected an XTokenConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"args: expected one device a process, got {args.n_gpu} for DataParallel; launch with torchrun or "
                "accelerate launch"
            )
        if args.fp16 and args.device.type == "cpu" and args.deepspeed is None:
            raise ValueError("fp16: expected False on the CPU, where the Trainer computes without it; use bf16")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: expected None, since the loss is that of args and teachers")
        if data_collator is None or isinstance(data_collator, XTokenCollator):
            for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
                if data is not None:
                    check_data(data, name)
        model, processing_class = student_of(model, processing_class, args, needs_tokenizer=data_collator is None)
        model = adapters.prepare(model, args, args.gradient_checkpointing)
        train_dataset = training_split(train_dataset)
        if _groups_by_length(args) and train_dataset is not None and not hasattr(train_dataset, "__len__"):
            raise ValueError(
                "train_sampling_strategy: expected 'random' or 'sequential' for a stream, whose rows come as they are, "
                "got a grouping by length"
            )
        given = [] if train_dataset is None else [train_dataset]
        texts = functools.partial(text_sample, given, args.text_column, processing_class)
        self.teachers = build_teachers(teachers, processing_class, args, texts=texts)
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers: expected a name of its own for each, got {names}")
        self._of_student = [one for one in self.teachers if isinstance(one, StudentTeacher)]
        for own in self._of_student:
            own.read_as(processing_class)
        self.vocabulary = None if processing_class is None else Vocabulary.from_tokenizer(processing_class)
        if self.vocabulary is not None:
            for teacher in self.teachers:
                teacher.check_student(self.vocabulary)
        if data_collator is None:
            data_collator = self._collator(args)
        if args.teacher_column is not None and not isinstance(data_collator, XTokenCollator):
            raise ValueError("data_collator: expected an XTokenCollator for teacher_column, which knows of routes")
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        # The loss is a part of the whole step's, not a mean to be divided by the micro-batches. Two flags say so.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        if self._of_student:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "teachers: expected none of the student itself with FSDP or DeepSpeed, where no process has all of "
                    f"its weights, got {self._of_student[0].name}"
                )
            for own in self._of_student:
                own.follow(self.model)
            self.add_callback(Averages(self, self._of_student))
        for teacher in self.teachers:
            teacher.place(args.device)
        self._limits = Limits.of(self.model, self.vocabulary, "student")
        if self._limits.rows is not None:
            self.add_callback(KnownPad(self.model, self._limits.rows))
        objectives = self._objectives()
        size = None
        if self.vocabulary is not None and not any(one.shape is not None for one in objectives):
            # Who knows W or pieces knows it; else it is without the special tokens that a model lacks.
            rows = [self._limits.rows, *(one.limits.rows for one in self.teachers if one.reads_student_ids)]
            size = min([len(self.vocabulary), *(one for one in rows if one is not None)])
        self.criterion = XTokenLoss(
            objectives, args.scaling, args.ce_weight, args.kd_weight,
            max_scale=args.max_scale, vocab_size=size, backend=args.loss_backend,
            teacher_weighting="entropy" if args.teacher_mode == "entropy" else "fixed",
        )  # fmt: skip
        self._projection_steps = ProjectionSteps(self) if list(self.criterion.parameters()) else None
        if self._projection_steps is None and args.projection_learning_rate != XTokenConfig.projection_learning_rate:
            raise ValueError(
                "projection_learning_rate: expected learn_projection with it, got no weights of W to train"
            )
        if self._projection_steps is not None:
            if self._scales_gradients():
                raise ValueError(
                    "teachers: expected projections without trainable weights for DeepSpeed in fp16, which has a "
                    "factor of its own for gradients, got one with; use bf16"
                )
            self.add_callback(self._projection_steps)
        self._served = [teacher.served for teacher in self.teachers if teacher.served is not None]
        for teacher in self.teachers if args.on_policy and train_dataset is not None else ():
            if teacher.model is None and teacher.served is None:
                raise ValueError(
                    f"on_policy: expected teachers that run, but {teacher.name} is cached, and a cache has nothing of "
                    "what is written in training"
                )
        self.train_dataset: Any = self._encoded(train_dataset, "train_dataset")
        self.eval_dataset: Any = self._encoded(eval_dataset, "eval_dataset")
        self._rollout: Rollout | None = None
        if self.args.on_policy and self.train_dataset is not None:
            self._rollout = Rollout(self, self._rollout_encoder())
        self._step: _Step | None = None
        self._router_loss: Tensor | float = 0.0  # of the steps since the last log
        # The factor of the last step, 0 where there was none; read only where reading waits for nothing or must.
        self._last_scale = torch.zeros((), dtype=wide(args.device), device=args.device)
        self._scale_is_known = False
        self._has_both: Tensor | bool = False
        self._unchecked = {teacher.name for teacher in self.teachers}
        self._ahead = Ahead()
        self._faults: dict[str, str | None] = {}  # of models, why examples must not share their rows, as far as known
        self._bounded_steps, self._steps = 0.0, 0
        self._warn_once = Once(logger.warning)
        self._meter = self._new_meter()
        self._held_out = self._no_counts()
        self._finite = FiniteCheck(["student", *names])
        self._fused = self._choice_of_fused()
        self._watch = Stopwatch(args.device)

    def create_accelerator_and_postprocess(self) -> None:
        """As the arguments say, not those that were made last."""
        with environment(self.args.accelerate_variables):
            super().create_accelerator_and_postprocess()

    def _collator(self, args: XTokenConfig) -> XTokenCollator:
        known = [self.vocabulary, *(one.vocabulary for one in self.teachers)]
        if None in known:
            raise ValueError(
                "data_collator: expected one, or processing_class and a tokenizer of each teacher, got None"
            )
        return XTokenCollator(known[0], known[1:], packed=args.packed, max_length=args.max_length)

    def _encoded(self, data: Any, name: str) -> Any:
        """A data set of examples, as rows of text, prompts or messages become if the collator is ours."""
        if isinstance(data, dict):
            return {key: self._encoded(one, f"{name}[{key!r}]") for key, one in data.items()}
        if data is None or isinstance(data, (str, EncodedStream)) or not isinstance(self.data_collator, XTokenCollator):
            return data
        check_data(data, name)
        examples = examples_of(data, functools.partial(self._encoder, name), self.args, name)
        if examples is data and self.args.teacher_column is not None and len(data) and "route" not in data[0]:
            raise ValueError(
                f"{name}: expected examples of an ExampleEncoder(teacher_column={self.args.teacher_column!r}), got "
                "some without a route"
            )
        return examples

    def _encoder(self, name: str, row: Any) -> ExampleEncoder:
        known = [self.processing_class, *(one.tokenizer for one in self.teachers)]
        if None in known or any(one.model is None and one.served is None for one in self.teachers):
            keys = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"{name}: expected examples, as EncodedDataset(rows, ExampleEncoder(...)) has them, got a row with "
                f"{keys}; with processing_class, and teachers that have a model and a tokenizer, rows are encoded here"
            )
        options = encoding_of(self.args, self._limits.positions, self.teachers)
        options["with_prompts"] = bool(self.args.on_policy) and name == "train_dataset"
        return ExampleEncoder(known[0], known[1:], **options)

    def _rollout_encoder(self) -> ExampleEncoder:
        """What reads completions: as the data were read, where they tell."""
        if not isinstance(self.data_collator, XTokenCollator):
            raise ValueError(
                "on_policy: expected an XTokenCollator, which makes batches of completions too, got "
                f"{type(self.data_collator).__name__}"
            )
        known = getattr(self.train_dataset, "encoder", None)
        return known if isinstance(known, ExampleEncoder) else self._encoder("train_dataset", {"on_policy": None})

    def _scales_gradients(self) -> bool:
        """Whether DeepSpeed does, as it does for fp16."""
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config if self.is_deepspeed_enabled else {}
        return bool(config.get("fp16", {}).get("enabled", False))

    def _objectives(self) -> list[Teacher]:
        """The criterion's teachers, W on the student's device."""
        if self.args.teacher_mode == "average" and self.teachers:
            first, *others = self.teachers
            for teacher in others:
                if first.vocabulary and teacher.vocabulary and not same_tokens(first.vocabulary, teacher.vocabulary):
                    raise ValueError(
                        f"teacher_mode: expected teachers with one tokenizer for 'average', but {teacher.name} has "
                        f"another than {first.name}"
                    )
                ours, own = (_how(one.objective) for one in (first, teacher))
                for name in ours if ours != own else ():
                    if name not in own or ours[name] != own[name]:
                        raise ValueError(
                            f"{name}: expected one for all teachers with teacher_mode='average', which makes them one, "
                            f"got {ours[name]} for {first.name} and {own.get(name)} for {teacher.name}"
                        )
            return [replace(first.objective_for(self._limits.rows, self.args.device), weight=1.0)]
        return [teacher.objective_for(self._limits.rows, self.args.device) for teacher in self.teachers]

    def _choice_of_fused(self) -> Fused:
        made = Fused(self.args.fused, self.args.device, self.is_fsdp_enabled)
        if self.is_deepspeed_enabled:
            made.refuse("expected no DeepSpeed, which gathers the weights of a layer when that is called")
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 2) == 1:
            made.refuse("expected FSDP2, since FSDP1 gathers the weights of a layer when that is called")
        if self.accelerator.state.dynamo_plugin.backend.value != "NO":
            made.refuse("expected a model that is not compiled as a whole, with its output layer")
        for teacher in self.teachers if self.args.teacher_mode == "average" and len(self.teachers) > 1 else ():
            made.refuse("expected another teacher_mode than 'average', which has a mean of logits", teacher.name)
        return made

    def _new_meter(self) -> Meter:
        teachers = self.criterion.teachers
        names = [teacher.name for teacher in self.teachers][: len(teachers)]
        shares = ["distrusted"] if any(one.trust_top_k is not None for one in teachers) else []
        shares += ["weights"] if self.criterion.teacher_weighting == "entropy" else []
        return Meter(names, [teacher.weight for teacher in teachers], shares)

    # One optimizer step: counting, losses, gradients.

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and its labels on all processes; also counts its chunks."""
        if self._step is None:  # time before training does not count
            self._watch.lap()
        batches = self._ahead.take(epoch_iterator, num_batches)
        if not batches:  # the end of a stream, which is no step
            return [], None
        if self._rollout is not None:
            with self._watch.section("generation"):
                batches = self._rollout.replace(batches)
        counts = torch.stack([self._counts(batch) for batch in batches]).sum(0)
        divisors = self._add_up(counts).clamp_min(1)
        # Numbers where they are known; the counts of several processes are on the device, in the type of the losses.
        items, *chunks = divisors.tolist() if divisors.device.type == "cpu" else divisors.float().unbind()
        self._step = _Step(items, chunks, len(batches))
        self._meter.steps += 1
        self.criterion.diagnostics = self._is_logged(self.state.global_step + 1)
        self.criterion.zero_grad()
        is_last = self.state.global_step + 1 >= self.state.max_steps
        # Servers are asked for the next step too, so that they work while the student does.
        asks_ahead = bool(self._served) and not is_last and self._rollout is None
        for batch in [*batches, *(self._ahead.peek(num_batches) if asks_ahead else ())]:
            self._ask(batch)
        if not isinstance(items, Tensor):
            items = torch.full((), items, dtype=torch.float32, device=self.args.device)
        return batches, items

    def _ask(self, batch: Mapping[str, Any]) -> None:
        """Begins to ask the teachers behind a server for a batch."""
        if not self._served:
            return
        host = _on_host(batch)
        for teacher, entry, alignment in zip(self.teachers, host["teachers"], self._alignments(host), strict=True):
            if teacher.served is not None:
                teacher.ask(entry, host, needed_rows(alignment, host["labels"]))

    def _no_counts(self) -> Tensor:
        return torch.zeros(1 + len(self.criterion.teachers), dtype=torch.float64, device="cpu")

    def _counts(self, batch: Mapping[str, Any]) -> Tensor:
        """float64 [1 + M]: labels, and for each teacher of the criterion chunks, of one batch."""
        host = _on_host(batch)
        alignments = self._alignments(host)[: len(self.criterion.teachers)]
        items, chunks = self.criterion.counts(host["labels"], alignments, host.get("ce_labels"))
        counts = torch.tensor([items, *chunks], dtype=torch.float64, device="cpu")
        if self.args.teacher_mode == "select" and len(chunks) > 1:
            # Which teacher a sample will have is not known, so all share one divisor, and their sums make one mean.
            counts[1:] = chunks_of_one(alignments, host["labels"], host.get("position_ids"))
        return counts

    def _alignments(self, host: Mapping[str, Any]) -> list[Alignment | None]:
        """Each teacher's; a shared tokenizer with another template is compared where it cuts text in the same way, and
        one that reads the student's ids for a loss of chunks token by token."""
        alignments = [entry.get("alignment") for entry in host["teachers"]]
        if len(alignments) != len(self.teachers):
            raise ValueError(f"teachers: expected {len(self.teachers)} in a batch, got {len(alignments)}")
        for m, (teacher, alignment) in enumerate(zip(self.teachers, alignments, strict=True)):
            if alignment is not None and teacher.reads_student_ids:
                alignments[m] = keep(alignment, alignment.host.exact)
            elif alignment is None and not teacher.reads_student_ids and teacher.may_read_student_ids:
                alignments[m] = position_alignment(host["labels"], host["input_ids"])
        return alignments

    def _add_up(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        total: Tensor = self.accelerator.reduce(to_device(values, self.args.device), reduction="sum")
        return total

    def _is_logged(self, step: int) -> bool:
        if self.args.logging_strategy == "steps":
            every = max(1, int(self.state.logging_steps))
            return bool(step % every == 0 or (self.args.logging_first_step and step == 1))
        steps_per_epoch = max(1, round(self.state.max_steps / max(1, self.state.num_train_epochs)))
        return bool(step % steps_per_epoch == 0)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Loss and gradients of a micro-batch."""
        with self._watch.section("step"):
            return super().training_step(*args, **kwargs)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """None, as in transformers 5, since the model casts by itself: in that of transformers 4, weights that are read
        without gradient first, for a check or by a teacher, would be kept cast, and get none."""
        return contextlib.nullcontext()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of a micro-batch in the step's loss, times the processes that gradients are averaged over.

        With ``return_outputs`` also what the student returned, whose ``logits`` may be `LinearLogits`; see
        `XTokenConfig.fused`.
        """
        host = _on_host(inputs)
        # The losses get the labels on the host, where they can pick what is supervised.
        inputs = {name: value for name, value in inputs.items() if name not in ("host", "labels", "ce_labels")}
        entries = inputs.pop("teachers")
        self._check_entries(host)
        if "position_ids" in inputs and self._faults.get("student", "not known") is not None:  # packed by somebody else
            ids = host["input_ids"]
            fault = self._faults["student"] = packing_fault(model, ids, ids.shape[1], "attention_mask" in host)
            if fault is not None:
                raise ValueError(f"student: {PACKED}, since {fault}")
        inputs["input_ids"] = self._limits.fit(inputs)
        self._fused.look(logit_bytes(host, self.model, [teacher.model for teacher in self.teachers]))
        with self._watch.section("teacher"):
            logits, alignments = self._teach(entries, inputs, host)
        # transformers 5 sets it in the model's configuration. A model of 4 that keeps a cache does not look for several
        # examples in a row, and RecurrentGemma has other gradients.
        keeps = getattr(text_config(self.model), "use_cache", False) and not getattr(self.args, "use_cache", False)
        cache: dict[str, Any] = {"use_cache": False} if keeps or "position_ids" in inputs else {}
        outputs = self._fused.outputs(self.model, model, **inputs, **cache)
        step = self._step if self.model.training else None
        # In evaluation the sums themselves are wanted; in a training loop without `get_batch_samples` means.
        alone = (None, None) if self.model.training else (1, [1] * len(logits))
        num_items, num_chunks = alone if step is None else (step.items, step.chunks)
        with self._watch.section("loss"):
            total, parts = self.criterion(
                outputs.logits, host["labels"], logits, alignments, num_items, num_chunks, **self._scale_of(step),
                ce_labels=host.get("ce_labels"),
            )  # fmt: skip
        self._finite.look(total, [outputs.logits, *logits], self.state.global_step + 1 if self.model.training else -1)
        mask = host.get("attention_mask")
        self._meter.add(parts, host["input_ids"].numel() if mask is None else int((mask != 0).sum()))
        if self.model.training and self.args.scaling == "dynamic":
            total = total + (parts["unscaled"] - total).detach()  # what is logged; the gradient is that of the total
        if step is not None:
            self._finish(step, parts)
            total = total * self.accelerator.num_processes
        if self.model.training:
            total = total + self._routers(outputs) / (1 if step is None else step.micro_batches)
        return (total, outputs) if return_outputs else total

    def _routers(self, outputs: Any) -> Tensor | float:
        """What the configuration of a mixture of experts adds to the loss so that its experts are used alike."""
        loss = getattr(outputs, "aux_loss", None)
        if not isinstance(loss, Tensor):
            return 0.0
        config: Any = self.model.config
        places = [self.model, config, config.get_text_config(), getattr(config, "ffn_config", None)]
        names = "router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight"
        found = [getattr(one, name) for one in places for name in names if getattr(one, name, None) is not None]
        if not found:
            raise ValueError(f"student: returns a loss of its routers, but its configuration has none of {names}")
        self._router_loss = self._router_loss + found[0] * loss.detach().to(self.args.device)
        weighted: Tensor = found[0] * loss.to(self.args.device)
        return weighted

    def _packs(self, longest: int) -> bool:
        """Whether all models keep the examples of a packed row apart; says so once if one does not.

        Without a tokenizer, and where the student is not whole before it is wrapped, that is found out, and refused, at
        the first packed row.
        """
        is_whole = not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        models: list[tuple[str, Vocabulary | None, Callable[..., str | None]]] = [
            ("student", self.vocabulary if is_whole else None, functools.partial(packing_fault, self.model)),
            *((one.name, one.vocabulary, one.packing_fault) for one in self.teachers),
        ]  # fmt: skip
        for name, vocabulary, look in models:
            if vocabulary is None or name in self._faults:
                continue
            ids = torch.from_numpy(np.flatnonzero(vocabulary.is_text))
            with self.compute_loss_context_manager():
                fault = self._faults[name] = look(ids, longest)
            if fault is not None:
                logger.warning("packed: examples do not share rows, since of %s %s", name, fault)
        return not any(self._faults.values())

    def _check_entries(self, host: Mapping[str, Any]) -> None:
        self._limits.check(host, "student")
        for teacher, entry in zip(self.teachers, host["teachers"], strict=True):
            teacher.check_entry(entry, host)
            ids, alignment = entry.get("input_ids"), entry.get("alignment")
            if teacher.name not in self._unchecked or ids is None or alignment is None or not alignment.num_chunks:
                continue
            self._unchecked.discard(teacher.name)
            if self.vocabulary is not None and teacher.vocabulary is not None:
                check_same_bytes(alignment, host["input_ids"], ids, self.vocabulary, teacher.vocabulary, teacher.name)

    def _teach(
        self, entries: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any], host: Mapping[str, Any]
    ) -> tuple[list[AnyLogits | None], list[Alignment | None]]:
        """Logits and alignments for the criterion's teachers; no logits of a teacher that has nothing to say."""
        self._ask(host)  # for what training has not asked before
        entries = [{**entry, "asked": kept.get("asked")} for entry, kept in zip(entries, host["teachers"], strict=True)]
        alignments = self._alignments(host)
        sizes = [None if teacher.vocabulary is None else len(teacher.vocabulary) for teacher in self.teachers]
        if self.args.teacher_mode == "average" and len(self.teachers) > 1:
            mixed = [one.logits(entry, inputs, self._fused) for one, entry in zip(self.teachers, entries, strict=True)]
            weights = [teacher.objective.weight for teacher in self.teachers]
            ids = [read_by(entry, host)["input_ids"] for entry in host["teachers"]]
            return [mean_logits(mixed, ids, weights, sizes[0])], alignments[:1]
        logits = [
            logits_where_needed(
                functools.partial(teacher.logits, fused=self._fused), entry, inputs, one, host["labels"]
            )
            for teacher, entry, one in zip(self.teachers, entries, alignments, strict=True)
        ]
        if self.args.teacher_mode == "select" and len(logits) > 1:
            read = host["labels"], host["input_ids"]
            known = [position_alignment(*read) if one is None else one for one in alignments]
            ids = [read_by(entry, inputs)["input_ids"] for entry in entries]
            return logits, [*select_best(known, logits, ids, sizes, host.get("position_ids"))]
        return logits, alignments

    def _scale_of(self, step: _Step | None) -> dict[str, Any]:
        """How the criterion gets the factor of KD; see `XTokenConfig`."""
        if not self.model.training:
            return {"scale": 1.0}
        if step is None:
            return {}
        if step.micro_batches > 1 and self.args.scaling == "dynamic":
            if self._last_scale.device.type == "cpu" and self._read_scale():
                return {"scale": float(self._last_scale)}
            if self._scale_is_known:
                return {"scale": self._last_scale.float()}
            return {"reduce": self._last_or_own}
        if self._rollout is not None:
            return {"reduce": functools.partial(self._last_or_own, prefers_own=True)}
        return {"reduce": self._add_up if self.accelerator.num_processes > 1 else None}

    def _last_or_own(self, ce_and_kd: Tensor, prefers_own: bool = False) -> Tensor:
        """Two numbers whose ratio is the factor of the last step, or else that of this micro-batch; `prefers_own`: of
        this micro-batch, or else of the last step that had both CE and KD, as this one lacks CE."""
        last = torch.stack([self._last_scale, torch.ones_like(self._last_scale)]).to(ce_and_kd)
        own = self._add_up(ce_and_kd)
        # Else no process had a chunk, or none had labels of CE, as of completions, and CE / |KD| says nothing.
        self._has_both = (own != 0).all()
        takes_last = (last[0] != 0) & (own[0] == 0) if prefers_own else last[0] != 0
        return torch.where(takes_last, last, own)

    def _finish(self, step: _Step, parts: Mapping[str, Tensor]) -> None:
        """Records the factor for the following micro-batches, and for those without labels of CE."""
        accumulates = self.args.gradient_accumulation_steps > 1  # also the last step of an epoch, perhaps of one
        if self.args.scaling != "dynamic" or not (accumulates or self._rollout is not None):
            return
        last = self._last_scale
        step.done += 1
        step.ce_and_kd = step.ce_and_kd + torch.stack([parts["ce"].to(last), parts["kd"].to(last)])
        self._last_scale = torch.where((last == 0) & self._has_both, parts["scale"].to(last), last)
        if step.done == step.micro_batches:
            ce, kd = self._add_up(step.ce_and_kd.float()).to(last)
            known = (kd != 0) & (ce != 0)
            self._last_scale = torch.where(known, ratio(ce, kd, self.args.max_scale), self._last_scale)

    def _read_scale(self) -> bool:
        """Whether there is a factor of the last step; waits for the device. All processes must make the call."""
        self._scale_is_known = bool(self._last_scale != 0)
        return self._scale_is_known

    # Metrics.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what has been measured since the last log."""
        self._finite.check()
        if "loss" in logs and self._meter.steps:
            measured = self._meter.summary(self._add_up)
            self._say_taught_nothing(measured)
            self._read_scale()
            elapsed, seconds = self._watch.lap()
            elapsed = max(elapsed, 1e-9)
            teacher, loss = seconds["teacher"], seconds["loss"]
            measured["kd_scale"] = float(self._meter.scale)
            if isinstance(self._router_loss, Tensor):
                calls = self._meter.calls * self.accelerator.num_processes
                measured["router_loss"] = float(self._add_up(self._router_loss[None])) / calls
                self._router_loss = 0.0
            self._tell_bound(measured.pop("bounded"), self._meter.steps)
            measured["tokens_per_second"] = measured.pop("tokens") / elapsed
            measured["time_teacher"] = teacher / elapsed
            measured["time_student"] = (seconds["step"] - teacher - loss) / elapsed
            measured["time_loss"] = loss / elapsed
            if self._rollout is not None:
                measured.update(self._rollout.summary(self._add_up))
                measured["time_generation"] = seconds["generation"] / elapsed
            logs.update({name: round(value, 6) for name, value in measured.items()})
            self._meter = self._new_meter()
        super().log(logs, *args, **kwargs)

    def plot(self, figure: str = "losses") -> Any:
        """Draws the run so far: its "losses", "projection" or "speed". Returns matplotlib's axes, one a panel.

        Raises ValueError for another name or if nothing is known of it yet, ImportError without matplotlib.
        """
        return draw_curves(self.state.log_history, figure)

    def _tell_bound(self, share: float, steps: int) -> None:
        """Says once that most steps had the largest factor: that `share` of the steps since the last log."""
        self._bounded_steps, self._steps = self._bounded_steps + share * steps, self._steps + steps
        if self._bounded_steps >= max(TOLD_AFTER, self._steps / 2):
            self._warn_once(
                "bound", "in %.0f of %d steps CE / |KD| was larger than max_scale=%g, so that the loss was CE + %g KD",
                self._bounded_steps, self._steps, self.args.max_scale, self.args.max_scale,
            )  # fmt: skip

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Adds a held-out batch to the sums; returns logits and labels if they are wanted."""
        inputs = self._without_repeated(self._prepare_inputs(inputs))
        counts = self._counts(inputs)
        self._held_out += counts
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        loss = loss.detach() / max(float(counts[0]), 1.0)
        if prediction_loss_only:
            return loss, None, None
        return loss, materialised(outputs.logits).detach(), inputs["labels"]

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, of batches that stay on the host too; a stream has `Rounds`."""
        given = self.train_dataset
        if given is not None and not hasattr(given, "__len__"):
            self.train_dataset = Rounds(given)
        try:
            return self._collated(super().get_train_dataloader, *args, is_training=True, **kwargs)
        finally:
            self.train_dataset = given

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Likewise, of batches with a row for each sample."""
        return self._collated(super().get_eval_dataloader, self._encoded(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Likewise."""
        return self._collated(super().get_test_dataloader, self._encoded(test_dataset, "test_dataset"))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        sampler = super()._get_train_sampler(self._by_length(data))
        return _Ordered(sampler, self) if isinstance(sampler, LengthGroupedSampler) else sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return super()._get_eval_sampler(self._by_length(eval_dataset))

    def _by_length(self, data: Any) -> Any:
        """What the Trainer's samplers take for a data set, where they ask for the lengths of its inputs."""
        if not _groups_by_length(self.args) or not hasattr(data, "__len__"):
            return data
        name = getattr(self.processing_class, "model_input_names", ["input_ids"])[0]
        return [{name: range(length)} for length in lengths(data)]

    def _collated(self, make: Callable[..., Any], *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """A dataloader of batches that stay on the host; to evaluate on, several processes have them not packed, so
        that repeated samples can go."""
        given = collator = self.data_collator
        rollout = self._rollout if is_training else None
        if isinstance(given, XTokenCollator) and given.packed:
            is_split = not is_training and self.accelerator.num_processes > 1
            if is_split or not self._packs(given.max_length or 0):
                collator = copy.copy(given)
                collator.packed = False
        self.data_collator = functools.partial(keep_host, collator, keeps_examples=rollout is not None)
        if rollout is not None:
            rollout.collate = self.data_collator
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drops and is_training  # what is held out counts as a whole
        try:
            return make(*args, **kwargs)
        finally:
            self.data_collator, self.args.dataloader_drop_last = given, drops

    def _without_repeated(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch without labels and chunks of the samples that only pad the last round of the processes."""
        state = self.accelerator.gradient_state
        is_filled = self.args.accelerator_config.even_batches and self.accelerator.num_processes > 1
        if not is_filled or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        host = _on_host(inputs)
        labels = {name: host[name].clone() for name in ("labels", "ce_labels") if name in host}
        count = max(0, state.remainder - len(host["labels"]) * self.accelerator.process_index)
        for one in labels.values():
            one[count:] = IGNORED
        entries = [dict(entry) for entry in host["teachers"]]
        for entry in entries:
            if entry.get("alignment") is not None:
                entry["alignment"] = keep(entry["alignment"], entry["alignment"].host.sample_index < count)
        left = OnHost({**host, **labels, "teachers": entries})
        moved = {name: one.to(inputs["labels"].device) for name, one in labels.items()}
        return {**inputs, **moved, "host": left}

    def _say_taught_nothing(self, measured: Mapping[str, float]) -> None:
        """Says once if many chunks have no term for their start, or a teacher that tells nothing there."""
        for name in (names := self._meter.names):
            for key, message in _TAUGHT_NOTHING.items():
                share = measured.get(f"{key}/{name}" if len(names) > 1 else key, math.nan)
                if share > MOST_LEFT:
                    self._warn_once(key, message, name, 100 * share)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the held-out CE, KD and diagnoses."""
        self._finite.check()
        training = self._meter, self._watch, self.criterion.diagnostics
        self._meter, self._watch, self.criterion.diagnostics = self._new_meter(), Stopwatch(self.args.device), True
        self._held_out = self._no_counts()
        try:
            output = super().evaluation_loop(*args, **kwargs)
            self._finite.check()
            measured = self._meter.summary(self._add_up, self._add_up(self._held_out).clamp_min(1))
        finally:
            training[1].skip(self._watch)
            self._meter, self._watch, self.criterion.diagnostics = training
        prefix = kwargs.get("metric_key_prefix", "eval")
        measured["loss"] = self.args.ce_weight * measured["ce"] + self.args.kd_weight * measured["kd"]
        del measured["tokens"], measured["bounded"]
        output.metrics.update({f"{prefix}_{name}": value for name, value in measured.items()})
        return output

    # Checkpoints.

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, from the newest complete checkpoint for True; a run that is at its end makes no further step.

        Raises ValueError if a checkpoint is not complete, or lacks optimizer or scheduler (see
        `XTokenConfig.resume_weights_only`), or if there is none, or if the data are not enough for a step; RuntimeError
        if a loss is wrong on this device (see `XTokenConfig.self_test`).
        """
        if self.args.self_test == "on" or (self.args.self_test == "auto" and self.args.device.type == "cuda"):
            self._check_losses()
        path = resume_from_checkpoint or None
        if path is True and (path := checkpoints.newest(str(self.args.output_dir))) is None:
            raise ValueError(
                f"resume_from_checkpoint: expected a complete checkpoint in {self.args.output_dir}, got none"
            )
        if path is not None:
            state = checkpoints.check(Path(path), self.args.resume_weights_only)
            adapters.check_checkpoint(Path(path), self.model)
            if checkpoints.is_finished(state, self.args.max_steps, self.args.num_train_epochs):
                return self._finished(Path(path))
        begin, self._ahead = 0 if path is None else int(state["global_step"]), Ahead()
        output = super().train(path and str(path), *args, **kwargs)
        if self.state.global_step == begin < self.state.max_steps:
            raise ValueError(self._why_no_step())
        for served in self._served:
            served.tell_faults()
        return output

    def _why_no_step(self) -> str:
        size, devices = self._train_batch_size, self.accelerator.num_processes
        if not self.args.dataloader_drop_last or not hasattr(self.train_dataset, "__len__"):
            count = self.args.gradient_accumulation_steps
            return f"train_dataset: expected examples for at least one step of {count} micro-batches, got fewer"
        return (
            "dataloader_drop_last: expected examples for at least one full batch, since one that is not full is left "
            f"out, got {len(self.train_dataset)} for {size} a batch on {devices} device{'s' * (devices > 1)}"
        )

    def _finished(self, path: Path) -> TrainOutput:
        """The result of a run from its last checkpoint, as the Trainer leaves it at the end."""
        state = TrainerState.load_from_json(str(path / checkpoints.STATE))
        logger.warning("%s is the end of the run, step %d: nothing is trained", path, state.global_step)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(f"resume_from_checkpoint: {path} is the end of the run; there is nothing left to train")
        if isinstance(self.processing_class, PreTrainedTokenizerBase):  # the model's ends of a text are the tokenizer's
            if hasattr(self, "_align_special_tokens"):  # of transformers 4
                self._align_special_tokens()
            else:
                trainer_of_transformers.align_special_tokens(self.model, self.processing_class)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(path))
            self._load_distillation(path)
        return TrainOutput(state.global_step, 0.0, {})

    def _check_losses(self) -> None:
        """Compares the losses of this run with float64; raises RuntimeError with what is wrong, if something is."""
        try:
            report = check_lessons(self._lessons(), self.args.device, self.args.loss_backend)
        except torch.OutOfMemoryError:
            logger.warning("self_test: left out, since %s has too little memory left for it", self.args.device)
            return
        finally:
            if self.args.device.type == "cuda":
                torch.cuda.empty_cache()
        if report.wrong:
            raise RuntimeError(
                f"self_test: expected losses that agree with float64, got\n{report.summary()}\nxtoken check tells "
                "more; loss_backend='reference' does without the kernels"
            )
        if report.findings:
            logger.info("self_test: %s", report.summary())

    def _lessons(self) -> list[Lesson]:
        """What losses get in this run: logits in the type of a model's weights; with mixed precision in float32, as
        accelerate hands them out, and in what fused losses make themselves."""
        found = []
        mixed = [torch.bfloat16] * self.args.bf16 + [torch.float16] * self.args.fp16
        types = [torch.float32, *mixed] if mixed else [self.model.dtype]
        for objective, teacher in zip(self.criterion.teachers, self.teachers, strict=False):
            mine, theirs = (head_rows(one) for one in (self.model, teacher.model))
            own = self.criterion.vocab_size or mine
            if own is None:  # nobody knows how wide its logits will be
                continue
            widths = max(own, mine or 0), theirs or (objective.shape or (own, own))[1]
            of_teacher = getattr(teacher.model, "dtype", torch.float32)
            found += [Lesson(objective, widths, (dtype, of_teacher)) for dtype in types]
        return found

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.is_dir() and checkpoints.fault(folder) is not None:
            shutil.rmtree(folder)  # what a killed run has left of the same checkpoint
        self.accelerator.wait_for_everyone()
        with checkpoints.saving(folder):
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            adapters.save_generation(self.model, Path(output_dir or self.args.output_dir))

    def save_state(self) -> None:
        """The Trainer's."""
        with checkpoints.saving(str(self.args.output_dir)):
            super().save_state()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Also writes the trained weights of W, as projections and to resume from. OSError if it cannot."""
        self._finite.check()
        if _internal_call:  # as a run that goes on from here will know it
            self._read_scale()
        folder = Path(output_dir or self.args.output_dir)
        with checkpoints.saving(folder):
            super().save_model(output_dir, _internal_call)
            self._save_distillation(folder, _internal_call)

    def _save_distillation(self, folder: Path, is_checkpoint: bool) -> None:
        state = dict(self.criterion.state_dict())
        for own in self._of_student if is_checkpoint and self.args.should_save else ():
            own.save(folder)
        if self._projection_steps is not None:
            state.update({_MOMENTS + name: value for name, value in self._projection_steps.state_dict().items()})
        scale = float(self._last_scale)
        metadata = {"scale": repr(scale)} if scale else {}
        if not self.args.should_save or not (state or metadata):
            return
        folder.mkdir(parents=True, exist_ok=True)
        _STATE.save(folder / STATE_FILE, state, **metadata)
        for teacher, objective in zip(self.teachers, self.criterion.teachers, strict=False):
            if isinstance(objective.projection, LearnableProjection):
                objective.projection.projection().save(folder / f"projection-{teacher.name}.safetensors")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_distillation(Path(checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_distillation(Path(str(self.state.best_model_checkpoint)))

    def _load_distillation(self, folder: Path) -> None:
        for own in self._of_student:
            own.load(folder, self.model, self.args.resume_weights_only)
        path = folder / STATE_FILE
        if not path.exists():
            return
        state, metadata = _STATE.load(path, lambda *found: found)
        self._last_scale.fill_(min(float(metadata.get("scale", 0.0)), self.args.max_scale))
        self._scale_is_known = "scale" in metadata
        moments = {name.removeprefix(_MOMENTS): state.pop(name) for name in list(state) if name.startswith(_MOMENTS)}
        self.criterion.load_state_dict(state)
        if self._projection_steps is not None:
            self._projection_steps.load_state_dict(moments)


def _how(objective: Teacher) -> dict[str, Any]:
    """What a teacher says beside its weight."""
    rest = {"trust_top_k": objective.trust_top_k, "projection": type(objective.projection).__name__}
    return {"loss": objective.loss, **rest, **registered()[objective.loss].options(), **objective.options}


def _groups_by_length(args: XTokenConfig) -> bool:
    strategy = getattr(args, "train_sampling_strategy", None)
    return getattr(args, "group_by_length", False) or strategy in ("group_by_length", "batch_rebalance")


def _on_host(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch before it was moved to the device, where `keep_host` has kept it."""
    kept = batch.get("host")
    return kept.batch if isinstance(kept, OnHost) else batch
