"""What a loss is, and the register of all losses: criterion, command line, tests and benchmarks read it.

A frozen dataclass is a loss. Its fields are the arguments of its own operator (`xtoken.losses.operator`); its class
says what it needs of a pair of tokenizers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from xtoken.losses import diagnostics
from xtoken.losses.backends import Prepared
from xtoken.losses.cached import Cached
from xtoken.losses.logits import Source
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

    @classmethod
    def of(cls, projection: Any) -> Matrix:
        """From a `ProjectionMatrix`, or anything with its attributes, such as a module with trainable weights.

        Raises
        ------
        TypeError
            If it has not these attributes.
        ValueError
            If the shape is another than that of the rows.
        """
        if not all(hasattr(projection, name) for name in cls._fields):
            raise TypeError(f"projection: expected an xtoken.ProjectionMatrix, got {type(projection).__name__}")
        if len(projection.row_ptr) != projection.shape[0] + 1:
            expected = f"[{projection.shape[0] + 1}] for shape {list(projection.shape)}"
            raise ValueError(f"projection: expected row_ptr {expected}, got {list(projection.row_ptr.shape)}")
        return cls(projection.row_ptr, projection.col, projection.weight, tuple(projection.shape))


@dataclass(frozen=True)
class Loss:
    """A distillation loss with everything that one call of it needs beside logits and an alignment.

    Fields are tensors, scalars, or `W`, a `Matrix`. A loss of `Needs.PROJECTION` has that field, and one of
    `Needs.PIECES` the field ``pieces`` (`PieceIndex.data`). Its module ``a.b.name`` has the public function
    ``name_loss``. Kernels are in the modules ``cpu`` and ``cuda`` of the package `kernels`, as a function ``run`` (see
    `xtoken.losses.backends.Run`); without them the formula is the loss on every device.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """As people write it."""
    needs: ClassVar[Needs]
    kernels: ClassVar[str]
    """Package with the modules of its kernels; default: its own."""
    trains_projection: ClassVar[bool] = False
    """Whether the weights of W get a gradient."""
    is_default: ClassVar[bool] = False
    """Whether it is the loss of a `Teacher` that says only what the pair of tokenizers has (`needs`)."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"": {}})
    """What is worth a measurement of its own: options, by what is added to the title. Where that ends with "numbers",
    chunks have several tokens."""

    @property
    def realised(self) -> bool:
        """Whether it needs the realised token ids of the alignment."""
        return False

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

    def may_lack(self, side: int, width: int) -> bool:
        """Whether a side (0: the student) may have only so many columns: no token beyond takes part in the loss."""
        W, pieces = getattr(self, "W", None), getattr(self, "pieces", None)
        if pieces is not None:
            return _LACKING.of((pieces,), lambda: not sides(pieces.cpu())[side].length[width:].any(), side, width)
        if W is None:
            return False
        used = (W.row_ptr[width:].diff() > 0, W.col >= width)[side]
        return _LACKING.of((W.row_ptr, W.col), lambda: not used.any(), side, width)

    def prepare(self, call: Call, student: Source, teacher: Source) -> Prepared:
        """The chunks, and what kernels and formula get to see of this loss (default: all of them, and itself)."""
        return Prepared(call.chunks(self.realised), self)

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
        """float32 [4]: `xtoken.losses.diagnostics.NAMES` for some of the chunks; nan where there is no way to tell."""
        return diagnostics.by_projection(student, teacher, chunks, projection, device, backend)

    @classmethod
    def function(cls) -> Callable[..., Any]:
        """The public function."""
        package = cls.__module__.rpartition(".")[2]
        found: Callable[..., Any] | None = getattr(sys.modules[cls.__module__], f"{package}_loss", None)
        if found is None:
            raise TypeError(
                f"{cls.__name__}: expected its public function {package}_loss beside it, in {cls.__module__}"
            )
        return found

    @classmethod
    def options(cls) -> dict[str, Any]:
        """What a `Teacher` may say of it, with the defaults of the public function."""
        own = {field.name for field in fields(cls)}
        parameters = inspect.signature(cls.function()).parameters.values()
        return {one.name: one.default for one in parameters if one.name in own and one.kind is one.KEYWORD_ONLY}

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

REGISTER: dict[str, type[Loss]] = {}


def registered() -> dict[str, type[Loss]]:
    """Every loss by its name, in the order in which they were registered."""
    return dict(REGISTER)
