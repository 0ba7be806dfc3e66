"""Another order of a teacher's columns, in which the losses find the logits of a pair of tokens side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .alignment.alignment import int_tensor
from .alignment.chunks import synchronized
from .storage import lasting


class TeacherOrder:
    """An order of a teacher's columns: column ``n`` of logits in it is that of the token ``tokens[n]``.

    `ProjectionMatrix.teacher_order` and `PieceIndex.teacher_order` make it for their losses,
    `xtoken.train.ordered_layer` an output layer that computes in it, and `OrderedLogits` are logits said to be in it.
    All else (W, piece index, alignment, columns, labels) stays as it is, with the tokenizer's ids: the losses number it
    anew.

    Parameters
    ----------
    tokens : int64 [V_teacher]
        Every teacher id once, else ValueError.

    Attributes
    ----------
    places : int64 [V_teacher]
        The column of each token.

    Examples
    --------
    >>> order = TeacherOrder([2, 0, 1])
    >>> order, order.places.tolist()
    (TeacherOrder(3 tokens, 0 of them at home), [1, 2, 0])
    """

    def __init__(self, tokens: Any) -> None:
        self.tokens = lasting(int_tensor(tokens, "tokens", torch.int64).cpu())
        size = self.tokens.numel()
        all_of_them = torch.arange(size, device="cpu")
        if self.tokens.shape != (size,) or size == 0 or not torch.equal(self.tokens.sort().values, all_of_them):
            raise ValueError(f"tokens: expected every teacher id once [V_teacher], got {list(self.tokens.shape)}")
        self.places = lasting(self.tokens.argsort())
        self._placed = {self.places.device: self.places}

    @classmethod
    def beside(cls, partner: Tensor, others: Tensor) -> TeacherOrder:
        """The order for pairs of tokens.

        Parameters
        ----------
        partner : int64 [V_student]
            The teacher's token of each student token's pair, -1 for none; distinct. It gets the student's number as its
            column, if there are so many.
        others : int64 [n]
            All other teacher tokens. The columns that are free get, in ascending order, the partners of the students
            beyond, then these.
        """
        size = int((partner >= 0).sum()) + len(others)
        tokens = torch.nn.functional.pad(partner, (0, max(0, size - len(partner))), value=-1)
        late = tokens[size:]
        tokens = tokens[:size].clone()
        tokens[tokens < 0] = torch.cat([late[late >= 0], others])
        return cls(tokens)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def renumbered(self, ids: Tensor) -> Tensor:
        """The columns of tokens, on their device; what is no token, such as padding of -1, stays as it is."""
        if ids.device not in self._placed:
            self._placed[ids.device] = synchronized(self.places.to(ids.device))
        is_token = (ids >= 0) & (ids < len(self))
        return torch.where(is_token, self._placed[ids.device][torch.where(is_token, ids, 0)].to(ids.dtype), ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherOrder, (self.tokens,)

    def __repr__(self) -> str:
        at_home = int((self.tokens == torch.arange(len(self), device="cpu")).sum())
        return f"TeacherOrder({len(self)} tokens, {at_home} of them at home)"
