"""How far teachers are trusted: which tokens each would have written itself, and weights by how sure each is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xtoken.alignment import Chunks
from xtoken.losses.backends import IGNORED
from xtoken.losses.logits import Source, TopKSource
from xtoken.losses.numerics import statistics_dtype, temporary_elements


@torch.no_grad()
def trusted(teacher: Source, ids: Tensor, top_k: int) -> Tensor:
    """int64 [B, T]: the teacher's tokens, but -100 for those that are not `in_top` of the row before.

    Of `ids` [B, T], on the device of the rows. The first token of a sample, which no row predicts, stays.
    """
    following = torch.nn.functional.pad(ids[:, 1 : teacher.length + 1], (0, 1), value=-1)
    following = torch.nn.functional.pad(following, (0, teacher.length - following.shape[1]), value=-1)
    is_in = in_top(teacher, following.flatten(), top_k).view(following.shape)[:, : ids.shape[1] - 1]
    return torch.where(torch.nn.functional.pad(is_in, (1, ids.shape[1] - 1 - is_in.shape[1]), value=True), ids, IGNORED)


@torch.no_grad()
def in_top(source: Source, tokens: Tensor, top_k: int) -> Tensor:
    """bool [N]: whether fewer than `top_k` tokens are more probable than `tokens` [N] in the N rows of logits.

    Of `TopKLogits` only listed tokens are; raises ValueError if fewer than `top_k` of the vocabulary are listed, so
    that it cannot be told. Logits are read once, a block of rows at a time.
    """
    if isinstance(source, TopKSource):
        width = source.ids.shape[1]
        if width < min(top_k, source.size):
            raise ValueError(
                f"trust_top_k: expected at most {width}, the log-probabilities that a cached or served row has, got "
                f"{top_k}"
            )
        is_own = (source.ids == tokens[:, None]) & (source.ids >= 0)
        own = source.logprobs.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)
        greater = (source.logprobs > own) & (source.ids >= 0)
        return is_own.any(1) & (greater.sum(1) < top_k)
    found = [torch.zeros(0, dtype=torch.bool, device=tokens.device)]
    step = max(1, temporary_elements(tokens.device) // source.size)
    for start in range(0, len(tokens), step):
        wanted = tokens[start : start + step]
        logits = source.rows(start, start + len(wanted))
        own = logits.gather(1, wanted.clamp(0, source.size - 1)[:, None])
        above = (logits > own).view(torch.uint8).sum(1, dtype=torch.int32)
        found.append((above < top_k) & (wanted >= 0) & (wanted < source.size))
    return torch.cat(found)


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
