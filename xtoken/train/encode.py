"""Encoding: text, prompt and completion, or chat messages become token ids of every model, labels and chunks."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray

from xtoken import _core
from xtoken.alignment import Aligner
from xtoken.losses.backends import IGNORED
from xtoken.losses.call import check_choice, check_sequence
from xtoken.teacher_cache import document_digest
from xtoken.vocabulary import TokenizerLike

from .chat import AMBIGUOUS, REPEATED, unseen
from .example import TRAIN_ON, Example, Ints, Table, normal_form, parse_example, parse_prompt, prompt_of
from .reader import Reader, Tokens
from .report import Report
from .routing import route_of

_NO_END = (
    "nothing supervises its end, since the {}'s chat template writes no special token there; use one that ends "
    "turns, or the student does not learn to stop"
)

_NO_FIRST = (
    "its first token is in no chunk for {}, whose tokens begin otherwise, as where one chat template writes a space "
    "before the content; it is learned from its label alone"
)


class ExampleChunks(NamedTuple):
    """Chunks of B examples, in order."""

    spans: Ints
    """[K, 4]: token positions within the examples."""
    trained: NDArray[np.bool_]
    ptr: Ints

    def of(self, k: int) -> ExampleChunks:
        """Those of example k alone."""
        these = slice(self.ptr[k], self.ptr[k + 1])
        return ExampleChunks(self.spans[these], self.trained[these], self.ptr[k : k + 2] - self.ptr[k])

    def trained_tokens(self, ptr: Ints) -> NDArray[np.bool_]:
        """[N]: the student's tokens in chunks that are trained on; example b begins at token ``ptr[b]``."""
        found = np.zeros(ptr[-1] + 1, np.int64)
        spans = self.spans[self.trained, :2] + np.repeat(ptr[:-1], np.diff(self.ptr))[self.trained, None]
        np.add.at(found, spans[:, 0], 1)
        np.add.at(found, spans[:, 1], -1)
        return np.cumsum(found)[:-1] > 0

    def between(self, first: int, last: int, start: Ints) -> NDArray[np.int32]:
        """The chunks to train on between two student tokens, and those that end where one of them begins, which a loss
        may look at; positions count from `start`, of student and teacher."""
        inside = (self.spans[:, 0] >= first) & (self.spans[:, 1] <= last)
        used = self.trained & inside
        used[:-1] |= inside[:-1] & used[1:] & (self.spans[:-1, 1::2] == self.spans[1:, ::2]).all(axis=1)
        return (self.spans[used] - np.repeat(start, 2)).astype(np.int32)


class ExampleEncoder:
    """Turns rows of data into what `XTokenCollator` takes.

    Parameters
    ----------
    student_tok : tokenizer
        As for `Vocabulary.from_tokenizer`; messages need one of `transformers` with a chat template.
    teacher_toks : sequence of tokenizers
        One for each teacher. A teacher with the student's tokenizer and chat template, and no system message of its
        own, reads the student's ids.
    train_on : "all", "completion" or "assistant"
        Which turns are trained on. "assistant": the turns of the assistant. "completion": those after the last turn
        of anyone but the assistant and tools. Of prompt and completion both mean the completion. Plain text is always
        trained on.
    max_length, max_teacher_length : int, optional
        Most tokens of an example, for the student and for each teacher; the second may be a sequence with one or None
        for each teacher. Longer ones are cut on all sides after a chunk that all of them share, so that no model reads
        text that another does not. Plain text is split into several examples, each with the special tokens that begin a
        text; prompts and chats are truncated.
    text_column : str
        Field with plain text.
    add_end : bool
        Whether plain text and completions end with each tokenizer's end token, and chats in which nothing ends the
        last turn of the assistant.
    name_documents : bool
        Whether examples say which document of a teacher they are part of, so that a `TeacherCache` can be asked.
    with_prompts : bool
        Whether examples of rows that have a prompt bring it along, so that a completion can be written in training. A
        row may then be a prompt alone: ``prompt`` without ``completion``, and without a text in `text_column`, with
        which it is plain text that has no prompt.
    now : datetime, optional
        The time that templates are told (``strftime_now``). Default: when the encoder is made; it stands still.
    teacher_systems : sequence of str or None, optional
        For each teacher a text that it alone is told, at the beginning of a chat's system message, or as one where the
        chat has none. Rows that are no chats are read without it, which is counted and told once, and refused if it is
        all rows.
    teacher_column : str, optional
        Field that says which teachers a row goes to: a name, or a list of names, which may be empty. The others do not
        read it. A row without that field, or with null in it, goes to all teachers, which is counted and told once, and
        refused if it is all rows.
    teacher_names : sequence of str, optional
        The teachers' names in that field; required with `teacher_column`.

    Attributes
    ----------
    report : Report
        What of the rows cannot be trained on though it should be: turns without a label or a trained end, contents that
        cannot be told from other text, turns without a chunk or whose first token is in none, rows that are cut; and
        pictures and sounds, which no model is shown. Counted by kind; the first of each is logged with row, turn and
        reason.

    Raises ValueError for unknown choices, lengths below 2, a `Vocabulary` that cannot encode text, and more or fewer
    names or systems than teachers.

    Notes
    -----
    A row is a mapping with ``messages`` (and ``tools``, a list or its JSON text, and ``chat_template_kwargs``); with
    ``conversations`` of ShareGPT, turns with ``from`` and ``value`` (and ``system``); with ``prompt`` and
    ``completion``, both strings or both lists of messages; or with `text_column`.

    Messages are written by each tokenizer's own chat template. Their contents (texts, reasoning, names and arguments of
    tool calls) are found by writing the conversation a second time with an invisible character in each, which counts
    where the text is otherwise the same; see `ChatTemplate.render`. A content that a template leaves out, writes
    otherwise, or where it cannot be told from other text, is aligned with nothing; white space at the edges of a
    content, which templates strip, belongs to the template. Tokens of the template are neither labels nor in a chunk,
    with these exceptions in turns that are trained on: the token that ends the turn, or marks the next one where
    nothing else ends it, is a label, and a chunk with the teacher's, where both have the same role in their
    vocabularies; and the tags around a reasoning count as content, since the student must write them itself. Special
    tokens inside a content are left out. A message with ``weight`` 0, as in OpenAI's files, or ``train`` false is not
    trained on.

    Arguments of a tool call that are a mapping are one content where all templates write them as the same JSON: keys,
    numbers and brackets too, with one more closing brace if all have it. Where a template writes them otherwise, its
    strings and numbers are aligned, and what is between them is learned from labels alone.
    Arguments that are a string are a content like others. What a template writes around a call is not trained on.

    Chunks are those of `Aligner`, of each content and of plain text as a whole. A token that crosses the edge of a
    content counts only if there is nothing but white space outside, and is in a chunk only if the teacher has the same
    white space there.

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
        max_teacher_length: int | Sequence[int | None] | None = None,
        text_column: str = "text",
        add_end: bool = True,
        name_documents: bool = False,
        with_prompts: bool = False,
        now: datetime | None = None,
        teacher_systems: Sequence[str | None] | None = None,
        teacher_column: str | None = None,
        teacher_names: Sequence[str] | None = None,
    ) -> None:
        check_choice(train_on, "train_on", TRAIN_ON)
        check_sequence(teacher_toks, "teacher_toks", "tokenizers")
        count = len(teacher_toks)
        systems = [None] * count if teacher_systems is None else list(teacher_systems)
        names = [f"teacher {k}" for k in range(count)] if teacher_names is None else list(teacher_names)
        if teacher_column is not None and teacher_names is None:
            raise ValueError(f"teacher_names: expected the names that {teacher_column!r} has, got None")
        limits: list[int | None]
        if isinstance(max_teacher_length, Sequence):
            limits = theirs = list(max_teacher_length)
        else:
            limits, theirs = [max_teacher_length], [max_teacher_length] * count
        for option, each in (("teacher_systems", systems), ("teacher_names", names), ("max_teacher_length", theirs)):
            if len(each) != count:
                raise ValueError(f"{option}: expected one for each of {count} teachers, got {len(each)}")
        for name, given in (("max_length", [max_length]), ("max_teacher_length", limits)):
            if (least := min((limit for limit in given if limit is not None), default=2)) < 2:
                raise ValueError(f"{name}: expected at least 2, got {least}")
        self.train_on = train_on
        self.text_column = text_column
        self.add_end = add_end
        self.name_documents = name_documents
        self.with_prompts = with_prompts
        self.now = now or datetime.now()
        self.report = Report()
        self.teacher_column = teacher_column
        self.teacher_names = names
        self.student = Reader(student_tok, "student", self.now)
        readers = zip(teacher_toks, names, systems, strict=True)
        sides = [Reader(tokenizer, name, self.now, system) for tokenizer, name, system in readers]
        self.teachers = [None if side.reads_as(self.student) else side for side in sides]
        self.sides = [self.student, *(side for side in self.teachers if side is not None)]
        self._numbers = [m for m, side in enumerate(self.teachers) if side is not None]
        # A teacher that reads the student's ids has a limit for these.
        shared = [limit for limit, side in zip(theirs, self.teachers, strict=True) if side is None]
        ours = min((limit for limit in [max_length, *shared] if limit is not None), default=None)
        self.limits = [ours, *(limit for limit, side in zip(theirs, self.teachers, strict=True) if side is not None)]
        """Most tokens of an example, for each of the sides."""
        self.aligners = [Aligner(self.student.vocabulary, side.vocabulary) for side in self.sides[1:]]

    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that decides what rows become: tokenizers, chat templates with the time that they are
        told, options, and the versions of this library, of `tokenizers` and of `transformers`."""
        made = {"student", "teachers", "sides", "aligners", "report", "now"}
        facts = {name: value for name, value in vars(self).items() if name not in made}
        facts["versions"] = [_core.version, tokenizers.__version__, transformers.__version__]
        facts["sides"] = [None if side is None else side.facts() for side in (self.student, *self.teachers)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def encode(self, rows: Sequence[Mapping[str, Any]], first_row: int = 0) -> list[list[dict[str, Any]]]:
        """Encodes rows, best some hundreds at a time; errors count them from `first_row`.

        For each row a list of examples: none if nothing of it is trained on, several if a long text was cut. An example
        is a dict: ``student_ids`` int64 [T]; ``labels`` int64 [T], the ids where trained on, else -100, unshifted;
        ``teachers``: for each a dict of ``ids`` int64 and ``spans`` int32 [K, 4], the chunks that are trained on and
        those right before them, or of None and None if it reads the student's ids. With `name_documents` also
        ``document``, the `document_digest` of the teacher's ids of the whole row, and ``first``, which of these the
        example's ids begin at; special tokens that are put before a later part take the places of the tokens before it.
        With `teacher_column` also ``route``, a list of bool, whether each teacher gets it; of one that does not,
        ``ids`` and ``spans`` are empty (or None). With `with_prompts` also ``prompt``, where the row has one: what
        `prompt_of` gives; there is then an example even if nothing of it is trained on.

        Raises ValueError if a row has none of the forms, or a template is missing or refuses it, saying which.
        """
        if not rows:
            return []
        examples = []
        routes = []
        prompts = []
        for number, given in enumerate(rows, first_row):
            try:
                row = normal_form(given)
                is_answered = row.get("messages") is not None or row.get("completion") is not None
                is_text = not is_answered and isinstance(row.get(self.text_column), str)
                prompt = prompt_of(row) if self.with_prompts and not is_text else None
                if prompt is not None and not is_answered:
                    examples.append(parse_prompt(prompt))
                else:
                    examples.append(parse_example(row, self.train_on, self.text_column))
                routes.append(self._route(row, number))
                prompts.append(prompt)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
        # [sides, B]: who reads what.
        is_read = np.array([[True] * len(rows), *([route[m] for route in routes] for m in self._numbers)])
        table = Table.of(examples)
        tokens = [
            side.encode(examples, self.add_end, first_row, of) for side, of in zip(self.sides, is_read, strict=True)
        ]
        # A brace that closes a call is content where all models write it.
        row_of = np.repeat(np.arange(len(rows)), np.diff(table.first_turn))[table.owner[table.closing]]
        lacks = [(one.piece_start[table.closing] < 0) & of[row_of] for one, of in zip(tokens, is_read, strict=True)]
        lacking = table.closing[np.any(lacks, axis=0)]
        for side in tokens:
            side.piece_start[lacking] = -1
        labels = self._labels(table, tokens[0])
        chunks = [
            find_chunks(table, labels != IGNORED, tokens[0], teacher, aligner)
            for teacher, aligner in zip(tokens[1:], self.aligners, strict=True)
        ]
        self.report.rows += len(rows)
        self._tell(examples, table, labels, tokens, chunks, is_read, first_row)
        found = [
            self._examples(k, example, labels, tokens, chunks, is_read[:, k], first_row + k)
            for k, example in enumerate(examples)
        ]
        for k, prompt in enumerate(prompts):
            if prompt is not None:
                found[k] = [{**one, "prompt": prompt} for one in found[k] or [self._untrained(k, tokens)]]
        if self.teacher_column is not None:
            for made, route in zip(found, routes, strict=True):
                for example in made:
                    example["route"] = route
        return found

    def _untrained(self, k: int, sides: Sequence[Tokens]) -> dict[str, Any]:
        """Row k as an example without labels and chunks."""
        ids = [side.ids_of(k)[:limit] for side, limit in zip(sides, self.limits, strict=True)]
        own = ({"ids": one, "spans": np.zeros((0, 4), np.int32)} for one in ids[1:])
        teachers = [{"ids": None, "spans": None} if one is None else next(own) for one in self.teachers]
        return {"student_ids": ids[0], "labels": np.full(len(ids[0]), IGNORED), "teachers": teachers}

    def _route(self, row: Mapping[str, Any], number: int) -> list[bool]:
        """Which teachers a row goes to."""
        column = self.teacher_column
        route = None if column is None else route_of(row, column, self.teacher_names)
        if route is None and column is not None:
            self.report.add(Report.NO_ROUTE, f"no teacher in {column!r}, so it goes to all", number, may_be_all=False)
        return [True] * len(self.teachers) if route is None else route

    def _labels(self, table: Table, student: Tokens) -> Ints:
        """The ids of the tokens that reach into a piece that is trained on, and of ends of turns; else -100."""
        wanted = np.zeros(len(student.ids), bool)
        trained = table.trained_turn[table.owner] & (student.piece_start >= 0)
        for first, last in student.within(*_stretches(table.length[trained], student.piece_start[trained])).tolist():
            wanted[first:last] = True
        wanted &= ~student.is_special
        wanted[student.turn_end[table.trained_turn & (student.turn_end >= 0)]] = True
        return np.where(wanted, student.ids, IGNORED)

    def _tell(
        self, examples: Sequence[Example], table: Table, labels: Ints, sides: Sequence[Tokens],
        chunks: Sequence[ExampleChunks], is_read: NDArray[np.bool_], first_row: int,
    ) -> None:  # fmt: skip
        """Reports turns of chats that are trained on and get no label or no chunk, or whose end gets none."""
        student = sides[0]
        (own,) = (table.is_own & table.trained_turn[table.owner]).nonzero()
        at = student.piece_start[own]

        def touched(tokens: NDArray[np.bool_]) -> NDArray[np.bool_]:
            """[M]: whether one of the tokens [N] reaches into a content of the turn."""
            (some,) = (tokens & ~student.is_special).nonzero()
            begin = np.append(student.start[some], np.iinfo(np.int64).max)
            inside = (at >= 0) & (begin[np.searchsorted(student.end[some], at, "right")] < at + table.length[own])
            return np.bincount(table.owner[own[inside]], minlength=len(table.trained_turn)) > 0

        def reasons(tokens: Tokens, turn: int) -> list[str]:
            """Why contents of a turn have no place."""
            return sorted({tokens.why[k] for k in own[table.owner[own] == turn].tolist() if k in tokens.why})

        has_content = np.bincount(table.owner[own], minlength=len(table.trained_turn)) > 0
        has_label = touched(labels != IGNORED)
        in_chunk = [one.trained_tokens(student.ptr) for one in chunks]
        has_chunk = [touched(one) for one in in_chunk]
        turns, k = np.unique(table.owner[own[at >= 0]], return_index=True)
        head = own[at >= 0][k]  # the first content of each turn
        begin, end = student.within(student.piece_start[head], table.length[head]).T
        turns, begin = turns[begin < end], begin[begin < end]
        lacks_first = np.zeros((len(chunks), len(table.trained_turn)), bool)
        for lacks, one in zip(lacks_first, in_chunk, strict=True):
            lacks[turns] = (labels[begin] != IGNORED) & ~one[begin]
        for b, example in enumerate(examples):
            if example.conversation is None:
                for side, of in zip(self.sides[1:], is_read[1:], strict=True):
                    if side.system is not None and of[b]:
                        reason = f"no chat, so {side.name} is not told its system message"
                        self.report.add(Report.NO_SYSTEM.format(side.name), reason, first_row + b, may_be_all=False)
                continue
            row, (first, last) = first_row + b, table.first_turn[b : b + 2].tolist()
            for turn, message in enumerate(example.conversation.messages):
                if kinds := unseen(message):
                    self.report.add(Report.UNSEEN, f"a part of type {kinds[0]!r}, which no model is shown", row, turn)
            lost = answers = 0
            for t in range(first, last):
                if has_label[t] and example.conversation.messages[t - first]["role"] == "assistant":
                    answers += 1
                    if student.turn_end[t] < 0:
                        self.report.add(Report.NO_END, _NO_END.format(self.student.name), row, t - first)
                elif table.trained_turn[t] and not has_label[t]:
                    said = reasons(student, t) or ["its tokens are special, or reach into the template's text"]
                    reason = (
                        f"for the {self.student.name} {' and '.join(said)}" if has_content[t] else "it has no content"
                    )
                    self.report.add(Report.NO_LABEL, f"no label, since {reason}", row, t - first)
                    lost += has_content[t]
            if lost and not has_label[first:last].any():
                self.report.lose(Report.NO_LABEL)
            for side, tokens, has, lacks, of in zip(
                self.sides[1:], sides[1:], has_chunk, lacks_first, is_read[1:], strict=True
            ):
                if not of[b]:
                    continue
                without = [t for t in range(first, last) if has_label[t] and not has[t]]
                for t in without:
                    self._tell_no_chunk(side, reasons(tokens, t), row, t - first)
                if without and not has[first:last].any():
                    self.report.lose(Report.NO_CHUNK.format(side.name))
                for t in [t for t in range(first, last) if has[t] and lacks[t]]:
                    self.report.add(
                        Report.NO_FIRST_CHUNK.format(side.name), _NO_FIRST.format(side.name), row, t - first
                    )
            if self.add_end and answers and (student.turn_end[first:last][has_label[first:last]] < 0).all():
                self.report.lose(Report.NO_END)
            for side, tokens in zip(self.sides, sides, strict=True):
                if tokens.is_open[b] and self.add_end and side.end_id is not None:
                    token = side.tokens[side.end_id].decode("utf-8", "replace")
                    reason = f"the chat template of the {side.name} ends it with no token, so {token!r} is put there"
                    self.report.add(Report.ADDED_END, reason, row, last - first - 1)
        for side, tokens in zip(self.sides, sides, strict=True):
            for piece, reason in tokens.why.items():
                turn = table.owner[piece]
                if reason in (AMBIGUOUS, REPEATED) and table.trained_turn[turn]:
                    b = int(np.searchsorted(table.first_turn, turn, "right")) - 1
                    reason = f"for the {side.name} {reason}"
                    self.report.add(Report.AMBIGUOUS_TURNS, reason, first_row + b, int(turn - table.first_turn[b]))

    def _tell_no_chunk(self, side: Reader, why: Sequence[str], row: int, turn: int | None = None) -> None:
        reason = " and ".join(why) or "its tokens and the student's share no piece of text"
        self.report.add(Report.NO_CHUNK.format(side.name), f"no chunk for {side.name}, since {reason}", row, turn)

    def _tell_unpredicted(self, side: Reader, row: int) -> None:
        reason = "its text is one piece, and the tokenizer puts no token before it that could predict it"
        self.report.add(Report.UNPREDICTED.format(side.name), reason, row)
        self.report.lose(Report.UNPREDICTED.format(side.name))

    def _examples(
        self,
        k: int,
        example: Example,
        labels: Ints,
        sides: Sequence[Tokens],
        chunks: Sequence[ExampleChunks],
        is_read: NDArray[np.bool_],
        row: int,
    ) -> list[dict[str, Any]]:
        """Row k as examples within the limits of those who read it: the whole if it fits, else its beginning, and of a
        text what follows."""
        reading: list[int] = is_read.nonzero()[0].tolist()
        readers = [self.sides[m] for m in reading]
        rows = [sides[m].ids_of(k) for m in reading]
        wanted = labels[sides[0].ptr[k] : sides[0].ptr[k + 1]]
        if not (wanted != IGNORED).any():
            return []
        chunks = [chunks[m - 1].of(k) for m in reading[1:]]
        prefixes = [np.asarray(side.prefix, np.int64) for side in readers]
        whole = np.array([len(row) for row in rows])
        most = [self.limits[m] for m in reading]
        limits = [size if limit is None else limit for limit, size in zip(most, whole.tolist(), strict=True)]
        cuts = np.stack([np.zeros_like(whole), whole]) if (whole <= limits).all() else _cuts(whole, chunks)
        windows = _windows(cuts, [len(prefix) for prefix in prefixes], limits)
        if example.conversation is not None or len(example.pieces) > 1:
            windows = itertools.islice(windows, 1)
        named = zip(rows, readers, strict=True) if self.name_documents else ()
        documents = [document_digest(row, side.end_id) for row, side in named]
        examples: list[dict[str, Any]] = []
        read = 0
        for first, last in windows:
            read += last[0] - first[0]
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
            own = {self._numbers[m - 1]: entry for m, entry in zip(reading[1:], entries[1:], strict=True)}
            nothing = {"ids": np.zeros(0, np.int64), "spans": np.zeros((0, 4), np.int32)}
            teachers = [
                dict(entries[0]) if side is None else own.get(m, nothing) for m, side in enumerate(self.teachers)
            ]
            examples.append({"student_ids": ids[0], "labels": targets, "teachers": teachers})
        if read < whole[0]:
            longest = ", ".join(
                f"{size} tokens of the {side.name}, at most {limit}"
                for side, size, limit in zip(readers, whole.tolist(), most, strict=True)
                if limit is not None
            )
            self.report.add(Report.CUT, f"{whole[0] - read} of its tokens are left out: {longest}", row)
            if not examples:
                self.report.lose(Report.CUT)
        if example.conversation is None:
            if not examples and read == whole[0]:
                self._tell_unpredicted(self.student, row)
            for place, at in enumerate(reading[1:], 1):
                m, side = self._numbers[at - 1], self.sides[at]
                spans = [(one["labels"], one["teachers"][m]["spans"]) for one in examples]
                heads = [labels[these[(these[:, ::2] > 0).all(axis=1), 0]] for labels, these in spans]
                heads = [one[one != IGNORED] for one in heads]
                if examples and all(self.student.is_special[one].all() for one in heads):  # ends do not count
                    pair = ((self.student, rows[0]), (side, rows[place]))
                    if any((~one.is_special[ids]).nonzero()[0].tolist() == [0] for one, ids in pair):
                        self._tell_unpredicted(side, row)
                    else:
                        self._tell_no_chunk(side, (), row)
                        self.report.lose(Report.NO_CHUNK.format(side.name))
        return examples


def _cuts(whole: Ints, chunks: Sequence[ExampleChunks]) -> Ints:
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


def _stretches(length: Ints, *starts: Ints) -> Ints:
    """[sides + 1, S]: pieces that touch or overlap on every side as one: where each begins on a side, and its bytes.

    A token may cross the edge of a piece within.
    """
    if not len(length):
        return np.zeros((len(starts) + 1, 0), np.int64)
    order = np.argsort(starts[0], kind="stable")
    begins, length = np.stack(starts)[:, order], length[order]
    reached, shift = np.maximum.accumulate(begins[0] + length), begins - begins[0]
    is_first = (begins[0, 1:] > reached[:-1]) | (shift[:, 1:] != shift[:, :-1]).any(axis=0)
    (first,) = np.concatenate([[True], is_first]).nonzero()
    last = np.append(first[1:], len(length)) - 1
    return np.concatenate([begins[:, first], (reached[last] - begins[0, first])[None]])


def find_chunks(
    table: Table, wanted: NDArray[np.bool_], student: Tokens, teacher: Tokens, aligner: Aligner
) -> ExampleChunks:
    """The chunks of the pieces and ends of turns that both sides have; those of `wanted` tokens are trained on."""
    both = (student.piece_start >= 0) & (teacher.piece_start >= 0)
    found = _stretches(table.length[both], student.piece_start[both], teacher.piece_start[both])
    begins, length = _between_specials((student, teacher), found[:-1], found[-1])
    ours, theirs = student.within(begins[0], length), teacher.within(begins[1], length)
    _share_edges(student, teacher, ours, theirs, begins[1] - begins[0])
    ends = np.stack([student.turn_end, teacher.turn_end], axis=1)
    ends = ends[(ends >= 0).all(axis=1)]
    ranges = [np.concatenate([part, ends[:, [k]] + [0, 1]]) for k, part in enumerate((ours, theirs))]
    if not len(ranges[0]):
        return ExampleChunks(np.zeros((0, 4), np.int64), np.zeros(0, bool), np.zeros(len(student.ptr), np.int64))
    ids = [
        [side.ids[first:last] for first, last in part.tolist()]
        for side, part in zip((student, teacher), ranges, strict=True)
    ]
    # With a mask no token is taken for padding: whatever a text holds is text.
    alignment = aligner.align(*ids, *([np.ones(len(row), np.uint8) for row in rows] for rows in ids))
    at = np.concatenate([part[:, :1] for part in ranges], axis=1)
    spans = alignment.spans.numpy() + np.repeat(at[alignment.sample_index.numpy()], 2, axis=1)

    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    count = np.concatenate([[0], np.cumsum(wanted)])
    trained = count[spans[:, 1]] - count[spans[:, 0]] == spans[:, 1] - spans[:, 0]
    sample = np.searchsorted(student.ptr, spans[:, 0], "right") - 1
    spans = spans - np.repeat(np.stack([student.ptr[sample], teacher.ptr[sample]], axis=1), 2, axis=1)
    trained &= (spans[:, ::2] > 0).all(axis=1)
    keep = _in_order(spans, sample)
    counts = np.bincount(sample[keep], minlength=len(student.ptr) - 1)
    return ExampleChunks(spans[keep], trained[keep], np.concatenate([[0], np.cumsum(counts)]))


def _between_specials(sides: Sequence[Tokens], begins: Ints, length: Ints) -> tuple[Ints, Ints]:
    """The stretches without what is a special token on one of the sides, though it stands in a content.

    Where places are only estimated it stays: the aligner finds what agrees before and behind it.
    """
    holes = np.zeros(len(length), np.int64)
    tokens = [side.within(begin, length) for side, begin in zip(sides, begins, strict=True)]
    for side, part in zip(sides, tokens, strict=True):
        holes += np.diff(np.concatenate([[0], np.cumsum(side.is_special)])[part], axis=1)[:, 0]
    sample = np.searchsorted(sides[0].base, begins[0], "right") - 1
    holes *= np.logical_and(*(side.is_exact[sample] for side in sides))
    found: list[list[int]] = []
    for s in holes.nonzero()[0].tolist():
        at, size, edges = 0, int(length[s]), []
        for side, part, begin in zip(sides, tokens, begins[:, s], strict=True):
            inside = part[s, 0] + side.is_special[part[s, 0] : part[s, 1]].nonzero()[0]
            edges += np.stack([side.start[inside] - begin, side.end[inside] - begin], axis=1).tolist()
        for first, last in [*sorted(edges), (size, size)]:
            if first > at:
                found.append([*(begins[:, s] + at).tolist(), first - at])
            at = max(at, last)
    rest = np.concatenate([begins, length[None]])[:, holes == 0]
    rest = np.concatenate([rest, np.array(found, np.int64).reshape(-1, len(rest)).T], axis=1)
    return rest[:-1], rest[-1]


def _share_edges(student: Tokens, teacher: Tokens, ours: Ints, theirs: Ints, shift: Ints) -> None:
    """Lets the tokens [S, 2] of each stretch begin at the same byte on both sides, and end so where that is possible.

    The teacher's may begin and end with tokens outside of the stretch, if a token of the student reaches as far.
    """
    (some,) = ((ours[:, 0] < ours[:, 1]) & (theirs[:, 0] < theirs[:, 1])).nonzero()
    first = student.start[ours[some, 0]] + shift[some] != teacher.start[theirs[some, 0]]
    last = student.end[ours[some, 1] - 1] + shift[some] > teacher.end[theirs[some, 1] - 1]
    for s in some[first | last].tolist():
        (i, j), (k, m), by = ours[s].tolist(), theirs[s].tolist(), int(shift[s])
        begin, end = student.start[i] + by, student.end[j - 1] + by
        k, at = int(np.searchsorted(teacher.start, begin)), k
        if k == len(teacher.start) or teacher.start[k] != begin:
            k = at
            while i < j and k < m and student.start[i] + by != teacher.start[k]:
                i, k = (i + 1, k) if student.start[i] + by < teacher.start[k] else (i, k + 1)
        at = int(np.searchsorted(teacher.end, end))
        ours[s], theirs[s] = (i, j), (k, at + 1 if m <= at < len(teacher.end) and teacher.end[at] == end else m)


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
