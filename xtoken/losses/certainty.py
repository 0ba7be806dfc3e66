"""Weights of several teachers by how sure each is: by the entropies of their rows at the same token of the student."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xtoken.alignment import Chunks
from xtoken.losses.logits import Source
from xtoken.losses.numerics import statistics_dtype, temporary_elements


@torch.no_grad()
def certainties(teachers: Sequence[tuple[Source, Source, Chunks] | None]) -> list[Tensor]:
    """For each teacher (the student's logits, its own, and the chunks) [K]: the weights of its chunks, whose mean over
    the teachers of a student row is 1.

    ``w_m = n exp(-h_m) / sum_j exp(-h_j)`` over the n teachers with a chunk that begins at the same row of the student,
    where ``h_m = H_m log(V_student) / log(V_m)``: the entropy of the first row of its chunk in nats, H_m, as the same
    share of the largest possible one would be in the student's vocabulary. The weights of a teacher that is None, or of
    chunks that do not count, are 0.
    """
    given, nothing = [one for one in teachers if one is not None], torch.zeros(0, dtype=torch.float32, device="cpu")
    if not given:
        return [nothing] * len(teachers)
    student, _, first = given[0]
    rows = student.samples * student.length + 1  # the last for row -1
    sure = torch.full((len(given), rows), -torch.inf, dtype=torch.float32, device=first.used.device)
    for m, (_, source, chunks) in enumerate(given):
        scale = math.log(max(student.size, 2)) / math.log(max(source.size, 2))
        sure[m, chunks.student.start] = -scale * entropies(source, chunks.teacher.start.clamp_min(0))
    sure[:, -1] = -torch.inf
    weights = (sure.softmax(0) * (sure > -torch.inf).sum(0)).nan_to_num_(0.0)
    each = iter(weights)
    return [nothing if one is None else next(each)[one[2].student.start] for one in teachers]


@torch.no_grad()
def entropies(source: Source, rows: Tensor) -> Tensor:
    """float32 [n]: entropies of some rows, in nats."""
    found = [torch.zeros(0, dtype=torch.float32, device=rows.device)]
    for some in rows.split(max(1, temporary_elements(rows.device) // source.size)):
        logits = source.at(some)
        p = logits.to(statistics_dtype(logits)).softmax(1)
        found.append(torch.special.entr(p).sum(1).float())
    return torch.cat(found)
