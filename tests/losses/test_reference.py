"""What the formulas are made of, against dense matrices and sums written out."""

import pytest
import torch
from comparer import assert_close
from harness import OPERATIONS, make_case, make_projection

from xtoken import ProjectionMatrix, reference
from xtoken.alignment import Alignment
from xtoken.reference import Chunks, Rows


def dense(projection: ProjectionMatrix) -> torch.Tensor:
    matrix = torch.zeros(projection.shape, dtype=torch.float64)
    for student_id in range(projection.shape[0]):
        ids, weights = projection.row(student_id)
        matrix[student_id, ids.long()] = weights.double()
    return matrix


def test_rows() -> None:
    rows = Rows(torch.tensor([5, 0, 9]), torch.tensor([1, 3, 2]), torch.arange(12) * 10)
    assert rows.index().tolist() == [5, 0, 1, 2, 9, 10]
    assert rows.owner().tolist() == [0, 1, 1, 1, 2, 2]
    assert rows.first().index().tolist() == [5, 0, 9]
    index, owner = rows.later()
    assert (index.tolist(), owner.tolist()) == ([1, 2, 10], [1, 1, 2])
    values = torch.tensor([[1.0], [2.0], [4.0], [6.0], [1.0], [2.0]])
    assert rows.mean(values).tolist() == [[1.0], [4.0], [1.5]]
    local, taken = rows.block(1, 3)
    assert taken.tolist() == [0, 1, 2, 9, 10]
    assert local.index().tolist() == [0, 1, 2, 3, 4]
    assert local.next_ids is not None
    assert local.next_ids.tolist() == [0, 10, 20, 90, 100]


def test_chunks_of_a_batch() -> None:
    alignment = Alignment(
        [[0, 1, 0, 1], [1, 3, 2, 3], [2, 3, 1, 4], [4, 5, 4, 5]],
        [0, 2, 4],
        [[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]],
        [[30, 31, 32, 33, 34], [40, 41, 42, 43, 44]],
        predicted=[True, True, True, False],
    )
    chunks = Chunks.of(alignment, 6, 5, realised=True)
    assert chunks.used.tolist() == [1, 2]
    assert chunks.student.start.tolist() == [0, 7]
    assert chunks.student.count.tolist() == [2, 1]
    assert chunks.teacher.start.tolist() == [1, 5]
    assert chunks.teacher.count.tolist() == [1, 3]
    assert chunks.student.next_ids is not None
    assert chunks.student.next_ids.tolist() == [11, 12, 13, 14, -1, -1, 21, 22, 23, 24, -1, -1]
    assert chunks.teacher.next_ids is not None
    assert chunks.teacher.next_ids.tolist() == [31, 32, 33, 34, -1, 41, 42, 43, 44, -1]


def test_chunks_beyond_the_logits() -> None:
    with pytest.raises(ValueError, match=r"teacher_logits: .*chunk 0 ends at token 4\), got 3 rows"):
        Chunks.of(Alignment([[1, 2, 1, 4]]), 5, 3)


def test_restrict_and_project() -> None:
    projection = make_projection(31, 23)
    columns = torch.tensor([0, 3, 4, 11, 22])
    entries = reference.restrict(projection, columns)
    p = torch.rand(4, 31, dtype=torch.float64)
    want = p @ dense(projection)[:, columns]
    assert_close(reference.project(p, entries, len(columns)), want, rtol=1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
def test_double_stays_double_and_half_is_widened(name: str) -> None:
    case, formula = make_case(), OPERATIONS[name].formula
    assert formula(case, case.student, case.teacher).dtype == torch.float64
    assert formula(case, case.student.half(), case.teacher.bfloat16()).dtype == torch.float32
