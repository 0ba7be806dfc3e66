"""What a loss is, and the register of all losses: criterion, command line, tests and benchmarks read it.

A frozen dataclass is a loss. Its fields are the arguments of its own operator (`xtoken.losses.operator`); its class
says what it needs of a pair of tokenizers.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from xtoken import _core
from xtoken.losses import diagnostics
from xtoken.losses.backends import Prepared
from xtoken.losses.cached import Cached, notice_changes
from xtoken.losses.logits import Source
from xtoken.losses.numerics import check_switch, check_temperature
from xtoken.pieces import PieceIndex, sides

if TYPE_CHECKING:
    from xtoken.alignment.chunks import Chunks
    from xtoken.losses.operator import Call


class Needs(Enum):
    """What a loss needs of a pair of tokenizers, beside an alignment of their tokens."""

    NOTHING = "nothing"
    PROJECTION = "a projection matrix"
    PIECES = "a piece index"
    SAME_TOKENIZER = "one tokenizer for both"


class Matrix(NamedTuple):
    """W in compressed rows."""

    row_ptr: Tensor  # int64 [V_student + 1]
    col: Tensor  # int32 [nnz]
    weight: Tensor  # floating [nnz]
    shape: tuple[int, int]
    kind: Tensor | None = None  # uint8 [V_student], as `ProjectionMatrix` has it

    @classmethod
    def of(cls, projection: Any) -> Matrix:
        """From a `ProjectionMatrix`, or anything with its attributes, such as a module with trainable weights.

        Raises TypeError if it has not these attributes, ValueError if the shape is another than that of the rows.
        """
        if not all(hasattr(projection, name) for name in cls._fields[:4]):
            raise TypeError(f"projection: expected an xtoken.ProjectionMatrix, got {type(projection).__name__}")
        row_ptr, col, weight = parts = projection.row_ptr, projection.col, projection.weight
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"projection: expected tensors, got {[type(part).__name__ for part in parts]}")
        if (row_ptr.dtype, col.dtype) != (torch.int64, torch.int32) or not weight.is_floating_point():
            expected = "row_ptr int64, col int32 and weight of a floating type"
            raise TypeError(f"projection: expected {expected}, got {[str(part.dtype) for part in parts]}")
        students, teachers = (operator.index(size) for size in projection.shape)
        shapes = [list(part.shape) for part in parts]
        if shapes[0] != [students + 1] or len(shapes[1]) != 1 or shapes[2] != shapes[1]:
            expected = f"row_ptr [{students + 1}] for shape {[students, teachers]}, and a weight an entry of col"
            raise ValueError(f"projection: expected {expected}, got {shapes}")
        kind = getattr(projection, "kind", None)
        if kind is not None and not (isinstance(kind, Tensor) and kind.dtype == torch.uint8):
            raise TypeError(f"projection: expected kind uint8, got {getattr(kind, 'dtype', type(kind).__name__)}")
        if kind is not None and list(kind.shape) != [students]:
            raise ValueError(f"projection: expected kind [{students}], got {list(kind.shape)}")
        return cls(row_ptr, col, weight, (students, teachers), kind)

    def may_lack(self, side: int, width: int) -> bool:
        """Whether no entry is of a token (of the student's: side 0) behind the first so many."""
        used = (lambda: self.row_ptr[width:].diff() > 0, lambda: self.col >= width)[side]
        return _LACKING.of((self.row_ptr, self.col), lambda: not used().any(), side, width)

    def check(self) -> None:
        """Raises ValueError for entries that are in no row or column, and on the CPU for fixed weights that are none.
        Waits for a device only the first time."""
        _FITS.of((self.col, self.row_ptr), self._check, self.shape)
        if self.weight.device.type == "cpu" and not self.weight.requires_grad:
            _FITS.of((self.weight,), self._check_weight)

    def _check_weight(self) -> bool:
        if not bool(((self.weight >= 0) & self.weight.isfinite()).all()):
            raise ValueError("projection: expected finite weights >= 0")
        return True

    def _check(self) -> bool:
        row_ptr, col = self.row_ptr.detach().cpu(), self.col.detach().cpu()
        total, teachers = len(col), self.shape[1]
        if row_ptr[0] != 0 or row_ptr[-1] != total or bool((row_ptr.diff() < 0).any()):
            raise ValueError(
                f"projection: expected row_ptr to go from 0 to {total} (the entries of col) without a step back"
            )
        if total and (int(col.min()) < 0 or int(col.max()) >= teachers):
            raise ValueError(
                f"projection: expected col in 0 ... {teachers - 1}, got {int(col.min())} to {int(col.max())}"
            )
        return True


_FITS = Cached[bool]()
"""Tables whose numbers are in their places."""


def check_pieces(pieces: Tensor) -> None:
    """Raises ValueError for a tensor that is no `PieceIndex.data`. Waits for a device only the first time."""
    if pieces.dtype != torch.int32 or pieces.dim() != 1:
        raise ValueError(f"pieces: expected int32 [n], got {pieces.dtype} {list(pieces.shape)}")

    def check() -> bool:
        _core.check_piece_index(pieces.cpu().contiguous().numpy())
        return True

    _FITS.of((pieces,), check)


@dataclass(frozen=True)
class Loss:
    """A distillation loss with everything that one call of it needs beside logits and an alignment.

    Fields are tensors, scalars, or `W`, a `Matrix`. A loss of `Needs.PROJECTION` has that field, and one of
    `Needs.PIECES` the field ``pieces`` (`PieceIndex.data`); ``text``, if it has one, is `PieceIndex.text`. Its module
    has the public function ``<name>_loss``, or, if it has no other loss, ``<module>_loss``, named as the last part of
    the module. Kernels are in the modules ``cpu`` and ``cuda`` of the package `kernels`, as a function ``run`` (see
    `xtoken.losses.backends.Run`); without them the formula is the loss on every device. The module ``parallel`` beside
    them has the class ``InParts``, the formula for logits that lie on several ranks (see `xtoken.parallel`); without
    it, or with a reason in `whole_rows`, the loss takes whole rows only.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """As people write it."""
    needs: ClassVar[Needs]
    kernels: ClassVar[str]
    """Package with the modules of its kernels; default: its own."""
    switches: ClassVar[tuple[str, ...]] = ()
    """Its fields that are a bool; `register` finds them."""
    teacher_ids: ClassVar[tuple[str, ...]] = ()
    """Fields that hold ids of the teacher's tokens, beside W and pieces."""
    trains_projection: ClassVar[bool] = False
    """Whether the weights of W get a gradient."""
    by_rank: ClassVar[bool] = False
    """Whether it compares sorted probabilities: where two exchange their ranks, the gradient jumps."""
    reads_tokens: ClassVar[bool] = False
    """Whether it looks at the realised tokens of every chunk, whose ids are then checked first."""
    whole_rows: ClassVar[str] = ""
    """Why it takes no logits in parts, if it needs whole rows."""
    is_default: ClassVar[bool] = False
    """Whether it is the loss of a `Teacher` that says only what the pair of tokenizers has (`needs`)."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"": {}})
    """What is worth a measurement of its own: options, by what is added to the title. Where that ends with "numbers",
    chunks have several tokens."""

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for an option out of its range; here for a ``temperature``, if it has one."""
        if hasattr(self, "temperature"):
            check_temperature(self.temperature)

    @property
    def realised(self) -> bool:
        """Whether it needs the realised token ids of the alignment."""
        return self.reads_tokens

    @property
    def trained(self) -> Tensor | None:
        """The weights of W, if they may get a gradient."""
        W: Matrix | None = getattr(self, "W", None)
        return W.weight if W is not None and self.trains_projection else None

    def check(self) -> None:
        """Raises ValueError if the pair of tokenizers leaves it nothing to compare, or only by rank; a `Teacher` asks,
        and so does the operator at every call, so it must not wait for a device after the first."""
        W: Matrix | None = getattr(self, "W", None)
        if W is not None and not len(W.col):
            raise ValueError(
                "projection: expected a matrix with entries, got none: no token of the student has an image to compare"
            )

    def check_switches(self) -> None:
        """Raises TypeError for a switch that is neither True nor False."""
        for name in self.switches:
            check_switch(getattr(self, name), name)

    def may_lack(self, side: int, width: int) -> bool:
        """Whether a side (0: the student) may have only so many columns: no token beyond takes part in the loss."""
        self.check_tables()
        W, pieces = getattr(self, "W", None), getattr(self, "pieces", None)
        if pieces is not None:
            return _LACKING.of((pieces,), lambda: not sides(pieces.cpu())[side].length[width:].any(), side, width)
        return W is not None and W.may_lack(side, width)

    def check_tables(self) -> None:
        """Raises ValueError if W or the piece index is not what it was made as, since kernels go where it points."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Matrix):
                notice_changes(*value[:3], value.kind)
                value.check()
            elif isinstance(value, Tensor):
                notice_changes(value)
        if self.needs is Needs.PIECES:
            check_pieces(self.pieces)  # type: ignore[attr-defined]

    def prepare(self, call: Call, student: Source, teacher: Source) -> Prepared:
        """The chunks, and what kernels and formula get to see of this loss (default: all of them, and itself)."""
        chunks = call.chunks(self.realised)
        if self.reads_tokens:
            chunks.check_ids((call.student_size, call.teacher_size), several=False)
        return Prepared(chunks, self)

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        """The formula in plain, differentiable PyTorch: the loss of each chunk.

        Parameters
        ----------
        student : floating [N_s, V_student]
            One row for each token position of a batch.
        teacher : floating [N_t, V_teacher]
        chunks : Chunks
            Which rows predict each chunk.
        weight : floating [nnz], optional
            Takes the place of the weights of W, if those are trained.

        Returns
        -------
        Tensor
            [K], in the widest type of the logits, at least float32; multiplied by the square of a temperature.
        """
        raise NotImplementedError(f"{type(self).__name__} has no formula")

    def chosen(self, teacher: Source, device: torch.device, backend: str) -> Loss:
        """The same with what depends on the teacher's logits chosen (columns), to be used more than once."""
        return self

    def diagnose(
        self, student: Source, teacher: Source, chunks: Chunks, projection: Any, device: torch.device, backend: str
    ) -> Tensor:
        """float32 [5]: `xtoken.losses.diagnostics.NAMES` for some of the chunks; nan where there is no way to tell."""
        return diagnostics.by_projection(student, teacher, chunks, projection, device, backend)

    @classmethod
    def function(cls) -> Callable[..., Any]:
        """The public function."""
        module = sys.modules[cls.__module__]
        is_alone = sum(one.__module__ == cls.__module__ for one in REGISTER.values()) == 1
        names = [f"{cls.name}_loss"] + [f"{cls.__module__.rpartition('.')[2]}_loss"] * is_alone
        found: Callable[..., Any] | None = next((getattr(module, one) for one in names if hasattr(module, one)), None)
        if found is None:
            expected = " or ".join(dict.fromkeys(names))
            raise TypeError(f"{cls.__name__}: expected its public function {expected} beside it, in {cls.__module__}")
        return found

    @classmethod
    def options(cls) -> dict[str, Any]:
        """What a `Teacher` may say of it, with the defaults of the public function."""
        own = {field.name for field in fields(cls)}
        parameters = inspect.signature(cls.function()).parameters.values()
        return {one.name: one.default for one in parameters if one.name in own and one.kind is one.KEYWORD_ONLY}

    @classmethod
    def kinds(cls) -> dict[str, tuple[Any, ...]]:
        """What each of `options` takes, as the public function says it: types (`NoneType` too), or words."""
        hints = get_type_hints(cls.function())
        given = {name: hints.get(name, type(default)) for name, default in cls.options().items()}
        return {name: get_args(kind) or (kind,) for name, kind in given.items()}

    @classmethod
    def of(cls, projection: Any, pieces: Any, **options: Any) -> Loss:
        """For a pair of tokenizers, whose projection or pieces are given as far as the loss needs them."""
        if cls.needs is Needs.PROJECTION:
            return cls(W=Matrix.of(projection), **options)  # type: ignore[call-arg]
        if cls.needs is Needs.PIECES:
            if not isinstance(pieces, PieceIndex):
                raise TypeError(f"pieces: expected an xtoken.PieceIndex, got {type(pieces).__name__}")
            return cls(pieces=pieces.data, **options)  # type: ignore[call-arg]
        return cls(**options)


_LACKING = Cached[bool]()
"""Of W or pieces, a side and a width: what `may_lack` found."""

REGISTER: dict[str, type[Loss]] = {}


def registered() -> dict[str, type[Loss]]:
    """Every loss by its name, in the order in which they were registered."""
    return dict(REGISTER)
