"""What losses on a piece index share: whether there is anything to compare, exact partners, events, diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from xtoken.alignment import Chunks, synchronized
from xtoken.losses import diagnostics
from xtoken.losses.cached import kept
from xtoken.losses.logits import Source
from xtoken.losses.loss import Loss
from xtoken.losses.numerics import scaled, statistics_dtype
from xtoken.pieces import Side, sides
from xtoken.projection.entries import Entries


@dataclass(frozen=True)
class OnPieces(Loss):
    """A loss of `Needs.PIECES`, which looks at the realised tokens too."""

    pieces: Tensor

    @property
    def realised(self) -> bool:
        return True

    def check(self) -> None:
        if not _is_comparable(self.pieces):
            raise ValueError(
                "pieces: expected events that both sides have, got none to tell apart: no text is a token on both"
            )

    def left_out(self, chunks: Chunks, events: tuple[Tensor, Tensor]) -> Tensor | None:
        """bool [K]: chunks without a term for their first rows, by the events of all tokens; None: there are none."""
        return None

    def diagnose(
        self, student: Source, teacher: Source, chunks: Chunks, projection: Any, device: torch.device, backend: str
    ) -> Tensor:
        events = _events(self.pieces, chunks.used.device)
        count = int(self.pieces[2])

        def values(z: Tensor, y: Tensor) -> Tensor:
            same = event_agreement(z, y, events, count).to(torch.float32)
            nothing = torch.zeros_like(same)
            return torch.stack([same, torch.ones_like(same), nothing, nothing], 1)

        return diagnostics.means(student, teacher, chunks, values, left_out=self.left_out(chunks, events))


@dataclass(frozen=True)
class OnTokens(OnPieces):
    """One whose formula is its only kernel, and that looks at the realised tokens of every chunk."""

    reads_tokens: ClassVar[bool] = True


@dataclass(frozen=True)
class OnPartners(OnTokens):
    """One that compares the first rows on the tokens that both vocabularies have, and nothing else of them."""

    def diagnose(
        self, student: Source, teacher: Source, chunks: Chunks, projection: Any, device: torch.device, backend: str
    ) -> Tensor:
        shared = partners(self.pieces, chunks.used.device)
        number = len(shared.student)
        place = torch.arange(number, device=shared.student.device)
        entries = Entries(shared.student, place, torch.ones_like(place, dtype=torch.float32))

        def values(z: Tensor, y: Tensor) -> Tensor:
            return diagnostics.diagnosis(z, y, shared.teacher, entries)

        return diagnostics.means(student, teacher, chunks, values, number)


# --- exact partners


class Partners(NamedTuple):
    """The tokens that both vocabularies have: pairs of equal text or equal role, each token in one at most."""

    student: Tensor  # int64 [P]
    teacher: Tensor  # int64 [P]
    of_student: Tensor  # int64 [V_student]: the partner, V_teacher where there is none
    of_teacher: Tensor  # int64 [V_teacher]


@kept
def partners(pieces: Tensor, device: torch.device) -> Partners:
    """Those of a piece index, on a device."""
    both = sides(pieces.cpu())
    sizes = [len(side.event) for side in both]
    to = [_single_pieces(side, size) for side, size in zip(both, reversed(sizes), strict=True)]
    student = torch.arange(sizes[0], device="cpu")
    padded = torch.cat([to[1], torch.tensor([-1], device="cpu")])
    student = student[padded[to[0]] == student]  # of several with one text that which the tokenizer writes
    teacher = to[0][student]
    found = [torch.full((size,), other, device="cpu") for size, other in zip(sizes, reversed(sizes), strict=True)]
    found[0][student], found[1][teacher] = teacher, student
    return Partners(*(synchronized(one.to(device)) for one in (student, teacher, *found)))


def are_partners(chunks: Chunks, known: Partners) -> Tensor:
    """bool [K]: the chunk is one token on both sides, and these are partners."""
    student, teacher = chunks.student, chunks.teacher
    is_exact = known.of_student[student.realised[student.start]] == teacher.realised[teacher.start]
    return (student.count == 1) & (teacher.count == 1) & is_exact


def _single_pieces(side: Side, size: int) -> Tensor:
    """int64 [V]: the only piece of each token, `size` where it has more or none."""
    if not len(side.pieces):
        return torch.full((len(side.event),), size, device="cpu")
    first = side.pieces[side.ptr[:-1].long().clamp_max(len(side.pieces) - 1)].long()
    return torch.where(side.ptr.diff() == 1, first, size)


# --- events


@kept
def _is_comparable(pieces: Tensor) -> bool:
    """Whether both sides have several events, or tokens of several pieces; or one token, of which nothing is asked."""
    both = sides(pieces.cpu())
    shared = torch.isin(both[0].event.unique(), both[1].event)
    several = any(int(side.ptr.diff().max()) > 1 for side in both if len(side.event))
    return int(shared.sum()) > 1 or (bool(shared.any()) and (several or max(len(side.event) for side in both) == 1))


@kept
def _events(pieces: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [V_student], [V_teacher]: the event of each token at the start of a chunk, on a device."""
    student, teacher = (synchronized(side.event.to(device).long()) for side in sides(pieces.cpu()))
    return student, teacher


def event_log_mass(logits: Tensor, events: Tensor, count: int) -> Tensor:
    """[n, count]: logsumexp of the logits [n, V] over the tokens of each event [n, V] below count; -inf for none."""
    top = logits.new_zeros(len(logits), count + 1).scatter_reduce(
        1, events, logits.detach(), "amax", include_self=False
    )
    mass = torch.zeros_like(top).scatter_add(1, events, (logits - top.gather(1, events)).exp())
    return (mass.masked_fill(mass == 0, 1).log() + top).masked_fill(mass == 0, -torch.inf)[:, :count]


@torch.no_grad()
def event_agreement(
    student_logits: Tensor, teacher_logits: Tensor, events: tuple[Tensor, Tensor], count: int
) -> Tensor:
    """bool [K]: of ``count`` events the same is the most probable, for each pair of rows.

    Parameters
    ----------
    student_logits : [K, V_student]
    teacher_logits : [K, V_teacher]
    events : int64 [V_student], [V_teacher]
        The event of each token.
    """
    dtype = statistics_dtype(student_logits, teacher_logits)
    best = []
    for logits, event in zip((student_logits, teacher_logits), events, strict=True):
        z = scaled(logits[:, : len(event)], 1.0, dtype)
        best.append(event_log_mass(z, event.expand(len(z), -1), count).argmax(-1))
    return best[0] == best[1]
