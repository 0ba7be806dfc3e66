"""One harness for every backend of every loss: hard inputs, the truth in float64, and bad inputs.

`check` runs a public loss function on one backend and compares losses and gradients with `xtoken.reference`
in float64 on the same rounded inputs. The error may be twice that of the reference in the input's own type.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import ModuleType, NoneType
from typing import Any

import emulated
import torch
from comparer import assert_as_accurate
from rows_by_hand import rows_by_hand
from safetensors.torch import load_file
from torch import Tensor

import xtoken
from xtoken import PieceIndex, Teacher, Vocabulary, _core
from xtoken.alignment import Alignment
from xtoken.losses import Needs, cpu, registered
from xtoken.losses.backends import backend_names, backends_with, register_backend, unregister_backend
from xtoken.projection import ProjectionMatrix


def _register_levels() -> tuple[str, ...]:
    """The CPU kernels of every level that this machine runs, and the CUDA kernels on the emulator and, if there is one,
    on a GPU, as backends for CPU tensors; "cpu", the fastest, stays the last."""
    unregister_backend("cpu")
    names = [f"cpu:{level}" for level in _core.cpu_levels() if level != _core.cpu_level()]
    for name in names:
        register_backend(cpu.backend(name, name.removeprefix("cpu:")))
    if emulated.why_not() is None:
        register_backend(emulated.backend())
        names.append("emulated")
    if torch.cuda.is_available() and "cuda" in backend_names():
        register_backend(emulated.gpu_backend())
        names.append("on_gpu")
    register_backend(cpu.backend())
    return ("reference", *names, "cpu")


BACKENDS = _register_levels()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"


def backends_of(operation: str) -> tuple[str, ...]:
    """The backends under test that have the operation."""
    return tuple(name for name in BACKENDS if name in backends_with(operation))


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of a cross-tokenizer loss, logits in float64; equal to itself alone."""

    student: Tensor
    teacher: Tensor
    alignment: Alignment
    projection: ProjectionMatrix

    @property
    def pieces(self) -> PieceIndex:
        """Of vocabularies in which the two sides of a chunk spell the same text."""
        return piece_index(*self.projection.shape)


@functools.cache
def tokens(size: int, side: int) -> list[bytes]:
    """So many strings over two letters, shorter ones first; half of the longer ones are the other side's too."""
    texts = (bytes(text) for n in itertools.count(1) for text in itertools.product(b"ab", repeat=n))
    return list(itertools.islice((t for i, t in enumerate(texts) if i < 2 or i % 4 in (side, 3)), size))


@functools.cache
def piece_index(students: int, teachers: int) -> PieceIndex:
    return PieceIndex.build(Vocabulary(tokens(students, 0)), Vocabulary(tokens(teachers, 1)))


def split(text: bytes, count: int, vocabulary: list[bytes]) -> list[int] | None:
    """The text as so many tokens, the longest possible first."""
    if count == 0:
        return None if text else []
    for end in range(len(text), 0, -1):
        if text[:end] in vocabulary:
            rest = split(text[end:], count - 1, vocabulary)
            if rest is not None:
                return [vocabulary.index(text[:end]), *rest]
    return None


def same_text(shape: tuple[int, int], vocab: tuple[int, int], random: Random) -> tuple[list[int], list[int]] | None:
    """Random ids of so many tokens on both sides that spell the same text, if a few tries find some."""
    sides = tokens(vocab[0], 0), tokens(vocab[1], 1)
    fewer = int(shape[1] < shape[0])
    own = [i for i, token in enumerate(sides[fewer]) if shape[0] == shape[1] or token not in sides[1 - fewer]]
    for _ in range(100 if own else 0):
        ids = random.choices(own, k=shape[fewer])
        others = split(b"".join(sides[fewer][i] for i in ids), shape[1 - fewer], sides[1 - fewer])
        if others is not None:
            return (others, ids) if fewer else (ids, others)
    return None


# Chunk lengths (student, teacher); the cut leaves rows before, between and after them.
SHAPES = ((1, 1), (1, 2), (1, 1), (3, 1), (2, 2), (1, 1), (2, 3))


def make_alignment(samples: int, shapes: Any = SHAPES, vocab: tuple[int, int] = (1, 1), seed: int = 0) -> Alignment:
    """The same chunks in each sample, each of one text: the first without a predictor, a gap after every third."""
    generator = torch.Generator().manual_seed(seed)
    spans, end = [], [0, 0]
    for k, (student, teacher) in enumerate(shapes):
        spans.append([end[0], end[0] + student, end[1], end[1] + teacher])
        end = [end[0] + student + (k % 3 == 2), end[1] + teacher]
    ids = [torch.randint(v, (samples, n), generator=generator) for v, n in zip(vocab, end, strict=True)]
    offsets = torch.arange(samples + 1) * len(spans)
    random = Random(seed)
    for sample in range(samples):
        for (a, b, c, d), shape in zip(spans, shapes, strict=True):
            found = same_text(shape, vocab, random)
            if found is not None:
                ids[0][sample, a:b], ids[1][sample, c:d] = map(torch.tensor, found)
    return Alignment(torch.tensor(spans * samples).reshape(-1, 4), offsets, *ids)


@functools.cache  # some are wide, and each is wanted for every backend
def _random_rows(students: int, teachers: int, seed: int) -> tuple[Tensor, Tensor]:
    """Up to four teacher ids for each student, and how many of them count."""
    generator = torch.Generator().manual_seed(seed)
    width = min(4, teachers)
    indices = torch.rand(students, teachers, generator=generator).argsort(1)[:, :width].clone()
    return indices, torch.randint(1, width + 1, (students, 1), generator=generator)


def make_projection(students: int, teachers: int, seed: int = 0, empty: bool = False) -> ProjectionMatrix:
    """Rows of one to four entries: every fifth empty, exact matches, several students for one teacher."""
    indices, length = _random_rows(students, teachers, seed)
    width = indices.shape[1]
    weights = torch.tensor([0.9, 0.09, 0.009, 0.0009])[:width].repeat(students, 1)
    weights = torch.where(torch.arange(width) < length, weights, 0.0)
    weights = weights / weights.sum(1, keepdim=True)
    weights[4::5] = 0.0
    return ProjectionMatrix.from_topk(indices, weights * (not empty), teachers)


def make_case(
    students: int = 67,
    teachers: int = 59,
    samples: int = 2,
    scale: float = 3.0,
    shapes: Any = SHAPES,
    seed: int = 0,
    empty_projection: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    alignment = make_alignment(samples, shapes, (students, teachers), seed)
    lengths = [ids.shape[1] + 1 for ids in (alignment.student_ids, alignment.teacher_ids)]
    return Case(
        scale * torch.randn(samples, lengths[0], students, generator=generator, dtype=torch.float64),
        scale * torch.randn(samples, lengths[1], teachers, generator=generator, dtype=torch.float64),
        alignment,
        make_projection(students, teachers, seed, empty_projection),
    )


def agreeing_alignments(case: Case) -> tuple[Alignment, Alignment]:
    """The case's alignment, some of whose chunks begin with tokens that W does not join, and one without those."""
    of, W = case.alignment, case.projection
    assert of.student_ids is not None
    assert of.teacher_ids is not None
    kept = []
    for k, (a, _, c, _) in enumerate(of.spans.tolist()):
        sample = k // (len(of.spans) // len(of))
        known = W.row(int(of.student_ids[sample, a]))[0].tolist()
        if k % 3 and known:
            of.teacher_ids[sample, c] = known[-1]
        kept.append(int(of.teacher_ids[sample, c]) in known)
    predicted = of.predicted & torch.tensor(kept)
    assert 0 < int(predicted.sum()) < int(of.predicted.sum())
    return of, Alignment(of.spans, of.offsets, of.student_ids, of.teacher_ids, predicted=predicted)


def _size_one() -> Case:
    return make_case(1, 1, samples=1, shapes=((1, 1), (1, 1)))


def _masked() -> Case:
    case = make_case()
    spans, offsets = case.alignment.spans, case.alignment.offsets
    ids = case.alignment.student_ids, case.alignment.teacher_ids
    masked = Alignment(spans, offsets, *ids, predicted=torch.zeros(len(spans), dtype=torch.bool))
    return Case(case.student, case.teacher, masked, case.projection)


def _infinite() -> Case:
    case = make_case()
    case.student[..., 1::3] = -math.inf
    case.teacher[..., ::4] = -math.inf
    return case


def _none_finite() -> Case:
    """Rows without a finite logit."""
    case = make_case()
    case.student[:, ::2], case.teacher[:, ::3] = -math.inf, -math.inf
    return case


def _near_lowest() -> Case:
    """Rows of which some logits are below the lowest that counts, and have mass."""
    case = make_case()
    case.student[:, ::2] -= 1e4
    case.teacher[:, 1::3] -= 1e4
    return case


def _padded(value: float) -> Case:
    case = make_case(61, 71)
    student = torch.nn.functional.pad(case.student, (0, 7), value=value)
    teacher = torch.nn.functional.pad(case.teacher, (0, 3), value=value)
    return Case(student, teacher, case.alignment, case.projection)


_MAKERS: dict[str, Callable[[], Case]] = {
    "size_one": _size_one,
    "no_chunk": lambda: make_case(shapes=()),
    "all_masked": _masked,
    "teacher_below": make_case,
    "teacher_above": lambda: make_case(37, 101),
    "teacher_equal": lambda: make_case(64, 64),
    "vector_remainder": lambda: make_case(131, 83),
    "peaky": lambda: make_case(scale=60.0),
    "infinite": _infinite,
    "none_finite": _none_finite,
    "near_lowest": _near_lowest,
    "padded_head_nan": lambda: _padded(math.nan),
    "padded_head_large": lambda: _padded(50.0),
    "one_chunk": lambda: make_case(samples=1, shapes=((1, 1), (4, 5))),
}
CASES = {name: functools.cache(make) for name, make in _MAKERS.items()}
"""The hard inputs, each made once; nobody changes them."""


def positions(case: Case) -> Alignment:
    """Every student position with the teacher's of the same number, for a loss of one tokenizer."""
    count = min(case.student.shape[1], case.teacher.shape[1]) - 1
    start = torch.arange(1, count + 1)
    spans = torch.stack([start, start + 1, start, start + 1], 1).repeat(len(case.student), 1)
    return Alignment(spans, torch.arange(len(case.student) + 1) * count)


@functools.cache
def own_tests(name: str) -> ModuleType | None:
    """The test file of a loss, ``test_<folder>.py``, if it has one.

    It may define `VARIANTS`: options by name, on top of the defaults, that every kernel is tried with; `FEW_VARIANTS`,
    what slow tests take in their place; `DEVICE_STEPS`: more calls to try on a device, see `steps`; and `truth`, a
    formula that shares less with what it judges than the loss's own: ``truth(case, student rows, teacher rows, chunks,
    **options)`` gives the loss of each chunk used.
    """
    file = f"test_{folder_of(name)}"
    return importlib.import_module(file) if (Path(__file__).parent / f"{file}.py").is_file() else None


def folder_of(name: str) -> str:
    """The folder of a loss."""
    return registered()[name].__module__.rpartition(".")[2]


def variants(name: str) -> dict[str, dict[str, Any]]:
    """The options that a loss is tried with."""
    found: dict[str, dict[str, Any]] = getattr(own_tests(name), "VARIANTS", {"default": {}})
    return found


def few_variants(name: str) -> dict[str, dict[str, Any]]:
    """The options that a loss is tried with where a test is slow: what differs in its kernels."""
    found: dict[str, dict[str, Any]] = getattr(own_tests(name), "FEW_VARIANTS", variants(name))
    return found


def few_variants_of(names: Iterable[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The name of a loss and options, by a name of both."""
    return {f"{name}, {key}": (name, options) for name in names for key, options in few_variants(name).items()}


@dataclass(frozen=True)
class Operation:
    """A loss and its formula, both as ``call(case, student, teacher, **options)``."""

    name: str

    @property
    def needs(self) -> Needs:
        return registered()[self.name].needs

    def size(self, case: Case) -> int:
        """Columns of the student's logits that belong to tokens."""
        return min(case.projection.shape) if self.needs is Needs.SAME_TOKENIZER else case.projection.shape[0]

    def arguments(self, case: Case) -> list[Any]:
        """What the public function takes after the logits."""
        if self.needs is Needs.SAME_TOKENIZER:
            return [positions(case)]
        pair = {Needs.PROJECTION: "projection", Needs.PIECES: "pieces"}.get(self.needs)
        return [case.alignment, *([getattr(case, pair)] if pair else [])]

    def sizes(self, case: Case) -> dict[str, int]:
        """The sizes of the vocabularies, where the public function has to be told."""
        known = {"vocab_size": min(case.projection.shape)}
        known.update(zip(("student_vocab_size", "teacher_vocab_size"), case.projection.shape, strict=True))
        wanted = inspect.signature(registered()[self.name].function()).parameters
        return {name: size for name, size in known.items() if name in wanted}

    def function(self, linear: bool = False) -> Callable[..., Any]:
        """The public function of logits, or of hidden states and an output layer."""
        function = registered()[self.name].function()
        return getattr(xtoken, f"linear_{function.__name__}") if linear else function

    def bound(self, case: Case, linear: bool = False) -> Callable[..., Any]:
        """That function with everything but the logits given."""
        function, arguments, sizes = self.function(linear), self.arguments(case), self.sizes(case)
        return lambda *logits, **options: function(*logits, *arguments, **sizes, **options)

    def public(self, case: Case, student: Any, teacher: Any, **options: Any) -> Any:
        """The public function."""
        return self.bound(case)(student, teacher, **options)

    def teacher(self, case: Case, **options: Any) -> Teacher:
        """A teacher with this loss."""
        projection = case.projection if self.needs is Needs.PROJECTION else None
        pieces = case.pieces if self.needs is Needs.PIECES else None
        return Teacher(projection, self.name, pieces=pieces, **options)

    def few(self, count: int | None) -> dict[str, int | None]:
        """The option to compute with so many columns or tokens, or as many as possible (None), if there is one."""
        kinds = registered()[self.name].kinds()
        if NoneType in kinds.get("top_k", ()):
            return {"top_k": count}
        return {name: count or 10**6 for name in ("top_k", "uncommon_top_k") if name in kinds}

    def formula(self, case: Case, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        """The loss of each chunk of the alignment by plain formulas, on rows found by hand."""
        loss, alignment = registered()[self.name], self.arguments(case)[0]
        sizes = (self.size(case),) * 2 if self.needs is Needs.SAME_TOKENIZER else case.projection.shape
        z, y = (side.flatten(0, 1)[:, :size] for side, size in zip((student, teacher), sizes, strict=True))
        chunks: Any = rows_by_hand(alignment, student.shape[1], teacher.shape[1])
        own = getattr(own_tests(self.name), "truth", None)
        if own is not None:
            losses = own(case, z, y, chunks, **options)
        else:
            losses = loss.of(case.projection, case.pieces, **{**loss.options(), **options}).losses(z, y, chunks)
        return losses.new_zeros(alignment.num_chunks).index_copy(0, chunks.used, losses)


OPERATIONS = {name: Operation(name) for name in registered()}
PAIRS = [(name, backend) for name in OPERATIONS for backend in backends_of(name)]
"""Every loss with every backend that has it."""


def distinct() -> list[str]:
    """The losses without those that are other parameters of the kernels of one before them."""
    seen: dict[tuple[str, Any], str] = {}
    for name, loss in registered().items():
        seen.setdefault((loss.kernels, loss.prepare), name)
    return list(seen.values())


def distinct_pairs() -> list[tuple[str, str]]:
    """`PAIRS` without losses that are other parameters of kernels that are tried already: those on one backend."""
    return [pair for pair in PAIRS if pair[0] in distinct() or pair[1] in ("reference", "cpu")]


def losses_and_grad(
    call: Callable[..., Tensor], case: Case, dtype: torch.dtype, strided: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """The loss of each chunk, and the gradient for upstream gradients that all differ."""
    student, teacher = case.student.to(dtype), case.teacher.to(dtype)
    if strided:
        student, teacher = _with_strides(student), _with_strides(teacher)
    student = student.detach().requires_grad_()
    losses = call(case, student, teacher, **options)
    upstream = torch.linspace(-1.0, 2.0, losses.numel(), dtype=losses.dtype).reshape(losses.shape)
    (grad,) = torch.autograd.grad(losses, student, upstream)
    return losses.detach(), grad


def _with_strides(logits: Tensor) -> Tensor:
    """The same values inside a larger tensor: padded rows and samples that do not follow each other."""
    samples, length, width = logits.shape
    outer = torch.full((samples, length + 2, width + 5), math.nan, dtype=logits.dtype)
    outer[:, 1:-1, 2:-3] = logits
    return outer[:, 1:-1, 2:-3]


@functools.lru_cache(maxsize=512)
def _by_formula(operation: str, case: Case, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> Any:
    """The inputs rounded to a type, and losses and gradients of the plain formula in float64 and in that type: once for
    all backends, if the case is the same."""
    rounded = Case(case.student.to(dtype).double(), case.teacher.to(dtype).double(), case.alignment, case.projection)
    formula = OPERATIONS[operation].formula
    return rounded, *(losses_and_grad(formula, rounded, one, **dict(options)) for one in (torch.float64, dtype))


def check(backend: str, operation: str, case: Case, dtype: torch.dtype, strided: bool = False, **options: Any) -> None:
    """Losses and gradients of a backend are as accurate as the plain formulas in the same type."""
    rounded, *_ = _by_formula(operation, case, dtype, tuple(options.items()))
    call = OPERATIONS[operation].public
    results = losses_and_grad(call, rounded, dtype, strided, reduction="none", backend=backend, **options)
    compare(*results, operation, case, dtype, emulated.inexact(backend), **options)


def compare(
    got: Tensor, grad: Tensor, operation: str, case: Case, dtype: torch.dtype, inexact: bool = False, **options: Any
) -> None:
    """The losses and gradients of a case in a type with the plain formulas; `inexact`: of a device with its own exp."""
    _, (truth, true_grad), (plain, plain_grad) = _by_formula(operation, case, dtype, tuple(options.items()))
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert grad.dtype == dtype
    single = torch.finfo(torch.float32).eps
    largest, functions = _largest(truth), 0.0
    if inexact:
        # The plain computation is on the CPU, where exp and log are exact to rounding; on a device they are up to 2
        # units in the last place off: a relative error of probabilities, an absolute one of their logarithms.
        largest, functions = max(largest, options.get("temperature", 1.0) ** 2), single
    assert_as_accurate(got, plain, truth, 4 * single * largest, f"{operation} losses")
    floor = (torch.finfo(dtype).eps + functions) * _largest(true_grad) + torch.finfo(dtype).tiny
    assert_as_accurate(grad, plain_grad, true_grad, floor, f"{operation} gradient")


def check_labels(call: Callable[[Tensor, str], Any], student: Tensor, backend: str, what: str) -> None:
    """Loss and cross-entropy from one pass, ``call(student, backend)``, with their gradient and without it, are as
    accurate as those of the reference."""
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaf = student.float().to(dtype).requires_grad_()
        pair = call(leaf, name)
        gradient = torch.autograd.grad(pair[0] + 0.7 * pair[1], leaf)
        results.append((*pair, *gradient, *call(leaf.detach(), name)))
    for got, plain, truth in zip(*results, strict=True):
        floor = 4 * torch.finfo(torch.float32).eps * float(truth.detach().abs().max())
        assert_as_accurate(got.detach(), plain.detach(), truth.detach(), floor, what)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


@dataclass(frozen=True)
class Golden:
    """One result of the reference implementation."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    def case(self, dtype: torch.dtype = torch.float32) -> Case:
        spans = self.tensors["spans"]
        samples = self.tensors["student_logits"].shape[0]
        counts = torch.bincount(spans[:, 0].long(), minlength=samples)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        teacher = self.tensors["teacher_logits"].to(dtype)
        return Case(
            self.tensors["student_logits"].to(dtype),
            teacher,
            Alignment(spans[:, 1:], offsets),
            ProjectionMatrix.from_topk(self.tensors["w_indices"], self.tensors["w_weights"], teacher.shape[-1]),
        )


def golden(*modes: str) -> list[Golden]:
    """The golden results of these modes."""
    listed = json.loads((GOLDEN / "losses.json").read_text())
    return [Golden(f, load_file(GOLDEN / f["file"])) for f in listed if f["mode"] in modes]


def check_slopes(value: Callable[[Tensor], Tensor], at: Tensor, grad: Tensor, step: float) -> None:
    """The slope along a direction is the gradient's share of it; the step is found in float32, where it is exact.

    A loss in float32 is wrong by some 1e-7 of itself, its difference quotient by that over the step; the step's own
    error goes with its square.
    """
    generator = torch.Generator().manual_seed(5)
    directions = [grad / grad.norm()]
    directions += [torch.randn(at.shape, generator=generator) for _ in range(4)]
    for direction in directions:
        direction = direction / direction.norm()
        above, below = at + step * direction, at - step * direction
        want = ((above.double() - below.double()) * grad.double()).sum()
        got = value(above) - value(below)
        noise = 4 * torch.finfo(torch.float32).eps * float(value(at).abs())
        tolerance = noise + 2e-3 * step * float(grad.norm())
        assert math.isfinite(got)
        assert abs(float(got - want)) <= tolerance, (float(got), float(want), tolerance)
    along = value(at + step * directions[0]) - value(at - step * directions[0])
    assert along > 1.9 * step * grad.norm()  # the first direction is not lost in the noise


# Bad inputs: what is changed in a call that is otherwise right, the exception, and words of its message.
# Every backend must raise the same, because the checks come before it.
BAD_INPUTS: dict[str, tuple[Callable[[dict[str, Any]], None], type[Exception], str]] = {
    "student too narrow": (
        lambda c: c.update(student_logits=c["student_logits"][..., :-1]),
        ValueError,
        r"student_logits: expected at least 67 columns .*got 66",
    ),
    "teacher too narrow": (
        lambda c: c.update(teacher_logits=c["teacher_logits"][..., :1]),
        ValueError,
        r"teacher_logits: expected at least 59 columns .*got 1 ",
    ),
    "student too short": (
        lambda c: c.update(student_logits=c["student_logits"][:, :5]),
        ValueError,
        r"student_logits: expected a row for every token.*got 5 rows",
    ),
    "teacher too short": (
        lambda c: c.update(teacher_logits=c["teacher_logits"][:, :5]),
        ValueError,
        r"teacher_logits: expected a row for every token.*got 5 rows",
    ),
    "batch of the logits": (
        lambda c: c.update(teacher_logits=c["teacher_logits"][:1]),
        ValueError,
        r"teacher_logits: expected the batch of student_logits",
    ),
    "batch of the alignment": (
        lambda c: c.update(alignment=c["alignment"].slice(0)),
        ValueError,
        r"alignment: expected 2 samples .*got 1",
    ),
    "dimensions": (
        lambda c: c.update(student_logits=c["student_logits"][0, 0]),
        ValueError,
        r"student_logits: expected shape \[B, T, V\] or \[T, V\]",
    ),
    "integer logits": (
        lambda c: c.update(teacher_logits=c["teacher_logits"].long()),
        TypeError,
        r"teacher_logits: expected a floating-point tensor, got torch.int64",
    ),
    "no tensor": (
        lambda c: c.update(student_logits=[[0.0]]),
        TypeError,
        r"student_logits: expected a floating-point tensor, got list",
    ),
    "another device": (
        lambda c: c.update(teacher_logits=c["teacher_logits"].to("meta")),
        ValueError,
        r"teacher_logits: expected the device of student_logits",
    ),
    "no alignment": (
        lambda c: c.update(alignment=c["alignment"].spans),
        TypeError,
        r"alignment: expected an xtoken.Alignment, got Tensor",
    ),
    "temperature zero": (
        lambda c: c.update(temperature=0.0),
        ValueError,
        r"temperature: expected a positive finite number, got 0.0",
    ),
    "temperature nan": (lambda c: c.update(temperature=math.nan), ValueError, r"temperature: .*got nan"),
    "reduction": (
        lambda c: c.update(reduction="batchmean"),
        ValueError,
        r"reduction: expected one of 'mean', 'sum', 'none', got 'batchmean'",
    ),
}


def bad_call(name: str, backend: str) -> tuple[dict[str, Any], type[Exception], str]:
    """Keyword arguments of a bad call (without a projection), the exception, and its message."""
    case = make_case()
    change, exception, message = BAD_INPUTS[name]
    call: dict[str, Any] = {
        "student_logits": case.student.float(),
        "teacher_logits": case.teacher.float(),
        "alignment": case.alignment,
        "backend": backend,
    }
    change(call)
    return call, exception, message
