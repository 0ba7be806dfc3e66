"""Losses for logits in a `TeacherOrder`: what has teacher ids is numbered anew, and everything behind works as ever."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xtoken import pieces
from xtoken.alignment import Alignment
from xtoken.losses.cached import Cached, kept
from xtoken.losses.logits import LinearLogits, OrderedLogits
from xtoken.losses.loss import Loss, Matrix, Needs
from xtoken.teacher_order import TeacherOrder


def in_order(
    loss: Loss, given: OrderedLogits, alignment: Alignment | None
) -> tuple[Loss, Tensor | LinearLogits, Alignment | None]:
    """Loss, teacher's logits and alignment with columns for tokens.

    Raises ValueError for a loss that compares token by token, for an order of more or fewer tokens than W or the pieces
    have, and inside of `torch.compile`, where what is made anew could not be kept.
    """
    if torch.compiler.is_compiling():
        raise ValueError("teacher_logits: expected the tokenizer's own order inside of torch.compile")
    if loss.needs is Needs.SAME_TOKENIZER:
        raise ValueError(
            f"teacher_logits: expected the tokenizer's own order for loss={loss.name!r}, which compares every column "
            "with the student's, got OrderedLogits"
        )
    order = given.order
    loss.check_tables()
    changes: dict[str, Any] = {}
    for field in fields(loss):
        value = getattr(loss, field.name)
        if isinstance(value, Matrix):
            changes[field.name] = matrix_in(order, value)
        elif field.name == "pieces":
            changes[field.name] = _pieces_in(order, value)
        elif field.name == "text":
            changes[field.name] = _text_in(order, value, loss.pieces)  # type: ignore[attr-defined]
        elif field.name in loss.teacher_ids and value is not None:
            changes[field.name] = _IDS.of((value, order.tokens), partial(order.renumbered, value))
    if isinstance(alignment, Alignment):
        alignment = alignment._with_teacher_ids(order.renumbered)
    return replace(loss, **changes), given.logits, alignment


_IDS = Cached[Tensor]()
_ROWS = Cached[tuple[Tensor, Tensor]]()
_WEIGHTS = Cached[Tensor]()
_PIECES = Cached[Tensor]()


def matrix_in(order: TeacherOrder, W: Matrix) -> Matrix:
    """W with its columns in the order. It is made once, but for weights that are being trained."""
    _check_size(order, W.shape[1], "projection")
    places = W.row_ptr, W.col, order.tokens

    def rows() -> tuple[Tensor, Tensor]:
        col = order.renumbered(W.col).long()
        row = torch.repeat_interleave(W.row_ptr.diff(), output_size=len(col))
        index = (row * W.shape[1] + col).argsort()
        return col[index].int(), index

    col, index = _ROWS.of(places, rows)
    if W.weight.requires_grad:
        return W._replace(col=col, weight=W.weight[index.to(W.weight.device)])
    weight = _WEIGHTS.of((W.weight, *places), lambda: W.weight[index.to(W.weight.device)])
    return W._replace(col=col, weight=weight)


def _pieces_in(order: TeacherOrder, data: Tensor) -> Tensor:
    _check_size(order, _teachers(data), "piece index")
    return _PIECES.of((data, order.tokens), lambda: pieces.renumbered(data, order))


_TEXTS = Cached[Tensor]()


def _text_in(order: TeacherOrder, text: Tensor, data: Tensor) -> Tensor:
    return _TEXTS.of((text, data, order.tokens), lambda: pieces.renumbered_text(text, data, order))


@kept
def _teachers(data: Tensor) -> int:
    """How many teacher tokens a piece index has. Waits for a device only the first time."""
    return int(data[1])


def _check_size(order: TeacherOrder, size: int, what: str) -> None:
    if len(order) != size:
        raise ValueError(
            f"teacher_logits: expected an order of the {size} teacher tokens that the {what} has, got one of "
            f"{len(order)}"
        )
