"""Tensors that were changed behind the checks, and objects that say anything: an error of ours, or the right value.

What is public can be written to: in place, through `data` or NumPy, before its first use and after it. A kernel that
followed it would leave its memory, which ends the process, or under `make sanitize` fails.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import OPERATIONS, Case, Operation, backends_of, make_case

import xtoken
from xtoken import Alignment, PieceIndex, ProjectionMatrix
from xtoken.losses import Needs, registered

FAR = 10_000_000


def fresh() -> Case:
    """A case whose tensors are its own."""
    case, W = make_case(), make_case().projection
    alignment = Alignment(case.alignment.spans.clone(), case.alignment.offsets.clone(), *case.alignment._both_ids())
    own = ProjectionMatrix(W.row_ptr.clone(), W.col.clone(), W.weight.clone(), W.shape[1])
    return Case(case.student, case.teacher, alignment, own)


def numpy(tensor: torch.Tensor, at: Any, value: int) -> None:
    tensor.numpy()[at] = value


def in_place(tensor: torch.Tensor, at: Any, value: int) -> None:
    tensor[at] = value


def through_data(tensor: torch.Tensor, at: Any, value: int) -> None:
    tensor.data[at] = value


WAYS = {"in place": in_place, "data": through_data, "numpy": numpy}
SPANS = [((1, 0), FAR), ((1, 0), -1), ((1, 1), FAR), ((2, 2), -FAR), ((3, 3), 2**31 - 1), ((0, 0), -(2**31))]
OFFSETS = [(1, FAR), (1, -1), (0, 1), (-1, FAR)]
ROW_PTR = [(-1, FAR), (1, FAR), (5, -1), (0, 3), (7, 2**62), (6, -(2**62))]
COL = [(0, FAR), (3, -1), (-1, 2**31 - 1), (5, -(2**31))]


def run(loss: str, case: Case, pieces: PieceIndex | None, W: Any = None, backend: str = "auto") -> torch.Tensor:
    """The loss of a case."""
    operation = Operation(loss)
    arguments = operation.arguments(case)
    if operation.needs is Needs.PROJECTION and W is not None:
        arguments[-1] = W
    if pieces is not None and operation.needs is Needs.PIECES:
        arguments[-1] = pieces
    student = case.student.float().requires_grad_()
    value = operation.function()(student, case.teacher.float(), *arguments, **operation.sizes(case), backend=backend)
    value.backward()
    return value.detach()


TRAINED = next(name for name, loss in registered().items() if loss.trains_projection)
CROSS = [name for name, loss in registered().items() if loss.needs is not Needs.SAME_TOKENIZER]
ON_PIECES = list(
    {
        registered()[name].check_tables: name for name in reversed(CROSS) if registered()[name].needs is Needs.PIECES
    }.values()
)
"""One for each way to check a piece index."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", CROSS)
def test_an_alignment_that_was_changed(loss: str, way: str) -> None:
    for is_used in (False, True):
        for name, at, value in [*(("spans", *c) for c in SPANS), *(("offsets", *c) for c in OFFSETS)]:
            case = fresh()
            if is_used:
                run(loss, case, None)
            WAYS[way](getattr(case.alignment, name), at, value)
            with pytest.raises(ValueError, match=r"spans|offsets|alignment|student_logits|teacher_logits"):
                run(loss, case, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spans", torch.zeros(3, 4)),
        ("spans", torch.zeros(14, 4, dtype=torch.int64)),
        ("spans", [[0, 1, 0, 1]]),
        ("offsets", torch.tensor([0, 7, 14], dtype=torch.int32)),
        ("offsets", torch.tensor([0])),
        ("predicted", torch.ones(3, dtype=torch.bool)),
        ("predicted", torch.ones(14)),
        ("predicted", None),
    ],
)
def test_an_alignment_with_other_tensors(name: str, value: Any) -> None:
    case = fresh()
    setattr(case.alignment, name, value)
    with pytest.raises(ValueError, match=name if name != "offsets" else "offsets|student_ids"):
        run(TRAINED, case, None)


def test_an_alignment_that_was_resized() -> None:
    case = fresh()
    case.alignment.spans.resize_(300, 4)
    with pytest.raises(ValueError, match="predicted: expected"):
        run(TRAINED, case, None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", [name for name in CROSS if registered()[name].needs is Needs.PROJECTION])
def test_a_matrix_that_was_changed(loss: str, way: str) -> None:
    changes = [*(("row_ptr", *c) for c in ROW_PTR), *(("col", *c) for c in COL)]
    for is_used, (name, at, value) in itertools.product((False, True), changes):
        case = fresh()
        if is_used:
            run(loss, case, None)
        WAYS[way](getattr(case.projection, name), at, value)
        with pytest.raises(ValueError, match="projection: expected"):
            run(loss, case, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", [name for name in CROSS if registered()[name].needs is Needs.PROJECTION])
def test_weights_that_are_none(loss: str, way: str, value: float) -> None:
    """Compared with a threshold, such a weight would be left out without a word."""
    for is_used in (False, True):
        case = fresh()
        if is_used:
            run(loss, case, None)
        WAYS[way](case.projection.weight, 3, value)
        with pytest.raises(ValueError, match="projection: expected finite weights >= 0"):
            run(loss, case, None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", [name for name in backends_of(TRAINED) if name != "emulated"])
def test_weights_that_were_changed_count(backend: str, way: str) -> None:
    """The value is that of a new matrix with these weights, though the layouts of the old one are kept."""
    case = fresh()
    before = run(TRAINED, case, None, backend=backend)
    WAYS[way](case.projection.weight, slice(None, None, 2), 0)
    W = case.projection
    anew = ProjectionMatrix(W.row_ptr.clone(), W.col.clone(), W.weight.clone(), W.shape[1])
    after = run(TRAINED, case, None, backend=backend)
    assert after != before
    assert torch.equal(after, run(TRAINED, case, None, anew, backend))
    W.weight.data = torch.full_like(W.weight, 0.5)
    assert run(TRAINED, case, None, backend=backend) not in (before, after)


HALF = torch.ones(3, dtype=torch.float16)
OBJECTS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "row_ptr that goes back": ({"row_ptr": torch.tensor([0, 2, 1, 3])}, ValueError),
    "row_ptr beyond the entries": ({"row_ptr": torch.tensor([0, 1, 2, FAR])}, ValueError),
    "row_ptr within": ({"row_ptr": torch.tensor([0, FAR, 2, 3])}, ValueError),
    "negative row_ptr": ({"row_ptr": torch.tensor([0, -5, 2, 3])}, ValueError),
    "short row_ptr": ({"row_ptr": torch.tensor([0, 3])}, ValueError),
    "no row_ptr": ({"row_ptr": torch.tensor([], dtype=torch.int64)}, ValueError),
    "fractions in row_ptr": ({"row_ptr": torch.tensor([0.0, 1.5, 2, 3])}, TypeError),
    "a list": ({"row_ptr": [0, 1, 2, 3]}, TypeError),
    "col beyond the teacher": ({"col": torch.tensor([0, 1, 3], dtype=torch.int32)}, ValueError),
    "negative col": ({"col": torch.tensor([0, -1, 2], dtype=torch.int32)}, ValueError),
    "wide col": ({"col": torch.tensor([0, 1, 2**32])}, TypeError),
    "two-dimensional col": ({"col": torch.zeros(3, 1, dtype=torch.int32)}, ValueError),
    "few weights": ({"weight": torch.ones(2)}, ValueError),
    "whole weights": ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError),
    "few kinds": ({"kind": torch.zeros(2, dtype=torch.uint8)}, ValueError),
    "kinds of fractions": ({"kind": torch.zeros(3)}, TypeError),
    "names of kinds": ({"kind": ["exact"] * 3}, TypeError),
    "a shape too large": ({"shape": (FAR, 3)}, ValueError),
    "a teacher too small": ({"shape": (3, 1)}, ValueError),
    "a shape of fractions": ({"shape": (3.0, 3.0)}, TypeError),
}


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("loss", [name for name in CROSS if registered()[name].needs is Needs.PROJECTION])
def test_objects_with_the_attributes_of_a_matrix(loss: str, name: str) -> None:
    changes, error = OBJECTS[name]
    good = {"row_ptr": torch.arange(4), "col": torch.arange(3, dtype=torch.int32), "weight": torch.ones(3)}
    alignment = Alignment([[1, 2, 1, 2]], student_ids=[0, 1], teacher_ids=[0, 1])
    logits = torch.randn(2, 3), torch.randn(2, 3)
    function: Callable[..., Any] = registered()[loss].function()
    assert function(*logits, alignment, SimpleNamespace(**good, shape=(3, 3))).isfinite()
    with pytest.raises(error, match=r"projection|logits|integer"):
        function(*logits, alignment, SimpleNamespace(**{**good, "shape": (3, 3), **changes}))
    stretched = SimpleNamespace(**{**good, "col": torch.arange(6, dtype=torch.int32)[::2] // 2, "shape": (3, 3)})
    assert function(*logits, alignment, stretched).isfinite()  # every second number in memory


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", ON_PIECES)
def test_pieces_that_were_changed(loss: str, way: str) -> None:
    function: Callable[..., Any] = registered()[loss].function()
    alignment = Alignment([[1, 2, 1, 3], [2, 4, 3, 4]], student_ids=[0, 3, 1, 2], teacher_ids=[0, 1, 2, 3])
    student, teacher = ([b"a", b"b", b"ab", b"ba", b"aba"], [b"a", b"b", b"bb", b"aab", b"c"])
    spelled = PieceIndex.build(xtoken.Vocabulary(student), xtoken.Vocabulary(teacher))
    refused = 0
    for is_used, at, value in itertools.product((False, True), range(len(spelled.data)), (-1, FAR, 2**31 - 1)):
        pieces = PieceIndex(spelled.data.clone(), text=spelled.text)
        logits = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
        if is_used:
            function(*logits, alignment, pieces)
        WAYS[way](pieces.data, at, value)
        try:
            function(*logits, alignment, pieces).backward()
        except ValueError:
            refused += 1
    assert refused > 5 * len(spelled.data)  # but a length in bytes may be anything


@pytest.mark.parametrize("loss", registered())
def test_tensors_without_values(loss: str) -> None:
    """One tensor on the meta device would make torch leave out the kernel, and return what is in memory."""
    operation = Operation(loss)
    changes: list[tuple[Any, str]] = [("alignment", "offsets"), ("alignment", "predicted")]
    changes += [("projection", name) for name in ("row_ptr", "col", "weight", "kind")] * (
        operation.needs is Needs.PROJECTION
    )
    changes += [("pieces", "data")] * (operation.needs is Needs.PIECES)
    for argument, name in changes:
        case = fresh()
        owner: Any = case.alignment if argument == "alignment" else case.projection
        if argument == "pieces":
            owner = PieceIndex(operation.arguments(case)[-1].data.clone(), text=operation.arguments(case)[-1].text)
        setattr(owner, name, getattr(owner, name).to("meta"))
        if operation.needs is Needs.SAME_TOKENIZER:
            size = case.student.shape[-1]
            with pytest.raises(ValueError, match=f"{name}: expected a tensor with values"):
                operation.function()(case.student, case.student.detach(), case.alignment, vocab_size=size)
            continue
        with pytest.raises(ValueError, match=r": expected a tensor with values, got one on the meta device"):
            run(loss, case, owner if argument == "pieces" else None)


FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": torch.Tensor.to_sparse,
    "mkldnn": lambda values: values.to_mkldnn(),
    "float8": lambda values: values.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_another_form(form: str) -> None:
    case = fresh()
    odd = FORMS[form](case.student.float())
    function, arguments = Operation(TRAINED).function(), Operation(TRAINED).arguments(case)
    with pytest.raises(TypeError, match="student_logits: expected a floating-point tensor"):
        function(odd, case.teacher.float(), *arguments)
    with pytest.raises(TypeError, match="teacher_logits: expected a floating-point tensor"):
        function(case.student.float(), odd, *arguments)
    for place, name in enumerate(("hidden", "weight", "bias")):
        given = [torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4)]
        given[place] = FORMS[form](torch.zeros(2, 3))
        with pytest.raises(TypeError, match=f"{name}: expected a floating-point tensor"):
            xtoken.LinearLogits(*given)


@pytest.mark.parametrize(
    "ids",
    [
        torch.ones(1, 2, dtype=torch.int64).to_sparse(),
        torch.ones(1, 2, dtype=torch.int64, device="meta"),
    ],
    ids=["sparse", "meta"],
)
def test_ids_of_another_form(ids: torch.Tensor) -> None:
    aligner = xtoken.Aligner(xtoken.Vocabulary([b"a", b"b"]), xtoken.Vocabulary([b"a", b"b"]))
    with pytest.raises(TypeError, match="student_ids: expected integers in memory"):
        aligner.align(ids, [[0, 0]])
    with pytest.raises(TypeError, match="student_mask: expected integers in memory"):
        aligner.align([[0, 0]], [[0, 0]], ids)


def test_what_reads_an_alignment_that_was_changed() -> None:
    """Where Python counts a negative index from the end, it would be read as another place."""
    pieces = Operation(ON_PIECES[0]).arguments(fresh())[-1]
    for at, value in (*SPANS, ((0, 0), -1), ((3, 2), -2)):
        alignment = fresh().alignment
        alignment.spans[at] = value
        labels = torch.zeros(len(alignment), 99, dtype=torch.int64)
        calls: list[Callable[[], Any]] = [
            alignment.chunk_ids, lambda one=alignment, labels=labels: one.supervised(labels),
            lambda one=alignment: pieces.differing(one),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(ValueError, match=r"spans|length|labels|_ids"):
                call()
    alignment = fresh().alignment
    assert alignment.student_ids is not None
    alignment.student_ids[0, int(alignment.spans[0, 0])] = -1
    with pytest.raises(ValueError, match="alignment: expected student_ids in 0 "):
        pieces.differing(alignment)


NUMBERS = {
    "over int32": 2**31,
    "a fraction": 1.5,
    "uint64": torch.tensor([2**63, 1], dtype=torch.uint64),
    "over int64": 2**63,
    "far over": 2**70,
    "text": "1",
    "nothing": None,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_do_not_fit(name: str) -> None:
    """They raise; cast to a narrower type, many would be some other number that is right."""
    value: Any = NUMBERS[name]
    row = value if isinstance(value, torch.Tensor) else [value, 1]
    refused: list[Callable[[], Any]] = [
        lambda: Alignment([[*list(row), 0, 1]] if isinstance(row, list) else row.repeat(2)[None]),
        lambda: Alignment([], [0, *list(row)] if isinstance(row, list) else row),
        lambda: ProjectionMatrix([0, 2], row, torch.ones(2), 9),
        lambda: ProjectionMatrix(row, [0], [1.0], 9),
        lambda: ProjectionMatrix([0, 0, 0], [], [], 9, kind=row),
        lambda: ProjectionMatrix.from_topk([row] if isinstance(row, list) else row[None], torch.ones(1, 2), 9),
        lambda: PieceIndex(row),
        lambda: Alignment([[1, 2, 1, 2], [2, 3, 2, 3]], predicted=row),
    ]
    if not isinstance(value, torch.Tensor):
        ids = [b"a", b"b"]
        refused += [
            lambda: ProjectionMatrix([0, 0], [], [], value),
            lambda: xtoken.Vocabulary(ids, [value, 0]),
            lambda: (
                xtoken.Vocabulary(ids, roles={"bos": value}) if value is not None else ProjectionMatrix(None, [], [], 1)
            ),
        ]
    aligner = xtoken.Aligner(xtoken.Vocabulary([b"a"]), xtoken.Vocabulary([b"a"]))
    refused.append(lambda: aligner.align(row, [0, 0]))
    for call in refused:
        with pytest.raises((ValueError, TypeError)):
            call()


def test_masks_are_true_where_they_are_not_zero() -> None:
    """256 is no zero, though its lowest byte is."""
    aligner = xtoken.Aligner(xtoken.Vocabulary([b"a", b"b"]), xtoken.Vocabulary([b"a", b"b"]))
    expected = aligner.align([0, 1, 1], [0, 1, 1], [1, 0, 1], [1, 0, 1]).spans
    for mask in ([256, 0, 2**40], torch.tensor([-1, 0, 512]), [True, False, True]):
        assert torch.equal(aligner.align([0, 1, 1], [0, 1, 1], mask, mask).spans, expected)
    with pytest.raises(TypeError, match="student_mask"):
        aligner.align([0, 1], [0, 1], [0.5, 1.0])
    with pytest.raises(ValueError, match="predicted: expected true or false"):
        Alignment([[1, 2, 1, 2]], predicted=[2])


@pytest.mark.parametrize(
    "value", [torch.tensor(1.0), torch.ones(2), None, "1", [1]], ids=["0-d", "1-d", "None", "text", "list"]
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_options_that_are_no_numbers_and_no_switches(name: str, value: Any) -> None:
    """A tensor as a temperature, too, which would get no gradient."""
    case = make_case()
    for option in inspect.signature(OPERATIONS[name].function()).parameters.values():
        expected = {float: "a number", bool: "True or False"}.get(type(option.default))
        if expected is not None and option.name != "inplace":
            with pytest.raises(TypeError, match=f"^{option.name}: expected {expected}, got {type(value).__name__}$"):
                OPERATIONS[name].public(case, case.student, case.teacher, **{option.name: value})


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_layout_is_looked_at_on_one_rank_too(name: str) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"^cp_layout: expected one of 'contiguous', 'zigzag', got 'zigzak'"):
        OPERATIONS[name].public(case, case.student, case.teacher, cp_layout="zigzak")
