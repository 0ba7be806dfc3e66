"""The ranked losses of the backend "cpu": csrc/losses/ranked."""

from __future__ import annotations

from torch import Tensor

from xtoken import _core
from xtoken.losses.backends import Labels, Problem
from xtoken.losses.cached import kept
from xtoken.losses.cpu import array, run_chunks
from xtoken.losses.ranked import PairedLoss, UnpairedLoss

FUSES_LABELS = False


@kept
def plan_for(student_ids: Tensor, teacher_ids: Tensor, shape: tuple[int, int]) -> _core.Built:
    """The layouts of pairs."""
    students, teachers = shape
    ids = {"student_ids": array(student_ids), "teacher_ids": array(teacher_ids)}
    return _core.build("pairs_plan", {**ids, "students": students, "teachers": teachers})


def run(
    problem: Problem[PairedLoss | UnpairedLoss],
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
    *,
    level: str = "",
) -> Tensor:
    """A KL on the pairs, if the options have any, and the sorted L1; writes every element of `student_grad`.

    Scratch memory is about 3 MB per thread (without pairs: 9 MB) for vocabularies of 150,000, whatever the number of
    rows.
    """
    assert labels is None
    options = problem.options
    shape = problem.student.shape[-1], problem.teacher.shape[-1]
    fields = {**options.fields(), "top_k": 0, "plan": None}
    if isinstance(options, PairedLoss):
        fields.update(top_k=options.uncommon_top_k, plan=plan_for(*options.pairs, shape))
    return run_chunks("ranked", problem, student_grad, scale, level, fields)
