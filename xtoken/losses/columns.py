"""Which teacher columns a loss looks at: the largest, given ones, those that W reaches; W's entries in them, and which
chunks begin alike as far as these tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xtoken.alignment.alignment import int_tensor
from xtoken.alignment.chunks import Chunks, synchronized, to_device
from xtoken.losses.backends import select
from xtoken.losses.cached import Cached, kept, made_to_last
from xtoken.losses.logits import BLOCK_ELEMENTS, DenseSource, Source
from xtoken.projection.entries import Entries, restrict

if TYPE_CHECKING:
    from xtoken.losses.loss import Matrix
    from xtoken.losses.operator import Call

DEFAULT_TOP_K = 8192
"""Of column sets, where nothing else is said."""


def select_columns(
    teacher: Source,
    width: int,
    *,
    top_k: int | None = DEFAULT_TOP_K,
    columns: Tensor | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """The column set C: int64 [C], ascending, on ``device``; `columns`, or the `top_k` largest of the teacher."""
    if columns is not None:
        return _checked(columns, width, torch.device(device))
    chosen = made_to_last(lambda: teacher_columns(teacher, top_k, device, backend))
    _RIGHT[chosen] = chosen._version, width  # need not be checked again, which would wait for a device
    return chosen


def teacher_columns(teacher: Source, top_k: int | None, device: torch.device | str, backend: str = "auto") -> Tensor:
    """`xtoken.reference.column_set` for logits of any kind, by a backend."""
    in_parts: Any = getattr(teacher, "largest_columns", None)  # of logits that several ranks hold
    if in_parts is not None:
        return in_parts(top_k)  # type: ignore[no-any-return]
    column_set = select(backend, torch.device(device)).column_set
    if isinstance(teacher, DenseSource):
        return column_set(teacher.logits, top_k)
    total = teacher.samples * teacher.length
    if top_k is None or top_k >= teacher.size or total == 0:
        return torch.arange(teacher.size if top_k is None else min(top_k, teacher.size), device=device)
    step = max(1, BLOCK_ELEMENTS // teacher.size)
    maxima = [teacher.rows(first, min(total, first + step)).amax(0) for first in range(0, total, step)]
    return column_set(torch.stack(maxima)[None], top_k)


_RIGHT: Any = WeakIdKeyDictionary()
"""Column sets that were chosen here, and what is known of them: (version, width)."""

_ORDERED = Cached[Tensor]()


def _checked(given: Any, width: int, device: torch.device) -> Tensor:
    """Given columns, ascending, on the device. On a device they are looked at once, and not again at every step."""
    if not isinstance(given, Tensor):
        return to_device(_ordered(int_tensor(given, "columns", torch.int64), width), device)
    if not given.is_inference() and _RIGHT.get(given) == (given._version, width):
        return given.to(device)
    ordered = _ORDERED.of((given,), lambda: _ordered(given, width), width)
    return _ORDERED.of((given,), lambda: ordered.to(device), width, device)


def _ordered(ids: Tensor, width: int) -> Tensor:
    if ids.dim() != 1 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"columns: expected teacher ids [C], got {ids.dtype} of shape {list(ids.shape)}")
    ordered: Tensor = ids.long().sort().values
    low, high = int(ordered[0]), int(ordered[-1])
    if low < 0 or high >= width:
        raise ValueError(f"columns: expected ids in 0 ... {width - 1}, got {low if low < 0 else high}")
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise ValueError("columns: expected distinct ids, got one twice")
    return ordered


@kept
def _reached(col: Tensor, teachers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The teacher ids that W reaches, on one device: int64, ascending, and bool [V_teacher]."""
    mask = torch.zeros(teachers, dtype=torch.bool, device=device)
    mask[col.to(device).long()] = True
    return synchronized(mask.nonzero()[:, 0]), mask


def reachable(columns: Tensor, projection: Any) -> tuple[Tensor, Tensor | None]:
    """Those of the columns that W reaches, and None.

    On a device, where reading their number would wait: all columns, those that W reaches first, and the number
    (int32 []).
    """
    reached, mask = _reached(projection.col, projection.shape[1], columns.device)
    if len(columns) == projection.shape[1]:
        ids, count = reached, None
    else:
        outside = ~mask[columns]
        if columns.device.type == "cpu":
            ids, count = columns[~outside], None
        else:
            ids = columns[outside.to(torch.uint8).argsort(stable=True)]
            count = (len(columns) - outside.sum()).to(torch.int32)
    if ids.numel() == 0 or reached.numel() == 0:
        raise ValueError("support: expected a column that the projection reaches, got none; use support='all'")
    return ids, count


@kept
def _on_device(col: Tensor, row_ptr: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of W."""
    counts, place = row_ptr.to(device).diff(), col.to(device).long()
    row = torch.repeat_interleave(torch.arange(len(counts), device=device), counts, output_size=len(col))
    return row, place if col.device == device else synchronized(place)


@kept
def _weights_on(weight: Tensor, device: torch.device) -> Tensor:
    return synchronized(weight.detach().to(device))


def entries_in(projection: Any, columns: Tensor) -> Entries:
    """As `xtoken.reference.restrict`; on a device, which is not asked how many they are, all: weight 0 outside."""
    device, weight = columns.device, projection.weight
    if device.type == "cpu":
        return restrict(projection, columns)
    row, col = _on_device(projection.col, projection.row_ptr, device)
    weight = weight.detach() if weight.device == device else _weights_on(weight, device)
    position = torch.full((projection.shape[1],), -1, dtype=torch.int64, device=device)
    position[columns] = torch.arange(len(columns), device=device)
    position = position[col]
    return Entries(row, position.clamp_min(0), torch.where(position >= 0, weight, 0.0))


@kept
def _entries(col: Tensor, row_ptr: Tensor, teachers: int, device: torch.device) -> Tensor:
    """int64: the entries of W by their numbers ``student * teachers + teacher``, ascending, and one beyond all."""
    students = len(row_ptr) - 1
    row = torch.repeat_interleave(torch.arange(students, device="cpu"), row_ptr.detach().cpu().diff())
    numbers = (row * teachers + col.detach().cpu()).sort().values
    none = torch.tensor([students * teachers], device="cpu")  # never without one
    return synchronized(torch.cat([numbers, none]).to(device))


def agrees(chunks: Chunks, projection: Matrix) -> Tensor:
    """bool [K]: whether W has an entry for the first realised tokens of both sides, in chunks that count.

    Waits for the device only for the first use of a W there.
    """
    teachers = projection.shape[1]
    numbers = _entries(projection.col, projection.row_ptr, teachers, chunks.used.device)
    first = [side.realised[side.start.clamp_min(0)] for side in (chunks.student, chunks.teacher)]
    wanted = first[0] * teachers + first[1]
    found = numbers[torch.searchsorted(numbers, wanted)] == wanted
    return found if chunks.mask is None else found & chunks.mask


def agreeing(call: Call, projection: Matrix) -> Chunks:
    """The chunks of a call with an alignment, of which only those count that `agrees` names.

    Raises ValueError if a first realised token is outside its vocabulary.
    """
    assert call.spans is not None
    chunks = call.chunks(realised=True)
    chunks.check_ids(projection.shape, several=False)
    found = agrees(chunks, projection)
    return chunks.masked(found.new_zeros(len(call.spans)).index_copy(0, chunks.used, found))
