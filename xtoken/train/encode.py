"""Encoding: text, prompt and completion, or chat messages become token ids of every model, labels and chunks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtoken.losses.backends import IGNORED
from xtoken.losses.call import check_choice
from xtoken.teacher_cache import document_digest
from xtoken.vocabulary import TokenizerLike

from .example import TRAIN_ON, Example, Ints, Table, parse_example
from .reader import Reader, Tokens

MOST_OVERHANG = 64
"""Bytes of white space by which a token may reach over the edge of a piece."""


class _Chunks(NamedTuple):
    """Chunks of B examples, in order."""

    spans: Ints
    """[K, 4]: token positions within the examples."""
    trained: NDArray[np.bool_]
    ptr: Ints

    def of(self, k: int) -> _Chunks:
        """Those of example k alone."""
        these = slice(self.ptr[k], self.ptr[k + 1])
        return _Chunks(self.spans[these], self.trained[these], self.ptr[k : k + 2] - self.ptr[k])

    def between(self, first: int, last: int, start: Ints) -> NDArray[np.int32]:
        """The chunks to train on between two student tokens; positions count from `start`, of student and teacher."""
        inside = self.trained & (self.spans[:, 0] >= first) & (self.spans[:, 1] <= last)
        spans = self.spans[inside] - np.repeat(start, 2)
        predicted: NDArray[np.int32] = spans[(spans[:, 0] > 0) & (spans[:, 2] > 0)].astype(np.int32)
        return predicted


class ExampleEncoder:
    """Turns rows of data into what `XTokenCollator` takes.

    Parameters
    ----------
    student_tok : tokenizer
        As for `Vocabulary.from_tokenizer`; messages need one of `transformers` with a chat template.
    teacher_toks : sequence of tokenizers
        One for each teacher. A teacher with the student's tokenizer and chat template reads the student's ids.
    train_on : "all", "completion" or "assistant"
        Which turns are trained on. "assistant": the turns of the assistant. "completion": those after the last turn
        of anyone but the assistant and tools. Of prompt and completion both mean the completion. Plain text is always
        trained on.
    max_length, max_teacher_length : int, optional
        Most tokens of an example, for the student and for each teacher. Longer ones are cut on all sides after a
        chunk that all of them share, so that no model reads text that another does not. Plain text is split into
        several examples, each with the special tokens that begin a text; prompts and chats are truncated.
    text_column : str
        Field with plain text.
    add_end : bool
        Whether plain text and completions end with each tokenizer's end token.
    name_documents : bool
        Whether examples say which document of a teacher they are part of, so that a `TeacherCache` can be asked.

    Raises ValueError for unknown choices, lengths below 2, and a `Vocabulary` that cannot encode text.

    Notes
    -----
    A row is a mapping with ``messages`` (and ``tools``, ``chat_template_kwargs``); with ``prompt`` and ``completion``,
    both strings or both lists of messages; or with `text_column`.

    Messages are written by each tokenizer's own chat template. Their contents (texts, reasoning, names and arguments of
    tool calls) are found by writing the conversation a second time with markers in their place. A content that a
    template leaves out or writes otherwise is aligned with nothing; white space at the edges of a content, which
    templates strip, belongs to the template. Tokens of the template are neither labels nor in a chunk, with these
    exceptions in turns that are trained on: the token that ends the turn is a label, and a chunk with the teacher's,
    where both have the same role in their vocabularies; and the tags around a reasoning count as content, since the
    student must write them itself. Special tokens inside a content are left out.

    Arguments of a tool call that are a mapping are one content where all templates write them as the same JSON: keys,
    numbers and brackets too, with one more closing brace if all have it. Where a template writes them otherwise, its
    strings and numbers are aligned, and what is between them is learned from labels alone.
    Arguments that are a string are a content like others. What a template writes around a call is not trained on.

    Chunks are cut at every byte of a content at which a token begins on both sides. A token that crosses the
    edge of a content counts only if there is nothing but white space outside, and is in a chunk only if the teacher
    has the same white space there.

    Prompt and completion are encoded as one text; white space between them belongs to the completion. Fields of a
    message that are None are left out; ``content`` stays, as do nulls within tools and calls.
    """

    def __init__(
        self,
        student_tok: TokenizerLike,
        teacher_toks: Sequence[TokenizerLike],
        *,
        train_on: str = "all",
        max_length: int | None = None,
        max_teacher_length: int | None = None,
        text_column: str = "text",
        add_end: bool = True,
        name_documents: bool = False,
    ) -> None:
        check_choice(train_on, "train_on", TRAIN_ON)
        for name, limit in (("max_length", max_length), ("max_teacher_length", max_teacher_length)):
            if limit is not None and limit < 2:
                raise ValueError(f"{name}: expected at least 2, got {limit}")
        self.train_on = train_on
        self.max_length = max_length
        self.max_teacher_length = max_teacher_length
        self.text_column = text_column
        self.add_end = add_end
        self.name_documents = name_documents
        self.student = Reader(student_tok, "student")
        sides = [Reader(tokenizer, f"teacher {k}") for k, tokenizer in enumerate(teacher_toks)]
        self.teachers = [None if side.reads_as(self.student) else side for side in sides]
        self.sides = [self.student, *(side for side in self.teachers if side is not None)]

    def encode(self, rows: Sequence[Mapping[str, Any]], first_row: int = 0) -> list[list[dict[str, Any]]]:
        """Encodes rows, best some hundreds at a time; errors count them from `first_row`.

        For each row a list of examples: none if nothing of it is trained on, several if a long text was cut. An example
        is a dict: ``student_ids`` int64 [T]; ``labels`` int64 [T], the ids where trained on, else -100, unshifted;
        ``teachers``: for each a dict of ``ids`` int64 and ``spans`` int32 [K, 4], the chunks that are trained on, or of
        None and None if it reads the student's ids. With `name_documents` also ``document``, the `document_digest` of
        the teacher's ids of the whole row, and ``first``, which of these the example's ids begin at; special tokens
        that are put before a later part take the places of the tokens before it.

        Raises ValueError if a row has none of the forms, or a template is missing or refuses it, saying which.
        """
        if not rows:
            return []
        examples = []
        for number, row in enumerate(rows, first_row):
            try:
                examples.append(parse_example(row, self.train_on, self.text_column))
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
        table = Table.of(examples)
        tokens = [side.encode(examples, self.add_end, first_row) for side in self.sides]
        _choose_wholes(examples, tokens)
        labels = self._labels(table, tokens[0])
        chunks = [self._chunks(table, tokens[0], self.sides[m], tokens[m]) for m in range(1, len(tokens))]
        return [self._examples(k, example, labels, tokens, chunks) for k, example in enumerate(examples)]

    def _labels(self, table: Table, student: Tokens) -> Ints:
        """The ids of the tokens that begin or end in a piece that is trained on, and of ends of turns; else -100."""
        if not len(table.length):
            return np.full(len(student.ids), IGNORED)
        wanted = np.zeros(len(student.ids), bool)
        for position, overhang_is_behind in ((student.start, True), (np.maximum(student.end - 1, -1), False)):
            piece, within = _piece_of(position, student.piece_start, table.length)
            first, last = student.piece_start[piece], student.piece_start[piece] + table.length[piece]
            within &= (student.end > student.start) & (position < last) & table.trained_piece[piece]
            over = within & ((student.end > last) if overhang_is_behind else (student.start < first))
            for i in over.nonzero()[0].tolist():
                begin, end = (last[i], student.end[i]) if overhang_is_behind else (student.start[i], first[i])
                within[i] = student.is_space(int(begin), int(end))
            wanted |= within
        wanted &= ~self.student.is_special[student.ids]
        wanted[student.turn_end[table.trained_turn & (student.turn_end >= 0)]] = True
        return np.where(wanted, student.ids, IGNORED)

    def _chunks(self, table: Table, student: Tokens, side: Reader, teacher: Tokens) -> _Chunks:
        room = table.length + 2 * MOST_OVERHANG + 1
        piece_begin = np.cumsum(room) - room + MOST_OVERHANG  # coordinates of the pieces, one after the other with gaps
        lines = [
            _edges(student, table.length, piece_begin, only_open=True),
            _edges(teacher, table.length, piece_begin, only_open=False),
        ]
        common, i, j = np.intersect1d(lines[0][0], lines[1][0], return_indices=True)
        tokens = np.stack([lines[0][1][i], lines[1][1][j]], axis=1)
        piece = np.searchsorted(piece_begin - MOST_OVERHANG, common, "right") - 1
        (first,) = (piece[1:] == piece[:-1]).nonzero()
        spans = np.stack([tokens[first, 0], tokens[first + 1, 0], tokens[first, 1], tokens[first + 1, 1]], axis=1)
        trained = table.trained_piece[piece[first]]
        begin, length = piece_begin[piece[first]], table.length[piece[first]]
        # Where a token crosses an edge, and where positions are not exact, the two sides' bytes are compared.
        doubtful = (common[first] < begin) | (common[first + 1] > begin + length)
        sample = np.searchsorted(student.ptr, spans[:, 0], "right") - 1
        doubtful |= ~(student.is_exact & teacher.is_exact)[sample]
        keep = (common[first] < begin + length) & (common[first + 1] > begin)
        keep &= (spans[:, 1] > spans[:, 0]) & (spans[:, 3] > spans[:, 2])
        for k, (one, ids) in enumerate(((self.student, student.ids), (side, teacher.ids))):
            specials = np.concatenate([[0], np.cumsum(one.is_special[ids])])
            keep &= specials[spans[:, 2 * k + 1]] == specials[spans[:, 2 * k]]
        for k in (keep & doubtful).nonzero()[0].tolist():
            a, b, c, d = spans[k].tolist()
            ours, theirs = self.student.vocabulary.decode(student.ids[a:b]), side.vocabulary.decode(teacher.ids[c:d])
            keep[k] = ours == theirs
        spans, trained = spans[keep], trained[keep]

        ends = np.stack([student.turn_end, teacher.turn_end], axis=1)
        (turns,) = (ends >= 0).all(axis=1).nonzero()
        pairs = zip(student.ids[ends[turns, 0]].tolist(), teacher.ids[ends[turns, 1]].tolist(), strict=True)
        turns = turns[np.array([bool(self.student.roles(a) & side.roles(b)) for a, b in pairs], bool)]
        ends = ends[turns]
        spans = np.concatenate([spans, np.stack([ends[:, 0], ends[:, 0] + 1, ends[:, 1], ends[:, 1] + 1], axis=1)])
        trained = np.concatenate([trained, table.trained_turn[turns]])

        order = np.argsort(spans[:, 0], kind="stable")
        spans, trained = spans[order], trained[order]
        sample = np.searchsorted(student.ptr, spans[:, 0], "right") - 1
        spans = spans - np.repeat(np.stack([student.ptr[sample], teacher.ptr[sample]], axis=1), 2, axis=1)
        keep = (spans[:, 0] > 0) & (spans[:, 2] > 0) & self._in_order(spans, sample)
        counts = np.bincount(sample[keep], minlength=len(student.ptr) - 1)
        return _Chunks(spans[keep], trained[keep], np.concatenate([[0], np.cumsum(counts)]))

    @staticmethod
    def _in_order(spans: Ints, sample: Ints) -> NDArray[np.bool_]:
        """Leaves out chunks that go backwards on the teacher's side: a template may move contents."""
        keep = np.ones(len(spans), bool)
        backwards = (sample[1:] == sample[:-1]) & (spans[1:, 0::2] < spans[:-1, 1::2]).any(axis=1)
        for b in np.unique(sample[1:][backwards]).tolist():
            reached = np.zeros(2, np.int64)
            for k in (sample == b).nonzero()[0].tolist():
                keep[k] = (spans[k, 0::2] >= reached).all()
                if keep[k]:
                    reached = spans[k, 1::2]
        return keep

    def _examples(
        self, k: int, example: Example, labels: Ints, sides: Sequence[Tokens], chunks: Sequence[_Chunks]
    ) -> list[dict[str, Any]]:
        """Row k as examples within the limits: the whole if it fits, else its beginning, and of a text what follows."""
        rows = [side.ids[side.ptr[k] : side.ptr[k + 1]] for side in sides]
        wanted = labels[sides[0].ptr[k] : sides[0].ptr[k + 1]]
        if not (wanted != IGNORED).any():
            return []
        chunks = [one.of(k) for one in chunks]
        prefixes = [np.asarray(side.prefix, np.int64) for side in self.sides]
        whole = np.array([len(row) for row in rows])
        given = [self.max_length, *(self.max_teacher_length for _ in chunks)]
        limits = [size if limit is None else limit for limit, size in zip(given, whole.tolist(), strict=True)]
        cuts = np.stack([np.zeros_like(whole), whole]) if (whole <= limits).all() else _cuts(whole, chunks)
        windows = _windows(cuts, [len(prefix) for prefix in prefixes], limits)
        if example.conversation is not None or len(example.pieces) > 1:
            windows = itertools.islice(windows, 1)
        documents = [document_digest(row) for row in rows] if self.name_documents else []
        examples = []
        for first, last in windows:
            before = [prefix[: len(prefix) if first[0] else 0] for prefix in prefixes]
            start = first - np.array([len(one) for one in before])
            targets = np.concatenate([np.full(len(before[0]), IGNORED), wanted[first[0] : last[0]]])
            targets[:1] = IGNORED
            if not (targets != IGNORED).any():
                continue
            ids = [np.concatenate([before[m], row[first[m] : last[m]]]) for m, row in enumerate(rows)]
            entries: list[dict[str, Any]] = [{"ids": None, "spans": None}]  # for those who read the student's ids
            for m, one in enumerate(chunks, 1):
                entries.append({"ids": ids[m], "spans": one.between(first[0], last[0], start[[0, m]])})
            for entry, document, at in zip(entries, documents, start.tolist(), strict=False):
                entry.update(document=document, first=at)
            own = iter(entries[1:])
            teachers = [dict(entries[0]) if one is None else next(own) for one in self.teachers]
            examples.append({"student_ids": ids[0], "labels": targets, "teachers": teachers})
        return examples


def _choose_wholes(examples: Sequence[Example], sides: Sequence[Tokens]) -> None:
    """Keeps arguments of calls as one piece where all models write the same JSON, else as the parts that each has.

    The longer the piece the better, since tokens may cross its edges.
    """
    first = 0
    for example in examples:
        for call in example.conversation.arguments if example.conversation is not None else ():
            choices = [[call.closed], [call.whole], call.parts]
            is_shared = [all(side.piece_start[first + one[0]] >= 0 for side in sides) for one in choices[:2]]
            del choices[[*is_shared, True].index(True)]
            for side in sides:
                side.piece_start[[first + piece for choice in choices for piece in choice]] = -1
        first += len(example.pieces)


def _cuts(whole: Ints, chunks: Sequence[_Chunks]) -> Ints:
    """[C, 1 + teachers]: how many tokens each side has read at each place where all can be cut, from none to all."""
    places = np.arange(1, whole[0])
    for one in chunks:
        places = np.intersect1d(places, one.spans[:, 1])
    inner = [one.spans[np.searchsorted(one.spans[:, 1], places), 3] for one in chunks]
    return np.concatenate([[np.zeros_like(whole)], np.stack([places, *inner], axis=1), [whole]])


def _windows(cuts: Ints, prefix: Sequence[int], limits: Sequence[int]) -> Iterator[tuple[Ints, Ints]]:
    """Stretches from cut to cut, each as long as the limits allow; what is too long between two cuts is left out."""
    k = 0
    while k + 1 < len(cuts):
        used = cuts[k + 1 :] - cuts[k] + (np.asarray(prefix) if k else 0)
        fits = (used <= np.asarray(limits)).all(axis=1)
        count = len(fits) if fits.all() else int(fits.argmin())
        if count:
            yield cuts[k], cuts[k + count]
        k += max(count, 1)


def _piece_of(position: Ints, piece_start: Ints, length: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """The piece that begins at or before each byte, and whether it extends to it."""
    if not (piece_start >= 0).any():
        return np.zeros(len(position), np.int64), np.zeros(len(position), bool)
    order = np.argsort(piece_start, kind="stable")
    order = order[piece_start[order] >= 0]
    k = np.searchsorted(piece_start[order], position, "right") - 1
    piece = order[np.maximum(k, 0)]
    return piece, (k >= 0) & (position <= piece_start[piece] + length[piece])


def _edges(tokens: Tokens, length: Ints, piece_begin: Ints, *, only_open: bool) -> tuple[Ints, Ints]:
    """Positions within pieces at which a token begins, in the pieces' own coordinates, and these tokens.

    Positions outside a piece count too, if there is only white space in between. With `only_open` only the nearest, and
    only where no token begins at the edge of the piece itself, so that a token outside of it is in no chunk.
    """
    reached = np.concatenate([[-1], np.maximum.accumulate(tokens.end)])[: len(tokens.end)]
    (clean,) = (tokens.start >= reached).nonzero()
    position = np.concatenate([tokens.start[clean], tokens.text_end])
    token = np.concatenate([clean, tokens.ptr[1:]])
    order = np.argsort(position, kind="stable")
    position, token = position[order], token[order]

    (pieces,) = (tokens.piece_start >= 0).nonzero()
    first = tokens.piece_start[pieces]
    last = first + length[pieces]
    left, right = np.searchsorted(position, first), np.searchsorted(position, last, "right")  # places in each piece
    counts = right - left
    inside = np.arange(counts.sum()) + np.repeat(left - (counts.cumsum() - counts), counts)
    line = [position[inside] + np.repeat(piece_begin[pieces] - first, counts)]
    found = [token[inside]]
    ends = np.concatenate([[-1], position, [-1]])  # places as k + 1, so that there is one before the first
    for side, start, step, edge in ((left, left, -1, first), (right - 1, right, 1, last)):
        wanted = np.ones(len(pieces), bool) if not only_open else ends[side + 1] != edge
        for p in wanted.nonzero()[0].tolist():
            k, bound = int(start[p]) + (step < 0) * step, int(edge[p])
            while 0 <= k < len(position) and abs(int(position[k]) - bound) <= MOST_OVERHANG:
                place = int(position[k])
                if not tokens.is_space(min(place, bound), max(place, bound)):
                    break
                line.append(np.array([piece_begin[pieces[p]] - first[p] + place]))
                found.append(token[k : k + 1])
                k += step
                if only_open:
                    break
    return np.concatenate(line), np.concatenate(found)
