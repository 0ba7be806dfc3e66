"""Which teachers a row of data goes to, and running a teacher for the rows of a batch that need it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtoken.alignment import Alignment, predictable, to_device
from xtoken.losses import LinearLogits, TopKLogits
from xtoken.losses.backends import IGNORED
from xtoken.losses.logits import AnyLogits


def route_of(row: Mapping[str, Any], column: str, names: Sequence[str]) -> list[bool] | None:
    """For each teacher whether a row of data goes to it; None if the row does not say.

    The column has a name, or several; none at all for a row that is trained on without a teacher. Raises ValueError
    for anything else, and for a name that is no teacher's.
    """
    value = row.get(column)
    if value is None:
        return None
    wanted = [value] if isinstance(value, str) else value
    if not isinstance(wanted, (list, tuple)) or not all(isinstance(one, str) for one in wanted):
        raise ValueError(f"{column}: expected the name of a teacher, or a list of names, got {value!r:.80}")
    for one in wanted:
        if one not in names:
            raise ValueError(f"{column}: expected names of teachers ({', '.join(names)}), got {one!r}")
    return [name in wanted for name in names]


def is_routed(example: Mapping[str, Any], m: int) -> bool:
    """Whether an encoded example goes to teacher m."""
    route = example.get("route")
    return route is None or bool(route[m])


def label_spans(labels: Any) -> Any:
    """int64 [K, 4]: a chunk for each label but one of the first token, for a teacher that reads the student's ids."""
    (at,) = (np.asarray(labels)[1:] != IGNORED).nonzero()
    return np.stack([at + 1, at + 2] * 2, axis=1)


Side = Mapping[str, Any]


def logits_where_needed(
    run: Callable[[Side, Side], AnyLogits], entry: Side, inputs: Side, alignment: Alignment | None, labels: Tensor
) -> AnyLogits | None:
    """``run(entry, inputs)``, a teacher's logits, of only the rows of a batch with a labelled chunk; None if none has.

    The other rows get what one of these has: no loss looks there, and choices by the largest logits of a batch stay as
    they are. `alignment` and `labels` are on the host; without an alignment all rows are needed.
    """
    rows = needed_rows(alignment, labels)
    if rows is None:
        return run(entry, inputs)
    if not len(rows):
        return None
    if entry.get("logits") is not None or entry.get("asked") is not None or len(rows) == len(labels):
        return run(entry, inputs)
    place = torch.zeros(len(labels), dtype=torch.int64, device="cpu")
    place[rows] = torch.arange(len(rows), device="cpu")
    return _rows_of(run(_part(entry, rows), _part(inputs, rows)), place)


def read_by(entry: Side, inputs: Side) -> Side:
    """What a teacher reads of a batch: its own part, or the student's."""
    return inputs if entry.get("input_ids") is None else entry


def needed_rows(alignment: Alignment | None, labels: Tensor) -> Tensor | None:
    """int64 [R]: the rows of a batch, on the host, with a labelled chunk; None, all of them, without an alignment."""
    if alignment is None:
        return None
    host = alignment.supervised(labels)
    rows: Tensor = host.sample_index[predictable(host)].unique()
    return rows


def _part(side: Side, rows: Tensor) -> dict[str, Any]:
    """What a teacher reads of some rows of a batch."""
    read = {name: side[name] for name in ("input_ids", "attention_mask", "position_ids") if side.get(name) is not None}
    return {name: one[to_device(rows, one.device)] for name, one in read.items()}


@torch.inference_mode()
def _rows_of(logits: AnyLogits, rows: Tensor) -> AnyLogits:
    if isinstance(logits, TopKLogits):
        rows = to_device(rows, logits.ids.device)
        return TopKLogits(logits.ids[rows], logits.logprobs[rows], logits.tail)
    if isinstance(logits, LinearLogits):
        return replace(logits, hidden=logits.hidden[to_device(rows, logits.hidden.device)])
    assert isinstance(logits, Tensor)  # teachers here have no others
    return logits[to_device(rows, logits.device)]
