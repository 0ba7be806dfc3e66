"""A row of data taken apart, before any tokenizer reads it: the texts that are aligned, and what is trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .chat import BLANK, Conversation, take_apart

TRAIN_ON = ("all", "completion", "assistant")

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
ROLES |= {role: role for role in ("system", "developer", "user", "assistant", "tool")}
"""Roles of the speakers of ShareGPT, by their names in lower case."""

Ints = NDArray[np.int64]


class Example(NamedTuple):
    """An example, before any tokenizer reads it."""

    pieces: list[str]
    """The texts that are aligned: contents of messages; prompt and completion; or the whole text."""
    sizes: list[int]
    """Their bytes."""
    owners: list[int]
    """The turn of each piece."""
    trained: list[bool]
    """Whether a turn is trained on."""
    conversation: Conversation | None
    """If it is a chat; else the pieces follow each other as they are, and only the last one has an end."""


def parse_example(row: Mapping[str, Any], train_on: str, text_column: str) -> Example:
    """Takes a row of `normal_form` apart; ValueError if it is none that `ExampleEncoder` takes, or has text with lone
    surrogates."""
    if row.get("messages") is not None:
        messages = _messages(row, "messages")
        last = max((k for k, one in enumerate(messages) if _role(one) not in ("assistant", "tool")), default=-1)
        return _chat(row, messages, last + 1, train_on)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        head = prompt.rstrip()  # a token may join a space to the following word
        return _plain((head, train_on == "all"), (prompt[len(head) :] + completion, True))
    if prompt is not None and completion is not None and not isinstance(prompt, str):
        before = _messages(row, "prompt")
        return _chat(row, [*before, *_messages(row, "completion")], len(before), train_on)
    text = row.get(text_column)
    if isinstance(text, str):
        return _plain((text, True))
    found = ", ".join(f"{key}: {type(value).__name__}" for key, value in row.items()) or "nothing"
    forms = f"messages, conversations, prompt and completion, or text in {text_column!r} (text_column)"
    raise ValueError(f"expected {forms}, got {found}")


def normal_form(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row, with ``messages`` for ``conversations`` of ShareGPT, and ``tools`` that are written as JSON as a list.

    Raises ValueError if they, ``chat_template_kwargs`` or the row are something else.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a mapping from columns to values, got {type(row).__name__}")
    options = row.get("chat_template_kwargs")
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"chat_template_kwargs: expected a mapping from names, got {options!r:.80}")
    tools = row.get("tools")
    if isinstance(tools, str):  # as tables keep what differs from row to row
        try:
            row = {**row, "tools": json.loads(tools) if tools else None}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tools: expected a list, or one as JSON, got {tools!r:.80}") from error
    if row.get("messages") is None and row.get("conversations") is not None:
        others = {key: value for key, value in row.items() if key not in ("conversations", "system")}
        row = {**others, "messages": _from_sharegpt(_messages(row, "conversations"), row.get("system"))}
    return row


def _from_sharegpt(turns: Sequence[Any], system: Any) -> list[dict[str, Any]]:
    """Messages of turns with ``from`` and ``value``, behind a system prompt if there is one; messages are taken too."""
    messages = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    for turn in turns:
        if not isinstance(turn, Mapping) or not ("role" in turn or {"from", "value"} <= turn.keys()):
            raise ValueError(f"conversations: expected turns with from and value, got {turn!r:.80}")
        speaker: Any = turn.get("from")
        if speaker == "function_call":
            raise ValueError(
                "conversations: expected tool calls as messages have them (messages, with tool_calls), got a turn from "
                "'function_call'"
            )
        role = ROLES.get(str(speaker).lower())
        if "role" not in turn and role is None:
            raise ValueError(
                f"conversations: expected turns from one of {', '.join(ROLES)}, got one from {speaker!r:.80}"
            )
        flags = {key: turn[key] for key in ("weight", "train") if key in turn}
        own = {"role": role, "content": turn["value"], **flags} if "role" not in turn else dict(turn)
        messages.append(own)
    return messages


def prompt_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a completion of the row goes on from, as a row: ``messages`` (with ``tools`` and ``chat_template_kwargs``),
    or ``prompt``, a text. None if there is none.

    Of messages the last is the completion if it is the assistant's; else the completion would be the next.
    """
    messages, prompt = row.get("messages"), row.get("prompt")
    if messages is None and isinstance(prompt, str):
        return {"prompt": prompt.rstrip()} if prompt.strip() else None
    if messages is None and isinstance(prompt, Iterable):
        messages = _messages(row, "prompt") + (_messages(row, "completion") if row.get("completion") else [])
    elif messages is not None:
        messages = _messages(row, "messages")
    if messages and _role(messages[-1]) == "assistant":
        messages = messages[:-1]
    more = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key) is not None}
    return {"messages": messages, **more} if messages else None


def _messages(row: Mapping[str, Any], name: str) -> list[Any]:
    given = row[name]
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ValueError(f"{name}: expected a list of messages, got {type(given).__name__}: {given!r:.80}")
    return list(given)


def parse_prompt(prompt: Mapping[str, Any]) -> Example:
    """Takes what `prompt_of` gives apart; nothing of it is trained on."""
    if "messages" not in prompt:
        return _plain((prompt["prompt"], False))
    return _chat(prompt, prompt["messages"], len(prompt["messages"]), "completion")


def parse_completed(prompt: Mapping[str, Any], completion: str) -> Example:
    """A prompt of `prompt_of` with a completion, which is trained on, and has a piece even if it is empty."""
    if "messages" not in prompt:
        return _plain((prompt["prompt"], False), (completion, True))
    messages = [*prompt["messages"], {"role": "assistant", "content": completion if completion.strip() else BLANK}]
    return _chat(prompt, messages, len(messages) - 1, "completion")


def _plain(*turns: tuple[str, bool]) -> Example:
    """Texts, and whether they are trained on; empty ones are left out."""
    pieces = [text for text, _ in turns if text]
    trained = [trained for text, trained in turns if text]
    return Example(pieces, [len(piece.encode()) for piece in pieces], list(range(len(pieces))), trained, None)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _is_left_out(message: Mapping[str, Any]) -> bool:
    """Whether a message says that it is not trained on: by ``weight``, as in OpenAI's files, or ``train``."""
    for name in ("weight", "train"):
        if message.get(name) not in (None, 0, 1):
            raise ValueError(f"messages: expected 0 or 1, or false or true, as {name}, got {message[name]!r:.80}")
    return message.get("weight") == 0 or message.get("train") == 0


def _chat(row: Mapping[str, Any], messages: list[Any], completion: int, train_on: str) -> Example:
    conversation = take_apart(messages, row.get("tools"), row.get("chat_template_kwargs"))
    trained = [
        (train_on == "all" or (_role(one) == "assistant" and (train_on == "assistant" or k >= completion)))
        and not _is_left_out(one)
        for k, one in enumerate(messages)
    ]
    sizes = [len(piece.encode()) for piece in conversation.pieces]
    return Example(conversation.pieces, sizes, conversation.owners, trained, conversation)


class Table(NamedTuple):
    """The P pieces and M turns of B examples."""

    length: Ints
    """[P]: bytes of each piece."""
    owner: Ints
    """[P]: the turn of each piece."""
    trained_turn: NDArray[np.bool_]
    is_own: NDArray[np.bool_]
    """[P]: whether a piece is a content that a message has as it is."""
    first_turn: Ints
    """[B + 1]: example b has the turns ``first_turn[b] ... first_turn[b + 1] - 1``."""
    first_piece: Ints
    """[B + 1]: likewise."""
    closing: Ints
    """The pieces that are closing braces of a call."""

    @staticmethod
    def of(examples: Sequence[Example]) -> Table:
        first_turn = np.cumsum([0, *(len(example.trained) for example in examples)])
        first_piece = np.cumsum([0, *(len(example.pieces) for example in examples)])
        chats = [(k, example.conversation) for k, example in enumerate(examples) if example.conversation is not None]
        is_own = np.zeros(first_piece[-1], bool)
        for k, chat in chats:
            is_own[first_piece[k] : first_piece[k + 1]] = chat.is_own
        return Table(
            np.array([size for example in examples for size in example.sizes], np.int64),
            np.array(
                [at + owner for at, one in zip(first_turn, examples, strict=False) for owner in one.owners], np.int64
            ),
            np.array([trained for example in examples for trained in example.trained], bool),
            is_own,
            first_turn,
            first_piece,
            np.array([first_piece[k] + call.closing for k, chat in chats for call in chat.arguments], np.int64),
        )
