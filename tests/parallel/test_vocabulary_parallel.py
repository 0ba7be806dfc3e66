"""Losses of logits whose columns lie on several processes, against one process that has them all."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparer import assert_close
from harness import OPERATIONS, Case, compare, few_variants, losses_and_grad, make_projection, variants
from parts import BIAS, HIDDEN, IN_PARTS, LABELS, LAYER, case_of, common_alone, counted, kept, leaf, said
from processes import on_two_and_four
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import xtoken
from xtoken.losses import Needs, registered
from xtoken.losses.backends import kernels_of
from xtoken.parallel import call
from xtoken.parallel.dtensor import DTensor, Replicate, Shard

CUTS: dict[str, tuple[list[float], list[float] | None]] = {
    "whole teacher": ([0.5, 0.5], None),
    "other cut": ([0.3, 0.7], [0.65, 0.35]),
    "empty ranks": ([0.0, 1.0], [1.0, 0.0]),
    "four": ([0.3, 0.0, 0.5, 0.2], [0.1, 0.4, 0.5, 0.0]),
    "four, whole teacher": ([0.25, 0.25, 0.25, 0.25], None),
}
"""Shares of the columns of student and teacher; None: all on every rank."""


def widths(shares: list[float], size: int) -> list[int]:
    """Whole numbers of columns, in these shares, that add up to the size."""
    ends = [round(size * sum(shares[: k + 1])) for k in range(len(shares))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def part(logits: Tensor, shares: list[float] | None, rank: int) -> Tensor:
    return logits if shares is None else logits.split(widths(shares, logits.shape[-1]), -1)[rank]


@dataclass(frozen=True)
class Try:
    """A call whose losses and gradients are compared."""

    name: str
    cut: str
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return len(CUTS[self.cut][0])

    def __str__(self) -> str:
        return f"{self.name}, {self.options}, {self.cut}, {str(self.dtype)[6:]}"

    def run(self, rank: int) -> tuple[Tensor, Tensor]:
        case, (student, teacher) = case_of(self.name), CUTS[self.cut]

        def call(case: Case, *logits: Tensor, **options: Any) -> Tensor:
            losses: Tensor = OPERATIONS[self.name].public(case, *logits, **options)
            return losses

        own = Case(
            part(case.student, student, rank), part(case.teacher, teacher, rank), case.alignment, case.projection
        )
        group = dist.group.WORLD
        return losses_and_grad(call, own, self.dtype, reduction="none", tp_group=group, **self.options)

    def check(self, results: list[tuple[Tensor, Tensor]]) -> None:
        grad = torch.cat([grad for _, grad in results], -1)
        for losses, _ in results:
            compare(losses, grad, self.name, case_of(self.name), self.dtype, **self.options)


def tries() -> list[Try]:
    found = []
    for name in IN_PARTS:
        every = [common_alone(name, one) for one in variants(name).values()]
        few = [common_alone(name, one) for one in few_variants(name).values()]
        found += [Try(name, "other cut", options=options) for options in every]
        found += [Try(name, cut, options=every[0]) for cut in CUTS if cut != "other cut"]
        found += [Try(name, "whole teacher", torch.bfloat16, few[-1]), Try(name, "four", options=few[-1])]
    return found


TRIES = {str(one): one for one in tries()}


def run_all(world: int, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {key: one.run(rank) for key, one in TRIES.items() if one.world == world}
    if world == 2:
        for name, more in MORE.items():
            found[name] = more(rank)
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return on_two_and_four(run_all, tmp_path_factory)


def test_losses_that_have_a_formula_for_parts() -> None:
    fused = {name for name in registered() if kernels_of(name, "cpu")}
    assert fused - set(IN_PARTS) == {name for name in fused if registered()[name].whole_rows}
    assert len(IN_PARTS) >= 5


@pytest.mark.parametrize("key", TRIES)
def test_is_the_loss_of_one_process(key: str, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    one = TRIES[key]
    one.check([found[key] for found in of_ranks[one.world]])


MORE: dict[str, Callable[[int], Any]] = {}
"""More that two ranks do, by name."""


def on_two_ranks(function: Callable[[int], Any]) -> Callable[[int], Any]:
    MORE[function.__name__] = function
    return function


def layer_loss(name: str, parts: slice, teacher: Tensor, **options: Any) -> list[Tensor]:
    """Loss, cross-entropy and gradients of hidden states, output layer and bias."""
    size = OPERATIONS[name].size(case_of(name))
    leaves = [leaf(HIDDEN), leaf(LAYER[:size][parts]), leaf(BIAS[:size][parts])]
    function = OPERATIONS[name].bound(case_of(name), linear=True)
    few = common_alone(name, {})
    loss, entropy = function(
        *leaves[:2], teacher, bias=leaves[2], softcap=9.0, labels=LABELS, temperature=2.0, **few, **options
    )
    return [loss.detach(), entropy.detach(), *torch.autograd.grad(loss + 0.7 * entropy, leaves)]


@on_two_ranks
def output_layers(rank: int) -> dict[str, list[Tensor]]:
    cut = (slice(0, 41), slice(41, None))[rank]
    return {name: layer_loss(name, cut, case_of(name).teacher.float(), tp_group=dist.group.WORLD) for name in IN_PARTS}


@pytest.mark.parametrize("name", IN_PARTS)
def test_output_layer_in_parts_with_labels(name: str, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    want = layer_loss(name, slice(None), case_of(name).teacher.float(), backend="reference")
    found = [one["output_layers"][name] for one in of_ranks[2]]
    for got in found:
        for k in range(3):
            assert_close(got[k], want[k], rtol=1e-5, atol=2e-6)
    for k in (3, 4):
        assert_close(torch.cat([got[k] for got in found]), want[k], rtol=1e-5, atol=2e-6)


class Weights(torch.nn.Module):
    """W with weights to train."""

    def __init__(self, projection: xtoken.ProjectionMatrix) -> None:
        super().__init__()
        self.row_ptr, self.col, self.shape = projection.row_ptr, projection.col, projection.shape
        self.weight = torch.nn.Parameter(projection.weight.clone())


TRAINED = [name for name in IN_PARTS if registered()[name].trains_projection]


def weight_gradient(name: str, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    weights = Weights(case_of(name).projection)
    function = OPERATIONS[name].function()
    function(student, teacher, case_of(name).alignment, weights, top_k=20, **options).backward()
    assert weights.weight.grad is not None
    return weights.weight.grad


@on_two_ranks
def trained_weights(rank: int) -> list[Tensor]:
    found = []
    for name in TRAINED:
        student, teacher = case_of(name).student.float(), case_of(name).teacher.float()
        own = part(student, [0.4, 0.6], rank), part(teacher, [0.6, 0.4], rank)
        found.append(weight_gradient(name, *own, tp_group=dist.group.WORLD))
    return found


def test_weights_of_w_get_their_whole_gradient(of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    assert TRAINED
    for k, name in enumerate(TRAINED):
        want = weight_gradient(name, case_of(name).student.float(), case_of(name).teacher.float(), backend="reference")
        for found in of_ranks[2]:
            assert_close(found["trained_weights"][k], want, rtol=1e-5, atol=1e-6)


REFUSED: dict[str, tuple[Callable[[int], dict[str, Any]], list[str]]] = {
    "one rank's own error": (
        lambda rank: {"reduction": ["mean", "median"][rank]},
        [
            "RuntimeError: rank 1 of tp_group raised ValueError: reduction: expected one of 'mean', 'sum', 'none', got",
            "ValueError: reduction: expected one of 'mean', 'sum', 'none', got 'median'",
        ],
    ),
    "another option": (
        lambda rank: {"temperature": 1.0 + rank},
        [f"ValueError: temperature: expected the same on all ranks of tp_group, got {x} on rank" for x in (1.0, 2.0)],
    ),
    "other labels": (
        lambda rank: {"labels": LABELS + rank},
        ["ValueError: labels: expected the same on all ranks of tp_group, got torch.int64 [2, 14] of checksum"] * 2,
    ),
    "two things, of which the first is told": (
        lambda rank: {"temperature": 1.0 + rank, "reduction": ["mean", "sum"][rank]},
        ["ValueError: temperature: expected the same on all ranks"] * 2,
    ),
    "the group of columns for positions too": (
        lambda rank: {"cp_group": dist.group.WORLD},
        ["ValueError: cp_group: expected no rank of tp_group but this one"] * 2,
    ),
    "another type, where the other group hears of it": (
        lambda rank: {"tp_group": ["x", None][rank], "cp_group": dist.group.WORLD},
        ["TypeError: tp_group: expected a torch", "RuntimeError: rank 0 of cp_group raised TypeError: tp_group"],
    ),
    "labels out of range": (lambda rank: {"labels": LABELS + 9}, ["ValueError: labels: expected token ids in 0"] * 2),
    "inplace": (lambda rank: {"inplace": True}, ["ValueError: inplace: expected False for logits in parts"] * 2),
    "backend": (
        lambda rank: {"backend": "cpu"},
        ["ValueError: backend: expected 'auto' or 'reference' with tp_group, got 'cpu'"] * 2,
    ),
    "no group": (
        lambda rank: {"tp_group": 3},
        ["TypeError: tp_group: expected a torch.distributed.ProcessGroup, got int"] * 2,
    ),
}  # fmt: skip


def linear(size: int, rank: int | None = None, **options: Any) -> xtoken.LinearLogits:
    """Logits of an output layer, or of a rank's half of it."""
    layer = LAYER[:size] if rank is None else LAYER[:size].tensor_split(2)[rank]
    return xtoken.LinearLogits(HIDDEN, layer, **options)


def top_of(logits: Tensor) -> xtoken.TopKLogits:
    values, ids = logits.log_softmax(-1).topk(5)
    return xtoken.TopKLogits(ids, values)


def positions_of(logits: Tensor) -> DTensor:
    """A DTensor whose positions are sharded, which no loss takes."""
    return DTensor.from_local(logits, init_device_mesh("cpu", (2,)), [Shard(1)], run_check=False)


@on_two_ranks
def refused(rank: int) -> dict[str, Any]:
    name, found = IN_PARTS[0], dict[str, Any]()
    case = case_of(name)
    student, teacher = (part(x.float(), [0.5, 0.5], rank) for x in (case.student, case.teacher))
    public = OPERATIONS[name].public
    for key, (options, _) in REFUSED.items():
        given = {"tp_group": dist.group.WORLD, **options(rank)}
        found[key] = said(lambda given=given: public(case, student, teacher, **given))
    group, mesh = dist.group.WORLD, init_device_mesh("cpu", (2,))
    for key, sides in {
        "student in parts and whole": ([student, case.student.float()], [case.teacher.float()] * 2),
        "teacher in parts and whole": ([student] * 2, [teacher, case.teacher.float()]),
        "whole student": ([case.student] * 2, [case.teacher] * 2),
        "too few": ([student[..., :3]] * 2, [teacher] * 2),
        "too few of the teacher": ([student] * 2, [teacher[..., :3]] * 2),
        "teacher whole, and padded on one rank": (
            [student] * 2,
            [torch.nn.functional.pad(case.teacher.float(), (0, more)) for more in (0, 5)],
        ),
        "two shared columns": ([case.student[..., :34], case.student[..., 32:]], [case.teacher] * 2),
        "a column that nobody has": ([case.student[..., :33], case.student[..., 34:]], [case.teacher] * 2),
        "a DTensor and none": ([sharded(rank, case.student, mesh, 2), student], [case.teacher.float()] * 2),
        "more positions": ([student, student[:, :-1]], [case.teacher.float()] * 2),
        "teacher's type": ([student] * 2, [case.teacher.float(), case.teacher.bfloat16()]),
        "teacher's kind": ([student] * 2, [case.teacher.float(), top_of(case.teacher.float())]),
        "teacher's softcap": ([student] * 2, [linear(59, softcap=9.0), linear(59)]),
        "student's scale": ([linear(67, rank), linear(67, rank, logit_scale=2.0)], [case.teacher.float()] * 2),
        "refused DTensor": ([student] * 2, [case.teacher.float(), positions_of(case.teacher)]),
    }.items():
        found[key] = said(lambda sides=sides: public(case, sides[0][rank], sides[1][rank], tp_group=group))
    for other in registered():
        one = case_of(other)
        own = part(one.student.float(), [0.5, 0.5], rank), part(one.teacher.float(), [0.5, 0.5], rank)
        found[other] = said(lambda other=other, own=own: OPERATIONS[other].public(case_of(other), *own, tp_group=group))
        if registered()[other].needs is Needs.SAME_TOKENIZER and other in IN_PARTS:
            function, both = OPERATIONS[other].function(), (one.student.float(), one.student.float().flip(0))
            found["no size"] = [
                said(lambda given=given, function=function: function(*given, tp_group=group))
                for given in (both, (own[0], both[1]), (own[0], own[0].flip(0)))
            ]
            logits = sharded(rank, both[0], mesh, 2), sharded(rank, both[1], mesh, None)
            found["sizes of DTensors"] = function(*logits), function(*both)
    return found


@pytest.mark.parametrize("key", REFUSED)
def test_an_error_of_one_rank_is_one_of_all(key: str, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    for got, want in zip(of_ranks[2], REFUSED[key][1], strict=True):
        assert got["refused"][key].startswith(want)


@pytest.mark.parametrize(
    ("key", "want"),
    [
        (
            "whole student",
            "student_logits: expected each of the 67 columns of the vocabulary on one rank, got [67, 67] on",
        ),
        ("too few", "student_logits: expected each of the 67 columns of the vocabulary on one rank, got [3, 3] on"),
        (
            "too few of the teacher",
            "one rank, or rows of all of them on every rank, got [3, 3] on the ranks of tp_group;",
        ),
        ("student in parts and whole", "student_logits: expected each of the 67 columns"),
        ("teacher in parts and whole", "teacher_logits: expected each of the 59 columns"),
        ("teacher whole, and padded on one rank", "teacher_logits: expected each of the 59 columns"),
        (
            "two shared columns",
            "got [34, 35] on the ranks of tp_group (of padding at the end leave [34, 33]);",
        ),
        ("a column that nobody has", "student_logits: expected each of the 67 columns"),
        ("a DTensor and none", "student_logits: expected the same on all ranks of tp_group"),
        ("more positions", "positions of student_logits: expected the same on all ranks of tp_group, got 1"),
        ("teacher's type", "teacher_logits: expected the same on all ranks"),
        ("teacher's kind", "teacher_logits: expected the same on all ranks"),
        ("teacher's softcap", "teacher_logits: expected the same on all ranks"),
        ("student's scale", "student_logits: expected the same on all ranks"),
        ("refused DTensor", "teacher_logits: expected columns sharded"),
    ],
)
def test_logits_that_do_not_go_together(key: str, want: str, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    for found in of_ranks[2]:
        assert want in found["refused"][key]


def test_one_tokenizer_needs_its_size(of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    """Since whole rows on every rank look like parts of a larger vocabulary; but DTensors say what they are."""
    for found in of_ranks[2]:
        for got in found["refused"]["no size"]:
            assert got.startswith("ValueError: vocab_size: expected the number of tokens with tp_group")
        assert_close(*found["refused"]["sizes of DTensors"], rtol=1e-5)


@pytest.mark.parametrize(
    ("parts", "size"),
    [([76032] * 2, 151665), ([6400] * 8, 50257), ([23, 23, 21], 66)],
    ids=["Qwen2.5", "GPT-2 in Megatron", "as torch cuts 67"],
)
def test_columns_at_the_end_are_padding(parts: list[int], size: int) -> None:
    assert call._are_parts(0, parts, size)
    assert call._are_parts(1, parts, size)


@pytest.mark.parametrize(
    ("parts", "size", "own"),
    [
        ([76032, 76000], 151665, [76032, 75633]),
        ([75968] * 2, 128256, [75968, 52288]),
        ([400, 400, 400], 700, [400, 300, 0]),
    ],
    ids=["uneven", "another vocabulary", "a rank of padding"],
)
def test_more_columns_than_padding_are_refused(parts: list[int], size: int, own: list[int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"(of padding at the end leave {own})")):
        call._are_parts(0, parts, size)
    assert call._are_parts(0, own, size)


@pytest.mark.parametrize("name", registered())
def test_losses_that_need_whole_rows_say_why(name: str, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    for found in of_ranks[2]:
        got, loss = found["refused"][name], registered()[name]
        if name in IN_PARTS and "uncommon_top_k" in loss.options():
            assert got.startswith("ValueError: uncommon_top_k: expected 0 (the common part alone) for logits in parts")
        elif name in IN_PARTS:
            assert got == "nothing"
        else:
            reason = loss.whole_rows or "it has no formula for logits in parts"
            assert got == f"ValueError: tp_group: expected whole rows for {loss.title}: {reason}"


def identical(name: str, size: int, random: bool = False) -> Case:
    """Two vocabularies of the same tokens, and one token to one; or W as in other tests."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 1, 7, size, generator=generator)
    ids = torch.arange(7)[None]
    chunks = [[k, k + 1, k, k + 1] for k in range(7)]
    ones = [[1.0]] * size
    W = xtoken.ProjectionMatrix.from_topk([[k] for k in range(size)], ones, teacher_vocab_size=size)
    return Case(
        student, teacher, xtoken.Alignment(chunks, [0, 7], ids, ids), make_projection(size, size) if random else W
    )


def texts(size: int, step: int = 1) -> xtoken.Vocabulary:
    """So many texts, in one order or, with a step that has no divisor in common with the size, in another."""
    order = [k * step % size for k in range(size)]
    return xtoken.Vocabulary([bytes([97 + k // 676, 97 + k // 26 % 26, 97 + k % 26]) for k in order])


@functools.cache
def pieces_of(size: int, step: int) -> xtoken.PieceIndex:
    return xtoken.PieceIndex.build(texts(size), texts(size, step))


Traffic = tuple[int, int]
"""Bytes of a call and its backward, and what the formula says of them."""


@on_two_ranks
def traffic(rank: int) -> dict[tuple[str, int, bool, bool], Traffic]:
    """By loss, size of the vocabularies, whether the teacher is whole, and whether much crosses."""
    found = {}
    for name in IN_PARTS:
        function, needs = OPERATIONS[name].function(), OPERATIONS[name].needs
        for size, random in ((512, False), (1024, False), (512, True)):
            case = identical(name, size, random)
            index = pieces_of(size, 3 if random else 1)
            pair = {Needs.PROJECTION: [case.projection], Needs.PIECES: [index]}.get(needs, [])
            options = common_alone(name, OPERATIONS[name].few(None))
            if needs is Needs.SAME_TOKENIZER:
                options["vocab_size"] = size
            for shares in (None, [0.6, 0.4] if random else [0.5, 0.5]):
                student, teacher = leaf(part(case.student, [0.5, 0.5], rank)), part(case.teacher, shares, rank)
                with counted() as sent, kept(call, "_formula") as formulas:
                    function(student, teacher, case.alignment, *pair, tp_group=dist.group.WORLD, **options).backward()
                said = 6 * 4 * formulas[-1].exchanged  # chunks with a predictor, float32
                found[name, size, shares is None, random] = sum(sent), said
    return found


@pytest.mark.parametrize("whole", [True, False], ids=["whole teacher", "teacher in parts"])
@pytest.mark.parametrize("name", IN_PARTS)
def test_what_is_reduced(name: str, whole: bool, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    """As the formula says; without what crosses it does not grow with the vocabulary."""
    for found in of_ranks[2]:
        small, large, crossing = (
            found["traffic"][name, size, whole, random] for size, random in ((512, False), (1024, False), (512, True))
        )
        assert 0 < small[0] == large[0] <= 6 * 20 * 4  # no row of 512
        for got, want in (small, large, crossing):
            assert got == want


def test_something_crosses(of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    for name in IN_PARTS:
        small, more = (of_ranks[2][0]["traffic"][name, 512, False, random][0] for random in (False, True))
        assert more > 5 * small


def sharded(rank: int, whole: Tensor, mesh: Any, dimension: int | None) -> Any:
    """A DTensor of which this rank has its part of a dimension, or all."""
    parts = [whole] * 2 if dimension is None else whole.chunk(2, dimension)
    placement = Replicate() if dimension is None else Shard(dimension)
    stride = torch.empty(whole.shape).stride()
    return DTensor.from_local(
        parts[rank].contiguous(), mesh, [placement], run_check=False, shape=whole.shape, stride=stride
    )


@on_two_ranks
def dtensors(rank: int) -> dict[str, Any]:
    mesh, name, found = init_device_mesh("cpu", (2,)), IN_PARTS[0], dict[str, Any]()
    case = case_of(name)
    student, teacher = case.student.float(), case.teacher.float()
    function = OPERATIONS[name].bound(case)
    for key, of_teacher in (
        ("whole tensor", teacher),
        ("whole DTensor", sharded(rank, teacher, mesh, None)),
        ("sharded", sharded(rank, teacher, mesh, 2)),
    ):
        logits = sharded(rank, student, mesh, 2).requires_grad_()
        loss = function(logits, of_teacher)
        (grad,) = torch.autograd.grad(loss, logits)  # torch 2.6 makes it whole before it is a leaf's `grad`
        found[key] = loss.detach(), grad.placements, grad.to_local()
    layer = OPERATIONS[name].bound(case, linear=True)
    leaves = [sharded(rank, HIDDEN, mesh, None), sharded(rank, LAYER, mesh, 0)]
    loss = layer(*(one.requires_grad_() for one in leaves), teacher)
    loss.backward()
    found["layer"] = loss.detach(), *(one.grad.to_local() for one in leaves)
    found["positions"] = said(lambda: function(sharded(rank, student, mesh, 1), teacher))
    found["FSDP"] = said(lambda: layer(HIDDEN, sharded(rank, LAYER, mesh, 0), teacher))
    found["whole student"] = said(lambda: function(student, sharded(rank, teacher, mesh, 2)))
    return found


def test_dtensors_say_what_they_are(of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    name = IN_PARTS[0]
    case, teacher = case_of(name), case_of(name).teacher.float()
    student, hidden, layer = leaf(case.student.float()), leaf(HIDDEN), leaf(LAYER)
    want = OPERATIONS[name].public(case, student, teacher)
    of_layer = OPERATIONS[name].bound(case, linear=True)(hidden, layer, teacher)
    (want + of_layer).backward()
    results = [found["dtensors"] for found in of_ranks[2]]
    for key in ("whole tensor", "whole DTensor", "sharded"):
        for loss, placements, _ in (found[key] for found in results):
            assert_close(loss, want, rtol=1e-5)
            assert placements == (Shard(2),)
        assert_close(torch.cat([found[key][2] for found in results], 2), student.grad, rtol=1e-5, atol=1e-6)
    for found in results:
        assert_close(found["layer"][0], of_layer, rtol=1e-5)
        assert_close(found["layer"][1], hidden.grad, rtol=1e-5, atol=1e-6)
        assert "positions go with cp_group" in found["positions"]
        assert "that of FSDP has the same columns for other samples" in found["FSDP"]
        assert "student_logits: expected sharded columns beside" in found["whole student"]
    assert_close(torch.cat([found["layer"][2] for found in results]), layer.grad, rtol=1e-5, atol=1e-6)


LESS = 61
"""Columns of an output layer without the last tokens, which take no part in the loss."""


def without_last(case: Case) -> Case:
    """The student's logits without columns that W does not use."""
    indices = torch.arange(67)[:, None] % 59
    W = xtoken.ProjectionMatrix.from_topk(indices, (torch.arange(67) < LESS).float()[:, None], 59)
    given = case.alignment
    assert given.student_ids is not None
    alignment = xtoken.Alignment(given.spans, given.offsets, given.student_ids.clamp_max(LESS - 1), given.teacher_ids)
    return Case(case.student[..., :LESS], case.teacher, alignment, W)


@on_two_ranks
def other_widths(rank: int) -> dict[str, Any]:
    name, group, found = IN_PARTS[0], dist.group.WORLD, dict[str, Any]()
    case = case_of(name)
    teacher = case.teacher.float()
    mesh = init_device_mesh("cpu", (2,))

    def result(case: Case, student: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        loss = OPERATIONS[name].public(case, student.requires_grad_(), teacher, **options)
        (grad,) = torch.autograd.grad(loss, student)
        return loss.detach(), grad.to_local() if isinstance(grad, DTensor) else grad

    wide = torch.nn.functional.pad(case.student.float(), (0, 3), value=torch.nan)
    found["padded"] = result(case, sharded(rank, wide, mesh, 2))
    found["padded parts"] = result(case, leaf(wide.chunk(2, -1)[rank]), tp_group=group)
    fewer = without_last(case)
    student = sharded(rank, fewer.student.float(), mesh, 2)
    own = case.student.float(), teacher, case.alignment, fewer.projection
    found["realised"] = said(lambda: OPERATIONS[name].public(Case(*own), student, teacher))
    found["lacking"] = result(fewer, student)
    student = leaf(part(case.student.float(), [0.5, 0.5], rank))
    logits = student * 1.0
    loss = OPERATIONS[name].public(case, logits, teacher, tp_group=group)
    found["again"] = [torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2)]
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    found["second"] = said(lambda: torch.autograd.grad(loss + grad.square().sum(), student, retain_graph=True))
    logits.mul_(2.0)
    found["overwritten"] = said(loss.backward)
    return found


def test_output_layers_wider_and_narrower_than_the_vocabulary(of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    name = IN_PARTS[0]
    whole = case_of(name)
    for key, case, size in (
        ("padded", whole, 67), ("padded parts", whole, 67), ("lacking", without_last(whole), LESS)
    ):  # fmt: skip
        student = leaf(case.student.float())
        want = OPERATIONS[name].public(case, student, case.teacher.float(), backend="reference")
        want.backward()
        results = [found["other_widths"][key] for found in of_ranks[2]]
        for loss, _ in results:
            assert_close(loss, want, rtol=1e-5)
        grad = torch.cat([grad for _, grad in results], -1)
        assert_close(grad[..., :size], student.grad, rtol=1e-5, atol=1e-6)
        assert not bool(grad[..., size:].any())
    for found in of_ranks[2]:
        assert "alignment: expected student ids below 61, the columns of" in found["other_widths"]["realised"]


def test_backward_works_again_unless_the_logits_were_overwritten(of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    for found in of_ranks[2]:
        assert torch.equal(*found["other_widths"]["again"])
        assert "modified by an inplace operation" in found["other_widths"]["overwritten"]
        assert "no second derivative" in found["other_widths"]["second"]


def ordered(name: str) -> xtoken.OrderedLogits:
    """The teacher's logits with its columns where the student has them."""
    case = case_of(name)
    order = (case.pieces if OPERATIONS[name].needs is Needs.PIECES else case.projection).teacher_order()
    return xtoken.OrderedLogits(case.teacher.float()[..., order.tokens], order)


IN_ORDER = [name for name in IN_PARTS if OPERATIONS[name].needs is not Needs.SAME_TOKENIZER]


@on_two_ranks
def orders(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name in IN_ORDER:
        student, teacher = leaf(part(case_of(name).student.float(), [0.5, 0.5], rank)), ordered(name)
        assert isinstance(teacher.logits, Tensor)
        given = xtoken.OrderedLogits(part(teacher.logits, [0.6, 0.4], rank), teacher.order)
        options = common_alone(name, {})
        loss = OPERATIONS[name].public(case_of(name), student, given, tp_group=dist.group.WORLD, **options)
        found[name] = loss.detach(), torch.autograd.grad(loss, student)[0]
    return found


@pytest.mark.parametrize("name", IN_ORDER)
def test_teacher_in_the_order_of_a_pair(name: str, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    case, options = case_of(name), common_alone(name, {})
    student = leaf(case.student.float())
    want = OPERATIONS[name].public(case, student, case.teacher.float(), backend="reference", **options)
    want.backward()
    results = [found["orders"][name] for found in of_ranks[2]]
    for loss, _ in results:
        assert_close(loss, want, rtol=1e-5)
    assert_close(torch.cat([grad for _, grad in results], -1), student.grad, rtol=1e-5, atol=1e-6)
