"""Same-tokenizer KL of the backend "cuda": csrc/losses/kd."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cuda import Kernels
from xtoken.losses.kd import KD


def run(
    kernels: Kernels,
    problem: Problem[KD],
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
) -> Tensor:
    """KL for one shared tokenizer."""
    options = problem.options
    columns, place = options.columns, None
    width, device = problem.student.shape[-1], problem.student.device
    if columns is not None:
        place = torch.full((width,), -1, dtype=torch.int32, device=device)
        place[columns] = torch.arange(len(columns), dtype=torch.int32, device=device)
    with kernels.memory(device) as memory:
        fields = {
            **options.fields(),
            "chosen": memory.input(None if columns is None else columns.to(torch.int32)),
            "place": memory.input(place),
            "columns": width if columns is None else len(columns),
        }
        return kernels.run_chunks(memory, "kd", problem, student_grad, scale, labels, fields)
