"""Launchers by name, of both modules: what a caller is told whose fields do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch

from xtoken import _core
from xtoken.losses.cpu import array

MODULES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))),
]
modules = pytest.mark.parametrize("module", MODULES)


def launcher(module: str) -> Callable[[str, dict[str, Any]], None]:
    """The module's `launch`; of CUDA's on the emulator."""
    if module == "cpu":
        return lambda name, fields: _core.launch(name, fields, "", 1)
    return lambda name, fields: emulated.load()[0].launch(name, fields, 1, 32, 0)


def no_labels() -> dict[str, Any]:
    return {"ids": None, "scale": None, "losses": None}


def good_fields(module: str) -> dict[str, Any]:
    """Those of "kd", for no chunk of logits [1, 2, 5]."""
    real = torch.float64 if module == "cpu" else torch.float32
    logits, none = array(torch.zeros(1, 2, 5)), array(torch.empty(0, dtype=torch.int64))
    rows = {"start": none, "count": none, "next": None}
    special = {"columns": None} if module == "cpu" else {"columns": 5, "chosen": None, "place": None}
    return {
        "student": logits, "teacher": logits, "grad": None, "student_rows": rows, "teacher_rows": dict(rows),
        "chunks": 0, "scale": None, "losses": array(torch.empty(0, dtype=real)), "temperature": 1.0, "reverse": False,
        "lowest": -1e4, "labels": no_labels(), **special,
    }  # fmt: skip


@modules
def test_fields_that_fit(module: str) -> None:
    launcher(module)("kd", good_fields(module))
    launcher(module)("kd", {**good_fields(module), "temperature": 2})  # a whole number is a number


@modules
def test_unknown_launcher(module: str) -> None:
    with pytest.raises(ValueError, match=r"launcher: expected 'cross_entropy', .* or '\w+', got 'nothing'"):
        launcher(module)("nothing", {})


@modules
def test_missing_field(module: str) -> None:
    fields = good_fields(module)
    del fields["scale"]
    with pytest.raises(
        ValueError, match=r"kd\.scale: missing \(\[chunks\] factors of the chunks' gradients; null: ones\)"
    ):
        launcher(module)("kd", fields)
    fields = good_fields(module)
    del fields["teacher_rows"]["next"]
    with pytest.raises(
        ValueError, match=r"kd\.teacher_rows\.next: missing \(\[rows\] the token that each row predicts"
    ):
        launcher(module)("kd", fields)


@modules
def test_unknown_field(module: str) -> None:
    with pytest.raises(ValueError, match=r"kd\.top_k: expected 'student', .* or '\w+'"):
        launcher(module)("kd", {**good_fields(module), "top_k": 3})
    fields = good_fields(module)
    fields["labels"]["weights"] = None
    with pytest.raises(ValueError, match=r"kd\.labels\.weights: expected 'ids', 'scale' or 'losses'"):
        launcher(module)("kd", fields)


WRONG = [
    ({"scale": torch.zeros(3, dtype=torch.int32)}, r"kd\.scale: expected float\d\d without gaps .*, got int32 \[3\]"),
    ({"scale": torch.zeros(3, 2)[:, 1]}, r"kd\.scale: expected float\d\d without gaps .*, got float32 \[3\] with gaps"),
    ({"scale": 3.5}, r"kd\.scale: expected float\d\d without gaps .*, got a float"),
    ({"losses": None}, r"kd\.losses: expected float\d\d without gaps \(\[chunks\] out\), got None"),
    ({"student": torch.zeros(2, 5)}, r"kd\.student: expected three dimensions of 'float32', .*, got float32 \[2, 5\]"),
    ({"student": torch.zeros(1, 2, 5).double()}, r"kd\.student: expected three .* or 'float16', .*, got float64"),
    (
        {"student": torch.zeros(1, 2, 5, 2)[..., 0]},
        r"kd\.student: expected .*, rows without gaps .*, got float32 .* with gaps",
    ),
    ({"student": None}, r"kd\.student: expected three dimensions .*, got None"),
    ({"reverse": 1}, r"kd\.reverse: expected True or False .*, got 1"),
    ({"chunks": 1.0}, r"kd\.chunks: expected a whole number \(how many\), got a float"),
    ({"chunks": True}, r"kd\.chunks: expected a whole number \(how many\), got True"),
    ({"temperature": "hot"}, r"kd\.temperature: expected a number .*, got 'hot'"),
    ({"temperature": object()}, r"kd\.temperature: expected a number .*, got a object"),
    ({"labels": None}, r"kd\.labels: expected fields by name .*, got None"),
    ({"labels": 3}, r"kd\.labels: expected fields by name .*, got 3"),
]


@modules
@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[f"{next(iter(w))}-{n}" for n, (w, _) in enumerate(WRONG)])
def test_wrong_types(wrong: dict[str, Any], message: str, module: str) -> None:
    given = {name: array(x) if isinstance(x, torch.Tensor) else x for name, x in wrong.items()}
    with pytest.raises(TypeError, match=message):
        launcher(module)("kd", {**good_fields(module), **given})


@modules
def test_numbers_out_of_range(module: str) -> None:
    with pytest.raises(
        ValueError, match=r"kd\.lowest: expected a float32 \(smaller logits count as this one\), got 1e\+300"
    ):
        launcher(module)("kd", {**good_fields(module), "lowest": 1e300})
    wide = array(torch.zeros(1, 2, 5))
    assert wide is not None
    wide = wide._replace(shape=(1, 2, 2**31), strides=(2**32, 2**31, 1))
    with pytest.raises(ValueError, match=r"kd\.student: expected at most 2\^31 - 1 columns, got 2147483648"):
        launcher(module)("kd", {**good_fields(module), "student": wide})
    if module == "cuda":
        with pytest.raises(
            ValueError, match=r"kd\.columns: expected -2147483648 \.\.\. 2147483647 \(how many\), got 2147483648"
        ):
            launcher(module)("kd", {**good_fields(module), "columns": 2**31})


@modules
def test_names_of_choices(module: str) -> None:
    special = {
        "cpu": {"weight_grad": None, "plan": None},
        "cuda": {"weight_sums": None, "workspace": None, "plan": {}},
    }
    fields = {**good_fields(module), "epsilon": 1e-8, **special[module]}
    for name in ("columns", "chosen", "place"):
        fields.pop(name, None)
    with pytest.raises(ValueError, match=r"pkl\.merge: expected 'first', 'mean' or 'chain', got 'last'"):
        launcher(module)("pkl", {**fields, "merge": "last"})
    with pytest.raises(TypeError, match=r"pkl\.merge: expected a name .*, got 3"):
        launcher(module)("pkl", {**fields, "merge": 3})


def test_what_was_built_for_something_else() -> None:
    ids = array(torch.tensor([0, 1]))
    pairs = _core.build("pairs_plan", {"student_ids": ids, "teacher_ids": ids, "students": 5, "teachers": 5})
    assert (pairs.kind, repr(pairs)) == ("pairs_plan", "<pairs_plan>")
    fields = good_fields("cpu")
    del fields["columns"]
    with pytest.raises(TypeError, match=r"prefix_kl\.plan: expected a prefix_plan \(a piece index\), got a pairs_plan"):
        _core.launch("prefix_kl", {**fields, "plan": pairs}, "", 1)
    with pytest.raises(TypeError, match=r"prefix_kl\.plan: expected a prefix_plan \(a piece index\), got None"):
        _core.launch("prefix_kl", {**fields, "plan": None}, "", 1)
    with pytest.raises(ValueError, match=r"builder: expected 'pairs_plan', .* got 'plan'"):
        _core.build("plan", {})
    del fields["labels"]
    narrow = {**fields, "top_k": 3, "plan": pairs, "teacher": array(torch.zeros(1, 2, 4))}
    with pytest.raises(ValueError, match="plan: expected pairs of vocabularies of 5 and 4 tokens, got 5 and 5"):
        _core.launch("ranked", narrow, "", 1)


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
def test_one_of_several_structs() -> None:
    lists = {"slices": 0, "shared": 0, "count": 0, "start": None, "tokens": None, "event": None}
    plan = {"side": [{"size": 1}], "slot": None, "events": 0, "student_lists": lists, "teacher_lists": lists, "most": 1}
    fields = good_fields("cuda")
    for name in ("columns", "chosen", "place"):
        del fields[name]
    module = emulated.load()[0]
    with pytest.raises(ValueError, match=r"prefix_kl\.plan\.side\[0\]\.length: missing \(\[size\]\)"):
        module.workspace("prefix_kl", {**fields, "workspace": None, "plan": plan})
    with pytest.raises(TypeError, match=r"prefix_kl\.plan\.side: expected a list of fields by name .*, got 3"):
        module.workspace("prefix_kl", {**fields, "workspace": None, "plan": {**plan, "side": 3}})
