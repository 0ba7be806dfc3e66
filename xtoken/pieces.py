"""The piece index: the common events of two vocabularies, and how the tokens of each begin in the other's tokens."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _core, plot
from .alignment import Alignment
from .alignment.alignment import int_tensor, ranges
from .calibration import MergeReport, calibrate
from .hub import OnHub
from .notebook import html_list
from .sample import sample_texts
from .storage import TensorFile, check_present, fingerprints, lasting
from .teacher_order import TeacherOrder
from .vocabulary import TokenizerLike, Vocabulary, check_several

HEAD = 7
"""Numbers before the arrays of `PieceIndex.data`: both vocabulary sizes, events; pieces and joined tokens of each
side."""


class Side(NamedTuple):
    """One vocabulary of a `PieceIndex`, int32 views into its data.

    Pieces are ids of the other vocabulary that spell the token, and V_other for a rest that it cannot spell. A token
    with an exact partner has that as its only piece; one that stands for no text has none.
    """

    event: Tensor  # [V] in [0, events)
    length: Tensor  # [V] bytes of text
    order: Tensor  # [V] ids, ascending by their sequences of pieces, of which each has its event before its id
    ptr: Tensor  # [V + 1]: token t has pieces[ptr[t] : ptr[t + 1]]
    pieces: Tensor
    joined_ptr: Tensor  # [V + 1]: joined[joined_ptr[t] : joined_ptr[t + 1]] never follow token t in its own tokenizer
    joined: Tensor  # tokens of the same vocabulary that have a partner: t and one of them together are a token


class PieceIndex(OnHub):
    """What a loss of `Needs.PIECES` knows about a pair of vocabularies. It has no weights and nothing to tune.

    Parameters
    ----------
    data : int32 [n]
        As `build` makes it, else ValueError; see ``csrc/core/piece_index.h``.
    metadata : mapping of str to str, optional
        Fingerprints of both vocabularies, and what calibration has found.
    text : uint8 [n], optional
        The bytes of all tokens of text, the student's in the order of their ids, then the teacher's; ValueError if they
        are not as many as the data says. Some losses ask for them.

    Attributes
    ----------
    shape : (int, int)
        Sizes of the student's and of the teacher's vocabulary.
    events : int
        Events at the start of a chunk; if there are tokens without a root, they form the last one.
    student, teacher : Side
    """

    FILE_NAME = "pieces.safetensors"
    TITLE = "the events that both tokenizers begin text with"
    ARGUMENT = "pieces"
    FILE = TensorFile(
        "a piece index of xtoken", {"format": "xtoken.pieces", "version": "4"}, {"data": ("I32", 1), "text": ("U8", 1)},
        rebuild="xtoken project --pieces (or PieceIndex.build and save)",
    )  # fmt: skip

    def __init__(self, data: Any, metadata: Mapping[str, str] | None = None, text: Tensor | None = None) -> None:
        self.data = lasting(int_tensor(data, "data", torch.int32).contiguous())
        self.metadata = dict(metadata or {})
        _core.check_piece_index(self.data.cpu().numpy())
        students, teachers, self.events = self.data[:3].tolist()
        self.shape = (students, teachers)
        self.student, self.teacher = sides(self.data)
        if text is not None:
            check_text(text, self.data)
        self.text = None if text is None else lasting(text)
        calibration = self.metadata.get("calibration")
        self._merged = MergeReport() if calibration is None else MergeReport.from_json(calibration)

    @classmethod
    def build(
        cls, student_tok: TokenizerLike, teacher_tok: TokenizerLike, *, texts: Iterable[str] | None = None
    ) -> PieceIndex:
        """Builds the index of two tokenizers. Deterministic.

        The event of a token is its root: the token itself if the other side has one of equal bytes or of equal role,
        else the root of its first piece under the other side's tokenizer, which is a shorter text.

        Calibration then merges events that the tokenizers confuse. Llama 3 begins a line of code with seven spaces and
        " return", Gemma 3 with eight and "return". Both know both runs of spaces, but each model gives the other's no
        probability: compared with the teacher, the student would learn a token that it must never write. So events that
        begin the same chunks of `texts` become one, unless the text would tell less by it than these chunks are worth.

        Parameters
        ----------
        student_tok, teacher_tok
            Tokenizers, as for `Vocabulary.from_tokenizer`.
        texts : iterable of str, optional
            Text to learn from. Default: ``sample_texts(student_tok, teacher_tok)``, if both can encode text, which a
            `Vocabulary` without a tokenizer cannot. Text like that of the training data, beside the sample, makes it
            better: ``texts=[*xtoken.sample_texts(student_tok, teacher_tok), *own]``. All is read. Without any, as in
            ``texts=()``, nothing is merged.

        Raises TypeError if `texts` is one string or holds something else; ValueError if it is given and a vocabulary
        has no tokenizer.

        Examples
        --------
        The student packs "95" and "99" into tokens; to the teacher both begin with "9":

        >>> student = Vocabulary([b"5", b"9", b"95", b"99"])
        >>> teacher = Vocabulary([b"5", b"9"])
        >>> pieces = PieceIndex.build(student, teacher)
        >>> pieces
        PieceIndex([4, 2], events=2, not calibrated)
        >>> pieces.student.event.tolist(), pieces.teacher.event.tolist()
        ([0, 1, 1, 1], [0, 1])
        """
        student = Vocabulary.from_tokenizer(student_tok)
        teacher = Vocabulary.from_tokenizer(teacher_tok)
        partners = _core.partners(student._core, teacher._core)
        pieces = (*student.pieces(partners[0] < 0, teacher), *teacher.pieces(partners[1] < 0, student))
        data = _core.build_piece_index(student._core, teacher._core, *pieces)
        text = b"".join(one[int(i)] for one in (student, teacher) for i in one.is_text.nonzero()[0])
        characters = torch.tensor(bytearray(text), dtype=torch.uint8, device="cpu")
        index = cls(data, fingerprints(student, teacher), characters)
        without = [name for name, one in (("student", student), ("teacher", teacher)) if one.tokenizer is None]
        if texts is None:
            return index if without else index._calibrated(student, teacher, sample_texts(student, teacher))
        check_several(texts, "texts")
        texts = list(texts)
        if texts and without:
            raise ValueError(f"texts: expected a {without[0]}_tok that encodes text, got a Vocabulary of tokens alone")
        return index._calibrated(student, teacher, texts) if texts else index

    def _calibrated(self, student: Vocabulary, teacher: Vocabulary, texts: Iterable[str]) -> PieceIndex:
        """The index with events merged."""
        events = (self.student.event.numpy().astype("int64"), self.teacher.event.numpy().astype("int64"))
        event_of, report = calibrate(student, teacher, events, self.events, self._rootless(), texts)
        data = _core.merge_events(self.data.numpy(), event_of.astype("int32"))
        return PieceIndex(data, {**self.metadata, "calibration": report.to_json()}, self.text)

    def _rootless(self) -> int:
        """The event of tokens without a root; the number of events if there are none."""
        for side, other in ((self.student, self.teacher), (self.teacher, self.student)):
            first = side.pieces[side.ptr[:-1].clamp_max(len(side.pieces) - 1).long()]
            if ((side.ptr.diff() == 0) | (first == len(other.event))).any():
                return int(self.events) - 1
        return int(self.events)

    def merged(self) -> MergeReport:
        """Which events calibration has merged, from how much text, with counts and an example of each; print it."""
        return self._merged

    def differing(self, alignment: Alignment) -> Tensor:
        """bool [K]: the chunks of an alignment whose realised first tokens belong to different events, on the CPU.

        They have no term for their start, since there both models speak of different things. Where they are many, text
        of that kind was missing in calibration: give it to `build`. Raises ValueError if the alignment carries no token
        ids.
        """
        host = alignment.host
        if host.student_ids is None or host.teacher_ids is None:
            raise ValueError("alignment: expected its token ids, but student_ids or teacher_ids is None")
        host.check()
        events, sides = [], (("student", self.student, host.student_ids), ("teacher", self.teacher, host.teacher_ids))
        for number, (name, side, ids) in enumerate(sides):
            host.check_reach(number, ids.shape[-1], f"{name}_ids", "token")
            first = ids.reshape(len(host), -1)[host.sample_index, host.spans[:, 2 * number].long()]
            if bool(((first < 0) | (first >= len(side.event))).any()):
                raise ValueError(f"alignment: expected {name}_ids in 0 ... {len(side.event) - 1} within chunks")
            events.append(side.event[first])
        return events[0] != events[1]

    def teacher_order(self) -> TeacherOrder:
        """The order of the teacher's columns in which losses on events read both sides alike.

        The only teacher token of an event that has one student token gets the student's number as its column (if the
        teacher has so many). The other columns get, in ascending order, the partners of students beyond, the tokens of
        other events that both sides have, event by event, those of events that the student lacks, and last tokens that
        stand for no text.

        Examples
        --------
        >>> index = PieceIndex.build(Vocabulary([b"a", b"b", b"ab"]), Vocabulary([b"b", b"ba", b"a", b"x"]))
        >>> index.teacher_order().tokens.tolist()
        [2, 0, 1, 3]
        """
        student, teacher = self.student.event.cpu().long(), self.teacher.event.cpu().long()
        students, teachers = (torch.bincount(event, minlength=self.events) for event in (student, teacher))
        is_text = self.teacher.length.cpu() > 0
        paired = (students[teacher] == 1) & (teachers[teacher] == 1) & is_text
        partner_of = torch.full((self.events,), -1, device="cpu")
        partner_of[teacher[paired]] = paired.nonzero()[:, 0]
        lacking = (students[teacher] == 0).long()
        key = torch.where(is_text, teacher + self.events * lacking, 2 * self.events)
        by_key = key.sort(stable=True).indices
        return TeacherOrder.beside(partner_of[student], by_key[~paired[by_key]])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with data, text, both fingerprints and what was merged: complete, or not at all.

        Raises ValueError if the index has no text.
        """
        if self.text is None:
            raise ValueError("text: expected the bytes of the tokens, to save them with the data, got None")
        self.FILE.save(path, {"data": self.data, "text": self.text}, **self.metadata, text_sha256=_sha256(self.text))

    @classmethod
    def _of_file(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> PieceIndex:
        check_present(metadata)
        if metadata.pop("text_sha256", None) != _sha256(tensors["text"]):
            raise ValueError("text: not the bytes of the tokens")
        return cls(tensors["data"], metadata, tensors["text"])

    def facts(self) -> list[str]:
        return [repr(self), self._merged.summary()]

    def __reduce__(self) -> tuple[Any, ...]:
        return PieceIndex, (self.data, self.metadata, self.text)  # without the views, each of which takes all data

    def plot(self, axes: Any = None) -> Any:
        """Draws how many tokens of each side are spelled by 1, 2, 3 ... tokens of the other (0: no text).

        `axes` are matplotlib's (default: of a new figure), and are returned. ImportError without matplotlib.
        """
        sides = {"student": self.student, "teacher": self.teacher}
        counts = {name: plot.counted(side.ptr.diff().tolist()) for name, side in sides.items()}
        return plot.stacked_counts(axes, counts, "pieces of the token", f"PieceIndex {list(self.shape)}", side=True)

    def _repr_html_(self) -> str:
        return html_list(repr(self), ()) + self.merged()._repr_html_()

    def __repr__(self) -> str:
        merged = f"merged={len(self._merged.groups)}" if self._merged.texts else "not calibrated"
        return f"PieceIndex({list(self.shape)}, events={self.events}, {merged})"


def sides(data: Tensor) -> tuple[Side, Side]:
    """The student's and the teacher's part of `PieceIndex.data`."""
    students, teachers, _, *counts = data[:HEAD].tolist()
    lengths = []
    for size, pieces, joined in zip((students, teachers), counts[:2], counts[2:], strict=True):
        lengths += [size, size, size, size + 1, pieces, size + 1, joined]
    views = data[HEAD:].split(lengths)
    count = len(Side._fields)
    return Side(*views[:count]), Side(*views[count:])


def renumbered(data: Tensor, order: TeacherOrder) -> Tensor:
    """`PieceIndex.data` of a teacher whose tokens have the numbers ``order.places``; on the device of `data`.

    Takes about half a second for two real vocabularies.
    """
    student, teacher = sides(data.cpu())
    places = torch.nn.functional.pad(order.places, (0, 1), value=len(order))  # a rest that cannot be spelled stays one
    ptr, pieces = _rows(teacher.ptr, teacher.pieces, order.tokens)
    joined_ptr, joined = _rows(teacher.joined_ptr, places[teacher.joined.long()], order.tokens)
    owner = torch.repeat_interleave(joined_ptr.diff(), output_size=len(joined))
    joined = joined[(owner * len(order) + joined).argsort()]
    student = student._replace(pieces=places[student.pieces.long()])
    teacher = Side(
        teacher.event[order.tokens], teacher.length[order.tokens], teacher.order, ptr, pieces, joined_ptr, joined
    )
    student, teacher = (
        one._replace(order=_by_pieces(one, other)) for one, other in ((student, teacher), (teacher, student))
    )
    return torch.cat([data[:HEAD].cpu(), *(part.int() for part in (*student, *teacher))]).to(data.device)


def renumbered_text(text: Tensor, data: Tensor, order: TeacherOrder) -> Tensor:
    """`PieceIndex.text` for ``renumbered(data, order)``; `data` is that of before. On the device of `text`."""
    teacher = sides(data.cpu())[1].length.long()
    ptr = torch.nn.functional.pad(teacher.cumsum(0), (1, 0))
    first, held = len(text) - int(ptr[-1]), text.cpu()
    return torch.cat([held[:first], _rows(ptr, held[first:], order.tokens)[1]]).to(text.device)


def _rows(ptr: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows of compressed ones: their ptr and values."""
    counts = ptr.diff().long()[rows]
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return ends, values[ranges(ptr[:-1].long()[rows], counts)]


def _by_pieces(side: Side, other: Side) -> Tensor:
    """`Side.order` of a side whose other parts are there."""
    size = len(other.event)
    events = torch.nn.functional.pad(other.event.long(), (0, 1), value=2 * size + len(side.event))  # a rest comes last
    keys = (events[side.pieces.long()] * (size + 1) + side.pieces).tolist()
    sequences = [keys[first:last] for first, last in itertools.pairwise(side.ptr.tolist())]
    return torch.tensor(sorted(range(len(sequences)), key=sequences.__getitem__), dtype=torch.int32, device="cpu")


def _sha256(text: Tensor) -> str:
    return hashlib.sha256(text.cpu().numpy().tobytes()).hexdigest()


def check_text(text: Tensor, data: Tensor) -> None:
    """Raises ValueError if `PieceIndex.text` does not go with `PieceIndex.data`."""
    total = sum(int(side.length.sum()) for side in sides(data))
    if not isinstance(text, Tensor) or text.dtype != torch.uint8 or list(text.shape) != [total]:
        got = f"{text.dtype} {list(text.shape)}" if isinstance(text, Tensor) else type(text).__name__
        raise ValueError(f"text: expected uint8 [{total}], as many bytes as the tokens have, got {got}")
