"""What torch makes by default is the program's choice: a type, a device. Nothing that is computed depends on it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import xtoken
from xtoken import Aligner, PieceIndex, ProjectionMatrix, TopKLogits, Vocabulary
from xtoken.check import LEAST_ROWS, Inputs, Run, calls_of
from xtoken.losses.backends import backends_with
from xtoken.losses.cases import made_up_pair
from xtoken.losses.loss import registered
from xtoken.losses.sliced import SlicedLists
from xtoken.teacher_cache import TeacherCacheWriter

DTYPES = [torch.bfloat16, torch.float64]
FACTORIES = (
    "arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tensor", "zeros",
)  # fmt: skip
FLOATS = "empty", "linspace", "ones", "rand", "randn", "zeros"
STUDENT = Vocabulary([b"<s>", b" ", b"a", b"b", b"ab", b"abb", b","], roles={"bos": 0})
TEACHER = Vocabulary([b" ", b"a", b"b", b"ba", b","])
IDS = [0, 4, 3, 5, 6], [1, 2, 2, 1, 2, 2, 4]
LABELS = torch.tensor([-100, 4, -100, 5, 6])
LOGPROBS = torch.tensor([[-0.123, -2.7], [-1.3, -1.9]])


@contextmanager
def defaults(dtype: torch.dtype, device: str = "meta") -> Iterator[None]:
    """Other ones; with a tensor on "meta" nothing can be computed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        if (one.dtype, one.device, one.shape) != (other.dtype, other.device, other.shape):
            return False
        return bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    return bool(one == other)


def test_tensors_are_made_on_a_device_and_in_a_type_that_are_named() -> None:
    """By every call of torch that would take the default ones; "full" and others go by the values."""
    package = Path(xtoken.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
                named = {keyword.arg for keyword in node.keywords}
                place = f"{path.relative_to(package)}:{node.lineno}: {ast.unparse(node)}"
                assert named & {"device", None}, place
                if ast.unparse(node.func) in {f"torch.{name}" for name in FLOATS}:
                    assert named & {"dtype", None}, place


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", registered())
def test_losses(name: str, dtype: torch.dtype) -> None:
    """Also where chunks are masked, and in `XTokenLoss`; losses and gradients, bit for bit."""
    sizes = 301, 333
    inputs = Inputs.random(made_up_pair(*sizes), sizes, LEAST_ROWS, torch.device("cpu"), sizes)
    for backend in ("auto", "reference") if len(backends_with(name)) > 1 else ("reference",):
        for call in calls_of(registered()[name], backend, torch.device("cpu")):
            run = Run(call, inputs, torch.float32, backend)
            want = run.outcome()
            with defaults(dtype):
                assert same(list(run.outcome()), list(want)), (call, backend)


SERVED = {"prompt_logprobs": [None, {"1": {"logprob": -0.123}, "3": {"logprob": -2.7}}, {"2": {"logprob": -1.3}}]}


def of_corpus(folder: Path) -> list[Any]:
    """A cached teacher of a text, written and read."""
    with TeacherCacheWriter(folder, TEACHER, top_k=2) as writer:
        writer.add([1, 2], TopKLogits(torch.tensor([[0, 1], [2, 3]], device="cpu"), LOGPROBS))
    return parts_of(xtoken.TeacherCache(folder).lookup([1, 2]).logits)


def of_nemo(folder: Path) -> list[Any]:
    ProjectionMatrix.build(STUDENT, TEACHER).to_nemo(folder / "W.pt")
    return parts_of(ProjectionMatrix.from_nemo(folder / "W.pt", len(TEACHER), len(STUDENT)))


def saved(folder: Path) -> list[Any]:
    made = ProjectionMatrix.build(STUDENT, TEACHER), PieceIndex.build(STUDENT, TEACHER)
    for name, one in zip(("W", "pieces"), made, strict=True):
        one.save(folder / name)
    read = ProjectionMatrix.load(folder / "W"), PieceIndex.load(folder / "pieces")
    return [*map(parts_of, read)]


def several_teachers(_: Path) -> list[Any]:
    """Weighted by how sure they are, one without logits."""
    teacher = xtoken.Teacher(ProjectionMatrix.build(STUDENT, TEACHER))
    criterion = xtoken.XTokenLoss([teacher] * 3, teacher_weighting="entropy")
    generator = torch.Generator().manual_seed(0)
    student, *teachers = (
        torch.randn(1, n, v, generator=generator, dtype=torch.float32, device="cpu")
        for n, v in ((5, len(STUDENT)), (7, len(TEACHER)), (7, len(TEACHER)))
    )
    batch = Aligner(STUDENT, TEACHER).align([IDS[0]], [IDS[1]])
    without = batch.supervised(torch.full_like(LABELS, -100)[None])
    total, parts = criterion(student.requires_grad_(), LABELS[None], [*teachers, None], [batch, batch, without])
    total.backward()
    return [total, student.grad, *(value for value in parts.values() if isinstance(value, Tensor))]


MADE: dict[str, Callable[[Path], Any]] = {
    "alignment": lambda _: parts_of(Aligner(STUDENT, TEACHER).align(*IDS)),
    "batch": lambda _: parts_of(Aligner(STUDENT, TEACHER).align([IDS[0]] * 2, [IDS[1]] * 2)),
    "cut": lambda _: parts_of(Aligner(STUDENT, TEACHER).truncate(*IDS, 4, 5)),
    "chunk_ids": lambda _: Aligner(STUDENT, TEACHER).align(*IDS).chunk_ids("teacher"),
    "labels": lambda _: parts_of(Aligner(STUDENT, TEACHER).align(*IDS).supervised(LABELS)),
    "projection": lambda _: parts_of(ProjectionMatrix.build(STUDENT, TEACHER)),
    "top k": lambda _: parts_of(ProjectionMatrix.from_topk([[0, 1], [2, -1]], [[0.3, 0.7], [0.1, 0.0]], 3)),
    "pieces": lambda _: PieceIndex.build(STUDENT, TEACHER).data,
    "order of W": lambda _: ProjectionMatrix.build(STUDENT, TEACHER).teacher_order().tokens,
    "order of pieces": lambda _: PieceIndex.build(STUDENT, TEACHER).teacher_order().tokens,
    "audit": lambda _: str(xtoken.coverage_audit(STUDENT, TEACHER, ProjectionMatrix.build(STUDENT, TEACHER))),
    "choice": lambda _: str(xtoken.choose_loss(STUDENT, TEACHER)),
    "served": lambda _: parts_of(TopKLogits.from_vllm(SERVED)),
    "several teachers": several_teachers,
    "cached": of_corpus,
    "nemo": of_nemo,
    "saved": saved,
}


def parts_of(made: Any) -> list[Any]:
    """The tensors that an object holds."""
    return [value for value in vars(made).values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_tokenizers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for folder in (tmp_path / "usual", tmp_path / "other"):
        folder.mkdir()
    want = MADE[name](tmp_path / "usual")
    with defaults(dtype):
        assert same(MADE[name](tmp_path / "other"), want)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("count", "length"), [(20000, 5), (1, 70000), (0, 0)])
def test_layout_of_lists(dtype: torch.dtype, device: str, count: int, length: int) -> None:
    counts = np.full(count, length)
    given = np.arange(count), counts.cumsum() - counts, counts
    want = SlicedLists.of(*given)
    with defaults(dtype, device):
        assert same(list(vars(SlicedLists.of(*given)).values()), list(vars(want).values()))
