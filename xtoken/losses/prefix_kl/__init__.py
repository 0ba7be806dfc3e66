"""Prefix KL: the chain rule over the boundaries of a chunk, on events that both vocabularies know.

A teacher that reads "95" as "9", "5" says at its first row only how likely a "9" is; a student that reads it as one
token says how likely each of "9", "90" ... "99" is. What both speak of is the event "the text goes on with 9": the
teacher's probability of it is q["9"], the student's the sum over all its tokens that begin so. Prefix KL compares
exactly that, KL(Q || P) over such events, at the start of a chunk; and at each later place where one of the two starts
a token, the probability of what comes next given what came before: for the "5", the teacher's second row with the
student's p["95"] / sum of p over the tokens "9?". Where a student gives every event the teacher's probability, loss
and gradient are zero, and nowhere else.

P-KL is least elsewhere: its W splits each student token into weighted pieces (0.9 of "9" and 0.09 of "5" for "95"), so
that a projected student comes near q["9"] only if it prefers tokens whose pieces repeat ("99" over "95"); with
``gamma=0`` that fault goes. And it sees only the first of the teacher's rows in a chunk. Prefix KL has no weights, no
column set and no floor. In ``bench/reproduce.py``, where a teacher cuts numbers otherwise, P-KL exceeds cross-entropy
alone in no form by more than noise, and prefix KL does, on the mean over eight seeds.

The events come from `PieceIndex`, the formula is `xtoken.reference.prefix`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from xtoken import reference
from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import Losses, compute, given_chunks
from xtoken.losses.logits import AnyLogits, Source
from xtoken.losses.operator import PREPARE, Inputs, Prepared, Settings
from xtoken.pieces import PieceIndex


@dataclass(frozen=True)
class PrefixOptions:
    """The piece index and the switches."""

    operation: ClassVar[str] = "prefix"
    pieces: Tensor
    temperature: float
    reverse: bool

    def reference(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None) -> Tensor:
        """See `xtoken.reference.prefix`."""
        return reference.prefix(
            student, teacher, chunks, self.pieces, temperature=self.temperature, reverse=self.reverse
        )


def prefix_kl_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    pieces: PieceIndex,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str = "auto",
) -> Losses:
    """Prefix KL: KL(teacher || student) at every boundary of a chunk, on events that both vocabularies know.

    The formula is that of `xtoken.reference.prefix`. Other arguments, results, errors, gradients and memory are as for
    `pkl_loss`. Backends: "cpu" and "cuda" (fused kernels), and "reference", which "auto" takes on other devices.

    Parameters
    ----------
    alignment : Alignment
        With its token ids: the inner boundaries follow from them.
    pieces : PieceIndex
        Of the student's and the teacher's tokenizer.
    reverse : bool
        KL(student || teacher) at every boundary.

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
    if not isinstance(pieces, PieceIndex):
        raise TypeError(f"pieces: expected an xtoken.PieceIndex, got {type(pieces).__name__}")
    return compute(
        "prefix",
        student_logits,
        teacher_logits,
        alignment,
        sizes=pieces.shape,
        pieces=pieces.data,
        labels=labels,
        reduction=reduction,
        backend=backend,
        inplace=inplace,
        temperature=temperature,
        reverse=reverse,
    )


def _prepare(inputs: Inputs, settings: Settings, student: Source, teacher: Source) -> Prepared:
    assert inputs.pieces is not None
    chunks = given_chunks(inputs, student, teacher, realised=True)
    return Prepared(chunks, PrefixOptions(inputs.pieces, settings.temperature, settings.reverse))


PREPARE["prefix"] = _prepare
