"""The backend "cpu": hands tensors to the kernels of csrc/cpu."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xtoken import _core
from xtoken.losses import numerics
from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cpu import ChunkArguments, LabelBuffers, Layouts
from xtoken.losses.loss import Matrix


class _Kept(NamedTuple):
    """A plan, its columns (None: all) and the weights that it was made of."""

    plan: _core.CpuPlan
    columns: Tensor | None
    weight: weakref.ref[Tensor]
    version: int


@dataclass
class _Plans:
    """The layouts of one W: its transpose, the plan for all columns, and the last one for a subset."""

    matrix: _core.CpuMatrix
    all: _Kept | None = None
    subset: _Kept | None = None


_PLANS = Layouts[_Plans]()
"""Of the tensor of W's column ids, which lives as long as W, and of its row pointers."""


def plan_for(projection: Matrix, columns: Tensor) -> _core.CpuPlan:
    """The layout of W in ascending columns [C].

    Kept while W has its entries in the same places, for a subset until another one comes. Other weights, which a
    learnable W has at every step, are put into the layout that there is.
    """
    plans = _plans_of(projection)
    everything = len(columns) == projection.shape[1]
    kept = plans.all if everything else plans.subset
    if kept is not None and kept.columns is not None and not torch.equal(kept.columns, columns):
        kept = None
    weight = projection.weight
    if kept is not None and kept.weight() is weight and kept.version == weight._version:
        return kept.plan
    values = np.ascontiguousarray(weight.detach().cpu().to(torch.float32).numpy())
    if kept is not None:
        plan = kept.plan.reweighted(plans.matrix, values)
    else:
        ids = np.empty(0, np.int32) if everything else columns.to(torch.int32).numpy()
        plan = _core.CpuPlan(plans.matrix, values, ids)
    made = _Kept(plan, None if everything else columns.clone(), weakref.ref(weight), weight._version)
    if everything:
        plans.all = made
    else:
        plans.subset = made
    return plan


def _plans_of(projection: Matrix) -> _Plans:
    row_ptr, col = projection.row_ptr, projection.col

    def make() -> _Plans:
        return _Plans(_core.CpuMatrix(row_ptr.detach().cpu().numpy(), col.detach().cpu().numpy(), projection.shape[1]))

    return _PLANS.of((col, row_ptr), make)


def run(
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
    *,
    level: str = "",
) -> Tensor:
    """P-KL; writes every element of `student_grad`, which may be wider than the student's vocabulary.

    The scratch memory is a few megabytes per thread, whatever the number of rows.
    """
    options: Any = problem.options
    chunks = ChunkArguments(problem, student_grad, scale)
    plan = plan_for(options.projection, options.columns)
    weight_sums = None if weight_grad is None else torch.empty(plan.entries, dtype=torch.float64)
    buffers = LabelBuffers(labels)
    _core.cpu_pkl(
        plan,
        *chunks.argument,
        0 if weight_sums is None else weight_sums.data_ptr(),
        buffers.argument,
        options.temperature,
        options.merge,
        options.reverse,
        numerics.LOWEST_LOGIT,
        numerics.EPSILON,
        level,
        torch.get_num_threads(),
    )
    if weight_grad is not None and weight_sums is not None:
        weight_grad.index_add_(0, options.entry_index, weight_sums.to(weight_grad.dtype))
    buffers.finish()
    return chunks.losses()
