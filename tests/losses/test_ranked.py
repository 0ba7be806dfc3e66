"""What losses on pairs and ranks share: the common pairs, both parts of the formula, the sort, the layouts of pairs."""

import functools

import pytest
import torch
from comparer import assert_close
from harness import BACKENDS, OPERATIONS, Case, Golden, check, distinct, golden, make_case

from xtoken import reference
from xtoken.losses import registered
from xtoken.losses.loss import Matrix
from xtoken.losses.ranked import PairedLoss, pairs_of
from xtoken.losses.ranked.cpu import plan_for
from xtoken.projection import ProjectionMatrix

cpu = pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("cpu")])
PAIRED = {name: loss for name, loss in registered().items() if issubclass(loss, PairedLoss)}
RANKED = [name for name in distinct() if registered()[name].kernels == PairedLoss.__module__]
"""With pairs and without any."""
operations = pytest.mark.parametrize("operation", RANKED)


@pytest.mark.parametrize("result", golden(*PAIRED), ids=lambda g: g.fields["file"])
def test_golden_parts(result: Golden) -> None:
    case, fields = result.case(), result.fields
    chunks = reference.Chunks.of(case.alignment, case.student.shape[1], case.teacher.shape[1])
    loss = PAIRED[fields["mode"]]
    min_weight = PAIRED[fields["mode"]].of(case.projection, None, **loss.options()).min_weight  # type: ignore[attr-defined]
    pairs = reference.common_pairs(case.projection, min_weight)
    options = {key: fields[key] for key in ("temperature", "uncommon_top_k", "reverse")}
    common, uncommon = reference.ranked(
        case.student.flatten(0, 1), case.teacher.flatten(0, 1), chunks, pairs, **options
    )
    square = fields["temperature"] ** 2
    assert_close(common.mean() / square, torch.tensor(fields["kl_common"]), rtol=1e-4)
    assert_close(uncommon.mean() / square, torch.tensor(fields["l1_uncommon"]), rtol=1e-4)


def test_common_pairs_by_hand() -> None:
    projection = ProjectionMatrix.from_topk(
        torch.tensor([[4, -1], [4, 1], [1, 2], [4, -1], [3, 0], [-1, -1], [2, 0]]),
        torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.7, 0.3], [1.0, 0.0], [0.55, 0.45], [0.0, 0.0], [0.6, 0.4]]),
        5,
    )
    student, teacher = reference.common_pairs(projection, 1.0)
    assert (student.tolist(), teacher.tolist()) == ([0], [4])
    student, teacher = reference.common_pairs(projection, 0.6)
    assert (student.tolist(), teacher.tolist()) == ([0, 2, 6], [4, 1, 2])
    student, teacher = reference.common_pairs(projection, 0.5)
    assert (student.tolist(), teacher.tolist()) == ([0, 2, 4, 6], [4, 1, 3, 2])


def test_equal_weights_in_a_row_take_the_lower_teacher() -> None:
    projection = ProjectionMatrix.from_topk([[3, 1]], [[0.5, 0.5]], 4)
    assert [ids.tolist() for ids in reference.common_pairs(projection, 0.5)] == [[0], [1]]


def test_pairs_are_kept_until_the_weights_change() -> None:
    projection = make_case().projection
    W, device = Matrix.of(projection), torch.device("cpu")
    first = pairs_of(W, 0.6, device)
    assert pairs_of(W, 0.6, device)[0] is first[0]
    assert len(pairs_of(W, 1.0, device)[0]) < len(first[0])
    projection.weight[: len(projection.weight) // 2].mul_(0.5)
    assert 0 < len(pairs_of(W, 0.6, device)[0]) < len(first[0])


@functools.cache
def wide_case(scale: float) -> Case:
    return make_case(2501, 3203, samples=1, scale=scale, shapes=((1, 1), (1, 1), (2, 3)))


@cpu
@operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 0.02, 2.0])
def test_wide_rows_with_and_without_ties(scale: float, dtype: torch.dtype, operation: str, backend: str) -> None:
    """Thousands of values in few bins are sorted by radix; scale 0 ties all, and the cut falls inside a tie."""
    check(backend, operation, wide_case(scale), dtype, **OPERATIONS[operation].few(700))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([0, 3], [0, 1], r"student_ids: expected ids in 0 ... 2, got 3"),
        ([0, 1], [0, -1], r"teacher_ids: expected ids in 0 ... 3, got -1"),
        ([1, 1], [0, 1], r"student_ids: expected distinct ids, got 1 twice"),
        ([0, 1], [2, 2], r"teacher_ids: expected distinct ids, got 2 twice"),
        ([0], [1, 2], r"teacher_ids: expected 1 ids \(as student_ids\), got 2"),
    ],
)
def test_bad_pairs(student: list[int], teacher: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_for(torch.tensor(student), torch.tensor(teacher), (3, 4))
