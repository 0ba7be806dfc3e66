"""Same-tokenizer KL of the backend "cpu": csrc/losses/kd."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cpu import array, label_fields, run_chunks
from xtoken.losses.kd import KD


def run(
    problem: Problem[KD],
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
    *,
    level: str = "",
) -> Tensor:
    """KL for one shared tokenizer; writes every element of `student_grad`.

    Needs no scratch memory for all columns, and 8 bytes a column and thread for a subset.
    """
    options = problem.options
    fields = {
        **options.fields(),
        "columns": array(None if options.columns is None else options.columns.to(torch.int32)),
    }
    with label_fields(labels) as given:
        return run_chunks("kd", problem, student_grad, scale, level, {**fields, "labels": given})
