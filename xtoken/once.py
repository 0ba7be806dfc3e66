"""What is said once: for an object, or for the process."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class Once:
    """Says something, such as by ``logger.warning``, the first time that it is called with a key."""

    def __init__(self, say: Callable[..., Any]) -> None:
        self.say = say
        self.said: set[Hashable] = set()

    def __call__(self, key: Hashable, *what: Any) -> None:
        if key not in self.said:
            self.say(*what)
            self.said.add(key)
