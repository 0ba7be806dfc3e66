"""XTokenTrainer: transformers' Trainer with teachers of other tokenizers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from xtoken.alignment import Alignment
from xtoken.losses import Teacher, XTokenLoss
from xtoken.losses.backends import IGNORED
from xtoken.losses.logits import AnyLogits
from xtoken.projection import LearnableProjection
from xtoken.storage import TensorFile
from xtoken.vocabulary import Vocabulary

from .collator import XTokenCollator
from .config import XTokenConfig
from .ensemble import first_samples, mean_logits, only_exact, position_alignment, select_best
from .meter import Meter, Stopwatch
from .projections import ProjectionSteps
from .teachers import TeacherModel, check_head, check_same_bytes, same_tokens

STATE_FILE = "distillation.safetensors"
"""In a checkpoint: trained weights of W with Adam's moments, and the last step's factor of the distillation."""

_STATE = TensorFile("the distillation of a checkpoint")

MOMENTS = "moments."
"""In `STATE_FILE`: before the names of moments."""


@dataclass
class _Step:
    """An optimizer step: what its sums are divided by, on all micro-batches and processes, and what has been done."""

    items: float
    chunks: list[float]
    micro_batches: int
    done: int = 0
    ce: float = 0.0
    kd: float = 0.0


class XTokenTrainer(Trainer):
    """`transformers.Trainer` that distils from one or several teachers, next to cross-entropy.

    The rest is the Trainer's: data parallelism, FSDP, DeepSpeed, gradient accumulation, mixed precision, logging,
    checkpoints, resuming. The sums of CE and of each teacher's KD are divided by the labels and chunks of the whole
    step, all micro-batches and processes together, so that it does not matter how a batch is cut. (P-KL with ``top_k``
    chooses its columns by the rows of a micro-batch; ``top_k=None`` takes them all.)

    Parameters
    ----------
    model : PreTrainedModel
        The student.
    args : XTokenConfig
    teachers : sequence of TeacherModel
        Run in inference mode, never trained.
    data_collator
        Makes batches with ``input_ids``, ``attention_mask``, ``labels`` (-100 where ignored) and ``teachers``: a list
        with a dict for each teacher, of ``input_ids``, ``attention_mask`` and ``alignment``; or ``alignment`` None
        for a teacher that reads the student's ids. `XTokenCollator` does.
    processing_class
        The student's tokenizer; without it vocabularies are not checked.
    **kwargs
        As for `transformers.Trainer`.

    Raises
    ------
    TypeError
        If the arguments are no XTokenConfig.
    ValueError
        If an output layer is narrower than its tokenizer, or a teacher does not go with the student's tokenizer or
        with the other teachers. In training: if a batch would feed a teacher ids of another tokenizer, or logits are
        not finite; the message names the model and the step.

    Notes
    -----
    Logged with the loss: the results of `Meter.summary`, ``kd_scale`` (the factor of KD), ``tokens_per_second`` of
    the student, and ``time_teacher``, ``time_student`` (forward and backward) and ``time_loss`` as shares of the
    time since the last log; agreement and masses are of the logged step only. `evaluate` reports ``eval_ce`` and
    ``eval_kd`` over all held-out labels and chunks, and as ``eval_loss`` their weighted sum, without the factor. The
    samples that several processes repeat to fill their last batch do not count; for that a held-out batch has a row for
    each sample (packing is turned off).

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
        teachers: Sequence[TeacherModel] = (),
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, XTokenConfig):
            raise TypeError(f"args: expected an XTokenConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"args: expected one device a process, got {args.n_gpu} for DataParallel; launch with torchrun or "
                "accelerate launch"
            )
        self.teachers = list(teachers)
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers: expected a name of its own for each, got {names}")
        self.vocabulary = None if processing_class is None else Vocabulary.from_tokenizer(processing_class)
        if self.vocabulary is not None:
            check_head(model, self.vocabulary, "student")
            for teacher in self.teachers:
                teacher.check_student(self.vocabulary)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # The loss is a share of the whole step's, not a mean to be divided by the micro-batches; two ways to say so.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        for teacher in self.teachers:
            teacher.place(args.device)
        self.criterion = XTokenLoss(
            self._objectives(),
            args.scaling,
            args.ce_weight,
            args.kd_weight,
            vocab_size=None if self.vocabulary is None else len(self.vocabulary),
            backend=args.loss_backend,
        )
        if list(self.criterion.parameters()) and self._scales_gradients():
            raise ValueError(
                "teachers: expected projections without trainable weights for DeepSpeed in fp16, which has a factor of "
                "its own for gradients, got one with; use bf16"
            )
        self._projection_steps = ProjectionSteps(self) if list(self.criterion.parameters()) else None
        if self._projection_steps is not None:
            self.add_callback(self._projection_steps)
        self._step: _Step | None = None
        self._last_scale: float | None = None
        self._ids_checked = False
        self._meter = self._new_meter()
        self._held_out = self._no_counts()
        self._watch = Stopwatch(args.device)

    def _scales_gradients(self) -> bool:
        """Whether DeepSpeed does, as it does for fp16."""
        if not self.is_deepspeed_enabled:
            return False
        return bool(self.accelerator.state.deepspeed_plugin.deepspeed_config.get("fp16", {}).get("enabled", False))

    def _objectives(self) -> list[Teacher]:
        """The criterion's teachers, W on the student's device."""
        objectives = [teacher.objective for teacher in self.teachers]
        if self.args.teacher_mode == "average" and objectives:
            first = self.teachers[0].vocabulary
            for teacher in self.teachers[1:]:
                if first and teacher.vocabulary and not same_tokens(first, teacher.vocabulary):
                    raise ValueError(
                        f"teacher_mode: expected teachers with one tokenizer for 'average', but {teacher.name} has "
                        f"another than {self.teachers[0].name}"
                    )
            objectives = [replace(objectives[0], weight=1.0)]
        device = self.args.device
        return [one if one.projection is None else replace(one, projection=one.projection.to(device))
                for one in objectives]  # fmt: skip

    def _new_meter(self) -> Meter:
        names = [teacher.name for teacher in self.teachers][: len(self.criterion.teachers)]
        return Meter(names, [teacher.weight for teacher in self.criterion.teachers])

    # One optimizer step: counting, losses, gradients.

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and its labels on all processes; also counts its chunks."""
        if self._step is None:  # what came before training is not its time
            self._watch.lap()
        batches: list[Any] = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        counts = torch.stack([self._counts(batch) for batch in batches]).sum(0) if batches else self._no_counts()
        items, *chunks = self._divisors(counts)
        self._step = _Step(items, chunks, len(batches))
        self._meter.steps += 1
        self.criterion.diagnostics = self._is_logged(self.state.global_step + 1)
        self.criterion.zero_grad()
        return batches, torch.tensor(items, device=self.args.device)

    def _no_counts(self) -> Tensor:
        return torch.zeros(1 + len(self.criterion.teachers), dtype=torch.float64)

    def _counts(self, batch: Mapping[str, Any]) -> Tensor:
        """float64 [1 + M]: labels, and for each teacher of the criterion chunks, of one batch."""
        alignments = self._alignments(batch["teachers"])[: len(self.criterion.teachers)]
        items, chunks = self.criterion.counts(batch["labels"], alignments)
        return torch.tensor([items, *chunks], dtype=torch.float64)

    def _alignments(self, entries: Sequence[Mapping[str, Any]]) -> list[Alignment | None]:
        """Each teacher's; a shared tokenizer with another template is compared where it cuts text in the same way."""
        if len(entries) != len(self.teachers):
            raise ValueError(f"teachers: expected {len(self.teachers)} in a batch, got {len(entries)}")
        alignments = [entry.get("alignment") for entry in entries]
        return [
            only_exact(alignment) if teacher.objective.loss == "kd" and alignment is not None else alignment
            for teacher, alignment in zip(self.teachers, alignments, strict=True)
        ]

    def _divisors(self, counts: Tensor) -> list[float]:
        """What to divide the sums of CE and of each teacher's KD by: the counts of all processes, at least 1."""
        items, *chunks = self._add_up(counts).clamp_min(1).tolist()
        if self.args.teacher_mode == "select" and chunks:
            # Which teacher a sample will have is not known, so all share one divisor, and their sums make one mean.
            chunks = [sum(chunks) / len(chunks)] * len(chunks)
        return [items, *chunks]

    def _add_up(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        total: Tensor = self.accelerator.reduce(values.to(self.args.device), reduction="sum")
        return total

    def _is_logged(self, step: int) -> bool:
        if self.args.logging_strategy == "steps":
            every = max(1, int(self.state.logging_steps))
            return bool(step % every == 0 or (self.args.logging_first_step and step == 1))
        steps_per_epoch = max(1, round(self.state.max_steps / max(1, self.state.num_train_epochs)))
        return bool(step % steps_per_epoch == 0)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Loss and gradients of a micro-batch."""
        with self._watch.section("step"):
            loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of a micro-batch in the step's loss, times the processes that gradients are averaged over."""
        inputs = dict(inputs)
        labels, entries = inputs.pop("labels"), inputs.pop("teachers")
        self._check_entries(entries, inputs)
        with self._watch.section("teacher"):
            logits, alignments = self._teach(entries, inputs, labels)
        # A model that keeps a cache does not look for several examples in a row (transformers 4).
        outputs = model(**inputs, **({"use_cache": False} if "position_ids" in inputs else {}))
        step = self._step if self.model.training else None
        # In evaluation the sums themselves are wanted; in a training loop without `get_batch_samples` means.
        alone = (None, None) if self.model.training else (1, [1] * len(logits))
        num_items, num_chunks = alone if step is None else (step.items, step.chunks)
        with self._watch.section("loss"):
            total, parts = self.criterion(
                outputs.logits,
                labels,
                logits,
                alignments,
                num_items=num_items,
                num_chunks=num_chunks,
                **self._scale_of(step),
            )
        if not bool(total.isfinite()):
            raise ValueError(self._not_finite(total, outputs.logits, logits))
        mask = inputs.get("attention_mask")
        self._meter.add(parts, inputs["input_ids"].numel() if mask is None else int((mask != 0).sum()))
        if step is not None:
            self._finish(step, parts)
            total = total * self.accelerator.num_processes
        return (total, outputs) if return_outputs else total

    def _check_entries(self, entries: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any]) -> None:
        for teacher, entry in zip(self.teachers, entries, strict=True):
            teacher.check_entry(entry, inputs)
            ids, alignment = entry.get("input_ids"), entry.get("alignment")
            if self._ids_checked or ids is None or alignment is None:
                continue
            if self.vocabulary is not None and teacher.vocabulary is not None:
                check_same_bytes(alignment, inputs["input_ids"], ids, self.vocabulary, teacher.vocabulary, teacher.name)
        self._ids_checked = True

    def _teach(
        self, entries: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any], labels: Tensor
    ) -> tuple[list[AnyLogits], list[Alignment | None]]:
        """Logits and alignments for the criterion's teachers."""
        logits = [teacher.logits(entry, inputs) for teacher, entry in zip(self.teachers, entries, strict=True)]
        alignments = self._alignments(entries)
        ids = [inputs["input_ids"] if entry.get("input_ids") is None else entry["input_ids"] for entry in entries]
        if self.args.teacher_mode == "average" and len(logits) > 1:
            weights = [teacher.objective.weight for teacher in self.teachers]
            vocabulary = self.teachers[0].vocabulary
            mean = mean_logits(logits, ids, weights, None if vocabulary is None else len(vocabulary))
            return [mean], alignments[:1]
        if self.args.teacher_mode == "select" and len(logits) > 1:
            known = [position_alignment(labels) if one is None else one for one in alignments]
            sizes = [None if one.vocabulary is None else len(one.vocabulary) for one in self.teachers]
            return logits, list(select_best(known, logits, ids, sizes))
        return logits, alignments

    def _scale_of(self, step: _Step | None) -> dict[str, Any]:
        """How the criterion comes by the factor of KD; see `XTokenConfig`."""
        if not self.model.training:
            return {"scale": 1.0}
        if step is None:
            return {}
        if step.micro_batches > 1 and self._last_scale is not None and self.args.scaling == "dynamic":
            return {"scale": self._last_scale}
        return {"reduce": self._add_up if self.accelerator.num_processes > 1 else None}

    def _finish(self, step: _Step, parts: Mapping[str, Tensor]) -> None:
        """Takes note of the factor for the micro-batches that follow."""
        if step.micro_batches == 1 or self.args.scaling != "dynamic":
            return
        step.done += 1
        step.ce += float(parts["ce"])
        step.kd += float(parts["kd"])
        if self._last_scale is None and float(parts["scale"]) != 0:
            self._last_scale = float(parts["scale"])
        if step.done == step.micro_batches:
            ce, kd = self._add_up(torch.tensor([step.ce, step.kd])).tolist()
            if kd != 0:
                self._last_scale = ce / abs(kd)

    def _not_finite(self, total: Tensor, student: Tensor, teachers: Sequence[Any]) -> str:
        where = f"step {self.state.global_step + 1}" if self.model.training else "evaluation"
        names = ["student", *(teacher.name for teacher in self.teachers)]
        for name, logits in zip(names, [student, *teachers], strict=False):
            bad = logits.isnan().any(-1) if isinstance(logits, Tensor) else torch.zeros(1)
            if bool(bad.any()):
                sample, position = bad.nonzero()[0].tolist()
                return f"{name}: logits are not a number at {where}, first in sample {sample} at position {position}"
        return f"loss: expected a finite number, got {float(total.detach())} at {where}, from logits that are"

    # Metrics.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what has been measured since the last log."""
        if "loss" in logs and self._meter.steps:
            measured = self._meter.summary(self._add_up)
            elapsed, seconds = self._watch.lap()
            elapsed = max(elapsed, 1e-9)
            teacher, loss = seconds.get("teacher", 0.0), seconds.get("loss", 0.0)
            measured["kd_scale"] = self._meter.scale
            measured["tokens_per_second"] = measured.pop("tokens") / elapsed
            measured["time_teacher"] = teacher / elapsed
            measured["time_student"] = (seconds.get("step", 0.0) - teacher - loss) / elapsed
            measured["time_loss"] = loss / elapsed
            logs.update({name: round(value, 6) for name, value in measured.items()})
            self._meter = self._new_meter()
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Takes note of a held-out batch's sums; logits and labels if they are wanted."""
        inputs = self._without_repeated(self._prepare_inputs(inputs))
        counts = self._counts(inputs)
        self._held_out += counts
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        loss = loss.detach() / counts[0].clamp_min(1).to(loss)
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs.logits.detach(), inputs["labels"]

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, of batches with a row for each sample."""
        with self._a_row_each():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Likewise."""
        with self._a_row_each():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _a_row_each(self) -> Iterator[None]:
        """Turns packing off, since repeated samples could not be told from the others of their row."""
        collator = self.data_collator
        if self.accelerator.num_processes > 1 and isinstance(collator, XTokenCollator) and collator.packed:
            self.data_collator = copy.copy(collator)
            self.data_collator.packed = False
        try:
            yield
        finally:
            self.data_collator = collator

    def _without_repeated(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch, in which samples that only fill the last round of the processes have no label and no chunk."""
        state = self.accelerator.gradient_state
        is_filled = self.args.accelerator_config.even_batches and self.accelerator.num_processes > 1
        if not is_filled or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        labels = inputs["labels"].clone()
        count = max(0, state.remainder - len(labels) * self.accelerator.process_index)
        labels[count:] = IGNORED
        entries = [
            {**entry, "alignment": None if entry.get("alignment") is None else first_samples(entry["alignment"], count)}
            for entry in inputs["teachers"]
        ]
        return {**inputs, "labels": labels, "teachers": entries}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the held-out CE, KD and diagnoses."""
        training, diagnostics = self._meter, self.criterion.diagnostics
        watch, self._watch = self._watch, Stopwatch(self.args.device)
        self._meter, self.criterion.diagnostics = self._new_meter(), True
        self._held_out = self._no_counts()
        try:
            output = super().evaluation_loop(*args, **kwargs)
            measured = self._meter.summary(self._add_up, self._divisors(self._held_out))
        finally:
            self._meter, self.criterion.diagnostics = training, diagnostics
            watch.skip(self._watch)
            self._watch = watch
        prefix = kwargs.get("metric_key_prefix", "eval")
        measured["loss"] = self.args.ce_weight * measured["ce"] + self.args.kd_weight * measured["kd"]
        del measured["tokens"]
        output.metrics.update({f"{prefix}_{name}": value for name, value in measured.items()})
        return output

    # Checkpoints.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Also writes the trained weights of W, as projections and to resume from."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._save_distillation(Path(output_dir or self.args.output_dir))

    def _save_distillation(self, folder: Path) -> None:
        state = dict(self.criterion.state_dict())
        if self._projection_steps is not None:
            state.update({MOMENTS + name: value for name, value in self._projection_steps.state_dict().items()})
        metadata = {} if self._last_scale is None else {"scale": repr(self._last_scale)}
        if not state and not metadata:
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
        path = folder / STATE_FILE
        if not path.exists():
            return
        state, metadata = _STATE.load(path, lambda *found: found)
        self._last_scale = float(metadata["scale"]) if "scale" in metadata else None
        moments = {name.removeprefix(MOMENTS): state.pop(name) for name in list(state) if name.startswith(MOMENTS)}
        self.criterion.load_state_dict(state)
        if self._projection_steps is not None:
            self._projection_steps.load_state_dict(moments)
