"""The student as its own teacher: as it was at the start, or a moving average of its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from xtoken.losses import Teacher
from xtoken.losses.logits import AnyLogits

from .fused import Fused
from .limits import Limits
from .packing import in_evaluation
from .teachers import TeacherModel


class StudentTeacher(TeacherModel):
    """See `TeacherModel.of_student`."""

    def __init__(self, objective: Teacher, average: float | None, name: str, system: str | None) -> None:
        super().__init__(objective, name=name, system=system)
        if average is not None and not 0.0 <= average < 1.0:
            raise ValueError(f"average: expected a number in [0, 1), or None for the first weights, got {average!r}")
        self.average = average
        self._weights: dict[str, Tensor] = {}
        """What is averaged; of weights in 16 bits, which small steps would not move, the average in 32."""

    def follow(self, student: Any) -> None:
        """Makes it of a student, as that is now; with adapters that are not averaged it is the student without them."""
        is_adapted = hasattr(student, "disable_adapter") and self.average is None
        self.model = student if is_adapted else copy.deepcopy(student)
        self.limits = Limits.of(self.model, self.vocabulary, self.name)
        if is_adapted:
            return
        trained = {key for key, weight in student.named_parameters() if weight.requires_grad}
        self._freeze()
        if self.average is not None:
            own = {key: weight for key, weight in self.model.named_parameters() if key in trained}
            self._weights = {key: one.float() if one.element_size() < 4 else one for key, one in own.items()}

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        if not hasattr(self.model, "disable_adapter") or self.average is not None:
            yield
            return
        with in_evaluation(self.model), self.model.disable_adapter():
            yield

    def packing_fault(self, ids: Tensor, longest: int = 0, masked: bool = False) -> str | None:
        with self._teaching():
            return super().packing_fault(ids, longest, masked)

    def logits(self, entry: Mapping[str, Any], inputs: Mapping[str, Any], fused: Fused | None = None) -> AnyLogits:
        with self._teaching():
            return super().logits(entry, inputs, fused)

    @torch.no_grad()
    def step(self, student: nn.Module) -> None:
        """Moves the average: ``average * itself + (1 - average) * student``; buffers are the student's."""
        if self.average is None:
            return
        theirs, buffers = dict(student.named_parameters()), dict(self.model.named_buffers())
        for key, own in self._weights.items():
            own.lerp_(theirs[key].detach().to(own), 1.0 - self.average)
        self._write()
        for key, value in student.named_buffers():
            buffers[key].copy_(value)

    def _write(self) -> None:
        """Rounds the average to the model's type."""
        for key, weight in self.model.named_parameters():
            if key in self._weights and self._weights[key] is not weight:
                weight.copy_(self._weights[key])

    def _file(self, folder: Path) -> Path:
        return folder / f"teacher-{self.name}.safetensors"

    def save(self, folder: Path) -> None:
        """Writes the average into a checkpoint."""
        if self.average is not None:
            weights = {key: one.detach().cpu().contiguous() for key, one in self._weights.items()}
            save_file(weights, self._file(folder))

    @torch.no_grad()
    def load(self, folder: Path, student: Any, may_begin: bool) -> None:
        """Reads it from a checkpoint; if `may_begin` and there is none, it begins with the student.

        Raises ValueError if it must go on and the checkpoint has none, or that of another model.
        """
        path = self._file(folder)
        if self.average is None:
            return
        if not path.exists() and may_begin:
            self.follow(student)
            return
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint: {folder} has no {path.name}, the moving average that {self.name} goes on "
                "from; resume_weights_only=True begins it with the student of the checkpoint"
            )
        kept = load_file(path)
        if {key: one.shape for key, one in kept.items()} != {key: one.shape for key, one in self._weights.items()}:
            raise ValueError(f"resume_from_checkpoint: {path} has the weights of another model")
        for key, value in kept.items():
            self._weights[key].copy_(value)
        self._write()


class Averages(TrainerCallback):
    """Moves the averages after each step of the optimizer."""

    def __init__(self, trainer: Any, teachers: list[StudentTeacher]) -> None:
        self.trainer, self.teachers = trainer, teachers

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Unless the step was left out (an overflow of fp16)."""
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            for teacher in self.teachers:
                teacher.step(self.trainer.model)
