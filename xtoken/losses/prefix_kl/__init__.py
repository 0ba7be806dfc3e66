"""Prefix KL: the chain rule over the boundaries of a chunk, on events that both vocabularies know.

A teacher that reads "95" as "9", "5" says at its first row only how likely a "9" is; a student that reads it as one
token says how likely each of "9", "90" ... "99" is. What both can express is the event "the text continues with 9": the
teacher's probability of it is q["9"], the student's the sum over all its tokens that begin so. Prefix KL compares
exactly that, KL(Q || P) over such events, at the start of a chunk; and at each later place where one of the two starts
a token, the probability of what comes next given what came before: for the "5", the teacher's second row with the
student's p["95"] / sum of p over the tokens "9?". Where a student gives every event the teacher's probability, loss
and gradient are zero, and nowhere else. A chunk that the two tokenizers cut so that its first tokens belong to
different events has no term at its start: there each side must write what the other must not.

The events come from `PieceIndex`, the formula is `xtoken.reference.prefix`; docs/design.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args, overload

from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import DivergenceOptions, Losses, Unpack, check_choice, compute, public_loss
from xtoken.losses.divergence import HasDivergence
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits
from xtoken.losses.loss import Needs
from xtoken.losses.on_pieces import OnPieces
from xtoken.losses.operator import register
from xtoken.losses.prefix_kl import formula
from xtoken.pieces import PieceIndex

Weighting = Literal["none", "teacher"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


@register("prefix", "prefix KL", Needs.PIECES)
@dataclass(frozen=True)
class PrefixKL(HasDivergence, OnPieces):
    """See `prefix_kl_loss`."""

    is_default: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"": {}, "numbers": {}})

    temperature: float
    reverse: bool
    beta: float
    skew: float
    weighting: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.weighting, "weighting", WEIGHTINGS)

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        return formula.prefix(student, teacher, chunks, self.pieces, weighting=self.weighting, **self.arguments())

    def left_out(self, chunks: Chunks, events: tuple[Tensor, Tensor]) -> Tensor:
        student, teacher = formula.first_events(chunks, events)
        return student != teacher


class PrefixOptions(DivergenceOptions, total=False):
    """Keyword arguments of `prefix_kl_loss`, beside ``labels``."""

    weighting: Weighting


@overload
def prefix_kl_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: None = None, **options: Unpack[PrefixOptions],
) -> Tensor: ...  # fmt: skip
@overload
def prefix_kl_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, pieces: PieceIndex, *,
    labels: Tensor, **options: Unpack[PrefixOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@public_loss
def prefix_kl_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    pieces: PieceIndex,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    beta: float = 0.0,
    skew: float = 0.0,
    weighting: Weighting = "none",
    **call: Any,
) -> Losses:
    """Prefix KL: KL(teacher || student) at every boundary of a chunk, on events that both vocabularies know.

    The formula is that of `xtoken.reference.prefix`.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment}
        With its token ids: which terms a chunk has follows from them.
    {pieces, labels}
    temperature : float
        At every boundary the events' probabilities are raised to 1 / temperature and normalised (not the tokens', of
        which some events have more than others); the loss is multiplied by its square.
    {reverse, beta, skew}
    weighting : "none" or "teacher"
        "teacher" multiplies the term of each boundary inside the chunk by the teacher's probability of what the text
        has before it, a constant: so the loss is the KL of the whole chunk along the text, and a text that the teacher
        finds unlikely teaches little. "none" leaves them as they are.
    {reduction, inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Examples
    --------
    The student has the tokens "95" and "99", the teacher writes digits. Their probabilities agree:

    >>> import torch, xtoken
    >>> from xtoken import Vocabulary
    >>> pieces = xtoken.PieceIndex.build(Vocabulary([b"5", b"9", b"95", b"99"]), Vocabulary([b"5", b"9"]))
    >>> chunk = xtoken.Alignment([[1, 2, 1, 3]], student_ids=[0, 2], teacher_ids=[0, 1, 0])  # "95" against "9", "5"
    >>> student = torch.tensor([0.4, 0.0, 0.6 * 0.7, 0.6 * 0.3]).log().repeat(2, 1)
    >>> teacher = torch.tensor([[0.4, 0.6], [0.7, 0.3], [0.5, 0.5]]).log()
    >>> f"{xtoken.prefix_kl_loss(student, teacher, chunk, pieces).abs():.4f}"
    '0.0000'
    """
    loss = PrefixKL.of(
        None, pieces, temperature=temperature, reverse=reverse, beta=beta, skew=skew, weighting=weighting
    )
    return compute(loss, student_logits, teacher_logits, alignment, sizes=pieces.shape, **call)


linear_prefix_kl_loss = linear(prefix_kl_loss)
