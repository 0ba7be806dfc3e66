"""What goes to a terminal: text that cannot steer it, JSON, and what is being done."""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

LINES = "\n\t"
"""What `printable` keeps of a text of several lines."""


def printable(text: object, kept: str = "") -> str:
    """A text on one line for a terminal: what could steer it, such as escape sequences and marks that turn the
    direction of writing, escaped as JSON and Python do; but for the characters that are `kept`."""
    return "".join(c if c.isprintable() or c in kept else json.dumps(c)[1:-1] for c in str(text))


def one_line(text: object) -> str:
    """The same of a text of several lines, which are joined: none looks like another text."""
    return printable(" ".join(line.strip() for line in str(text).split("\n")))


class PrintableLog(logging.Formatter):
    """Lines of a log, in which there may be paths, and texts of others."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), LINES)


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As `sys.excepthook`."""
    print(printable("".join(traceback.format_exception(kind, error, trace)), LINES), end="", file=sys.stderr)


def flush_output() -> None:
    """Writes what waits for standard output. OSError if it cannot be written, which then is dropped: at its end Python
    would try again, and make a remark of the error."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"standard output: {error}") from error


def to_json(facts: Any) -> str:
    """JSON in ASCII; numbers that JSON lacks are words in it."""
    return json.dumps(_finite(facts), indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def did_you_mean(word: object, known: Sequence[str]) -> str:
    """``"; did you mean x?"`` for a word that is almost one of those that are known, else nothing."""
    near = difflib.get_close_matches(str(word), known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def is_terminal(stream: TextIO | None) -> bool:
    """Whether what is written to a stream is seen at once; not if it is closed (None)."""
    return stream is not None and stream.isatty()


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Shows on standard error, if that is a terminal, what is being done and for how long.

    Gives a function that is called with what is done next.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        disable=not is_terminal(sys.stderr),
    ) as bar:
        task = bar.add_task(printable(what), total=None)
        yield lambda what: bar.update(task, description=printable(what))
