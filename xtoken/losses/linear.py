"""Losses from hidden states and the output layer: the student's logits are never materialised."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from xtoken.losses.logits import AnyLogits, LinearLogits

_DOC = """\
``{name}(student_hidden @ lm_head_weight.T + bias, ...)`` a block of rows at a time.

    With ``logit_scale`` and ``softcap`` the logits are those of `LinearLogits`.

    Logits of one block are computed, turned into their gradient, and taken on to the gradients of hidden states and
    output layer, so that memory beyond those does not grow with the number of tokens. The blocks' parts of the
    output layer's gradient are added up in float32 at least. With ``labels`` (or ``reduction="none"``) backward
    computes the logits again.

    Parameters
    ----------
    student_hidden : floating [B, T_s, D] or [T_s, D]
        What the output layer reads (after the last norm).
    lm_head_weight : floating [>= V_student, D]
        In the same type; may be tied to the embedding.
    bias : floating [>= V_student], optional
        Of the output layer.
    softcap : float, optional
        The logits' bound (Gemma 2).
    logit_scale : float
        Their factor (Cohere, Granite).
"""


class LinearLoss(Protocol):
    """A loss that takes hidden states and an output layer in place of the student's logits."""

    __name__: str

    def __call__(
        self,
        student_hidden: Tensor,
        lm_head_weight: Tensor,
        teacher_logits: AnyLogits,
        *arguments: Any,
        bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        **options: Any,
    ) -> Any: ...


def linear(loss: Callable[..., Any]) -> LinearLoss:
    """``linear_<name>`` of a public loss: its other parameters, results and errors are those of the loss."""
    name = loss.__name__
    signature = inspect.signature(loss)
    others = [one for one in signature.parameters.values() if one.name not in ("student_logits", "inplace")]
    known = inspect.signature(LinearLoss.__call__, eval_str=True).parameters
    first = [known[one] for one in ("student_hidden", "lm_head_weight")]
    own = [known[one] for one in ("bias", "softcap", "logit_scale")]
    taken = {one.name for one in others}

    def from_hidden(
        student_hidden: Tensor,
        lm_head_weight: Tensor,
        teacher_logits: AnyLogits,
        *arguments: Any,
        bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        **options: Any,
    ) -> Any:
        for one in options:
            if one not in taken:
                raise TypeError(f"linear_{name}() got an unexpected keyword argument {one!r}")
        student = LinearLogits(student_hidden, lm_head_weight, bias, softcap, logit_scale)
        return loss(student, teacher_logits, *arguments, **options)

    from_hidden.__name__ = from_hidden.__qualname__ = f"linear_{name}"
    from_hidden.__module__ = loss.__module__
    from_hidden.__doc__ = _DOC.format(name=name) + _parameters(loss.__doc__ or "", [one.name for one in others])
    from_hidden.__signature__ = signature.replace(parameters=[*first, *others, *own])  # type: ignore[attr-defined]
    return from_hidden


def _parameters(doc: str, names: list[str]) -> str:
    """Their part of a docstring's parameters."""
    section = doc.partition("    Parameters\n    ----------\n")[2].partition("\n\n")[0]
    lines, is_wanted = [], False
    for line in section.splitlines(keepends=True):
        if not line.startswith("        "):
            is_wanted = not set(names).isdisjoint(line.split(" : ")[0].strip().split(", "))
        if is_wanted:
            lines.append(line)
    return "".join(lines)
