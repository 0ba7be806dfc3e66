"""Which tokens a teacher would have written itself: those among the most probable ones of the rows before them."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.losses.backends import IGNORED
from xtoken.losses.logits import Source, TopKSource
from xtoken.losses.numerics import temporary_elements


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
