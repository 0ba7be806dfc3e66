"""Encoding: text, prompt and completion, or chat messages to token ids of every model, labels and aligned chunks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtoken.audit import same_tokens
from xtoken.losses.backends import IGNORED
from xtoken.losses.call import check_choice
from xtoken.teacher_cache import document_digest
from xtoken.vocabulary import TokenizerLike, Vocabulary, load_tokenizer, unpadded

from .chat import ChatTemplate, Conversation, take_apart

TRAIN_ON = ("all", "completion", "assistant")

END_ROLES = ("end_of_turn", "eos")
"""Roles of the tokens that end a turn."""

MOST_OVERHANG = 64
"""Bytes of white space by which a token may reach over the edge of a piece."""

Ints = NDArray[np.int64]


class Example(NamedTuple):
    """An example, before any tokenizer reads it.

    Attributes
    ----------
    pieces : list of str
        The texts that are aligned: contents of messages; prompt and completion; or the whole text.
    sizes : list of int
        Their bytes.
    owners : list of int
        The turn of each piece.
    trained : list of bool
        Whether a turn is trained on.
    conversation : Conversation, optional
        If it is a chat; else the pieces follow each other as they are, and only the last one has an end.
    """

    pieces: list[str]
    sizes: list[int]
    owners: list[int]
    trained: list[bool]
    conversation: Conversation | None

    @staticmethod
    def of(
        pieces: list[str], owners: list[int], trained: list[bool], conversation: Conversation | None = None
    ) -> Example:
        sizes = [len(piece.encode()) for piece in pieces]
        return Example(pieces, sizes, owners, trained, conversation)


def parse_example(row: Mapping[str, Any], train_on: str, text_column: str) -> Example:
    """Takes a row apart; see `ExampleEncoder` for its forms.

    Raises
    ------
    ValueError
        If it has none of the forms, or text with lone surrogates.
    """
    messages = row.get("messages")
    if messages is not None:
        last = max((k for k, one in enumerate(messages) if _role(one) not in ("assistant", "tool")), default=-1)
        return _chat(row, list(messages), last + 1, train_on)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        head = prompt.rstrip()  # a token may join a space to the word behind it
        turns = ((head, train_on == "all"), (prompt[len(head) :] + completion, True))
        parts = [(text, trained) for text, trained in turns if text]
        return Example.of([text for text, _ in parts], list(range(len(parts))), [trained for _, trained in parts])
    if prompt is not None and completion is not None and not isinstance(prompt, str):
        return _chat(row, [*prompt, *completion], len(prompt), train_on)
    text = row.get(text_column)
    if isinstance(text, str):
        return Example.of([text] if text else [], [0] if text else [], [True] if text else [])
    found = ", ".join(f"{key}: {type(value).__name__}" for key, value in row.items()) or "nothing"
    raise ValueError(f"expected messages, prompt and completion, or text in {text_column!r}, got {found}")


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _chat(row: Mapping[str, Any], messages: list[Any], completion: int, train_on: str) -> Example:
    conversation = take_apart(messages, row.get("tools"), row.get("chat_template_kwargs"))
    trained = [
        train_on == "all" or (_role(one) == "assistant" and (train_on == "assistant" or k >= completion))
        for k, one in enumerate(messages)
    ]
    return Example.of(conversation.pieces, conversation.owners, trained, conversation)


class _Table(NamedTuple):
    """The P pieces and M turns of B examples."""

    length: Ints
    """[P]: bytes of each piece."""
    trained_piece: NDArray[np.bool_]
    trained_turn: NDArray[np.bool_]

    @staticmethod
    def of(examples: Sequence[Example]) -> _Table:
        return _Table(
            np.array([size for example in examples for size in example.sizes], np.int64),
            np.array([example.trained[owner] for example in examples for owner in example.owners], bool),
            np.array([trained for example in examples for trained in example.trained], bool),
        )


class _Tokens(NamedTuple):
    """The tokens of B examples on one side, one example after the other.

    Byte positions count through all examples, with gaps between them, so that one search serves the batch.
    """

    ids: Ints
    start: Ints
    """[N]: byte at which a token begins; a token that stands for no text is empty."""
    end: Ints
    ptr: Ints
    """[B + 1]: example b has the tokens ``ptr[b] ... ptr[b + 1] - 1``."""
    text_end: Ints
    """[B]: byte at which the text of an example ends."""
    raw: list[bytes]
    """[B]: the texts."""
    is_exact: NDArray[np.bool_]
    """[B]: whether the tokens' bytes, put together, are the text; else positions are the tokenizer's own offsets."""
    piece_start: Ints
    """[P]: byte at which each piece begins, -1 if it does not stand there verbatim."""
    turn_end: Ints
    """[M]: the token that ends each turn, -1 if there is none."""


class _Layout(NamedTuple):
    """An example as one model's text."""

    text: str
    raw: bytes
    base: int
    """Number of its first byte."""
    piece_start: list[int]
    """Byte at which each piece begins, -1 if it does not stand there verbatim."""
    turn_end: list[tuple[int, int]]
    """For each turn the bytes between which its end token is looked for, (-1, -1) if nothing of it is there."""


class _Side:
    """One model's way of reading."""

    def __init__(self, tokenizer: TokenizerLike, name: str) -> None:
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = load_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.name = name
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer)
        if self.vocabulary.tokenizer is None:
            raise ValueError(f"{name}: expected a tokenizer that encodes text, got a Vocabulary made of tokens alone")
        self.backend = self.vocabulary.tokenizer
        if self.backend.padding is not None or self.backend.truncation is not None:
            self.backend = unpadded(self.backend)
        self.tokens = [self.vocabulary[i] for i in range(len(self.vocabulary))]
        self.lengths = np.fromiter(map(len, self.tokens), np.int64, len(self.tokens))
        self.is_special = ~self.vocabulary.is_text
        self.prefix = self._prefix()
        self.end_id = self.vocabulary.roles.get("eos")
        self.is_end = np.zeros(len(self.tokens), bool)
        self.is_end[[self.vocabulary.roles[role] for role in END_ROLES if role in self.vocabulary.roles]] = True
        self._template: ChatTemplate | None = None

    def _prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text, such as BOS."""
        plain, whole = (self.backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        return next((whole[:k] for k in range(len(whole)) if whole[k : k + len(plain)] == plain), [])

    @property
    def template(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer, self.name)
        return self._template

    def reads_as(self, other: _Side) -> bool:
        """Whether this model reads the other's ids as its own: same tokens, same template."""
        return (
            same_tokens(self.vocabulary, other.vocabulary)
            and self.backend.to_str() == other.backend.to_str()
            and getattr(self.tokenizer, "chat_template", None) == getattr(other.tokenizer, "chat_template", None)
        )

    def roles(self, token_id: int) -> set[str]:
        return {role for role, i in self.vocabulary.roles.items() if i == token_id}

    def encode(self, examples: Sequence[Example], add_end: bool, first_row: int = 0) -> _Tokens:
        """Writes and encodes examples; errors count rows from `first_row`."""
        layouts = []
        base = 1
        for number, example in enumerate(examples, first_row):
            try:
                layouts.append(self._layout(example, base))
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
            base += len(layouts[-1].raw) + 2
        texts = [layout.text for layout in layouts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        rows = []
        is_exact = np.ones(len(examples), bool)
        for k, (encoding, layout, example) in enumerate(zip(encodings, layouts, examples, strict=True)):
            ids = encoding.ids
            if b"".join([self.tokens[i] for i in ids]) == layout.raw:
                row = np.asarray(ids, np.int64)
                end = np.cumsum(self.lengths[row])
                start = end - self.lengths[row]
            else:
                is_exact[k] = False
                row, start, end = self._offsets(layout.text)
            if example.conversation is None:
                closing = [self.end_id] if add_end and self.end_id is not None and example.pieces else []
                before, behind = len(self.prefix), len(closing)
                row = np.concatenate([np.asarray(self.prefix, np.int64), row, np.asarray(closing, np.int64)])
                start, end = (
                    np.concatenate([np.full(before, -1), one, np.full(behind, len(layout.raw))]) for one in (start, end)
                )
            rows.append((row, start + layout.base, end + layout.base))
        ids, start, end = (np.concatenate(columns) for columns in zip(*rows, strict=True))
        return _Tokens(
            ids,
            start,
            end,
            np.cumsum([0, *(len(row) for row, _, _ in rows)]),
            np.array([layout.base + len(layout.raw) for layout in layouts]),
            [layout.raw for layout in layouts],
            is_exact,
            np.array([start for layout in layouts for start in layout.piece_start], np.int64),
            self._turn_ends(ids, start, [stretch for layout in layouts for stretch in layout.turn_end]),
        )

    def _layout(self, example: Example, base: int) -> _Layout:
        """An example as this model's text, whose first byte has number `base`."""
        starts = [-1] * len(example.pieces)
        ends = [(-1, -1)] * len(example.trained)
        at = base
        if example.conversation is None:
            text = "".join(example.pieces)
            for k, size in enumerate(example.sizes):
                starts[k] = at
                at += size
            ends[-1:] = [(at, at + 1)] * len(ends[-1:])
        else:
            text, places = self.template.render(example.conversation)
            char = 0
            for place in places:
                at, char = at + len(text[char : place.start].encode()), place.start
                if place.is_verbatim:
                    starts[place.piece] = at
                at, char = at + len(text[char : place.end].encode()), place.end
                ends[example.owners[place.piece]] = (at, at + len(text[char : place.next_start].encode()))
        raw = text.encode()
        for call in example.conversation.arguments if example.conversation is not None else ():
            start = starts[call.parts[0]]  # what stands between the values is placed only in JSON
            for piece in (call.whole, call.closed):
                if start >= 0 and raw.startswith(example.pieces[piece].encode(), start - base):
                    starts[piece] = start
        return _Layout(text, raw, base, starts, ends)

    def _offsets(self, text: str) -> tuple[Ints, Ints, Ints]:
        """Ids and byte ranges by the tokenizer's own offsets, for one that does not spell the text as it is."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        sizes = np.fromiter((len(character.encode()) for character in text), np.int64, len(text))
        byte = np.concatenate([[0], np.cumsum(sizes)])
        start, end = byte[np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T]
        return np.asarray(encoding.ids, np.int64), start, end

    def _turn_ends(self, ids: Ints, start: Ints, stretches: Sequence[tuple[int, int]]) -> Ints:
        """The first end token in each stretch of bytes, -1 if there is none or the stretch begins at -1."""
        after, until = np.array(stretches, np.int64).reshape(-1, 2).T
        (places,) = self.is_end[ids].nonzero()
        places = np.append(places, -1)
        position = np.append(start[places[:-1]], np.iinfo(np.int64).max)
        k = np.searchsorted(position[:-1], after)
        return np.where((after >= 0) & (position[k] < until), places[k], -1)


class _Chunks(NamedTuple):
    """Chunks of B examples, in order."""

    spans: Ints
    """[K, 4]: token positions within the examples."""
    trained: NDArray[np.bool_]
    ptr: Ints


class ExampleEncoder:
    """Turns rows of data into what `XTokenCollator` takes.

    Parameters
    ----------
    student_tok : tokenizer
        As for `Vocabulary.from_tokenizer`; messages need one of `transformers` with a chat template.
    teacher_toks : sequence of tokenizers
        One for each teacher. A teacher with the student's tokenizer and chat template reads the student's ids.
    train_on : "all", "completion" or "assistant"
        Which turns are trained on. "assistant": the turns of the assistant. "completion": those behind the last turn
        of anyone else but a tool. Of prompt and completion both mean the completion. Plain text is always trained on.
    max_length, max_teacher_length : int, optional
        Most tokens of an example, for the student and for each teacher. Longer ones are cut on all sides behind a
        chunk that all of them share, so that no model reads text that another does not. Plain text is cut into several
        examples, each of which begins as each tokenizer begins a text; the others lose their end.
    text_column : str
        Field with plain text.
    add_end : bool
        Whether plain text and completions end with each tokenizer's end token.
    name_documents : bool
        Whether examples say which document of a teacher they are part of, so that a `TeacherCache` can be asked.

    Raises
    ------
    ValueError
        For unknown choices, lengths below 2, and a `Vocabulary` that cannot encode text.

    Notes
    -----
    A row is a mapping with ``messages`` (and ``tools``, ``chat_template_kwargs``); with ``prompt`` and ``completion``,
    both strings or both lists of messages; or with `text_column`.

    Messages are written by each tokenizer's own chat template. Their contents (texts, reasoning, names and arguments of
    tool calls) are found by writing the conversation a second time with markers in their place. A content that a
    template leaves out or writes otherwise is aligned with nothing; white space at the edges of a content, which
    templates strip, belongs to the template. Tokens of the template are neither labels nor in a chunk, with these
    exceptions in turns that are trained on: the token that ends the turn is a label, and a chunk with the teacher's,
    where both play the same role in their vocabularies; and the tags around a reasoning are taken for content, since
    the student must write them itself. Special tokens that stand in a content are left out.

    Arguments of a tool call that are a mapping are one content where all templates write them as the same JSON: keys,
    numbers and brackets too, with one more closing brace if all have it. Where a template writes them otherwise, its
    strings and numbers are aligned, and what stands between them is the student's to learn from labels alone.
    Arguments that are a string are a content like others. What a template writes around a call is not trained on.

    Chunks are cut at every byte of a content at which a token begins on both sides. A token that reaches over the
    edge of a content counts only if there is nothing but white space beyond, and is in a chunk only if the teacher has
    the same white space there.

    Prompt and completion are encoded as one text; white space between them belongs to the completion. Fields of
    messages that are None, as tables fill them in, are left out; ``content`` stays.
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
        self.student = _Side(student_tok, "student")
        sides = [_Side(tokenizer, f"teacher {k}") for k, tokenizer in enumerate(teacher_toks)]
        self.teachers = [None if side.reads_as(self.student) else side for side in sides]

    def encode(self, rows: Sequence[Mapping[str, Any]], first_row: int = 0) -> list[list[dict[str, Any]]]:
        """Encodes rows, best some hundreds at a time; errors count them from `first_row`.

        Returns
        -------
        list
            For each row a list of examples: none if nothing of it is trained on, several if a long text was cut. An
            example is a dict: ``student_ids`` int64 [T]; ``labels`` int64 [T], the ids where trained on, else -100,
            unshifted; ``teachers``: for each a dict of ``ids`` int64 and ``spans`` int32 [K, 4], the chunks that are
            trained on, or of None and None if it reads the student's ids. With `name_documents` also ``document``, the
            `document_digest` of the teacher's ids of the whole row, and ``first``, which of these the example's ids
            begin at; special tokens that are put before a later part take the places of the tokens before it.

        Raises
        ------
        ValueError
            If a row has none of the forms, or a template is missing or refuses it, saying which.
        """
        if not rows:
            return []
        examples = []
        for number, row in enumerate(rows, first_row):
            try:
                examples.append(parse_example(row, self.train_on, self.text_column))
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
        table = _Table.of(examples)
        student = self.student.encode(examples, self.add_end, first_row)
        sides = [None if side is None else side.encode(examples, self.add_end, first_row) for side in self.teachers]
        _choose_wholes(examples, [student, *(side for side in sides if side is not None)])
        labels = self._labels(table, student)
        chunks = [
            None if side is None or tokens is None else self._chunks(table, student, side, tokens)
            for side, tokens in zip(self.teachers, sides, strict=True)
        ]
        teachers = [
            None if tokens is None or one is None else (tokens, one) for tokens, one in zip(sides, chunks, strict=True)
        ]
        return [self._examples(k, example, student, labels, teachers) for k, example in enumerate(examples)]

    def _labels(self, table: _Table, student: _Tokens) -> Ints:
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
                within[i] = _is_space(student, int(begin), int(end))
            wanted |= within
        wanted &= ~self.student.is_special[student.ids]
        wanted[student.turn_end[table.trained_turn & (student.turn_end >= 0)]] = True
        return np.where(wanted, student.ids, IGNORED)

    def _chunks(self, table: _Table, student: _Tokens, side: _Side, teacher: _Tokens) -> _Chunks:
        room = table.length + 2 * MOST_OVERHANG + 1
        piece_begin = np.cumsum(room) - room + MOST_OVERHANG  # pieces on a line of their own, with gaps
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
        # Where a token reaches over an edge, and where positions are not exact, the two sides' bytes are compared.
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
        self,
        k: int,
        example: Example,
        student: _Tokens,
        labels: Ints,
        teachers: Sequence[tuple[_Tokens, _Chunks] | None],
    ) -> list[dict[str, Any]]:
        """Row k as examples within the limits: the whole if it fits, else its beginning, and of a text what follows."""
        ids, wanted = (one[student.ptr[k] : student.ptr[k + 1]] for one in (student.ids, labels))
        if not (wanted != IGNORED).any():
            return []
        readings = [_Reading.of(k, *one) for one in teachers if one is not None]
        sides = [self.student, *(side for side in self.teachers if side is not None)]
        prefixes = [np.asarray(side.prefix, np.int64) for side in sides]
        whole = np.array([len(ids), *(len(reading.ids) for reading in readings)])
        given = [self.max_length, *(self.max_teacher_length for _ in readings)]
        limits = [size if limit is None else limit for limit, size in zip(given, whole.tolist(), strict=True)]
        cuts = np.stack([np.zeros_like(whole), whole]) if (whole <= limits).all() else _cuts(whole, readings)
        windows = _windows(cuts, [len(prefix) for prefix in prefixes], limits)
        if example.conversation is not None or len(example.pieces) > 1:
            windows = itertools.islice(windows, 1)
        documents = (
            [document_digest(row) for row in (ids, *(one.ids for one in readings))] if self.name_documents else []
        )
        examples = []
        for first, last in windows:
            before = [prefix[: len(prefix) if first[0] else 0] for prefix in prefixes]
            named: list[dict[str, Any]] = [{} for _ in prefixes]
            for m, document in enumerate(documents):
                named[m] = {"document": document, "first": int(first[m]) - len(before[m])}
            row = np.concatenate([np.full(len(before[0]), IGNORED), wanted[first[0] : last[0]]])
            row[:1] = IGNORED
            if not (row != IGNORED).any():
                continue
            cut = iter(
                {
                    "ids": np.concatenate([before[m], reading.ids[first[m] : last[m]]]),
                    "spans": reading.spans_between(first[[0, m]], last[[0, m]], [len(before[0]), len(before[m])]),
                    **named[m],
                }
                for m, reading in enumerate(readings, 1)
            )
            direct = {"ids": None, "spans": None, **named[0]}
            examples.append({
                "student_ids": np.concatenate([before[0], ids[first[0] : last[0]]]),
                "labels": row,
                "teachers": [dict(direct) if one is None else next(cut) for one in teachers],
            })  # fmt: skip
        return examples


def _choose_wholes(examples: Sequence[Example], sides: Sequence[_Tokens]) -> None:
    """Keeps arguments of calls as one piece where all models write the same JSON, else as the parts that each has.

    The longer the piece the better, since tokens may reach over its edges.
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


class _Reading(NamedTuple):
    """One example as one teacher reads it."""

    ids: Ints
    spans: Ints
    trained: NDArray[np.bool_]

    @staticmethod
    def of(k: int, tokens: _Tokens, chunks: _Chunks) -> _Reading:
        these = slice(chunks.ptr[k], chunks.ptr[k + 1])
        return _Reading(tokens.ids[tokens.ptr[k] : tokens.ptr[k + 1]], chunks.spans[these], chunks.trained[these])

    def spans_between(self, first: Ints, last: Ints, prefix: Sequence[int]) -> NDArray[np.int32]:
        """The chunks to train on of a window, counted from its start; `first` and `last` are of student and teacher."""
        inside = self.trained & (self.spans[:, 0] >= first[0]) & (self.spans[:, 1] <= last[0])
        spans = self.spans[inside] - np.repeat(first - np.asarray(prefix), 2)
        predicted: NDArray[np.int32] = spans[(spans[:, 0] > 0) & (spans[:, 2] > 0)].astype(np.int32)
        return predicted


def _cuts(whole: Ints, readings: Sequence[_Reading]) -> Ints:
    """[C, 1 + teachers]: how many tokens each side has read at each place where all can be cut, from none to all."""
    places = np.arange(1, whole[0])
    for reading in readings:
        places = np.intersect1d(places, reading.spans[:, 1])
    inner = [reading.spans[np.searchsorted(reading.spans[:, 1], places), 3] for reading in readings]
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
    """The piece at or before each byte, and whether it reaches there."""
    if not (piece_start >= 0).any():
        return np.zeros(len(position), np.int64), np.zeros(len(position), bool)
    order = np.argsort(piece_start, kind="stable")
    order = order[piece_start[order] >= 0]
    k = np.searchsorted(piece_start[order], position, "right") - 1
    piece = order[np.maximum(k, 0)]
    return piece, (k >= 0) & (position <= piece_start[piece] + length[piece])


def _edges(tokens: _Tokens, length: Ints, piece_begin: Ints, *, only_open: bool) -> tuple[Ints, Ints]:
    """Places within pieces at which a token begins, on the pieces' own line, and these tokens.

    Places outside take part too, as far as there is only white space up to there. With `only_open` just the nearest,
    and only where no token begins at the edge of the piece itself: so a token that is no part of it is in no chunk.
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
                if not _is_space(tokens, min(place, bound), max(place, bound)):
                    break
                line.append(np.array([piece_begin[pieces[p]] - first[p] + place]))
                found.append(token[k : k + 1])
                k += step
                if only_open:
                    break
    return np.concatenate(line), np.concatenate(found)


def _is_space(tokens: _Tokens, start: int, end: int) -> bool:
    """Whether the text between two bytes is white space."""
    k = int(np.searchsorted(tokens.text_end, start))
    base = int(tokens.text_end[k]) - len(tokens.raw[k])
    text = tokens.raw[k][max(start - base, 0) : end - base]
    return text.decode("utf-8", "replace").isspace()
