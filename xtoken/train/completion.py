"""Completions written in training: what a model goes on from, and what it has written as an example for all models."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xtoken.losses.backends import IGNORED

from .chat import BLANK, OPEN, places_within
from .encode import ExampleEncoder, find_chunks
from .example import Example, Ints, Table, parse_completed, parse_prompt
from .reader import Reader, Tokens, byte_of

_BAD = re.compile("[\udc80-\udcff]")  # how "surrogateescape" writes what is no UTF-8


class Prompt(NamedTuple):
    """What one model goes on from."""

    row: Mapping[str, Any]
    """As `prompt_of` gives it."""
    ids: list[int]
    head: str
    """What the template has already written of the completion: the tag that opens a reasoning, or nothing."""


class Completion(NamedTuple):
    """What has been written for a prompt."""

    prompt: Prompt
    ids: Sequence[int]
    ended: bool
    """Whether the last token is one that ends a text."""
    route: Sequence[bool] | None = None
    """Which teachers the row goes to; None: all."""

    @property
    def content(self) -> Sequence[int]:
        """The tokens before the end."""
        return self.ids[:-1] if self.ended else self.ids


class _Written(NamedTuple):
    """A completion that the student has sampled, as an example and as the student's text of it."""

    example: Example
    ids: Ints
    """The prompt's tokens and its own."""
    start: Ints
    """The byte of `raw` at which each token begins; those of the prompt are at its first byte, which stands for it."""
    end: Ints
    raw: bytes
    piece_start: dict[int, int]
    last: int
    """The last piece of the completion; -1: it has none."""
    tail: bytes | None
    """What is between that and the end token; None if there is none, or a special token is between."""


def read_prompt(row: Mapping[str, Any], reader: Reader) -> Prompt:
    """The prompt of a row for one model; ValueError if its template refuses it."""
    example = parse_prompt(row)
    text, ids = reader.prompt(example)
    opened = example.conversation is not None and text.rstrip().endswith(OPEN)
    return Prompt(row, ids, text[text.rindex(OPEN) :] if opened else "")


def text_of(completion: Completion, reader: Reader) -> str:
    """The text of a completion, without special tokens, and without a character that is not finished at its end."""
    return completion.prompt.head + _decoded(reader.vocabulary.decode(completion.content))[0]


def of_text(encoder: ExampleEncoder, completion: Completion, reader: Reader) -> dict[str, Any] | None:
    """What another model has written, as the row of data that it makes; None if nothing of it is trained on.

    A text without an end does not teach to end there.
    """
    row = dict(completion.prompt.row)
    if completion.route is not None and encoder.teacher_column is not None:
        names = zip(encoder.teacher_names, completion.route, strict=True)
        row[encoder.teacher_column] = [name for name, is_read in names if is_read]
    text = text_of(completion, reader)
    if "messages" in row:
        row["messages"] = [*row["messages"], {"role": "assistant", "content": text}]
    else:
        row["completion"] = text
    ((example, *_),) = encoder.encode([row])
    (trained,) = (example["labels"] != IGNORED).nonzero()
    if len(trained) and not completion.ended and encoder.student.is_mark[example["labels"][trained[-1]]]:
        example["labels"][trained[-1]] = IGNORED
        trained = trained[:-1]
    return example if len(trained) else None


def of_sampled(encoder: ExampleEncoder, completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """What the student has sampled, as examples whose labels are exactly its tokens.

    They are labels of the distillation alone: ``ce_labels`` are all -100. Each teacher reads prompt and completion
    as text, by its own template and tokenizer. Chunks have the same bytes on both sides, wherever the student has
    cut the text. The end token is a chunk with the teacher's, if both have the same role, and if the student has
    nothing between the content and its end that the teacher does not have. Of a teacher ``is_cut`` says whether
    its limit has taken chunks.
    """
    written = [_written(encoder.student, one) for one in completions]
    examples = [one.example for one in written]
    table = Table.of(examples)
    student = _tokens(encoder.student, written, table)
    wanted = np.zeros(len(student.ids), bool)
    for one, last in zip(completions, student.ptr[1:].tolist(), strict=True):
        wanted[last - len(one.ids) : last] = True
    labels = np.where(wanted, student.ids, IGNORED)
    rows = [slice(*bounds) for bounds in itertools.pairwise(student.ptr.tolist())]
    entries: list[list[dict[str, Any]]] = [[] for _ in written]
    known = zip(encoder.aligners, encoder.limits[1:], strict=True)
    for m, side in enumerate(encoder.teachers):
        if side is None:
            for entry in entries:
                entry.append({"ids": None, "spans": None, "is_cut": False})
            continue
        aligner, limit = next(known)
        teacher = side.encode(examples, True, 0, [one.route is None or one.route[m] for one in completions])
        ours = student._replace(turn_end=_common_ends(written, table, student, teacher))
        chunks = find_chunks(table, wanted, ours, teacher, aligner)
        for k, (entry, row) in enumerate(zip(entries, rows, strict=True)):
            ids = teacher.ids_of(k)[:limit]
            spans = chunks.of(k).between(0, row.stop - row.start, np.zeros(2, np.int64))
            is_read = spans[:, 3] <= len(ids)
            entry.append({"ids": ids, "spans": spans[is_read], "is_cut": not is_read.all()})
    return [
        {
            "student_ids": student.ids[row],
            "labels": labels[row],
            "ce_labels": np.full(row.stop - row.start, IGNORED),
            "teachers": entry,
            **({} if one.route is None else {"route": one.route}),
        }
        for one, row, entry in zip(completions, rows, entries, strict=True)
    ]


def _written(reader: Reader, completion: Completion) -> _Written:
    prompt = completion.prompt
    ids = np.asarray(completion.content, np.int64)
    raw, is_special = reader.vocabulary.decode(ids), reader.is_special[ids]
    text, at = _decoded(raw)
    at += 1 + len(prompt.head.encode())
    end = at[np.cumsum(np.where(is_special, 0, reader.lengths[ids]))]
    start = np.concatenate([at[:1], end])[:-1]
    text = prompt.head + text
    example = parse_completed(prompt.row, text)
    places, last, byte = {}, -1, 0
    if example.conversation is None:
        last = len(example.pieces) - 1
        places = {last: 1} if text else {}
        byte = 1 + len(text.encode())
    elif not text.strip():
        last, byte = len(example.pieces) - 1, 1
    else:
        bytes_of = 1 + byte_of(text)
        for place in places_within(example.conversation, len(example.trained) - 1):
            places[place.piece] = int(bytes_of[place.start])
            last, byte = place.piece, int(bytes_of[place.end])
    tail = None
    if completion.ended and last >= 0 and not (is_special & (start >= byte)).any():
        tail = raw[np.searchsorted(at, byte) :]
    before, behind = np.zeros(len(prompt.ids), np.int64), at[-1:][: completion.ended] + 1
    start, end = (np.concatenate([before, one, behind]) for one in (start, end))
    tokens = np.concatenate([np.asarray(prompt.ids, np.int64), np.asarray(completion.ids, np.int64)])
    return _Written(example, tokens, start, end, b"\0" + text.encode(), places, last, tail)


def _tokens(student: Reader, written: Sequence[_Written], table: Table) -> Tokens:
    """The student's side of the examples."""
    base = 2 + np.cumsum([0, *(len(one.raw) + 3 for one in written)])[:-1]
    ptr = np.cumsum([0, *(len(one.ids) for one in written)])
    piece_start, turn_end = np.full(len(table.length), -1), np.full(len(table.trained_turn), -1)
    for k, (one, at) in enumerate(zip(written, base.tolist(), strict=True)):
        for piece, byte in one.piece_start.items():
            piece_start[table.first_piece[k] + piece] = at + byte
        if one.tail is not None:
            turn_end[table.first_turn[k + 1] - 1] = ptr[k + 1] - 1
    ids = np.concatenate([one.ids for one in written])
    shift = np.repeat(base, np.diff(ptr))
    return Tokens(
        ids,
        np.concatenate([one.start for one in written]) + shift,
        np.concatenate([one.end for one in written]) + shift,
        student.is_special[ids],
        ptr,
        base,
        [one.raw for one in written],
        np.array(["\ufffd".encode() not in one.raw for one in written]),
        piece_start,
        turn_end,
        np.zeros(len(written), bool),
        {},
    )


def _common_ends(written: Sequence[_Written], table: Table, student: Tokens, teacher: Tokens) -> Ints:
    """The student's end tokens, -1 where text is before one that the teacher does not have before its own."""
    ends: Ints = student.turn_end.copy()
    for k, (one, first) in enumerate(zip(written, table.first_piece, strict=False)):
        turn = table.first_turn[k + 1] - 1
        at, end = teacher.piece_start[first + one.last], teacher.turn_end[turn]
        if one.tail is None or at < 0 or end < 0:
            ends[turn] = -1
        elif one.tail:
            size = 0 if one.example.pieces[one.last] == BLANK else table.length[first + one.last]
            between = teacher.raw[k][at + size - teacher.base[k] : teacher.start[end] - teacher.base[k]]
            ends[turn] = ends[turn] if between == one.tail else -1
    return ends


def _decoded(raw: bytes) -> tuple[str, Ints]:
    """The text of bytes, and at which of its bytes each of theirs, and their end, is.

    Bytes that are no UTF-8 become U+FFFD, each; an unfinished character at the end becomes nothing.
    """
    text, used = codecs.utf_8_decode(raw, "surrogateescape", False)
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    size = 1 + (code > 0x7F).astype(np.int64) + (code > 0x7FF) + (code > 0xFFFF)
    own = np.where((code >= 0xDC80) & (code <= 0xDCFF), 1, size)
    shift = np.repeat((np.cumsum(size) - size) - (np.cumsum(own) - own), own)
    at = np.concatenate([np.arange(used) + shift, np.full(len(raw) + 1 - used, size.sum())])
    return _BAD.sub("\ufffd", text), at
