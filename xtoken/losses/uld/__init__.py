"""ULD: L1 between sorted distributions, without any knowledge of the vocabularies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from xtoken import reference
from xtoken.alignment import Alignment, Chunks
from xtoken.losses.call import Losses, check_count, compute, given_chunks
from xtoken.losses.logits import AnyLogits, Source
from xtoken.losses.operator import PREPARE, Inputs, Prepared, Settings


@dataclass(frozen=True)
class UldOptions:
    """The switches of ULD."""

    operation: ClassVar[str] = "uld"
    temperature: float

    def reference(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None) -> Tensor:
        """See `xtoken.reference.uld`."""
        return reference.uld(student, teacher, chunks, temperature=self.temperature)


def uld_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> Losses:
    """Universal logit distillation: L1 between the two descending-sorted distributions of each chunk.

    The formula is that of `xtoken.reference.uld`. Arguments, results, errors, gradients and memory are as for
    `pkl_loss`, except:

    Parameters
    ----------
    student_vocab_size, teacher_vocab_size : int, optional
        Columns of the logits that belong to tokens. Default: all. Needed for `TopKLogits`.

    Source: Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss (arXiv 2402.12030).
    """
    check_count(student_vocab_size, "student_vocab_size", optional=True)
    check_count(teacher_vocab_size, "teacher_vocab_size", optional=True)
    return compute(
        "uld",
        student_logits,
        teacher_logits,
        alignment,
        sizes=(student_vocab_size, teacher_vocab_size),
        labels=labels,
        reduction=reduction,
        backend=backend,
        inplace=inplace,
        temperature=temperature,
    )


def _prepare(inputs: Inputs, settings: Settings, student: Source, teacher: Source) -> Prepared:
    return Prepared(given_chunks(inputs, student, teacher), UldOptions(settings.temperature))


PREPARE["uld"] = _prepare
