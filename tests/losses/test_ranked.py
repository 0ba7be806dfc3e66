"""What losses on pairs and ranks share: the common pairs, and both parts of the formula."""

import pytest
import torch
from comparer import assert_close
from harness import Golden, golden, make_case

from xtoken import reference
from xtoken.losses import registered
from xtoken.losses.loss import Matrix
from xtoken.losses.ranked import PairedLoss, pairs_of
from xtoken.projection import ProjectionMatrix

PAIRED = {name: loss for name, loss in registered().items() if issubclass(loss, PairedLoss)}


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
    projection.weight.mul_(0.5)
    assert len(pairs_of(W, 0.6, device)[0]) == 0
