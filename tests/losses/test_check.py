"""`xtoken check` and `xtoken.self_test`: what is right passes, and what is planted is found and named."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import emulated
import pytest
import torch
from default_losses import DEFAULT
from test_backends import make_backend, nan_gradient, nan_loss, one_row_off, scale_gradient, shift_loss, wrong
from torch import Tensor

import xtoken
from xtoken import check, cli
from xtoken.check import DTYPES, Call, Inputs, calls_of, check_lessons, finding, self_test
from xtoken.losses import Needs, plain, registered
from xtoken.losses.backends import backends_with, register_backend, unregister_backend
from xtoken.losses.cases import Case, changes, made_up_pair, text_of

SIZES = 333, 401
CPU = torch.device("cpu")
PROJECTED = DEFAULT[Needs.PROJECTION]
KERNELS = [name for name in registered() if "cpu" in backends_with(name)]
small_test = functools.partial(self_test, "cpu", sizes=SIZES, rows=8)
needs_emulator = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs.random(made_up_pair(*SIZES), SIZES, 16, CPU, SIZES)


@pytest.fixture
def plant() -> Iterator[Callable[..., None]]:
    """Registers a backend that "auto" prefers: the formulas with a fault."""

    def register(run: Callable[..., Tensor]) -> None:
        register_backend(make_backend("planted", run))

    yield register
    unregister_backend("planted")


@pytest.mark.slow
def test_this_build_is_right() -> None:
    lines: list[str] = []
    report = small_test(tell=lines.append)
    assert report.passed, str(report)
    assert str(report) == "\n".join(lines)
    assert len(lines) == 2 + len(registered()) * len(DTYPES)
    assert {one.backend for one in report.findings} == {"cpu", "reference"}
    for name, loss in registered().items():
        found = [one for one in report.findings if one.loss == name]
        assert len(found) == len(DTYPES) * len(calls_of(loss, "auto", CPU))
        assert all(one.milliseconds_per_row and one.milliseconds_per_row > 0 for one in found)
        assert all(one.repeats for one in found)
    judged = sum(one.backend == "cpu" for one in report.findings)
    assert f"all {judged} calls agree with float64; {len(report.findings) - judged} of plain formulas" in lines[-1]
    assert sum(line.endswith(" formula") for line in lines) == (len(registered()) - len(KERNELS)) * len(DTYPES)
    table = [line for line in str(report).splitlines() if line.endswith((" verdict", " ok", " formula"))]
    assert len(table) == 1 + len(registered()) * len(DTYPES)
    kinds = [f" {str(dtype).removeprefix('torch.')} " for dtype in DTYPES]
    assert {line.find(" type ") for line in table[:1]} == {max(map(line.find, kinds)) for line in table[1:]}
    result = json.loads(report.to_json())
    assert result["passed"] is True
    assert result["machine"]["xtoken"] == xtoken.__version__
    assert len(result["findings"]) == len(report.findings)


@pytest.mark.parametrize("name", KERNELS)
def test_every_option_of_a_loss_with_kernels_is_changed(name: str) -> None:
    """A new option that is no word or switch needs another value in `xtoken.losses.cases.CHANGED`."""
    assert [option for option, values in changes(registered()[name]).items() if not values] == []


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize("errors", ["none", "mixed"])
def test_the_cuda_kernels_are_within_the_tolerance(errors: str) -> None:
    """With functions that are as far off as CUDA documents, too."""
    inputs = Inputs.random(made_up_pair(67, 59), (67, 59), 8, CPU, (67, 59))
    emulated.set_errors(errors)
    try:
        for name in KERNELS:
            for dtype in (torch.float32, torch.bfloat16):
                found = finding(Call(name, Case("", registered()[name]), check.LABELS), inputs, dtype, "emulated")
                assert found.passed, str(found)
                assert found.used < 0.9, str(found)
    finally:
        emulated.set_errors("none")


def faint_column_left_out(losses: Tensor, grad: Tensor | None) -> Tensor:
    """One that hardly shows in the norm of a row."""
    if grad is not None:
        norms = grad[..., : SIZES[0]].float().flatten(0, 1).norm(dim=0)
        grad[..., int(norms.argsort()[20])] = 0
    return losses


def columns_exchanged(losses: Tensor, grad: Tensor | None) -> Tensor:
    if grad is not None:
        grad[..., [7, 8]] = grad[..., [8, 7]]
    return losses


FAULTS: dict[str, tuple[torch.dtype, Callable[..., Tensor], str]] = {
    "loss": (torch.float32, shift_loss, "loss"),
    "gradient": (torch.float32, scale_gradient, r"gradient, row \d+, column \d+: "),
    "rows": (torch.bfloat16, one_row_off, r"gradient, row \d+, column \d+: "),
    "one NaN": (torch.float16, nan_gradient, "gradient, row 0, column 0: nan, expected"),
    "NaN loss": (torch.bfloat16, nan_loss, "loss, chunk 0: nan, expected"),
    "faint column": (torch.bfloat16, faint_column_left_out, r"gradient, column \d+, most of its rows, row \d+: "),
    "columns": (torch.float32, columns_exchanged, "gradient, "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault: str, plant: Callable[..., None], inputs: Inputs) -> None:
    dtype, change, message = FAULTS[fault]
    plant(wrong(change))
    found = finding(Call(PROJECTED, Case("merge=mean", registered()[PROJECTED], {"merge": "mean"})), inputs, dtype)
    assert not found.passed
    named = f"{registered()[PROJECTED].title} with merge=mean, {str(dtype)[6:]}, backend 'planted': {message}"
    assert re.match(named, str(found)), str(found)


def test_what_is_wrong_now_and_then_is_found(plant: Callable[..., None], inputs: Inputs) -> None:
    """Only the third call with a gradient is."""
    calls = []

    def run(problem: Any, student_grad: Tensor | None = None, *rest: Any) -> Tensor:
        losses = plain.run(problem, student_grad, *rest)
        if student_grad is not None:
            calls.append(problem)
            if len(calls) == 3:
                student_grad[0, 0, 3] += 1
        return losses

    plant(run)
    found = finding(Call(PROJECTED, Case("", registered()[PROJECTED])), inputs, torch.float32)
    assert not found.passed
    assert not found.repeats
    assert found.where.startswith("gradient, row 0, column 3: ")


def test_what_is_wrong_in_one_form_is_named(inputs: Inputs) -> None:
    """The labels' part of the gradient is lost."""
    whole = make_backend("planted", plain.run)
    register_backend(replace(whole, cross_entropy=lambda student, labels, *rest: plain.cross_entropy(student, labels)))
    try:
        report = small_test(losses=[PROJECTED])
    finally:
        unregister_backend("planted")
    assert {one.form for one in report.wrong} == {check.LABELS, check.CRITERION}
    calls = len(report.findings)
    assert report.summary().startswith(
        f"WRONG: {registered()[PROJECTED].title} with labels, float32, backend 'planted'"
    )
    assert f"\n6 of {calls} calls are wrong (cpu, 8 rows, " in report.summary()
    assert str(report).count("WRONG (2 of ") == len(DTYPES)
    assert json.loads(report.to_json())["passed"] is False


def test_a_kernel_that_does_not_start_is_a_finding(plant: Callable[..., None], inputs: Inputs) -> None:
    def run(*arguments: Any) -> Tensor:
        raise RuntimeError("scale: no kernel image is available")

    plant(run)
    found = finding(Call(PROJECTED, Case("", registered()[PROJECTED])), inputs, torch.float32)
    assert found.where == "RuntimeError: scale: no kernel image is available"
    report = check.CheckReport("cpu", findings=[found])
    assert not report.passed
    assert json.loads(report.to_json())["findings"][0]["error"] == "inf"


def test_rows_are_repeated_and_each_sample_is_compared(plant: Callable[..., None], inputs: Inputs) -> None:
    """As on a GPU, where there are more chunks than blocks."""
    call, many = Call(PROJECTED, Case("", registered()[PROJECTED]), check.CRITERION), replace(inputs, copies=4)
    for extra in ("", *check.EXTRAS):
        right = finding(replace(call, extra=extra), many, torch.bfloat16)
        assert right.passed, str(right)

    def third_sample(losses: Tensor, grad: Tensor | None) -> Tensor:
        if grad is not None and len(grad) == 4:
            grad[2] *= 1.1
        return losses

    plant(wrong(third_sample))
    found = finding(call, many, torch.bfloat16)
    assert not found.passed
    assert found.where.startswith("gradient of sample 2, row ")


def test_losses_of_a_run(plant: Callable[..., None]) -> None:
    pair = made_up_pair(*SIZES)
    types = torch.float32, torch.bfloat16
    lessons = [
        check.Lesson(xtoken.Teacher(pair.projection, temperature=2.0), (340, 405), types),
        check.Lesson(xtoken.Teacher(xtoken.LearnableProjection(pair.projection)), SIZES, types),
        check.Lesson(xtoken.Teacher(pieces=pair.pieces), SIZES, types),
        check.Lesson(xtoken.Teacher(), (333, 333), types),
    ]
    report = check_lessons(lessons, CPU)
    assert report.passed, str(report)
    assert [one.form for one in report.findings] == [check.CRITERION] * 2 + [check.TRAINED] + [check.CRITERION] * 2
    plant(wrong(scale_gradient))
    assert len(check_lessons(lessons, CPU).wrong) == 5
    assert check_lessons(lessons, CPU, "reference").findings == []


def test_text_has_all_kinds_of_chunks() -> None:
    pair = made_up_pair(*SIZES)
    for known in (pair, pair._replace(pieces=None), pair._replace(projection=None, pieces=None)):
        text = text_of(known, SIZES, 64)
        lengths = {tuple(one) for one in (text.spans[:, 1::2] - text.spans[:, ::2]).tolist()}
        assert text.student_ids is not None
        assert text.teacher_ids is not None
        assert 56 <= max(len(text.student_ids), len(text.teacher_ids)) <= 64
        assert (1, 1) in lengths
        assert any(a == 1 and b > 1 for a, b in lengths) == (known.projection is not None)
        assert any(a > 1 and b == 1 for a, b in lengths) == (known.pieces is not None)
    assert pair.pieces is not None
    text = text_of(pair, SIZES, 64)
    assert int(pair.pieces.differing(text).sum()) == 0


def test_bad_arguments() -> None:
    for device, message in (("cuda:99", "expected one that torch finds"), ("quantum", "'cpu' or a device such as")):
        with pytest.raises(ValueError, match=f"device: .*{message}"):
            self_test(device)
    with pytest.raises(ValueError, match=r"losses: expected one of .*, got 'x'"):
        self_test("cpu", ["x"])
    with pytest.raises(ValueError, match="rows: expected at least 8, got 7"):
        self_test("cpu", rows=7)
    with pytest.raises(ValueError, match="backend: expected one of"):
        self_test("cpu", backend="x")


def test_the_command(
    plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "self_test", functools.partial(self_test, sizes=SIZES))
    without_kernels = next(name for name in registered() if name not in KERNELS)
    arguments = ["check", "--device", "cpu", "--rows", "8", "--losses", without_kernels]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "\nno kernel ran; all 3 of plain formulas, which kernels are judged by, are finite (cpu, 8 rows, " in printed
    monkeypatch.setattr(check, "DTYPES", (torch.bfloat16,))
    plant(wrong(nan_loss))
    assert cli.main([*arguments, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is False
    assert cli.main(["check", "--device", "cuda:99"]) == 1
    assert capsys.readouterr().err.startswith("xtoken check: device: expected one that torch finds")
