"""The formula of P-KL, against dense matrices and sums written out."""

from typing import Any

import pytest
import torch
from comparer import assert_close
from harness import make_case
from test_reference import dense
from torch import Tensor

from xtoken import reference
from xtoken.alignment import Alignment
from xtoken.reference import Chunks


def mixed(q: Tensor, m: Tensor, floored: Tensor, reverse: bool = False, beta: float = 0.0, skew: float = 0.0) -> Tensor:
    """A divergence from a mixture written out; `floored` is m with the eps of its logarithms."""
    if beta:
        mixture = beta * q + (1 - beta) * floored
        return (beta * q * (q / mixture).log() + (1 - beta) * m * (floored / mixture).log()).sum()
    if reverse:
        return (m * (floored / (skew * floored + (1 - skew) * q)).log()).sum()
    return (q * (q / (skew * q + (1 - skew) * floored)).log()).sum()


@pytest.mark.parametrize(
    "kind", [{}, {"reverse": True}, {"beta": 0.3}, {"skew": 0.1}, {"skew": 0.1, "reverse": True}], ids=str
)
@pytest.mark.parametrize("merge", ["first", "mean", "chain"])
def test_chunk_by_chunk(merge: str, kind: dict[str, Any]) -> None:
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
        **kind,
    )
    reverse = kind.get("reverse", False)
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
        c_s = c_t = torch.ones((), dtype=torch.float64)
        if merge == "chain":
            for row in range(1, b - a):
                c_s = c_s * p[row, student_ids[sample, a + row]]
            for row in range(1, d - c):
                c_t = c_t * q[row, teacher_ids[sample, c + row]]
            ahead, behind = (c_s, c_t) if reverse else (c_t, c_s)
            loss = ahead * (loss + ahead.log() - behind.log())
        if "beta" in kind or "skew" in kind:
            loss = mixed(c_t * log_q.exp(), c_s * m, c_s * (m + 1e-10), **kind)
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


def test_second_derivatives() -> None:
    """The formulas themselves can be differentiated twice, unlike the losses."""
    case = make_case(5, 4, samples=1, shapes=((1, 1), (2, 1)))
    chunks = Chunks.of(case.alignment, case.student.shape[1], case.teacher.shape[1])
    columns = torch.arange(4)
    entries = reference.restrict(case.projection, columns)

    def loss(student: torch.Tensor) -> torch.Tensor:
        return reference.pkl(student, case.teacher[0], chunks, entries, columns)

    assert torch.autograd.gradgradcheck(loss, case.student[0].requires_grad_())
