"""Teachers behind servers in training: batches are known a step ahead."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from typing import Any

import torch
from torch import Tensor

from xtoken.losses import TopKLogits
from xtoken.served import ServedModel
from xtoken.vocabulary.roles import filler


class Asked:
    """Log-probabilities of a batch that are on their way.

    `side` is on the host: ``input_ids`` [B, T], with ``attention_mask``, or ``position_ids``. Neither padding is sent,
    nor examples of a packed row together; of the others than `rows`, if given, nothing is.
    """

    def __init__(self, served: ServedModel, side: Mapping[str, Any], rows: Tensor | None = None) -> None:
        ids: Tensor = side["input_ids"]
        wanted = set(range(len(ids)) if rows is None else rows.tolist())
        self._places = [place for place in _examples(side, served.vocabulary.roles) if place[0] in wanted]
        self._futures = served.ask(ids[row, first:last].tolist() for row, first, last in self._places)
        self._shape = (*ids.shape, served.logprobs + 1)

    def logits(self) -> TopKLogits:
        """[B, T, k] on the host, ids of -1 at padding; waits until all are there, and raises what one of them does."""
        ids = torch.full(self._shape, -1, device="cpu")
        logprobs = torch.full(self._shape, -torch.inf, dtype=torch.float32, device="cpu")
        for future in wait(self._futures, return_when=FIRST_EXCEPTION).done:
            future.result()  # an error stops the run at once, whatever is still waited for
        for (row, first, last), future in zip(self._places, self._futures, strict=True):
            found = future.result()
            ids[row, first:last], logprobs[row, first:last] = found.ids, found.logprobs
        return TopKLogits(ids, logprobs)


def _examples(side: Mapping[str, Any], roles: Mapping[str, int]) -> Iterator[tuple[int, int, int]]:
    """Row, first token and the one after the last of each example of a batch, without padding."""
    ids, mask, positions = side["input_ids"], side.get("attention_mask"), side.get("position_ids")
    pad = filler(roles)
    for row in range(len(ids)):
        kept = torch.arange(ids.shape[1], device="cpu") if mask is None else mask[row].nonzero()[:, 0]
        if not len(kept):
            continue
        begin, end = int(kept[0]), int(kept[-1]) + 1
        if end - begin != len(kept):
            raise ValueError(f"attention_mask: expected tokens without a gap for a server, got one in row {row}")
        if positions is None:
            yield row, begin, end
            continue
        starts = [k for k in (positions[row] == 0).nonzero()[:, 0].tolist() if begin < k < end]
        for first, last in itertools.pairwise([begin, *starts, end]):
            if not bool((ids[row, first:last] == pad).all()):  # the padding of a packed row
                yield row, first, last


class Ahead:
    """Takes batches from an iterator; another one, such as the next epoch's, begins anew.

    Only of a stream nobody knows how many batches there are. Those that do not suffice for its last step are the first
    of its next round: the Trainer would make no step of them, and add their gradient to that of the next one.
    """

    def __init__(self) -> None:
        self._iterator: Iterator[Any] = iter(())
        self._waiting: deque[Any] = deque()
        self._is_short = False

    def take(self, iterator: Iterator[Any], count: int) -> list[Any]:
        """The next `count` batches; none where there are fewer."""
        if iterator is not self._iterator:
            self._iterator, self._waiting = iterator, self._waiting if self._is_short else deque()
        self.peek(count)
        self._is_short = len(self._waiting) < count
        return [] if self._is_short else [self._waiting.popleft() for _ in range(count)]

    def peek(self, count: int) -> Sequence[Any]:
        """What `take` will give next."""
        self._waiting.extend(itertools.islice(self._iterator, max(0, count - len(self._waiting))))
        return list(itertools.islice(self._waiting, count))
