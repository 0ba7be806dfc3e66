"""Which models of a run give hidden states and output layer to the losses in place of logits, and why."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xtoken.once import Once

from .head import TOKENS, gather_head, head_fault, linear_outputs
from .limits import head_rows, output_layer
from .routing import read_by

logger = logging.getLogger(__name__)

CHOICES = ("auto", "on", "off")

AUTO_SHARE = 8
"""The logits of a micro-batch (see `logit_bytes`) are left out by "auto" if they would take one part of so many of the
device's memory: to do without costs time, which is worth it where memory is what a run lacks."""


class Fused:
    """The choice of ``fused`` for the student and the teachers of a run.

    Parameters
    ----------
    choice : "auto", "on" or "off"
        "auto" does without logits in micro-batches where they would take so much, see `AUTO_SHARE`; "on" always does.
        Where a model cannot, it has logits, but "on" raises ValueError for the student. What is done is told once.
    device : torch.device
        Where the losses are.
    is_shared : bool
        Whether FSDP2 shares out the student, so that processes must do the same.
    """

    def __init__(self, choice: str, device: torch.device, is_shared: bool = False) -> None:
        self.choice, self.device, self.is_shared = choice, device, is_shared
        self.least = memory_of(device) // AUTO_SHARE  # bytes of logits for "auto"
        self._faults: dict[str | None, str | None] = {}  # of teachers by name, and of the student as None
        self._warn_once = Once(logger.warning)
        self._bytes = 0

    def refuse(self, reason: str | None, teacher: str | None = None) -> None:
        """A teacher, or the student, has logits for this reason; None: it can do without."""
        if reason is not None and teacher is None and self.choice == "on":
            raise ValueError(f"fused: expected 'auto' or 'off' for this student, got 'on': {reason}")
        self._faults[teacher] = reason

    def look(self, size: int) -> None:
        """Takes up a micro-batch whose logits would take so many bytes."""
        self._bytes = size
        if self.choice == "auto" and not self.wanted:
            least = f"{_size(self.least)}, 1/{AUTO_SHARE} of the memory"
            self._tell(f"logits, since those of a micro-batch take {_size(size)}, less than {least}", "few")

    @property
    def wanted(self) -> bool:
        """Whether the micro-batch should do without logits."""
        return self.choice == "on" or (self.choice == "auto" and self._bytes >= self.least)

    def outputs(self, model: Any, call: Callable[..., Any], teacher: str | None = None, **inputs: Any) -> Any:
        """``call(**inputs)`` of the student, or of a teacher by its name, with `LinearLogits` as its ``logits`` where
        that is wanted and can be; `call` is what wraps the model, or the model."""
        is_shared = self.is_shared and teacher is None
        if self.choice == "off" or not (self.wanted or is_shared):
            return call(**inputs)
        if teacher not in self._faults:
            place = None if teacher is None else _place_fault(model, self.device)
            self.refuse(place or head_fault(model, _few(inputs)), teacher)
        if self._is_dense(teacher):
            return call(**inputs)
        if self.wanted:
            return linear_outputs(call, model, **inputs)
        outputs = call(**inputs)
        gather_head(model)  # as the other processes do, whose micro-batches may be larger
        return outputs

    def _is_dense(self, teacher: str | None) -> bool:
        """Whether a model has logits, though they are not wanted, which is told; as is that it has none."""
        fault, name = self._faults[teacher], "the student" if teacher is None else teacher
        if not self.wanted:
            return fault is not None
        size = "" if self.choice == "on" else f", since those of a micro-batch would take {_size(self._bytes)}"
        if fault is None:
            self._tell(f"hidden states and output layer of {name} instead of logits{size}", name)
        else:
            self._tell(f"logits of {name}: {fault}", name)
        return fault is not None

    def _tell(self, message: str, what: str) -> None:
        self._warn_once(what, "fused=%s: the losses get %s", self.choice, message)


def memory_of(device: torch.device) -> int:
    """Bytes that an accelerator has, or else the machine."""
    if device.type in ("cuda", "xpu"):
        total: int = torch.get_device_module(device).get_device_properties(device).total_memory
        return total
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def logit_bytes(batch: Mapping[str, Any], student: Any, teachers: Sequence[Any]) -> int:
    """What the logits of a micro-batch take: the student's with their gradient in float32, and those of teachers that
    compute theirs, in the type of their output layer. Models whose output layer cannot be found count nothing."""
    size: int = batch["input_ids"].numel() * (head_rows(student) or 0) * 8
    for model, entry in zip(teachers, batch["teachers"], strict=True):
        rows = None if model is None or entry.get("logits") is not None else head_rows(model)
        if rows is not None:
            kind = getattr(model.get_output_embeddings().weight, "dtype", torch.float32)
            size += read_by(entry, batch)["input_ids"].numel() * rows * kind.itemsize
    return size


def _place_fault(model: Any, device: torch.device) -> str | None:
    """Why the losses cannot reach a teacher's output layer, if it has one."""
    head = output_layer(model)
    weights = [] if head is None else list(head.parameters())
    if weights and any(hasattr(one, "unshard") for one in model.modules()):
        return "expected an output layer of its own, got one that is shared out with the student's"
    places = [one.device for one in weights if one.device != device]
    return f"expected an output layer on {device}, where the student is, got one on {places[0]}" if places else None


def _few(inputs: Mapping[str, Any]) -> torch.Tensor:
    """The same few tokens on every process."""
    return torch.arange(TOKENS, device=inputs["input_ids"].device)[None]


def _size(count: int) -> str:
    return f"{count / 2**30:.2g} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2g} MiB"
