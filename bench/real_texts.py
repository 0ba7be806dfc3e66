"""Real text that every machine with the test environment has, for `real.py`: passages with numbers, and Python.

Passages with numbers come from the docstrings of installed packages, Python from the standard library. Every eighth
file is held out; a passage of these counts only if no long line of it is also in a file for training.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

PACKAGES = ("mpmath", "networkx", "numpy", "pandas", "sympy")
LENGTH = 240
"""Characters of a passage, about."""
NUMBERS = 3
"""Numbers of several digits that a passage with numbers has at least."""
LONG_LINE = 30


class Texts(NamedTuple):
    training: list[str]
    held_out: list[str]


def numbers() -> Texts:
    """Passages of docstrings with numbers of several digits, and more letters than digits."""
    folder = Path(sysconfig.get_paths()["purelib"])
    files = [path for name in PACKAGES for path in sorted((folder / name).rglob("*.py")) if "tests" not in path.parts]
    found = [[one for text in docstrings(path) for one in passages(text) if has_numbers(one)] for path in files]
    return _split([one for one in found if one])


def python() -> Texts:
    """Passages of the modules of the standard library, as far to the left as they go."""
    return _split([[dedent(one).strip("\n") for one in passages(path.read_text())] for path in modules()])


def modules() -> list[Path]:
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))


def docstrings(path: Path) -> Iterator[str]:
    """Of a module, its classes and functions; none of a file that is not for this Python."""
    try:
        tree = ast.parse(path.read_text(errors="replace"))
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield text


def passages(text: str) -> Iterator[str]:
    """Whole lines, together at most `LENGTH` characters and at least half of that."""
    passage = ""
    for line in [*text.splitlines(keepends=True), "\n" * LENGTH]:
        if len(passage) + len(line) > LENGTH:
            if 2 * len(passage) >= LENGTH and passage.strip():
                yield passage
            passage = ""
        passage += line if len(line) <= LENGTH else ""


def has_numbers(passage: str) -> bool:
    digits, letters = (sum(map(test, passage)) for test in (str.isdigit, str.isalpha))
    return len(re.findall("[0-9]{2,}", passage)) >= NUMBERS and 2 * digits < letters


def _split(files: Iterable[list[str]]) -> Texts:
    """In an order that no file decides."""
    training: list[str] = []
    others: list[str] = []
    for k, found in enumerate(files):
        (training if k % 8 else others).extend(found)
    seen = {line for passage in training for line in _long_lines(passage)}
    held_out = [passage for passage in others if not seen & _long_lines(passage)]
    for one in (training, held_out):
        random.Random(0).shuffle(one)
    return Texts(training, held_out)


def _long_lines(passage: str) -> set[str]:
    return {line for line in map(str.strip, passage.splitlines()) if len(line) > LONG_LINE}


class Sum(NamedTuple):
    """Ends with its answer, after two worked examples."""

    text: str
    answer: int


def sums(count: int) -> list[Sum]:
    """Of two numbers of two digits, with a sum of two digits, in words; always the same."""
    draw = random.Random(0)

    def one() -> tuple[str, int]:
        a = draw.randrange(11, 80)
        b = draw.randrange(11, 100 - a)
        person, thing = draw.choice(["Ann", "Ben", "Eva", "Tom"]), draw.choice(["apples", "books", "coins", "keys"])
        return f"{person} had {a} {thing} and got {b} more. Now {person} has {a + b}", a + b

    made = []
    for _ in range(count):
        examples, (asked, answer) = [one()[0] for _ in range(2)], one()
        made.append(Sum("\n".join([*examples, asked]), answer))
    return made


def functions(count: int) -> list[str]:
    """Heads of functions of held-out modules, up to the end of the docstring; evenly chosen, always the same."""
    heads = []
    for path in modules()[::8]:
        lines = path.read_text().splitlines()
        for node in ast.parse("\n".join(lines)).body:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                head = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno])
                if len(head) <= 2 * LENGTH and head.endswith(('"""', "'''")):
                    heads.append(head)
    return [heads[i * len(heads) // count] for i in range(min(count, len(heads)))]


def parses(head: str, written: str) -> bool:
    """Whether a function has a body that Python can parse: whole lines of what was written, up to where they end."""
    body: list[str] = []
    for line in written.split("\n")[:-1]:
        if line.strip() and not line.startswith((" ", "\t")) and body:
            break
        body.append(line)
    try:
        (function,) = ast.parse(head + "\n".join(body)).body
    except (SyntaxError, ValueError):
        return False
    return isinstance(function, ast.FunctionDef) and len(function.body) > 1
