"""Chat templates: a conversation as each tokenizer's own template renders it, and where its contents are in that."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

CONTENT_KEYS = frozenset({"content", "text", "reasoning_content", "reasoning", "thinking", "arguments", "name"})
"""Fields of a message, at any depth, whose strings are its contents; a message's own ``name`` is not.

``arguments`` that are a mapping are contents as a whole; see `Arguments`."""

REASONING_KEYS = frozenset({"reasoning_content", "reasoning", "thinking"})
"""Those of them that hold what is written between think tags."""

OPEN, CLOSE = "<think>", "</think>"

_TAG = re.compile(f"({OPEN}|{CLOSE})")
_MARKER = re.compile(r"xtoken0piece(\d+)end", re.IGNORECASE)
_NUMBER = re.compile(r"70709070(\d{6})90709070")  # a marker that is a number, for templates that look at types
_KEPT_SKELETONS = 4096


def _marker(piece: int) -> str:
    return f"xtoken0piece{piece}end"


class Arguments(NamedTuple):
    """The arguments of a tool call, which most templates write as JSON, though not all."""

    whole: int
    """The piece that is the JSON text."""
    closed: int
    """The piece that is the JSON text and a closing brace: most templates write the call as an object around its
    arguments, and tokenizers join the two braces."""
    parts: list[int]
    """The pieces that it consists of, in order: its values, and what is between them."""
    skeleton: str
    """The JSON text with markers in place of values."""
    name: int | None
    """The piece that is the name of the called function."""


class Conversation(NamedTuple):
    """Messages taken apart."""

    messages: list[dict[str, Any]]
    tools: Any
    options: dict[str, Any]
    """Further variables that the template is given."""
    skeleton: list[dict[str, Any]]
    """The messages with a marker in place of each piece."""
    pieces: list[str]
    """The contents, in order, without white space at their edges (templates strip it); none is empty. Behind a
    reasoning come its tags ``<think>`` and ``</think>``: they have no marker, since the template may write them."""
    owners: list[int]
    """The message of each piece."""
    reasoning: set[int]
    """The pieces that are a reasoning, followed by its tags."""
    arguments: list[Arguments]


class Place(NamedTuple):
    """Where a piece stands in a rendered conversation, in characters."""

    piece: int
    start: int
    end: int
    next_start: int
    """Where the next piece starts: what the template writes between two pieces is ``text[end:next_start]``."""
    is_verbatim: bool


def take_apart(messages: Sequence[Mapping[str, Any]], tools: Any = None, options: Any = None) -> Conversation:
    """Finds the contents of messages; ValueError if one is not a mapping with a ``role``."""
    plain = [_given(message) for message in messages]
    pieces: list[str] = []
    owners: list[int] = []
    reasoning: set[int] = set()
    arguments: list[Arguments] = []

    def add(piece: str, owner: int) -> int:
        pieces.append(piece)
        owners.append(owner)
        return len(pieces) - 1

    def mark(text: str, owner: int, is_reasoning: bool) -> str:
        parts = _TAG.split(text)  # contents at even places, tags between them
        for k in range(0, len(parts), 2):
            if core := parts[k].strip():
                piece = add(core, owner)
                parts[k] = parts[k].replace(core, _marker(piece), 1)
                if is_reasoning or OPEN in parts[max(k - 1, 0) : k] or CLOSE in parts[k + 1 : k + 2]:
                    reasoning.add(piece)
                    add(OPEN, owner)
                    add(CLOSE, owner)
        return "".join(parts)

    def walk(value: Any, owner: int, key: str) -> Any:
        """The value with markers in its contents; `key` is the field that makes it one, if any."""
        if isinstance(value, str):
            return mark(value, owner, key in REASONING_KEYS) if key else value
        if isinstance(value, Mapping):
            first = len(pieces)
            found = {
                name: walk(one, owner, name if name in CONTENT_KEYS else "")
                for name, one in value.items()
                if name != "arguments" or not isinstance(one, Mapping)
            }
            if isinstance(value.get("arguments"), Mapping):
                called = value.get("name")
                name = next((k for k in range(first, len(pieces)) if pieces[k] == str(called).strip()), None)
                found["arguments"] = call(value["arguments"], owner, name)
            return {name: found[name] for name in value}
        if isinstance(value, (list, tuple)):
            return [walk(one, owner, key) for one in value]
        return value

    def call(given: Mapping[str, Any], owner: int, name: int | None) -> Any:
        """The arguments with markers in place of their values."""
        values: dict[int, str] = {}

        def marked(value: Any) -> Any:
            if isinstance(value, str) and value.strip():
                piece = add(value.strip(), owner)
                values[piece] = json.dumps(pieces[piece], ensure_ascii=False)[1:-1]
                return value.replace(pieces[piece], _marker(piece), 1)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                piece = add(json.dumps(value), owner)
                values[piece] = pieces[piece]
                return int(f"70709070{piece:06d}90709070")
            if isinstance(value, Mapping):
                return {name: marked(one) for name, one in value.items()}
            return [marked(one) for one in value] if isinstance(value, (list, tuple)) else value

        skeleton = marked(given)
        text = _NUMBER.sub(lambda found: _marker(int(found[1])), json.dumps(skeleton, ensure_ascii=False))
        parts: list[int] = []
        between = ""
        for k, part in enumerate(_MARKER.split(text)):
            if k % 2 == 0:
                between += part
            elif values[int(part)] != pieces[int(part)]:  # JSON writes it otherwise
                between += values[int(part)]
            else:
                parts += [add(between, owner), int(part)] if between else [int(part)]
                between = ""
        parts += [add(between, owner)] if between else []
        whole = add("".join(pieces[part] for part in parts), owner)
        arguments.append(Arguments(whole, add(pieces[whole] + "}", owner), parts, text, name))
        return skeleton

    skeleton: list[dict[str, Any]] = []
    for owner, message in enumerate(plain):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages: expected a mapping with a role and contents, got {message!r:.80}")
        top = CONTENT_KEYS - {"name"}  # the name of a speaker or a tool is not content
        skeleton.append({name: walk(one, owner, name if name in top else "") for name, one in message.items()})
    return Conversation(plain, tools, dict(options or {}), skeleton, pieces, owners, reasoning, arguments)


def _given(message: Any) -> Any:
    """The message without fields that are None, which templates take for given; a ``content`` stays, as do nulls within
    calls and tools, which may mean something.
    """
    if not isinstance(message, Mapping):
        return message
    return {key: value for key, value in message.items() if value is not None or key == "content"}


class ChatTemplate:
    """The chat template of a tokenizer of `transformers`; ValueError if it has none, with `name`."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not hasattr(tokenizer, "apply_chat_template") or not getattr(tokenizer, "chat_template", None):
            shown = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise ValueError(
                f"{name}: tokenizer {shown} has no chat template, so it cannot read messages; set its chat_template, "
                "or give prompt and completion"
            )
        self.tokenizer = tokenizer
        self.name = name
        self._skeletons: dict[str, str] = {}

    def render(self, conversation: Conversation) -> tuple[str, list[Place]]:
        """The conversation as text, and the places of its pieces in it; ValueError if the template refuses it.

        A piece that the template drops has no place, and one that it writes otherwise is not verbatim. Where the
        template writes something else around the pieces than around their markers, the places end. The arguments of a
        call are placed by their parts if they are written as JSON, else by their values alone.
        """
        text = self._apply(conversation.messages, conversation)
        key = json.dumps([conversation.skeleton, conversation.tools, conversation.options], default=str)
        if key not in self._skeletons:
            if len(self._skeletons) >= _KEPT_SKELETONS:
                self._skeletons.clear()
            applied = self._apply(conversation.skeleton, conversation)
            self._skeletons[key] = _NUMBER.sub(lambda found: _marker(int(found[1])), applied)
        skeleton = self._skeletons[key]
        joined = _places(text, _MARKER.split(_joined(skeleton, conversation.arguments)), conversation.pieces)
        places = _with_parts(joined, conversation)
        if places is None:
            places = _places(text, _MARKER.split(skeleton), conversation.pieces)
        return text, _with_tags(text, places, conversation.reasoning)

    def _apply(self, messages: Any, conversation: Conversation) -> str:
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages, tools=conversation.tools, tokenize=False, **conversation.options
            )
        except Exception as error:  # templates raise any exception
            raise ValueError(f"{self.name}: its chat template refuses the messages: {error}") from error
        return rendered


def _joined(skeleton: str, arguments: Sequence[Arguments]) -> str:
    """The text of a skeleton with one marker for all arguments of a call, where they are written as JSON."""
    for call in arguments:
        marker = _marker(call.whole)
        if _MARKER.search(call.skeleton):
            skeleton = skeleton.replace(call.skeleton, marker)
        elif call.name is not None and _marker(call.name) in skeleton:  # without a value: between its name and the next
            behind = skeleton.index(_marker(call.name)) + len(_marker(call.name))
            following = _MARKER.search(skeleton, behind)
            at = skeleton.find(call.skeleton, behind, following.start() if following else len(skeleton))
            skeleton = skeleton if at < 0 else skeleton[:at] + marker + skeleton[at + len(call.skeleton) :]
    return skeleton


def _with_parts(places: Sequence[Place], conversation: Conversation) -> list[Place] | None:
    """The places with those of parts for the arguments of calls; None if these are not all verbatim."""
    calls = {call.whole: call for call in conversation.arguments}
    found: list[Place] = []
    for place in places:
        if place.piece not in calls:
            found.append(place)
            continue
        if not place.is_verbatim:
            return None
        at = place.start
        for part in calls[place.piece].parts:
            end = at + len(conversation.pieces[part])
            found.append(Place(part, at, end, end if end < place.end else place.next_start, True))
            at = end
    return found


def _places(text: str, parts: Sequence[str], pieces: Sequence[str]) -> list[Place]:
    """Places of pieces; `parts` are the texts around the markers, at even places, and the pieces' numbers between."""
    places: dict[int, Place] = {}
    if not text.startswith(parts[0]):
        return []
    at = len(parts[0])
    for k in range(1, len(parts), 2):
        number, behind, is_last = int(parts[k]), parts[k + 1], k + 2 == len(parts)
        end = at + len(pieces[number])
        next_start = end + len(behind)
        is_verbatim = text.startswith(pieces[number] + behind, at) and (not is_last or next_start == len(text))
        if not is_verbatim:
            end = len(text) - len(behind) if is_last else text.find(behind, at)
            next_start = end + len(behind)
            if end < at or not behind or not text.startswith(behind, end):
                break
        places.setdefault(number, Place(number, at, end, next_start, is_verbatim))  # the first, if it repeats itself
        at = next_start
    return list(places.values())


def _with_tags(text: str, places: Sequence[Place], reasoning: set[int]) -> list[Place]:
    """The places, and those of the tags that the template, or the content itself, has around a reasoning."""
    found: list[Place] = []
    for place in places:
        if place.piece not in reasoning:
            found.append(place)
            continue
        opened = text.rfind(OPEN, found[-1].end if found else 0, place.start)
        if opened >= 0:
            if found:
                found[-1] = found[-1]._replace(next_start=opened)
            found.append(Place(place.piece + 1, opened, opened + len(OPEN), place.start, True))
        closed = text.find(CLOSE, place.end, place.next_start)
        found.append(place if closed < 0 else place._replace(next_start=closed))
        if closed >= 0:
            found.append(Place(place.piece + 2, closed, closed + len(CLOSE), place.next_start, True))
    return found
