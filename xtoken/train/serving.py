"""Teachers behind servers in training: batches are known a step ahead, failed requests are told at the end."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import TrainerCallback

from xtoken.served import ServedModel


class Ahead:
    """Takes batches from an iterator; another one, such as the next epoch's, begins anew."""

    def __init__(self) -> None:
        self._iterator: Iterator[Any] = iter(())
        self._waiting: deque[Any] = deque()

    def take(self, iterator: Iterator[Any], count: int) -> list[Any]:
        """The next `count` batches; fewer at the end."""
        if iterator is not self._iterator:
            self._iterator, self._waiting = iterator, deque()
        self.peek(count)
        return [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]

    def peek(self, count: int) -> Sequence[Any]:
        """What `take` will give next."""
        self._waiting.extend(itertools.islice(self._iterator, max(0, count - len(self._waiting))))
        return list(itertools.islice(self._waiting, count))


class TellFaults(TrainerCallback):
    """Says at the end of training which requests to servers were sent again."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.models = models

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Logs it."""
        for model in self.models:
            model.tell_faults()
