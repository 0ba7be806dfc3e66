"""A step of training on whatever device: what test_device.py tries, and `DEVICE_STEPS` of the losses' own tests."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import OPERATIONS, Case, distinct
from torch import Tensor

from xtoken import Alignment
from xtoken.losses import Needs


@dataclass
class Step:
    """What one step of training hands to a loss, all on one device but for W."""

    student: Tensor
    teacher: Tensor
    alignment: Alignment
    labels: Tensor
    mask: Tensor
    hidden: Tensor
    head: Tensor
    constants: types.SimpleNamespace
    case: Case
    backend: str = "auto"


def loss_of(s: Step, name: str, linear: bool = False, **options: Any) -> Any:
    """A loss of the step's logits, or of its hidden states and output layer. With one tokenizer for both the teacher
    has logits like the student's, and there is no alignment."""
    operation = OPERATIONS[name]
    student = [s.hidden, s.head] if linear else [options.pop("student", s.student)]
    if operation.needs is Needs.SAME_TOKENIZER:
        function = operation.function(linear)
        return function(*student, s.student.detach().flip(1), backend=s.backend, **options)
    bound = operation.bound(replace(s.case, alignment=s.alignment), linear)
    return bound(*student, s.teacher, backend=s.backend, **options)


def steps_of(name: str) -> dict[str, Callable[[Step], Any]]:
    """What every loss has; of one whose kernels another loss has too, the losses only."""
    plain = {name: lambda s: loss_of(s, name, **OPERATIONS[name].few(31))}
    if name not in distinct():
        return plain
    return {
        **plain,
        f"{name}, none": lambda s: loss_of(s, name, reduction="none").square().sum(),
        f"{name}, inplace": lambda s: loss_of(s, name, student=s.student * 1.0, inplace=True),
        f"{name}, labels": lambda s: _weighted(*loss_of(s, name, labels=s.labels)),
        f"{name}, linear": lambda s: loss_of(s, name, linear=True),
        f"{name}, supervised": lambda s: loss_of(_supervised(s), name, reduction="sum"),
        f"{name}, supervised, none": lambda s: loss_of(_supervised(s), name, reduction="none").square().sum(),
        f"{name}, supervised, linear": lambda s: loss_of(_supervised(s), name, linear=True),
    }


def _supervised(s: Step) -> Step:
    return replace(s, alignment=s.alignment.supervised(s.labels))


def _weighted(loss: Tensor, cross_entropy: Tensor) -> Tensor:
    return loss + 0.3 * cross_entropy


def constants(case: Case, device: torch.device) -> types.SimpleNamespace:
    """What stays the same from step to step."""
    columns = torch.randperm(case.projection.shape[1], generator=torch.Generator().manual_seed(0))[:23]
    start = torch.arange(1, 6)
    positions = Alignment(torch.stack([start, start + 1, start, start + 1], 1).repeat(2, 1), [0, 5, 10])
    return types.SimpleNamespace(
        columns=columns.to(device),
        host_columns=columns,
        weight=case.projection.weight.clone().to(device).requires_grad_(),
        positions=positions.to(device),
    )


def make_step(case: Case, seed: int, device: torch.device, moved: bool, shared: Any, backend: str = "auto") -> Step:
    """New logits, and an alignment of its own."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(0, case.student.shape[-1], case.student.shape[:2], generator=generator)
    labels[:, 3] = -100
    of = case.alignment
    alignment = Alignment(of.spans, of.offsets, of.student_ids, of.teacher_ids)
    return Step(
        (case.student.float() + noise(*case.student.shape)).to(device).requires_grad_(),
        (case.teacher.float() + noise(*case.teacher.shape)).to(device),
        alignment.to(device) if moved else alignment,
        labels.to(device),
        (labels != -100).to(device),
        noise(*case.student.shape[:2], 8).to(device).requires_grad_(),
        noise(case.student.shape[-1], 8).to(device).requires_grad_(),
        shared,
        case,
        backend,
    )


def results(call: Callable[[Step], Any], step: Step) -> list[Tensor | None]:
    """The loss, and the gradients of everything that may have one."""
    leaves = [step.student, step.hidden, step.head, step.constants.weight]
    for leaf in leaves:
        leaf.grad = None
    loss = call(step)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]
