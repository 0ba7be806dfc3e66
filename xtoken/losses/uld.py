"""ULD: L1 between sorted distributions, without any knowledge of the vocabularies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from xtoken import reference
from xtoken.alignment import Alignment
from xtoken.losses._backends import Problem
from xtoken.losses._common import (
    REDUCTIONS,
    aligned_chunks,
    check_choice,
    check_count,
    check_logits,
    check_temperature,
    chunk_losses,
    reduce,
    vocabulary_columns,
)
from xtoken.reference import Chunks


@dataclass(frozen=True)
class UldOptions:
    """The switches of ULD."""

    operation: ClassVar[str] = "uld"
    temperature: float

    def reference(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None) -> Tensor:
        """See `xtoken.reference.uld`."""
        return reference.uld(student, teacher, chunks, temperature=self.temperature)


def uld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alignment: Alignment,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Universal logit distillation: L1 between the two descending-sorted distributions of each chunk.

    The formula is that of `xtoken.reference.uld`. Arguments, results, errors, gradients and memory are as for
    `pkl_loss`, except:

    Parameters
    ----------
    student_vocab_size, teacher_vocab_size : int, optional
        Columns of the logits that belong to tokens. Default: all.

    Source: Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss (arXiv 2402.12030).
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    check_choice(reduction, "reduction", REDUCTIONS)
    check_count(student_vocab_size, "student_vocab_size", optional=True)
    check_count(teacher_vocab_size, "teacher_vocab_size", optional=True)
    student = vocabulary_columns(student_logits, student_vocab_size, "student_logits")
    teacher = vocabulary_columns(teacher_logits, teacher_vocab_size, "teacher_logits")
    chunks = aligned_chunks(alignment, student, teacher)
    problem = Problem(student, teacher, chunks, UldOptions(float(temperature)))
    return reduce(chunk_losses(student_logits, problem, None, backend), chunks, alignment.num_chunks, reduction)
