"""Several teachers as one: the mean of their probabilities, or for each sample the one that predicts it best."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xtoken.alignment import Alignment, predictable, to_device
from xtoken.losses.logits import BLOCK_ELEMENTS, AnyLogits, Parts
from xtoken.losses.numerics import statistics_dtype

from .routing import label_spans


def mean_logits(
    logits: Sequence[AnyLogits], ids: Sequence[Tensor], weights: Sequence[float], size: int | None = None
) -> Tensor:
    """``log(sum_m w_m softmax(logits_m))`` [B, T, V], at least float32, with the weights scaled to a sum of 1.

    Of M logits [B, T, >= V]; `ids`, [B, T] of each teacher, must be the same. V is `size`, or else the smallest width.
    """
    dense = [one for one in logits if isinstance(one, Tensor)]
    if len(dense) < len(logits):
        raise ValueError("teacher_mode: expected logits in memory for 'average', got TopKLogits or LinearLogits")
    if any(one is not ids[0] and not torch.equal(one, ids[0]) for one in ids[1:]):
        raise ValueError("teacher_mode: expected 'average' teachers to read the same ids; do their templates differ?")
    total = sum(weights)
    if not total > 0:
        raise ValueError(f"weights: expected one above 0 for the mean of the teachers, got {list(weights)}")
    size = min(one.shape[-1] for one in dense) if size is None else size
    weighted = (
        one[..., :size].to(statistics_dtype(one)).log_softmax(-1) + math.log(weight / total)
        for one, weight in zip(dense, weights, strict=True)
        if weight
    )
    return functools.reduce(torch.logaddexp, weighted)


def position_alignment(labels: Tensor) -> Alignment:
    """One chunk for each labelled token but the first, for a teacher that reads the student's ids [B, T]."""
    spans = [torch.from_numpy(label_spans(row)) for row in labels]
    return Alignment(torch.cat(spans), torch.tensor([0, *map(len, spans)], device="cpu").cumsum(0))


def keep(alignment: Alignment, chunks: Tensor) -> Alignment:
    """The alignment, on the CPU, with only those chunks: bool [K]."""
    kept = copy.copy(alignment.host)
    kept.predicted = kept.predicted & chunks
    return kept


def select_best(
    alignments: Sequence[Alignment],
    logits: Sequence[AnyLogits | None],
    ids: Sequence[Tensor],
    sizes: Sequence[int | None],
) -> list[Alignment]:
    """The alignments with, of each sample, only the chunks of the teacher that predicts it best.

    That is the one with the least cross-entropy a student token: of the tokens in its chunks, divided by the number of
    the student's tokens in them, so that tokenizers can be compared. The first among equals. Waits for the device,
    once, since losses count the chunks on the host. Each teacher has logits [B, T, >= V] for the `ids` [B, T] that it
    read, or None if it has no chunk, and in `sizes` V, or None for all columns.
    """
    scores = torch.stack([_scores(*one) for one in zip(alignments, logits, ids, sizes, strict=True)])
    best = scores.argmin(0).cpu()
    return [keep(alignment, (best == m)[alignment.host.sample_index]) for m, alignment in enumerate(alignments)]


def chunks_of_one(alignments: Sequence[Alignment | None], labels: Tensor) -> float:
    """How many labelled chunks a batch has if each sample has those of one teacher: the mean over those that have any.

    All on the host; None is a teacher that reads the student's ids.
    """
    each = [(position_alignment(labels) if one is None else one).supervised(labels) for one in alignments]
    counts = torch.stack([torch.bincount(one.sample_index[predictable(one)], minlength=len(labels)) for one in each])
    return float((counts.sum(0) / (counts > 0).sum(0).clamp_min(1)).sum())


@torch.no_grad()
def _scores(alignment: Alignment, logits: AnyLogits | None, ids: Tensor, size: int | None) -> Tensor:
    """float64 [B]: nats a student token; infinite for a sample without a chunk."""
    if logits is None:
        return torch.full((len(alignment),), torch.inf, dtype=torch.float64, device=ids.device)
    given = Parts.of(logits)
    width = given.width if size is None else size
    assert width is not None
    rows, host = given.batched().detached().source(width), alignment.host
    samples, length = ids.shape
    used = torch.nn.functional.pad(predictable(host), (0, 1))  # the last for tokens in no chunk, index -1
    inside = [used[host.chunk_ids(side, n)] for side, n in (("student", None), ("teacher", length))]
    scores = [torch.full((), torch.inf, dtype=torch.float64, device=ids.device)] * samples
    for b in range(samples):
        wanted = to_device(inside[1][b].nonzero()[:, 0], ids.device)
        if len(wanted):
            nats = torch.zeros((), dtype=torch.float64, device=ids.device)
            for some in wanted.split(max(1, BLOCK_ELEMENTS // width)):
                predicted = rows.at(b * length + some - 1).float()
                nats += torch.nn.functional.cross_entropy(predicted, ids[b, some], reduction="sum")
            scores[b] = nats / int(inside[0][b].sum())
    return torch.stack(scores)
