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


def position_alignment(labels: Tensor, ids: Tensor | None = None) -> Alignment:
    """One chunk for each labelled token but the first, for a teacher that reads the student's `ids` [B, T]."""
    spans = [torch.from_numpy(label_spans(row)) for row in labels]
    return Alignment(torch.cat(spans), torch.tensor([0, *map(len, spans)], device="cpu").cumsum(0), ids, ids)


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
    positions: Tensor | None = None,
) -> list[Alignment]:
    """The alignments with, of each sample, only the chunks of the teacher that predicts it best.

    That is the one with the least cross-entropy a student token: of the tokens in its chunks, divided by the number of
    the student's tokens in them, so that tokenizers can be compared. The first among equals. Waits for the device,
    once, since losses count the chunks on the host. Each teacher has logits [B, T, >= V] for the `ids` [B, T] that it
    read, or None if it has no chunk, and in `sizes` V, or None for all columns. With `positions` [B, T] of the
    student's tokens a row has a sample for each 0 in them.
    """
    sample = [_samples(one.host, positions) for one in alignments]
    given = zip(alignments, logits, ids, sizes, sample, strict=True)
    best = torch.stack([_scores(*one) for one in given]).argmin(0).cpu()
    return [keep(one, (best == m)[of]) for m, (one, (of, _)) in enumerate(zip(alignments, sample, strict=True))]


def chunks_of_one(alignments: Sequence[Alignment | None], labels: Tensor, positions: Tensor | None = None) -> float:
    """How many labelled chunks a batch has if each sample has those of one teacher: the mean over those that have any.

    All on the host; None is a teacher that reads the student's ids. `positions` are as for `select_best`.
    """
    each = [(position_alignment(labels) if one is None else one).supervised(labels) for one in alignments]
    samples = [_samples(one, positions) for one in each]
    counts = torch.stack([
        torch.bincount(of[predictable(one)], minlength=count) for one, (of, count) in zip(each, samples, strict=True)
    ])  # fmt: skip
    return float((counts.sum(0) / (counts > 0).sum(0).clamp_min(1)).sum())


def _samples(alignment: Alignment, positions: Tensor | None) -> tuple[Tensor, int]:
    """int64 [K]: of which sample each chunk is, and how many there are: rows, or more where rows are packed."""
    if positions is None:
        return alignment.sample_index, len(alignment)
    begins = (positions == 0).cpu()
    begins[:, 0] = True
    number = begins.flatten().cumsum(0).view_as(begins) - 1
    return number[alignment.sample_index, alignment.spans[:, 0].long()], int(number[-1, -1]) + 1


@torch.no_grad()
def _scores(
    alignment: Alignment, logits: AnyLogits | None, ids: Tensor, size: int | None, samples: tuple[Tensor, int]
) -> Tensor:
    """float64 [samples]: nats a student token; infinite for a sample without a chunk."""
    sample, count = samples
    if logits is None:
        return torch.full((count,), torch.inf, dtype=torch.float64, device=ids.device)
    given = Parts.of(logits)
    width = given.width if size is None else size
    assert width is not None
    rows, host, read = given.batched().detached().source(width), alignment.host, ids.flatten()
    used = predictable(host)
    tokens = (host.spans[:, 1] - host.spans[:, 0])[used]
    sizes = torch.bincount(sample[used], tokens.double(), count)
    of_chunk = torch.nn.functional.pad(sample.masked_fill(~used, -1), (0, 1), value=-1)  # the last: in no chunk
    of_token = of_chunk[host.chunk_ids("teacher", ids.shape[1])].flatten()
    scores = [torch.full((), torch.inf, dtype=torch.float64, device=ids.device)] * count
    for b in sample[used].unique().tolist():
        wanted = to_device((of_token == b).nonzero()[:, 0], ids.device)
        nats = torch.zeros((), dtype=torch.float64, device=ids.device)
        for some in wanted.split(max(1, BLOCK_ELEMENTS // width)):
            predicted = rows.at(some - 1).float()
            nats += torch.nn.functional.cross_entropy(predicted, read[some], reduction="sum")
        scores[b] = nats / float(sizes[b])
    return torch.stack(scores)
