"""P-KL of the backend "cpu": csrc/losses/pkl."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from xtoken import _core
from xtoken.losses import numerics
from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cached import Cached
from xtoken.losses.cpu import array, label_fields, run_chunks
from xtoken.losses.loss import Matrix
from xtoken.losses.pkl import PKL


@dataclass
class _Layout:
    """W in one set of columns (None: all): the plans of its weights, of which the last is the next one's model."""

    matrix: _core.Built
    columns: Tensor | None
    last: _core.Built | None = None
    plans: Cached[_core.Built] = field(default_factory=Cached)

    def plan_for(self, weight: Tensor) -> _core.Built:
        def make() -> _core.Built:
            values = weight.detach().cpu().to(torch.float32).contiguous()
            columns = None if self.columns is None else self.columns.to(torch.int32)
            fields = {"matrix": self.matrix, "weight": array(values), "columns": array(columns), "like": self.last}
            self.last = _core.build("pkl_plan", fields)
            return self.last

        return self.plans.of((weight,), make)


class _Layouts:
    """The layouts of one W: that for all columns, and the last one for a subset."""

    def __init__(self, projection: Matrix) -> None:
        row_ptr, col = projection.row_ptr.detach().cpu(), projection.col.detach().cpu()
        fields = {"row_ptr": array(row_ptr.long()), "col": array(col), "teacher_size": projection.shape[1]}
        self.matrix = _core.build("pkl_matrix", fields)
        self.all = _Layout(self.matrix, None)
        self.subset: _Layout | None = None

    def of(self, columns: Tensor) -> _Layout:
        """That of ascending columns [C]."""
        if self.subset is None or self.subset.columns is None or not torch.equal(self.subset.columns, columns):
            self.subset = _Layout(self.matrix, columns.clone())
        return self.subset


_LAYOUTS = Cached[_Layouts]()
"""By the tensor of W's column ids, which lives as long as W."""


def plan_for(projection: Matrix, columns: Tensor) -> _core.Built:
    """The layout of W in ascending columns [C], with its weights.

    Kept while W has its entries in the same places, for a subset until another one comes. Other weights, which a
    learnable W has at every step, are put into the layout that there is.
    """
    layouts = _LAYOUTS.of((projection.col, projection.row_ptr), lambda: _Layouts(projection))
    layout = layouts.all if len(columns) == projection.shape[1] else layouts.of(columns)
    return layout.plan_for(projection.weight)


def run(
    problem: Problem[PKL],
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
    options = problem.options
    sums = None if weight_grad is None else torch.empty(len(options.entry_index), dtype=torch.float64, device="cpu")
    fields = {
        **options.fields(),
        "merge": options.merge,
        "epsilon": numerics.EPSILON,
        "weight_grad": array(sums),
        "plan": plan_for(options.W, options.column_set),
    }
    with label_fields(labels) as given:
        losses = run_chunks("pkl", problem, student_grad, scale, level, {**fields, "labels": given})
    if weight_grad is not None and sums is not None:
        weight_grad.index_add_(0, options.entry_index, sums.to(weight_grad.dtype))
    return losses
