"""Losses of logits whose positions lie on several processes, against one process that has them all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparer import assert_close
from harness import OPERATIONS, Case, compare, few_variants, losses_and_grad, variants
from parts import BIAS, HIDDEN, IN_PARTS, LABELS, LAYER, case_of, common_alone, counted, kept, leaf, said
from processes import on_two_and_four
from torch import Tensor

from xtoken.losses import Needs, registered
from xtoken.parallel import call

LENGTH = 16
"""Positions of both sides; those beyond the text belong to no chunk."""


@functools.cache
def long_case(name: str) -> Case:
    """The case of a loss, with as many positions on both sides as several layouts need."""
    case = case_of(name)
    generator = torch.Generator().manual_seed(5)
    sides = []
    for logits in (case.student, case.teacher):
        samples, length, size = logits.shape
        more = torch.randn(samples, LENGTH - length, size, generator=generator, dtype=torch.float64)
        sides.append(torch.cat([logits, more], 1))
    return Case(sides[0], sides[1], case.alignment, case.projection)


def zigzag(count: int) -> list[list[int]]:
    half = LENGTH // (2 * count)
    both = [(rank, 2 * count - 1 - rank) for rank in range(count)]
    return [[half * part + k for part in parts for k in range(half)] for parts in both]


def contiguous(*ends: int) -> list[list[int]]:
    return [list(range(start, end)) for start, end in zip((0, *ends), (*ends, LENGTH), strict=True)]


LAYOUTS: dict[str, tuple[str, list[list[int]], list[list[int]]]] = {
    "contiguous": ("contiguous", contiguous(5), contiguous(6)),
    "contiguous, a chunk cut on both sides": ("contiguous", contiguous(7), contiguous(5)),
    "an empty rank": ("contiguous", contiguous(0), contiguous(9)),
    "zigzag": ("zigzag", zigzag(2), zigzag(2)),
    "four, zigzag": ("zigzag", zigzag(4), zigzag(4)),
}
"""The argument, and the positions that the ranks have of student and teacher."""


@dataclass(frozen=True)
class Try:
    """A call whose losses and gradients are compared; `columns` are also cut, over two groups of half of the ranks."""

    name: str
    layout: str
    options: dict[str, Any] = field(default_factory=dict)
    columns: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def world(self) -> int:
        return len(LAYOUTS[self.layout][1]) * (1 + self.columns)

    def __str__(self) -> str:
        return f"{self.name}, {self.options}, {self.layout}{', columns too' * self.columns}, {str(self.dtype)[6:]}"

    def own(self, rank: int) -> Case:
        case, (_, *positions) = long_case(self.name), LAYOUTS[self.layout]
        parts = [part[rank // (1 + self.columns)] for part in positions]
        sides = [case.student[:, parts[0]], case.teacher[:, parts[1]]]
        if self.columns:
            sides = [x.tensor_split([x.shape[-1] // 3], -1)[rank % 2] for x in sides]
        return Case(sides[0], sides[1], case.alignment, case.projection)

    def run(self, rank: int, groups: dict[str, Any]) -> tuple[Tensor, Tensor]:
        def call(case: Case, *logits: Tensor, **options: Any) -> Tensor:
            losses: Tensor = OPERATIONS[self.name].public(long_case(self.name), *logits, **options)
            return losses

        given = {"cp_group": groups["cp" if self.columns else "all"], "cp_layout": LAYOUTS[self.layout][0]}
        if self.columns:
            given["tp_group"] = groups["tp"]
        return losses_and_grad(call, self.own(rank), self.dtype, reduction="none", **given, **self.options)

    def check(self, results: list[tuple[Tensor, Tensor]]) -> None:
        grads = [grad for _, grad in results]
        if self.columns:
            grads = [torch.cat(grads[k : k + 2], -1) for k in range(0, len(grads), 2)]
        positions = torch.tensor([k for part in LAYOUTS[self.layout][1] for k in part])
        grad = torch.cat(grads, 1)[:, positions.argsort()]
        for losses, _ in results:
            compare(losses, grad, self.name, long_case(self.name), self.dtype, **self.options)


def tries() -> list[Try]:
    found = []
    for name in IN_PARTS:
        every = [common_alone(name, one) for one in variants(name).values()]
        few = [common_alone(name, one) for one in few_variants(name).values()]
        found += [Try(name, "contiguous", options) for options in every]
        found += [Try(name, layout, few[0]) for layout in LAYOUTS if layout != "contiguous"]
        found += [Try(name, "zigzag", options, columns=True) for options in every[:3]]
        found += [Try(name, "zigzag", few[-1], dtype=torch.bfloat16)]
    return found


TRIES = {str(one): one for one in tries()}


def run_all(world: int, rank: int) -> dict[str, Any]:
    groups = {"all": dist.group.WORLD}
    for name, members in (("tp", [[0, 1], [2, 3]]), ("cp", [[0, 2], [1, 3]])) if world == 4 else ():
        made = [dist.new_group(ranks) for ranks in members]
        groups[name] = next(group for group, ranks in zip(made, members, strict=True) if rank in ranks)
    found: dict[str, Any] = {key: one.run(rank, groups) for key, one in TRIES.items() if one.world == world}
    if world == 4:
        one = next(one for one in TRIES.values() if one.columns)
        own = one.own(rank)
        own = Case(own.student[..., rank == 3 :], own.teacher, own.alignment, own.projection)
        given = {"tp_group": groups["tp"], "cp_group": groups["cp"], "cp_layout": "zigzag"}
        found["narrow"] = said(lambda: OPERATIONS[one.name].public(own, own.student, own.teacher, **given))
    if world == 2:
        for name, more in MORE.items():
            found[name] = more(rank)
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return on_two_and_four(run_all, tmp_path_factory)


@pytest.mark.parametrize("key", TRIES)
def test_is_the_loss_of_one_process(key: str, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    one = TRIES[key]
    one.check([found[key] for found in of_ranks[one.world]])


def test_chunks_lie_on_several_ranks() -> None:
    """In every layout: on how many ranks their rows of student and teacher are, and whether on the same."""
    kinds: dict[str, set[tuple[int, int, bool]]] = {}
    for layout, (_, *positions) in LAYOUTS.items():
        kinds[layout] = set()
        for a, b, c, d in long_case(IN_PARTS[0]).alignment.spans.tolist():
            if min(a, c) > 0:
                ranks = [
                    frozenset(k for k, part in enumerate(parts) for row in range(start - 1, end - 1) if row in part)
                    for parts, start, end in zip(positions, (a, c), (b, d), strict=True)
                ]
                kinds[layout].add((len(ranks[0]), len(ranks[1]), ranks[0] == ranks[1]))
    assert all((2, 1, False) in kinds[layout] for layout in ("contiguous", "zigzag", "four, zigzag"))
    assert set().union(*kinds.values()) >= {(1, 1, True), (1, 1, False), (1, 2, False), (2, 2, True)}


MORE: dict[str, Callable[[int], Any]] = {}
"""More that two ranks do, by name."""


def on_two_ranks(function: Callable[[int], Any]) -> Callable[[int], Any]:
    MORE[function.__name__] = function
    return function


ZIGZAG = zigzag(2)
WITH_LAYER = ("zigzag", "an empty rank")
LONG_HIDDEN = torch.cat([HIDDEN, HIDDEN[:, : LENGTH - HIDDEN.shape[1]]], 1)
LONG_LABELS = torch.cat([LABELS, LABELS[:, : LENGTH - LABELS.shape[1]]], 1)


def layer_loss(name: str, part: list[int], teacher: Tensor, **options: Any) -> list[Tensor]:
    """Loss, cross-entropy and gradients of hidden states, output layer and bias."""
    size = OPERATIONS[name].size(long_case(name))
    leaves = [leaf(LONG_HIDDEN[:, part]), leaf(LAYER[:size]), leaf(BIAS[:size])]
    function = OPERATIONS[name].bound(long_case(name), linear=True)
    few = common_alone(name, {})
    loss, entropy = function(
        *leaves[:2], teacher, bias=leaves[2], labels=LONG_LABELS, temperature=2.0, **few, **options
    )
    return [loss.detach(), entropy.detach(), *torch.autograd.grad(loss + 0.7 * entropy, leaves)]


@on_two_ranks
def output_layers(rank: int) -> dict[tuple[str, str], list[Tensor]]:
    found = {}
    for layout in WITH_LAYER:
        argument, own, theirs = LAYOUTS[layout]
        options = {"cp_group": dist.group.WORLD, "cp_layout": argument}
        for name in IN_PARTS:
            teacher = long_case(name).teacher[:, theirs[rank]].float()
            found[name, layout] = layer_loss(name, own[rank], teacher, **options)
    return found


@pytest.mark.parametrize("layout", WITH_LAYER)
@pytest.mark.parametrize("name", IN_PARTS)
def test_output_layer_with_labels(name: str, layout: str, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    """Normalisers are those of the whole sequences; gradients of the output layer add up."""
    want = layer_loss(name, list(range(LENGTH)), long_case(name).teacher.float(), backend="reference")
    found = [one["output_layers"][name, layout] for one in of_ranks[2]]
    for got, part in zip(found, LAYOUTS[layout][1], strict=True):
        for k in range(2):
            assert_close(got[k], want[k], rtol=1e-5)
        assert_close(got[2], want[2][:, part], rtol=1e-5, atol=2e-6)
    for k in (3, 4):
        assert_close(found[0][k] + found[1][k], want[k], rtol=1e-5, atol=3e-6)


@on_two_ranks
def traffic(rank: int) -> dict[tuple[str, str], list[tuple[int, int, int]]]:
    """Bytes of calls and their backward, what the formula says of them, and how many chunks several ranks have."""
    found: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for name in IN_PARTS:
        for layout in ("contiguous", "zigzag"):
            found[name, layout] = []
            for options in (variants if layout == "contiguous" else few_variants)(name).values():
                of_all = {"top_k": None} if "top_k" in registered()[name].options() else {}
                one = Try(name, layout, common_alone(name, {**options, **of_all}))
                own, given = one.own(rank), {"cp_group": dist.group.WORLD, "cp_layout": LAYOUTS[layout][0]}
                student = leaf(own.student.float())
                with counted() as sent, kept(call, "share") as shares, kept(call, "_formula") as formulas:
                    loss = OPERATIONS[name].public(
                        long_case(name), student, own.teacher.float(), **given, **one.options
                    )
                    loss.backward()
                split = shares[-1].split  # none, where there is no formula
                said = 8 + 4 * sum(one.across(split) for one in formulas)  # and the sum of all chunks, in float64
                found[name, layout].append((sum(sent), said, len(split)))
    return found


@pytest.mark.parametrize("name", IN_PARTS)
def test_what_is_reduced(name: str, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    for found in of_ranks[2]:
        for layout in ("contiguous", "zigzag"):
            for got, want, chunks in found["traffic"][name, layout]:
                assert got == want
                assert (want > 8) == (chunks > 0)
            is_split = layout == "contiguous" or registered()[name].needs is not Needs.SAME_TOKENIZER
            assert any(chunks for _, _, chunks in found["traffic"][name, layout]) == is_split


MASK = torch.arange(2 * LENGTH).view(2, LENGTH) % 3 > 0
WITHOUT = [name for name in IN_PARTS if OPERATIONS[name].needs is Needs.SAME_TOKENIZER]


@on_two_ranks
def positions_alone(rank: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for name in WITHOUT:
        student, teacher = (x[:, ZIGZAG[rank]].float() for x in (long_case(name).student, long_case(name).teacher))
        student = leaf(student)
        options = {"mask": MASK, "cp_group": dist.group.WORLD, "cp_layout": "zigzag"}
        loss = OPERATIONS[name].function()(student, teacher, **options)
        loss.backward()
        assert student.grad is not None
        found.append((loss.detach(), student.grad))
    return found


def test_positions_without_an_alignment(of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    assert WITHOUT
    for k, name in enumerate(WITHOUT):
        student, teacher = leaf(long_case(name).student.float()), long_case(name).teacher.float()
        want = OPERATIONS[name].function()(student, teacher, mask=MASK, backend="reference")
        want.backward()
        for found, part in zip(of_ranks[2], ZIGZAG, strict=True):
            loss, grad = found["positions_alone"][k]
            assert_close(loss, want, rtol=1e-5)
            assert_close(grad, student.grad[:, part], rtol=1e-5, atol=1e-7)


def at_a_chunk(name: str) -> tuple[int, int]:
    """A row of each side before which all rows of some chunks are, and after which those of all others."""
    spans = OPERATIONS[name].arguments(long_case(name))[0].spans
    start = spans[len(spans) // 4]
    return int(start[0]) - 1, int(start[2]) - 1


@on_two_ranks
def every_loss(rank: int) -> dict[str, Any]:
    """Cut between chunks, where no loss needs a formula for parts; and within them."""
    found: dict[str, Any] = {}
    for name in registered():
        case, ends = long_case(name), at_a_chunk(name)
        parts = [contiguous(end)[rank] for end in ends]
        student, teacher = leaf(case.student[:, parts[0]].float()), case.teacher[:, parts[1]].float()
        loss = OPERATIONS[name].public(case, student, teacher, cp_group=dist.group.WORLD)
        loss.backward()
        found[name] = loss.detach(), student.grad
        parts = [contiguous(6)[rank], contiguous(9)[rank]]
        own = case.student[:, parts[0]], case.teacher[:, parts[1]]
        found[f"{name} within"] = said(
            lambda name=name, case=case, own=own: OPERATIONS[name].public(case, *own, cp_group=dist.group.WORLD)
        )
    case, part = long_case(IN_PARTS[0]), slice(0, 5 + 2 * rank)
    sides = case.student[:, part], case.teacher[:, part]
    found["zigzag"] = said(
        lambda: OPERATIONS[IN_PARTS[0]].public(case, *sides, cp_group=dist.group.WORLD, cp_layout="zigzag")
    )
    return found


@pytest.mark.parametrize("name", registered())
def test_every_loss_takes_chunks_that_lie_on_one_rank(name: str, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    case, end = long_case(name), at_a_chunk(name)[0]
    student = leaf(case.student.float())
    want = OPERATIONS[name].public(case, student, case.teacher.float())
    want.backward()
    for found, part in zip(of_ranks[2], (slice(0, end), slice(end, None)), strict=True):
        loss, grad = found["every_loss"][name]
        assert_close(loss, want, rtol=1e-5)
        assert_close(grad, student.grad[:, part], rtol=1e-5, atol=1e-6)
        said_within = found["every_loss"][f"{name} within"]
        if name not in IN_PARTS:
            expected = f"ValueError: cp_group: expected chunks that each lie on one rank for {registered()[name].title}"
            assert said_within.startswith(expected)
        elif "uncommon_top_k" in registered()[name].options():
            assert said_within.startswith("ValueError: uncommon_top_k: expected 0 (the common part alone)")
        else:
            assert said_within == "nothing"


def test_an_error_of_one_rank_is_one_of_the_whole_mesh(of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    """Also of those that are in none of its groups."""
    own = "ValueError: student_logits: expected each of the 67 columns of the vocabulary on one rank, got [22, 44]"
    column = "ValueError: columns of student_logits: expected the same on all ranks of cp_group, got 4"
    every = f"RuntimeError: rank 1 of cp_group raised {own}", column, own, column
    for found, expected in zip(of_ranks[4], every, strict=True):
        assert found["narrow"].startswith(expected)


def test_zigzag_needs_equal_parts(of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    for found in of_ranks[2]:
        assert found["every_loss"]["zigzag"].startswith("ValueError: cp_layout: expected the same even number")
