"""A piece index as the CUDA kernel of prefix KL reads it: a map of the pairs, and sorted lists of the other tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.alignment import synchronized
from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cached import kept
from xtoken.losses.cuda import Kernels, Memory
from xtoken.losses.prefix_kl import PrefixKL
from xtoken.losses.prefix_kl.formula import merged_events
from xtoken.losses.sliced import SlicedLists, list_fields, tensors_to
from xtoken.pieces import Side, sides


@dataclass(frozen=True)
class TokenLists:
    """Lists of tokens in the layout of csrc/losses/prefix_kl/params.h."""

    shared: int
    start: Tensor  # int32 [slices + 1]
    part: Tensor  # int32
    tokens: Tensor  # int32 [32 * start[slices]], 16-byte aligned
    owner: Tensor  # int32 [count]: the event of each

    def fields(self, memory: Memory) -> dict[str, Any]:
        """A `TokenLists` of csrc."""
        return {**list_fields(self, memory), "tokens": memory.input(self.tokens)}


class Lists(NamedTuple):
    """Some numbers for each of others, ascending."""

    ptr: Tensor  # int32 [count + 1]
    numbers: Tensor  # int32 [ptr[count]]


ABSENT = -(2**31)
"""`absent_event` of csrc/losses/prefix_kl/params.h."""


@dataclass(frozen=True)
class PrefixPlan:
    """A piece index on a device; see csrc/losses/prefix_kl/params.h."""

    sides: tuple[Side, Side]
    by_event: tuple[Lists, Lists]
    known: tuple[Lists, Lists]
    slot: Tensor  # int32 [V_student]
    events: int
    student_lists: TokenLists
    teacher_lists: TokenLists
    unmatched: int
    teacher_list: Tensor  # int32 [events]
    place: Tensor  # int32 [all events]
    merged: Tensor  # uint8 [all events]
    number: Tensor  # int32 [V_teacher]
    most: int

    def fields(self, memory: Memory) -> dict[str, Any]:
        """A `PrefixPlan` of csrc."""

        def side(one: Side, by_event: Lists, known: Lists) -> dict[str, Any]:
            tensors = {name: getattr(one, name) for name in ("event", "length", "order", "ptr", "pieces")}
            tensors |= {"by_event_ptr": by_event.ptr, "by_event": by_event.numbers}
            tensors |= {"known_ptr": known.ptr, "known": known.numbers}
            return {"size": len(one.event), **{name: memory.input(tensor) for name, tensor in tensors.items()}}

        return {
            "side": [side(*one) for one in zip(self.sides, self.by_event, self.known, strict=True)],
            "slot": memory.input(self.slot),
            "events": self.events,
            "student_lists": self.student_lists.fields(memory),
            "teacher_lists": self.teacher_lists.fields(memory),
            "unmatched": self.unmatched,
            "teacher_list": memory.input(self.teacher_list),
            "place": memory.input(self.place),
            "number": memory.input(self.number),
            "merged": memory.input(self.merged),
            "most": self.most,
        }


def _token_lists(keys: NDArray[np.int64], event: NDArray[np.int64]) -> TokenLists:
    """The lists of the tokens of each event in `keys`."""
    counts = np.bincount(event, minlength=int(keys.max(initial=-1)) + 1)
    tokens = torch.from_numpy(np.argsort(event, kind="stable").astype(np.int32))
    made = SlicedLists.of(keys, (counts.cumsum() - counts)[keys], counts[keys])
    return TokenLists(made.shared, made.start, made.part, made.put(tokens, -1), made.owner)


def _by_event(side: Side, events: int, device: torch.device) -> Lists:
    """The tokens of each event."""
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), side.event.bincount(minlength=events).cumsum(0)])
    return Lists(ptr.int().to(device), side.event.sort(stable=True).indices.int().to(device))


def _known(side: Side, events: int, device: torch.device) -> Lists:
    """The events that do not follow each token."""
    size = len(side.event)
    owner = np.repeat(np.arange(size), side.joined_ptr.diff().numpy())
    pairs = np.unique(owner * events + side.event[side.joined.long()].numpy())
    ptr = np.concatenate([[0], np.bincount(pairs // events, minlength=size).cumsum()])
    return Lists(torch.from_numpy(ptr).int().to(device), torch.from_numpy(pairs % events).int().to(device))


@kept
def prefix_plan_for(pieces: Tensor, device: torch.device) -> PrefixPlan:
    """The plan of `PieceIndex.data` on a device. The first call waits for it."""
    both = sides(pieces.cpu())
    student, teacher = (side.event.long().numpy() for side in both)
    events = int(pieces[2])
    students, teachers = (np.bincount(event, minlength=events) for event in (student, teacher))
    is_both = (students > 0) & (teachers > 0)
    is_pair = is_both & (students == 1) & (teachers == 1)
    listed = (is_both & ~is_pair).nonzero()[0]
    # Student tokens that the teacher has nothing for are one list more, perhaps an empty one.
    matched = np.where(is_both[student], student, events)
    student_lists, teacher_lists = _token_lists(np.append(listed, events), matched), _token_lists(listed, teacher)
    owner = student_lists.owner.long().numpy()
    unmatched = int((owner == events).nonzero()[0][0])
    number = np.full(events + 1, len(listed))
    number[np.delete(owner, unmatched)] = np.arange(len(listed))
    teacher_list = np.empty(len(listed), np.int32)
    teacher_list[number[teacher_lists.owner.long().numpy()]] = np.arange(len(listed))
    partner = np.zeros(events, np.int64)
    partner[teacher] = np.arange(len(teacher))
    slot = np.where(is_pair[student], partner[student], -1 - number[matched])
    place = np.full(events, ABSENT)
    place[listed] = -1 - number[listed]
    place[student[is_pair[student]]] = is_pair[student].nonzero()[0]
    numbers = np.where(is_pair[teacher], -1, np.where(is_both[teacher], number[teacher], len(listed)))
    most = 0
    for side in both:
        begin, end, ids = side.ptr[:-1].numpy(), side.ptr[1:].numpy(), side.pieces.numpy()
        most = max(most, int(np.bincount(ids[begin[begin < end]], minlength=1).max()))

    return PrefixPlan(
        (Side(*(x.to(device) for x in both[0])), Side(*(x.to(device) for x in both[1]))),
        (_by_event(both[0], events, device), _by_event(both[1], events, device)),
        (_known(both[0], events, device), _known(both[1], events, device)),
        synchronized(torch.from_numpy(slot.astype(np.int32)).to(device)),
        len(listed),
        tensors_to(student_lists, device),
        tensors_to(teacher_lists, device),
        unmatched,
        torch.from_numpy(teacher_list).to(device),
        torch.from_numpy(place.astype(np.int32)).to(device),
        merged_events(both, events).to(device, torch.uint8),
        synchronized(torch.from_numpy(numbers.astype(np.int32)).to(device)),
        most,
    )


def run(
    kernels: Kernels,
    problem: Problem[PrefixKL],
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
) -> Tensor:
    """Prefix KL; the workspace is about 150 KB per block of the grid for vocabularies of 150,000."""
    options = problem.options
    problem.chunks.check_ids((problem.student.shape[-1], problem.teacher.shape[-1]), several=False)
    plan = prefix_plan_for(options.pieces, problem.student.device)
    with kernels.memory(problem.student.device) as memory:
        fields = {
            **options.fields(),
            "weighted": options.weighting == "teacher",
            "workspace": None,
            "plan": plan.fields(memory),
        }
        return kernels.run_chunks(memory, "prefix_kl", problem, student_grad, scale, labels, fields)
