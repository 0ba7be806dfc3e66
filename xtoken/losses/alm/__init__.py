"""ALM: approximate likelihood matching, on the probabilities of the realised text alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

from xtoken.alignment import Alignment, Chunks
from xtoken.losses.alm import formula
from xtoken.losses.backends import Prepared
from xtoken.losses.call import Losses, Options, Unpack, check_count, check_temperature, compute, documented
from xtoken.losses.linear import linear
from xtoken.losses.logits import AnyLogits, Source
from xtoken.losses.loss import Loss, Needs
from xtoken.losses.operator import Call, register


@register("alm", "ALM", Needs.NOTHING)
@dataclass(frozen=True)
class ALM(Loss):
    """See `alm_loss`."""

    temperature: float
    reverse: bool

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @property
    def realised(self) -> bool:
        return True

    def prepare(self, call: Call, student: Source, teacher: Source) -> Prepared:
        prepared = super().prepare(call, student, teacher)
        prepared.chunks.check_ids((call.student_size, call.teacher_size), several=False)
        return prepared

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        return formula.alm(student, teacher, chunks, temperature=self.temperature, reverse=self.reverse)


class ALMOptions(Options, total=False):
    """Keyword arguments of `alm_loss`, beside ``labels``."""

    reverse: bool
    student_vocab_size: int | None
    teacher_vocab_size: int | None


@overload
def alm_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, *,
    labels: None = None, **options: Unpack[ALMOptions],
) -> Tensor: ...  # fmt: skip
@overload
def alm_loss(
    student_logits: AnyLogits, teacher_logits: AnyLogits, alignment: Alignment, *,
    labels: Tensor, **options: Unpack[ALMOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@documented
def alm_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    reduction: str = "mean",
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    inplace: bool = False,
    backend: str = "auto",
    tp_group: Any = None,
    cp_group: Any = None,
    cp_layout: str = "contiguous",
) -> Losses:
    """Approximate likelihood matching: the KL of "this text or another", teacher against student, for each chunk.

    The formula is `xtoken.losses.alm.formula.alm`. It needs to know nothing of the vocabularies, and looks only at the
    probabilities of the chunk's own tokens, not at what else could have stood there.

    Parameters
    ----------
    {student_logits, teacher_logits, alignment}
        With its token ids.
    {labels}
    temperature : float
        Likelihoods are raised to the power of its inverse; the loss is multiplied by its square.
    reverse : bool
        KL(student || teacher).
    {reduction}
    student_vocab_size, teacher_vocab_size : int, optional
        Columns of the logits that belong to tokens. Default: all. Needed for `TopKLogits`.
    {inplace, backend, tp_group, cp_group, cp_layout}

    {results}

    Source: tokenkit; Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching (arXiv 2503.20083).
    """
    sizes = student_vocab_size, teacher_vocab_size
    for size, name in zip(sizes, ("student_vocab_size", "teacher_vocab_size"), strict=True):
        check_count(size, name, optional=True)
    return compute(
        ALM(temperature, reverse), student_logits, teacher_logits, alignment,
        labels=labels, sizes=sizes, reduction=reduction, inplace=inplace, backend=backend,
        groups=(tp_group, cp_group, cp_layout),
    )  # fmt: skip


linear_alm_loss = linear(alm_loss)
