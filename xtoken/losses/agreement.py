"""Which chunks begin alike on both sides, as far as W tells."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.alignment.chunks import Chunks, synchronized
from xtoken.losses.cached import Cached
from xtoken.losses.loss import Matrix
from xtoken.losses.operator import Call

_ENTRIES = Cached[Tensor]()


def agrees(chunks: Chunks, projection: Matrix) -> Tensor:
    """bool [K]: whether W has an entry for the first realised tokens of both sides, in chunks that count.

    Waits for the device only for the first use of a W there.
    """
    students, teachers = projection.shape
    device = chunks.used.device

    def entries() -> Tensor:
        row = torch.repeat_interleave(torch.arange(students, device="cpu"), projection.row_ptr.detach().cpu().diff())
        numbers = (row * teachers + projection.col.detach().cpu()).sort().values
        none = torch.tensor([students * teachers], device="cpu")  # never without one
        return synchronized(torch.cat([numbers, none]).to(device))

    numbers = _ENTRIES.of((projection.col, projection.row_ptr), entries, device)
    first = [side.realised[side.start.clamp_min(0)] for side in (chunks.student, chunks.teacher)]
    wanted = first[0] * teachers + first[1]
    found = numbers[torch.searchsorted(numbers, wanted)] == wanted
    return found if chunks.mask is None else found & chunks.mask


def agreeing(call: Call, projection: Matrix) -> Chunks:
    """The chunks of a call with an alignment, of which only those count that `agrees` names.

    Raises ValueError if a first realised token is outside its vocabulary.
    """
    assert call.spans is not None
    chunks = call.chunks(realised=True)
    chunks.check_ids(projection.shape, several=False)
    kept = agrees(chunks, projection)
    return chunks.masked(kept.new_zeros(len(call.spans)).index_copy(0, chunks.used, kept))
