"""Chat templates: a conversation as each tokenizer's own template renders it, and where its contents are in that."""

from __future__ import annotations

import itertools
import json
import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

CONTENT_KEYS = frozenset({"content", "text", "reasoning_content", "reasoning", "thinking", "arguments", "name"})
"""Fields of a message, at any depth, whose strings are its contents; a message's own ``name`` is not.

``arguments`` that are a mapping are contents as a whole; see `Arguments`."""

REASONING_KEYS = frozenset({"reasoning_content", "reasoning", "thinking"})
"""Those of them that hold what is written between think tags."""

SYSTEM_ROLES = ("system", "developer")
"""Of a first message that is a system message."""

OPEN, CLOSE = "<think>", "</think>"

BLANK = "\U0010ffff"
"""Stands for a content of nothing, until its place is known; it is in no text."""

_TAG = re.compile(f"({OPEN}|{CLOSE})")

LEFT_OUT = "its chat template leaves the content out"
REWRITTEN = "its chat template writes the content otherwise"
AMBIGUOUS = "its chat template writes the content where it cannot be told from other text"
REPEATED = "its chat template writes the content several times, of which only the last before the next counts"

_MARKS = [*range(0x100000, 0x10FFFE), *range(0xF0000, 0xFFFFE)]
"""Characters for private use, of which texts have few: they mark pieces."""

_MOST_NUMBERS = 100
"""Arguments with more are data, which no template writes otherwise than as JSON."""


class _Marking(NamedTuple):
    """A way of marking a piece with a character."""

    marked: Callable[[str, str], str]
    stands_for: Callable[[str], str]
    """What the mark stands for, once it is written."""
    to_end: Callable[[str], int]
    """From the mark to the end of the piece."""


_MARKINGS = (
    _Marking(lambda piece, mark: piece + mark, lambda piece: "", lambda piece: 0),
    _Marking(lambda piece, mark: piece[:-1] + mark, lambda piece: piece[-1], lambda piece: 1),  # keeps its length
    _Marking(lambda piece, mark: mark + piece, lambda piece: "", len),
    _Marking(lambda piece, mark: mark + piece[1:], lambda piece: piece[0], len),
)

# Formats of time come to templates as data, since they are given no functions.
_CLOCK = (
    "{% macro strftime_now(format) %}{% for part in format.split('%%') %}{% set time = namespace(text=part) %}"
    "{% for name, value in xtoken_time %}{% set time.text = time.text.replace(name, value) %}{% endfor %}"
    "{% if '%' in time.text %}{{ raise_exception('expected a known format of time, got ' ~ format) }}{% endif %}"
    "{{ time.text }}{{ '' if loop.last else '%' }}{% endfor %}{% endmacro %}{{ '' }}"
)


class Text(list[Any]):
    """A string in its parts: what stands between pieces, and the numbers of pieces."""


class Arguments(NamedTuple):
    """The arguments of a tool call, which most templates write as JSON, though not all."""

    whole: int
    """The piece that is the JSON text."""
    closing: int
    """The piece that is a closing brace behind it: most templates write the call as an object around its arguments,
    and tokenizers join the two braces."""
    values: range
    """The pieces that are values in it: strings, and numbers."""
    numbers: set[int]
    layout: Any
    """The arguments with `Text` in place of strings."""


class Conversation(NamedTuple):
    """Messages taken apart."""

    messages: list[dict[str, Any]]
    tools: Any
    options: dict[str, Any]
    """Further variables that the template is given."""
    layout: list[dict[str, Any]]
    """The messages with `Text` in place of strings that have pieces."""
    pieces: list[str]
    """The contents, in order, without white space at their edges (templates strip it); none is empty. Behind a
    reasoning come its tags ``<think>`` and ``</think>``, which the template may write; behind the values of a call's
    arguments these as a whole."""
    owners: list[int]
    """The message of each piece."""
    is_own: list[bool]
    """Whether a piece is a string of the messages."""
    reasoning: set[int]
    """The pieces that are a reasoning, followed by its tags."""
    arguments: list[Arguments]


class Place(NamedTuple):
    """Where a piece stands in a rendered conversation, in characters."""

    start: int
    end: int
    piece: int
    is_verbatim: bool = True


def take_apart(messages: Sequence[Mapping[str, Any]], tools: Any = None, options: Any = None) -> Conversation:
    """Finds the contents of messages; ValueError if one is not a mapping with a ``role``."""
    # Without fields that are None, which templates take for given. A ``content`` stays, as do nulls within calls and
    # tools, which may mean something.
    plain: list[Any] = [
        {key: value for key, value in message.items() if value is not None or key == "content"}
        if isinstance(message, Mapping)
        else message
        for message in messages
    ]
    taken = Conversation(plain, tools, dict(options or {}), [], [], [], [], set(), [])

    def add(piece: str, owner: int, own: bool = False) -> int:
        taken.pieces.append(piece)
        taken.owners.append(owner)
        taken.is_own.append(own)
        return len(taken.pieces) - 1

    def text(value: str, owner: int, is_reasoning: bool = False, tags: bool = True) -> Text:
        found = Text()
        parts = _TAG.split(value) if tags else [value]  # contents at even places, tags between them
        for k, part in enumerate(parts):
            core = part.strip()
            if k % 2 or not core:
                found.append(part)
                continue
            piece, at = add(core, owner, True), part.index(core)
            found += [part[:at], piece, part[at + len(core) :]]
            if is_reasoning or OPEN in parts[max(k - 1, 0) : k] or CLOSE in parts[k + 1 : k + 2]:
                taken.reasoning.add(piece)
                add(OPEN, owner)
                add(CLOSE, owner)
        return found

    def walk(value: Any, owner: int, key: str) -> Any:
        """The value with `Text` for its contents; `key` is the field that makes it one, if any."""
        if isinstance(value, str):
            return text(value, owner, key in REASONING_KEYS) if key else value
        if isinstance(value, Mapping):
            calls = [name for name, one in value.items() if name == "arguments" and isinstance(one, Mapping)]
            order = [name for name in value if name not in calls] + calls  # the name of a call comes before
            found = {
                name: call(value[name], owner)
                if name in calls
                else walk(value[name], owner, name if name in CONTENT_KEYS else "")
                for name in order
            }
            return {name: found[name] for name in value}
        if isinstance(value, (list, tuple)):
            return [walk(one, owner, key) for one in value]
        return value

    def call(given: Mapping[str, Any], owner: int) -> Any:
        first, numbers = len(taken.pieces), set()

        def inner(value: Any) -> Any:
            if isinstance(value, str):
                return text(value, owner, tags=False)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers.add(add(json.dumps(value), owner))
            if isinstance(value, Mapping):
                return {name: inner(one) for name, one in value.items()}
            return [inner(one) for one in value] if isinstance(value, (list, tuple)) else value

        layout = inner(given)
        values = range(first, len(taken.pieces))
        whole = add(_json(given), owner)
        taken.arguments.append(Arguments(whole, add("}", owner), values, numbers, layout))
        return layout

    for owner, message in enumerate(plain):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages: expected a mapping with a role and contents, got {message!r:.80}")
        top = CONTENT_KEYS - {"name"}  # the name of a speaker or a tool is not content
        taken.layout.append({name: walk(one, owner, name if name in top else "") for name, one in message.items()})
    return taken


def unseen(message: Mapping[str, Any]) -> list[str]:
    """The types of what is no text in a content: pictures, films and sounds."""
    content = message.get("content")
    types = [str(one.get("type")) for one in content if isinstance(one, Mapping)] if isinstance(content, list) else []
    return [one for one in types if any(kind in one for kind in ("image", "video", "audio"))]


def _json(value: Any) -> str:
    """As ``tojson`` of templates writes it."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _put_together(layout: Any, pieces: Sequence[str]) -> Any:
    """The value of a layout, with these pieces."""
    if isinstance(layout, Text):
        return "".join(pieces[part] if isinstance(part, int) else part for part in layout)
    if isinstance(layout, Mapping):
        return {name: _put_together(one, pieces) for name, one in layout.items()}
    return [_put_together(one, pieces) for one in layout] if isinstance(layout, list) else layout


def use_template(tokenizer: Any, template: str | None) -> None:
    """Gives a tokenizer without a chat template one: a file, or the text itself.

    Raises FileNotFoundError if it is neither, also where the tokenizer has its own.
    """
    if template is None:
        return
    if "{" not in template:
        if not os.path.isfile(template):
            raise FileNotFoundError(
                f"--chat_template: expected a file, or a template with its braces, got {template!r}"
            )
        template = Path(template).read_text()
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = template


def with_system(conversation: Conversation, system: str) -> Conversation:
    """The conversation with a text before its system message's own, or as its system message where it has none.

    The numbers of pieces and of their messages stay those of the conversation.
    """
    messages, layout = conversation.messages, conversation.layout
    if not messages or messages[0]["role"] not in SYSTEM_ROLES:
        first: dict[str, Any] = {"role": "system", "content": system}
        return conversation._replace(messages=[first, *messages], layout=[first, *layout])
    content: Any = messages[0].get("content")
    parts: Any = layout[0].get("content")
    if not content:
        content = parts = system
    elif isinstance(content, str):
        content, parts = f"{system}\n\n{content}", Text([f"{system}\n\n", *parts])
    else:
        before = {"type": "text", "text": f"{system}\n\n"}
        content, parts = [before, *content], [before, *parts]
    return conversation._replace(
        messages=[{**messages[0], "content": content}, *messages[1:]],
        layout=[{**layout[0], "content": parts}, *layout[1:]],
    )


class ChatTemplate:
    """The chat template of a tokenizer of `transformers`, at a time; ValueError if it has none, with `name`.

    `system` is a text for this model alone, see `with_system`.
    """

    def __init__(self, tokenizer: Any, name: str, now: datetime | None = None, system: str | None = None) -> None:
        if not hasattr(tokenizer, "apply_chat_template") or not getattr(tokenizer, "chat_template", None):
            shown = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise ValueError(
                f"{name}: tokenizer {shown} has no chat template, so it cannot read messages; set its chat_template "
                "(--chat_template), or give prompt and completion"
            )
        self.tokenizer = tokenizer
        self.name = name
        self.system = system
        now = now or datetime.now()
        formats = [f"%{flag}{letter}" for flag in ("", *"-_0^#EO") for letter in string.ascii_letters]
        self._time = [(one, now.strftime(one)) for one in formats]
        self._order = list(range(len(_MARKINGS)))

    def prompt(self, conversation: Conversation) -> str:
        """The conversation as text, up to where the assistant goes on."""
        if self.system is not None:
            conversation = with_system(conversation, self.system)
        return self._apply(conversation.messages, conversation, add_generation_prompt=True)

    def time_in(self, text: str) -> list[str]:
        """The time in each format that a template's text has; in all if it asks for one by a variable, as of a row."""
        is_open = re.search(r"strftime_now\s*\(\s*[^'\"\s]", text)
        return [value for name, value in self._time if is_open or name in text]

    def render(self, conversation: Conversation) -> tuple[str, list[Place], dict[int, str]]:
        """The conversation as text, where its pieces stand in it, and why others do not; ValueError if it is refused.

        The text is that of the conversation itself. It is written once more with a mark in each piece. If that is the
        same text but for the marks, they tell where the pieces are; if not, the template reads what it writes, so
        that fewer pieces are marked at a time, or in another way. A content that cannot be marked at all is looked for.
        """
        if self.system is not None:
            conversation = with_system(conversation, self.system)
        pieces = conversation.pieces
        text = self._apply(conversation.messages, conversation)
        for content in (one.get("content") for one in conversation.messages):
            if content and isinstance(content, (list, tuple, Mapping)) and str(content) in text:
                raise ValueError(f"{self.name}: its chat template takes a text as content, and writes {content!r:.80}")
        if self.system is not None and self.system.strip() not in text:
            shown = f"{self.system!r:.60}"
            raise ValueError(f"{self.name}: its chat template leaves the system message out, so it is not told {shown}")
        found = self._marks(text, conversation)
        places: dict[int, Place] = {}
        why: dict[int, str] = {}
        for piece in sorted(found, reverse=True):
            options = [Place(end - len(pieces[piece]), end, piece) for _, end in found[piece]]
            options = [one for one in options if text.startswith(pieces[piece], max(one.start, 0))]
            if options:
                # A template may also write a content elsewhere, above all in front of its turn.
                why.update({piece: REPEATED} if len(options) > 1 else {})
                behind = next((places[k].start for k in range(piece + 1, len(pieces)) if k in places), len(text))
                places[piece] = next((one for one in options[::-1] if one.end <= behind), options[0])
            elif found[piece]:
                why[piece], at = REWRITTEN, found[piece][0][0]
                places[piece] = Place(at, at, piece, False)
            else:
                why[piece] = LEFT_OUT
        self._search(text, conversation, found, places, why)

        def search(piece: int, pattern: str, inside: Place | None = None) -> None:
            """Looks for a piece of a call between its neighbours, or inside of another."""
            low = max((one.end for one in places.values() if one.piece < piece), default=0)
            high = min((one.start for one in places.values() if one.piece > piece and low <= one.start), default=None)
            low, high = (low, high) if inside is None else (inside.start, inside.end)
            at = [one.start() for one in re.compile(pattern).finditer(text, low, len(text) if high is None else high)]
            if len(at) == 1:
                places[piece] = Place(at[0], at[0] + len(pieces[piece]), piece)
            elif at and inside is None:
                why[piece] = AMBIGUOUS

        for call in conversation.arguments:
            whole = pieces[call.whole]
            anchor = next((places[k] for k in call.values if k in places), None)
            if anchor is None:
                search(call.whole, re.escape(whole))
            else:
                mark = chr(_MARKS[0])
                marked = [*pieces[: anchor.piece], pieces[anchor.piece] + mark, *pieces[anchor.piece + 1 :]]
                start = anchor.end - _json(_put_together(call.layout, marked)).rfind(mark)
                if start >= 0 and text.startswith(whole, start):
                    places[call.whole] = Place(start, start + len(whole), call.whole)
            found_whole = places.get(call.whole)
            if found_whole is not None and text.startswith("}", found_whole.end):
                places[call.closing] = Place(found_whole.end, found_whole.end + 1, call.closing)
            for piece in call.numbers if len(call.numbers) < _MOST_NUMBERS else ():
                search(piece, rf"(?<![\w.-]){re.escape(pieces[piece])}(?![\w.])", found_whole)
        return text, _with_tags(text, sorted(places.values()), conversation.reasoning), why

    def _search(
        self, text: str, conversation: Conversation, found: Any, places: dict[int, Place], why: dict[int, str]
    ) -> None:
        """Looks for the contents that cannot be marked: they must be there as often as the messages have them."""
        missing: dict[str, list[int]] = {}
        for piece, own in enumerate(conversation.is_own):
            if own and piece not in found:
                missing.setdefault(conversation.pieces[piece], []).append(piece)
        if not missing:
            return
        rest = text
        for place in places.values():
            rest = rest[: place.start] + "\0" * (place.end - place.start) + rest[place.end :]
        blank = _put_together(conversation.layout, [""] * len(conversation.pieces))
        others = f"{self.tokenizer.chat_template} {_json([blank, conversation.tools, conversation.options])}"
        for content, wanted in missing.items():
            at = [one.start() for one in re.finditer(f"(?={re.escape(content)})", rest)]
            if len(at) == len(wanted) and content not in others:
                places.update((k, Place(start, start + len(content), k)) for k, start in zip(wanted, at, strict=True))
            else:
                why.update(dict.fromkeys(wanted, AMBIGUOUS if at else LEFT_OUT))

    def _marks(self, text: str, conversation: Conversation) -> dict[int, list[tuple[int, int]]]:
        """Of each piece that can be marked: where its marks are in the text, and where it ends if it is verbatim."""
        found: dict[int, list[tuple[int, int]]] = {}
        waiting = every = [k for k, own in enumerate(conversation.is_own) if own]
        used = set(text).union(*conversation.pieces)
        free = [mark for mark in map(chr, _MARKS[: len(waiting) + len(used)]) if mark not in used]
        for kind in tuple(self._order):
            groups, waiting = [waiting] if waiting else [], []
            while groups:
                group = groups.pop()
                marks = self._marks_of(dict(zip(free, group, strict=False)), _MARKINGS[kind], text, conversation)
                if marks is not None:
                    found.update(marks)
                    if group is every:  # likely to do for the next conversation too
                        self._order.sort(key=kind.__ne__)
                elif len(group) == 1:
                    waiting += group
                else:
                    groups += [group[len(group) // 2 :], group[: len(group) // 2]]
        return found

    def _marks_of(
        self, marks: dict[str, int], marking: _Marking, text: str, conversation: Conversation
    ) -> dict[int, list[tuple[int, int]]] | None:
        """`_marks` of pieces that are marked together; None if the template then writes something else."""
        pieces = list(conversation.pieces)
        for mark, piece in marks.items():
            pieces[piece] = marking.marked(pieces[piece], mark)
        try:
            rendered = self._apply(_put_together(conversation.layout, pieces), conversation)
        except ValueError:
            return None
        found: dict[int, list[tuple[int, int]]] = {piece: [] for piece in marks.values()}
        parts = re.split(f"([{min(marks)}-{max(marks)}])", rendered)
        at = 0
        for k, part in enumerate(parts):
            if part in marks:
                piece = marks[part]
                found[piece].append((at, at + marking.to_end(conversation.pieces[piece])))
                parts[k] = marking.stands_for(conversation.pieces[piece])
            at += len(parts[k])
        return found if "".join(parts) == text else None

    def _apply(self, messages: Any, conversation: Conversation, **more: Any) -> str:
        options = {**conversation.options, **more}
        try:
            if "strftime_now" in str(self.tokenizer.chat_template):
                template = self.tokenizer.get_chat_template(options.pop("chat_template", None), conversation.tools)
                said = f"{template} {conversation.options}"
                time = [one for one in self._time if one[0] in said]
                options.update(chat_template=_CLOCK + template, xtoken_time=time)
            rendered: str = self.tokenizer.apply_chat_template(
                messages, tools=conversation.tools, tokenize=False, **options
            )
        except Exception as error:  # templates raise any exception
            raise ValueError(f"{self.name}: its chat template refuses the messages: {error}") from error
        return rendered


def places_within(conversation: Conversation, turn: int) -> list[Place]:
    """Where the pieces of a turn's ``content``, a string, stand in it."""
    content = conversation.layout[turn]["content"]
    sizes = [len(conversation.pieces[part] if isinstance(part, int) else part) for part in content]
    starts = itertools.accumulate(sizes, initial=0)
    found = [
        Place(start, start + size, part)
        for start, size, part in zip(starts, sizes, content, strict=False)
        if isinstance(part, int)
    ]
    return _with_tags(conversation.messages[turn]["content"], found, conversation.reasoning)


def _with_tags(text: str, places: Sequence[Place], reasoning: set[int]) -> list[Place]:
    """The places, and those of the tags that the template, or the content itself, has around a reasoning."""
    found = list(places)
    for k, place in enumerate(places):
        if place.piece in reasoning:
            before = places[k - 1].end if k else 0
            behind = places[k + 1].start if k + 1 < len(places) else len(text)
            opened, closed = text.rfind(OPEN, before, place.start), text.find(CLOSE, place.end, behind)
            found += [Place(opened, opened + len(OPEN), place.piece + 1)] if opened >= 0 else []
            found += [Place(closed, closed + len(CLOSE), place.piece + 2)] if closed >= 0 else []
    return sorted(found)
