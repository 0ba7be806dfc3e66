"""NeMo v6: a KL over events that both sides can write, and all the rest as one more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import Losses, Options, Unpack, compute, public_loss
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Needs
from xtoken.losses.nemo_events import formula
from xtoken.losses.numerics import check_temperature
from xtoken.losses.on_pieces import OnTokens, partners
from xtoken.losses.operator import register
from xtoken.pieces import PieceIndex


@register("nemo_events", "NeMo v6", Needs.PIECES)
@dataclass(frozen=True)
class NeMoEvents(OnTokens):
    """See `nemo_events_loss`."""

    temperature: float
    reverse: bool

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        device = student.device
        return formula.nemo_events(
            student, teacher, chunks, partners(self.pieces, device), formula.spelled(self.pieces, device),
            temperature=self.temperature, reverse=self.reverse,
        )  # fmt: skip


class NeMoEventsOptions(Options, total=False):
    """Keyword arguments of `nemo_events_loss`, beside ``labels``."""

    reverse: bool


@overload
def nemo_events_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: None = None, **options: Unpack[NeMoEventsOptions],
) -> Tensor: ...  # fmt: skip
@overload
def nemo_events_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: Tensor, **options: Unpack[NeMoEventsOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def nemo_events_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    pieces: PieceIndex,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    **call: Any,
) -> Losses:
    """KL over events that both sides can write, and all the rest as one more event, nothing renormalised.

    The formula, and what of it is this library's reading, is in `xtoken.losses.nemo_events.formula.nemo_events`.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment}
        With its token ids.
    {pieces, labels, temperature}
    {reverse, reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: draft of NVIDIA NeMo-RL, pull request 4177.
    """
    loss = NeMoEvents.of(None, pieces, temperature=temperature, reverse=reverse)
    return compute(loss, student_logits, teacher_logits, alignment, sizes=pieces.shape, **call)


linear_nemo_events_loss = linear(nemo_events_loss)
