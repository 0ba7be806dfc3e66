"""GOLD and H-KL."""

from typing import Any

import pytest
import torch
from comparer import assert_close
from harness import BAD_INPUTS, CASES, DTYPES, Golden, backends_of, bad_call, check, golden, make_case
from torch import Tensor

from xtoken import gold_loss, hkl_loss, reference, uld_loss
from xtoken.losses.loss import Matrix
from xtoken.losses.ranked import pairs_of
from xtoken.projection import ProjectionMatrix

LOSSES: dict[str, Any] = {"gold": gold_loss, "hkl": hkl_loss}
MIN_WEIGHT = {"gold": 1.0, "hkl": 0.6}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "reverse": {"reverse": True},
    "temperature": {"temperature": 2.5},
    "cut": {"uncommon_top_k": 5},
}
backends = pytest.mark.parametrize("backend", backends_of("gold"))
both = pytest.mark.parametrize("name", LOSSES)


@backends
@pytest.mark.parametrize("result", golden("gold", "hkl"), ids=lambda g: g.fields["file"])
def test_golden(result: Golden, backend: str) -> None:
    case, fields = result.case(), result.fields
    student = case.student.clone().requires_grad_()
    options = {key: fields[key] for key in ("temperature", "uncommon_top_k", "reverse")}
    loss = LOSSES[fields["mode"]](student, case.teacher, case.alignment, case.projection, backend=backend, **options)
    loss.backward()
    assert case.alignment.num_chunks == fields["num_chunks"]
    assert_close(loss, torch.tensor(fields["loss"]), rtol=1e-4, what="loss")
    want = result.tensors["student_grad"]
    assert_close(student.grad, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()), what="gradient")


@pytest.mark.parametrize("result", golden("gold", "hkl"), ids=lambda g: g.fields["file"])
def test_golden_parts(result: Golden) -> None:
    case, fields = result.case(), result.fields
    chunks = reference.Chunks.of(case.alignment, case.student.shape[1], case.teacher.shape[1])
    pairs = reference.common_pairs(case.projection, MIN_WEIGHT[fields["mode"]])
    options = {key: fields[key] for key in ("temperature", "uncommon_top_k", "reverse")}
    common, uncommon = reference.gold(case.student.flatten(0, 1), case.teacher.flatten(0, 1), chunks, pairs, **options)
    square = fields["temperature"] ** 2
    assert_close(common.mean() / square, torch.tensor(fields["kl_common"]), rtol=1e-4)
    assert_close(uncommon.mean() / square, torch.tensor(fields["l1_uncommon"]), rtol=1e-4)


# H-KL is the same kernel with more pairs, so one level of the CPU's has to show it.
@pytest.mark.parametrize(
    ("name", "backend"), [("gold", name) for name in backends_of("gold")] + [("hkl", "reference"), ("hkl", "cpu")]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_hard_inputs(case: str, dtype: torch.dtype, name: str, backend: str) -> None:
    check(backend, name, CASES[case](), dtype)


@backends
@both
@pytest.mark.parametrize("case", ["teacher_below", "infinite"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_options(variant: str, case: str, name: str, backend: str) -> None:
    check(backend, name, CASES[case](), torch.float32, strided=True, **VARIANTS[variant])


@both
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse: bool, name: str) -> None:
    case = make_case(13, 11, samples=1, shapes=((1, 1), (2, 3), (1, 1), (3, 1)))

    def losses(student: Tensor) -> Tensor:
        return LOSSES[name](
            student,
            case.teacher,
            case.alignment,
            case.projection,
            temperature=1.5,
            uncommon_top_k=4,
            reverse=reverse,
            reduction="none",
            backend="reference",
        )

    assert torch.autograd.gradcheck(losses, case.student.requires_grad_(), fast_mode=True)


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


def test_nothing_in_common_is_uld() -> None:
    case = make_case(64, 64, empty_projection=True)
    loss = gold_loss(case.student, case.teacher, case.alignment, case.projection)
    assert_close(loss, uld_loss(case.student, case.teacher, case.alignment), rtol=1e-12)


@both
@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_inputs(bad: str, name: str, never_run: str) -> None:
    call, exception, message = bad_call(bad, never_run)
    with pytest.raises(exception, match=message):
        LOSSES[name](projection=make_case().projection, **call)


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"uncommon_top_k": 0}, ValueError, "uncommon_top_k: expected an integer of at least 1, got 0"),
        ({"uncommon_top_k": None}, ValueError, "uncommon_top_k: expected an integer of at least 1, got None"),
        ({"min_weight": 0.0}, ValueError, r"min_weight: expected a number in \(0, 1\], got 0.0"),
        ({"min_weight": 1.5}, ValueError, r"min_weight: expected a number in \(0, 1\], got 1.5"),
        ({"projection": None}, TypeError, "projection: expected an xtoken.ProjectionMatrix, got NoneType"),
    ],
)
def test_bad_options(options: dict[str, Any], exception: type[Exception], message: str) -> None:
    case = make_case()
    call = {"projection": case.projection, **options}
    with pytest.raises(exception, match=message):
        hkl_loss(case.student, case.teacher, case.alignment, **call)
