"""The ranks of a group: sums and maxima over them, their gradients, and errors that reach all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes that hold the parts of something, a ProcessGroup that messages call by `name`; of no group: this
    one alone, which has it all. Raises ValueError for a group that this process does not belong to."""

    def __init__(self, group: Any = None, name: str = "group") -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"{name}: expected a torch.distributed.ProcessGroup, got {type(group).__name__}")
        self.group, self.name = group, name
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        if self.rank < 0:
            raise ValueError(f"{name}: expected a group that this process belongs to, got one without it")

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks, on each of them; without a gradient."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """The maximum over the ranks, on each of them; without a gradient."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def gathered(self, values: Tensor) -> Tensor:
        """[size, ...]: the values of all ranks, which have one shape; without a gradient."""
        if self.size == 1:
            return values.detach()[None]
        values = values.detach().contiguous()
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values, group=self.group)
        return torch.stack(parts)

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        values = values.detach().clone(memory_format=torch.contiguous_format)
        if self.size > 1 and values.numel():
            dist.all_reduce(values, operation, group=self.group)
        return values

    def summed(self, values: Tensor) -> Tensor:
        """The sum over the ranks, which all of them use in the same way: each gets the gradient that it computes."""
        return values if self.size == 1 else _Summed.apply(values, self)

    def shared(self, values: Tensor) -> Tensor:
        """Values that are the same on all ranks, of which each uses a part: their gradients add up."""
        return values if self.size == 1 else _Shared.apply(values, self)

    def exchanged(self, values: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        """[sum of receives, K]: the rows [sum of sends, K] that the ranks send here, by rank; gradients return."""
        received: Tensor = _Exchanged.apply(values, sends, receives, self)
        return received

    def log_softmax(self, values: Tensor) -> Tensor:
        """log_softmax of rows [n, m], of which each rank has some columns, perhaps none; -inf has no probability."""
        if self.size == 1:
            return values.log_softmax(-1)
        found: Tensor = _LogSoftmax.apply(values, self)
        return found

    def of_log_softmax(self, has_gradient: bool) -> int:
        """How many numbers `log_softmax` reduces for a row: twice forward, once backward."""
        return 0 if self.size == 1 else 5 if has_gradient else 4

    def log_sums(self, values: Tensor) -> Tensor:
        """log of the sum of ``exp(values)`` over the ranks, -inf where there is nothing; used alike by all."""
        if self.size == 1:
            return values
        top = self.largest(values)
        top = top.masked_fill(top.isinf(), 0)
        mass = self.summed((values - top).exp())
        return (mass.masked_fill(mass == 0, 1).log() + top).masked_fill(mass == 0, -torch.inf)


def _row_maxima(values: Tensor) -> Tensor:
    """[n]: of rows [n, m]; -inf where there are no columns."""
    return values.detach().amax(-1) if values.shape[-1] else values.new_full(values.shape[:-1], -torch.inf)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        return ranks.total(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


class _LogSoftmax(torch.autograd.Function):
    """With as few passes as there can be: backward has the exponentials of forward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        top = ranks.largest(_row_maxima(values))
        found = values - top.masked_fill(top.isinf(), 0)[:, None]
        powers = found.exp()
        mass = ranks.total(powers.sum(-1, keepdim=True))
        mass.masked_fill_(mass == 0, 1)
        ctx.ranks = ranks
        ctx.save_for_backward(powers, mass)
        return found.sub_(mass.log())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        powers, mass = ctx.saved_tensors
        total = ctx.ranks.total(upstream.sum(-1, keepdim=True))
        return torch.addcmul(upstream, powers, total / mass, value=-1), None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.total(upstream), None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, sends: list[int], receives: list[int], ranks: Ranks) -> Tensor:
        ctx.sends, ctx.receives, ctx.ranks = sends, receives, ranks
        received = values.new_empty(sum(receives), values.shape[1])
        dist.all_to_all_single(received, values.contiguous(), receives, sends, group=ranks.group)
        return received

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.ranks.exchanged(upstream, ctx.receives, ctx.sends), None, None, None


class Report:
    """What a rank tells the others before they compute together, group by group: what has to be the `same` on all
    ranks, what is each rank's `own`, and the `error` that it has raised."""

    def __init__(self, same: dict[str, Any], own: dict[str, Any], error: Exception | None) -> None:
        self.same, self.own = same, own
        self.error: Exception | None = None
        self.message: str | None = None
        if error is not None:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Notes an error of this rank, unless there is one already."""
        if self.message is None:
            self.error, self.message = error, f"{type(error).__name__}: {error}"

    def told(self, ranks: Ranks, *same: str) -> list[dict[str, Any]]:
        """What the ranks of a group have of their own, in a collective of a few hundred bytes; their errors, and what
        they do not agree in, are noted. `same`: what of their own has to be the same in this group."""
        mine = {**self.same, **{name: self.own[name] for name in same if name in self.own}}
        told: list[Any] = [(mine, self.own, self.message)]
        if ranks.size > 1:
            told = [None] * ranks.size
            dist.all_gather_object(told, (mine, self.own, self.message), group=ranks.group)
        for rank, (theirs, _, said) in enumerate(told):
            if said is not None and self.message is None:
                self.message = said if " of " in said.split(":")[0] else f"rank {rank} of {ranks.name} raised {said}"
            for name in mine if said is None else ():
                if theirs.get(name) != mine[name]:
                    self.fail(
                        ValueError(
                            f"{name}: expected the same on all ranks of {ranks.name}, got {mine[name]} on rank "
                            f"{ranks.rank} and {theirs.get(name)} on rank {rank}"
                        )
                    )
        return [own for _, own, _ in told]

    def check(self) -> None:
        """Raises this rank's own error, or of another's RuntimeError with its message."""
        if self.error is not None:
            raise self.error
        if self.message is not None:
            raise RuntimeError(self.message)
