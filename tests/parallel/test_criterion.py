"""`XTokenLoss` of logits that lie on several processes, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparer import assert_close
from harness import OPERATIONS, Case, make_case
from parts import BIAS, HIDDEN, IN_PARTS, LABELS, LAYER, common_alone, leaf, said
from processes import on_ranks
from torch import Tensor

from xtoken import LinearLogits, XTokenLoss
from xtoken.losses import Needs, registered

CASE = make_case()
SAME = [name for name in IN_PARTS if registered()[name].needs is Needs.SAME_TOKENIZER]
OTHERS = [name for name in IN_PARTS if name not in SAME]


def criterion(case: Case, names: list[str], **options: Any) -> XTokenLoss:
    teachers = [
        OPERATIONS[name].teacher(case, weight=0.5 + k, **common_alone(name, {})) for k, name in enumerate(names)
    ]
    return XTokenLoss(teachers, vocab_size=67, **options)


def of_call(student: Any, leaves: list[Tensor], teachers: list[Tensor | None], names: list[str], **options: Any) -> Any:
    """Total, parts and gradients."""
    loss = criterion(CASE, names, **options)
    alignments = [None if name in SAME else CASE.alignment for name in names]
    total, parts = loss(student, LABELS, teachers, alignments)
    return total.detach(), parts, torch.autograd.grad(total, leaves)


CALLS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "dynamic": (OTHERS, {}),
    "fixed, one tokenizer too": ([*OTHERS[:1], *SAME], {"scaling": "fixed", "kd_weight": 0.3}),
    "no teacher": ([], {}),
}


def teachers_of(names: list[str], columns: slice, rows: slice) -> list[Any]:
    same = CASE.student.float().flip(0)
    every = [same if name in SAME else CASE.teacher.float() for name in names]
    return [one[:, rows, columns if name in SAME else slice(None)] for one, name in zip(every, names, strict=True)]


def student_of(key: str, columns: slice, rows: slice) -> tuple[Any, list[Tensor]]:
    """Logits, or for one of the calls an output layer; and what gets a gradient."""
    if key != "dynamic":
        logits = leaf(CASE.student.float()[:, rows, columns])
        return logits, [logits]
    leaves = [leaf(HIDDEN[:, rows]), leaf(LAYER[columns]), leaf(BIAS[columns])]
    return LinearLogits(leaves[0], leaves[1], leaves[2]), leaves


EVERYTHING = slice(None), slice(None)
COLUMNS = slice(0, 25), slice(25, None)
ROWS = slice(0, 6), slice(6, None)


def on_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    group = dist.group.WORLD
    for key, (names, options) in CALLS.items():
        for cut, given in (("tp", {"tp_group": group}), ("cp", {"cp_group": group})):
            part = (COLUMNS[rank], slice(None)) if cut == "tp" else (slice(None), ROWS[rank])
            student, leaves = student_of(key, *part)
            found[f"{key}, {cut}"] = of_call(student, leaves, teachers_of(names, *part), names, **given, **options)
    logits = leaf(CASE.student.float()[..., COLUMNS[rank]])
    teachers: list[Any] = teachers_of(OTHERS, *EVERYTHING)
    arguments = logits, [logits], teachers, OTHERS
    found["entropy"] = said(lambda: of_call(*arguments, tp_group=group, teacher_weighting="entropy"))
    distrusting = XTokenLoss([OPERATIONS[OTHERS[0]].teacher(CASE, trust_top_k=5)], tp_group=group)
    found["trust"] = said(lambda: distrusting(logits, LABELS, teachers[0], CASE.alignment))
    plain = criterion(CASE, [], tp_group=group)
    compiled = torch.compile(plain, backend="eager")
    # One rank is enough, since it sends what the others do.
    found["compiled"] = [call(logits, LABELS, [], [])[0].detach() for call in (plain, plain if rank else compiled)]
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return on_ranks(2, on_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("cut", ["tp", "cp"])
@pytest.mark.parametrize("key", CALLS)
def test_is_the_criterion_of_one_process(key: str, cut: str, of_ranks: list[dict[str, Any]]) -> None:
    names, options = CALLS[key]
    student, leaves = student_of(key, *EVERYTHING)
    teachers = teachers_of(names, *EVERYTHING)
    total, parts, grads = of_call(student, leaves, teachers, names, backend="reference", **options)
    found = [one[f"{key}, {cut}"] for one in of_ranks]
    for got in found:
        assert_close(got[0], total, rtol=1e-5)
        for name in ("ce", "kd", "scale", "unscaled", "kd_per_teacher", "chunks", "unsupervised", "weights"):
            assert_close(got[1][name].double(), parts[name].double(), rtol=1e-5, what=name)
        assert bool(got[1]["agreement"].isnan().all())
    for k, grad in enumerate(grads):
        ours = [got[2][k] for got in found]
        if cut == "cp":
            grad_of_all = torch.cat(ours, 1) if k == 0 else ours[0] + ours[1]
        else:
            grad_of_all = ours[0] if k == 0 and len(grads) > 1 else torch.cat(ours, -1 if k == 0 else 0)
        assert_close(grad_of_all, grad, rtol=1e-4, atol=1e-6)


def test_what_looks_at_whole_rows_is_refused(of_ranks: list[dict[str, Any]]) -> None:
    for found in of_ranks:
        assert found["entropy"].startswith("ValueError: teacher_weighting: expected 'fixed' for logits in parts")
        assert found["trust"].startswith("ValueError: trust_top_k: expected None for logits in parts, got 5")


def test_breaks_the_graph_of_a_compiled_step(of_ranks: list[dict[str, Any]]) -> None:
    for found in of_ranks:
        assert_close(found["compiled"][1], found["compiled"][0], rtol=1e-6)
