"""The backend "cpu": hands tensors to the kernels of csrc/cpu."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xtoken import _core, reference
from xtoken.losses._backends import Backend, Labels, Problem, register_backend
from xtoken.losses._common import Matrix
from xtoken.losses._cpu_arguments import ELEMENTS, logits_argument, rows_argument, unit_stride
from xtoken.losses._cpu_gold import run_gold


@dataclass
class _Plans:
    """The layouts of one W: its transpose, the plan for all columns, and the last one for a subset."""

    weight: weakref.ref[Tensor]
    version: tuple[int, ...]
    matrix: _core.CpuMatrix
    all: _core.CpuPlan | None = None
    columns: Tensor | None = None
    subset: _core.CpuPlan | None = None


_PLANS: Any = WeakIdKeyDictionary()
"""By the tensor of W's column ids, which lives as long as W."""


def plan_for(projection: Matrix, columns: Tensor) -> _core.CpuPlan:
    """The layout of W in ascending columns [C]; kept while W's tensors are the same and unchanged, for a
    subset until another one comes."""
    plans = _plans_of(projection)
    if len(columns) == projection.shape[1]:
        if plans.all is None:
            plans.all = _core.CpuPlan(plans.matrix, np.empty(0, np.int32))
        return plans.all
    if plans.subset is None or plans.columns is None or not torch.equal(plans.columns, columns):
        plans.subset = _core.CpuPlan(plans.matrix, columns.to(torch.int32).numpy())
        plans.columns = columns.clone()
    return plans.subset


def _plans_of(projection: Matrix) -> _Plans:
    tensors = projection.row_ptr, projection.col, projection.weight
    version = tuple(tensor._version for tensor in tensors)
    known: _Plans | None = _PLANS.get(projection.col)
    if known is not None and known.weight() is projection.weight and known.version == version:
        return known
    row_ptr, col, weight = (tensor.detach().cpu().numpy() for tensor in tensors)
    matrix = _core.CpuMatrix(row_ptr, col, np.ascontiguousarray(weight, dtype=np.float32), projection.shape[1])
    plans = _Plans(weakref.ref(projection.weight), version, matrix)
    if not projection.weight.requires_grad:
        _PLANS[projection.col] = plans
    return plans


def unsupported(problem: Problem) -> str | None:
    """Why the kernels cannot take a problem, or None."""
    for name, logits in (("student_logits", problem.student), ("teacher_logits", problem.teacher)):
        if logits.dtype not in ELEMENTS:
            known = ", ".join(map(str, ELEMENTS))
            return f"{name}: expected one of {known}, got {logits.dtype}"
    return None


def run_pkl(
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    *labels: Labels,
    level: str = "",
) -> Tensor:
    """P-KL; writes every element of `student_grad`, which may be wider than the student's vocabulary.

    The scratch memory is a few megabytes per thread, whatever the number of rows.
    """
    options: Any = problem.options
    student, teacher = unit_stride(problem.student), unit_stride(problem.teacher)
    student_rows, kept_student = rows_argument(problem.chunks.student)
    teacher_rows, kept_teacher = rows_argument(problem.chunks.teacher)
    count = len(problem.chunks)
    losses = torch.empty(count, dtype=torch.float64)
    factors = None if scale is None else scale.detach().double().contiguous()
    plan = plan_for(options.projection, options.columns)
    weight_sums = None if weight_grad is None else torch.empty(plan.entries, dtype=torch.float64)
    wanted = labels[0] if labels else None
    label_losses = None if wanted is None else torch.empty(wanted.ids.shape, dtype=torch.float64)
    label_ids = None if wanted is None else wanted.ids.contiguous()
    _core.cpu_pkl(
        plan,
        logits_argument(student),
        logits_argument(teacher),
        logits_argument(student_grad),
        student_rows,
        teacher_rows,
        count,
        0 if factors is None else factors.data_ptr(),
        losses.data_ptr(),
        0 if weight_sums is None else weight_sums.data_ptr(),
        (0, 0.0, 0)
        if wanted is None or label_ids is None or label_losses is None
        else (label_ids.data_ptr(), float(wanted.scale), label_losses.data_ptr()),
        options.temperature,
        options.merge,
        options.reverse,
        reference.LOWEST_LOGIT,
        reference.EPSILON,
        level,
        torch.get_num_threads(),
    )
    del kept_student, kept_teacher
    if weight_grad is not None and weight_sums is not None:
        weight_grad.copy_(weight_sums)
    if wanted is not None and label_losses is not None:
        wanted.losses.copy_(label_losses)
    return losses.float()


def backend(name: str = "cpu", level: str = "") -> Backend:
    """The kernels of one level ("avx512", "avx2", "portable"; "": the default) as a backend."""

    def missing(device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"it works on CPU tensors, got {device}"

    operations = {"pkl": run_pkl, "gold": run_gold, "uld": run_gold}
    leveled = {key: functools.partial(run, level=level) for key, run in operations.items()}
    return Backend(name, leveled, missing, unsupported, fused_labels=frozenset(["pkl"]))


register_backend(backend())
