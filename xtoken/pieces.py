"""The piece index: the common events of two vocabularies, and how the tokens of each begin in the other's tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _core
from .storage import TensorFile, check_fingerprints, fingerprints, lasting
from .vocabulary import TokenizerLike, Vocabulary

HEAD = 5
"""Numbers before the arrays of `PieceIndex.data`: both vocabulary sizes, events, and pieces of each side."""

_FILE = TensorFile("a piece index of xtoken", {"format": "xtoken.pieces", "version": "1"}, {"data": ("I32", 1)})


class Side(NamedTuple):
    """One vocabulary of a `PieceIndex`, int32 views into its data.

    Pieces are ids of the other vocabulary that spell the token, and V_other for a rest that it cannot spell. A token
    with an exact partner has that as its only piece; one that stands for no text has none.
    """

    event: Tensor  # [V] in [0, events)
    length: Tensor  # [V] bytes of text
    order: Tensor  # [V] ids, ascending by their sequences of pieces
    ptr: Tensor  # [V + 1]: token t has pieces[ptr[t] : ptr[t + 1]]
    pieces: Tensor


class PieceIndex:
    """What a loss of `Needs.PIECES` knows about a pair of vocabularies. It has no weights and nothing to tune.

    Parameters
    ----------
    data : int32 [n]
        As `build` makes it, else ValueError; see ``csrc/core/piece_index.h``.
    metadata : mapping of str to str, optional
        Fingerprints of both vocabularies.

    Attributes
    ----------
    shape : (int, int)
        Sizes of the student's and of the teacher's vocabulary.
    events : int
        Events at the start of a chunk; if there are tokens without a root, they form the last one.
    student, teacher : Side
    """

    def __init__(self, data: Any, metadata: Mapping[str, str] | None = None) -> None:
        self.data = lasting(torch.as_tensor(data, dtype=torch.int32).contiguous())
        self.metadata = dict(metadata or {})
        _core.check_piece_index(self.data.cpu().numpy())
        students, teachers, self.events = self.data[:3].tolist()
        self.shape = (students, teachers)
        self.student, self.teacher = sides(self.data)

    @classmethod
    def build(cls, student_tok: TokenizerLike, teacher_tok: TokenizerLike) -> PieceIndex:
        """Builds the index of two tokenizers, as for `Vocabulary.from_tokenizer`. Deterministic.

        The event of a token is its root: the token itself if the other side has one of equal bytes or of equal role,
        else the root of its first piece under the other side's tokenizer, which is a shorter text.

        Examples
        --------
        The student packs "95" and "99" into tokens; to the teacher both begin with "9":

        >>> student = Vocabulary([b"5", b"9", b"95", b"99"])
        >>> teacher = Vocabulary([b"5", b"9"])
        >>> pieces = PieceIndex.build(student, teacher)
        >>> pieces
        PieceIndex([4, 2], events=2)
        >>> pieces.student.event.tolist(), pieces.teacher.event.tolist()
        ([0, 1, 1, 1], [0, 1])
        """
        student = Vocabulary.from_tokenizer(student_tok)
        teacher = Vocabulary.from_tokenizer(teacher_tok)
        partners = _core.partners(student._core, teacher._core)
        pieces = (*student.pieces(partners[0] < 0, teacher), *teacher.pieces(partners[1] < 0, student))
        return cls(_core.build_piece_index(student._core, teacher._core, *pieces), fingerprints(student, teacher))

    def check_tokenizers(self, student_tok: TokenizerLike = None, teacher_tok: TokenizerLike = None) -> None:
        """Raises ValueError if the index was built for other tokenizers than these (those that are given)."""
        check_fingerprints("pieces", self, self.metadata, student_tok, teacher_tok)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with the data and both fingerprints: complete, or not at all."""
        _FILE.save(path, {"data": self.data}, **self.metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], student_tok: TokenizerLike = None, teacher_tok: TokenizerLike = None
    ) -> PieceIndex:
        """Reads a file written by `save`, and checks that it was built for the tokenizers that are given.

        Raises FileNotFoundError if there is no such file; ValueError if it is not a piece index, is damaged, has
        another version, or was built for other tokenizers.
        """
        index = _FILE.load(path, lambda tensors, metadata: cls(tensors["data"], metadata))
        index.check_tokenizers(student_tok, teacher_tok)
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        return PieceIndex, (self.data, self.metadata)  # without the views, each of which would take all of the data

    def __repr__(self) -> str:
        return f"PieceIndex({list(self.shape)}, events={self.events})"


def sides(data: Tensor) -> tuple[Side, Side]:
    """The student's and the teacher's part of `PieceIndex.data`."""
    students, teachers, _, *pieces = data[:HEAD].tolist()
    lengths = [[size, size, size, size + 1, n] for size, n in zip((students, teachers), pieces, strict=True)]
    views = data[HEAD:].split(lengths[0] + lengths[1])
    return Side(*views[:5]), Side(*views[5:])
