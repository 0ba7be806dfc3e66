"""Launchers by name, of both modules: what a caller is told whose fields do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

from xtoken import _core
from xtoken.losses.cpu import array

needs_emulator = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
modules = pytest.mark.parametrize("module", ["cpu", pytest.param("cuda", marks=needs_emulator)])


def launcher(module: str) -> Callable[[str, dict[str, Any]], None]:
    """The module's `launch`; CUDA's on the emulator."""
    if module == "cpu":
        return lambda name, fields: _core.launch(name, fields, "", 1)
    return lambda name, fields: emulated.load()[0].launch(name, fields, 1, 32, 0, 0)


def good_fields(module: str) -> dict[str, Any]:
    """Those of "cross_entropy" for logits [1, 2, 5] without labels."""
    labels = {"ids": None, "scale": None, "losses": None}
    fields = {"student": array(torch.zeros(1, 2, 5)), "grad": None, "labels": labels, "lowest": -1e4, "add": False}
    return fields if module == "cpu" else {**fields, "factor": None, "skip": None}


def given(value: Any) -> Any:
    """A value of a test as a field: tensors become arrays."""
    if isinstance(value, dict):
        return {name: given(part) for name, part in value.items()}
    return array(value) if isinstance(value, Tensor) else value


@modules
def test_fields_that_fit(module: str) -> None:
    launcher(module)("cross_entropy", good_fields(module))
    launcher(module)("cross_entropy", {**good_fields(module), "lowest": -10000})  # a whole number is a number


@modules
def test_unknown_launcher(module: str) -> None:
    with pytest.raises(ValueError, match=r"launcher: expected 'cross_entropy', .* or '\w+', got 'nothing'"):
        launcher(module)("nothing", {})


@modules
def test_missing_field(module: str) -> None:
    fields = good_fields(module)
    del fields["labels"]["scale"]
    message = (
        r"cross_entropy\.labels\.scale: missing \(\[\] factor of the gradient softmax\(z\) - onehot; null: no labels"
    )
    with pytest.raises(ValueError, match=message):
        launcher(module)("cross_entropy", fields)
    del fields["grad"]
    with pytest.raises(
        ValueError, match=r"cross_entropy\.grad: missing \(as student, perhaps wider; null: losses only"
    ):
        launcher(module)("cross_entropy", fields)


@modules
def test_unknown_field(module: str) -> None:
    with pytest.raises(ValueError, match=r"cross_entropy\.top_k: expected 'student', .* or '\w+'"):
        launcher(module)("cross_entropy", {**good_fields(module), "top_k": 3})
    fields = good_fields(module)
    fields["labels"]["weights"] = None
    with pytest.raises(ValueError, match=r"cross_entropy\.labels\.weights: expected 'ids', 'scale' or 'losses'"):
        launcher(module)("cross_entropy", fields)


NO_LABELS = {"ids": None, "scale": None, "losses": None}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"student": torch.zeros(2, 5)}, r"student: expected three dimensions of 'float32', .*, got float32 \[2, 5\]"),
    ({"student": torch.zeros(1, 2, 5).double()}, r"student: expected .* or 'float16', .*, got float64 \[1, 2, 5\]"),
    ({"student": torch.zeros(1, 2, 5, 2)[..., 0]}, r"student: expected .*, rows without gaps .* \[1, 2, 5\] with gaps"),
    ({"student": None}, r"student: expected three dimensions .*, got None"),
    ({"labels": {**NO_LABELS, "ids": torch.zeros(3).int()}}, r"labels\.ids: expected int64 .*, got int32 \[3\]"),
    ({"labels": {**NO_LABELS, "ids": torch.zeros(3, 2).long()[:, 1]}}, r"labels\.ids: expected int64 .* with gaps"),
    ({"labels": {**NO_LABELS, "ids": 3.5}}, r"labels\.ids: expected int64 without gaps .*, got a float"),
    ({"labels": None}, r"labels: expected fields by name \(of the rows.*\), got None"),
    ({"labels": 3}, r"labels: expected fields by name .*, got 3"),
    ({"add": 1}, r"add: expected True or False .*, got 1"),
    ({"lowest": "low"}, r"lowest: expected a number .*, got 'low'"),
    ({"lowest": object()}, r"lowest: expected a number .*, got a object"),
    ({"lowest": True}, r"lowest: expected a number .*, got True"),
]


@modules
@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[f"{next(iter(w))}-{n}" for n, (w, _) in enumerate(WRONG)])
def test_wrong_types(wrong: dict[str, Any], message: str, module: str) -> None:
    with pytest.raises(TypeError, match=rf"cross_entropy\.{message}"):
        launcher(module)("cross_entropy", {**good_fields(module), **given(wrong)})


@modules
def test_whole_numbers(module: str) -> None:
    rows = given({"start": torch.zeros(0).long(), "count": torch.zeros(0).long(), "next": None, "before": None})
    columns = given({"logits": torch.zeros(1, 1, 5), "ids": torch.zeros(1).long()})
    marked = {"rows": rows, "covered": array(torch.zeros(0, dtype=torch.uint8))}
    name, field, fields = ("largest_columns", "count", columns) if module == "cpu" else ("mark_rows", "chunks", marked)
    for wrong, said in ((1.0, "a float"), (True, "True"), (None, "None"), (2**63, "a number of more than 64 bits")):
        with pytest.raises(TypeError, match=rf"{name}\.{field}: expected a whole number .*, got {said}"):
            launcher(module)(name, {**fields, field: wrong})


@modules
def test_numbers_out_of_range(module: str) -> None:
    message = r"cross_entropy\.lowest: expected a float32 \(smaller logits count as this one\), got 1e\+300"
    with pytest.raises(ValueError, match=message):
        launcher(module)("cross_entropy", {**good_fields(module), "lowest": 1e300})
    wide = array(torch.zeros(1, 2, 5))
    assert wide is not None
    wide = wide._replace(shape=(1, 2, 2**31), strides=(2**32, 2**31, 1))
    with pytest.raises(ValueError, match=r"cross_entropy\.student: expected at most 2\^31 - 1 columns, got 2147483648"):
        launcher(module)("cross_entropy", {**good_fields(module), "student": wide})


@needs_emulator
def test_numbers_of_32_bits() -> None:
    sums = given({"sums": torch.zeros(0), "entries": 0, "out": torch.zeros(0)})
    with pytest.raises(
        ValueError, match=r"sum_blocks\.blocks: expected -2147483648 \.\.\. 2147483647 .*, got 2147483648"
    ):
        launcher("cuda")("sum_blocks", {**sums, "blocks": 2**31})


@modules
def test_names_of_choices(module: str) -> None:
    x, one = array(torch.zeros(3)), array(torch.ones(()))
    converted = {"x": x, "count": 3, "result": x}
    name, fields = ("to_float", converted) if module == "cpu" else ("scale", {"data": x, "size": 3, "factor": one})
    with pytest.raises(ValueError, match=rf"{name}\.type: expected 'float32', 'bfloat16' or 'float16', got 'int8'"):
        launcher(module)(name, {**fields, "type": "int8"})
    with pytest.raises(TypeError, match=rf"{name}\.type: expected a name .*, got 3"):
        launcher(module)(name, {**fields, "type": 3})


def test_what_was_built_for_something_else() -> None:
    none = given({"start": torch.zeros(0).long(), "count": torch.zeros(0).long(), "next": None, "before": None})
    fields = {
        "student": array(torch.zeros(1, 2, 5)), "teacher": array(torch.zeros(1, 2, 4)), "grad": None,
        "student_rows": none, "teacher_rows": none, "chunks": 0, "scale": None, "temperature": 1.0, "reverse": False,
        "lowest": -1e4, "losses": array(torch.zeros(0).double()), "top_k": 3,
        "divergence": {"teacher": 1.0, "student": 0.0, "mixture": 0.0},
    }  # fmt: skip
    ids = array(torch.tensor([0, 1]))
    pairs = _core.build("pairs_plan", {"student_ids": ids, "teacher_ids": ids, "students": 5, "teachers": 5})
    assert (pairs.kind, repr(pairs)) == ("pairs_plan", "<pairs_plan>")
    _core.launch("ranked", {**fields, "plan": None}, "", 1)
    with pytest.raises(ValueError, match="plan: expected pairs of vocabularies of 5 and 4 tokens, got 5 and 5"):
        _core.launch("ranked", {**fields, "plan": pairs}, "", 1)
    no_entries = {"row_ptr": array(torch.zeros(2).long()), "col": array(torch.zeros(0, dtype=torch.int32))}
    matrix = _core.build("pkl_matrix", {**no_entries, "teacher_size": 3})
    with pytest.raises(TypeError, match=r"ranked\.plan: expected a pairs_plan \(pairs; null: .*\), got a pkl_matrix"):
        _core.launch("ranked", {**fields, "plan": matrix}, "", 1)
    with pytest.raises(ValueError, match=r"builder: expected 'pairs_plan', .* got 'plan'"):
        _core.build("plan", {})
