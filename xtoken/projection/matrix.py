"""The projection matrix W: where each student token's probability goes in the teacher's vocabulary."""

from __future__ import annotations

import copy
import itertools
import operator
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xtoken import _core, plot
from xtoken.alignment.alignment import as_tensor, int_tensor
from xtoken.hub import OnHub
from xtoken.notebook import html_table
from xtoken.storage import TensorFile, atomic, check_present, fingerprints, lasting
from xtoken.teacher_order import TeacherOrder
from xtoken.vocabulary import MOST_HOLES, TokenizerLike, Vocabulary

from . import nemo

ROW_KINDS: tuple[str, ...] = _core.row_kinds
"""How a row came about: no image; a teacher token with the same bytes; a special token of the same role or literal;
the token's text re-tokenized by the teacher; given from outside; re-tokenized, but the pieces put together are not the
token's bytes, or it has an entry of the third pass for a token that the student spells otherwise.
`ProjectionMatrix.kind` holds indices."""

_SETTINGS = ("beta", "gamma", "top_k", "passes")
_TENSORS = {"row_ptr": ("I64", 1), "col": ("I32", 1), "weight": ("F32", 1), "kind": ("U8", 1)}
SUM_TOLERANCE = 1e-3
"""By how much the weights of a built row in a file may miss a sum of 1."""


class ProjectionMatrix(OnHub):
    """A sparse matrix [V_student, V_teacher] in compressed sparse rows.

    Rows built by `build` sum to 1, or are empty where a student token has no image in the teacher's vocabulary.
    Raises ValueError if the arrays do not describe such a matrix; the message says which and where.

    Parameters
    ----------
    row_ptr : int64 [V_student + 1]
        Row ``s`` has the entries ``row_ptr[s] .. row_ptr[s + 1] - 1``.
    col : int32 [nnz]
        Teacher token ids, strictly increasing within a row.
    weight : float32 [nnz]
        Finite weights >= 0.
    teacher_vocab_size : int
        V_teacher.
    kind : uint8 [V_student], optional
        Indices into `ROW_KINDS`. Default: ``"given"``.
    metadata : mapping of str to str, optional
        How it was built: fingerprints of both vocabularies, beta, gamma, top_k, passes.
    """

    FILE_NAME = "projection.safetensors"
    TITLE = "W, which projects the student's probabilities onto the teacher's tokens"
    ARGUMENT = "projection"
    FILE = TensorFile(
        "a projection matrix of xtoken", {"format": "xtoken.projection", "version": "2"}, _TENSORS,
        rebuild="xtoken project (or ProjectionMatrix.build and save)",
    )  # fmt: skip

    def __init__(
        self,
        row_ptr: Any,
        col: Any,
        weight: Any,
        teacher_vocab_size: int,
        kind: Any = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.row_ptr = lasting(int_tensor(row_ptr, "row_ptr", torch.int64).contiguous())
        self.col = lasting(int_tensor(col, "col", torch.int32).contiguous())
        self.weight = lasting(as_tensor(weight, torch.float32))
        if self.row_ptr.dim() != 1 or self.row_ptr.numel() == 0:
            raise ValueError(f"row_ptr: expected shape [V_student + 1], got {list(self.row_ptr.shape)}")
        if not hasattr(teacher_vocab_size, "__index__"):
            raise TypeError(f"teacher_vocab_size: expected an int, got {type(teacher_vocab_size).__name__}")
        self.shape = (self.row_ptr.numel() - 1, operator.index(teacher_vocab_size))
        if not 0 <= self.shape[1] < 2**31:
            raise ValueError(f"teacher_vocab_size: expected a size that int32 can number, got {teacher_vocab_size}")
        given = torch.full((self.shape[0],), ROW_KINDS.index("given"), dtype=torch.uint8, device="cpu")
        self.kind = given if kind is None else int_tensor(kind, "kind", torch.uint8)
        self.metadata = dict(metadata or {})
        (rows, columns), nnz = self.shape, self.nnz
        if self.col.dim() != 1 or self.weight.shape != self.col.shape:
            got = f"{list(self.weight.shape)} for {list(self.col.shape)}"
            raise ValueError(f"weight: expected one weight an entry of col, got {got}")
        if self.kind.shape != (rows,) or (rows and int(self.kind.max()) >= len(ROW_KINDS)):
            raise ValueError(f"kind: expected [{rows}] indices below {len(ROW_KINDS)}, got {list(self.kind.shape)}")
        if int(self.row_ptr[0]) != 0 or int(self.row_ptr[-1]) != nnz or bool((self.row_ptr.diff() < 0).any()):
            raise ValueError(f"row_ptr: expected a non-decreasing sequence from 0 to {nnz}")
        if nnz and (int(self.col.min()) < 0 or int(self.col.max()) >= columns):
            got = f"{int(self.col.min())} to {int(self.col.max())}"
            raise ValueError(f"col: expected teacher ids in [0, {columns}), got {got}")
        row_of = self.row_index
        repeated = ((self.col.diff() <= 0) & (row_of.diff() == 0)).nonzero()
        if len(repeated):
            raise ValueError(f"col: expected strictly increasing ids within row {int(row_of[repeated[0]])}")
        if not bool(((self.weight >= 0) & self.weight.isfinite()).all()):
            raise ValueError("weight: expected finite weights >= 0")

    @classmethod
    def build(
        cls,
        student_tok: TokenizerLike,
        teacher_tok: TokenizerLike,
        top_k: int = 4,
        beta: float = 0.9,
        gamma: float = 0.1,
        reverse: bool = False,
        *,
        fold_space_punctuation: bool = False,
    ) -> ProjectionMatrix:
        """Builds W by the rules and constants of X-Token (arXiv 2605.21699), section "projection matrix".

        Deterministic. Llama 3 to Qwen3 takes about 0.1 GB beyond the two tokenizers.
        Pass 1 gives weight 1 to the teacher token with the same bytes, or with the same role. Pass 2 encodes the text
        of every other token by the teacher; piece ``i`` gets the weight ``beta * gamma**i``, weights of a repeated
        piece add up, the `top_k` largest are kept (the earlier on ties) and divided by their sum. Pass 3 (`reverse`)
        encodes the teacher tokens that nothing reaches by the student and adds ``beta * gamma**i`` to (piece ``i``,
        token); changed rows are cut to `top_k` and normalised again.

        Parameters
        ----------
        student_tok, teacher_tok
            Tokenizers, as for `Vocabulary.from_tokenizer`.
        top_k : int
            Most entries of a row.
        beta, gamma : float
            Weight of the first piece, and the factor from one piece to the next. Only gamma matters within a row. The
            default is the paper's. In ``bench/reproduce.py`` training with gamma 0 ended ahead of it, within the spread
            of the seeds; but then a token's first piece looks like an exact match to `common_pairs` and to the audit.
        reverse : bool
            Whether to run pass 3.
        fold_space_punctuation : bool
            Whether a space and punctuation (``" ,"``) equal the punctuation alone, if no token has the same bytes.

        Examples
        --------
        >>> student = Vocabulary([b"2", b"201", b"!"])
        >>> teacher = Vocabulary([b"0", b"1", b"2"])
        >>> W = ProjectionMatrix.build(student, teacher)
        >>> W
        ProjectionMatrix([3, 3], nnz=4, exact=1, role=0, pieces=1, none=1)
        >>> [(i, round(w, 4)) for i, w in zip(*(x.tolist() for x in W.row(1)))]
        [(0, 0.0901), (1, 0.009), (2, 0.9009)]
        """
        student = Vocabulary.from_tokenizer(student_tok)
        teacher = Vocabulary.from_tokenizer(teacher_tok)
        image, kind = _core.exact_images(student._core, teacher._core, fold_space_punctuation)
        cut = student.pieces(image < 0, teacher)
        rows = _core.build_rows(image, *cut, len(teacher), beta, gamma, top_k)
        partial = [token for token, _ in _spelled_otherwise(student, cut, teacher)]
        if reverse:
            unreached = np.ones(len(teacher), dtype=bool)
            unreached[rows[1]] = False
            cut = teacher.pieces(unreached, student)
            rows = _core.add_reverse(*rows, *cut, beta, gamma, top_k)
            for token, pieces in _spelled_otherwise(teacher, cut, student):
                partial += [i for i in pieces if token in rows[1][rows[0][i] : rows[0][i + 1]]]
        kind[(kind == ROW_KINDS.index("none")) & (np.diff(rows[0]) > 0)] = ROW_KINDS.index("pieces")
        kind[partial] = ROW_KINDS.index("partial")
        settings = {"beta": repr(beta), "gamma": repr(gamma), "top_k": repr(top_k)}
        passes = "exact, pieces, reverse" if reverse else "exact, pieces"
        metadata = {**fingerprints(student, teacher), **settings, "passes": passes}
        return cls(*rows, teacher_vocab_size=len(teacher), kind=kind, metadata=metadata)

    @classmethod
    def from_topk(cls, indices: Any, weights: Any, teacher_vocab_size: int) -> ProjectionMatrix:
        """From the largest entries of each row, as a rectangular table.

        `indices` int [V_student, k] are teacher ids in any order, -1 where a row has fewer entries; `weights` float
        [V_student, k] are theirs, and entries of weight 0 are left out. Raises ValueError if the shapes differ, an id
        is out of range or repeated in a row, or a weight is negative or not finite.
        """
        indices = int_tensor(indices, "indices", torch.int64)
        weights = as_tensor(weights, torch.float32)
        if indices.dim() != 2 or indices.shape != weights.shape:
            got = f"{list(indices.shape)}, got {list(weights.shape)}"
            raise ValueError(f"weights: expected the shape [V_student, k] of indices, {got}")
        keep = (indices != -1) & (weights != 0)
        order = torch.where(keep, indices, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        keep, indices, weights = keep.gather(1, order), indices.gather(1, order), weights.gather(1, order)
        row_ptr = nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
        return cls(row_ptr, indices[keep], weights[keep], teacher_vocab_size)

    def row(self, student_id: int) -> tuple[Tensor, Tensor]:
        """Teacher ids (int32) and weights (float32) of one student token. ValueError if there is no such token."""
        if not 0 <= student_id < self.shape[0]:
            raise ValueError(f"student_id: expected an id in [0, {self.shape[0]}), got {student_id}")
        first, last = self.row_ptr[student_id : student_id + 2].tolist()
        return self.col[first:last], self.weight[first:last]

    @property
    def row_index(self) -> Tensor:
        """int64 [nnz]: the row (student id) of each entry."""
        return torch.repeat_interleave(torch.arange(self.shape[0], device=self.row_ptr.device), self.row_ptr.diff())

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.col.numel()

    def to(self, device: torch.device | str) -> ProjectionMatrix:
        """The same matrix with its tensors on `device`."""
        placed = copy.copy(self)
        vars(placed).update({k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})
        return placed

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: complete, or not at all.

        It holds ``row_ptr``, ``col``, ``weight`` and ``kind``, and in its metadata the format version, the sizes, both
        fingerprints and the parameters of `build`.
        """
        sizes = {"student_vocab_size": str(self.shape[0]), "teacher_vocab_size": str(self.shape[1])}
        self.FILE.save(path, {name: getattr(self, name) for name in _TENSORS}, **self.metadata, **sizes)

    @classmethod
    def _of_file(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> ProjectionMatrix:
        rows, columns = (int(metadata.pop(f"{side}_vocab_size")) for side in ("student", "teacher"))
        matrix = cls(**tensors, teacher_vocab_size=columns, metadata=metadata)
        if matrix.shape[0] != rows:
            raise ValueError(f"row_ptr has {matrix.shape[0]} rows, the metadata says {rows}")
        if not 0 <= columns <= MOST_HOLES + 64 * (rows + matrix.nnz):
            raise ValueError(f"teacher_vocab_size: {columns}, for {rows} rows and {matrix.nnz} entries")
        matrix._check_kinds()
        matrix._warn_of_shared_images()
        return matrix

    def _check_kinds(self) -> None:
        """Raises ValueError if a row is not what its kind says, or if nothing tells the tokenizers of built rows."""
        counts = self.row_ptr.diff()
        sums = self.weight.new_zeros(self.shape[0]).index_add(0, self.row_index, self.weight)
        kinds = {name: self.kind == k for k, name in enumerate(ROW_KINDS)}
        is_built = ~(kinds["given"] | kinds["none"])
        is_one = kinds["exact"] | kinds["role"]
        wrong = (kinds["none"] & (counts > 0)) | (is_built & ~((sums - 1).abs() <= SUM_TOLERANCE))
        if "reverse" not in self.metadata.get("passes", ""):
            wrong |= is_one & (counts != 1)
        for row in wrong.nonzero()[:, 0].tolist():
            kind, entries, total = ROW_KINDS[int(self.kind[row])], int(counts[row]), float(sums[row])
            raise ValueError(
                f"weight: row {row} is of kind {kind!r}, but has {entries} entries that sum to {total:.6g}"
            )
        if is_built.any():
            check_present(self.metadata)

    def _warn_of_shared_images(self) -> None:
        """Of files whose kinds do not tell which of several student tokens of one text is the one that is written."""
        is_exact = (self.kind == ROW_KINDS.index("exact")) & (self.row_ptr.diff() == 1)
        images = self.col[self.row_ptr[:-1][is_exact]]
        if shared := len(images) - len(images.unique()):
            warnings.warn(
                f"W was built by an earlier version: {shared} of its exact rows have the teacher token of another, and "
                "losses of common tokens, and the audit, may pair the one that is never written; build it anew",
                stacklevel=4,
            )

    def facts(self) -> list[str]:
        settings = ", ".join(f"{name} {self.metadata[name]}" for name in _SETTINGS if name in self.metadata)
        return [repr(self), *([f"built with {settings}"] if settings else [])]

    @classmethod
    def from_nemo(
        cls, path: str | os.PathLike[str], teacher_vocab_size: int, student_vocab_size: int | None = None
    ) -> ProjectionMatrix:
        """Reads a W of NeMo-RL: a dict of ``indices`` and ``likelihoods`` [V_student, k], or of pairs of ids to weight.

        `student_vocab_size` is needed for the second form, whose last rows may be missing; a table that has fewer rows
        gets empty ones. No code in the file is run. Raises ValueError if the file holds something else, is damaged, was
        not written by `torch.save` (zip), or has more rows; FileNotFoundError if there is none.
        """
        content = nemo.read(path)
        try:
            if len(content) == 2:
                matrix = cls.from_topk(*content, teacher_vocab_size)
            else:
                row, col, weight = content
                if student_vocab_size is None:
                    raise ValueError("student_vocab_size: expected a size for a file of pairs of ids, which has none")
                order = (row << 32 | col).argsort()
                order = order[weight[order] != 0]
                row_ptr = nn.functional.pad(torch.bincount(row[order]).cumsum(0), (1, 0))
                matrix = cls(row_ptr, col[order], weight[order], teacher_vocab_size)
            missing = 0 if student_vocab_size is None else student_vocab_size - matrix.shape[0]
            if missing < 0:
                raise ValueError(f"student_vocab_size: expected at least {matrix.shape[0]}, got {student_vocab_size}")
            row_ptr = torch.cat([matrix.row_ptr, matrix.row_ptr[-1:].expand(missing)])
            return cls(row_ptr, matrix.col, matrix.weight, teacher_vocab_size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_nemo(self, path: str | os.PathLike[str]) -> None:
        """Writes a W for NeMo-RL: entries of each row by falling weight, unused places with index -1 and weight 0.

        There are at least two columns, by the second of which NeMo-RL tells exact matches.
        """
        content = nemo.table(self.row_ptr, self.row_index, self.col, self.weight)
        with atomic(path) as temporary:
            torch.save(content, temporary)

    def within(self, rows: int | None, columns: int | None) -> ProjectionMatrix:
        """The matrix with only the entries of the first rows and columns; None: of all. The shape stays.

        A row that loses all entries is of kind "none" then, one that loses some "given".
        """
        sizes = [size if most is None else most for size, most in zip(self.shape, (rows, columns), strict=True)]
        row = self.row_index
        keep = (row < sizes[0]) & (self.col < sizes[1])
        if bool(keep.all()):
            return self
        counts = torch.bincount(row[keep], minlength=self.shape[0])
        cut = torch.where(counts > 0, ROW_KINDS.index("given"), ROW_KINDS.index("none"))
        kind = torch.where(counts == self.row_ptr.diff(), self.kind, cut)
        ptr = nn.functional.pad(counts.cumsum(0), (1, 0))
        return ProjectionMatrix(ptr, self.col[keep], self.weight[keep], self.shape[1], kind, self.metadata)

    def teacher_order(self) -> TeacherOrder:
        """The order of the teacher's columns in which losses that project by W read both sides alike.

        Where a row and a column have one entry, of weight 1, in common and no other, the teacher's token gets the
        student's number as its column (if the teacher has so many). The other columns get, in ascending order, the
        partners of students beyond, the tokens with other entries, and last those without; each by their ids.

        Examples
        --------
        >>> W = ProjectionMatrix.from_topk([[3, -1], [1, 2], [0, -1]], [[1.0, 0.0], [0.9, 0.1], [1.0, 0.0]], 4)
        >>> W.teacher_order().tokens.tolist()
        [3, 1, 0, 2]
        """
        row, col = self.row_index.cpu(), self.col.cpu().long()
        rows, columns = torch.bincount(row, minlength=self.shape[0]), torch.bincount(col, minlength=self.shape[1])
        is_pair = (rows[row] == 1) & (columns[col] == 1) & (self.weight.detach().cpu() == 1.0)
        partner = torch.full((self.shape[0],), -1, device="cpu")
        partner[row[is_pair]] = col[is_pair]
        has_entries = columns > 0
        others = has_entries.clone()
        others[col[is_pair]] = False
        return TeacherOrder.beside(partner, torch.cat([others.nonzero()[:, 0], (~has_entries).nonzero()[:, 0]]))

    def learnable(self) -> LearnableProjection:
        """A module with the same entries, whose weights are trained with the student."""
        return LearnableProjection(self)

    def plot(self, axes: Any = None) -> Any:
        """Draws how many rows have 0, 1, 2 ... entries, by the kind of the row.

        `axes` are matplotlib's (default: of a new figure), and are returned. ImportError without matplotlib.
        """
        sizes = self.row_ptr.diff()
        counts = {
            name: plot.counted(sizes[self.kind == code].tolist())
            for code, name in enumerate(ROW_KINDS)
            if bool((self.kind == code).any())
        }
        return plot.stacked_counts(axes, counts, "teacher tokens in the row", f"W {list(self.shape)}", side=False)

    def _repr_html_(self) -> str:
        sizes = self.row_ptr.diff()
        pieces = torch.bincount(sizes[sizes > 0]).tolist()
        rows = []
        for code, kind in enumerate(ROW_KINDS):
            of_kind = torch.bincount(sizes[self.kind == code], minlength=len(pieces)).tolist()
            if sum(of_kind):
                rows.append((kind, sum(of_kind), *of_kind[1:]))
        return html_table(repr(self), ("rows", "count", *(f"{k} entries" for k in range(1, len(pieces)))), rows)

    def __repr__(self) -> str:
        counts = dict(zip(ROW_KINDS, torch.bincount(self.kind.long(), minlength=len(ROW_KINDS)).tolist(), strict=True))
        names = ("exact", "role", "pieces", "partial", "given", "none")
        rare = ("partial", "given")
        kinds = ", ".join(f"{name}={counts[name]}" for name in names if counts[name] or name not in rare)
        return f"ProjectionMatrix({list(self.shape)}, nnz={self.nnz}, {kinds})"


def _spelled_otherwise(vocabulary: Vocabulary, cut: Any, other: Vocabulary) -> Iterator[tuple[int, list[int]]]:
    """The tokens whose pieces in the other vocabulary, put together, are not their bytes, and these pieces."""
    tokens, ptr, ids = (part.tolist() for part in cut)
    for token, (first, last) in zip(tokens, itertools.pairwise(ptr), strict=True):
        if other.decode(ids[first:last]) not in (b"", vocabulary[token]):
            yield token, ids[first:last]


class LearnableProjection(nn.Module):
    """W with trainable weights, for losses that project by it, and for `xtoken.Teacher`.

    The parameter ``logits`` [nnz] holds a number for each entry; a softmax over each row makes the weights, so rows
    keep summing to 1. At first they are those of the given matrix, scaled to a sum of 1.

    Parameters
    ----------
    projection : ProjectionMatrix
        Every weight above zero, else ValueError: its logarithm could not be trained.
    """

    row_ptr: Tensor
    col: Tensor
    row_index: Tensor
    kind: Tensor

    def __init__(self, projection: ProjectionMatrix) -> None:
        super().__init__()
        for row in projection.row_index[projection.weight <= 0].tolist():
            raise ValueError(f"projection: expected weights above 0, got 0 in row {row}")
        self.shape = projection.shape
        self.metadata = dict(projection.metadata)
        for name in ("row_ptr", "col", "row_index", "kind"):
            self.register_buffer(name, getattr(projection, name), persistent=False)
        self.logits = nn.Parameter(projection.weight.log())

    @property
    def weight(self) -> Tensor:
        """float32 [nnz], differentiable with respect to ``logits``."""
        row, logits = self.row_index, self.logits.detach()
        top = logits.new_full((self.shape[0],), -torch.inf).scatter_reduce(0, row, logits, "amax")
        mass = (self.logits - top[row]).exp()
        return mass / mass.new_zeros(self.shape[0]).index_add(0, row, mass)[row]

    def projection(self) -> ProjectionMatrix:
        """The matrix with the present weights, to save or to use without training."""
        tensors = {name: getattr(self, name).detach().cpu() for name in _TENSORS}
        return ProjectionMatrix(**tensors, teacher_vocab_size=self.shape[1], metadata=self.metadata)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, nnz={self.col.numel()}"
