"""The formulas themselves, against dense matrices and sums written out."""

import pytest
import torch
from comparer import assert_close, assert_within
from harness import make_case, make_projection

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


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("merge", ["first", "mean", "chain"])
def test_pkl_chunk_by_chunk(merge: str, reverse: bool) -> None:
    case = make_case(17, 13)
    columns = torch.tensor([1, 2, 5, 7, 8, 12])
    tau = 1.7
    chunks = Chunks.of(case.alignment, case.student.shape[1], case.teacher.shape[1], realised=True)
    entries = reference.restrict(case.projection, columns)
    got = reference.pkl(
        case.student.flatten(0, 1),
        case.teacher.flatten(0, 1),
        chunks,
        entries,
        columns,
        temperature=tau,
        merge=merge,
        reverse=reverse,
    )
    matrix = dense(case.projection)[:, columns]
    student_ids, teacher_ids = case.alignment.student_ids, case.alignment.teacher_ids
    assert student_ids is not None
    assert teacher_ids is not None
    want = []
    for k in chunks.used.tolist():
        sample = int(case.alignment.sample_index[k])
        a, b, c, d = case.alignment.spans[k].tolist()
        z, y = case.student[sample, a - 1 : b - 1] / tau, case.teacher[sample, c - 1 : d - 1] / tau
        p, q = z.softmax(-1), y.softmax(-1)
        if merge == "mean":
            x, log_q = p.mean(0) @ matrix, y[:, columns].log_softmax(-1).mean(0)
        else:
            x, log_q = p[0] @ matrix, y[0, columns].log_softmax(-1)
        m = x / (x.sum() + 1e-10)
        log_m = (m + 1e-10).log()
        loss = (m * (log_m - log_q)).sum() if reverse else (log_q.exp() * (log_q - log_m)).sum()
        if merge == "chain":
            c_s = torch.ones((), dtype=torch.float64)
            for row in range(1, b - a):
                c_s = c_s * p[row, student_ids[sample, a + row]]
            c_t = torch.ones((), dtype=torch.float64)
            for row in range(1, d - c):
                c_t = c_t * q[row, teacher_ids[sample, c + row]]
            ahead, behind = (c_s, c_t) if reverse else (c_t, c_s)
            loss = ahead * (loss + ahead.log() - behind.log())
        want.append(tau**2 * loss)
    assert_close(got, torch.stack(want), rtol=1e-9)


def test_chain_is_the_kl_of_the_joint() -> None:
    """Equal first rows leave the later tokens' probabilities alone: c_T log(c_T / c_S)."""
    logits = torch.zeros(3, 2, dtype=torch.float64)
    teacher = logits.clone()
    teacher[1] = torch.tensor([0.8, 0.2]).double().log()
    alignment = Alignment([[1, 3, 1, 3]], None, [0, 1, 0], [0, 1, 0])
    chunks = Chunks.of(alignment, 3, 3, realised=True)
    identity = reference.Entries(torch.arange(2), torch.arange(2), torch.ones(2))
    loss = reference.pkl(logits, teacher, chunks, identity, torch.arange(2), merge="chain")
    assert_close(loss, torch.tensor([0.8]) * torch.tensor([0.8 / 0.5]).log(), rtol=1e-6)


def test_chain_without_ids() -> None:
    chunks = Chunks.of(Alignment([[1, 3, 1, 3]]), 3, 3)
    identity = reference.Entries(torch.arange(2), torch.arange(2), torch.ones(2))
    with pytest.raises(ValueError, match="chunks: merge='chain' needs the realised ids"):
        reference.pkl(torch.zeros(3, 2), torch.zeros(3, 2), chunks, identity, torch.arange(2), merge="chain")


def test_uld_pads_the_shorter_side() -> None:
    case = make_case(7, 11, samples=1, shapes=((1, 1), (1, 1)))
    chunks = Chunks.of(case.alignment, case.student.shape[1], case.teacher.shape[1])
    p = case.student[0, 0].softmax(-1).sort(descending=True).values
    q = case.teacher[0, 0].softmax(-1).sort(descending=True).values
    want = (p - q[:7]).abs().sum() + q[7:].sum()
    assert_close(reference.uld(case.student[0], case.teacher[0], chunks), want[None], rtol=1e-12)


def test_double_stays_double_and_half_is_widened() -> None:
    case = make_case()
    chunks = Chunks.of(case.alignment, case.student.shape[1], case.teacher.shape[1])
    student, teacher = case.student.flatten(0, 1), case.teacher.flatten(0, 1)
    assert reference.uld(student, teacher, chunks).dtype == torch.float64
    assert reference.uld(student.half(), teacher.bfloat16(), chunks).dtype == torch.float32


def test_second_derivatives() -> None:
    """The formulas themselves can be differentiated twice, unlike the losses."""
    case = make_case(5, 4, samples=1, shapes=((1, 1), (2, 1)))
    chunks = Chunks.of(case.alignment, case.student.shape[1], case.teacher.shape[1])
    columns = torch.arange(4)
    entries = reference.restrict(case.projection, columns)

    def loss(student: torch.Tensor) -> torch.Tensor:
        return reference.pkl(student, case.teacher[0], chunks, entries, columns)

    assert torch.autograd.gradgradcheck(loss, case.student[0].requires_grad_())


def test_infinite_logits_are_probability_zero() -> None:
    case = make_case(6, 6, samples=1, shapes=((1, 1), (1, 1)))
    chunks = Chunks.of(case.alignment, case.student.shape[1], case.teacher.shape[1])
    student, teacher = case.student[0].clone(), case.teacher[0].clone()
    student[:, 2] = teacher[:, 2] = -torch.inf
    rest = torch.tensor([0, 1, 3, 4, 5])
    for reverse in (False, True):
        got = reference.kd(student, teacher, chunks, reverse=reverse)
        assert_close(got, reference.kd(student, teacher, chunks, rest, reverse=reverse), rtol=1e-12)
    assert_within(
        reference.uld(student, teacher, chunks),
        reference.uld(student[:, rest], teacher[:, rest], chunks),
        1e-12,
    )
